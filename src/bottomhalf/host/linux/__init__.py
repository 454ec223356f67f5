# SPDX-License-Identifier: Apache-2.0
"""This machine as a host (floor 0). ``LinuxHost()`` is cheap; what it hands out is loaded when first asked for."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bottomhalf.host.linux.event import LinuxEvent
from bottomhalf.host.linux.file import LinuxFile
from bottomhalf.host.linux.file_hints import give_hints
from bottomhalf.host.linux.memory import LinuxArena
from bottomhalf.host.linux.poller import make_poller
from bottomhalf.host.memory_file import lend_path
from bottomhalf.host.protocol import ENGINE_KINDS, EXTENT_SIZE_HINT_BYTES, PERM_RESIZE, PERM_WRITE

if TYPE_CHECKING:
    from bottomhalf.host import protocol
    from bottomhalf.host.linux.process import LinuxSignals
    from bottomhalf.host.linux.sockets import LinuxListener, LinuxSocket
    from bottomhalf.host.linux.streams import LinuxPty, LinuxStdio, LinuxStream

__all__ = ["LinuxHost"]


class LinuxLock:
    """A host.protocol.Lock."""

    __slots__ = ("_acquire", "release")

    def __init__(self) -> None:
        lock = threading.Lock()
        self._acquire = lock.acquire
        self.release = lock.release

    def acquire(self, timeout_ns: int = -1) -> bool:
        if timeout_ns < 0:
            return self._acquire()
        return self._acquire(timeout_ns > 0, timeout_ns / 1e9 if timeout_ns else -1)

    def __enter__(self) -> None:
        self._acquire()

    def __exit__(self, *raised: object) -> None:
        self.release()


class LinuxHost:
    """A host.protocol.Host."""

    name = "linux"
    explain: Callable[[], str] | None = None

    monotonic_ns = staticmethod(time.monotonic_ns)
    realtime_ns = staticmethod(time.time_ns)
    random_bytes = staticmethod(os.urandom)
    thread_id = staticmethod(threading.get_ident)

    @staticmethod
    def thread_check() -> Callable[[], bool]:
        lock = threading.RLock()  # taken for ever: whose it is, is the cheapest question about threads that there is
        lock.acquire()
        is_mine: Callable[[], bool] = lock._is_owned  # type: ignore[attr-defined]
        return is_mine

    def start_thread(
        self, target: Callable[[], None], name: str, *, daemon: bool = False
    ) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=daemon)
        thread.start()
        return thread

    def lock(self) -> LinuxLock:
        return LinuxLock()

    def shuffle(self, items: list[Any]) -> None:
        pass

    def poller(self, kind: str = "auto") -> protocol.Poller:
        return make_poller(kind)

    def event(self) -> LinuxEvent:
        return LinuxEvent()

    def signals(self, numbers: list[int]) -> LinuxSignals:
        from bottomhalf.host.linux.process import LinuxSignals

        return LinuxSignals(numbers)

    def arena(self, size: int) -> LinuxArena:
        return LinuxArena(size)

    def open_file(
        self, path: str, *, read_only: bool = False, direct: bool = False, locking: str = "auto"
    ) -> LinuxFile:
        return LinuxFile(path, read_only=read_only, direct=direct, locking=locking)

    def create_file(
        self, path: str, size: int, *, nocow: bool = False, extent_size_hint_bytes: int | None = None
    ) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644))
        file = LinuxFile(path)
        try:
            if file.is_device:
                raise OSError(errno.ENOTSUP, "it is a block device, which has its size already", path)
            file.set_permissions(PERM_WRITE | PERM_RESIZE, 0)
            file.truncate(0)
            hint = EXTENT_SIZE_HINT_BYTES if extent_size_hint_bytes is None else extent_size_hint_bytes
            give_hints(file.fileno(), nocow, hint)
            file.truncate(size)
        finally:
            file.close()

    def engine(self, kind: str = "auto") -> protocol.Engine:
        if kind not in ("auto", *ENGINE_KINDS):
            raise ValueError(f"engine is auto, {', '.join(ENGINE_KINDS[:-1])} or {ENGINE_KINDS[-1]}, not {kind!r}")
        if kind in ("auto", "io_uring"):
            from bottomhalf.host.linux.ring_engine import RingEngine

            try:
                return RingEngine()
            except OSError:
                if kind == "io_uring":
                    raise  # "auto": refused (a container's seccomp profile, the sysctl) or not there
        elif kind == "linux-aio":
            from bottomhalf.host.linux.linux_aio import LinuxAioEngine

            return LinuxAioEngine()
        from bottomhalf.host.linux.thread_engine import ThreadEngine

        return ThreadEngine()

    def listen(self, address: protocol.Address) -> LinuxListener:
        from bottomhalf.host.linux.sockets import LinuxListener

        return LinuxListener(address)

    def connect(self, address: protocol.Address) -> LinuxSocket:
        from bottomhalf.host.linux.sockets import connect

        return connect(address)

    def stdio(self) -> LinuxStdio:
        from bottomhalf.host.linux.streams import LinuxStdio

        return LinuxStdio()

    def open_stream(self, input_path: str | None, output_path: str | None, mode: str) -> LinuxStream:
        from bottomhalf.host.linux.streams import open_stream

        return open_stream(input_path, output_path, mode)

    def open_pty(self) -> LinuxPty:
        from bottomhalf.host.linux.streams import LinuxPty

        return LinuxPty()

    def is_device(self, path: str) -> bool:
        try:
            return stat.S_ISBLK(os.stat(path).st_mode)
        except OSError:
            return False

    symlink = staticmethod(os.symlink)
    remove = staticmethod(os.unlink)
    lend_path = staticmethod(lend_path)
