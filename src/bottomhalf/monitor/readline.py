# SPDX-License-Identifier: Apache-2.0
"""Editing a line on a terminal: keys in, what the terminal is to show out, and now and then a line.

    editor = LineEditor("(qemu) ", complete=lambda text: [])
    line = editor.key(0x0d)      # a finished line, or None
    output = editor.take()       # what to send

It knows bytes and the escape sequences that all terminals share, and does no I/O. The keys are those of QEMU's monitor:
^A ^E ^D ^U ^W ^L ^P ^N, TAB, backspace, the cursor keys, home, end, delete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

LINE_BYTES_MAX: Final = 4095  # QEMU's
HISTORY_MAX: Final = 64
COLUMNS: Final = 80
COLUMN_LEAST: Final = 10
CANDIDATES_MAX: Final = 256  # of a completion that are shown

_NORMAL, _ESCAPE, _CSI, _SS3 = range(4)
_CSI_BYTE: Final = 0x9B
_PARAMETER_MAX: Final = 9999


class LineEditor:
    """One terminal."""

    def __init__(self, prompt: str, complete: Callable[[str], list[str]]) -> None:
        self.prompt = prompt
        self.history: list[str] = []
        self._complete = complete
        self._line = bytearray()
        self._cursor = 0
        self._shown = b""  # what of the line the terminal shows, and where its cursor is
        self._shown_cursor = 0
        self._state = _NORMAL
        self._parameter = 0
        self._recalled: int | None = None  # which line of the history is being edited
        self._output = bytearray()

    def take(self) -> bytes:
        """What the terminal is to show next."""
        taken = bytes(self._output)
        self._output.clear()
        return taken

    def begin(self) -> None:
        """Ask for a line."""
        self._line.clear()
        self._cursor = self._shown_cursor = 0
        self._shown = b""
        self._recalled = None
        self._output += self.prompt.encode()

    def remember(self, line: str) -> None:
        """Put a line at the end of the history; an equal older one goes."""
        if line in self.history:
            self.history.remove(line)
        self.history.append(line)
        del self.history[:-HISTORY_MAX]

    def key(self, byte: int) -> str | None:
        """A byte from the keyboard; a line if that finished one."""
        line = None
        if self._state == _NORMAL:
            line = self._plain(byte)
        elif self._state == _ESCAPE:
            self._state = {0x5B: _CSI, 0x4F: _SS3}.get(byte, _NORMAL)
            self._parameter = 0
        elif self._state == _CSI:
            self._control(byte)
        else:
            self._state = _NORMAL
            if byte == 0x46:
                self._cursor = len(self._line)
            elif byte == 0x48:
                self._cursor = 0
        self._show()
        return line

    def _plain(self, byte: int) -> str | None:
        if byte in (0x0A, 0x0D):
            return self._finish()
        if byte == _CSI_BYTE:
            self._state = _CSI
            self._parameter = 0
        elif byte == 0x1B:
            self._state = _ESCAPE
        elif byte in (0x08, 0x7F):
            if self._cursor > 0:
                self._cursor -= 1
                del self._line[self._cursor]
        elif byte in _KEYS:
            _KEYS[byte](self)
        elif byte >= 0x20 and len(self._line) < LINE_BYTES_MAX:
            self._line.insert(self._cursor, byte)
            self._cursor += 1
        return None

    def _control(self, byte: int) -> None:
        if 0x30 <= byte <= 0x39:
            self._parameter = min(self._parameter * 10 + byte - 0x30, _PARAMETER_MAX)
            return
        self._state = _NORMAL
        if byte in (0x41, 0x46):
            self._older()
        elif byte in (0x42, 0x45):
            self._newer()
        elif byte == 0x43:
            self._cursor = min(self._cursor + 1, len(self._line))
        elif byte == 0x44:
            self._cursor = max(self._cursor - 1, 0)
        elif byte == 0x7E and self._parameter in _TILDE_KEYS:
            _TILDE_KEYS[self._parameter](self)

    def _finish(self) -> str:
        line = self._line.decode(errors="replace")
        self._cursor = len(self._line)
        self._show()
        self._output += b"\r\n"
        self._line.clear()
        self._cursor = self._shown_cursor = 0
        self._shown = b""
        self._recalled = None
        return line

    # -- keys ---------------------------------------------------------------------------------------------------

    def _home(self) -> None:
        self._cursor = 0

    def _end(self) -> None:
        self._cursor = len(self._line)

    def _delete(self) -> None:
        del self._line[self._cursor : self._cursor + 1]

    def _kill_line(self) -> None:
        del self._line[: self._cursor]
        self._cursor = 0

    def _kill_word(self) -> None:
        start = self._cursor
        while start > 0 and self._line[start - 1] == 0x20:
            start -= 1
        while start > 0 and self._line[start - 1] != 0x20:
            start -= 1
        del self._line[start : self._cursor]
        self._cursor = start

    def _clear_screen(self) -> None:
        self._output += b"\x1b[2J\x1b[1;1H" + self.prompt.encode()
        self._shown = b""
        self._shown_cursor = 0

    def _older(self) -> None:
        at = len(self.history) if self._recalled is None else self._recalled
        if at > 0:
            self._recall(at - 1)

    def _newer(self) -> None:
        if self._recalled is None:
            return
        if self._recalled + 1 < len(self.history):
            self._recall(self._recalled + 1)
        else:
            self._recalled = None
            self._line.clear()
            self._cursor = 0

    def _recall(self, index: int) -> None:
        self._recalled = index
        self._line[:] = self.history[index].encode()
        self._cursor = len(self._line)

    def _tab(self) -> None:
        before = self._line[: self._cursor].decode(errors="replace")
        candidates = sorted(set(self._complete(before)))
        if not candidates:
            return
        word = before.rpartition(" ")[2]
        common = _common_prefix(candidates)
        if common.startswith(word):
            self._insert(common[len(word) :])
        if len(candidates) == 1:
            if not common.endswith("/"):
                self._insert(" ")
            return
        self._list(candidates)

    def _insert(self, text: str) -> None:
        data = text.encode()
        if len(self._line) + len(data) <= LINE_BYTES_MAX:
            self._line[self._cursor : self._cursor] = data
            self._cursor += len(data)

    def _list(self, candidates: list[str]) -> None:
        width = max(max(map(len, candidates)) + 2, COLUMN_LEAST)
        per_line = max(COLUMNS // width, 1)
        shown = candidates[:CANDIDATES_MAX]
        self._show()
        self._output += b"\r\n"
        for start in range(0, len(shown), per_line):
            row = "".join(f"{each:{width}}" for each in shown[start : start + per_line])
            self._output += row.rstrip().encode() + b"\r\n"
        self._output += self.prompt.encode()
        self._shown = b""
        self._shown_cursor = 0

    # -- the screen ---------------------------------------------------------------------------------------------

    def _show(self) -> None:
        line = bytes(self._line)
        if line != self._shown:
            if line.startswith(self._shown) and self._shown_cursor == len(self._shown):
                self._output += line[len(self._shown) :]
            else:
                self._output += b"\x1b[D" * self._shown_cursor + line + b"\x1b[K"
            self._shown = line
            self._shown_cursor = len(line)
        move = self._cursor - self._shown_cursor
        self._output += b"\x1b[C" * move if move > 0 else b"\x1b[D" * -move
        self._shown_cursor = self._cursor


_KEYS: Final[dict[int, Callable[[LineEditor], None]]] = {
    0x01: LineEditor._home,
    0x04: LineEditor._delete,
    0x05: LineEditor._end,
    0x09: LineEditor._tab,
    0x0C: LineEditor._clear_screen,
    0x0E: LineEditor._newer,
    0x10: LineEditor._older,
    0x15: LineEditor._kill_line,
    0x17: LineEditor._kill_word,
}
_TILDE_KEYS: Final[dict[int, Callable[[LineEditor], None]]] = {
    1: LineEditor._home,
    3: LineEditor._delete,
    4: LineEditor._end,
}


def _common_prefix(words: list[str]) -> str:
    first, last = min(words), max(words)
    for index, character in enumerate(first):
        if last[index : index + 1] != character:
            return first[:index]
    return first
