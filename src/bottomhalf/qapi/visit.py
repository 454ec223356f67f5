# SPDX-License-Identifier: Apache-2.0
"""From JSON values, or from parsed ``key=value`` options, to instances of the schema's classes, and back.

QEMU checks input while it walks schema and value together: base members in order, then the tag, then the
members of its branch, and when an object is done, whatever member nobody asked for. The first thing that is
wrong is the error. Texts and full names (``server.path``, ``bitmaps[0].node``) are QEMU's; what helps beyond
them is in the error's hint.

Options on a command line are strings only. The same walk serves them: where JSON would have a number or a
boolean, the keyval visitor parses the string (``on``, ``0x10``, ``1.5G``).

    from_json(BlockExportDel, {"id": "e0", "mode": "hard"})
    from_keyval(BlockdevOptions, {"driver": "raw", "file": {"driver": "null-co", "size": "1G"}})
    to_json(BlockExportDel(id="e0"))                      # {"id": "e0"}

Input depth is bounded where it is parsed (``json_reader``, ``keyval``); recursion here follows the schema and
is bounded by ``DEPTH_MAX`` as well, because a schema may refer to itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from typing import Any, Final, TypeVar

from bottomhalf.qapi.errors import OptionError, did_you_mean, nearest
from bottomhalf.qapi.types import (
    ANY,
    BOOL,
    INT,
    NULL,
    NULL_VALUE,
    NUMBER,
    SIZE,
    STR,
    UINT64,
    Alternate,
    Array,
    Empty,
    Null,
    OpenEnum,
    Scalar,
    Struct,
    TaggedUnion,
    members,
)

S = TypeVar("S", bound=Struct)

DEPTH_MAX: Final = 128  # objects and lists inside each other; block graphs of users are below 20
_SHORT_LIST_MAX: Final = 12  # values that a hint lists instead of guessing

_INTEGER: Final = re.compile(r"[ \t\n\v\f\r]*([-+]?)(0[xX][0-9a-fA-F]+|[0-9]+)\Z", re.ASCII)
_SIZE: Final = re.compile(r"[ \t\n\v\f\r]*\+?([0-9]+)(?:\.([0-9]*))?([bkmgtpeBKMGTPE]?)\Z", re.ASCII)
_SIZE_HEX: Final = re.compile(r"[ \t\n\v\f\r]*\+?0[xX]([0-9a-fA-F]+)([kmgtpKMGTP]?)\Z", re.ASCII)
_NUMBER: Final = re.compile(r"[ \t\n\v\f\r]*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\Z", re.ASCII)
_SHIFTS: Final = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_DIGITS_MAX: Final = 64  # of an integer in an option; longer ones overflow whatever they are

_TRUE: Final = frozenset(("on", "yes", "true", "y"))
_FALSE: Final = frozenset(("off", "no", "false", "n"))


def parse_integer(text: str) -> int | None:
    """A C integer (decimal, 0x hexadecimal, leading 0 octal) of any size, or None."""
    found = _INTEGER.match(text) if len(text) <= _DIGITS_MAX else None
    if found is None:
        return None
    sign, digits = found.groups()
    if digits[:2] in ("0x", "0X"):
        value = int(digits, 16)
    elif digits[0] == "0" and len(digits) > 1:
        if digits.strip("01234567"):
            return None
        value = int(digits, 8)
    else:
        value = int(digits)
    return -value if sign == "-" else value


def parse_size(text: str) -> int | None:
    """Bytes: an integer, or a decimal fraction with a suffix k M G T P E (powers of 1024); or None.

    A fraction of a byte is cut off (``1.1k`` is 1126). At most 2**64 - 1.
    """
    if len(text) > _DIGITS_MAX:
        return None
    found = _SIZE_HEX.match(text)
    if found is not None:
        value = int(found[1], 16) << _SHIFTS[found[2].lower()]
        return value if value <= SIZE.high else None
    found = _SIZE.match(text)
    if found is None:
        return None
    whole, fraction, suffix = found[1], found[2], found[3].lower()
    shift = _SHIFTS[suffix]
    value = int(whole) << shift
    if fraction:
        if shift == 0 and fraction.strip("0"):
            return None
        value += (int(fraction) << shift) // 10 ** len(fraction)
    return value if value <= SIZE.high else None


def parse_bool(text: str) -> bool | None:
    """on, yes, true, y; off, no, false, n; else None."""
    return True if text in _TRUE else False if text in _FALSE else None


class _Visitor:
    """Walks a JSON value. ``path`` holds the names and list indices from the root to the current value."""

    index_format = "[{}]"

    def __init__(self) -> None:
        self.path: list[str | int] = []

    def full_name(self) -> str:
        text = ""
        for part in self.path:
            if isinstance(part, int):
                text += self.index_format.format(part)
            else:
                text += f".{part}" if text else part
        return text or "<anonymous>"

    def local_name(self) -> str:
        last = self.path[-1] if self.path else None
        return last if isinstance(last, str) else "null"

    def wrong_type(self, expected: str) -> OptionError:
        name = self.full_name()
        return OptionError(f"Invalid parameter type for '{name}', expected: {expected}", key=name)

    def expects(self, what: str, name: str | None = None, hint: str | None = None) -> OptionError:
        full = self.full_name()
        return OptionError(f"Parameter '{name or full}' expects {what}", key=full, hint=hint)

    def visit(self, type: Any, value: Any) -> Any:
        if isinstance(type, Scalar):
            return self.scalar(type, value)
        if isinstance(type, Array):
            return self.array(type, value)
        if isinstance(type, Alternate):
            return self.alternate(type, value)
        if issubclass(type, Struct):
            return self.struct(type, value)
        return self.enumeration(type, value)

    def scalar(self, type: Scalar, value: Any) -> Any:
        if type is STR:
            return self.string(value)
        if type is BOOL:
            if not isinstance(value, bool):
                raise self.wrong_type("boolean")
            return value
        if type is ANY:
            return value
        if type is NULL:
            if value is not None:
                raise self.wrong_type("null")
            return NULL_VALUE
        if type is NUMBER:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise self.wrong_type("number")
            return float(value)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if type.low >= 0:
            if not is_integer or not INT.low <= value <= UINT64.high:
                raise self.expects("uint64")
            return self.bounded(type, value & UINT64.high)  # a negative number is accepted and wraps
        if not is_integer or not INT.low <= value <= INT.high:
            raise self.wrong_type("integer")
        return self.bounded(type, value)

    def bounded(self, type: Scalar, value: int) -> int:
        if not type.low <= value <= type.high:
            raise self.expects(type.c_name, self.local_name(), f"It must be from {type.low} to {type.high}.")
        return value

    def string(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self.wrong_type("string")
        return value

    def enumeration(self, type: Any, value: Any) -> Any:
        text = self.string(value)
        if issubclass(type, OpenEnum):
            if type.knows(text):
                return type(text)
            known = list(type.values)
        else:
            try:
                return type(text)
            except ValueError:
                known = [member.value for member in type]
        raise self.not_accepted(text, known)

    def not_accepted(self, text: str, known: Iterable[str]) -> OptionError:
        known = list(known)
        hint = did_you_mean(text, known)
        if hint is None and 0 < len(known) <= _SHORT_LIST_MAX:
            hint = f"It accepts {', '.join(known)}."
        return OptionError(
            f"Parameter '{self.local_name()}' does not accept value '{text}'", key=self.full_name(), hint=hint
        )

    def array(self, type: Array, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self.wrong_type("array")
        self.enter(0)
        result = []
        for index, item in enumerate(value):
            self.path[-1] = index
            result.append(self.visit(type.element, item))
        self.path.pop()
        return result

    def enter(self, part: str | int) -> None:
        self.path.append(part)
        if len(self.path) > DEPTH_MAX:
            raise OptionError(f"Parameter '{self.path[0]}' is nested too deeply", key=str(self.path[0]))

    def alternate(self, type: Alternate, value: Any) -> Any:
        for choice in type.choices:
            if self.fits(choice, value):
                return self.visit(choice, value)
        name = self.full_name()
        raise OptionError(
            f"Invalid parameter type for '{self.local_name()}', expected: {type.name}", key=name
        )

    def fits(self, choice: Any, value: Any) -> bool:
        """Whether the JSON type of ``value`` is that of ``choice``."""
        if isinstance(choice, Scalar):
            if choice is STR:
                return isinstance(value, str)
            if choice is NULL:
                return value is None
            if choice is BOOL:
                return isinstance(value, bool)
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(choice, Array):
            return isinstance(value, list)
        if issubclass(choice, Struct):
            return isinstance(value, dict)
        return isinstance(value, str)

    def struct(self, type: type[S], value: Any) -> S:
        if not isinstance(value, dict):
            raise self.wrong_type("object")
        seen: set[str] = set()
        result = self.members(type, type, value, seen)
        if issubclass(type, TaggedUnion):
            tag = result[type.tag.replace("-", "_")]
            branch = type.branches.get(tag.value if isinstance(tag, Enum) else tag, Empty)
            result["branch"] = branch(**self.members(type, branch, value, seen))
        if len(seen) != len(value):
            self.unexpected(type, value, seen)
        return type(**result)

    def members(
        self, owner: type[Struct], part: type[Struct], value: dict[str, Any], seen: set[str]
    ) -> dict[str, Any]:
        """Visit those members of the object that ``part`` (``owner`` itself or a branch of it) has."""
        result = {}
        for member in members(part):
            name = member.name
            if name in value:
                self.enter(name)
                seen.add(name)
                result[member.attribute] = self.visit(member.type, value[name])
                self.path.pop()
            elif not member.optional:
                self.path.append(name)
                full = self.full_name()
                # A misspelt member is missing under its right name and unexpected under the wrong one.
                known = known_names(owner, value)
                near = nearest(name, [key for key in value if key not in known])
                hint = None if near is None else f"There is '{near}'. Did you mean '{name}'?"
                raise OptionError(f"Parameter '{full}' is missing", key=full, hint=hint)
        return result

    def unexpected(self, type: type[Struct], value: dict[str, Any], seen: set[str]) -> None:
        known = known_names(type, value)
        stray = next(name for name in value if name not in seen)
        self.path.append(stray)
        full = self.full_name()
        raise OptionError(
            f"Parameter '{full}' is unexpected",
            key=full,
            hint=did_you_mean(stray, [name for name in known if name not in seen] or known),
        )


class _KeyvalVisitor(_Visitor):
    """Walks a tree of dicts and lists with strings at its leaves."""

    index_format = ".{}"

    def text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        name = self.full_name()
        raise OptionError(f"Parameters '{name}.*' are unexpected", key=name)

    def string(self, value: Any) -> str:
        return self.text(value)

    def scalar(self, type: Scalar, value: Any) -> Any:
        if type is ANY:
            return value
        text = self.text(value)
        if type is STR:
            return text
        if type is BOOL:
            flag = parse_bool(text)
            if flag is None:
                raise self.expects("'on' or 'off'")
            return flag
        if type is NULL:
            raise self.wrong_type("null")
        if type is NUMBER:
            if _NUMBER.match(text) is None or abs(float(text)) == float("inf"):
                raise self.wrong_type("number")
            return float(text)
        if type is SIZE:
            size = parse_size(text)
            if size is None:
                raise self.expects(
                    "size", hint="A size is a number of bytes, or has a suffix: 512, 64k, 1.5G."
                )
            return size
        number = parse_integer(text)
        low, high = (-UINT64.high, UINT64.high) if type.low >= 0 else (INT.low, INT.high)
        if number is None or not low <= number <= high:
            raise self.expects("integer", hint=_suffix_hint(text))
        return self.bounded(type, number & UINT64.high if type.low >= 0 else number)


def _suffix_hint(text: str) -> str | None:
    size = parse_size(text)
    return None if size is None else f"It takes no suffix or fraction: write {size}."


def known_names(type: type[Struct], value: Any = None) -> list[str]:
    """Names of the members of a struct; of a union, also those of the branch that ``value`` selects."""
    names = [member.name for member in members(type)]
    if issubclass(type, TaggedUnion) and isinstance(value, dict):
        tag = value.get(type.tag)
        if isinstance(tag, str) and tag in type.branches:
            names += known_names(type.branches[tag])
    return names


def from_json(type: type[S], value: Any) -> S:
    """An instance of ``type`` from a JSON object. Raises OptionError."""
    return _Visitor().struct(type, value)


def from_keyval(type: type[S], tree: Any) -> S:
    """An instance of ``type`` from what ``keyval.parse_keyval`` returns. Raises OptionError."""
    return _KeyvalVisitor().struct(type, tree)


def to_json(value: Any, *, omit_defaults: bool = False) -> Any:
    """The JSON value of an instance, a list of such, or a scalar.

    Absent members are left out; with ``omit_defaults`` also those that have their default, which yields the
    shortest object that means the same. Members come in the order of the schema.
    """
    if isinstance(value, Struct):
        result: dict[str, Any] = {}
        _add_members(result, value, omit_defaults)
        if isinstance(value, TaggedUnion):
            _add_members(result, value.branch, omit_defaults)
        return result
    if isinstance(value, list):
        return [to_json(item, omit_defaults=omit_defaults) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Null):
        return None
    return value


def _add_members(result: dict[str, Any], value: Struct, omit_defaults: bool) -> None:
    for member in members(type(value)):
        item = getattr(value, member.attribute)
        if member.optional and (item is None or (omit_defaults and item == member.default)):
            continue
        result[member.name] = to_json(item, omit_defaults=omit_defaults)
