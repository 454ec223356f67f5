# SPDX-License-Identifier: Apache-2.0
"""Checking what a property is set to.

Values come as JSON has them. A property knows its type, and a value of another one is refused in the words that QEMU's
visitors use, with the full name of the culprit (``rules[0].policy``). The schema of commands has its own, larger walk
in ``qapi``; this floor does not know it, and needs four kinds only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

INT_MAX: Final = (1 << 63) - 1
ITEMS_MAX: Final = 10_000  # of a list that a property holds

Checker: TypeAlias = Callable[[Any, str], Any]
"""From a value and its name to the value that is kept; QomError if it is of another type."""


class QomError(Exception):
    """What was asked of an object cannot be done: the sentence, and the class of the error that a client is told."""

    def __init__(self, desc: str, class_name: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.class_name = class_name


def _wrong_type(name: str, expected: str) -> QomError:
    return QomError(f"Invalid parameter type for '{name}', expected: {expected}")


def integer(value: Any, name: str) -> int:
    """An integer of 64 bits. QomError."""
    if not isinstance(value, int) or isinstance(value, bool) or not -INT_MAX - 1 <= value <= INT_MAX:
        raise _wrong_type(name, "integer")
    return value


def not_negative(value: Any, name: str) -> int:
    """An integer that QEMU's event loops take."""
    if integer(value, name) < 0:
        raise QomError(f"{name} value must be in range [0, {INT_MAX}]")
    return int(value)


def string(value: Any, name: str) -> str:
    """A string. QomError."""
    if not isinstance(value, str):
        raise _wrong_type(name, "string")
    return value


def boolean(value: Any, name: str) -> bool:
    """A truth value. QomError."""
    if not isinstance(value, bool):
        raise _wrong_type(name, "boolean")
    return value


def one_of(*values: str) -> Checker:
    """A string that is one of these."""
    def check(value: Any, name: str) -> str:
        if string(value, name) not in values:
            local_name = name.rpartition(".")[2]
            raise QomError(f"Parameter '{local_name}' does not accept value '{value}'")
        return str(value)

    return check


def record(optional: dict[str, Checker], **required: Checker) -> Checker:
    """An object with these members."""

    def check(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong_type(name, "object")
        for member in required:
            if member not in value:
                raise QomError(f"Parameter '{name}.{member}' is missing")
        known = required | optional
        for member in value:
            if member not in known:
                raise QomError(f"Parameter '{name}.{member}' is unexpected")
        return {member: known[member](item, f"{name}.{member}") for member, item in value.items()}

    return check


def list_of(element: Checker) -> Checker:
    """A list of such values."""
    def check(value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong_type(name, "array")
        if len(value) > ITEMS_MAX:
            raise QomError(f"Parameter '{name}' has more than {ITEMS_MAX} elements")
        return [element(item, f"{name}[{index}]") for index, item in enumerate(value)]

    return check
