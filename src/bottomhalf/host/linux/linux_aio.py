# SPDX-License-Identifier: Apache-2.0
"""The engine on linux-aio (``aio=native``), for O_DIRECT where io_uring is refused or not wanted.

linux-aio reads, writes and, since Linux 4.18, syncs. It has no fallocate; some file systems have no sync in it; and it
may have no memory for a request while none is in flight whose end could tell when there is. All of that goes to
worker threads, which announce what they finish on the same eventfd. So nothing waits for a wake-up that may not come.
Should the kernel disown the context, what is in flight there fails with EIO, and the threads do the rest.

Without O_DIRECT io_submit(2) does the work itself before it returns. It is right then, but waits.
"""

from __future__ import annotations

import errno
import os
import select
from collections import deque

from bottomhalf.host.linux.aio_ring import (
    BLOCK,
    BLOCK_SIZE,
    CMD_FDSYNC,
    CMD_PREAD,
    CMD_PWRITE,
    FLAG_RESFD,
    AioRing,
)
from bottomhalf.host.linux.event import LinuxEvent
from bottomhalf.host.linux.job import OPERATION_BYTES_MAX, Job
from bottomhalf.host.linux.workers import Workers
from bottomhalf.host.protocol import File
from bottomhalf.host.request import FLUSH, FUA, READ, WRITE, Request, prepare_each


class LinuxAioEngine:
    """host.protocol.Engine on linux-aio."""

    name = "linux-aio"

    def __init__(self) -> None:
        """OSError: EAGAIN (aio-max-nr is used up), ENOSYS or EPERM (not there, not allowed), ENOMEM, EMFILE."""
        self._event = LinuxEvent()
        try:
            self._ring = AioRing(self._event.fileno())
        except BaseException:
            self._event.close()
            raise
        self._workers = Workers(self._event.set)
        self._for_workers: list[Job] = []
        self._whole: list[Request | None] = [None] * self._ring.entries  # transfers without a job
        self._files: list[File | None] = [None] * self._ring.entries  # theirs
        self._jobs: list[Job | None] = [None] * self._ring.entries
        self._free = list(range(self._ring.entries))
        self._waiting: deque[Job] = deque()
        self._has_fdsync = True
        self._lost = False
        self._pid = os.getpid()
        self.in_flight = 0

    def fileno(self) -> int:
        return self._event.fileno()

    @property
    def pending(self) -> bool:
        return bool(self._workers.finished) or self._ring.pending

    def prepare(self, file: File, request: Request) -> None:
        job = Job(file, request)
        self.in_flight += 1
        self._queue(job)

    def prepare_batch(self, file: File, requests: list[Request]) -> list[Request]:
        """prepare() for a list of requests of one op; those that there is no memory for, with their result. Reads and
        writes of buffers that the device can reach get no ``Job`` as long as they come back whole."""
        op, free, count = requests[0].op, self._free, len(requests)
        durable = op == WRITE and any(request.flags & FUA for request in requests)
        if op > WRITE or durable or count > len(free) or self._lost:
            return prepare_each(self, file, requests)
        ring, whole, files, misaligned = self._ring, self._whole, self._files, file.memory_alignment - 1
        blocks, eventfd, pack_into = ring.blocks, ring.eventfd, BLOCK.pack_into
        command, fd = CMD_PREAD if op == READ else CMD_PWRITE, file.fileno() & 0xFFFFFFFF
        slots: list[int] = []
        special: list[Request] = []
        for request in requests:
            address, length = request.address, request.length
            if not address or address & misaligned or length > OPERATION_BYTES_MAX:
                special.append(request)
                continue
            slot = free.pop()
            at, offset = slot * BLOCK_SIZE, request.offset
            pack_into(blocks, at, slot, 0, 0, command, 0, fd, address, length, offset, 0, FLAG_RESFD, eventfd)
            whole[slot] = request
            files[slot] = file
            slots.append(slot)
        ring.push_filled(slots)
        self.in_flight += len(slots)
        return prepare_each(self, file, special) if special else []

    def _queue(self, job: Job) -> None:
        op = job.op
        if op > FLUSH or (op == FLUSH and not self._has_fdsync) or self._lost:
            self._for_workers.append(job)
        elif self._free:
            slot = self._free.pop()
            self._jobs[slot] = job
            self._fill(slot, job)
        else:
            self._waiting.append(job)

    def _fill(self, slot: int, job: Job) -> None:
        op = job.op
        if op <= WRITE:
            self._ring.push(slot, CMD_PREAD if op == READ else CMD_PWRITE, job.fd, *job.part(), job.rw_flags)
        else:
            self._ring.push(slot, CMD_FDSYNC, job.fd, 0, 0, 0, 0)

    def enter(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("this engine's AIO context is another process's; make engines after fork")
        ring = self._ring
        if ring.unsubmitted:
            ring.enter()
            if ring.unsubmitted and not ring.in_kernel:
                for slot in ring.take_back():
                    self._for_workers.append(self._release(slot))
        if self._for_workers:
            jobs, self._for_workers = self._for_workers, []
            self._workers.put(jobs)

    def _job(self, slot: int) -> Job | None:
        """The job in a slot; what has none yet gets one."""
        request = self._whole[slot]
        if request is not None:
            file = self._files[slot]
            assert file is not None
            self._whole[slot] = None
            self._jobs[slot] = Job(file, request)
        return self._jobs[slot]

    def _release(self, slot: int) -> Job:
        job = self._job(slot)
        assert job is not None, "the kernel completed a request twice"
        self._jobs[slot] = None
        self._free.append(slot)
        return job

    def reap(self) -> list[Request]:
        ring, whole, waiting, free = self._ring, self._whole, self._waiting, self._free
        finished: list[Request] = []
        self._event.clear()
        while True:
            self.enter()
            slots, results = self._completions(finished)
            for slot, result in zip(slots, results, strict=True):
                request = whole[slot]
                if request is not None and request.length == result:
                    request.result = 0
                    finished.append(request)
                    whole[slot] = None
                    free.append(slot)
                    continue
                job = self._job(slot)
                assert job is not None, "the kernel completed a request twice"
                if job.op == FLUSH and result == -errno.EINVAL:
                    self._has_fdsync = False
                    self._for_workers.append(self._release(slot))
                elif job.step(result):
                    finished.append(job.request)
                    self._release(slot)
                else:
                    self._fill(slot, job)
            while waiting and free:
                self._queue(waiting.popleft())
            if not self._for_workers and (not ring.unsubmitted or not slots):
                break  # nothing to go on with, or what is in flight will tell when there is room
        finished += self._workers.take()
        self.in_flight -= len(finished)
        return finished

    def _completions(self, finished: list[Request]) -> tuple[list[int], list[int]]:
        if not self._lost:
            try:
                return self._ring.completions()
            except OSError:
                self._fail_all(finished)
        return [], []

    def _fail_all(self, finished: list[Request]) -> None:
        """The kernel does not know the context any more, and nobody will tell how what was in flight there ended."""
        self._lost = True
        for slot in self._ring.take_back():
            self._for_workers.append(self._release(slot))
        for slot in range(len(self._jobs)):
            job = self._job(slot)
            if job is not None:
                self._release(slot)
                finished.append(job.abandon())

    def close(self) -> None:
        if os.getpid() != self._pid:
            self._ring.forget()
        else:
            poll = select.poll()
            poll.register(self._event.fileno(), select.POLLIN)
            self.enter()
            while self.in_flight:
                if not self.pending:
                    poll.poll()
                self.reap()
            self._workers.stop()
            self._ring.close()
        self._event.close()
