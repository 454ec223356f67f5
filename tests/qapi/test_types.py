# SPDX-License-Identifier: Apache-2.0
"""The type kernel: what a struct, a union, a command is."""

from __future__ import annotations

import subprocess
import sys
from enum import StrEnum
from typing import Annotated, Any, TypeAlias

import pytest

from bottomhalf.qapi.types import (
    BOOL,
    INT,
    REQUIRED,
    SIZE,
    STR,
    Alternate,
    Array,
    Command,
    Doc,
    Empty,
    OpenEnum,
    Size,
    Struct,
    TaggedUnion,
    members,
    type_name,
)


class Colour(StrEnum):
    RED = "red"


class Base(Struct):
    """First line.

    More.
    """

    node_name: Annotated[str, Doc("a name")]
    size: Annotated[Size | None, Doc("a size")] = None


class Derived(Base):
    old_name: Annotated[bool, Doc("a flag", name="old_name")] = False
    colours: Annotated[list[Colour] | None, Doc("colours")] = None
    ref: Annotated[Ref | None, Doc("a reference")] = None


Ref: TypeAlias = Annotated[Base | str, Alternate("Ref")]


def test_member_table() -> None:
    table = members(Derived)
    assert [member.name for member in table] == ["node-name", "size", "old_name", "colours", "ref"]
    assert [member.attribute for member in table] == ["node_name", "size", "old_name", "colours", "ref"]
    assert [member.optional for member in table] == [False, True, True, True, True]
    assert [member.default for member in table] == [REQUIRED, None, False, None, None]
    name, size, flag, colours, ref = (member.type for member in table)
    assert (name, size, flag) == (STR, SIZE, BOOL)
    assert isinstance(colours, Array) and colours.element is Colour
    assert isinstance(ref, Alternate) and ref.choices == (Base, STR)
    assert [type_name(member.type) for member in table] == ["str", "size", "bool", "[Colour]", "Ref"]
    assert members(Derived) is table
    assert members(Base) != table
    assert members(Empty) == ()


def test_instances() -> None:
    one = Derived(node_name="a", size=1)
    assert one == Derived(size=1, node_name="a")
    assert one != Derived(node_name="b")
    assert one != Base(node_name="a", size=1)
    assert hash(one) == hash(Derived(node_name="a", size=1))
    assert repr(one) == "Derived(node_name='a', size=1, old_name=False)"
    assert one.replace(size=2) == Derived(node_name="a", size=2)
    with pytest.raises(AttributeError, match="frozen"):
        one.size = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="needs node_name"):
        Derived()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="has no nome"):
        Derived(node_name="a", nome=1)  # type: ignore[call-arg]


class Kind(OpenEnum):
    """Kinds."""


class Thing(TaggedUnion, tag="kind", tag_values=Kind):
    """A thing."""

    kind: Annotated[Kind, Doc("its kind")]


def test_branches_can_be_added() -> None:
    class Round(Struct):
        """A round thing."""

        radius: Annotated[int, Doc("millimetres")]

    assert Kind.values == {}
    Thing.register_branch("round", Round)
    assert Kind.values == {"round": "A round thing"}
    assert Thing.branches == {"round": Round}
    assert [member.name for member in members(Thing)] == ["kind"]
    assert members(Round)[0].type is INT
    with pytest.raises(AssertionError):
        Thing.register_branch("round", Round)


def test_a_command_is_its_arguments_or_names_them() -> None:
    from bottomhalf.qapi.types import COMMANDS

    try:

        class Boxed(Command, name="x-test-boxed", boxed=Base, returns=list[Base]):
            """A command."""

        class Plain(Command, name="x-test-plain"):
            """Another."""

            id: Annotated[str, Doc("an id")]

        assert COMMANDS["x-test-boxed"] is Boxed
        assert Boxed.argument_type() is Base
        assert Plain.argument_type() is Plain
        assert Plain(id="a").id == "a"
        with pytest.raises(AssertionError):

            class Twice(Command, name="x-test-plain"):
                """The same name again."""
    finally:
        COMMANDS.pop("x-test-boxed", None)
        COMMANDS.pop("x-test-plain", None)


HEAVY = ["dataclasses", "inspect", "json", "difflib", "ast", "bottomhalf.qapi.help", "bottomhalf.qapi.schema"]


def test_importing_the_schema_is_cheap() -> None:
    """What the daemon imports at its start brings none of the modules that cost milliseconds."""
    script = "import sys; before = set(sys.modules); import bottomhalf.qapi.commands, bottomhalf.qapi.keyval"
    script += "; print(*(set(sys.modules) - before))"
    run = [sys.executable, "-c", script]
    loaded: Any = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert "bottomhalf.qapi.block" in loaded
    assert not [name for name in HEAVY if name in loaded]
