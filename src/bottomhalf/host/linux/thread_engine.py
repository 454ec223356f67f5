# SPDX-License-Identifier: Apache-2.0
"""The engine on worker threads, for kernels and containers that refuse io_uring."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections import deque
from typing import Final

from bottomhalf.host.linux.event import LinuxEvent
from bottomhalf.host.linux.job import Job
from bottomhalf.host.linux.syscalls import fallocate
from bottomhalf.host.protocol import File
from bottomhalf.host.request import FLUSH, FUA, READ, WRITE, Request

WORKERS_MAX: Final = 16  # worker threads per engine; more only contend for the GIL


class ThreadEngine:
    """host.protocol.Engine on worker threads."""

    name = "threads"

    def __init__(self) -> None:
        self._event = LinuxEvent()
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._prepared: list[Job] = []
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
        job = Job(file, request)
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


def _carry_out(job: Job) -> int:
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
