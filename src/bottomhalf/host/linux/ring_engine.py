# SPDX-License-Identifier: Apache-2.0
"""The engine on io_uring: reads, writes, flushes and fallocate in the ring."""

from __future__ import annotations

from collections import deque

from bottomhalf.host.linux.job import OPERATION_BYTES_MAX, Job
from bottomhalf.host.linux.ring import (
    FSYNC_DATASYNC,
    OP_FALLOCATE,
    OP_FSYNC,
    OP_READ,
    OP_WRITE,
    Ring,
)
from bottomhalf.host.protocol import File
from bottomhalf.host.request import FLUSH, READ, WRITE, Request


class RingEngine:
    """host.protocol.Engine on io_uring."""

    name = "io_uring"

    def __init__(self) -> None:
        self._ring = Ring()
        self._jobs: list[Job | None] = [None] * self._ring.entries
        self._free = list(range(self._ring.entries))
        self._waiting: deque[Job] = deque()
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
        job = Job(file, request)
        self.in_flight += 1
        if self._free:
            self._push(job)
        else:
            self._waiting.append(job)

    def _push(self, job: Job) -> None:
        slot = self._free.pop()
        self._jobs[slot] = job
        self._fill(slot, job)

    def _fill(self, slot: int, job: Job) -> None:
        request, push = job.request, self._ring.push
        op = job.op
        if op <= WRITE:
            done = request.done
            push(
                slot,
                OP_READ if op == READ else OP_WRITE,
                job.fd,
                request.offset + done,
                job.address + done,
                min(request.length - done, OPERATION_BYTES_MAX),
                job.rw_flags,
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
