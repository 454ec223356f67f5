# SPDX-License-Identifier: Apache-2.0
"""The tree: one root, paths that lead to objects, and the life of those that users create.

A path that begins with a slash is walked from the root. Any other is looked for everywhere and has to fit one object
only, so that ``io0`` is enough where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from bottomhalf.aio import AioContext
from bottomhalf.host.protocol import Host
from bottomhalf.qom.object import Container, Interface, QomObject, UserCreatable, type_named
from bottomhalf.qom.values import QomError

T = TypeVar("T", bound=QomObject)

DEVICE_NOT_FOUND: Final = "DeviceNotFound"
DEPTH_MAX: Final = 64  # of the tree that is searched
OBJECTS: Final = "/objects"


class Tree:
    """All objects of one program. Main thread only.

    ``host`` and ``main`` are what its objects may need; ``exception_handler`` is the contexts' of its threads."""

    def __init__(
        self,
        host: Host,
        main: AioContext | None = None,
        exception_handler: Callable[[AioContext, Exception, str], object] | None = None,
    ) -> None:
        self.host = host
        self.main = main
        self.exception_handler = exception_handler
        self.graph: Any = None  # the program's block graph, for objects of the floors that know it
        self.root = Container()
        self.in_use: Callable[[QomObject], bool] = lambda user_object: False
        """Whether the rest of the program needs a user's object; to be set by it."""

    def container(self, path: str) -> QomObject:
        """The container at an absolute path, made if it is not there."""
        each: QomObject = self.root
        for name in _parts(path):
            child = each.children.get(name)
            if child is None:
                child = Container()
                each.add_child(name, child)
            each = child
        return each

    # -- paths --------------------------------------------------------------------------------------------------

    def resolve(self, path: str) -> QomObject:
        """The object at ``path``. QomError if there is none, or several for a path that is not absolute."""
        parts = _parts(path)
        if path.startswith("/"):
            found = _walk(self.root, parts)
        else:
            matching = (each for each in self.everything() if _walk(each, parts) is not None)
            first = next(matching, None)
            if first is not None and next(matching, None) is not None:
                raise QomError(f"Path '{path}' is ambiguous")
            found = None if first is None else _walk(first, parts)
        if found is None:
            raise QomError(f"Device '{path}' not found", DEVICE_NOT_FOUND)
        return found

    def everything(self) -> Iterator[QomObject]:
        """All objects, those near the root first."""
        level: list[QomObject] = [self.root]
        for _ in range(DEPTH_MAX):
            yield from level
            level = [child for each in level for child in each.children.values()]

    # -- objects of the user ------------------------------------------------------------------------------------

    def create(self, type_name: str, name: str, values: dict[str, Any]) -> QomObject:
        """object-add: make an object of that type, set its properties, put it under /objects. QomError."""
        cls = type_named(type_name)
        if cls is None or not issubclass(cls, UserCreatable):
            raise QomError(f"invalid object type: {type_name}")
        if cls.abstract:
            raise QomError(f"object type '{type_name}' is abstract")
        made = cls()
        for key, value in values.items():
            made.set(key, value)
        self.container(OBJECTS).add_child(name, made)
        try:
            made.complete(self)
        except BaseException:
            made.unparent()
            raise
        return made

    def delete(self, name: str) -> None:
        """object-del. QomError."""
        found = self.container(OBJECTS).children.get(name)
        if found is None:
            raise QomError(f"object '{name}' not found")
        assert isinstance(found, UserCreatable)
        if not found.can_be_deleted() or self.in_use(found):
            raise QomError(f"object '{name}' is in use, can not be deleted")
        found.unparent()
        found.finalize()

    def user_object(self, name: str, cls: type[T]) -> T | None:
        """The user's object of that name, if it is of that type."""
        found = self.container(OBJECTS).children.get(name)
        return found if isinstance(found, cls) else None

    def user_objects(self, cls: type[T]) -> list[T]:
        """All objects of that type that users made, oldest first."""
        return [each for each in self.container(OBJECTS).children.values() if isinstance(each, cls)]

    def close(self) -> None:
        """End the users' objects, the youngest first. The first error is raised when all are ended."""
        first: Exception | None = None
        for each in reversed(list(self.container(OBJECTS).children.values())):
            each.unparent()
            assert isinstance(each, UserCreatable)
            try:
                each.finalize()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first


def class_of(type_name: str) -> type[QomObject]:
    """The type of that name, to be asked for its properties. QomError."""
    found = type_named(type_name)
    if found is None:
        from bottomhalf.qom.object import subtypes

        if any(type_name == each.type_name for each in subtypes(Interface.type_name, abstract=True)):
            raise QomError("Parameter 'typename' expects a QOM type")
        raise QomError(f"Class '{type_name}' not found", DEVICE_NOT_FOUND)
    return found


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _walk(start: QomObject, parts: list[str]) -> QomObject | None:
    each: QomObject | None = start
    for part in parts:
        each = each.children.get(part) if each is not None else None
    return each
