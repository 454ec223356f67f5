# SPDX-License-Identifier: Apache-2.0
"""The engine on io_uring: reads, writes, flushes and fallocate in the ring, the rest on worker threads.

Nearly all requests are reads and writes of a buffer that the device can reach, and nearly all of them come back whole.
Those are prepared and finished a list at a time, in loops that call nothing but ``struct``: their slot holds the
request itself. All others, and those that come back short or refused, get a ``Job``, which knows how to go on.

Truncating, copying, asking for holes, and the ioctls of block devices are not in the ring, or only in that of the
newest kernels. Worker threads do them, and announce what is finished on the ring's own eventfd.

A ring can be lost: somebody closes its descriptor, or the kernel says that it dropped completions. Nobody will tell
then how the requests in flight ended. They fail with EIO, and enter() says why from then on.
"""

from __future__ import annotations

import errno
import os
from collections import deque

from bottomhalf.host.linux.job import OPERATION_BYTES_MAX, Job
from bottomhalf.host.linux.ring import (
    ENTRY_SIZE,
    FSYNC_DATASYNC,
    OP_FALLOCATE,
    OP_FSYNC,
    OP_READ,
    OP_WRITE,
    TRANSFER,
    Ring,
)
from bottomhalf.host.linux.workers import Workers
from bottomhalf.host.protocol import File
from bottomhalf.host.request import FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Request, prepare_each


class RingEngine:
    """host.protocol.Engine on io_uring."""

    name = "io_uring"

    def __init__(self) -> None:
        self._ring = ring = Ring()
        self._whole: list[Request | None] = [None] * ring.entries  # transfers without a job
        self._files: list[File | None] = [None] * ring.entries  # theirs
        self._jobs: list[Job | None] = [None] * ring.entries
        self._free = list(range(ring.entries))
        self._waiting: deque[Job] = deque()
        self._workers: Workers | None = None  # made when the first job is for them
        self._for_workers: list[Job] = []
        self._with_workers = 0  # jobs that they have, or have finished
        self._lost = ""  # why the ring cannot be used any more
        self.in_flight = 0

    def fileno(self) -> int:
        return self._ring.fileno()

    @property
    def pending(self) -> bool:
        """Whether reap() would return something, or has to be called because the kernel refuses to take anything
        and so will not announce anything either; costs no system call."""
        ring = self._ring
        if self._workers is not None and self._workers.finished:
            return True
        if self._lost:
            return self.in_flight > self._with_workers
        return ring.pending or 0 < ring.unsubmitted == self.in_flight - self._with_workers - len(self._waiting)

    def prepare(self, file: File, request: Request) -> None:
        job = Job(file, request)
        self.in_flight += 1
        if _is_for_workers(job):
            self._give_to_workers(job)
        elif self._free:
            self._push(job)
        else:
            self._waiting.append(job)

    def prepare_batch(self, file: File, requests: list[Request]) -> list[Request]:
        """prepare() for a list of requests of one op; those that there is no memory for, with their result."""
        op, free, count = requests[0].op, self._free, len(requests)
        if op > WRITE or count > len(free) or (op == WRITE and any(request.flags & FUA for request in requests)):
            return prepare_each(self, file, requests)
        head = (OP_READ if op == READ else OP_WRITE) | (file.fileno() & 0xFFFFFFFF) << 32  # no flags, no priority
        misaligned = file.memory_alignment - 1
        slots = free[-count:]
        special: list[Request] = []
        sqes, whole, files, pack_into = self._ring.sqes, self._whole, self._files, TRANSFER.pack_into
        for slot, request in zip(slots, requests, strict=True):
            address, length = request.address, request.length
            if not address or address & misaligned or length > OPERATION_BYTES_MAX:
                special.append(request)
                continue
            pack_into(sqes, slot * ENTRY_SIZE, head, request.offset, address, length)
            whole[slot] = request
            files[slot] = file
        if special:
            unused = [slot for slot in slots if whole[slot] is None]
            slots = [slot for slot in slots if whole[slot] is not None]
            free[-count:] = unused
        else:
            del free[-count:]
        self._ring.push_filled(slots)
        self.in_flight += len(slots)
        return prepare_each(self, file, special)

    def _give_to_workers(self, job: Job) -> None:
        self._with_workers += 1
        self._for_workers.append(job)

    def _push(self, job: Job) -> None:
        slot = self._free.pop()
        self._jobs[slot] = job
        self._fill(slot, job)

    def _fill(self, slot: int, job: Job) -> None:
        request, push = job.request, self._ring.push
        op = job.op
        if op <= WRITE:
            push(slot, OP_READ if op == READ else OP_WRITE, job.fd, *job.part(), job.rw_flags)
        elif op == FLUSH:
            push(slot, OP_FSYNC, job.fd, 0, 0, 0, FSYNC_DATASYNC)
        else:  # fallocate: the address field carries the length, the length field the mode
            push(slot, OP_FALLOCATE, job.fd, request.offset, request.length, job.mode, 0)

    def _start_workers(self) -> None:
        if os.getpid() != self._ring.pid:
            raise RuntimeError("this engine's threads are in another process; make engines after fork")
        if self._workers is None:
            self._workers = Workers(self._ring.set_event)
        jobs, self._for_workers = self._for_workers, []
        self._workers.put(jobs)

    def enter(self) -> None:
        if self._for_workers:
            self._start_workers()
        if self._ring.unsubmitted and not self._enter_ring():
            raise RuntimeError(self._lost)

    def _enter_ring(self, wait_for: int = 0) -> bool:
        """Submit and collect; False if the ring is lost."""
        if not self._lost:
            try:
                self._ring.enter(wait_for)
            except OSError as failure:
                self._lost = f"this engine's io_uring cannot be used any more: {failure.strerror}"
                if failure.errno in (errno.EBADF, errno.EOPNOTSUPP):
                    self._lost += " (somebody has closed its descriptor)"
                    self._ring.disown()
        return not self._lost

    def reap(self) -> list[Request]:
        ring, whole, free = self._ring, self._whole, self._free
        finished: list[Request] = []
        ring.clear_event()
        if self._workers is not None and self._workers.finished:
            finished = self._workers.take()
            self._with_workers -= len(finished)
        while not self._lost and (not ring.needs_entering or self._enter_ring()):
            slots, results = ring.completions()
            requests = [whole[slot] for slot in slots]
            for request, result in zip(requests, results, strict=True):
                if request is None or request.length != result:
                    finished += self._take_singly(slots, results)
                    break
                request.result = 0
            else:
                finished += requests  # type: ignore[arg-type]  # none of them is None
                free += slots
                for slot in slots:
                    whole[slot] = None
            while self._waiting and free:
                self._push(self._waiting.popleft())
            if not slots or not ring.needs_entering:
                break  # the kernel takes no more just now, or has posted all (it posts some twenty at a time)
        else:
            finished += self._fail_all()
        if self._for_workers:  # what the ring has begun, and they go on with
            self._start_workers()
        self.in_flight -= len(finished)
        return finished

    def _take_singly(self, slots: list[int], results: list[int]) -> list[Request]:
        """Requests that are finished among completions that are not all whole transfers."""
        whole, files, jobs = self._whole, self._files, self._jobs
        finished = []
        for slot, result in zip(slots, results, strict=True):
            request = whole[slot]
            if request is not None:
                whole[slot] = None
                if request.length == result:
                    request.result = 0
                    finished.append(request)
                    self._free.append(slot)
                    continue
                file = files[slot]
                assert file is not None
                jobs[slot] = Job(file, request)
            job = jobs[slot]
            assert job is not None, "the kernel completed an entry twice"
            if job.step(result):
                finished.append(job.request)
                jobs[slot] = None
                self._free.append(slot)
            elif _is_for_workers(job):
                jobs[slot] = None
                self._free.append(slot)
                self._give_to_workers(job)
            else:
                self._fill(slot, job)
        return finished

    def _fail_all(self) -> list[Request]:
        """Nobody will tell how these ended."""
        entries = range(len(self._jobs))
        whole = [request for request in self._whole if request is not None]
        for request in whole:
            request.result = -errno.EIO
        jobs = [job for job in (*self._jobs, *self._waiting) if job is not None]
        self._whole, self._jobs, self._free = [None for _ in entries], [None for _ in entries], list(entries)
        self._waiting.clear()
        return [*whole, *(job.abandon() for job in jobs)]

    def close(self) -> None:
        if os.getpid() == self._ring.pid:
            if self._for_workers:
                self._start_workers()
            while self.in_flight > self._with_workers:
                self._enter_ring(wait_for=1)
                self.reap()
            if self._workers is not None:
                self._workers.stop()
                self.reap()
        self._ring.close()


def _is_for_workers(job: Job) -> bool:
    """What the ring cannot do."""
    return job.op > WRITE_ZEROES or job.mode < 0
