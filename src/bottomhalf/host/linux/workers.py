# SPDX-License-Identifier: Apache-2.0
"""Worker threads that carry requests out with plain system calls.

Whatever the kernel's asynchronous ways cannot do, a thread can: so the thread engine is made of these, and linux-aio
falls back on them. A job that was put in is finished, whatever happens: where no thread can be started, the caller
does it himself.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from bottomhalf.host.linux import device
from bottomhalf.host.linux.job import BLOCK_DISCARD, BLOCK_ZERO_OUT, NO_MODE, Job
from bottomhalf.host.linux.syscalls import fallocate
from bottomhalf.host.request import BLOCK_STATUS, COPY_RANGE, FLUSH, READ, TRUNCATE, WRITE, Request

WORKERS_MAX: Final = 16  # worker threads per engine; more only contend for the GIL
ZEROES_BYTES: Final = 1 << 20  # written at a time where space is taken by writing
COPY_BYTES_MAX: Final = 16 << 20  # copied at a time, as QEMU does: whoever wants the thread waits for so much


class Workers:
    """Threads, made when there is work for one more. ``notify`` is called in a worker when ``finished`` has grown."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._unfinished = 0
        self.threads: list[threading.Thread] = []
        self.finished: deque[Request] = deque()

    def put(self, jobs: list[Job]) -> None:
        """Start them. From the engine's thread."""
        self._unfinished += len(jobs)
        threads = self.threads
        while len(threads) < min(self._unfinished, WORKERS_MAX):
            thread = threading.Thread(target=self._work, name=f"worker-{len(threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads for us
                break
            threads.append(thread)
        for job in jobs:
            if threads:
                self._queue.put(job)
            else:
                self._finish(job)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        while not job.step(carry_out(job)):
            pass
        self.finished.append(job.request)
        self._notify()

    def take(self) -> list[Request]:
        """The finished requests. From the engine's thread."""
        taken = []
        while self.finished:
            taken.append(self.finished.popleft())
        self._unfinished -= len(taken)
        return taken

    def stop(self) -> None:
        """Let them end when all is done, and wait for that."""
        for _ in self.threads:
            self._queue.put(None)
        for thread in self.threads:
            thread.join()
        self.threads.clear()


def carry_out(job: Job) -> int:
    """Do the next part of a request in this thread: a count or a negative errno, as the ring would say."""
    request, op = job.request, job.op
    try:
        if op == READ:
            return os.preadv(job.fd, [job.buffer[request.done :]], request.offset + request.done)
        if op == WRITE:
            return os.pwritev(job.fd, [job.buffer[request.done :]], request.offset + request.done, job.rw_flags)
        if op == FLUSH:
            os.fdatasync(job.fd)
        elif op == COPY_RANGE:
            return _copy_range(job)
        elif op == TRUNCATE:
            _truncate(job.fd, request.offset, request.buffer)
        elif op == BLOCK_STATUS:
            request.buffer[:] = job.file.block_status(request.offset, request.length)
        elif job.mode == BLOCK_DISCARD:
            device.discard(job.fd, request.offset, request.length)
        elif job.mode == BLOCK_ZERO_OUT:
            device.zero_out(job.fd, request.offset, request.length)
        elif job.mode == NO_MODE:
            return -errno.EOPNOTSUPP
        else:
            fallocate(job.fd, job.mode, request.offset, request.length)
        return 0
    except OSError as failure:
        return -(failure.errno or errno.EIO)
    except Exception:
        return -errno.EIO  # a request is answered whatever happens


def _copy_range(job: Job) -> int:
    request = job.request
    file, offset = request.buffer
    done = request.done
    count = min(request.length - done, COPY_BYTES_MAX)
    return os.copy_file_range(file.fileno(), job.fd, count, offset + done, request.offset + done)


def _truncate(fd: int, size: int, preallocation: str) -> None:
    """Give a file another size. A new part is allocated by fallocate(2) ("falloc"), or by writing zero bytes until they
    are on the disk ("full"). If that fails the file has its old size again."""
    old = os.fstat(fd).st_size
    if preallocation == "off" or size <= old:
        os.ftruncate(fd, size)
        return
    try:
        if preallocation == "falloc":
            fallocate(fd, 0, old, size - old)
        else:
            os.ftruncate(fd, size)
            _write_zeroes(fd, old, size)
            os.fsync(fd)
    except BaseException:
        os.ftruncate(fd, old)
        raise


def _write_zeroes(fd: int, offset: int, end: int) -> None:
    zeroes = memoryview(bytes(min(ZEROES_BYTES, end - offset)))
    while offset < end:
        count = os.pwrite(fd, zeroes[: end - offset], offset)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += count
