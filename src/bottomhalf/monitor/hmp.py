# SPDX-License-Identifier: Apache-2.0
"""The monitor for people (HMP): a line editor on a character device, commands that print.

It lives in the I/O handler context of the main thread, and a command is called from there. So while one waits, in a
nested poll of the main context, the disks go on, and this monitor and all others of its kind are silent: not even an
echo. QEMU is the same; what is different for QMP, ``qmp`` tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf.chardev.base import Chardev, Line
from bottomhalf.monitor.dispatcher import as_failure
from bottomhalf.monitor.hmp_table import Output, UsageError, complete, parse_line
from bottomhalf.monitor.pager import Pager, fits
from bottomhalf.monitor.readline import LineEditor

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage

PROMPT: Final = "(qemu) "
OUTPUT_BYTES_MAX: Final = 16 << 20  # of one command


def banner() -> str:
    """What a person is greeted with; scripts wait for it."""
    from bottomhalf.monitor.qmp import QEMU_VERSION

    version = ".".join(map(str, QEMU_VERSION))
    return f"QEMU {version} monitor - type 'help' for more information\n"


def run_command_line(storage: Storage, line: str, history: list[str] | None = None) -> str:
    """Run one command and return what it prints, errors included. Main thread, outside coroutines."""
    out = Output(OUTPUT_BYTES_MAX, history)
    try:
        call = parse_line(line)
        if call is not None:
            handler, arguments = call
            handler(storage, arguments, out)
    except UsageError as error:
        out.line(str(error))
    except Exception as error:
        told = as_failure(error)
        if told is None:
            storage.report_defect(error, "a command of a monitor for people")
            out.line(f"Error: internal error: {type(error).__name__}: {error}")
        else:
            out.line(f"Error: {told.desc}")
    return out.text()


class HmpMonitor:
    """A monitor for people on a character device. Main thread."""

    def __init__(self, storage: Storage, chardev: Chardev) -> None:
        self.storage = storage
        self.id = chardev.id
        self._line: Line | None = None
        self._running = False
        self._editor = LineEditor(PROMPT, lambda text: complete(storage, text))
        self._pager: Pager | None = None  # a long text is being read
        chardev.attach(self)
        storage.hmp_monitors.append(self)

    # -- front end of the character device ----------------------------------------------------------------------

    has_user = True

    def opened(self, line: Line) -> None:
        self._line = line
        line.set_echo(False)
        self._editor = LineEditor(PROMPT, self._editor._complete)
        self._pager = None
        self._print(banner() + "\n")
        self._editor.begin()
        line.write(self._editor.take())

    def received(self, data: memoryview) -> None:
        for byte in bytes(data):
            if self._pager is not None:
                self._turn_over(byte)
                continue
            typed = self._editor.key(byte)
            if typed is not None:
                self._write(self._editor.take())
                self._run(typed)
        self._write(self._editor.take())

    def closed(self) -> None:
        self._line = None

    def _run(self, typed: str) -> None:
        if typed.strip() and "secret" not in typed:  # a password is not to be recalled by whoever comes next
            self._editor.remember(typed)
        text = run_command_line(self.storage, typed, self._editor.history)
        rows = self._line.rows() if self._line is not None else None
        if rows is not None and not fits(text, rows) and not self.storage.loop.quitting:
            self._pager = Pager(text, rows)
            self._write(self._pager.take())
            return
        self._print(text)
        if not self.storage.loop.quitting:
            self._editor.begin()

    def _turn_over(self, byte: int) -> None:
        assert self._pager is not None
        self._pager.key(byte)
        self._write(self._pager.take())
        if self._pager.done:
            self._pager = None
            self._editor.begin()

    def _print(self, text: str) -> None:
        self._write(text.replace("\n", "\r\n").encode())

    def _write(self, data: bytes) -> None:
        if self._line is not None and data:
            self._line.write(data)

    def close(self) -> None:
        self._line = None
