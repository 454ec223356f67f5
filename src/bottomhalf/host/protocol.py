# SPDX-License-Identifier: Apache-2.0
"""The door: what a program cannot compute by itself, as protocols.

Time, readiness, bytes from files and sockets, completions, threads, random numbers and signals enter the program
through an object that has the shape of ``Host`` and through nothing else. ``host.linux`` is this machine,
``host.sim`` a simulated one. A test reads the imports of everything above and fails when one goes round the door.

What must live here: the shapes, the constants that both hosts share, the addresses. No behaviour.

Conventions of every host: integers that ``fileno()`` returns are meaningful only to pollers of the same host; a
call that would have to wait raises ``BlockingIOError`` instead; failures are ``OSError`` with ``errno``; time is
in integer nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

from bottomhalf.host.request import Request

# Readiness masks: the values of poll(2) and epoll(7).
IN: Final = 0x001
OUT: Final = 0x004
ERR: Final = 0x008
HUP: Final = 0x010

# Block status bits (QEMU's BDRV_BLOCK_*), as File.block_status answers them.
DATA: Final = 1  # reads come from storage
ZERO: Final = 2  # reads as zeroes

# What open_file() says, with ENOTBLK, of a name that leads to one.
CHARACTER_DEVICE: Final = "a character device, neither a regular file nor a block device"

# What Host.engine() makes by name.
ENGINE_KINDS: Final = ("io_uring", "linux-aio", "threads")
# What QEMU's users call them: ``aio=``.
AIO_ENGINES: Final = {"io_uring": "io_uring", "native": "linux-aio", "threads": "threads"}

EXTENT_SIZE_HINT_BYTES: Final = 1 << 20  # for new files, as QEMU

# Permissions of an opened image, bit numbers as in the lock bytes of a file (100 + n held, 200 + n not shared).
PERM_CONSISTENT_READ: Final = 1
PERM_WRITE: Final = 2
PERM_WRITE_UNCHANGED: Final = 4
PERM_RESIZE: Final = 8
PERM_ALL: Final = 15


@dataclass(frozen=True)
class DeviceLimits:
    """What a block device says of itself, in bytes; 0 for what it does not say, or does not do."""

    logical_block: int  # the least that it reads and writes (BLKSSZGET)
    physical_block: int  # what it writes without reading before (BLKPBSZGET)
    max_transfer: int = 0  # the largest request that reaches it in one piece
    max_segments: int = 0  # a count: pieces of memory that such a request may have
    discard_granularity: int = 0
    max_discard: int = 0
    max_write_zeroes: int = 0  # 0: the kernel writes zero bytes instead
    optimal_transfer: int = 0


@dataclass(frozen=True)
class UnixAddress:
    """A stream socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class InetAddress:
    """A TCP address. ``port`` 0 lets the host choose when listening."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Address: TypeAlias = UnixAddress | InetAddress


class Event(Protocol):
    """A wake-up that a poller sees as readable: eventfd(2), or a simulated one."""

    def fileno(self) -> int: ...

    def set(self) -> None:
        """Make it readable. From any thread and from signal handlers."""

    def clear(self) -> bool:
        """Make it unreadable; True if it was readable."""

    def close(self) -> None: ...


class Poller(Protocol):
    """Level-triggered readiness of many descriptors. Belongs to the thread that made it: the others may call
    register(), modify() and unregister(), and wake it afterwards, since some kinds see a change only in the next
    wait. Unregister a descriptor before closing it; what each kind does otherwise stands in its file."""

    name: str  # the kind that it is: "epoll", "poll", "io_uring", or "sim"

    def fileno(self) -> int:
        """A descriptor that is readable while wait(0) would return something (for embedding). OSError if this kind
        has none here."""

    def register(self, fd: int, mask: int) -> None:
        """Report ``fd`` from now on when something of ``mask`` is so; ERR and HUP need not be asked for. OSError:
        EEXIST, EBADF, EPERM for what cannot be polled, ENOSPC, ENOMEM; nothing has changed then."""

    def modify(self, fd: int, mask: int) -> None:
        """The mask is another one. OSError: ENOENT, EBADF; nothing has changed then."""

    def unregister(self, fd: int) -> None:
        """Never report ``fd`` again. OSError: ENOENT, EBADF."""

    def wait(self, timeout_ns: int) -> list[tuple[int, int]]:
        """Ready descriptors as (fd, mask). 0 does not wait, -1 waits without end, else at least ``timeout_ns``
        unless something is ready or a signal arrives; an empty list is a normal answer."""

    def close(self) -> None: ...


class Arena(Protocol):
    """A page-aligned block of memory that requests point into."""

    size: int
    view: memoryview
    address: int  # of the first byte; 0 where addresses mean nothing (sim)

    def close(self) -> None:
        """Give the memory back. Views into it must be gone; a leftover view only delays it."""


class File(Protocol):
    """An open image file or block device.

    Sizes and offsets are bytes. ``alignment`` is what offset and length of a request must be multiples of
    (1 unless O_DIRECT), ``memory_alignment`` the same for the buffer's address.
    """

    path: str
    read_only: bool
    direct: bool
    alignment: int
    memory_alignment: int
    is_device: bool  # a block device: it has its size, and no holes

    def fileno(self) -> int: ...

    def size(self) -> int: ...

    @property
    def status_waits(self) -> bool:
        """Whether block_status() may take long (network and FUSE file systems): then BLOCK_STATUS is for the engine."""

    def allocated_size(self) -> int:
        """Bytes that the file occupies on its file system."""

    def pread(self, length: int, offset: int) -> bytes:
        """Read now, waiting for the disk if need be; short at the end of the file. For rare, small reads (format
        probing): the loop stands still meanwhile."""

    def read_inline(self, requests: list[Request]) -> list[Request]:
        """Serve the READs whose bytes are in memory now; return those that are not. Never waits for a disk. A
        read beyond the end of the file yields zero bytes there. Sets ``result`` of those served."""

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        """The bytes, if all of them are in memory now and within the file; None: ask in another way. Never waits for
        a disk. OSError."""

    def map_reads(self, requests: list[Request], offsets: list[int]) -> bool:
        """Serve READs without a copy: point the buffer of each at the bytes at its entry of ``offsets`` and return
        True, or return False (always allowed); for empty lists, whether it is worth asking. The views are for the
        host's sockets only and show what is there when they are sent; when a send says EFAULT the file was truncated
        meanwhile. ``result`` is not set."""

    def write_inline(self, requests: list[Request]) -> list[Request]:
        """Serve WRITEs by copying to the page cache where that is the right thing; return the others."""

    def is_cached(self, offset: int, length: int) -> bool:
        """Whether all bytes of the range are in memory, so that send_file would not wait for a disk."""

    def block_status(self, offset: int, length: int) -> tuple[int, int]:
        """(bits, count): DATA or ZERO for the first ``count`` (1..length) bytes from ``offset``."""

    def prefetch(self, offset: int, length: int) -> None:
        """Start to bring the range into memory, if the host can; no more than a hint."""

    def truncate(self, size: int) -> None: ...

    def device_limits(self) -> DeviceLimits | None:
        """What a block device can do; None for a regular file."""

    def set_read_only(self, read_only: bool) -> None:
        """Open the same file another time, for reading alone or for writing too, and put that in the place of what is
        open: what is under way ends as it was begun, locks stay. OSError (EACCES, EROFS, ``DeviceReadOnly``, ...);
        nothing has changed then."""

    def set_permissions(self, held: int, shared: int) -> None:
        """Take image locks for the permission masks ``held`` and ``shared`` (OFD locks on bytes 100 + n and
        200 + n, the ones that QEMU uses), giving up those no longer needed. Raises ``ImageInUse`` without having
        changed anything if another opener conflicts."""

    def take_locks(self, file: File) -> None:
        """Hold the image locks that ``file``, the same image opened in another way, holds: so that it can be closed and
        nobody else comes in between. The two do not conflict meanwhile; this file has none yet."""

    def close(self) -> None: ...


class ImageInUse(OSError):
    """Another opener holds a conflicting lock; the message names the permission and, if known, the process."""


class DeviceReadOnly(PermissionError):
    """A block device that was to be written to is read-only, although its node may be opened."""


class Engine(Protocol):
    """Asynchronous file I/O with completions that come in lists (io_uring, linux-aio, threads,
    simulated).

    One that can prepare a list faster than its requests one by one also has ``prepare_batch(file, requests)``: the
    same as prepare() for each, where all are of one op; it returns those that could not be taken, failed."""

    name: str
    in_flight: int  # prepared or submitted, not yet reaped

    @property
    def pending(self) -> bool:
        """Whether reap() would return something. Costs no system call; for busy polling."""

    def fileno(self) -> int:
        """A descriptor that becomes readable when something finishes outside enter() and reap(). What finishes
        inside enter() shows in ``pending`` alone: look there afterwards."""

    def prepare(self, file: File, request: Request) -> None:
        """Queue a request of any op; it starts with the next enter(). The engine continues short transfers,
        retries EINTR and EAGAIN, zero-fills a read beyond the end, and turns a write that cannot proceed into
        ENOSPC, so that a request completes once and whole. OSError (no memory for it): it is not in flight."""

    def enter(self) -> None:
        """Start everything that is prepared, with as few system calls as possible. RuntimeError if the engine is
        another process's, or cannot be used any more; reap() returns what was in flight, failed, in the second case."""

    def reap(self) -> list[Request]:
        """Requests that finished since the last call, ``result`` set. Does not wait."""

    def close(self) -> None:
        """Wait until nothing is in flight, then give everything back. In a forked child only what is the child's own:
        there is nothing of its own in flight."""


class Socket(Protocol):
    """A connected non-blocking byte stream."""

    def fileno(self) -> int: ...

    def recv_into(self, buffer: Any, /) -> int:
        """Bytes received, 0 at the end of the stream."""

    def send(self, data: Any, /) -> int: ...

    def sendmsg(self, buffers: Any, /) -> int: ...

    def send_more(self, data: Any) -> int:
        """send() with a hint that more follows at once (MSG_MORE)."""

    def send_file(self, file: File, offset: int, count: int) -> int:
        """Send from the file without copying through this program; bytes sent, 0 at the end of the file."""

    def unread(self) -> int | None:
        """Bytes that were sent and that the other end has not read yet, or some more; 0 only if it has read all, or is
        gone. None where nobody can tell."""

    def peer_name(self) -> str:
        """For messages: an address, or process and user of a local peer where the host knows them."""

    def shutdown(self) -> None:
        """End both directions; the peer sees the end of the stream."""

    def close(self) -> None: ...


class Terminal(Socket, Protocol):
    """A stream behind which a person may sit."""

    def set_echo(self, echo: bool, signals: bool = True) -> None:
        """Whether the terminal shows what is typed and hands it on line by line, or leaves both to the program; and
        whether ^C and its kin are signals. No effect where there is no terminal. close() restores it."""

    def rows(self) -> int | None:
        """Lines of the screen now; None if there is none, or nobody knows."""


class PtyMaster(Socket, Protocol):
    """Our end of a pseudo-terminal."""

    name: str  # of the other end, for whoever opens it

    def hung_up(self) -> bool:
        """Whether nobody has the other end open."""

    def rows(self) -> int | None:
        """Lines of the screen at the other end now; None if nobody has said so."""


class Listener(Protocol):
    """A listening stream socket."""

    address: Address  # with the real port where 0 was asked for

    def fileno(self) -> int: ...

    def accept(self) -> Socket: ...

    def close(self) -> None:
        """Stop listening; a Unix socket's file is removed."""


class SignalSource(Protocol):
    """Signals as something to poll."""

    def fileno(self) -> int: ...

    def take(self) -> list[int]:
        """Numbers of the signals that arrived since the last call."""

    def close(self) -> None: ...


class Thread(Protocol):
    """A started thread."""

    def join(self) -> None: ...


class Lock(Protocol):
    """A lock that one thread may take and another release."""

    def acquire(self, timeout_ns: int = -1) -> bool:
        """Take it; whether it was to be had. 0 does not wait, -1 waits without end, else for so long."""

    def release(self) -> None:
        """Give it up, from any thread. RuntimeError if nobody holds it."""

    def __enter__(self) -> object: ...

    def __exit__(self, *raised: object) -> None: ...


class Host(Protocol):
    """Everything that enters a program from outside."""

    name: str
    explain: Callable[[], str] | None
    """Who waits for whom, in the program's words. A host that notices that a wait can never end asks for it."""

    def monotonic_ns(self) -> int:
        """A clock that never goes back (CLOCK_MONOTONIC)."""

    def realtime_ns(self) -> int:
        """The wall clock (CLOCK_REALTIME); may jump."""

    def random_bytes(self, count: int) -> bytes: ...

    def thread_id(self) -> int: ...

    def thread_check(self) -> Callable[[], bool]:
        """A function that says whether it is called in the thread that has called this. Cheaper than to compare
        numbers: whoever belongs to a thread asks on every call."""

    def start_thread(self, target: Callable[[], None], name: str, *, daemon: bool = False) -> Thread:
        """A daemon thread does not keep the program from ending."""

    def lock(self) -> Lock:
        """A lock that threads may wait for. (What is held for a few instructions takes ``host.threads.Lock``.)"""

    def shuffle(self, items: list[Any]) -> None:
        """Reorder, in place, things whose order means nothing. The real host leaves them alone; the simulated
        one shuffles by its seed, so that no test can depend on the order."""

    def poller(self, kind: str = "auto") -> Poller:
        """Make a poller: "epoll", "poll", "io_uring", or "auto" for the fastest that works here (its ``name`` tells
        which). Belongs to the calling thread. OSError if the named one is not to be had."""

    def event(self) -> Event: ...

    def signals(self, numbers: list[int]) -> SignalSource: ...

    def arena(self, size: int) -> Arena: ...

    def open_file(
        self, path: str, *, read_only: bool = False, direct: bool = False, locking: str = "auto"
    ) -> File:
        """Open an existing regular file or block device; anything else is ENOTBLK. ``locking`` is on, off or auto."""

    def is_device(self, path: str) -> bool:
        """Whether the path leads to a block device. False as well if it leads nowhere."""

    def create_file(
        self, path: str, size: int, *, nocow: bool = False, extent_size_hint_bytes: int | None = None
    ) -> None:
        """Make a regular file of zeroes; one that is there loses its content. ``ImageInUse`` if somebody has locked
        it, OSError; nothing has changed then. The file system is asked not to copy on write, and to allocate so much at
        a time (None: EXTENT_SIZE_HINT_BYTES, 0: as it likes); whether it listens is its affair."""

    def engine(self, kind: str = "auto") -> Engine:
        """Make an engine: one of ENGINE_KINDS, or "auto" for the one that works here and is best for all files (so not
        linux-aio, which waits unless a file is direct). Belongs to the calling thread. OSError if the named one is not
        to be had."""

    def listen(self, address: Address) -> Listener: ...

    def connect(self, address: Address) -> Socket: ...

    def stdio(self) -> Terminal:
        """Standard input and output as one stream."""

    def open_stream(self, input_path: str | None, output_path: str | None, mode: str) -> Socket:
        """Files, devices or named pipes as one stream; OSError with the path. Without an input, recv_into() raises
        BlockingIOError. ``mode`` is "truncate" or "append" (the output is made if it is not there), "private" (as
        "append", and a file that is made is its owner's alone), or "existing" (both are there and opened for both
        directions, so that a pipe does not wait for its peer)."""

    def open_pty(self) -> PtyMaster:
        """A new pseudo-terminal, raw and without echo."""

    def symlink(self, target: str, path: str) -> None:
        """Make a symbolic link. OSError."""

    def remove(self, path: str) -> None:
        """Remove a file or a link. OSError."""

    def lend_path(self, data: bytes) -> AbstractContextManager[str]:
        """A path that leads to these bytes while the block lasts, for a library of this process that takes nothing but
        names. No other process can open it. OSError."""
