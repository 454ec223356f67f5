# SPDX-License-Identifier: Apache-2.0
"""The reference pages: all options, commands, events and types in Markdown.

python -m bottomhalf.qapi.reference > docs/reference.md
"""

from __future__ import annotations

from typing import Any

from bottomhalf.qapi.command_line import OPTIONS, option_type
from bottomhalf.qapi.commands import COMMANDS, EVENTS
from bottomhalf.qapi.help import default_text, enum_values
from bottomhalf.qapi.types import (
    Alternate,
    Array,
    Member,
    OpenEnum,
    Scalar,
    Struct,
    TaggedUnion,
    first_sentence,
    members,
    resolve,
    type_name,
)


class _Page:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.types: dict[str, Any] = {}  # to be described, by name

    def link(self, type: Any) -> str:
        """The name of a type in a table; a link if the page describes it."""
        if isinstance(type, Array):
            return f"list of {self.link(type.element)}"
        if isinstance(type, Scalar):
            return type.name
        name = type_name(type)
        if name not in self.types:
            self.types[name] = type
        return f"[{name}](#{name.lower()})"

    def heading(self, level: int, text: str) -> None:
        self.lines += [f"{'#' * level} {text}", ""]

    def documentation(self, cls: type) -> None:
        text = (cls.__doc__ or "").strip()
        self.lines += [line.strip() for line in text.split("\n")] + [""]

    def table(self, rows: list[Member]) -> None:
        if not rows:
            return
        self.lines += ["| member | type | meaning | if absent |", "|---|---|---|---|"]
        for member in rows:
            text = member.doc.text + "".join(f" *({feature})*" for feature in member.doc.features)
            absent = (default_text(member) or "-") if member.optional else "**required**"
            self.lines.append(
                f"| `{member.name}` | {self.link(member.type)} | {_cell(text)} | {_cell(absent)} |"
            )
        self.lines.append("")

    def command(self, name: str) -> None:
        command = COMMANDS[name]
        self.heading(3, f"`{name}`")
        self.documentation(command)
        if command.boxed is not None:
            self.lines += [f"Arguments: {self.link(command.boxed)}", ""]
        else:
            self.table(list(members(command)))
        if command.returns is not None:
            self.lines += [f"Returns: {self.link(resolve(command.returns))}", ""]

    def type(self, name: str, type: Any) -> None:
        self.heading(3, name)
        if isinstance(type, Alternate):
            choices = " or ".join(self.link(choice) for choice in type.choices)
            self.lines += [f"Either {choices}, told apart by the JSON type.", ""]
            return
        self.documentation(type)
        if not issubclass(type, Struct):
            for value in enum_values(type):
                text = type.values[value] if issubclass(type, OpenEnum) else ""
                self.lines.append(f"* `{value}`" + (f": {text}" if text else ""))
            self.lines.append("")
            return
        self.table(list(members(type)))
        if issubclass(type, TaggedUnion):
            for value, branch in type.branches.items():
                self.lines += [f"With `{type.tag}` `{value}` also ({first_sentence(branch)}):", ""]
                self.table(list(members(branch)))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def render_reference() -> str:
    """The page, ending in a line end."""
    page = _Page()
    page.heading(1, "Options, commands and events")
    page.heading(2, "Command line")
    page.lines += ["| option | type | first word is the value of |", "|---|---|---|"]
    for option in OPTIONS:
        type, implied_key = option_type(option)
        page.lines.append(
            f"| `{option}` | {page.link(type)} | {f'`{implied_key}`' if implied_key else '-'} |"
        )
    page.lines.append("")
    page.heading(2, "Commands")
    for name in sorted(COMMANDS):
        page.command(name)
    page.heading(2, "Events")
    for name in sorted(EVENTS):
        page.heading(3, f"`{name}`")
        page.documentation(EVENTS[name])
        page.table(list(members(EVENTS[name])))
    page.heading(2, "Types")
    described: set[str] = set()
    while len(described) < len(page.types):
        name = min(name for name in page.types if name not in described)
        described.add(name)
        page.type(name, page.types[name])
    return "\n".join(page.lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    print(render_reference(), end="")
