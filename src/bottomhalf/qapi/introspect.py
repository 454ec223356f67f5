# SPDX-License-Identifier: Apache-2.0
"""Types of the introspection (qapi/introspect.json): ``query-qmp-schema``. What it tells is in ``schema``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from bottomhalf.qapi.types import Command, Doc, Struct, TaggedUnion


class SchemaMetaType(StrEnum):
    """Kinds of entities."""

    BUILTIN = "builtin"
    ENUM = "enum"
    ARRAY = "array"
    OBJECT = "object"
    ALTERNATE = "alternate"
    COMMAND = "command"
    EVENT = "event"


class JSONType(StrEnum):
    """Types of JSON, and of what QEMU makes of them."""

    STRING = "string"
    NUMBER = "number"
    INT = "int"
    BOOLEAN = "boolean"
    NULL = "null"
    OBJECT = "object"
    ARRAY = "array"
    VALUE = "value"


class SchemaInfoBuiltin(Struct):
    """A type without parts."""

    json_type: Annotated[JSONType, Doc("how it is written")]


class SchemaInfoEnumMember(Struct):
    """A value of an enumeration."""

    name: Annotated[str, Doc("the value")]
    features: Annotated[list[str] | None, Doc("what is special about it")] = None


class SchemaInfoEnum(Struct):
    """An enumeration."""

    members: Annotated[list[SchemaInfoEnumMember], Doc("its values")]
    values: Annotated[list[str], Doc("the same without features", features=("deprecated",))]


class SchemaInfoArray(Struct):
    """A list."""

    element_type: Annotated[str, Doc("type of its elements")]


class SchemaInfoObjectMember(Struct):
    """A member of an object."""

    name: Annotated[str, Doc("its name")]
    type: Annotated[str, Doc("its type")]
    default: Annotated[Any, Doc("there if the member is optional; null says nothing about the default")] = None
    features: Annotated[list[str] | None, Doc("what is special about it")] = None


class SchemaInfoObjectVariant(Struct):
    """Members that depend on the tag."""

    case: Annotated[str, Doc("value of the tag")]
    type: Annotated[str, Doc("type that has the members")]


class SchemaInfoObject(Struct):
    """An object."""

    members: Annotated[list[SchemaInfoObjectMember], Doc("members that it always may have")]
    tag: Annotated[str | None, Doc("the member that the variants depend on")] = None
    variants: Annotated[list[SchemaInfoObjectVariant] | None, Doc("members that depend on the tag")] = None


class SchemaInfoAlternateMember(Struct):
    """One of the types of an alternate."""

    type: Annotated[str, Doc("the type")]


class SchemaInfoAlternate(Struct):
    """One of several types."""

    members: Annotated[list[SchemaInfoAlternateMember], Doc("the types")]


class SchemaInfoCommand(Struct):
    """A command."""

    arg_type: Annotated[str, Doc("type of its arguments")]
    ret_type: Annotated[str, Doc("type of what it returns")]
    allow_oob: Annotated[bool | None, Doc("it may be executed out of band", default="off")] = None


class SchemaInfoEvent(Struct):
    """An event."""

    arg_type: Annotated[str, Doc("type of its data")]


class SchemaInfo(
    TaggedUnion,
    tag="meta-type",
    branches={
        "builtin": SchemaInfoBuiltin,
        "enum": SchemaInfoEnum,
        "array": SchemaInfoArray,
        "object": SchemaInfoObject,
        "alternate": SchemaInfoAlternate,
        "command": SchemaInfoCommand,
        "event": SchemaInfoEvent,
    },
):
    """A command, an event or a type."""

    name: Annotated[str, Doc("its name; a type's means nothing")]
    meta_type: Annotated[SchemaMetaType, Doc("what it is")]
    features: Annotated[list[str] | None, Doc("what is special about it")] = None


class QueryQmpSchema(Command, name="query-qmp-schema", returns=list[SchemaInfo]):
    """Describe all commands, events and types."""
