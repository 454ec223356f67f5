# SPDX-License-Identifier: Apache-2.0
"""The engine on worker threads, for kernels and containers that refuse io_uring."""

from __future__ import annotations

import os

from bottomhalf.host.linux.event import LinuxEvent
from bottomhalf.host.linux.job import Job
from bottomhalf.host.linux.workers import Workers
from bottomhalf.host.protocol import File
from bottomhalf.host.request import Request


class ThreadEngine:
    """host.protocol.Engine on worker threads."""

    name = "threads"

    def __init__(self) -> None:
        self._event = LinuxEvent()
        self._workers = Workers(self._event.set)
        self._prepared: list[Job] = []
        self._pid = os.getpid()
        self.in_flight = 0

    def fileno(self) -> int:
        return self._event.fileno()

    @property
    def pending(self) -> bool:
        return bool(self._workers.finished)

    def prepare(self, file: File, request: Request) -> None:
        job = Job(file, request)
        self.in_flight += 1
        self._prepared.append(job)

    def enter(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("this engine's threads are in another process; make engines after fork")
        prepared, self._prepared = self._prepared, []
        self._workers.put(prepared)

    def reap(self) -> list[Request]:
        self._event.clear()
        finished = self._workers.take()
        self.in_flight -= len(finished)
        return finished

    def close(self) -> None:
        if os.getpid() == self._pid:
            self.enter()
            self._workers.stop()
            self.reap()
        self._event.close()
