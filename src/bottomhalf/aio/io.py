# SPDX-License-Identifier: Apache-2.0
"""The file I/O engine of a context: batches in, completions out, nested polls survived.

An engine collects completions in lists. If it walked such a list on its stack and the owner of the first request
waited, in a nested poll, for the second, that poll would sleep for ever: the completion is out of the kernel, the
wake-up is spent, and the list is known only to the suspended walk. (QEMU's mirror job hung that way in 2014.)
Therefore the list belongs to the context, a bottom half is scheduled before an owner is told while there are others, a
nested poll goes on with the rest through that bottom half, and it is cancelled when the list is empty. Each time anew:
an inner walk that has emptied the list cancels it too, and the outer one may then fill the list again.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from bottomhalf.aio.coroutine import Coroutine, Waitable, current, suspend
from bottomhalf.aio.defer import defer_call, deferred
from bottomhalf.aio.errors import WrongContext
from bottomhalf.aio.statistics import EngineStatistics
from bottomhalf.host.protocol import Engine, File
from bottomhalf.host.request import IN_PROGRESS, OP_NAMES, Request, prepare_each

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext

SUBMIT_AT: Final = 16  # prepared requests that start without waiting for the end of the deferred section:
# a device should begin with the first of a large batch while we still prepare the last
SUBMIT_AT_IDLE: Final = 8  # the same where the device has nothing to do meanwhile: 14 % more of 32 in flight


class Waiter(Waitable):
    """The owner of a request that a coroutine waits for. The device has the buffer, so it cannot be taken back."""

    __slots__ = ("_coroutine", "_of", "_request")

    def __init__(self, coroutine: Coroutine, request: Request, of: str) -> None:
        self._coroutine = coroutine
        self._request = request
        self._of = of  # what it is a request to

    @property
    def what(self) -> str:
        request = self._request
        return f"a {OP_NAMES[request.op]} of {request.length} bytes at {request.offset} of {self._of}"

    def complete(self, requests: list[Request]) -> None:
        self._coroutine.context.wake(self._coroutine)


class ContextEngine:
    """A host's engine, bound to a context. Home thread only."""

    def __init__(self, context: AioContext, engine: Engine) -> None:
        self._context = context
        self._engine = engine
        self._finished: deque[Request] = deque()
        self._prepared = 0
        self._prepare = getattr(engine, "prepare_batch", None) or partial(prepare_each, engine)
        self.completions = context.bottom_half(self._complete, name=f"{engine.name} completions")
        context.set_fd_handler(
            engine.fileno(),
            on_read=self._complete,
            poll=lambda: engine.pending,
            poll_ready=self._complete,
        )

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def in_flight(self) -> int:
        """Requests that were submitted and whose owners have not been told yet."""
        return self._engine.in_flight + len(self._finished)

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(self._engine.name, self.in_flight)

    def submit(self, file: File, requests: list[Request], most: int = 0) -> None:
        """Start requests of one op. Their owners are told in a later turn of the loop, never from in here. ``most``
        can make the parts smaller in which they start; 0 for no wish."""
        at, count, prepare = 0, len(requests), self._prepare
        if not 0 < most < SUBMIT_AT:
            most = SUBMIT_AT
        if self._prepared >= most:
            self._enter(None)
        submit_at = most
        if not self._engine.in_flight and not _are_neighbours(requests):
            # What was prepared before has gone with an enter() of the engine's own, and is done, whatever is counted.
            submit_at = self._prepared + min(most, SUBMIT_AT_IDLE)
        while at < count:
            part = requests[at : at + submit_at - self._prepared]
            at += len(part)
            self._prepared += len(part)
            refused = prepare(file, part)
            if refused:
                self._prepared -= len(refused)
                self._finished += refused
                self.completions.schedule()
            if self._prepared >= submit_at:
                self._enter(None)
                submit_at = most
        if self._prepared:
            defer_call(self._enter, None)

    async def co_submit(self, file: File, request: Request) -> None:
        """Start one request from a coroutine and wait for its end; ``request.result`` tells how it ended."""
        me = current()
        if me.context is not self._context:
            raise WrongContext(f"{me!r} of {me.context.name} uses the engine of {self._context.name}")
        request.owner = waiter = Waiter(me, request, file.path)
        self.submit(file, [request])
        await suspend(waiter)
        assert request.result != IN_PROGRESS, "woken by something else than the request"
        request.owner = None  # they name each other, and the buffer would stay until the next garbage collection

    def _enter(self, _: None) -> None:
        if self._prepared:
            self._prepared = 0
            try:
                self._engine.enter()
            finally:  # an engine that is lost says so, and has failed requests to tell of
                if self._engine.pending:
                    self.completions.schedule()

    def _complete(self) -> None:
        finished, completions, engine = self._finished, self.completions, self._engine
        with deferred():
            while finished or self._reap():
                group = _take_of_one_owner(finished)
                owner = group[0].owner
                if owner is not None:
                    if finished or engine.pending:
                        completions.schedule()
                    owner.complete(group)
                if not finished and not engine.pending:
                    break
            # Inside the section: what its end submits may schedule it again.
            completions.cancel()
            if engine.pending:  # it could not submit all, and nobody will tell when it can
                completions.schedule()

    def _reap(self) -> bool:
        """Whether there is something to tell."""
        self._finished.extend(self._engine.reap())
        return bool(self._finished)

    def close(self) -> None:
        """Wait for what is in flight; owners are not told any more."""
        self._context.set_fd_handler(self._engine.fileno())
        self.completions.delete()
        self._engine.close()


def _are_neighbours(requests: list[Request]) -> bool:
    """Whether the second begins where the first ends: the kernel makes one of those that it gets together."""
    return len(requests) > 1 and requests[0].offset + requests[0].length == requests[1].offset


def _take_of_one_owner(finished: deque[Request]) -> list[Request]:
    """The first requests that have the same owner, taken off."""
    owner = finished[0].owner
    for request in finished:
        if request.owner is not owner:
            break
    else:
        group = list(finished)
        finished.clear()
        return group
    group = [finished.popleft()]
    while finished[0].owner is owner:
        group.append(finished.popleft())
    return group
