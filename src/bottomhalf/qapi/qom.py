# SPDX-License-Identifier: Apache-2.0
"""The object tree (qapi/qom.json): lists, properties, types. The tree itself is in ``bottomhalf.qom``."""

from __future__ import annotations

from typing import Annotated, Any

from bottomhalf.qapi.types import Command, Doc, Struct


class ObjectPropertyInfo(Struct):
    """A property of an object."""

    name: Annotated[str, Doc("its name")]
    type: Annotated[str, Doc("its type: a scalar's, an enumeration's, child<TYPE> or link<TYPE>")]
    description: Annotated[str | None, Doc("what it means")] = None
    default_value: Annotated[Any, Doc("its value in a new object")] = None


class ObjectTypeInfo(Struct):
    """A type of objects."""

    name: Annotated[str, Doc("its name")]
    abstract: Annotated[bool | None, Doc("no object is of this type itself", default="off")] = None
    parent: Annotated[str | None, Doc("the type that it is derived from")] = None


class QomList(Command, name="qom-list", returns=list[ObjectPropertyInfo]):
    """List the properties of an object, children among them."""

    path: Annotated[str, Doc("path of the object, or the end of one that fits no other")]


class QomGet(Command, name="qom-get", returns=Any):
    """Read a property."""

    path: Annotated[str, Doc("path of the object")]
    property: Annotated[str, Doc("the property")]


class QomSet(Command, name="qom-set"):
    """Change a property."""

    path: Annotated[str, Doc("path of the object")]
    property: Annotated[str, Doc("the property")]
    value: Annotated[Any, Doc("its new value")]


class QomListTypes(Command, name="qom-list-types", returns=list[ObjectTypeInfo]):
    """List the types of objects."""

    implements: Annotated[str | None, Doc("only types that are derived from this one")] = None
    abstract: Annotated[bool | None, Doc("abstract types as well", default="off")] = None


class QomListProperties(Command, name="qom-list-properties", returns=list[ObjectPropertyInfo]):
    """List the properties that all objects of a type have."""

    typename: Annotated[str, Doc("the type")]
