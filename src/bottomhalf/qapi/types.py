# SPDX-License-Identifier: Apache-2.0
"""The type kernel: options, arguments, return values and events as typed Python classes.

QEMU describes its interface in a schema and generates parsers, printers and introspection from it. We want
the same from one source, but scripts start a daemon hundreds of times, and ``dataclasses`` compiles methods
for each class: 0.3 ms of start-up each, of a hundred classes. Therefore a ``Struct`` is a plain class with
annotations: making one costs microseconds, its member table is computed when it is first asked for, and type
checkers see a frozen dataclass with keyword arguments.

    class BlockdevCacheOptions(Struct):
        \"\"\"How a node caches.\"\"\"

        direct: Annotated[bool | None, Doc("bypass the host's page cache", default="off")] = None
        no_flush: Annotated[bool | None, Doc("ignore flushes", default="off")] = None

Rules:

* ``from __future__ import annotations`` in every file that defines some: nothing is evaluated on import;
* a member's name in the schema is its attribute with ``-`` for ``_``, unless ``Doc`` says ``name="..."``;
* ``| None`` with the default None is an optional member that may be absent; any other default makes it
  optional too and is what absence means;
* integer types other than the 64-bit signed ``int``, and ``Size``, are the aliases below;
* a ``TaggedUnion`` has the members of its base, and in ``branch`` those that depend on its tag.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, ClassVar, Final, Self, TypeAlias


class Doc:
    """Documentation of a member.

    ``name`` is its name in the schema where the rule does not yield it, ``default`` the words for what
    absence means if the class does not say it, ``features`` those of the schema (``deprecated``,
    ``unstable``).
    """

    __slots__ = ("default", "features", "name", "text")

    def __init__(
        self,
        text: str,
        *,
        name: str | None = None,
        default: str | None = None,
        features: tuple[str, ...] = (),
    ) -> None:
        self.text = text
        self.name = name
        self.default = default
        self.features = features


class Scalar:
    """A type without parts. ``name`` is the schema's, ``json`` what introspection calls it.

    ``low`` and ``high`` bound integers; ``c_name`` is how QEMU's message for a number out of bounds calls it.
    """

    __slots__ = ("c_name", "high", "json", "low", "name")

    def __init__(self, name: str, json: str, low: int = 0, high: int = 0, c_name: str = "") -> None:
        self.name = name
        self.json = json
        self.low = low
        self.high = high
        self.c_name = c_name

    def __repr__(self) -> str:
        return f"<{self.name}>"


STR: Final = Scalar("str", "string")
BOOL: Final = Scalar("bool", "boolean")
NUMBER: Final = Scalar("number", "number")
NULL: Final = Scalar("null", "null")
ANY: Final = Scalar("any", "value")
INT: Final = Scalar("int", "int", -(1 << 63), (1 << 63) - 1)
SIZE: Final = Scalar("size", "int", 0, (1 << 64) - 1)
UINT64: Final = Scalar("uint64", "int", 0, (1 << 64) - 1)
UINT32: Final = Scalar("uint32", "int", 0, (1 << 32) - 1, "uint32_t")
UINT16: Final = Scalar("uint16", "int", 0, (1 << 16) - 1, "uint16_t")
UINT8: Final = Scalar("uint8", "int", 0, (1 << 8) - 1, "uint8_t")
INT32: Final = Scalar("int32", "int", -(1 << 31), (1 << 31) - 1, "int32_t")

Size: TypeAlias = Annotated[int, SIZE]
Uint64: TypeAlias = Annotated[int, UINT64]
Uint32: TypeAlias = Annotated[int, UINT32]
Uint16: TypeAlias = Annotated[int, UINT16]
Uint8: TypeAlias = Annotated[int, UINT8]
Int32: TypeAlias = Annotated[int, INT32]


class Array:
    """A list of ``element``."""

    __slots__ = ("element",)

    def __init__(self, element: Any) -> None:
        self.element = element


class Alternate:
    """One of several types, told apart by the JSON type of the value.

    Written ``Annotated[A | str, Alternate("ARef")]``. The choices are filled in when the type is resolved.
    """

    __slots__ = ("choices", "name")

    def __init__(self, name: str, choices: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.choices = choices


class Null:
    """JSON's null as a value, where it means something else than absence. ``NULL_VALUE`` is the only one."""

    def __repr__(self) -> str:
        return "NULL_VALUE"


NULL_VALUE: Final = Null()


class OpenEnum(str):
    """An enumeration that drivers add to: a ``str`` of which the class knows the permitted values."""

    values: ClassVar[dict[str, str]]  # value -> documentation
    load: ClassVar[Callable[[str], object] | None] = None  # tries to add a value that is not known yet

    def __init_subclass__(cls) -> None:
        cls.values = {}

    @classmethod
    def knows(cls, value: str) -> bool:
        """Whether the value is permitted; one that is not known yet may be brought along by an extension."""
        if value not in cls.values and cls.load is not None:
            cls.load(value)
        return value in cls.values

    @classmethod
    def add(cls, value: str, text: str = "") -> None:
        cls.values[value] = text


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()


class Member:
    """A row of a struct's member table. ``type`` is a Scalar, Array, Alternate, Enum, OpenEnum or Struct."""

    __slots__ = ("attribute", "default", "doc", "name", "optional", "type")

    def __init__(self, attribute: str, type: Any, optional: bool, default: Any, doc: Doc) -> None:
        self.attribute = attribute
        self.name = doc.name or attribute.replace("_", "-")
        self.type = type
        self.optional = optional
        self.default = default
        self.doc = doc


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
class Struct:
    """A JSON object. Instances are frozen, compare by value and take keyword arguments only."""

    _fields: ClassVar[dict[str, Any]] = {}  # attribute -> default or REQUIRED
    _members: ClassVar[tuple[Member, ...]]

    def __init_subclass__(cls) -> None:
        fields = dict(cls._fields)
        for attribute, annotation in cls.__annotations__.items():
            if not annotation.startswith("ClassVar"):
                fields[attribute] = cls.__dict__.get(attribute, REQUIRED)
        cls._fields = fields

    def __init__(self, **values: Any) -> None:
        state = self.__dict__
        for attribute, default in self._fields.items():
            value = values.pop(attribute, default)
            if value is REQUIRED:
                raise TypeError(f"{type(self).__name__} needs {attribute}")
            state[attribute] = value
        if values:
            raise TypeError(f"{type(self).__name__} has no {', '.join(values)}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.__dict__.values())))

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in self.__dict__.items() if value is not None)
        return f"{type(self).__name__}({', '.join(shown)})"

    def replace(self, **changes: Any) -> Self:
        """A copy with some members changed."""
        return type(self)(**{**self.__dict__, **changes})


class Empty(Struct):
    """No members: arguments of a command without any, branch of a union that adds none."""


class TaggedUnion(Struct):
    """A JSON object with members that depend on the value of one of them, the tag.

        class SocketAddress(TaggedUnion, tag="type", branches={"unix": UnixSocketAddress}): ...

    With an ``OpenEnum`` as the type of the tag (``tag_values``) branches may be added at any time.
    """

    branch: Struct  # an instance of the class that the tag selects

    tag: ClassVar[str] = ""
    branches: ClassVar[dict[str, type[Struct]]]
    tag_values: ClassVar[type[OpenEnum] | None]

    def __init_subclass__(
        cls,
        *,
        tag: str,
        branches: dict[str, type[Struct]] | None = None,
        tag_values: type[OpenEnum] | None = None,
    ) -> None:
        super().__init_subclass__()
        cls.tag = tag
        cls.branches = dict(branches or {})
        cls.tag_values = tag_values

    @classmethod
    def register_branch(cls, value: str, branch: type[Struct], text: str = "") -> None:
        """Add members for the tag ``value``; ``text`` documents the value."""
        assert value not in cls.branches, value
        assert cls.tag_values is not None, f"{cls.__name__} is closed"
        cls.tag_values.add(value, text or first_sentence(branch))
        cls.branches[value] = branch


COMMANDS: Final[dict[str, type[Command]]] = {}
EVENTS: Final[dict[str, type[EventType]]] = {}


class Command(Struct):
    """A QMP command. The class is its arguments, unless ``boxed`` names another struct that is.

    class BlockExportDel(Command, name="block-export-del"):
        id: Annotated[str, Doc("the export's id")]
    """

    qmp_name: ClassVar[str]
    boxed: ClassVar[type[Struct] | None]
    returns: ClassVar[Any]  # a Struct, Enum, scalar or list[...]; None for nothing
    allow_oob: ClassVar[bool]
    features: ClassVar[tuple[str, ...]]

    def __init_subclass__(
        cls,
        *,
        name: str,
        boxed: type[Struct] | None = None,
        returns: Any = None,
        allow_oob: bool = False,
        features: tuple[str, ...] = (),
    ) -> None:
        super().__init_subclass__()
        assert name not in COMMANDS, name
        cls.qmp_name = name
        cls.boxed = boxed
        cls.returns = returns
        cls.allow_oob = allow_oob
        cls.features = features
        COMMANDS[name] = cls

    @classmethod
    def argument_type(cls) -> type[Struct]:
        """The class that a handler of this command is given an instance of."""
        return cls.boxed or cls


class EventType(Struct):
    """A QMP event. The class is its data."""

    qmp_name: ClassVar[str]
    features: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, *, name: str, features: tuple[str, ...] = ()) -> None:
        super().__init_subclass__()
        assert name not in EVENTS, name
        cls.qmp_name = name
        cls.features = features
        EVENTS[name] = cls


_PLAIN: Final[dict[Any, Scalar]] = {
    int: INT, str: STR, bool: BOOL, float: NUMBER, Null: NULL, Any: ANY,
}  # fmt: skip


def resolve(annotation: Any) -> Any:
    """The kernel's type for a Python annotation (an object, not a string)."""
    for item in getattr(annotation, "__metadata__", ()):
        if isinstance(item, Scalar):
            return item
        if isinstance(item, Alternate):
            if not item.choices:
                item.choices = tuple(resolve(choice) for choice in typing.get_args(annotation.__origin__))
            return item
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if typing.get_origin(annotation) is list:
        return Array(resolve(typing.get_args(annotation)[0]))
    assert isinstance(annotation, type) and issubclass(annotation, (Struct, Enum, OpenEnum)), annotation
    return annotation


def _member(attribute: str, annotation: Any, default: Any) -> Member:
    metadata = annotation.__metadata__
    doc = next(item for item in metadata if isinstance(item, Doc))
    inner = annotation
    if len(metadata) == 1:  # else a Scalar or Alternate stands beside the Doc
        inner = annotation.__origin__
        parts = typing.get_args(inner)
        if len(parts) == 2 and parts[1] is type(None):
            inner = parts[0]
    return Member(attribute, resolve(inner), default is not REQUIRED, default, doc)


def members(cls: type[Struct]) -> tuple[Member, ...]:
    """The member table of a struct, base first; of a union, without those of its branches."""
    table = cls.__dict__.get("_members")
    if table is None:
        hints = typing.get_type_hints(cls, include_extras=True)
        table = cls._members = tuple(
            _member(attribute, hints[attribute], default)
            for attribute, default in cls._fields.items()
            if attribute != "branch"
        )
    return table


def first_sentence(cls: type) -> str:
    """The first line of a class's documentation, without the full stop."""
    return (cls.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def type_name(type: Any) -> str:
    """The name of a kernel type as the schema spells it."""
    if type is None:
        return "Empty"
    if isinstance(type, Array):
        return f"[{type_name(type.element)}]"
    if isinstance(type, (Scalar, Alternate)):
        return type.name
    return str(type.__name__)
