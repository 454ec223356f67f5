# SPDX-License-Identifier: Apache-2.0
"""A long text on a terminal, a screenful at a time.

    pager = Pager(text, rows=24)
    output = pager.take()            # the first screenful and the mark
    pager.key(0x20)                  # space, or any other key: the next one; Enter: a line; q or ^C: no more
    pager.done

It knows bytes and does no I/O. How a line wraps depends on the terminal's width, which nobody is asked for: a line that
is longer counts for what it takes of 80 columns, as completions do.
"""

from __future__ import annotations

from typing import Final

from bottomhalf.monitor.readline import COLUMNS

MARK: Final = "--More--"
ROWS_MIN: Final = 4  # of a terminal where paging makes sense
_ERASE: Final = b"\r" + b" " * len(MARK) + b"\r"
_ENDS: Final = frozenset(b"qQ\x03")
_LINE: Final = frozenset(b"\r\n")


def fits(text: str, rows: int) -> bool:
    """Whether a screen of so many lines shows all of it above a prompt."""
    return rows < ROWS_MIN or sum(map(_height, text.split("\n"))) <= rows


def _height(line: str) -> int:
    return max(-(-len(line) // COLUMNS), 1)


class Pager:
    """One text on one terminal."""

    def __init__(self, text: str, rows: int) -> None:
        self._lines = text.removesuffix("\n").split("\n")
        self._next = 0
        self._rows = rows
        self._output = bytearray()
        self._show(rows - 1)

    @property
    def done(self) -> bool:
        """Whether there is no more to show."""
        return self._next >= len(self._lines)

    def take(self) -> bytes:
        """What the terminal is to show next."""
        taken = bytes(self._output)
        self._output.clear()
        return taken

    def key(self, byte: int) -> None:
        """A byte from the keyboard."""
        if self.done:
            return
        self._output += _ERASE
        if byte in _ENDS:
            self._next = len(self._lines)
        else:
            self._show(1 if byte in _LINE else self._rows - 1)

    def _show(self, room: int) -> None:
        """Lines that fit, one at least; then the mark, if that is not all."""
        first = True
        while not self.done and (first or _height(self._lines[self._next]) <= room):
            line = self._lines[self._next]
            room -= _height(line)
            self._output += line.encode() + b"\r\n"
            self._next += 1
            first = False
        if not self.done:
            self._output += MARK.encode()
