# SPDX-License-Identifier: Apache-2.0
"""Options on a command line: ``key=value,key.sub=value,list.0=value``, or a JSON object.

``--blockdev``, ``--export``, ``--nbd-server``, ``--monitor`` and ``--object`` take this form (``--chardev``
takes an older one, see ``qemu_opts``):

    key-vals     = [ key-val { ',' key-val } [ ',' ] ]
    key-val      = key '=' val | help
    key          = name { '.' ( name | index ) }
    val          = { any character but ',' | ',,' }
    help         = 'help' | '?'

The first key and its '=' may be left out where the option has an implied key; that value then holds neither
',' nor '='. The text denotes a tree: a fragment of a key selects a member of an object, a number an element
of a list; leaves are strings. If a leaf is given twice the last one counts. An object or list cannot be
empty. Text that begins with '{' is JSON instead, with its own types.

    parse_keyval("driver=raw,file.driver=null-co")          # {"driver": "raw", "file": {"driver": "null-co"}}
    parse_options(BlockdevOptions, "raw,file=disk0", implied_key="driver", loads=loads)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

from bottomhalf.qapi.errors import HelpRequested, OptionError
from bottomhalf.qapi.types import Struct, TaggedUnion
from bottomhalf.qapi.visit import from_json, from_keyval

S = TypeVar("S", bound=Struct)

FRAGMENT_LENGTH_MAX: Final = 127  # characters, as in QEMU (util/keyval.c)
# Ours; argv itself is limited to 128 KiB per argument, but texts also come from files and from json: names.
TEXT_LENGTH_MAX: Final = 1 << 20  # characters
DEPTH_MAX: Final = 64  # fragments of a key
COUNT_MAX: Final = 4096  # keys

_NAME: Final = re.compile(r"(?:__[A-Za-z0-9.-]+_)?[A-Za-z][A-Za-z0-9_-]*")
_INDEX: Final = re.compile(r"[0-9]+", re.ASCII)
_KEY_END: Final = re.compile(r"[=,]|\Z")
_VALUE: Final = re.compile(r"[^,]*(?:,,[^,]*)*")
HELP_WORDS: Final = frozenset(("help", "?"))


def _shorten(text: str) -> str:
    return text if len(text) <= 256 else f"{text[:253]}..."


def _fragments(key: str) -> list[str]:
    """Split a key. Raises OptionError if it is not well formed."""
    fragments: list[str] = []
    position = 0
    while True:
        found = _INDEX.match(key, position) if fragments else None
        found = found or _NAME.match(key, position)
        if found is None or key[found.end() : found.end() + 1] not in ("", "."):
            raise OptionError(f"Invalid parameter '{_shorten(key)}'", key=_shorten(key))
        fragment = found.group()
        if len(fragment) > FRAGMENT_LENGTH_MAX:
            part = "" if fragment == key else " fragment"
            raise OptionError(f"Parameter{part} '{_shorten(fragment)}' is too long", key=_shorten(key))
        fragments.append(fragment)
        if len(fragments) > DEPTH_MAX:
            raise OptionError(
                f"Parameter '{_shorten(key)}' is nested too deeply",
                key=_shorten(key),
                hint=f"At most {DEPTH_MAX} levels are allowed.",
            )
        position = found.end() + 1
        if position > len(key):
            return fragments


def _put(tree: dict[str, Any], key: str, value: str) -> None:
    fragments = _fragments(key)
    cursor = 0
    for fragment in fragments[:-1]:
        cursor += len(fragment) + 1
        inner = tree.setdefault(fragment, {})
        if not isinstance(inner, dict):
            raise _inconsistent(key[: cursor - 1])
        tree = inner
    if isinstance(tree.get(fragments[-1]), dict):
        raise _inconsistent(key)
    tree[fragments[-1]] = value


def _inconsistent(prefix: str) -> OptionError:
    return OptionError(
        f"Parameters '{_shorten(prefix)}.*' used inconsistently",
        key=_shorten(prefix),
        hint=f"'{_shorten(prefix)}' cannot be more than one of a value, an object and a list.",
    )


def _listify(tree: dict[str, Any], prefix: str) -> Any:
    """Turn every object whose members are all numbers into a list."""
    indices: dict[int, Any] = {}
    numbers = 0
    for name, value in tree.items():
        if isinstance(value, dict):
            value = tree[name] = _listify(value, f"{prefix}{name}.")
        if name[0].isdigit():
            numbers += 1
            indices[int(name) if len(name.lstrip("0")) < 10 else 1 << 31] = value
    if not numbers:
        return tree
    if numbers < len(tree):
        raise _inconsistent(prefix[:-1])
    result = []
    for index in range(min(len(tree), max(indices)) + 1):
        if index not in indices:
            raise OptionError(f"Parameter '{prefix}{index}' missing", key=f"{prefix}{index}")
        result.append(indices[index])
    return result


def parse_keyval_help(text: str, implied_key: str | None = None) -> tuple[dict[str, Any], bool]:
    """Like ``parse_keyval``; the second result says whether the user asked for help."""
    if len(text) > TEXT_LENGTH_MAX:
        raise OptionError("Option is too long", hint=f"At most {TEXT_LENGTH_MAX} characters are allowed.")
    tree: dict[str, Any] = {}
    help_wanted = False
    position = count = 0
    while position < len(text):
        count += 1
        if count > COUNT_MAX:
            raise OptionError("Option has too many parameters", hint=f"At most {COUNT_MAX} are allowed.")
        found = _KEY_END.search(text, position)
        assert found is not None
        end = found.start()
        word = text[position:end]
        if found.group() == "=":
            value = _VALUE.match(text, end + 1)
            assert value is not None
            _put(tree, word, value.group().replace(",,", ","))
            position = value.end() + 1
        else:
            if word in HELP_WORDS:
                help_wanted = True
            elif count == 1 and implied_key and word:
                _put(tree, implied_key, word)
            else:
                _fragments(word)
                raise OptionError(
                    f"Expected '=' after parameter '{_shorten(word)}'",
                    key=_shorten(word),
                    hint="A comma inside a value is written twice." if count > 1 else None,
                )
            position = end + 1
    return _listify(tree, ""), help_wanted


def parse_keyval(text: str, implied_key: str | None = None) -> dict[str, Any]:
    """The tree that ``text`` denotes: dicts and lists with strings at the leaves. Raises OptionError."""
    tree, help_wanted = parse_keyval_help(text, implied_key)
    if help_wanted:
        raise OptionError("Help is not available for this option")
    return tree


def parse_options(
    type: type[S], text: str, *, implied_key: str | None = None, loads: Callable[[str], Any]
) -> S:
    """An instance of ``type`` from a command line option, in either form.

    ``loads`` reads JSON and raises ValueError with the text of the error: ``wire.json_reader.loads``, handed
    over by the caller because this package and that one do not know each other.

    Raises OptionError, and HelpRequested (whose ``str()`` is the text) if ``help`` or ``?`` is among the
    words; ``file,help`` asks for the help of the branch ``file``.
    """
    if text.startswith("{"):
        if len(text) > TEXT_LENGTH_MAX:
            raise OptionError("Option is too long", hint=f"At most {TEXT_LENGTH_MAX} characters are allowed.")
        try:
            value = loads(text)
        except ValueError as error:
            raise OptionError(str(error)) from None
        return from_json(type, value)
    tree, help_wanted = parse_keyval_help(text, implied_key)
    if help_wanted:
        tag = tree.get(type.tag) if issubclass(type, TaggedUnion) else None
        known = isinstance(tag, str) and issubclass(type, TaggedUnion) and tag in type.branches
        raise HelpRequested(type, implied_key, tag if known else None)
    return from_keyval(type, tree)


def format_keyval(tree: dict[str, Any]) -> str:
    """Text that ``parse_keyval`` reads as ``tree``. Leaves must be strings, inner nodes not empty."""
    parts: list[str] = []

    def add(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                add(f"{prefix}.{name}" if prefix else name, value)
        elif isinstance(node, list):
            for index, value in enumerate(node):
                add(f"{prefix}.{index}", value)
        else:
            parts.append(f"{prefix}={node.replace(',', ',,')}")

    add("", tree)
    return ",".join(parts)
