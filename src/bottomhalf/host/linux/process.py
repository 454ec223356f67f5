# SPDX-License-Identifier: Apache-2.0
"""The process: signals as readiness, pid files, going to the background.

A Python signal handler runs between byte codes of the main thread, possibly in the middle of a callback. The C
level handler writes the number to a descriptor at once (``signal.set_wakeup_fd``), so signals become bytes that
the loop reads when it is ready for them, and a blocking wait ends by itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import struct
import sys
from typing import Final, NoReturn


class LinuxSignals:
    """host.protocol.SignalSource. Main thread only."""

    def __init__(self, numbers: list[int]) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._numbers = set(numbers)
        self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _noted) for number in numbers}

    def fileno(self) -> int:
        return self._read.fileno()

    def take(self) -> list[int]:
        try:
            return [number for number in self._read.recv(4096) if number in self._numbers]
        except BlockingIOError:
            return []

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._read.close()
        self._write.close()


def _noted(number: int, frame: object) -> None:
    """The descriptor carries the signal; this only keeps the default action from happening."""


_F_OFD_SETLK: Final = 37
_WHOLE_FILE: Final = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class PidFile:
    """A file with our process id, locked while we live, removed at the end.

    The lock is the open file's, not the process's: that one would be lost as soon as anything in this process
    opens the file, to read it perhaps, and closes it again."""

    def __init__(self, path: str) -> None:
        """OSError (EAGAIN) with the path if another process holds it."""
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.fcntl(self._fd, _F_OFD_SETLK, _WHOLE_FILE)
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{os.getpid()}\n".encode())
        except OSError as error:
            os.close(self._fd)
            reason = "another process holds it" if error.errno in (errno.EAGAIN, errno.EACCES) else error.strerror
            raise OSError(error.errno, f"Cannot lock pid file: {reason}", path) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        os.close(self._fd)


class Background:
    """Going to the background: the parent exits when the child says that it is ready, or has failed.

    Before anything else is set up::

        background = Background()      # returns in the child only
        ...                            # errors still reach the terminal
        background.ready()             # the parent exits 0
    """

    _OK: Final = b"\0"

    def __init__(self) -> None:
        read, self._write = os.pipe()
        if os.fork():
            os.close(self._write)
            self._wait_and_exit(read)
        os.close(read)
        os.setsid()

    @classmethod
    def _wait_and_exit(cls, read: int) -> NoReturn:
        said = os.read(read, 1)
        os._exit(0 if said == cls._OK else 1)

    def ready(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        os.write(self._write, self._OK)
        os.close(self._write)
