# SPDX-License-Identifier: Apache-2.0
"""Options that come as keyword arguments of the library: as an object of the schema's class, or one by one.

The schema says which there are and what they may be, so they have the names that QMP has, with underscores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

from bottomhalf.block.errors import BlockError
from bottomhalf.qapi.errors import OptionError
from bottomhalf.qapi.types import Struct, members
from bottomhalf.qapi.visit import from_json

Chosen = TypeVar("Chosen", bound=Struct)


def options_of(
    kind: type[Chosen],
    given: Mapping[str, Any],
    said: Mapping[str, Any],
    *,
    subject: str,
    without: Iterable[str] = (),
    also: Iterable[str] = (),
    prefix: str = "",
) -> Chosen:
    """The object that keywords (None: as if it was not given) and ``said``, by the schema's names, describe. BlockError
    for a value that cannot be.

    ValueError for a keyword that there is not: ``subject`` is who has none such ("raw images have"), ``without`` are
    members that are not given this way, ``also`` are keywords that somebody else has taken, and ``prefix`` is what the
    caller has taken off all of them."""
    check_names(given, {member.attribute for member in members(kind)} - {*without} | {*also}, subject, prefix)
    values = {name.replace("_", "-"): value for name, value in given.items() if value is not None}
    try:
        return from_json(kind, {**said, **values})
    except OptionError as error:
        raise BlockError(str(error)) from error


def check_names(given: Iterable[str], known: Iterable[str], subject: str, prefix: str = "") -> None:
    """ValueError for a keyword that there is not, as in options_of()."""
    for wrong in {*given} - {*known}:
        there_are = ", ".join(prefix + name for name in sorted(known))
        raise ValueError(f"{subject} no option {prefix + wrong!r}, but {there_are}")


_WORDS: Final = {bool: "True or False", int: "a number", str: "a text"}


def check_kind(name: str, value: Any, kind: type) -> None:
    """ValueError unless a keyword's value is of that kind: "off" would be true, and True a number."""
    if type(value) is not kind:
        raise ValueError(f"{name} is {_WORDS[kind]}, not {value!r}")
