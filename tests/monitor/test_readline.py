# SPDX-License-Identifier: Apache-2.0
"""The line editor, against a terminal that shows what it is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.monitor.readline import HISTORY_MAX, LINE_BYTES_MAX, LineEditor

UP, DOWN, LEFT, RIGHT = "\x1b[A", "\x1b[B", "\x1b[D", "\x1b[C"
HOME, END, DELETE = "\x1b[1~", "\x1b[4~", "\x1b[3~"


class Screen:
    """The last line of a terminal."""

    def __init__(self) -> None:
        self.lines = [""]
        self.column = 0

    def feed(self, data: bytes) -> None:
        text = data.decode("latin-1")
        at = 0
        while at < len(text):
            if text.startswith("\x1b[", at):
                end = at + 2
                while not text[end].isalpha():
                    end += 1
                self.control(text[at + 2 : end], text[end])
                at = end + 1
                continue
            character = text[at]
            at += 1
            line = self.lines[-1]
            if character == "\r":
                self.column = 0
            elif character == "\n":
                self.lines.append("")
            else:
                self.lines[-1] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1

    def control(self, parameter: str, letter: str) -> None:
        if letter == "D":
            self.column = max(self.column - 1, 0)
        elif letter == "C":
            self.column += 1
        elif letter == "K":
            self.lines[-1] = self.lines[-1][: self.column]
        elif letter == "J":
            self.lines = [""]
        elif letter == "H":
            self.column = 0
        else:
            raise AssertionError((parameter, letter))


class Person:
    """Types, and looks at the screen."""

    def __init__(self, words: list[str] | None = None) -> None:
        self.words = words or []
        self.editor = LineEditor("> ", self.complete)
        self.screen = Screen()
        self.editor.begin()
        self.screen.feed(self.editor.take())

    def complete(self, text: str) -> list[str]:
        word = text.rpartition(" ")[2]
        return [each for each in self.words if each.startswith(word)]

    def type(self, keys: str | bytes) -> list[str]:
        lines = []
        for byte in keys.encode("latin-1") if isinstance(keys, str) else keys:
            line = self.editor.key(byte)
            self.screen.feed(self.editor.take())
            if line is not None:
                lines.append(line)
                if line:
                    self.editor.remember(line)
                self.editor.begin()
                self.screen.feed(self.editor.take())
        return lines


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("abc", "abc"),
        ("abc\x08d", "abd"),
        ("abc\x7f\x7f\x7f\x7fd", "d"),
        (f"abc{LEFT}{LEFT}x", "axbc"),
        (f"abc{LEFT}{LEFT}{RIGHT}x", "abxc"),
        (f"abc{HOME}x", "xabc"),
        (f"abc{HOME}{END}x", "abcx"),
        (f"abc\x01{DELETE}x", "xbc"),
        ("abc\x01\x04", "bc"),
        ("abc\x01\x05d", "abcd"),
        ("one two\x17x", "one x"),
        ("one two  \x17\x17x", "x"),
        (f"one two{LEFT}{LEFT}\x15", "wo"),
        ("ab\x0cc", "abc"),
        ("ab\x1bOHx\x1bOFy", "xaby"),
        ("ab\x9bDx", "axb"),
        ("ab\x1b[999999999999~c", "abc"),
        ("ab\x1b[Zc\x1bxd\x02\x06\x0b\x12e", "abcde"),
        (f"{LEFT}{RIGHT}{UP}{DOWN}a", "a"),
    ],
)
def test_keys(keys: str, line: str) -> None:
    person = Person()
    person.type(keys)
    assert person.screen.lines[-1] == f"> {line}"
    assert person.type("\r") == [line]


def test_history() -> None:
    person = Person()
    assert person.type("one\ntwo\nthree\none\n") == ["one", "two", "three", "one"]
    assert person.editor.history == ["two", "three", "one"]
    assert person.type(f"{UP}\n") == ["one"]
    assert person.type(f"{UP}{UP}\n") == ["three"]
    assert person.type(f"{UP}{UP}{UP}{UP}{UP}\n") == ["two"]
    assert person.type(f"new{UP}{DOWN}\n") == [""], "the unfinished line is not kept"
    assert person.type("\x10\x10\x0e!\n") == ["two!"]
    for number in range(HISTORY_MAX + 10):
        person.type(f"{number}\n")
    assert len(person.editor.history) == HISTORY_MAX


def test_completion() -> None:
    person = Person(["block_resize", "block_stream", "quit", "/objects/"])
    person.type("qu\t")
    assert person.screen.lines[-1] == "> quit "
    person.type("b\t")
    assert person.screen.lines[-3:] == ["> quit block_", "block_resize  block_stream", "> quit block_"]
    person.type("r\t")
    assert person.type("\n") == ["quit block_resize "]
    assert person.type("/\tx\n") == ["/objects/x"]
    assert person.type("zzz\t\n") == ["zzz"]


def test_a_line_has_an_end() -> None:
    person = Person()
    assert person.type("x" * (LINE_BYTES_MAX + 10) + "\n") == ["x" * LINE_BYTES_MAX]


@given(st.binary(max_size=60))
def test_the_screen_shows_the_line_whatever_is_typed(keys: bytes) -> None:
    person = Person(["alpha", "alpine", "beta"])
    person.type(keys)
    shown = person.screen.lines[-1]
    person.type("\x1b[Z")  # ends a sequence that was begun, changes nothing else
    before = bytes(person.editor._line).decode("latin-1")
    if b"\x1b" not in keys and b"\x9b" not in keys:
        assert shown == f"> {before}"
        assert person.screen.column == 2 + person.editor._cursor
