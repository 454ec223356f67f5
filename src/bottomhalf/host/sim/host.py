# SPDX-License-Identifier: Apache-2.0
"""The simulated host: a whole machine under one seed.

    host = SimHost(seed=7)
    host.add_file("disk.raw", 1 << 20)
    host.fault(path="disk.raw", op=WRITE, errno=EIO, times=1)
    run_program(host)  # takes it like the real one
    host.crash()  # the power goes; the files hold what survived
    run_program(host)

What must live here: the shape that programs see (host.protocol.Host) and the knobs that tests turn. What
happens behind them is in the other files of this package. One seed, one program: one run, to the last byte.
"""

from __future__ import annotations

import errno as errno_module
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from bottomhalf.host.memory_file import lend_path
from bottomhalf.host.protocol import ENGINE_KINDS, PERM_RESIZE, PERM_WRITE, Address, DeviceLimits, Host
from bottomhalf.host.sim.arena import SimArena
from bottomhalf.host.sim.disk import Disk, Inode
from bottomhalf.host.sim.engine import SimEngine
from bottomhalf.host.sim.faults import OPEN, Fault, Faults, Latency
from bottomhalf.host.sim.files import SimFile, check_access
from bottomhalf.host.sim.lock import SimLock
from bottomhalf.host.sim.locks import OtherProcessLock
from bottomhalf.host.sim.network import Network, SimListener
from bottomhalf.host.sim.poller import SimEvent, SimPoller, SimSignalSource
from bottomhalf.host.sim.sockets import SimSocket
from bottomhalf.host.sim.store import Store
from bottomhalf.host.sim.streams import SimPty, Streams
from bottomhalf.host.sim.survivors import REORDER_DEFAULT, CrashState, survivors
from bottomhalf.host.sim.threads import SimThread, Threads
from bottomhalf.host.sim.world import Odds, Scheduled, World, failure

POLLER_KINDS: Final = ("epoll", "poll", "io_uring")
CACHED: Final = ("always", "never", "random", "explicit")


class SimHost:
    """A host.protocol.Host, and what a test does to it.

    ``odds`` says how unkind it is within the rules (see ``Odds``), ``latency`` how long requests take. With
    ``trace`` what happens is noted in ``host.trace`` as tuples (nanoseconds since the start, what,
    details...).
    """

    name = "sim"

    def __init__(
        self,
        seed: int = 0,
        *,
        odds: Odds | None = None,
        latency: Latency | None = None,
        trace: bool = False,
    ) -> None:
        self.world = World(seed, odds, trace)
        self.world.threads = Threads(self.world)
        self.world.reports.append(self.world.threads.explain)
        self.faults = Faults()
        self.world.reports.append(self.faults.explain)
        self.latency = Latency() if latency is None else latency
        self.disk = Disk(self.world)
        self.network = Network(self.world, self.faults, self.disk)
        self.tick_ns = 0  # by which every look at the clock moves it; 0: only waiting does
        self.poller_kinds = set(POLLER_KINDS)  # those that can be had by name
        self.engine_kinds = set(ENGINE_KINDS)  # those that can be had by name
        self.streams = Streams(self.world, self.network, self.disk)
        self._random = self.world.chance("random bytes")
        self._survival = self.world.chance("survival")
        self._stdio: tuple[SimSocket, SimSocket] | None = None

    def __repr__(self) -> str:
        return f"<SimHost seed {self.world.seed}>"

    # host.protocol.Host

    def monotonic_ns(self) -> int:
        self.world.threads.preempt()
        self.world.count_look()
        self.world.now_ns += self.tick_ns
        return self.world.now_ns

    def realtime_ns(self) -> int:
        return self.monotonic_ns() + self.world.realtime_offset_ns

    def random_bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)

    def thread_id(self) -> int:
        self.world.threads.preempt()
        return self.world.thread_id

    def thread_check(self) -> Callable[[], bool]:
        home = self.world.thread_id
        return lambda: self.thread_id() == home

    def start_thread(self, target: Callable[[], None], name: str, *, daemon: bool = False) -> SimThread:
        return self.world.threads.start(target, name)

    def preempt(self) -> None:
        """A place of a test's own where another thread may run."""
        self.world.threads.preempt()

    def end_threads(self) -> None:
        """End all threads but the calling one where they stand. For tests that are done with them."""
        self.world.threads.end_all()

    def lock(self) -> SimLock:
        return SimLock(self.world)

    def shuffle(self, items: list[Any]) -> None:
        self.world.order.shuffle(items)

    def poller(self, kind: str = "auto") -> SimPoller:
        if kind not in ("auto", *POLLER_KINDS):
            raise ValueError(f"a poller is auto, {' or '.join(POLLER_KINDS)}, not {kind!r}")
        if kind != "auto" and kind not in self.poller_kinds:
            raise failure(errno_module.ENOSYS)
        return SimPoller(self.world, "sim" if kind == "auto" else kind)

    def event(self) -> SimEvent:
        return SimEvent(self.world)

    def signals(self, numbers: list[int]) -> SimSignalSource:
        return SimSignalSource(self.world, numbers)

    def arena(self, size: int) -> SimArena:
        return SimArena(size)

    def open_file(
        self, path: str, *, read_only: bool = False, direct: bool = False, locking: str = "auto"
    ) -> SimFile:
        if locking not in ("auto", "on", "off"):
            raise ValueError(f"locking is on, off or auto, not {locking!r}")
        fault = self.faults.strike(path, OPEN)
        if fault is not None:
            self.world.block(fault.delay_ns)
            if fault.errno:
                raise failure(fault.errno, path)
        if path in self.disk.directories:
            raise failure(errno_module.EISDIR, path)
        inode = self.disk.files.get(path)
        if inode is None:
            raise failure(errno_module.ENOENT, path)
        check_access(inode, read_only)
        self.world.note("open", path)
        return SimFile(self.world, self.faults, self.latency, inode, read_only, direct, locking)

    def create_file(
        self, path: str, size: int, *, nocow: bool = False, extent_size_hint_bytes: int | None = None
    ) -> None:
        if path not in self.disk.files:
            self.add_file(path, b"")
        file = self.open_file(path)
        try:
            if file.is_device:
                raise OSError(errno_module.ENOTSUP, "it is a block device, which has its size already", path)
            file.set_permissions(PERM_WRITE | PERM_RESIZE, 0)
            file.truncate(0)
            file.truncate(size)
        finally:
            file.close()

    def engine(self, kind: str = "auto") -> SimEngine:
        if kind not in ("auto", *ENGINE_KINDS):
            raise ValueError(f"engine is auto, {', '.join(ENGINE_KINDS[:-1])} or {ENGINE_KINDS[-1]}, not {kind!r}")
        if kind != "auto" and kind not in self.engine_kinds:
            raise failure(errno_module.ENOSYS)
        return SimEngine(self.world, self.faults, self.latency, "sim" if kind == "auto" else kind)

    def listen(self, address: Address) -> SimListener:
        return self.network.listen(address)

    def connect(self, address: Address) -> SimSocket:
        return self.network.connect(address)

    def stdio(self) -> SimSocket:
        return self._terminal_pair()[0]

    def open_stream(self, input_path: str | None, output_path: str | None, mode: str) -> SimSocket:
        return self.streams.open(input_path, output_path, mode)

    def open_pty(self) -> SimPty:
        return self.streams.open_pty()

    def is_device(self, path: str) -> bool:
        return path in self.disk.files and self.disk.files[path].device is not None

    def symlink(self, target: str, path: str) -> None:
        self.streams.symlink(target, path)

    def remove(self, path: str) -> None:
        self.streams.remove(path)

    lend_path = staticmethod(lend_path)  # what a library opens is this machine's, not the simulated one's

    # Time, threads, signals

    @property
    def seed(self) -> int:
        return self.world.seed

    @property
    def odds(self) -> Odds:
        return self.world.odds

    @property
    def trace(self) -> list[tuple[Any, ...]]:
        """What has happened, if the host was made with ``trace=True``."""
        return list(self.world.trace or ())

    @property
    def explain(self) -> Callable[[], str] | None:
        """Asked for a sentence when a ``Deadlock`` is raised: who waits for what."""
        return self.world.explain

    @explain.setter
    def explain(self, hook: Callable[[], str] | None) -> None:
        self.world.explain = hook

    def at(self, delay_ns: int, action: Callable[[], object]) -> Scheduled:
        """Have ``action`` called after a delay, from whatever wait lets that time pass."""
        return self.world.at(delay_ns, action)

    def advance(self, delta_ns: int) -> None:
        """Let time pass and happen what is due, without a wait of the program."""
        self.world.advance(delta_ns)

    def jump_realtime(self, delta_ns: int) -> None:
        """Set the wall clock forward or back."""
        self.world.realtime_offset_ns += delta_ns

    @contextmanager
    def as_thread(self, thread_id: int) -> Iterator[None]:
        """Act as another thread: what the program's other threads do, one after the other."""
        before, self.world.thread_id = self.world.thread_id, thread_id
        try:
            yield
        finally:
            self.world.thread_id = before

    def raise_signal(self, number: int) -> None:
        sources = [d for d in self.world.descriptors.values() if isinstance(d, SimSignalSource)]
        listening = [source for source in sources if number in source.numbers]
        if not listening:
            raise RuntimeError(f"nobody asked for signal {number}: it would end the program")
        listening[0].arrive(number)

    # Files

    def add_file(
        self,
        path: str,
        content: int | bytes = 0,
        *,
        cached: str = "random",
        readable: bool = True,
        writable: bool = True,
        can_zero: bool = True,
        can_discard: bool = True,
    ) -> None:
        """Put a file on the disk: bytes, or a size in bytes of nothing but a hole; all of it durable.
        ``cached`` is what its page cache holds: "always", "never", "random", or "explicit" (what was touched
        or loaded)."""
        store = Store(content if isinstance(content, int) else 0)
        if isinstance(content, bytes):
            store.write(0, content)
        if path in self.disk.files:
            raise failure(errno_module.EEXIST, path)
        inode = Inode(self.disk, path, store, "")
        inode.readable, inode.writable = readable, writable
        inode.can_zero, inode.can_discard = can_zero, can_discard
        self.disk.files[path] = inode
        self.disk.take(len(store.pages))
        self.set_cached(path, cached)

    def add_device(
        self,
        path: str,
        size: int,
        *,
        logical_block: int = 512,
        physical_block: int = 4096,
        writable: bool = True,
        can_zero: bool = True,
        can_discard: bool = True,
    ) -> None:
        """Put a block device there, of zero bytes."""
        self.add_file(path, size, writable=writable, can_zero=can_zero, can_discard=can_discard)
        self.disk.files[path].device = DeviceLimits(logical_block, physical_block, discard_granularity=physical_block)

    def add_directory(self, path: str) -> None:
        self.disk.directories.add(path)

    def set_cached(self, path: str, cached: str) -> None:
        if cached not in CACHED:
            raise ValueError(f"cached is one of {', '.join(CACHED)}, not {cached!r}")
        self.disk.files[path].cached = cached

    def evict(self, path: str, offset: int, length: int) -> None:
        """Take pages out of the page cache (of a file with cached="explicit")."""
        self.disk.files[path].evict(offset, length)

    def load(self, path: str, offset: int, length: int) -> None:
        """Bring pages into the page cache."""
        self.disk.files[path].touch(offset, length)

    def content(self, path: str) -> bytes:
        """What reads see now."""
        return self.disk.files[path].current.content()

    def durable_content(self, path: str) -> bytes:
        """What no power cut can take away."""
        return self.disk.files[path].durable.content()

    def survivor(self, path: str) -> bytes:
        """One of the contents that a power cut now could leave; another one at every call."""
        return self.disk.files[path].survivor(self._survival).content()

    def survivors(self, *paths: str, reorder: int = REORDER_DEFAULT) -> Iterator[CrashState]:
        """All contents of these files that a power cut now could leave, within a bound: see ``sim.survivors``."""
        unfinished = [
            (file.inode, file.inode.unfinished(request.offset, bytes(request.buffer)))
            for engine in self._engines()
            for file, request in engine.unfinished()
        ]
        return survivors([self.disk.files[path] for path in paths], unfinished, reorder)

    @property
    def before_durable(self) -> Callable[[], object] | None:
        """Called before a flush or a write with FUA makes something durable; what it does may still be lost then."""
        return self.disk.before_durable

    @before_durable.setter
    def before_durable(self, hook: Callable[[], object] | None) -> None:
        self.disk.before_durable = hook

    @property
    def disk_free_bytes(self) -> int | None:
        """Space left on the disk, None for as much as anybody wants."""
        return self.disk.free_bytes

    @disk_free_bytes.setter
    def disk_free_bytes(self, count: int | None) -> None:
        self.disk.free_bytes = count

    def other_process_lock(
        self, path: str, held: int, shared: int, name: str = "qemu-system-x86_64", pid: int = 1234
    ) -> OtherProcessLock:
        """Have another process lock the image; ``ImageInUse`` if it cannot."""
        return OtherProcessLock(self.disk.files[path].locks, held, shared, name, pid)

    # Misfortune

    def fault(
        self,
        *,
        path: str | None = None,
        op: int | None = None,
        errno: int = 0,
        start: int = 0,
        end: int | None = None,
        after: int = 0,
        times: int | None = None,
        delay_ns: int = 0,
        hold: bool = False,
        short: int | None = None,
    ) -> Fault:
        """Have operations of ``path`` (a file's, or str() of an address; None: any) fail with ``errno``, take
        ``delay_ns`` longer, stay in flight until ``fault.release()``, or move only ``short`` bytes at first. Only what
        touches the bytes from ``start`` to before ``end``; not the first ``after`` that match; at most ``times``."""
        return self.faults.add(Fault(self.world, path, op, errno, start, end, after, times, delay_ns, hold, short))

    def cut(self, socket: SimSocket) -> None:
        """The connection is lost: bytes on the way are gone, both ends get ECONNRESET."""
        self.world.note("cut", socket.fileno())
        socket.reset()
        socket.peer.reset()

    def crash(self) -> None:
        """The power goes and comes back. Of every file there is what survived; all that the program had open
        is gone, as are locks, connections and listeners, and what was to happen."""
        for engine in self._engines():
            engine.power_lost()
        for inode in self.disk.files.values():
            inode.become(inode.survivor(self._survival))
        self._drop_everything(reboot=True)

    def kill(self) -> None:
        """The program dies (SIGKILL); the machine stays up. Completed writes stay, those in flight may
        happen."""
        for engine in self._engines():
            engine.abandon()
        for inode in self.disk.files.values():
            inode.locks.drop_own()
        self._drop_everything(reboot=False)

    def terminal(self) -> SimSocket:
        """The other end of ``stdio()``: what a person types into and reads."""
        return self._terminal_pair()[1]

    def socket_pair(self) -> tuple[SimSocket, SimSocket]:
        """Two connected Unix sockets."""
        return self.network.pair(True, "peer", "peer")

    def _terminal_pair(self) -> tuple[SimSocket, SimSocket]:
        if self._stdio is None:
            self._stdio = self.network.pair(True, "stdio", "stdio")
        return self._stdio

    def _engines(self) -> list[SimEngine]:
        return [d for d in self.world.descriptors.values() if isinstance(d, SimEngine)]

    def _drop_everything(self, reboot: bool) -> None:
        self.world.note("crash" if reboot else "kill")
        self.world.threads.end_all()
        for fault in self.faults.rules:
            fault.drop_held()
        self.network.drop_everything(reboot)
        self.streams.drop_everything()
        self.world.drop_everything()
        self._stdio = None


def _check(host: SimHost) -> Host:
    """For the type checker: the shape is the protocol's."""
    return host
