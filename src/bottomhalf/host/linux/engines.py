# SPDX-License-Identifier: Apache-2.0
"""Engines: what carries out the requests that cannot be served where they stand.

A caller of an engine wants one answer per request: all of the bytes, or an errno. The kernel gives less: reads end
early at the end of what is cached, writes end early when the disk fills up, either may say EINTR or EAGAIN. So
both engines share ``Step``: given what the kernel said to a part of a request, it says whether the request is done
or how to go on. The rules are QEMU's: a read beyond the end of the file yields zero bytes, a write that makes no
progress is ENOSPC.

The ring engine does reads, writes, flushes and fallocate in the ring. The thread engine does the same with worker
threads, for kernels and containers that refuse io_uring.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections import deque
from typing import Final

from bottomhalf.host.linux.event import LinuxEvent
from bottomhalf.host.linux.ring import (
    FSYNC_DATASYNC,
    OP_FALLOCATE,
    OP_FSYNC,
    OP_READ,
    OP_WRITE,
    Ring,
)
from bottomhalf.host.linux.syscalls import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    address_of,
    fallocate,
)
from bottomhalf.host.protocol import File
from bottomhalf.host.request import DISCARD, FLUSH, FUA, MAY_UNMAP, READ, WRITE, Request

WORKERS_MAX: Final = 16  # worker threads per engine; more only contend for the GIL
RING_OPERATION_BYTES_MAX: Final = 0x7FFFF000  # what one read or write moves at most (Linux)

_PUNCH: Final = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
_RETRY: Final = (-errno.EINTR, -errno.EAGAIN)
_NO_SUCH_MODE: Final = (-errno.EOPNOTSUPP, -errno.EINVAL, -errno.ENODEV, -errno.ENOSYS)


class _Job:
    """A request on its way through an engine: with whose descriptor, and its bounce buffer if it needs one."""

    __slots__ = ("address", "bounce", "fd", "file", "mode", "request")

    def __init__(self, file: File, request: Request) -> None:
        self.file = file
        self.fd = file.fileno()
        self.request = request
        self.bounce: memoryview | None = None
        self.mode = 0  # of fallocate
        request.done = 0
        if request.op <= WRITE:
            # Found out here, the address is not left in the request: the next buffer lies elsewhere.
            self.address = request.address
            if not self.address and request.length and not request.buffer.readonly:
                self.address = address_of(request.buffer)
            if not self.address or self.address % file.memory_alignment:
                self._use_bounce(request)
        elif request.op == DISCARD or (request.op != FLUSH and request.flags & MAY_UNMAP):
            self.mode = _PUNCH
        else:
            self.mode = FALLOC_ZERO_RANGE

    def _use_bounce(self, request: Request) -> None:
        from bottomhalf.host.linux.memory import LinuxArena

        arena = LinuxArena(max(request.length, 1))
        self.bounce = arena.view[: request.length]
        self.address = arena.address
        if request.op == WRITE:
            self.bounce[:] = request.buffer

    @property
    def buffer(self) -> memoryview:
        return self.bounce if self.bounce is not None else self.request.buffer

    def step(self, result: int) -> bool:
        """Take the kernel's answer to the part from ``request.done`` on; True when the request is finished."""
        try:
            return self._step(result)
        except Exception as failure:  # its file or its buffer was closed: it alone suffers
            self.request.result = -(getattr(failure, "errno", None) or errno.EIO)
            return True

    def _step(self, result: int) -> bool:
        request = self.request
        if result < 0:
            if result in _RETRY:
                return False
            if request.op > FLUSH:
                return self._fallocate_refused(result)
            request.result = result
            return True
        if request.op > WRITE:
            request.result = 0
            return True
        request.done += result
        if request.done == request.length:
            self._succeed()
            return True
        if request.op == WRITE:
            if result == 0:
                request.result = -errno.ENOSPC
                return True
            return False
        if result == 0 or request.offset + request.done >= self.file.size():
            self.buffer[request.done :] = bytes(request.length - request.done)
            self._succeed()
            return True
        return False

    def _succeed(self) -> None:
        if self.bounce is not None and self.request.op == READ:
            self.request.buffer[:] = self.bounce
        self.request.result = 0

    def _fallocate_refused(self, result: int) -> bool:
        """A file system without this mode of fallocate: say ENOTSUP and let the block layer fall back."""
        self.request.result = -errno.ENOTSUP if result in _NO_SUCH_MODE else result
        return True


class RingEngine:
    """host.protocol.Engine on io_uring."""

    name = "io_uring"

    def __init__(self) -> None:
        self._ring = Ring()
        self._jobs: list[_Job | None] = [None] * self._ring.entries
        self._free = list(range(self._ring.entries))
        self._waiting: deque[_Job] = deque()
        self.in_flight = 0

    def fileno(self) -> int:
        return self._ring.fileno()

    @property
    def pending(self) -> bool:
        """Whether reap() would return something, or has to be called because the kernel refuses to take anything
        and so will not announce anything either; costs no system call."""
        ring = self._ring
        return ring.pending or ring.unsubmitted == self.in_flight - len(self._waiting) > 0

    def prepare(self, file: File, request: Request) -> None:
        job = _Job(file, request)
        self.in_flight += 1
        if self._free:
            self._push(job)
        else:
            self._waiting.append(job)

    def _push(self, job: _Job) -> None:
        slot = self._free.pop()
        self._jobs[slot] = job
        self._fill(slot, job)

    def _fill(self, slot: int, job: _Job) -> None:
        request, push = job.request, self._ring.push
        op = request.op
        if op <= WRITE:
            done = request.done
            push(
                slot,
                OP_READ if op == READ else OP_WRITE,
                job.fd,
                request.offset + done,
                job.address + done,
                min(request.length - done, RING_OPERATION_BYTES_MAX),
                os.RWF_DSYNC if op == WRITE and request.flags & FUA else 0,
            )
        elif op == FLUSH:
            push(slot, OP_FSYNC, job.fd, 0, 0, 0, FSYNC_DATASYNC)
        else:  # fallocate: the address field carries the length, the length field the mode
            push(slot, OP_FALLOCATE, job.fd, request.offset, request.length, job.mode, 0)

    def enter(self) -> None:
        if self._ring.unsubmitted:
            self._ring.enter()

    def reap(self) -> list[Request]:
        ring, jobs, free = self._ring, self._jobs, self._free
        finished: list[Request] = []
        ring.clear_event()
        while True:
            ring.enter()
            slots, results = ring.completions()
            for slot, result in zip(slots, results, strict=True):
                job = jobs[slot]
                assert job is not None, "the kernel completed an entry twice"
                if job.step(result):
                    finished.append(job.request)
                    jobs[slot] = None
                    free.append(slot)
                else:
                    self._fill(slot, job)
            while self._waiting and free:
                self._push(self._waiting.popleft())
            if not ring.unsubmitted or not slots:
                break  # nothing to go on with, or the kernel takes no more just now
        self.in_flight -= len(finished)
        return finished

    def close(self) -> None:
        while self.in_flight:
            self._ring.enter(wait_for=1)
            self.reap()
        self._ring.close()


class ThreadEngine:
    """host.protocol.Engine on worker threads."""

    name = "threads"

    def __init__(self) -> None:
        self._event = LinuxEvent()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._prepared: list[_Job] = []
        self._finished: deque[Request] = deque()
        self._threads: list[threading.Thread] = []
        self._pid = os.getpid()
        self.in_flight = 0

    def fileno(self) -> int:
        return self._event.fileno()

    @property
    def pending(self) -> bool:
        return bool(self._finished)

    def prepare(self, file: File, request: Request) -> None:
        job = _Job(file, request)
        self.in_flight += 1
        self._prepared.append(job)

    def enter(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("this engine's threads are in another process; make engines after fork")
        prepared, self._prepared = self._prepared, []
        while len(self._threads) < min(self.in_flight, WORKERS_MAX):
            thread = threading.Thread(target=self._work, name=f"worker-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        for job in prepared:
            self._queue.put(job)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            while not job.step(_carry_out(job)):
                pass
            self._finished.append(job.request)
            self._event.set()

    def reap(self) -> list[Request]:
        self._event.clear()
        finished: list[Request] = []
        while self._finished:
            finished.append(self._finished.popleft())
        self.in_flight -= len(finished)
        return finished

    def close(self) -> None:
        self.enter()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self.reap()
        self._event.close()


def _carry_out(job: _Job) -> int:
    """Do the next part of a request in a worker thread: a count or a negative errno, as the ring would say."""
    request = job.request
    try:
        if request.op == READ:
            return os.preadv(job.fd, [job.buffer[request.done :]], request.offset + request.done)
        if request.op == WRITE:
            flags = os.RWF_DSYNC if request.flags & FUA else 0
            return os.pwritev(job.fd, [job.buffer[request.done :]], request.offset + request.done, flags)
        if request.op == FLUSH:
            os.fdatasync(job.fd)
        else:
            fallocate(job.fd, job.mode, request.offset, request.length)
        return 0
    except OSError as failure:
        return -(failure.errno or errno.EIO)
    except Exception:
        return -errno.EIO  # a request is answered whatever happens
