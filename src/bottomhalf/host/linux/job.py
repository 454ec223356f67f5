# SPDX-License-Identifier: Apache-2.0
"""A request on its way through an engine.

A caller of an engine wants one answer per request: all of the bytes, or an errno. The kernel gives less: reads end
early at the end of what is cached, writes end early when the disk fills up, either may say EINTR or EAGAIN. So
all engines share ``Job.step``: given what the kernel said to a part of a request, it says whether the request is
done or how to go on. The rules are QEMU's: a read beyond the end of the file yields zero bytes, a write that makes
no progress is ENOSPC.

There is more than one way to make a range read as zeroes, and file systems and devices know some of them. So a job
climbs down a ladder: on each rung stand the modes of fallocate(2) that do it together, the best rung first.

=====================  ==============================================================================================
zeroes in a file       ZERO_RANGE; or a hole, and then allocate it
zeroes that may unmap  a hole; or as above
discard in a file      a hole
zeroes on a device     BLKZEROOUT, unless no zero bytes may be written (``NO_FALLBACK``)
with leave to unmap    fallocate's hole, which devices refuse that cannot; or as above
discard on a device    BLKDISCARD
=====================  ==============================================================================================

Below the last rung is ENOTSUP, and the block layer writes zero bytes.

Durable (FUA) is: a write with RWF_DSYNC, or where that is refused, and for zeroes and discards always, the operation
and then a flush. So ``Job.op`` is what is to be done next, and need not be the op of the request.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from bottomhalf.host.linux.bounce import POOL
from bottomhalf.host.linux.memory import LinuxArena
from bottomhalf.host.linux.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, address_of
from bottomhalf.host.protocol import File
from bottomhalf.host.request import (
    COPY_RANGE,
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)

OPERATION_BYTES_MAX: Final = 0x7FFFF000  # what one read or write moves at most (Linux)

# Modes beside those of fallocate(2): ioctls of block devices.
BLOCK_DISCARD: Final = -1
BLOCK_ZERO_OUT: Final = -2
NO_MODE: Final = -3  # there is none: refused

_PUNCH: Final = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
_ALLOCATE: Final = 0
_ZERO_RUNGS: Final = ((FALLOC_ZERO_RANGE,), (_PUNCH, _ALLOCATE))
_RETRY: Final = (-errno.EINTR, -errno.EAGAIN)
_NO_DSYNC: Final = (-errno.EOPNOTSUPP, -errno.EINVAL)
_NO_SUCH_MODE: Final = (-errno.EOPNOTSUPP, -errno.EINVAL, -errno.ENODEV, -errno.ENOSYS, -errno.ENOTTY)
_NO_COPY: Final = (*_NO_SUCH_MODE, -errno.EXDEV, -errno.ETXTBSY)

_abandoned: Final[list[Job]] = []


class Job:
    """A request on its way through an engine: with whose descriptor, and its bounce buffer if it needs one."""

    __slots__ = (
        *("_arena", "_modes", "_rungs", "address", "buffer", "durable", "fd", "file"),
        *("mode", "op", "request", "rw_flags"),
    )

    def __init__(self, file: File, request: Request) -> None:
        self.file = file
        self.fd = file.fileno()
        self.request = request
        self.buffer = request.buffer
        self._arena: LinuxArena | None = None  # a bounce buffer
        self.op = request.op  # what is to be done next
        self.mode = 0  # of fallocate, or BLOCK_*
        self.rw_flags = 0  # of a write
        self.durable = True  # whether what is done needs no flush afterwards
        request.done = 0
        if request.op <= WRITE:
            if request.op == WRITE and request.flags & FUA:
                self.rw_flags = os.RWF_DSYNC
            # Found out here, the address is not left in the request: the next buffer lies elsewhere.
            self.address = request.address
            if not self.address and request.length and not request.buffer.readonly:
                self.address = address_of(request.buffer)
            if not self.address or self.address % file.memory_alignment:
                self._use_bounce(request)
        elif request.op != FLUSH:
            self.durable = not request.flags & FUA
            if request.op <= WRITE_ZEROES:
                self._rungs = _ladder(request, file.is_device)
                self.mode, *self._modes = self._rungs[0]

    def _use_bounce(self, request: Request) -> None:
        self._arena = arena = POOL.take(request.length)
        self.buffer = arena.view[: request.length]
        self.address = arena.address
        if request.op == WRITE:
            self.buffer[:] = request.buffer

    def part(self) -> tuple[int, int, int]:
        """What of a read or write is to be moved next: offset in the file, address, bytes."""
        request = self.request
        done = request.done
        return request.offset + done, self.address + done, min(request.length - done, OPERATION_BYTES_MAX)

    def step(self, result: int) -> bool:
        """Take the kernel's answer to the part from ``request.done`` on; True when the request is finished."""
        try:
            finished = self._step(result)
        except Exception as failure:  # its file or its buffer was closed: it alone suffers
            self.request.result = -(getattr(failure, "errno", None) or errno.EIO)
            finished = True
        if finished and self._arena is not None:
            self.buffer.release()
            POOL.give(self._arena)
        return finished

    def abandon(self) -> Request:
        """Nobody will tell how it ended: it fails with EIO. The kernel may still have its memory, so that is kept for
        good."""
        _abandoned.append(self)
        self.request.result = -errno.EIO
        return self.request

    def _step(self, result: int) -> bool:
        request = self.request
        if result < 0:
            return self._failed(result)
        if self.op > WRITE and self.op != COPY_RANGE:
            return self._succeeded()
        request.done += result
        if request.done == request.length:
            return self._succeeded()
        if self.op == COPY_RANGE:
            if result == 0:  # the source has ended, or cannot be copied from so
                request.result = -errno.ENOTSUP
                return True
            return False
        if self.op == WRITE:
            if result == 0:
                request.result = -errno.ENOSPC
                return True
            return False
        if result == 0 or request.offset + request.done >= self.file.size():
            self.buffer[request.done :] = bytes(request.length - request.done)
            return self._succeeded()
        return False

    def _succeeded(self) -> bool:
        if self.op in (DISCARD, WRITE_ZEROES) and self._modes:
            self.mode = self._modes.pop(0)
            return False
        if not self.durable:
            self.op, self.durable = FLUSH, True
            return False
        if self._arena is not None and self.op == READ:
            self.request.buffer[:] = self.buffer
        self.request.result = 0
        return True

    def _failed(self, result: int) -> bool:
        if result in _RETRY:
            return False
        if self.rw_flags and result in _NO_DSYNC:
            self.rw_flags, self.durable = 0, False
            return False
        if self.op in (DISCARD, WRITE_ZEROES) and result in _NO_SUCH_MODE:
            self._rungs = self._rungs[1:]
            if self._rungs:
                self.mode, *self._modes = self._rungs[0]
                return False
            result = -errno.ENOTSUP
        elif self.op == COPY_RANGE and result in _NO_COPY:
            result = -errno.ENOTSUP
        self.request.result = result
        return True


def _ladder(request: Request, is_device: bool) -> tuple[tuple[int, ...], ...]:
    """The ways to do it, see the module."""
    unmap = bool(request.flags & MAY_UNMAP)
    if is_device:
        if request.op == DISCARD:
            return ((BLOCK_DISCARD,),)
        hole = ((_PUNCH,),) if unmap else ()
        return (*hole, (NO_MODE,)) if request.flags & NO_FALLBACK else (*hole, (BLOCK_ZERO_OUT,))
    hole = ((_PUNCH,),) if unmap or request.op == DISCARD else ()
    return hole if request.op == DISCARD else (*hole, *_ZERO_RUNGS)
