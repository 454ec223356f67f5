# SPDX-License-Identifier: Apache-2.0
"""A line that a person types at the console becomes a QMP command. Bytes and sockets are not known here.

Two forms, those of QEMU's qmp-shell:

    blockdev-add driver=raw node-name=r file.driver=file file.filename="/a b.img"
    {"execute": "blockdev-del", "arguments": {"node-name": "r"}}

and a third in between, ``blockdev-del {"node-name": "r"}``. ``exec-oob`` before the name runs it out of band. Dots in
a key go into an object, numbers into a list. Where the schema knows the argument it decides what a value is, so a node
called ``1`` is a string and needs no quotes; elsewhere numbers, ``true``, ``null`` and JSON are what they look like.
A value in double quotes is a string in JSON's escapes, one in single quotes is taken as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from bottomhalf.monitor.shell_schema import Path, Schema
from bottomhalf.qapi.errors import OptionError, did_you_mean
from bottomhalf.wire.json_reader import loads

LINE_LENGTH_MAX: Final = 1 << 20  # characters
FRAGMENTS_MAX: Final = 32  # of a key
OOB: Final = "exec-oob"
SECRETIVE: Final = re.compile(r"secret|password|passwd", re.IGNORECASE)

_INTEGER: Final = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|[0-9]+)")
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_TRUE: Final = frozenset(("on", "yes", "true"))
_FALSE: Final = frozenset(("off", "no", "false"))
_CLOSING: Final = {"{": "}", "[": "]"}


@dataclass(frozen=True)
class Call:
    """A command to run."""

    command: str
    arguments: dict[str, Any] = field(default_factory=dict)
    oob: bool = False


def split(line: str) -> list[str]:
    """The words of a line; blanks within quotes and brackets part nothing. An unfinished one is a word too, because
    completion asks about those."""
    words: list[str] = []
    word = quote = ""
    open_brackets: list[str] = []
    escaped = False
    for sign in line:
        if quote:
            if escaped:
                escaped = False
            elif sign == "\\":
                escaped = quote == '"'
            elif sign == quote:
                quote = ""
        elif sign.isspace() and not open_brackets:
            if word:
                words.append(word)
            word = ""
            continue
        elif sign in "\"'" and (open_brackets or not word or word[-1] == "="):
            quote = sign
        elif sign in _CLOSING and (open_brackets or not word or word[-1] == "="):
            open_brackets.append(_CLOSING[sign])
        elif open_brackets and sign == open_brackets[-1]:
            open_brackets.pop()
        word += sign
    return [*words, word] if word else words


def is_complete(line: str) -> bool:
    """Whether a line of JSON has all its brackets, so that Enter means: send it."""
    probe = split(f"{line} x")
    return bool(probe) and probe[-1] == "x"


def parse(line: str, schema: Schema) -> Call | None:
    """The command in a line, None if it is blank or a comment. OptionError."""
    if len(line) > LINE_LENGTH_MAX:
        raise OptionError(f"The line is longer than {LINE_LENGTH_MAX} characters")
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    if line.startswith("{"):
        return _from_json(line)
    if not is_complete(line):
        raise OptionError("A quote or a bracket is not closed")
    words = split(line)
    oob = words[0] == OOB
    if oob:
        del words[0]
    if not words:
        raise OptionError(f"'{OOB}' needs the name of a command")
    command, *rest = words
    if schema.commands and command not in schema.commands:
        raise OptionError(
            f"The command {command} has not been found", hint=did_you_mean(command, [*schema.commands, "help", "exit"])
        )
    if len(rest) == 1 and rest[0].startswith("{"):
        return Call(command, _object(rest[0]), oob)
    return Call(command, _arguments(command, rest, schema), oob)


def _from_json(line: str) -> Call:
    message = _object(line)
    name = OOB if OOB in message else "execute"
    command, arguments = message.get(name), message.get("arguments", {})
    unknown = sorted(set(message) - {name, "arguments", "id"})
    if unknown:
        raise OptionError(f"QMP input member '{unknown[0]}' is unexpected", key=unknown[0])
    if not isinstance(command, str):
        raise OptionError("QMP input lacks member 'execute'", hint='Type {"execute": "COMMAND"}, or COMMAND alone.')
    if not isinstance(arguments, dict):
        raise OptionError("QMP input member 'arguments' must be an object", key="arguments")
    return Call(command, arguments, name == OOB)


def _object(text: str) -> dict[str, Any]:
    value = _json(text)
    if not isinstance(value, dict):
        raise OptionError("QMP input must be a JSON object")
    return value


def _json(text: str) -> Any:
    try:
        return loads(text)
    except ValueError as error:
        raise OptionError(str(error)) from None


def pairs(words: list[str]) -> dict[Path, str]:
    """What ``key=value`` words say, as texts by path. Words that are none are passed over."""
    found: dict[Path, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if equals:
            found[tuple(key.split("."))] = _unquoted(text)
    return found


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _arguments(command: str, words: list[str], schema: Schema) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    known = pairs(words)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise OptionError(f"Expected '=' after parameter '{word}'", key=word)
        path = tuple(key.split("."))
        if not all(path) or len(path) > FRAGMENTS_MAX:
            raise OptionError(f"Invalid parameter '{key}'", key=key)
        member = schema.member(command, path, known)
        place = tree
        for fragment in path[:-1]:
            place = place.setdefault(fragment, {})
            if not isinstance(place, dict):
                raise OptionError(f"Parameters '{key}' used inconsistently", key=key)
        if path[-1] in place:
            raise OptionError(f"Parameter '{key}' is given twice", key=key)
        place[path[-1]] = _value(key, text, None if member is None else member.type, schema)
    return {name: _listed(value, name) for name, value in tree.items()}


def _listed(value: Any, key: str) -> Any:
    """Objects whose keys are 0, 1, ... are lists. What came as JSON has no such keys or means them."""
    if not isinstance(value, dict) or not value:
        return value
    inner = {name: _listed(each, f"{key}.{name}") for name, each in value.items()}
    if not all(name.isdecimal() for name in inner):
        return inner
    numbers = {int(name): each for name, each in inner.items()}
    missing = next((number for number in range(len(numbers)) if number not in numbers), None)
    if missing is not None:
        raise OptionError(f"Parameter '{key}.{missing}' missing", key=f"{key}.{missing}")
    return [numbers[number] for number in range(len(numbers))]


def _value(key: str, text: str, type: str | None, schema: Schema) -> Any:
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1]
    if text.startswith('"'):
        return _json(text)
    kinds = [] if type is None else [schema.kind(choice) for choice in schema.choices(type)]
    if text[:1] in _CLOSING and "string" not in kinds[:1]:
        return _json(text)
    if text == "null" and "null" in kinds:
        return None
    if any(kind in kinds for kind in ("string", "enum")):
        return text
    if "boolean" in kinds:
        if text not in _TRUE | _FALSE:
            raise OptionError(f"Parameter '{key}' expects 'on' or 'off'", key=key)
        return text in _TRUE
    if "int" in kinds:
        if not _INTEGER.fullmatch(text):
            raise OptionError(f"Parameter '{key}' expects a number", key=key)
        return int(text, 0) if "x" in text.lower() else int(text)
    return _guess(text)


def _guess(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text == "null":
        return None
    return loads(text) if _NUMBER.fullmatch(text) else text
