# SPDX-License-Identifier: Apache-2.0
"""Byte streams that are no sockets: standard input and output, files, named pipes, pseudo-terminals.

They have the shape of a socket, so that a character device need not know what it is. Standard input may be shared
with other processes, and ``O_NONBLOCK`` belongs to what is shared: it is put back at the end. So are the settings of a
terminal, even if the program ends by a signal's default action only where nobody could.
"""

from __future__ import annotations

import os
import select
import termios
import tty
from typing import Any, Final

from bottomhalf.host.protocol import File

_MODES: Final = {
    "truncate": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "append": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "private": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "existing": os.O_RDWR,
}
FILE_MODE: Final = 0o666  # of a file that is made, less the umask
PRIVATE_MODE: Final = 0o600


class LinuxStream:
    """Two descriptors as one stream (host.protocol.Socket). Either may be -1: that direction does not exist."""

    def __init__(self, input: int, output: int, name: str) -> None:
        self._input, self._output = input, output
        self._name = name
        if input >= 0:
            os.set_blocking(input, False)

    def fileno(self) -> int:
        return self._input if self._input >= 0 else self._output

    def recv_into(self, buffer: Any, /) -> int:
        if self._input < 0:
            raise BlockingIOError
        return os.readv(self._input, [buffer])

    def send(self, data: Any, /) -> int:
        return os.write(self._output, data) if self._output >= 0 else len(data)

    def sendmsg(self, buffers: Any, /) -> int:
        return os.writev(self._output, buffers) if self._output >= 0 else sum(map(len, buffers))

    def send_more(self, data: Any) -> int:
        return self.send(data)

    def send_file(self, file: File, offset: int, count: int) -> int:
        return os.sendfile(self._output, file.fileno(), offset, count)

    def unread(self) -> None:
        return None

    def peer_name(self) -> str:
        return self._name

    def shutdown(self) -> None:
        pass

    def close(self) -> None:
        for fd in {self._input, self._output} - {-1}:
            os.close(fd)
        self._input = self._output = -1


def _rows(fd: int) -> int | None:
    """Lines of the terminal at a descriptor."""
    try:
        return os.get_terminal_size(fd).lines or None
    except OSError:
        return None  # no terminal


class LinuxStdio(LinuxStream):
    """Standard input and output (host.protocol.Terminal)."""

    def __init__(self) -> None:
        self._blocking = os.get_blocking(0)
        self._settings: list[Any] | None = None  # of the terminal, as they were
        super().__init__(0, 1, "stdio")

    def set_echo(self, echo: bool, signals: bool = True) -> None:
        try:
            settings = termios.tcgetattr(0)
        except termios.error:
            return  # no terminal
        if self._settings is None:
            self._settings = [each.copy() if isinstance(each, list) else each for each in settings]
        else:
            settings = [each.copy() if isinstance(each, list) else each for each in self._settings]
        if not echo:
            settings[0] &= ~(
                termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
                | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
            )  # fmt: skip
            settings[1] |= termios.OPOST
            settings[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
            settings[6][termios.VMIN], settings[6][termios.VTIME] = 1, 0
        if not signals:
            settings[3] &= ~termios.ISIG
        termios.tcsetattr(0, termios.TCSANOW, settings)

    def rows(self) -> int | None:
        return _rows(1) if os.isatty(0) else None

    def close(self) -> None:
        os.set_blocking(0, self._blocking)
        if self._settings is not None:
            termios.tcsetattr(0, termios.TCSANOW, self._settings)
            self._settings = None


class LinuxPty(LinuxStream):
    """Our end of a pseudo-terminal (host.protocol.PtyMaster)."""

    def __init__(self) -> None:
        master, slave = os.openpty()
        try:
            self.name = os.ttyname(slave)
            tty.setraw(slave, termios.TCSAFLUSH)
        finally:
            os.close(slave)  # now it counts as hung up, until somebody opens it
        super().__init__(master, master, self.name)

    def hung_up(self) -> bool:
        asked = select.poll()
        asked.register(self._input, 0)
        return any(mask & select.POLLHUP for _, mask in asked.poll(0))

    def rows(self) -> int | None:
        return _rows(self._input)


def open_stream(input_path: str | None, output_path: str | None, mode: str) -> LinuxStream:
    """See host.protocol.Host."""
    input_fd = output_fd = -1
    try:
        if output_path is not None:
            rights = PRIVATE_MODE if mode == "private" else FILE_MODE
            output_fd = os.open(output_path, _MODES[mode] | os.O_CLOEXEC, rights)
        if input_path is not None and input_path == output_path and mode == "existing":
            input_fd = output_fd
        elif input_path is not None:
            how = os.O_RDWR if mode == "existing" else os.O_RDONLY | os.O_NONBLOCK
            input_fd = os.open(input_path, how | os.O_CLOEXEC)
        return LinuxStream(input_fd, output_fd, output_path or input_path or "nothing")
    except OSError:
        for fd in {input_fd, output_fd} - {-1}:
            os.close(fd)
        raise
