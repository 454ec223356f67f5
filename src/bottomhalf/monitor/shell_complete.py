# SPDX-License-Identifier: Apache-2.0
"""What could come next in a line at the console: commands, arguments, values; in both forms, see ``shell_line``.

``complete`` is a function of the text before the cursor. Names that only the server knows (its nodes, exports,
devices) come from a table that the caller keeps: which names fit is told by the argument's name and type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bottomhalf.monitor.shell_line import OOB, pairs, split
from bottomhalf.monitor.shell_schema import Member, Path, Schema

OWN_WORDS: Final = {"help": "what there is; 'help COMMAND' tells its arguments", "exit": "leave the console"}
CANDIDATES_MAX: Final = 1000

# Arguments that name something that exists, and where such names come from.
NAMES: Final[dict[str, str]] = {
    "node-name": "nodes",
    "node": "nodes",
    "device": "nodes",
    "overlay": "nodes",
    "parent": "nodes",
    "file": "nodes",
    "backing": "nodes",
    "image": "nodes",
    "target": "nodes",
    "test": "nodes",
    "raw": "nodes",
    "snapshot-node-name": "",
}
IDS: Final[dict[str, str]] = {
    "block-export-del": "exports",
    "chardev-remove": "chardevs",
    "chardev-change": "chardevs",
    "object-del": "objects",
}
NEW_NAMES: Final = frozenset(("blockdev-add",))  # its node-name is one that nobody has yet


@dataclass(frozen=True)
class Candidate:
    """A text that may stand from ``start`` (characters before the cursor, negative) on."""

    text: str
    start: int
    note: str = ""


def complete(before: str, schema: Schema, names: Mapping[str, Sequence[str]]) -> list[Candidate]:
    """The candidates, best first."""
    found = _json(before, schema, names) if before.lstrip().startswith("{") else _words(before, schema, names)
    return found[:CANDIDATES_MAX]


def _words(before: str, schema: Schema, names: Mapping[str, Sequence[str]]) -> list[Candidate]:
    words = split(before)
    current = words.pop() if words and not before[-1:].isspace() else ""
    oob = words[:1] == [OOB]
    if oob:
        del words[0]
    if not words:
        known = {name: "" for name in schema.commands if not oob or schema.allows_oob(name)}
        if not oob:
            known |= OWN_WORDS | {OOB: "run a command out of band"}
        return [Candidate(name, -len(current), note) for name, note in known.items() if name.startswith(current)]
    command, *rest = words
    if command == "help":
        return [Candidate(name, -len(current)) for name in schema.commands if name.startswith(current)]
    key, equals, text = current.partition("=")
    path, known_pairs = tuple(key.split(".")), pairs(rest)
    if equals:
        return _values(schema.member(command, path, known_pairs), command, path, text, schema, names)
    found = []
    for member in _sorted(schema.members(command, path[:-1], known_pairs)):
        place = (*path[:-1], member.name)
        if member.name.startswith(path[-1]) and place not in known_pairs:
            end = _ending(member, schema)
            found.append(Candidate(".".join(place) + end, -len(key), _note(member, schema)))
    return found


def _sorted(members: list[Member]) -> list[Member]:
    return sorted(members, key=lambda member: member.optional)


def _ending(member: Member, schema: Schema) -> str:
    kinds = {schema.kind(choice) for choice in schema.choices(member.type)}
    return "." if kinds <= {"object", "array"} else "="


def _note(member: Member, schema: Schema) -> str:
    kinds = "|".join(dict.fromkeys(schema.kind(choice) for choice in schema.choices(member.type)))
    return kinds if member.optional else f"{kinds}, required"


def _values(
    member: Member | None,
    command: str,
    path: Path,
    text: str,
    schema: Schema,
    names: Mapping[str, Sequence[str]],
) -> list[Candidate]:
    if member is None:
        return []
    fits = list(schema.values(member.type))
    kinds = {schema.kind(choice) for choice in schema.choices(member.type)}
    if "string" in kinds:
        fits += names.get(_source(command, path), ())
    return [Candidate(value, -len(text)) for value in fits if value.startswith(text)]


def _source(command: str, path: Path) -> str:
    name = path[-2] if path[-1].isdecimal() and len(path) > 1 else path[-1]
    if name == "id" and len(path) == 1:
        return IDS.get(command, "")
    if name == "node-name" and (command in NEW_NAMES or len(path) > 1):
        return ""
    return NAMES.get(name, "")


# -- JSON -------------------------------------------------------------------------------------------------------

_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}\[\],:]|[^\s{}\[\],:"]+')


def _json(before: str, schema: Schema, names: Mapping[str, Sequence[str]]) -> list[Candidate]:
    known: dict[Path, str] = {}
    path: list[str] = []  # of the place that is open; "" where a key is still to come
    kinds: list[str] = []
    key = ""
    after_colon = False
    partial: str | None = None
    for token in _TOKEN.findall(before):
        partial = None
        if token[0] == '"':
            if len(token) < 2 or token[-1] != '"':
                partial = token[1:]
            elif after_colon or kinds[-1:] == ["["]:
                known[(*path, key)] = token[1:-1]
            else:
                key = token[1:-1]
        elif token in "{[":
            if kinds:
                path.append(key)
            kinds.append(token)
            key, after_colon = ("0" if token == "[" else ""), False
        elif token in "}]":
            if kinds:
                kinds.pop()
            key = path.pop() if path else ""
            after_colon = False
        elif token == ":":
            after_colon = True
        elif token == ",":
            after_colon = False
            if kinds[-1:] == ["["] and key.isdecimal():
                key = str(int(key) + 1)
    if partial is None:
        return []
    return _in_quotes(partial, (*path, key), after_colon or kinds[-1:] == ["["], known, schema, names)


def _in_quotes(
    partial: str,
    place: Path,
    is_value: bool,
    known: Mapping[Path, str],
    schema: Schema,
    names: Mapping[str, Sequence[str]],
) -> list[Candidate]:
    """Within quotes that are open; what is put there closes them."""
    if len(place) == 1:
        if is_value:
            words = schema.commands if place[0] in ("execute", OOB) else []
            if place[0] == OOB:
                words = [name for name in words if schema.allows_oob(name)]
        else:
            words = ["execute", OOB, "arguments", "id"]
        return [Candidate(f'{name}"', -len(partial)) for name in words if name.startswith(partial)]
    command = known.get(("execute",), known.get((OOB,), ""))
    if place[0] != "arguments":
        return []
    inside = {path[1:]: text for path, text in known.items() if path[0] == "arguments" and len(path) > 1}
    path = place[1:]
    if is_value:
        found = _values(schema.member(command, path, inside), command, path, partial, schema, names)
        return [Candidate(f'{each.text}"', each.start) for each in found if each.text not in ("on", "off")]
    return [
        Candidate(f'{member.name}"', -len(partial), _note(member, schema))
        for member in _sorted(schema.members(command, path[:-1], inside))
        if member.name.startswith(partial) and (*path[:-1], member.name) not in inside
    ]
