# SPDX-License-Identifier: Apache-2.0
"""Introspection: the schema as data, in the form of ``query-qmp-schema``, and the comparison of two such.

Programs that drive QEMU look up there whether a command or an option exists before they use it. The form is
a flat list of entities that refer to each other by name; names of types mean nothing to a client, and QEMU
masks them with numbers to keep it so (docs/devel/qapi-code-gen.rst, "Client JSON Protocol introspection").

``differences`` walks two schemas from the commands and events of the first and says in which members they
differ. With it a test, or a person with a QEMU at hand, can see what we lack.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

from bottomhalf.qapi.help import enum_values
from bottomhalf.qapi.types import (
    Alternate,
    Array,
    Empty,
    OpenEnum,
    Scalar,
    Struct,
    TaggedUnion,
    members,
    resolve,
    type_name,
)

_EMPTY_NAME = "q_empty"


class _Builder:
    def __init__(self) -> None:
        self.entities: dict[str, dict[str, Any]] = {}  # in order of first use
        self.names: dict[Any, str] = {}

    def struct_name(self, type: type[Struct]) -> str:
        if not members(type) and not issubclass(type, TaggedUnion):
            type = Empty
        return self.name(type)

    def name(self, type: Any) -> str:
        """The name of a type, which is described as well if that is still to do."""
        if isinstance(type, Scalar):
            name = "int" if type.json == "int" else type.name
            self.entities.setdefault(name, {"name": name, "meta-type": "builtin", "json-type": type.json})
            return name
        if isinstance(type, Array):
            element = self.name(type.element)
            name = f"[{element}]"
            self.entities.setdefault(name, {"name": name, "meta-type": "array", "element-type": element})
            return name
        if type is Empty:
            self.entities.setdefault(_EMPTY_NAME, {"name": _EMPTY_NAME, "meta-type": "object", "members": []})
            return _EMPTY_NAME
        name = type_name(type)
        if name not in self.entities:
            entity: dict[str, Any] = {"name": name}
            self.entities[name] = entity
            self.describe(type, entity)
        return name

    def describe(self, type: Any, entity: dict[str, Any]) -> None:
        if isinstance(type, Alternate):
            entity["meta-type"] = "alternate"
            entity["members"] = [{"type": self.name(choice)} for choice in type.choices]
        elif issubclass(type, (Enum, OpenEnum)):
            values = enum_values(type)
            entity["meta-type"] = "enum"
            entity["members"] = [{"name": value} for value in values]
            entity["values"] = values
        else:
            entity["meta-type"] = "object"
            entity["members"] = [self.member(member) for member in members(type)]
            if issubclass(type, TaggedUnion):
                entity["tag"] = type.tag
                entity["variants"] = [
                    {"case": value, "type": self.struct_name(branch)}
                    for value, branch in type.branches.items()
                ]

    def member(self, member: Any) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": member.name, "type": self.name(member.type)}
        if member.optional:
            entry["default"] = None
        if member.doc.features:
            entry["features"] = list(member.doc.features)
        return entry


def schema(*, masked: bool = False) -> list[dict[str, Any]]:
    """All commands and events that are defined, with every type that they need.

    ``masked`` replaces the names of types by numbers, as QEMU does.
    """
    from bottomhalf.qapi.commands import COMMANDS, EVENTS

    builder = _Builder()
    heads: list[dict[str, Any]] = []
    for name, event in EVENTS.items():
        heads.append({"name": name, "meta-type": "event", "arg-type": builder.struct_name(event)})
        if event.features:
            heads[-1]["features"] = list(event.features)
    for name, command in COMMANDS.items():
        returns = Empty if command.returns is None else resolve(command.returns)
        head: dict[str, Any] = {
            "name": name,
            "meta-type": "command",
            "arg-type": builder.struct_name(command.argument_type()),
            "ret-type": builder.name(returns),
        }
        if command.allow_oob:
            head["allow-oob"] = True
        if command.features:
            head["features"] = list(command.features)
        heads.append(head)
    entities = heads + list(builder.entities.values())
    return _mask(entities) if masked else entities


def _mask(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    numbers: dict[str, str] = {}

    def mask(name: str) -> str:
        if name.startswith("["):
            return f"[{mask(name[1:-1])}]"
        if by_name[name]["meta-type"] == "builtin":
            return name
        return numbers.setdefault(name, str(len(numbers)))

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: mask(item) if key in ("type", "arg-type", "ret-type", "element-type") else walk(item)
            for key, item in value.items()
        }

    by_name = {entity["name"]: entity for entity in entities}
    result = []
    for entity in entities:
        copy = walk(entity)
        if entity["meta-type"] not in ("command", "event"):
            copy["name"] = mask(entity["name"])
        result.append(copy)
    return result


def differences(ours: Iterable[dict[str, Any]], theirs: Iterable[dict[str, Any]]) -> list[str]:
    """How the commands and events of ``ours`` differ from those of the same name in ``theirs``, line by line.

    Values of enumerations, cases of unions and whole commands that only ``theirs`` has are not differences:
    we may know fewer drivers. Members are compared both ways: order, type, optionality and features.
    """
    left = {entity["name"]: entity for entity in ours}
    right = {entity["name"]: entity for entity in theirs}
    found: list[str] = []
    seen: set[tuple[str, str]] = set()
    work: list[tuple[str, str, str]] = []

    def note(path: str, text: str) -> None:
        found.append(f"{path}: {text}")

    for name, entity in left.items():
        if entity["meta-type"] in ("command", "event"):
            if name not in right:
                note(name, "unknown")
                continue
            other = right[name]
            if entity.get("features") != other.get("features"):
                note(name, f"features {entity.get('features')} against {other.get('features')}")
            for key in ("arg-type", "ret-type"):
                if key in entity:
                    work.append((f"{name}({key})", entity[key], other[key]))
    while work:
        path, left_name, right_name = work.pop()
        if (left_name, right_name) in seen:
            continue
        seen.add((left_name, right_name))
        mine, other = left[left_name], right[right_name]
        if mine["meta-type"] != other["meta-type"]:
            note(path, f"{mine['meta-type']} against {other['meta-type']}")
            continue
        _compare(path, mine, other, note, work)
    return sorted(found)


def _compare(path: str, mine: Any, other: Any, note: Any, work: list[tuple[str, str, str]]) -> None:
    kind = mine["meta-type"]
    if kind == "builtin":
        if mine["json-type"] != other["json-type"]:
            note(path, f"{mine['json-type']} against {other['json-type']}")
    elif kind == "array":
        work.append((f"{path}[]", mine["element-type"], other["element-type"]))
    elif kind == "enum":
        extra = [value for value in mine["values"] if value not in other["values"]]
        if extra:
            note(path, f"values {extra} are not there")
    elif kind == "alternate":
        if len(mine["members"]) != len(other["members"]):
            note(path, "another number of alternatives")
        for one, two in zip(mine["members"], other["members"], strict=False):
            work.append((f"{path}|", one["type"], two["type"]))
    else:
        _compare_objects(path, mine, other, note, work)


def _compare_objects(path: str, mine: Any, other: Any, note: Any, work: list[tuple[str, str, str]]) -> None:
    ours = [member["name"] for member in mine["members"]]
    theirs = [member["name"] for member in other["members"]]
    if ours != theirs:
        note(path, f"members {ours} against {theirs}")
    if mine.get("tag") != other.get("tag"):
        note(path, f"tag {mine.get('tag')} against {other.get('tag')}")
    other_members = {member["name"]: member for member in other["members"]}
    for member in mine["members"]:
        twin = other_members.get(member["name"])
        if twin is None:
            continue
        where = f"{path}.{member['name']}"
        if ("default" in member) != ("default" in twin):
            note(where, "optional on one side only")
        if member.get("features") != twin.get("features"):
            note(where, f"features {member.get('features')} against {twin.get('features')}")
        work.append((where, member["type"], twin["type"]))
    other_cases = {variant["case"]: variant["type"] for variant in other.get("variants", [])}
    for variant in mine.get("variants", []):
        if variant["case"] not in other_cases:
            note(path, f"case {variant['case']} is not there")
        else:
            work.append((f"{path}({variant['case']})", variant["type"], other_cases[variant["case"]]))
