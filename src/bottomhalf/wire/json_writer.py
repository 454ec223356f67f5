# SPDX-License-Identifier: Apache-2.0
"""JSON as QEMU writes it: members in the order of its hash table, QEMU's escapes, compact or indented.

QEMU keeps objects in a hash table of 512 buckets and prints it bucket by bucket. Its output therefore has an
order that is neither that of insertion nor that of the alphabet, and users compare that output as text. So
the order is part of the format:

    dumps({"id": 1, "return": {}})      # '{"return": {}, "id": 1}'

Within a bucket the newest member comes first, so the insertion order of the given dict matters there. Text is
ASCII: everything else is ``\\uXXXX`` in upper case. The indented form uses four blanks.

``json`` of the standard library recurses, and a client may send an ``id`` nested 1024 deep that must be sent
back; this writer keeps its own stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

_ESCAPE: Final = re.compile(r"[^ !#-\[\]-~]")
_SHORT_ESCAPES: Final = {
    '"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t",
}  # fmt: skip

_BUCKETS: Final = 512
_buckets: dict[str, int] = {}
_BUCKETS_CACHED_MAX: Final = 4096  # keys come from the schema, but also from clients: bounded


def bucket(key: str) -> int:
    """The number (0..511) of the hash bucket that QEMU files ``key`` under."""
    found = _buckets.get(key)
    if found is not None:
        return found
    data = key.encode("utf-8", "surrogatepass")
    value = 0x238F13AF * len(data)
    for index, byte in enumerate(data):
        value += byte << (index * 5 % 24)
    found = (1103515243 * value + 12345 & 0xFFFFFFFF) % _BUCKETS
    if len(_buckets) < _BUCKETS_CACHED_MAX:
        _buckets[key] = found
    return found


def qdict_order(keys: Iterable[str]) -> list[str]:
    """``keys``, given in the order of insertion, in the order in which QEMU prints them."""
    newest_first = list(keys)
    newest_first.reverse()
    newest_first.sort(key=bucket)
    return newest_first


def _quote_one(found: re.Match[str]) -> str:
    character = found.group()
    short = _SHORT_ESCAPES.get(character)
    if short is not None:
        return short
    code = ord(character)
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
    if 0xD800 <= code <= 0xDFFF:
        code = 0xFFFD  # half a character, or a byte of a file name that was no UTF-8
    return f"\\u{code:04X}"


def quote(text: str) -> str:
    """``text`` as a JSON string."""
    return f'"{_ESCAPE.sub(_quote_one, text)}"'


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return quote(value)
    if value is True:
        return "true"
    if value is False:
        return "false"
    if value is None:
        return "null"
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        if value != value:
            return "null"
        text = f"{value:.17g}"
        return {"inf": "1e999", "-inf": "-1e999"}.get(text, text)  # a number that reads back as infinity
    raise TypeError(f"{type(value).__name__} has no JSON form")


def dumps(value: Any, *, pretty: bool = False) -> str:
    """``value`` as JSON text without a line end.

    It is made of dict (with keys that are str), list, tuple, str, int, float, bool and None, nested at will.
    Raises TypeError for other types.
    """
    parts: list[str] = []
    write = parts.append
    # An entry of the stack: iterator over members or elements, the dict they belong to or None, closing text.
    stack: list[tuple[Any, dict[str, Any] | None, str]] = []
    current: Any = value
    while True:
        if isinstance(current, dict):
            write("{")
            stack.append((iter(qdict_order(current)), current, "}"))
            first = True
        elif isinstance(current, (list, tuple)):
            write("[")
            stack.append((iter(current), None, "]"))
            first = True
        else:
            write(_scalar(current))
            first = False
        while stack:
            members, owner, closing = stack[-1]
            try:
                item = next(members)
            except StopIteration:
                stack.pop()
                if pretty:
                    write("\n" + "    " * len(stack))
                write(closing)
                first = False
                continue
            if pretty:
                write(("\n" if first else ",\n") + "    " * len(stack))
            elif not first:
                write(", ")
            if owner is None:
                current = item
            else:
                write(quote(item))
                write(": ")
                current = owner[item]
            break
        else:
            return "".join(parts)
