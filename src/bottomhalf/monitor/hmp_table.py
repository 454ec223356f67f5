# SPDX-License-Identifier: Apache-2.0
"""The table of commands for people: names, arguments, help, completion. What they do is in ``hmp_commands``.

    Entry("block_resize", (Arg("device", NODE), Arg("size", SIZE)), block_resize, "resize a block image")

An argument list is walked from left to right: flags where they stand, then words. A word may be quoted, with the
escapes \\n \\r \\\\ \\' \\".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.qapi.visit import parse_integer, parse_size

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage

WORD, NODE, INTEGER, SIZE, REST, FLAG = "word", "node", "integer", "size", "rest", "flag"
MEGABYTE: Final = 1 << 20
_ESCAPES: Final = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


class UsageError(Exception):
    """The line cannot be run; str() is what to tell the person."""


class Output:
    """What a command prints, up to a bound."""

    def __init__(self, bytes_max: int, history: list[str] | None = None) -> None:
        self.history = history or []  # of the monitor that it goes to
        self._parts: list[str] = []
        self._left = bytes_max

    def line(self, text: str = "") -> None:
        self.write(f"{text}\n")

    def write(self, text: str) -> None:
        if self._left > 0:
            self._parts.append(text[: self._left])
            self._left -= len(text)

    def text(self) -> str:
        return "".join(self._parts)


class Arg:
    """An argument: its name, its kind, whether it may be left out. A flag's name is its letter."""

    __slots__ = ("kind", "name", "optional")

    def __init__(self, name: str, kind: str = WORD, *, optional: bool = False) -> None:
        self.name = name
        self.kind = kind
        self.optional = optional or kind == FLAG

    def usage(self) -> str:
        if self.kind == FLAG:
            return f"[-{self.name}]"
        return f"[{self.name}]" if self.optional else self.name


Handler = Callable[["Storage", "dict[str, Any]", Output], object]


class Entry:
    """A command. ``names`` are separated by |; ``words`` completes its first word."""

    __slots__ = ("args", "handler", "help", "names", "words")

    def __init__(
        self,
        names: str,
        args: tuple[Arg, ...],
        handler: Handler,
        help: str,
        words: Callable[[Storage], list[str]] | None = None,
    ) -> None:
        self.names = names.split("|")
        self.args = args
        self.handler = handler
        self.help = help
        self.words = words

    def usage(self) -> str:
        return " ".join(["|".join(self.names), *(arg.usage() for arg in self.args)])


def find(entries: list[Entry], name: str) -> Entry | None:
    """The command of that name."""
    return next((entry for entry in entries if name in entry.names), None)


class _Reader:
    """A cursor in a line."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def rest(self) -> str:
        self.skip()
        rest, self.at = self.text[self.at :], len(self.text)
        return rest.rstrip()

    def word(self) -> str | None:
        """The next word, None at the end. UsageError for a quote that does not end."""
        self.skip()
        if self.at >= len(self.text):
            return None
        if self.text[self.at] != '"':
            start = self.at
            while self.at < len(self.text) and not self.text[self.at].isspace():
                self.at += 1
            return self.text[start : self.at]
        self.at += 1
        parts: list[str] = []
        while self.at < len(self.text):
            character = self.text[self.at]
            self.at += 1
            if character == '"':
                return "".join(parts)
            if character == "\\":
                escaped = self.text[self.at : self.at + 1]
                self.at += 1
                if escaped not in _ESCAPES:
                    raise UsageError(f"unsupported escape code: '\\{escaped}'")
                character = _ESCAPES[escaped]
            parts.append(character)
        raise UsageError("unterminated string")


def parse_line(line: str) -> tuple[Handler, dict[str, Any]] | None:
    """What a line asks for; None if it is empty. UsageError."""
    from bottomhalf.monitor.hmp_commands import COMMANDS, INFO

    reader = _Reader(line)
    name = reader.word()
    if name is None:
        return None
    path, entry = name, find(COMMANDS, name)
    if entry is not None and "info" in entry.names:
        topic = reader.word()
        if topic is not None:
            path, entry = f"{name} {topic}", find(INFO, topic)
    if entry is None:
        raise UsageError(f"unknown command: '{path}'")
    try:
        return entry.handler, _arguments(entry, reader)
    except UsageError as error:
        raise UsageError(f"{error}\nTry \"help {path}\" for more information") from None


def _arguments(entry: Entry, reader: _Reader) -> dict[str, Any]:
    shown = entry.names[0]
    values: dict[str, Any] = {}
    for arg in entry.args:
        if arg.kind == FLAG:
            reader.skip()
            flag = reader.text[reader.at : reader.at + 3]
            present = flag[:2] == f"-{arg.name}" and (len(flag) == 2 or flag[2].isspace())
            values[arg.name] = present
            reader.at += 2 * present
            continue
        text = (reader.rest() or None) if arg.kind == REST else reader.word()
        if text is None:
            if not arg.optional:
                what = {NODE: "block device name", INTEGER: "integer", SIZE: "size"}.get(arg.kind, "string")
                raise UsageError(f"{shown}: {what} expected")
            values[arg.name] = None
        elif arg.kind == INTEGER:
            number = parse_integer(text)
            if number is None:
                raise UsageError("invalid char in expression")
            values[arg.name] = number
        elif arg.kind == SIZE:
            size = parse_size(text)
            if size is None:
                raise UsageError(f"{shown}: invalid size")
            values[arg.name] = size * MEGABYTE if text[-1:].isdigit() else size
        else:
            values[arg.name] = text
    if reader.rest():
        raise UsageError(f"{shown}: extraneous characters at the end of line")
    return values


def complete(storage: Storage, text: str) -> list[str]:
    """Words that the last one of ``text`` may become."""
    from bottomhalf.monitor.hmp_commands import COMMANDS, INFO

    words = text.split(" ")
    given = [word for word in words[:-1] if word]
    start = words[-1]
    known: list[str] = []
    entry = find(COMMANDS, given[0]) if given else None
    if not given:
        known = [name for each in COMMANDS for name in each.names]
    elif entry is not None and "info" in entry.names:
        if len(given) == 1:
            known = [name for each in INFO for name in each.names]
        else:
            entry = find(INFO, given[1])
            given = given[1:]
            known = _argument_words(storage, entry, given)
    elif entry is not None and "help" in entry.names:
        known = [name for each in (INFO if given[1:2] == ["info"] else COMMANDS) for name in each.names]
    else:
        known = _argument_words(storage, entry, given)
    return [word for word in known if word.startswith(start)]


def _argument_words(storage: Storage, entry: Entry | None, given: list[str]) -> list[str]:
    if entry is None:
        return []
    plain = [arg for arg in entry.args if arg.kind != FLAG]
    index = len([word for word in given[1:] if not word.startswith("-")])
    if index >= len(plain):
        return []
    if plain[index].kind == NODE:
        return [name for name in storage.graph.nodes if not name.startswith("#")]
    return entry.words(storage) if entry.words is not None and index == 0 else []
