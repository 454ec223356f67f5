# SPDX-License-Identifier: Apache-2.0
"""Open files of the simulated host.

A program sees three kinds of read: of bytes that are in memory (at once), of bytes that are not (after a
wait), and of nothing beyond the end (zeroes). Which kind a request is changes between one call and the next
as the kernel evicts pages. Therefore a file whose ``cached`` is "random" changes its mind by the seed, so
that both ways through the code above are taken in every test.

Requests of every op end in ``SimFile.perform``, from here for what is served in place and from the engine for
the rest.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from bottomhalf.host.protocol import DATA, ZERO, DeviceLimits, DeviceReadOnly
from bottomhalf.host.request import (
    BLOCK_STATUS,
    COPY_RANGE,
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    READ,
    TRUNCATE,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bottomhalf.host.sim.disk import Inode
from bottomhalf.host.sim.faults import OPEN, Faults, Latency
from bottomhalf.host.sim.locks import Opener
from bottomhalf.host.sim.world import Descriptor, World, failure

if TYPE_CHECKING:
    from bottomhalf.host.protocol import File

DIRECT_ALIGNMENT = 512
OWN_NAME = "this process"
OWN_PID = 1000


def check_access(inode: Inode, read_only: bool) -> None:
    """OSError if the file may not be opened so."""
    if not inode.readable or not (read_only or inode.writable):
        if inode.device is not None and inode.readable:
            raise DeviceReadOnly(errno.EACCES, os.strerror(errno.EACCES), inode.path)
        raise failure(errno.EACCES, inode.path)


class SimFile(Descriptor):
    """A host.protocol.File."""

    pollable = False  # as epoll answers for a regular file: EPERM

    def __init__(
        self,
        world: World,
        faults: Faults,
        latency: Latency,
        inode: Inode,
        read_only: bool,
        direct: bool,
        locking: str,
    ) -> None:
        super().__init__(world)
        self.latency = latency
        self.inode = inode
        self.faults = faults
        self.path = inode.path
        self.read_only = read_only
        self.direct = direct
        block = DIRECT_ALIGNMENT if inode.device is None else inode.device.logical_block
        self.alignment = block if direct else 1
        self.memory_alignment = block if direct else 1
        self.is_device = inode.device is not None
        self.status_waits = inode.status_waits
        self._opener = Opener(OWN_NAME, OWN_PID, is_own=True) if locking != "off" else None

    def size(self) -> int:
        self.check_open()
        return self.inode.current.size

    def allocated_size(self) -> int:
        self.check_open()
        return len(self.inode.current.pages) * 4096

    def read_inline(self, requests: list[Request]) -> list[Request]:
        self.check_open()
        slow: list[Request] = []
        for request in requests:
            if self.direct or not self.inode.in_memory(request.offset, request.length):
                slow.append(request)
            else:
                self._serve(request, slow)
        return slow

    def write_inline(self, requests: list[Request]) -> list[Request]:
        self.check_open()
        cached, world = self.inode.cached, self.world
        slow: list[Request] = []
        for request in requests:
            refused = self.direct or cached == "never" or request.flags & FUA
            if not refused and cached == "random":
                refused = world.disk.random() < world.odds.refuse_inline_write
            if refused:
                slow.append(request)
            else:
                self._serve(request, slow)
        return slow

    def _serve(self, request: Request, slow: list[Request]) -> None:
        """Serve it in place unless a fault makes it wait or the disk fills up: the engine finds that out."""
        fault = self.faults.peek(self.path, request.op, request.offset, request.length)
        if fault is not None and fault.waits:
            slow.append(request)
            return
        fault = self.faults.strike(self.path, request.op, request.offset, request.length)
        result = self.perform(request, fault.errno if fault else 0, 0)
        self.world.note("inline", self.path, request.op, request.offset, request.length, result)
        request.result = result

    def is_cached(self, offset: int, length: int) -> bool:
        self.check_open()
        return not self.direct and self.inode.in_memory(offset, length)

    def pread(self, length: int, offset: int) -> bytes:
        """Waits in place: virtual time passes in this call unless the bytes are in memory."""
        self.check_open()
        length = max(0, min(length, self.inode.current.size - offset))
        self.read_in_place(offset, length)
        return self.inode.current.read(offset, length)

    def read_in_place(self, offset: int, length: int) -> None:
        """What a system call does that needs these bytes: wait for the disk, or fail."""
        fault = self.faults.strike(self.path, READ, offset, length)
        if fault is not None and fault.errno:
            raise failure(fault.errno, self.path)
        if fault is not None or not self.is_cached(offset, length):
            self.world.block(self.latency.draw(self.world, READ) + (fault.delay_ns if fault else 0))
        self.inode.touch(offset, length)

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        request = Request(READ, offset, length, memoryview(bytearray(length)))
        if offset + length > self.size() or self.read_inline([request]):
            return None
        if request.result:
            raise failure(-request.result, self.path)
        return bytes(request.buffer)

    def map_reads(self, requests: list[Request], offsets: list[int]) -> bool:
        """Never: here every read is a decision of the simulated page cache."""
        return False

    def prefetch(self, offset: int, length: int) -> None:
        """The pages come into memory some time later; with cached="random" perhaps, or not for long."""
        self.check_open()
        length = max(0, min(length, self.inode.current.size - offset))
        if length and not self.direct and self.inode.cached in ("random", "explicit"):
            delay_ns = self.latency.draw(self.world, READ)
            self.world.at(delay_ns, lambda: self.inode.touch(offset, length), any_order=True)

    def block_status(self, offset: int, length: int) -> tuple[int, int]:
        self.check_open()
        if self.is_device:
            return DATA, length
        is_data, count = self.inode.current.extent(offset, length)
        return (DATA if is_data else ZERO), count

    def device_limits(self) -> DeviceLimits | None:
        return self.inode.device

    def set_read_only(self, read_only: bool) -> None:
        self.check_open()
        if read_only == self.read_only:
            return
        fault = self.faults.strike(self.path, OPEN)
        if fault is not None and fault.errno:
            raise failure(fault.errno, self.path)
        check_access(self.inode, read_only)
        self.world.note("reopen", self.path, read_only)
        self.read_only = read_only

    def truncate(self, size: int) -> None:
        self.check_open()
        if self.read_only or size < 0 or self.is_device:
            raise failure(errno.EINVAL)
        fault = self.faults.strike(self.path, TRUNCATE)
        if fault is not None and fault.errno:
            raise failure(fault.errno)
        self.world.note("truncate", self.path, size)
        self.inode.resize(size)

    def set_permissions(self, held: int, shared: int) -> None:
        self.check_open()
        if self._opener is not None:
            self.inode.locks.set(self._opener, held, shared)

    def take_locks(self, file: File) -> None:
        self.check_open()
        assert isinstance(file, SimFile)
        if self._opener is not None and file._opener is not None:
            self.inode.locks.take(self._opener, file._opener)

    def close(self) -> None:
        if not self.closed and self._opener is not None:
            self.inode.locks.remove(self._opener)
        super().close()

    # What a request does

    def perform(self, request: Request, fault_errno: int, mark: int) -> int:
        """Do what the request asks; the result. ``mark`` is where the journal was when a flush began."""
        op, offset, length = request.op, request.offset, request.length
        inode = self.inode
        refusal = self._refuse(request)
        if refusal or fault_errno:
            if fault_errno and not refusal:
                if op == COPY_RANGE:
                    file, start = request.buffer
                    inode.write_badly(offset, file.inode.current.read(start, length))
                elif op == WRITE:
                    inode.write_badly(offset, request.buffer)
                elif op == FLUSH:
                    inode.doom(mark)
            return -(refusal or fault_errno)
        if op == READ:
            inode.current.read_into(offset, memoryview(request.buffer).cast("B"))
            inode.touch(offset, min(length, max(0, inode.current.size - offset)))
            return 0
        durable = bool(request.flags & FUA)
        if op == WRITE:
            return self._write(offset, memoryview(request.buffer).cast("B"), durable)
        if op == FLUSH:
            inode.make_durable(mark)
            return 0
        if op > WRITE_ZEROES:
            return self._run_errand(request)
        if op == DISCARD:
            if not inode.can_discard:
                return -errno.EOPNOTSUPP
            return inode.zero(offset, length, unmap=True, grow=False, durable=durable)
        if inode.can_zero:
            unmap = bool(request.flags & MAY_UNMAP)
            return inode.zero(offset, length, unmap=unmap, grow=True, durable=durable)
        if request.flags & NO_FALLBACK:
            return -errno.EOPNOTSUPP
        return self._write(offset, bytes(length), durable)

    def _write(self, offset: int, data: Any, durable: bool) -> int:
        """A device ends where it ends."""
        room = self.inode.current.size - offset if self.is_device else len(data)
        if len(data) <= room:
            return self.inode.write(offset, data, durable)
        if room > 0:
            self.inode.write(offset, data[:room], durable)
        return -errno.ENOSPC

    def _run_errand(self, request: Request) -> int:
        op, offset, length = request.op, request.offset, request.length
        if op == BLOCK_STATUS:
            request.buffer[:] = self.block_status(offset, length)
            return 0
        if op == COPY_RANGE:
            return self._copy_range(request)
        old, new = self.inode.current.size, offset
        self.world.note("truncate", self.path, new)
        self.inode.resize(new)
        result = 0
        if request.buffer != "off" and new > old:
            if request.buffer == "falloc" and not self.inode.can_zero:
                result = -errno.EOPNOTSUPP
            elif request.buffer == "falloc":
                result = self.inode.zero(old, new - old, unmap=False, grow=False, durable=False)
            else:
                result = self.inode.write(old, bytes(new - old), True)
        if result:
            self.inode.resize(old)
        return result

    def _copy_range(self, request: Request) -> int:
        """What is copied is what is there at one moment."""
        file, start = request.buffer
        length, end = request.length, file.inode.current.size
        near, far = (start, start + length), (request.offset, request.offset + length)
        overlaps = file.inode is self.inode and near[0] < far[1] and far[0] < near[1]
        able = self.inode.can_copy and file.inode.can_copy and not (self.is_device or file.is_device)
        if overlaps or not able or start >= end:
            return -errno.ENOTSUP
        data = file.inode.current.read(start, min(length, end - start))
        result = self.inode.write(request.offset, data, bool(request.flags & FUA))
        return result or (0 if len(data) == length else -errno.ENOTSUP)

    def _refuse(self, request: Request) -> int:
        """The errno with which a kernel refuses the request as such, or 0."""
        if request.offset < 0 or request.length < 0:
            return errno.EINVAL
        if request.op == TRUNCATE:
            return errno.EINVAL if self.read_only or self.is_device else 0
        if request.op == BLOCK_STATUS:
            return 0
        if self.inode.device is not None and request.op in (DISCARD, WRITE_ZEROES):
            block = self.inode.device.logical_block
            if request.offset % block or request.length % block:
                return errno.EOPNOTSUPP  # the ioctl says EINVAL, and there is no other way
        if self.direct and (request.offset % self.alignment or request.length % self.alignment):
            return errno.EINVAL
        if self.read_only and request.op not in (READ, FLUSH):
            return errno.EBADF
        return 0
