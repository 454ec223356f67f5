# SPDX-License-Identifier: Apache-2.0
"""Commands about the object tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.qapi.objects import ObjectDel, ObjectOptions
from bottomhalf.qapi.qom import (
    ObjectPropertyInfo,
    ObjectTypeInfo,
    QomGet,
    QomList,
    QomListProperties,
    QomListTypes,
    QomSet,
)
from bottomhalf.qom.object import Property, parent_name, subtypes
from bottomhalf.qom.tree import class_of

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage


def _infos(properties: dict[str, Property]) -> list[ObjectPropertyInfo]:
    return [
        ObjectPropertyInfo(
            name=name, type=each.type, description=each.description, default_value=each.default
        )
        for name, each in properties.items()
    ]


def qom_list(storage: Storage, arguments: QomList) -> list[ObjectPropertyInfo]:
    """qom-list."""
    return _infos(storage.tree.resolve(arguments.path).all_properties())


def qom_get(storage: Storage, arguments: QomGet) -> Any:
    """qom-get."""
    return storage.tree.resolve(arguments.path).get(arguments.property)


def qom_set(storage: Storage, arguments: QomSet) -> None:
    """qom-set."""
    storage.tree.resolve(arguments.path).set(arguments.property, arguments.value)


def qom_list_types(storage: Storage, arguments: QomListTypes) -> list[ObjectTypeInfo]:
    """qom-list-types."""
    return [
        ObjectTypeInfo(name=each.type_name, abstract=each.abstract or None, parent=parent_name(each))
        for each in subtypes(arguments.implements, abstract=bool(arguments.abstract))
    ]


def qom_list_properties(storage: Storage, arguments: QomListProperties) -> list[ObjectPropertyInfo]:
    """qom-list-properties."""
    return _infos(dict(reversed(list(class_of(arguments.typename).class_properties()))))


def object_add(storage: Storage, options: ObjectOptions) -> None:
    """object-add."""
    storage.add_object(options)


def object_del(storage: Storage, arguments: ObjectDel) -> None:
    """object-del."""
    storage.tree.delete(arguments.id)


HANDLERS: Final[dict[str, Callable[[Storage, Any], Any]]] = {
    "qom-list": qom_list,
    "qom-get": qom_get,
    "qom-set": qom_set,
    "qom-list-types": qom_list_types,
    "qom-list-properties": qom_list_properties,
    "object-add": object_add,
    "object-del": object_del,
}
