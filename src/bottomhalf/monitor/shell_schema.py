# SPDX-License-Identifier: Apache-2.0
"""What a server says it can do (``query-qmp-schema``), asked as a person at a keyboard asks: which commands, which
arguments, which values. Of our server or of QEMU's: nothing here looks at our own classes.

Facts: the schema is a flat list whose entities refer to each other by name, an option is found by following members
and, in a union, the branch that its tag selects; an alternate is one of several types. Names of types mean nothing.
Consequence: which members there are depends on what was typed before, ``driver=file`` say. Decision: a place is a path
of names, and what was typed is a table from such paths to texts.

    schema = Schema(entities)
    schema.members("blockdev-add", (), {("driver",): "file"})      # [Member("driver", ...), Member("filename", ...)]
    schema.values(member.type)                                     # ["on", "off"], or the values of an enumeration
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Path = tuple[str, ...]
Known = Mapping[Path, str]

DEPTH_MAX: Final = 32  # of a path; the schema may be recursive, what a person types is not deep
BOOLEANS: Final = ("on", "off")


@dataclass(frozen=True)
class Member:
    """An argument, or a part of one."""

    name: str
    type: str
    optional: bool


class Schema:
    """The schema of one server. What in it is not as it should be is as if it were not there."""

    def __init__(self, entities: Iterable[Any] = ()) -> None:
        self._entities: dict[str, dict[str, Any]] = {
            entity["name"]: entity for entity in entities if isinstance(entity, dict) and "name" in entity
        }
        self.commands = sorted(self._named("command"))
        self.events = sorted(self._named("event"))

    def _named(self, kind: str) -> list[str]:
        return [name for name, entity in self._entities.items() if entity.get("meta-type") == kind]

    def allows_oob(self, command: str) -> bool:
        """Whether a command may run out of band."""
        return bool(self._entities.get(command, {}).get("allow-oob"))

    def kind(self, type: str) -> str:
        """The meta-type of a type, for a built-in one its JSON type."""
        entity = self._entities.get(type, {})
        meta = str(entity.get("meta-type", ""))
        return str(entity.get("json-type", "")) if meta == "builtin" else meta

    def choices(self, type: str) -> list[str]:
        """A type, or the types that an alternate may be."""
        entity = self._entities.get(type, {})
        if entity.get("meta-type") == "alternate":
            return [str(member.get("type")) for member in entity.get("members", [])]
        return [type]

    def values(self, type: str) -> list[str]:
        """The values that a person can choose from; none for what is free."""
        found: list[str] = []
        for choice in self.choices(type):
            entity = self._entities.get(choice, {})
            if entity.get("meta-type") == "enum":
                found += [str(member.get("name")) for member in entity.get("members", [])]
            elif self.kind(choice) == "boolean":
                found += BOOLEANS
        return found

    def members(self, command: str, path: Path = (), known: Known | None = None) -> list[Member]:
        """What may stand at a place among the arguments of a command."""
        entity = self._entities.get(command, {})
        if entity.get("meta-type") != "command" or len(path) > DEPTH_MAX:
            return []
        return self._inside(str(entity.get("arg-type")), path, (), known or {})

    def member(self, command: str, path: Path, known: Known | None = None) -> Member | None:
        """One of them."""
        if not path:
            return None
        return next((each for each in self.members(command, path[:-1], known) if each.name == path[-1]), None)

    def _inside(self, type: str, rest: Path, here: Path, known: Known) -> list[Member]:
        found: list[Member] = []
        for choice in self.choices(type):
            entity = self._entities.get(choice, {})
            if entity.get("meta-type") == "array":
                element = str(entity.get("element-type"))
                if rest and rest[0].isdecimal():
                    found += self._inside(element, rest[1:], (*here, rest[0]), known)
                elif not rest:
                    found.append(Member("0", element, True))
                continue
            members = self._of(choice, here, known)
            if not rest:
                found += members
                continue
            for member in members:
                if member.name == rest[0]:
                    found += self._inside(member.type, rest[1:], (*here, rest[0]), known)
        return found

    def _of(self, type: str, here: Path, known: Known) -> list[Member]:
        """The members of an object, with those of the branch that was chosen."""
        found: list[Member] = []
        for _ in range(DEPTH_MAX):  # a branch may be a union itself
            entity = self._entities.get(type, {})
            if entity.get("meta-type") != "object":
                break
            found += [
                Member(str(each["name"]), str(each["type"]), "default" in each) for each in entity.get("members", [])
            ]
            chosen = known.get((*here, str(entity.get("tag", ""))))
            branch = next((each for each in entity.get("variants", []) if each.get("case") == chosen), None)
            if branch is None:
                break
            type = str(branch["type"])
        return found
