# SPDX-License-Identifier: Apache-2.0
"""Several front ends on one device, taking turns.

Keys go to the one in focus; Ctrl-A c passes the focus on. What the others say meanwhile is kept and shown when they get
it, so that two conversations do not mix on one screen. It stays in the I/O handler context: nobody's thread can have
it, and so a QMP monitor behind a mux is as deaf as HMP while a command waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bottomhalf.aio import AioContext
from bottomhalf.chardev.base import Chardev, FrontEnd, Line
from bottomhalf.qapi.errors import OptionError

FRONT_ENDS_MAX: Final = 4  # QEMU's
KEPT_BYTES_MAX: Final = 1 << 20  # of what a front end says while another one has the focus; the newest
ESCAPE: Final = 1  # Ctrl-A
HELP: Final = (
    b"\r\nC-a h    print this help\r\nC-a x    exit\r\n"
    b"C-a c    switch between consoles\r\nC-a C-a  sends C-a\r\n"
)


class MuxPort:
    """One of the front ends (chardev.base.Line)."""

    def __init__(self, mux: MuxChardev, front_end: FrontEnd) -> None:
        self.id = mux.id
        self.context = mux.context
        self.front_end = front_end
        self.reading = True
        self.kept = bytearray()
        self._mux = mux

    def write(self, data: bytes) -> None:
        if self._mux.focus is self:
            self._mux.write(data)
        else:
            self.kept += data
            del self.kept[: max(len(self.kept) - KEPT_BYTES_MAX, 0)]

    def set_reading(self, reading: bool) -> None:
        self.reading = reading
        if self._mux.focus is self:
            self._mux.base.set_reading(reading)

    def set_echo(self, echo: bool) -> None:
        self._mux.base.set_echo(echo)

    def rows(self) -> int | None:
        return self._mux.base.rows()

    def hang_up(self) -> None:
        self._mux.base.hang_up()


class MuxChardev(Chardev):
    """The device that several have. ``on_exit()`` is what Ctrl-A x does."""

    kind = "mux"
    movable = False

    def __init__(self, chardev_id: str, context: AioContext, base: Chardev, on_exit: Callable[[], object]) -> None:
        super().__init__(chardev_id, context)
        if base.busy:
            raise OptionError(f"chardev '{base.id}' is already in use", key="chardev")
        self.base = base
        self.focus: MuxPort | None = None
        self.ports: list[MuxPort] = []
        self._escaped = False
        self._open = False
        self._on_exit = on_exit
        self._line = base.attach(self)

    @property
    def connected(self) -> bool:
        return self.base.connected

    @property
    def busy(self) -> bool:
        return bool(self.ports)

    @property
    def has_user(self) -> bool:
        return self.busy

    def attach(self, front_end: FrontEnd, context: AioContext | None = None) -> Line:
        if len(self.ports) >= FRONT_ENDS_MAX:
            raise OptionError(
                f"too many uses of multiplexed chardev '{self.id}' (maximum is {FRONT_ENDS_MAX})", key="chardev"
            )
        port = MuxPort(self, front_end)
        self.ports.append(port)
        self.focus = port  # QEMU's: the newest
        if self._open:
            front_end.opened(port)
        return port

    def write(self, data: bytes) -> None:
        self._line.write(data)

    # -- front end of the base device ---------------------------------------------------------------------------

    def opened(self, line: Line) -> None:
        self._open = True
        self._escaped = False
        for port in self.ports:
            port.kept.clear()
            port.front_end.opened(port)

    def closed(self) -> None:
        self._open = False
        for port in self.ports:
            port.front_end.closed()

    def received(self, data: memoryview) -> None:
        plain = bytearray()
        for byte in bytes(data):
            if self._escaped:
                self._escaped = False
                if byte == ESCAPE:
                    plain.append(byte)
                    continue
                self._hand_on(plain)
                plain.clear()
                self._command(byte)
            elif byte == ESCAPE:
                self._escaped = True
            else:
                plain.append(byte)
        self._hand_on(plain)

    def _hand_on(self, data: bytearray) -> None:
        if data and self.focus is not None and self._open:
            self.focus.front_end.received(memoryview(bytes(data)))

    def _command(self, byte: int) -> None:
        if byte == ord("c") and self.ports:
            index = self.ports.index(self.focus) if self.focus in self.ports else -1
            self.focus = self.ports[(index + 1) % len(self.ports)]
            self.base.set_reading(self.focus.reading)
            self.write(bytes(self.focus.kept))
            self.focus.kept.clear()
        elif byte == ord("x"):
            self.write(b"QEMU: Terminated\n\r")
            self._on_exit()
        elif byte == ord("h") or byte == ord("?"):
            self.write(HELP)

    def close(self) -> None:
        self.ports.clear()
        self.focus = None
        self.base.front_end = None
        self.front_end = None
