# SPDX-License-Identifier: Apache-2.0
"""linux-aio on the standard library: io_submit(2) in batches, completions from the ring in shared memory.

The kernel reads a table of addresses of 64-byte control blocks; slot i always lives in block i and equals its
``aio_data``, so that a completion finds its request by indexing a list. Completions are signalled on an eventfd that
every block names, those inside io_submit too.

The handle of a context is the address of its completion ring, which is mapped into this process. Reading it there
spares a system call per batch. That is right only where loads are not reordered (x86-64; elsewhere a barrier would be
needed between the tail and the events, which Python does not have) and where the ring looks as we know it: its
magic number, its features, its header. Else io_getevents(2) reads it.

io_submit stops at a block that it does not like. Is it the first one, the call fails, and the errno is that one's:
it is refused alone and the rest is submitted again. EAGAIN is nobody's fault: those blocks wait.

There is no io_cancel(2): the kernel cancels nothing that is about a file.

What must live here: the context. What a request means is ``linux_aio``'s business.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from array import array
from typing import Final

from bottomhalf.host.linux.syscalls import address_of, error, io_destroy, io_getevents, io_setup, io_submit

AIO_ENTRIES: Final = 256  # requests in flight per context; more wait in the engine. All contexts of all
# programs share /proc/sys/fs/aio-max-nr, 65536 by default (QEMU takes 1024 per context)

CMD_PREAD: Final = 0
CMD_PWRITE: Final = 1
CMD_FDSYNC: Final = 3

FLAG_RESFD: Final = 1
_RING_MAGIC: Final = 0xA10A10A1
_RING_COMPAT_FEATURES: Final = 1
_RING_INCOMPAT_FEATURES: Final = 0

# aio_data u64, aio_key u32, aio_rw_flags u32, aio_lio_opcode u16, aio_reqprio s16, aio_fildes u32,
# aio_buf u64, aio_nbytes u64, aio_offset s64, aio_reserved2 u64, aio_flags u32, aio_resfd u32
BLOCK: Final = struct.Struct("<QIIHhIQQqQII")
BLOCK_SIZE: Final = 64
# id, nr, head, tail, magic, compat_features, incompat_features, header_length, all u32; then the events
_HEADER_WORDS: Final = 8
_HEAD: Final = 2
_TAIL: Final = 3
_EVENT_SIZE: Final = 32  # data u64, obj u64, res s64, res2 s64


class AioRing:
    """One context of linux-aio. Belongs to the thread that made it."""

    def __init__(self, eventfd: int) -> None:
        """OSError: EAGAIN (aio-max-nr is used up), ENOSYS and EPERM (not there, not allowed), ENOMEM."""
        self.entries: int = AIO_ENTRIES
        self.eventfd = eventfd
        self._context = _setup(self.entries)
        self.blocks = memoryview(bytearray(self.entries * BLOCK_SIZE))
        self._blocks_address = address_of(self.blocks)
        table = memoryview(bytearray(self.entries * 8))
        self._table = table.cast("Q")
        self._table_address = address_of(table)
        self._unsubmitted: list[int] = []  # slots, in order
        self._refused: list[tuple[int, int]] = []  # slots and their errnos, of those that io_submit did not like
        self.in_kernel = 0  # submitted and not collected
        self._header: memoryview | None = None
        header = _words(self._context, _HEADER_WORDS * 4).cast("I")
        count = header[1]
        if _readable(header.tolist(), self.entries):
            self._header = header
            self._count = count
            events = _words(self._context + _HEADER_WORDS * 4, count * _EVENT_SIZE).cast("q")
            self._slots_column, self._results_column = events[::4], events[2::4]
        else:
            room = memoryview(bytearray(self.entries * _EVENT_SIZE))
            self._room_address = address_of(room)
            events = room.cast("q")
            self._slots_column, self._results_column = events[::4], events[2::4]

    def push(self, slot: int, command: int, fd: int, offset: int, address: int, length: int, rw_flags: int) -> None:
        """Fill block ``slot`` (free, 0..entries-1) and queue it. It starts with the next enter()."""
        start = slot * BLOCK_SIZE
        BLOCK.pack_into(
            *(self.blocks, start, slot, 0, rw_flags, command, 0, fd & 0xFFFFFFFF, address, length, offset),
            *(0, FLAG_RESFD, self.eventfd),
        )
        self.push_filled([slot])

    def push_filled(self, slots: list[int]) -> None:
        """Queue blocks that the caller has filled himself, as push() does, in ``blocks``."""
        address, begin = self._blocks_address, len(self._unsubmitted)
        self._table[begin : begin + len(slots)] = array("Q", [address + slot * BLOCK_SIZE for slot in slots])
        self._unsubmitted += slots

    def enter(self) -> None:
        """Submit what was pushed. What the kernel has no room for stays ``unsubmitted``."""
        unsubmitted = self._unsubmitted
        done, count = 0, len(unsubmitted)
        while done < count:
            taken = io_submit(self._context, count - done, self._table_address + 8 * done)
            if taken > 0:
                self.in_kernel += taken
                done += taken
            elif taken in (0, -errno.EAGAIN):
                break
            elif taken != -errno.EINTR:
                self._refused.append((unsubmitted[done], taken))
                done += 1
        self._keep(unsubmitted[done:])

    def _keep(self, slots: list[int]) -> None:
        self._unsubmitted = slots
        for n, slot in enumerate(slots):
            self._table[n] = self._blocks_address + slot * BLOCK_SIZE

    @property
    def unsubmitted(self) -> int:
        """Pushed blocks that the kernel has not taken yet."""
        return len(self._unsubmitted)

    def take_back(self) -> list[int]:
        """The slots of those blocks, which are forgotten here."""
        slots = self._unsubmitted
        self._keep([])
        return slots

    @property
    def pending(self) -> bool:
        """Whether completions() would return something; as far as that can be told without a system call."""
        header = self._header
        return bool(self._refused) or (header is not None and header[_HEAD] != header[_TAIL])

    def completions(self) -> tuple[list[int], list[int]]:
        """Slots and results (count or negative errno) of everything that is finished; frees the blocks. OSError if the
        context has gone, and all that was in flight with it."""
        slots, results = self._read_ring() if self._header is not None else self._get_events()
        self.in_kernel -= len(slots)
        for slot, result in self._refused:
            slots.append(slot)
            results.append(result)
        self._refused.clear()
        return slots, results

    def _read_ring(self) -> tuple[list[int], list[int]]:
        header = self._header
        assert header is not None
        head, tail = header[_HEAD], header[_TAIL]
        if head == tail:
            return [], []
        if head < tail:
            slots = self._slots_column[head:tail].tolist()
            results = self._results_column[head:tail].tolist()
        else:
            slots = self._slots_column[head:].tolist() + self._slots_column[:tail].tolist()
            results = self._results_column[head:].tolist() + self._results_column[:tail].tolist()
        header[_HEAD] = tail
        return slots, results

    def _get_events(self) -> tuple[list[int], list[int]]:
        """One call is enough: there cannot be more events than blocks."""
        while True:
            count = io_getevents(self._context, self.entries, self._room_address)
            if count >= 0:
                return self._slots_column[:count].tolist(), self._results_column[:count].tolist()
            if count != -errno.EINTR:
                raise error(-count)

    def forget(self) -> None:
        """Let go of what is in this process; after a fork the context is the parent's and stays."""
        self._header = None
        self._refused.clear()
        self._slots_column = self._results_column = memoryview(b"")

    def close(self) -> None:
        """Give the context back. Waits for what is in flight."""
        self.forget()
        context, self._context = self._context, 0
        if context:
            try:
                io_destroy(context)
            except OSError:
                pass  # it is gone already: what we wanted


def _setup(entries: int) -> int:
    try:
        return io_setup(entries)
    except OSError as failure:
        if failure.errno != errno.EAGAIN:
            raise
        text = f"{failure.strerror}: all of /proc/sys/fs/aio-max-nr{_usage()} is in use; write a larger number there"
        raise OSError(failure.errno, text) from failure


def _usage() -> str:
    try:
        with open("/proc/sys/fs/aio-max-nr") as limit, open("/proc/sys/fs/aio-nr") as used:
            return f" ({limit.read().strip()}, of which {used.read().strip()} are taken)"
    except OSError:
        return ""


def _words(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _readable(header: list[int], entries: int) -> bool:
    """Whether the completion ring may be read where it lies."""
    _, count, _, _, magic, compat, incompat, length = header
    return (
        os.uname().machine == "x86_64"
        and magic == _RING_MAGIC
        and compat == _RING_COMPAT_FEATURES
        and incompat == _RING_INCOMPAT_FEATURES
        and length == _HEADER_WORDS * 4
        and count > entries
    )
