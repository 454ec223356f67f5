# SPDX-License-Identifier: Apache-2.0
"""Help texts for options of the command line, from the schema.

A line per member: how it is written, what it means, what its absence means. Members that the user must give
are marked. Objects inside are spelt out with their full keys, since that is how they are typed. Of a union,
the values of its tag are listed, and with ``tag`` the members of that branch:

    print(render_help(BlockdevOptions, implied_key="driver"))               # --blockdev help
    print(render_help(BlockdevOptions, implied_key="driver", tag="raw"))    # --blockdev raw,help
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

from bottomhalf.qapi.types import (
    BOOL,
    SIZE,
    Alternate,
    Array,
    Member,
    OpenEnum,
    Scalar,
    Struct,
    TaggedUnion,
    first_sentence,
    members,
    type_name,
)

_INLINE_DEPTH_MAX: Final = 2  # objects inside objects that are spelt out
_VALUES_SHOWN_MAX: Final = 6


def default_text(member: Member) -> str | None:
    """Words for what the absence of an optional member means; None if nothing in particular."""
    if member.doc.default is not None:
        return member.doc.default
    if not member.optional or member.default is None:
        return None
    if isinstance(member.default, bool):
        return "on" if member.default else "off"
    return str(member.default.value if isinstance(member.default, Enum) else member.default)


def enum_values(type: Any) -> list[str]:
    """The values of an enumeration of either kind."""
    return list(type.values) if issubclass(type, OpenEnum) else [member.value for member in type]


def _placeholder(type: Any) -> str:
    if type is BOOL:
        return "on|off"
    if type is SIZE:
        return "SIZE"
    if isinstance(type, Scalar):
        return {"string": "TEXT", "int": "NUMBER", "number": "NUMBER"}.get(type.json, "VALUE")
    if isinstance(type, Alternate):
        return "|".join(dict.fromkeys(_placeholder(choice) for choice in type.choices))
    if isinstance(type, Array):
        return _placeholder(type.element)
    if issubclass(type, Struct):
        return "..."
    values = enum_values(type)
    return "|".join(values) if len(values) <= _VALUES_SHOWN_MAX else type_name(type)


def _key(prefix: str, member: Member) -> tuple[str, Any]:
    """How the member is written before '=', and the type of what comes after."""
    key, type = prefix + member.name, member.type
    while isinstance(type, Array):
        key, type = f"{key}.N", type.element
    return key, type


def _rows(type: type[Struct], prefix: str, depth: int, required: bool) -> list[tuple[str, str]]:
    rows = []
    for member in members(type):
        key, value_type = _key(prefix, member)
        needed = required and not member.optional
        if isinstance(value_type, Alternate):
            texts = [choice for choice in value_type.choices if not _is_struct(choice)]
            value = "|".join(_placeholder(choice) for choice in texts)
            rows.append(_row(f"{key}={value}", member, needed))
            for choice in value_type.choices:
                if _is_struct(choice):
                    rows.append((f"{key}.*", f"or options of a new one ({type_name(choice)})"))
        elif not _is_struct(value_type):
            rows.append(_row(f"{key}={_placeholder(value_type)}", member, needed))
        elif depth < _INLINE_DEPTH_MAX:
            rows += _rows(value_type, f"{key}.", depth + 1, needed)
            if issubclass(value_type, TaggedUnion):
                for tag, branch in value_type.branches.items():
                    inner = _rows(branch, f"{key}.", depth + 1, False)
                    rows += [(left, f"({value_type.tag}={tag}) {right}") for left, right in inner]
        else:
            rows.append(_row(f"{key}.*", member, needed))
    return rows


def _is_struct(type: Any) -> bool:
    return not isinstance(type, (Scalar, Array, Alternate)) and issubclass(type, Struct)


def _row(left: str, member: Member, needed: bool) -> tuple[str, str]:
    right = member.doc.text
    default = default_text(member)
    if default is not None:
        right += f" [{default}]"
    if needed:
        right += " (required)"
    for feature in member.doc.features:
        right += f" ({feature})"
    return left, right


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = min(max((len(left) for left, _ in rows), default=0), 36)
    lines = []
    for left, right in rows:
        if len(left) > width:
            lines += [f"  {left}", f"  {'':{width}}  {right}"]
        else:
            lines.append(f"  {left:{width}}  {right}")
    return lines


def render_help(type: type[Struct], *, implied_key: str | None = None, tag: str | None = None) -> str:
    """Help for the options that ``type`` describes; lines without a line end at the end."""
    lines = []
    if issubclass(type, TaggedUnion) and tag is not None:
        branch = type.branches[tag]
        lines += [f"{type.tag}={tag}: {first_sentence(branch)}", ""]
        own = _rows(branch, "", 0, True)
        if own:
            lines += [f"Options of {tag}:", *_table(own), ""]
        common = [member for member in members(type) if member.name != type.tag]
        if common:
            keep = {f"{member.name}" for member in common}
            rows = [row for row in _rows(type, "", 0, True) if row[0].partition("=")[0].split(".")[0] in keep]
            lines += ["Common options:", *_table(rows), ""]
    else:
        lines += [f"{first_sentence(type)}:", *_table(_rows(type, "", 0, True)), ""]
        if issubclass(type, TaggedUnion):
            lines.append(f"Values of {type.tag}:")
            lines += _table([(value, first_sentence(branch)) for value, branch in type.branches.items()])
            lines += ["", f"For the options of one of them: {type.tag}=VALUE,help"]
    if implied_key is not None:
        lines.append(f"The first word may be the value of {implied_key}.")
    return "\n".join(lines).rstrip("\n")
