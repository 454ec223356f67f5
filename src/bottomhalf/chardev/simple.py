# SPDX-License-Identifier: Apache-2.0
"""Devices whose stream is there from the start: standard input and output, files, pipes; and a pseudo-terminal, whose
other end comes and goes without telling."""

from __future__ import annotations

from typing import Final

from bottomhalf.aio import AioContext
from bottomhalf.chardev.base import Chardev
from bottomhalf.host.protocol import PtyMaster, Socket, Terminal

PTY_LOOK_NS: Final = 1_000_000_000  # how often to look whether somebody has opened the other end (QEMU's)


class StreamChardev(Chardev):
    """A stream that is there from the start."""

    def __init__(
        self, chardev_id: str, context: AioContext, kind: str, stream: Socket, *, readable: bool = True
    ) -> None:
        super().__init__(chardev_id, context)
        self.kind = kind  # type: ignore[misc]  # file and pipe differ in nothing else
        self.readable = readable
        self._waiting: Socket | None = stream

    def start(self) -> None:
        if self._waiting is not None:
            stream, self._waiting = self._waiting, None
            self._begin(stream)

    def close(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        super().close()


class StdioChardev(StreamChardev):
    """Standard input and output."""

    def __init__(self, chardev_id: str, context: AioContext, terminal: Terminal, *, signals: bool) -> None:
        super().__init__(chardev_id, context, "stdio", terminal)
        self._terminal = terminal
        self._signals = signals

    def set_echo(self, echo: bool) -> None:
        if self._stream is not None:
            self._terminal.set_echo(echo, self._signals)

    def rows(self) -> int | None:
        return self._terminal.rows() if self._stream is not None else None


class NullChardev(Chardev):
    """Nobody is ever there."""

    kind = "null"
    movable = False


class PtyChardev(Chardev):
    """A pseudo-terminal. While nobody has the other end open it is disconnected."""

    kind = "pty"

    def __init__(self, chardev_id: str, context: AioContext, link: str | None) -> None:
        super().__init__(chardev_id, context)
        self._master: PtyMaster | None = context.host.open_pty()
        self.name = self._master.name
        self._link: str | None = None
        self._look = context.timer(self.start, name=f"look for the user of chardev {chardev_id}")
        if link is not None:
            try:
                context.host.symlink(self.name, link)
            except OSError:
                self._master.close()
                raise
            self._link = link

    def describe(self) -> str:
        return f"pty:{self.name}"

    def rows(self) -> int | None:
        return self._master.rows() if self._master is not None else None

    def start(self) -> None:
        """Look whether somebody is there."""
        master = self._master
        if master is None or self._stream is not None:
            return
        if master.hung_up():
            self._look.arm_ns(self.context.now_ns() + PTY_LOOK_NS)
        else:
            self._begin(master)

    def write(self, data: bytes) -> None:
        if self._stream is None:
            self.start()  # perhaps somebody has come since the last look
        super().write(data)

    def _leave(self) -> None:
        super()._leave()
        self._look.cancel()

    def _arrive(self) -> None:
        self._look = self.context.timer(self.start, name=f"look for the user of chardev {self.id}")
        super()._arrive()

    def _end(self) -> None:
        stream = self._stream
        if stream is None:
            return
        self._stream = None  # it stays open for the next one
        self._forget(stream)
        self._unsent.clear()
        self._unsent_bytes = 0
        if self.front_end is not None:
            self.front_end.closed()
        self.start()

    def close(self) -> None:
        self.front_end = None
        self._flush()
        master, self._master = self._master, None
        self._look.cancel()
        if self._stream is not None:
            self._forget(self._stream)
            self._stream = None
        if master is not None:
            master.close()
        if self._link is not None:
            try:
                self.context.host.remove(self._link)
            except OSError:
                pass  # somebody else has
            self._link = None
        super().close()
