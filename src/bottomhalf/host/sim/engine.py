# SPDX-License-Identifier: Apache-2.0
"""Asynchronous file I/O of the simulated host.

A real engine finishes requests late, in any order, one at a time or in a heap, and touches a buffer at any
moment between submission and completion. Code that passes its tests on a quick disk has usually only been
tested with one of these orders. Therefore every request gets a latency from the seed, a request takes effect
at a moment of its own between start and completion, and the buffer of a READ is filled with junk when it
starts, so that whoever looks before completion sees that he did.

    engine.prepare(file, request)
    engine.enter()
    poller.wait(-1)  # virtual time passes
    for request in engine.reap(): ...
"""

from __future__ import annotations

import errno
from collections import deque
from typing import Final

from bottomhalf.host.protocol import IN, File
from bottomhalf.host.request import FLUSH, IN_PROGRESS, READ, WRITE, Request
from bottomhalf.host.sim.faults import Fault, Faults, Latency
from bottomhalf.host.sim.files import SimFile
from bottomhalf.host.sim.world import Deadlock, Descriptor, World, failure

DEPTH: Final = 128  # requests that the device works on at once; more wait their turn
IN_FLIGHT_MAX: Final = 1 << 20
JUNK: Final = b"\xdb"


class _Job:
    """A request on its way."""

    __slots__ = ("early", "fault", "file", "mark", "moved", "request", "result")

    def __init__(self, file: SimFile, request: Request) -> None:
        self.file = file
        self.request = request
        self.fault: Fault | None = None
        self.mark = 0  # FLUSH: what had completed when it began
        self.moved = 0  # bytes of a transfer that came back short
        self.early = False  # took effect at its start; ``result`` is waiting to be told
        self.result = 0


class SimEngine(Descriptor):
    """A host.protocol.Engine."""

    def __init__(self, world: World, faults: Faults, latency: Latency, name: str) -> None:
        super().__init__(world)
        self.name = name
        self.in_flight = 0
        self.depth = DEPTH
        self._faults = faults
        self._latency = latency
        self._prepared: list[_Job] = []
        self._waiting: deque[_Job] = deque()
        self._working: dict[int, _Job] = {}  # by id(request)
        self._done: list[Request] = []
        self._is_entering = False
        self._is_readable = False

    @property
    def pending(self) -> bool:
        """Whether reap() would return something."""
        if not self._done:
            self.world.idle_look()
            self.world.run_due()
        return bool(self._done)

    def readiness(self) -> int:
        return IN if self._is_readable else 0

    def prepare(self, file: File, request: Request) -> None:
        self.check_open()
        self.check_home()
        assert isinstance(file, SimFile), f"{file!r} is not a file of this host"
        assert request.result == IN_PROGRESS, f"{request!r} was prepared after it had finished"
        assert not isinstance(request.slot, _Job), f"{request!r} was prepared twice"
        if request.op in (READ, WRITE):
            size = memoryview(request.buffer).nbytes
            assert size == request.length, f"{request!r} has a buffer of {size} bytes"
        if self.in_flight >= IN_FLIGHT_MAX:
            raise failure(errno.EAGAIN)
        self.in_flight += 1
        request.slot = job = _Job(file, request)
        self._prepared.append(job)

    def enter(self) -> None:
        self.world.threads.preempt()
        self.check_open()
        self.check_home()
        started, self._prepared = self._prepared, []
        if not started:
            return
        world = self.world
        world.note("enter", len(started))
        together = world.disk.random() < world.odds.coalesce
        heap_ns = max(self._latency.draw(world, job.request.op) for job in started) if together else None
        self._is_entering = True
        for job in started:
            if len(self._working) < self.depth:
                self._start(job, heap_ns)
            else:
                self._waiting.append(job)
        self._is_entering = False

    def reap(self) -> list[Request]:
        self.world.threads.preempt()
        self.check_open()
        self.check_home()
        done, self._done = self._done, []
        self._is_readable = False
        self.in_flight -= len(done)
        return done

    def close(self) -> None:
        if self.closed:
            return
        self.enter()
        while self._working:
            if not self.world.step():
                raise Deadlock(self.world.explained(f"{self!r} is closed with requests that never complete"))
        self._done.clear()
        self.in_flight = 0
        super().close()

    def explain(self) -> str:
        parts = []
        if self._done and not self._is_readable:
            parts.append(
                f"{len(self._done)} finished inside enter(), not reaped: ``pending`` tells, fileno() does not"
            )
        if self._working:
            parts.append(f"{len(self._working) + len(self._waiting)} in flight")
        if self._prepared:
            parts.append(f"{len(self._prepared)} prepared and enter() not called")
        return f"{self!r}: {', '.join(parts)}" if parts else ""

    def power_lost(self) -> None:
        """What is being written now may reach the disk, in part, and nobody will be told."""
        for file, request in self.unfinished():
            file.inode.add_unfinished(request.offset, bytes(request.buffer))

    def unfinished(self) -> list[tuple[SimFile, Request]]:
        """Writes that are under way and have not taken effect."""
        return [
            (job.file, job.request)
            for job in self._working.values()
            if job.request.op == WRITE and not job.early and not job.file.read_only and job.request.offset >= 0
        ]

    def abandon(self) -> None:
        """The program died: the kernel finishes some of what it was working on."""
        for job in self._working.values():
            if not job.early and job.fault is None and self.world.disk.random() < 0.5:
                job.file.perform(job.request, 0, job.mark)

    def _start(self, job: _Job, delay_ns: int | None) -> None:
        request, file, world = job.request, job.file, self.world
        self._working[id(request)] = job
        if delay_ns is None:
            delay_ns = self._latency.draw(world, request.op)
        if file.closed:
            job.early, job.result = True, -errno.EBADF  # closed between prepare() and enter()
            world.at(delay_ns, lambda: self._finish(job), any_order=True)
            return
        job.fault = fault = self._faults.strike(file.path, request.op, request.offset, request.length)
        job.mark = file.inode.mark()
        if request.op != FLUSH and fault is None and world.disk.random() < 0.5:
            job.early, job.result = True, file.perform(request, 0, 0)
        elif request.op == READ:
            memoryview(request.buffer).cast("B")[:] = JUNK * request.length
        if self._is_entering and fault is None and world.disk.random() < world.odds.at_once:
            self._finish(job)
            return
        if fault is not None:
            delay_ns += fault.delay_ns
            if fault.hold:
                fault.keep(lambda: self._finish(job))
                return
        world.at(delay_ns, lambda: self._finish(job), any_order=True)

    @staticmethod
    def _transfer(job: _Job, start: int, end: int, fault_errno: int) -> int:
        """Move a part of a read or write."""
        whole = job.request
        buffer = memoryview(whole.buffer).cast("B")[start:end]
        return job.file.perform(
            Request(whole.op, whole.offset + start, end - start, buffer, whole.flags), fault_errno, job.mark
        )

    def _finish(self, job: _Job) -> None:
        request, world, fault = job.request, self.world, job.fault
        if fault is not None and not (job.early or job.moved) and (part := fault.part(request.op, request.length)):
            job.result = self._transfer(job, 0, part, 0)
            if job.result == 0:  # and on with the rest
                job.moved = part
                world.note("short", job.file.path, request.op, request.offset, part)
                world.at(self._latency.draw(world, request.op), lambda: self._finish(job), any_order=True)
                return
        elif job.moved:
            job.result = self._transfer(job, job.moved, request.length, fault.errno if fault else 0)
        elif not job.early:
            job.result = job.file.perform(request, fault.errno if fault else 0, job.mark)
        world.note("finish", job.file.path, request.op, request.offset, request.length, job.result)
        request.result = job.result
        request.slot = None
        del self._working[id(request)]
        self._done.append(request)
        if not self._is_entering:
            self._is_readable = True
        if self._waiting:
            self._start(self._waiting.popleft(), None)
