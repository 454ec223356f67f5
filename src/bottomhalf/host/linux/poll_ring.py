# SPDX-License-Identifier: Apache-2.0
"""The ring that waits: an io_uring whose entries carry any 64-bit name, and which sleeps with a limit.

The engines' ring keeps an entry for as long as its request is in flight. A poller has thousands of requests in flight,
so here an entry is free again as soon as the kernel has taken it, and the completion carries the name that was given.
The kernel limits a wait itself (IORING_ENTER_EXT_ARG, Linux 5.11), so there are no TIMEOUT entries to take back; a
kernel without it is refused, for the poller needs multishot polls anyway (Linux 5.13). What was pushed and not taken,
because memory was short, stays in the ring and goes with the next enter_named(); the kernel's own head says how much
that is.

What must live here: entries, entering, completions. What they mean is the poller's business.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Final

from bottomhalf.host.linux import syscalls
from bottomhalf.host.linux.ring import (
    _ENTER_GETEVENTS,
    _ENTRY,
    _SETUP_TASKRUN_FLAG,
    _SQ_CQ_OVERFLOW,
    _SQ_TASKRUN,
    ENTRY_SIZE,
    Ring,
)

OP_POLL_ADD: Final = 6
OP_POLL_REMOVE: Final = 7
POLL_ADD_MULTI: Final = 1  # in the length of POLL_ADD; Linux 5.13
CQE_F_MORE: Final = 1 << 1  # this request goes on
NOBODY: Final = 0  # the name of an entry whose completion interests nobody

_NAME: Final = struct.Struct("<Q")  # user_data in an entry
_NAME_OFFSET: Final = 32
WAIT_NS_MAX: Final = 86_400_000_000_000  # per system call: a day
_ENTER_EXT_ARG: Final = 1 << 3
_FEAT_RSRC_TAGS: Final = 1 << 10  # came together with multishot polls (Linux 5.13)

_EXPLAINED: Final = {
    errno.EBADF: "its descriptor was closed by somebody else",
    errno.EOPNOTSUPP: "its descriptor was closed by somebody else, and the number belongs to another file now",
    errno.EEXIST: "only the thread that made it may use it",
}


class PollRing(Ring):
    """One io_uring for waiting. Belongs to the thread that made it."""

    has_event = False

    def _map(self, params: bytes) -> None:
        (features,) = struct.unpack_from("<I", params, 20)
        if not features & _FEAT_RSRC_TAGS:
            raise syscalls.error(errno.ENOSYS)
        super()._map(params)
        (setup_flags,) = struct.unpack_from("<I", params, 8)
        (sq_head,) = struct.unpack_from("<I", params, 40)
        (cqes,) = struct.unpack_from("<I", params, 100)
        self._sq_head_word = sq_head // 4
        self._pairs = memoryview(self._rings)[cqes : cqes + self._cq_entries * 16].cast("Q")
        self._tells_work = bool(setup_flags & _SETUP_TASKRUN_FLAG)
        self._timeout = syscalls.EnterTimeout()

    @property
    def unsubmitted(self) -> int:
        """Pushed entries that the kernel has not taken yet."""
        head: int = self._words[self._sq_head_word]
        return (self._tail - head) & 0xFFFFFFFF

    @property
    def free(self) -> int:
        """Entries that can be pushed."""
        return self.entries - self.unsubmitted

    @property
    def quiet(self) -> bool:
        """Whether enter_named(0) would bring nothing. Never on kernels before 5.19, which do not tell."""
        words = self._words
        return (
            self._tells_work
            and words[self._cq_head_word] == words[self._cq_tail_word]
            and words[self._sq_head_word] == self._tail
            and not words[self._sq_flags_word] & (_SQ_TASKRUN | _SQ_CQ_OVERFLOW)
        )

    def unsubmitted_names(self) -> list[int]:
        """Of the entries that the kernel has not taken yet."""
        first: int = self._words[self._sq_head_word]
        places = [(first + n) & self._sq_mask for n in range(self.unsubmitted)]
        return [_NAME.unpack_from(self.sqes, place * ENTRY_SIZE + _NAME_OFFSET)[0] for place in places]

    def check_process(self) -> None:
        """RuntimeError in a child: the ring goes on working for the parent."""
        if os.getpid() != self.pid:
            raise RuntimeError("this io_uring poller was made by another process; make pollers after fork")

    def push_named(self, name: int, opcode: int, fd: int, address: int, length: int, op_flags: int) -> None:
        """Queue an entry; there is to be a ``free`` one. Its completion will carry ``name``."""
        tail = self._tail
        index = tail & self._sq_mask
        _ENTRY.pack_into(self.sqes, index * ENTRY_SIZE, opcode, 0, 0, fd, 0, address, length, op_flags, name)
        self._words[self._sq_array_word + index] = index
        self._tail = (tail + 1) & 0xFFFFFFFF  # enter_named() shows it to the kernel

    def enter_named(self, timeout_ns: int) -> bool:
        """Submit what was pushed; then return at once (0), with the first completion (-1), or with it or after so
        long. May return early. False if the kernel has no memory for all of it now: the rest stays queued."""
        timeout = self._timeout
        wait_for, flags = 0, _ENTER_GETEVENTS
        if timeout_ns:
            wait_for = 1
            if timeout_ns > 0:
                timeout.set(min(timeout_ns, WAIT_NS_MAX))
                flags |= _ENTER_EXT_ARG
        self._words[self._sq_tail_word] = self._tail
        while True:
            unsubmitted = self.unsubmitted
            if flags & _ENTER_EXT_ARG:
                taken = timeout.enter(self._fd, unsubmitted, wait_for, flags)
            else:
                taken = syscalls.io_uring_enter(self._fd, unsubmitted, wait_for, flags)
            if taken < 0:
                if taken in (-errno.EINTR, -errno.ETIME):
                    return True  # said only when there was nothing to submit
                if taken in (-errno.EAGAIN, -errno.EBUSY, -errno.ENOMEM):
                    return False  # no memory, or completions wait to be reaped
                text = _EXPLAINED.get(-taken, os.strerror(-taken))
                raise OSError(-taken, f"the io_uring of a poller cannot be used any more: {text}")
            if taken >= unsubmitted:
                return True
            if taken == 0:
                return False
            # It stops at an entry that it does not like and has not slept then; the others are innocent.

    def reap(self) -> list[tuple[int, int]]:
        """What is posted, as (name, result in the lower and flags in the upper half). It stays until reaped()."""
        words = self._words
        head, tail = words[self._cq_head_word], words[self._cq_tail_word]
        self._reaped_to = tail
        if head == tail:
            return []
        first, last = 2 * (head & self._cq_mask), 2 * (tail & self._cq_mask)
        pairs = self._pairs
        if first < last:
            values = pairs[first:last].tolist()
        else:
            values = pairs[first:].tolist() + pairs[:last].tolist()
        return list(zip(values[::2], values[1::2], strict=True))

    def reaped(self) -> None:
        """What reap() last returned is dealt with."""
        self._words[self._cq_head_word] = self._reaped_to

    def close(self) -> None:
        if self._fd >= 0:
            self._pairs.release()
        super().close()
