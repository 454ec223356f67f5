# SPDX-License-Identifier: Apache-2.0
"""io_uring on the standard library: two rings in shared memory and one system call.

The kernel maps a submission ring, an array of 64-byte entries and a completion ring into this process. Filling
them is a few stores through ``memoryview``; starting a batch and collecting what finished is one
io_uring_enter(2), a microsecond through ctypes for any number of requests. With SINGLE_ISSUER and DEFER_TASKRUN
(Linux 6.1) completions are posted only inside our own enter, so plain loads and stores need no barriers and no
interrupt disturbs the loop. Older kernels get the same code without those flags. With DEFER_TASKRUN the ring's own
descriptor does not wake an epoll (seen on 6.18), a registered eventfd does; so there is one, muted while we are
in the kernel ourselves, and afterwards two words of shared memory tell whether something slipped in.

The submission array names entries by slot, so slot i always lives in entry i and equals its ``user_data``: what
completes finds its request by indexing a list. Completions are read in columns (one ``tolist`` for the slots, one
for the results), not entry by entry. So are submissions: half an entry is what differs between two transfers on one
slot, one ``struct`` call fills it, and the array takes the slots of a whole batch in one store.

What must live here: the ring. What a request means is ``engines``' business.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from array import array
from typing import Final

from bottomhalf.host.linux.syscalls import (
    error,
    io_uring_enter,
    io_uring_register_eventfd,
    io_uring_setup,
)

ENTRIES: Final = 256  # requests in flight per ring; more wait in the engine

OP_FSYNC: Final = 3
OP_FALLOCATE: Final = 17
OP_READ: Final = 22
OP_WRITE: Final = 23
FSYNC_DATASYNC: Final = 1

_SETUP_CLAMP: Final = 1 << 4
_SETUP_COOP_TASKRUN: Final = 1 << 8
_SETUP_TASKRUN_FLAG: Final = 1 << 9
_SETUP_SINGLE_ISSUER: Final = 1 << 12
_SETUP_DEFER_TASKRUN: Final = 1 << 13
_ENTER_GETEVENTS: Final = 1
_SQ_CQ_OVERFLOW: Final = 1 << 1  # flags that the kernel shows in the submission ring
_SQ_TASKRUN: Final = 1 << 2
_CQ_EVENTFD_DISABLED: Final = 1  # flag that we show in the completion ring
_FEAT_SINGLE_MMAP: Final = 1
_FEAT_RW_CUR_POS: Final = 1 << 3  # came together with OP_READ and OP_WRITE (Linux 5.6)
_OFF_SQES: Final = 0x10000000
_PARAMS_SIZE: Final = 120

# opcode u8, flags u8, ioprio u16, fd s32, off u64, addr u64, len u32, op_flags u32, user_data u64
_ENTRY: Final = struct.Struct("<BBHiQQIIQ")
ENTRY_SIZE: Final = 64
# The same without user_data, its fields by eight bytes: what differs between two transfers on one slot.
TRANSFER: Final = struct.Struct("<QQQQ")


class Ring:
    """One io_uring. Belongs to the thread that made it."""

    has_event = True  # whether there is a descriptor that completions make readable

    def __init__(self, entries: int = ENTRIES) -> None:
        """OSError: ENOSYS (no such call), EPERM (seccomp, the sysctl kernel.io_uring_disabled), ENOMEM."""
        self._fd, params = _setup(entries)
        self.pid = os.getpid()
        self._eventfd = -1
        try:
            if self.has_event:
                self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                io_uring_register_eventfd(self._fd, self._eventfd)
            self._map(params)
        except BaseException:
            os.close(self._fd)
            if self._eventfd >= 0:
                os.close(self._eventfd)
            raise
        self._unsubmitted = 0
        self._event_set = False  # for certain
        self._closed = False

    def _map(self, params: bytes) -> None:
        sq_entries, cq_entries = struct.unpack_from("<II", params, 0)
        (features,) = struct.unpack_from("<I", params, 20)
        if not (features & _FEAT_SINGLE_MMAP and features & _FEAT_RW_CUR_POS):
            raise error(errno.ENOSYS)  # too old for the operations that we need
        _, sq_tail, sq_mask, _, sq_flags, _, sq_array = struct.unpack_from("<7I", params, 40)
        cq_head, cq_tail, cq_mask, _, _, cqes, cq_flags = struct.unpack_from("<7I", params, 80)
        self.entries: int = sq_entries
        length = max(sq_array + sq_entries * 4, cqes + cq_entries * 16)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._rings = mmap.mmap(self._fd, length, flags=flags, offset=0)
        self.sqes = mmap.mmap(self._fd, sq_entries * ENTRY_SIZE, flags=flags, offset=_OFF_SQES)
        words = memoryview(self._rings)[: length - length % 8].cast("I")
        self._words = words
        self._sq_tail_word = sq_tail // 4
        self._sq_array_word = sq_array // 4
        self._sq_mask: int = words[sq_mask // 4]
        self._cq_head_word = cq_head // 4
        self._cq_tail_word = cq_tail // 4
        self._sq_flags_word = sq_flags // 4
        self._cq_flags_word = cq_flags // 4
        self._cq_mask: int = words[cq_mask // 4]
        self._cq_entries = cq_entries
        self._slots_column = memoryview(self._rings)[cqes : cqes + cq_entries * 16].cast("Q")[::2]
        self._results_column = memoryview(self._rings)[cqes : cqes + cq_entries * 16].cast("i")[2::4]
        self._tail: int = words[self._sq_tail_word]
        self._posted: int = words[self._cq_tail_word]  # when enter() last returned
        for slot in range(sq_entries):
            _ENTRY.pack_into(self.sqes, slot * ENTRY_SIZE, 0, 0, 0, 0, 0, 0, 0, 0, slot)

    def fileno(self) -> int:
        """Readable when something may have finished; clear_event() makes it unreadable."""
        return self._eventfd

    def set_event(self) -> None:
        """Make it readable, for something else that has finished. From any thread."""
        try:
            os.eventfd_write(self._eventfd, 1)
        except BlockingIOError:
            pass  # the counter is full: it is readable already

    def clear_event(self) -> None:
        """Not needed while completions() returns only what was posted inside enter(), for that makes no event."""
        words = self._words
        if words[self._cq_head_word] != self._posted == words[self._cq_tail_word] and not self._event_set:
            return  # an event that came just before an enter(), if any, is cleared when nothing is found
        self._event_set = False
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            pass

    def push(
        self, slot: int, opcode: int, fd: int, offset: int, address: int, length: int, op_flags: int
    ) -> None:
        """Fill entry ``slot`` (free, 0..entries-1) and queue it. It starts with the next enter()."""
        _ENTRY.pack_into(
            self.sqes, slot * ENTRY_SIZE, opcode, 0, 0, fd, offset, address, length, op_flags, slot
        )
        self._words[self._sq_array_word + (self._tail & self._sq_mask)] = slot
        self._tail = (self._tail + 1) & 0xFFFFFFFF
        self._unsubmitted += 1

    def push_filled(self, slots: list[int]) -> None:
        """Queue entries whose beginning stands in ``sqes`` already (see TRANSFER); they start with the next enter()."""
        count, words, first = len(slots), self._words, self._tail & self._sq_mask
        place = self._sq_array_word + first
        room = self._sq_mask + 1 - first
        if count <= room:
            words[place : place + count] = array("I", slots)
        else:
            words[place : place + room] = array("I", slots[:room])
            words[self._sq_array_word : self._sq_array_word + count - room] = array("I", slots[room:])
        self._tail = (self._tail + count) & 0xFFFFFFFF
        self._unsubmitted += count

    def enter(self, wait_for: int = 0) -> None:
        """Submit what was pushed and post what finished. Waits for ``wait_for`` completions. What finishes from
        now on makes fileno() readable; look at ``pending`` for what did before."""
        if os.getpid() != self.pid:
            raise RuntimeError("this ring was made by another process; make engines after fork")
        words = self._words
        words[self._sq_tail_word] = self._tail
        if words[self._sq_flags_word] & _SQ_TASKRUN or words[self._cq_tail_word] != self._posted:
            self._event_set = True  # what that was announced with
        words[self._cq_flags_word] = _CQ_EVENTFD_DISABLED
        try:
            while True:
                taken = io_uring_enter(self._fd, self._unsubmitted, wait_for, _ENTER_GETEVENTS)
                if taken >= 0:
                    self._unsubmitted -= taken
                    if self._unsubmitted and taken:
                        continue  # it stops at an entry that it does not like; the others are innocent
                    return
                if taken == -errno.EINTR:
                    continue
                if taken in (-errno.EAGAIN, -errno.EBUSY, -errno.ENOMEM):
                    return  # out of memory, or completions wait to be reaped: what is left goes with the next
                raise error(-taken)
        finally:
            words[self._cq_flags_word] = 0
            self._posted = words[self._cq_tail_word]

    @property
    def pending(self) -> bool:
        """Whether completions() would return something, or would after another enter()."""
        words = self._words
        if words[self._cq_head_word] != words[self._cq_tail_word]:
            return True
        return bool(words[self._sq_flags_word] & (_SQ_TASKRUN | _SQ_CQ_OVERFLOW))

    @property
    def needs_entering(self) -> bool:
        """Whether completions() may be more after an enter(): there is something to submit, or to be posted."""
        return self._unsubmitted > 0 or bool(self._words[self._sq_flags_word] & (_SQ_TASKRUN | _SQ_CQ_OVERFLOW))

    @property
    def unsubmitted(self) -> int:
        """Pushed entries that the kernel has not taken yet."""
        return self._unsubmitted

    def completions(self) -> tuple[list[int], list[int]]:
        """Slots and results (count or negative errno) of everything that is posted; frees the entries."""
        words = self._words
        head, tail = words[self._cq_head_word], words[self._cq_tail_word]
        if head == tail:
            return [], []
        first, last = head & self._cq_mask, tail & self._cq_mask
        if first < last:
            slots = self._slots_column[first:last].tolist()
            results = self._results_column[first:last].tolist()
        else:
            slots = self._slots_column[first:].tolist() + self._slots_column[:last].tolist()
            results = self._results_column[first:].tolist() + self._results_column[:last].tolist()
        words[self._cq_head_word] = tail
        return slots, results

    def disown(self) -> None:
        """The descriptor is not ours any more: it was closed behind our back, and its number may be another file's."""
        self._fd = -1

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._words.release()
        self._slots_column.release()
        self._results_column.release()
        self._rings.close()  # the mappings hold descriptors of their own
        self.sqes.close()
        for fd in (self._fd, self._eventfd):
            if fd >= 0:
                os.close(fd)
        self._fd = -1


def _setup(entries: int) -> tuple[int, bytes]:
    """Make the ring with the most helpful flags that this kernel knows."""
    best = _SETUP_SINGLE_ISSUER | _SETUP_DEFER_TASKRUN | _SETUP_TASKRUN_FLAG
    for flags in (best, _SETUP_COOP_TASKRUN, 0):
        params = ctypes.create_string_buffer(_PARAMS_SIZE)
        struct.pack_into("<I", params, 8, flags | _SETUP_CLAMP)
        try:
            fd = io_uring_setup(entries, params)
        except OSError as failure:
            if failure.errno != errno.EINVAL or flags == 0:
                raise
        else:
            os.set_inheritable(fd, False)
            return fd, params.raw
    raise AssertionError("unreachable")
