# SPDX-License-Identifier: Apache-2.0
"""What a user of a disk does with failed requests: ``rerror`` and ``werror``.

=========  =====================================================================================================
report     the request fails
ignore     it succeeds; what a read brings is not defined
stop       the machine stops, the request is kept and tried again when the machine goes on
enospc     stop if there is no space (somebody can make some), else report: the default for writes
auto       what the device prefers, which is report for reads and enospc for writes
=========  =====================================================================================================

    queue = PolicyQueue(backend, ErrorPolicy(), on_complete, on_error=emit_event_and_stop)
    request.owner = queue
    pending = queue.submit([request])
    ...
    queue.resume()                       # when the machine goes on

While it is stopped nothing new is started either: what comes is kept behind what has failed, in order. A kept request
is not in flight, so a drain does not wait for an administrator.

Whoever has no such policy uses ``backend.queue()`` and pays nothing: keeping what a request was, to be able to repeat
it, is one entry in a dict per request.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from bottomhalf.host.request import IN_PROGRESS, READ, Request

if TYPE_CHECKING:
    from bottomhalf.block.backend import BlockBackend


class OnError(StrEnum):
    """BlockdevOnError."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class ErrorAction(StrEnum):
    """BlockErrorAction: what was done about an error."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


class IoStatus(StrEnum):
    """BlockDeviceIoStatus: why a disk is stopped."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


@dataclass(frozen=True)
class ErrorPolicy:
    """``rerror`` and ``werror``. Whatever is not a read counts as a write."""

    rerror: OnError = OnError.AUTO
    werror: OnError = OnError.AUTO

    def action(self, op: int, number: int) -> ErrorAction:
        """What to do about errno ``number``."""
        policy = self.rerror if op == READ else self.werror
        if policy == OnError.AUTO:
            policy = OnError.REPORT if op == READ else OnError.ENOSPC
        if policy == OnError.ENOSPC:
            return ErrorAction.STOP if number == errno.ENOSPC else ErrorAction.REPORT
        return ErrorAction(policy.value)


@dataclass(frozen=True)
class IoError:
    """What a BLOCK_IO_ERROR event tells."""

    device: str
    node_name: str
    operation: str  # read or write
    action: ErrorAction
    nospace: bool
    reason: str


class PolicyQueue:
    """One user's way into a backend, like Queue, with a policy for errors. Home thread of the backend's context."""

    def __init__(
        self,
        backend: BlockBackend,
        policy: ErrorPolicy,
        on_complete: Callable[[list[Request]], object],
        on_error: Callable[[IoError], object] | None = None,
    ) -> None:
        self.backend = backend
        self.policy = policy
        self.status = IoStatus.OK
        self._on_complete = on_complete
        self._on_error = on_error
        self._queue = backend.queue(self._ended)
        self._kept: list[Request] = []
        self._originals: dict[int, tuple[int, int]] = {}  # in order; layers map offsets and change flags in place

    @property
    def kept(self) -> int:
        """Requests that wait for resume()."""
        return len(self._kept)

    @property
    def stopped(self) -> bool:
        return self.status != IoStatus.OK

    def submit(self, requests: list[Request]) -> list[Request]:
        """See Queue.submit; ``owner`` of every request must be this queue."""
        for request in requests:
            self._originals[id(request)] = (request.offset, request.flags)
        if self.stopped:
            self._kept += requests
            return requests
        return self._start(requests)

    def complete(self, requests: list[Request]) -> None:
        """For those who deliver: the user is told."""
        self._on_complete(requests)

    def resume(self) -> None:
        """The machine goes on: what was kept is tried again, in order."""
        kept = self._take_kept()
        begin = 0
        while begin < len(kept):
            if self.stopped:  # again
                self._kept += kept[begin:]
                return
            end = begin + 1
            while end < len(kept) and kept[end].op == kept[begin].op:
                end += 1
            batch = kept[begin:end]
            begin = end
            for request in batch:
                request.offset, request.flags = self._originals[id(request)]
                request.result = IN_PROGRESS
            pending = {id(request) for request in self._start(batch)}
            done = [request for request in batch if id(request) not in pending]
            if done:
                self._on_complete(done)

    def give_up(self) -> None:
        """The disk goes away: what was kept fails as it did, or with ENOMEDIUM if it had not begun."""
        kept = self._take_kept()
        for request in kept:
            del self._originals[id(request)]
            if request.result == IN_PROGRESS:
                request.result = -errno.ENOMEDIUM
        if kept:
            self._on_complete(kept)

    def _take_kept(self) -> list[Request]:
        """What was kept, in the order in which it came: requests may fail in another one."""
        kept, self._kept = self._kept, []
        self.status = IoStatus.OK
        if len(kept) > 1:
            places = {key: place for place, key in enumerate(self._originals)}
            kept.sort(key=lambda request: places[id(request)])
        return kept

    def _start(self, requests: list[Request]) -> list[Request]:
        for request in requests:
            request.owner = self._queue
        pending = self._queue.submit(requests)
        waiting = {id(request) for request in pending}
        done = [request for request in requests if id(request) not in waiting]
        told = {id(request) for request in self._judge(done)} if done else set()
        return [request for request in requests if id(request) not in told]

    def _ended(self, requests: list[Request]) -> None:
        told = self._judge(requests)
        if told:
            self._on_complete(told)

    def _judge(self, requests: list[Request]) -> list[Request]:
        """Of requests that have ended, those that the user is to be told of."""
        told = []
        for request in requests:
            request.owner = self
            if request.result < 0 and self._keeps(request):
                self._kept.append(request)
            else:
                del self._originals[id(request)]
                told.append(request)
        return told

    def _keeps(self, request: Request) -> bool:
        number = -request.result
        action = self.policy.action(request.op, number)
        nospace = number == errno.ENOSPC
        if action == ErrorAction.IGNORE:
            request.result = 0
        elif action == ErrorAction.STOP and not self.stopped:
            self.status = IoStatus.NOSPACE if nospace else IoStatus.FAILED
        if self._on_error is not None:
            operation = "read" if request.op == READ else "write"
            root = self.backend.root
            node_name = root.node.name if root is not None else ""
            self._on_error(IoError(self.backend.name, node_name, operation, action, nospace, os.strerror(number)))
        return action == ErrorAction.STOP
