# SPDX-License-Identifier: Apache-2.0
"""What an io_uring can do beside transfers: move bytes through a pipe, wait for time, cancel, carry out in a row.

The engine needs none of it: a copy within the kernel is copy_file_range(2) in a worker thread, timers belong to the
loop, and a request to a disk cannot be taken back. Whoever drives a ``Ring`` himself finds them here, each one entry,
and ``bottomhalf doctor`` tries them, because a kernel that has the ring may have been told to refuse some of them.

    ring = Ring(8)
    splice(ring, 0, source, 0, pipe_in, -1, 4096, link=True)      # slot 1 begins when slot 0 is done,
    splice(ring, 1, pipe_out, -1, target, 0, 4096)                # and is cancelled if it falls short
    ring.enter(wait_for=2)
    slots, results = ring.completions()

Results are what the man page io_uring_enter(2) says: bytes, or a negative errno (ETIME for a timeout that expired,
ECANCELED for what was cancelled or stood behind something that failed). An entry that was used here keeps the
descriptor that ``splice`` put behind its first forty bytes; give the slot to no transfer afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
from typing import Final

from bottomhalf.host.linux.ring import ENTRY_SIZE, OP_FSYNC, OP_WRITE, Ring

OP_POLL_ADD: Final = 6
OP_TIMEOUT: Final = 11
OP_ASYNC_CANCEL: Final = 14
OP_LINK_TIMEOUT: Final = 15
OP_SPLICE: Final = 30
LINK: Final = 4  # IOSQE_IO_LINK: what is pushed next begins when this is done, and not at all if it fails

_TIMESPEC: Final = struct.Struct("<qq")
_INPUT_FD: Final = 44  # where an entry has the descriptor that splice reads from
_FLAGS: Final = 1


def link(ring: Ring, slot: int) -> None:
    """What is pushed next begins when the entry just pushed to ``slot`` is done whole."""
    ring.sqes[slot * ENTRY_SIZE + _FLAGS] |= LINK


def splice(
    ring: Ring,
    slot: int,
    source: int,
    source_offset: int,
    target: int,
    target_offset: int,
    length: int,
    *,
    link: bool = False,
) -> None:
    """Move bytes between two descriptors, one of which is a pipe; an offset of -1 is the descriptor's own place, and
    the only one for a pipe."""
    ring.push(slot, OP_SPLICE, target, target_offset & _U64, source_offset & _U64, length, 0)
    struct.pack_into("<i", ring.sqes, slot * ENTRY_SIZE + _INPUT_FD, source)
    if link:
        ring.sqes[slot * ENTRY_SIZE + _FLAGS] |= LINK


def timeout(ring: Ring, slot: int, nanoseconds: int, *, of_link: bool = False) -> ctypes.Array[ctypes.c_char]:
    """Complete with -ETIME after a while. ``of_link``: cancel the linked entry before this one if it takes longer.
    The memory that is returned has to live until the entry is submitted."""
    if nanoseconds < 0:
        raise ValueError(f"a timeout of {nanoseconds} ns")
    memory = ctypes.create_string_buffer(_TIMESPEC.pack(*divmod(nanoseconds, 1_000_000_000)), _TIMESPEC.size)
    ring.push(slot, OP_LINK_TIMEOUT if of_link else OP_TIMEOUT, -1, 0, ctypes.addressof(memory), 1, 0)
    return memory


def poll(ring: Ring, slot: int, fd: int, mask: int, *, link: bool = False) -> None:
    """Complete with a mask when a descriptor is ready for something of ``mask`` (poll(2)), once."""
    ring.push(slot, OP_POLL_ADD, fd, 0, 0, 0, mask)
    if link:
        ring.sqes[slot * ENTRY_SIZE + _FLAGS] |= LINK


def cancel(ring: Ring, slot: int, victim: int) -> None:
    """Take back what was submitted in another slot: 0, -ENOENT if it is done, -EALREADY if it cannot be any more."""
    ring.push(slot, OP_ASYNC_CANCEL, -1, 0, victim, 0, 0)


_U64: Final = (1 << 64) - 1


def refused() -> list[str]:
    """The operations that this kernel does not let us have, each tried. OSError if there is no ring at all."""
    ring = Ring(8)
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return [name for name, works in _TRIALS.items() if not works(ring, reader, writer)]
    finally:
        ring.close()
        os.close(reader)
        os.close(writer)


def _collect(ring: Ring, count: int) -> dict[int, int]:
    """The results of so many entries, by slot."""
    results: dict[int, int] = {}
    while len(results) < count:
        ring.enter(wait_for=1)
        results |= dict(zip(*ring.completions(), strict=True))
    return results


def _splices(ring: Ring, reader: int, writer: int) -> bool:
    source = os.memfd_create("bottomhalf", os.MFD_CLOEXEC)
    try:
        os.pwrite(source, b"splice", 0)
        splice(ring, 7, source, 0, writer, -1, 6)
        return _collect(ring, 1) == {7: 6} and os.read(reader, 6) == b"splice"
    finally:
        os.close(source)


def _times_out(ring: Ring, reader: int, writer: int) -> bool:
    held = timeout(ring, 0, 1)
    return _collect(ring, 1) == {0: -errno.ETIME} and bool(held)


def _cancels(ring: Ring, reader: int, writer: int) -> bool:
    poll(ring, 0, reader, select.POLLIN)
    cancel(ring, 1, 0)
    results = _collect(ring, 1)
    if results.get(1, 0) < 0:
        os.write(writer, b"x")  # the poll ends, one way or the other
    if len(results) < 2:
        results |= _collect(ring, 1)
    return results == {0: -errno.ECANCELED, 1: 0}


def _links(ring: Ring, reader: int, writer: int) -> bool:
    """Two in a row, and one behind another that fails."""
    file = os.memfd_create("bottomhalf", os.MFD_CLOEXEC)
    data = ctypes.create_string_buffer(b"link", 4)
    try:
        ring.push(0, OP_WRITE, file, 0, ctypes.addressof(data), 4, 0)
        link(ring, 0)
        ring.push(1, OP_FSYNC, file, 0, 0, 0, 0)
        if _collect(ring, 2) != {0: 4, 1: 0}:
            return False
        ring.push(0, OP_WRITE, reader, 0, ctypes.addressof(data), 4, 0)
        link(ring, 0)
        ring.push(1, OP_FSYNC, file, 0, 0, 0, 0)
        return _collect(ring, 2) == {0: -errno.EBADF, 1: -errno.ECANCELED}
    finally:
        os.close(file)


_TRIALS: Final = {"splice": _splices, "timeout": _times_out, "cancel": _cancels, "linked operations": _links}
NAMES: Final = tuple(_TRIALS)
