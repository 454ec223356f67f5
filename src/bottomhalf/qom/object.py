# SPDX-License-Identifier: Apache-2.0
"""Types and objects: a type is a class, a property of all its objects an entry of the class's table.

    class Lamp(QomObject, name="lamp"):
        properties = {"on": Property("bool", lambda lamp: lamp.on, Lamp.switch)}

Facts that shape it: an object belongs to one parent, under a name, and that is its path; children, links and aliases
are properties like any other, which is why a list of properties shows the tree. So an object has a table of its own
beside that of its class. A type is known by its name once its class is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Final

from bottomhalf.qom.values import QomError

if TYPE_CHECKING:
    from bottomhalf.qom.tree import Tree

CHILDREN_MAX: Final = 100_000  # of one object; a client can make them

_types: dict[str, type[Interface]] = {}


class Property:
    """Something about an object that has a name: its ``type`` in words, how it is read and written (None: not)."""

    __slots__ = ("default", "description", "get", "set", "type")

    def __init__(
        self,
        type: str,
        get: Callable[[Any], Any] | None = None,
        set: Callable[[Any, Any], object] | None = None,
        description: str | None = None,
        default: Any = None,
    ) -> None:
        self.type = type
        self.get = get
        self.set = set
        self.description = description
        self.default = default

    @classmethod
    def of(cls, type: str, attribute: str, check: Callable[[Any, str], Any]) -> Property:
        """One that is kept in an attribute of nearly the same name. ``check(value, name)`` gives what is kept of a
        value, or raises QomError."""
        name = attribute.replace("_", "-")
        return cls(
            type,
            lambda self: getattr(self, attribute),
            lambda self, value: setattr(self, attribute, check(value, name)),
        )


class Interface:
    """What several types can be. Never made by itself."""

    type_name: ClassVar[str] = "interface"
    abstract: ClassVar[bool] = True

    def __init_subclass__(cls, *, name: str, abstract: bool = False) -> None:
        assert name not in _types, name
        cls.type_name = name
        cls.abstract = abstract
        _types[name] = cls


_types["interface"] = Interface


class QomObject(Interface, name="object", abstract=True):
    """Something in the tree. Main thread only."""

    properties: ClassVar[dict[str, Property]] = {"type": Property("string", lambda self: self.type_name)}

    def __init__(self) -> None:
        self.parent: QomObject | None = None
        self.name = ""  # under which its parent has it
        self.own: dict[str, Property] = {}  # properties that this object alone has
        self.children: dict[str, QomObject] = {}

    # -- properties ---------------------------------------------------------------------------------------------

    @classmethod
    def class_properties(cls) -> Iterator[tuple[str, Property]]:
        """Of the type, then of those that it is derived from."""
        for base in cls.__mro__:
            yield from base.__dict__.get("properties", {}).items()

    def all_properties(self) -> dict[str, Property]:
        """By name; inherited ones first."""
        return dict([*reversed(list(self.class_properties())), *self.own.items()])

    def _find(self, name: str) -> Property:
        found = self.own.get(name)
        if found is None:
            found = next((each for other, each in self.class_properties() if other == name), None)
        if found is None:
            raise QomError(f"Property '{self.type_name}.{name}' not found")
        return found

    def get(self, name: str) -> Any:
        """The property's value as JSON has it. QomError."""
        found = self._find(name)
        if found.get is None:
            raise QomError(f"Property '{self.type_name}.{name}' is not readable")
        return found.get(self)

    def set(self, name: str, value: Any) -> None:
        """Change a property. QomError."""
        found = self._find(name)
        if found.set is None:
            raise QomError(f"Property '{self.type_name}.{name}' is not writable")
        found.set(self, value)

    def add_property(self, name: str, added: Property) -> None:
        """A property that only this object has."""
        if name in self.own or any(name == other for other, _ in self.class_properties()):
            raise QomError(f"attempt to add duplicate property '{name}' to object (type '{self.type_name}')")
        if len(self.own) >= CHILDREN_MAX:
            raise QomError(f"object (type '{self.type_name}') has {CHILDREN_MAX} properties and takes no more")
        self.own[name] = added

    def add_alias(self, name: str, target: QomObject, target_name: str) -> None:
        """A property that is another object's: reading and writing it go there."""
        aimed = target._find(target_name)
        self.add_property(
            name,
            Property(
                aimed.type,
                None if aimed.get is None else lambda _: target.get(target_name),
                None if aimed.set is None else lambda _, value: target.set(target_name, value),
                aimed.description,
                aimed.default,
            ),
        )

    def add_link(self, name: str, get: Callable[[], QomObject | None], type_name: str) -> None:
        """A property that tells the path of another object, "" while there is none."""

        def path(_: Any) -> str:
            target = get()
            return "" if target is None else target.path

        self.add_property(name, Property(f"link<{type_name}>", path))

    # -- the tree -----------------------------------------------------------------------------------------------

    def add_child(self, name: str, child: QomObject) -> None:
        """Own ``child`` under a name from now on. A name that ends in [*] gets the first free number."""
        assert child.parent is None, child.path
        if name.endswith("[*]"):
            stem, number = name[:-3], 0
            while f"{stem}[{number}]" in self.own:
                number += 1
            name = f"{stem}[{number}]"
        self.add_property(name, Property(f"child<{child.type_name}>", lambda _: child.path))
        self.children[name] = child
        child.parent, child.name = self, name

    def unparent(self) -> None:
        """Leave the tree."""
        if self.parent is not None:
            del self.parent.children[self.name]
            del self.parent.own[self.name]
            self.parent = None

    @property
    def path(self) -> str:
        """Where it is in the tree; of the root, "/"."""
        names: list[str] = []
        each: QomObject = self
        while each.parent is not None:
            names.append(each.name)
            each = each.parent
        return "/" + "/".join(reversed(names))

    def __repr__(self) -> str:
        return f"<{self.type_name} {self.path}>"


class Container(QomObject, name="container"):
    """An object that only holds others."""


class UserCreatable(Interface, name="user-creatable", abstract=True):
    """What object-add can make: properties are set, the object gets its place, and ``complete`` makes it work."""

    def complete(self, tree: Tree) -> None:
        """All properties are set. QomError: it cannot be, and leaves the tree."""

    def can_be_deleted(self) -> bool:
        """Whether nobody needs it."""
        return True

    def finalize(self) -> None:
        """It has left the tree for good."""


def type_named(name: str) -> type[QomObject] | None:
    """The type of objects called ``name``; None if there is none."""
    found = _types.get(name)
    return found if found is not None and issubclass(found, QomObject) else None


def subtypes(implements: str | None = None, *, abstract: bool = False) -> list[type[Interface]]:
    """All types that are, or are derived from, ``implements``."""
    wanted = _types.get("object" if implements is None else implements)
    if wanted is None:
        return []
    everything = implements is None and abstract
    return [
        each
        for each in _types.values()
        if (everything or issubclass(each, wanted)) and (abstract or not each.abstract)
    ]


def parent_name(cls: type[Interface]) -> str | None:
    """The name of the type that ``cls`` is derived from, None for a root."""
    if cls is Interface or cls is QomObject:
        return None
    parent: type[Interface] = cls.__bases__[0]
    return parent.type_name
