# SPDX-License-Identifier: Apache-2.0
"""Driver ``blkdebug``: a filter for tests, which injects errors, makes requests wait, and imposes limits.

The fault model. A rule hears of an *event*: a named point in the work of a driver above (``read_aio`` of raw), of the
block layer (``pwritev``, ``flush_to_disk``), or ``none``, which comes once, when the node is opened. If the node is in
the rule's *state* (0 is any; it begins in 1), the rule

* injects an error: from now on, until another event injects, requests of its kind that touch its sector fail, without
  having reached the child. What is above must report it and must not believe anything to be written;
* sets another state, when all rules have heard of the event;
* suspends (``breakpoint(event, tag)``): the request that came by waits until ``resume(tag)``, once.

An injected error comes in a later turn of the loop, as a device's would, unless the rule says ``immediately``.

    node.breakpoint("pwritev", "A")
    ...                              # somebody writes
    assert node.is_suspended("A")
    node.resume("A")

Without rules a batch passes in one call. With any, each request is a coroutine: tests do not need speed.

Events of a driver that works in lists are told by a plain call, which cannot wait: the first request of the list that
follows does. Drivers that work in coroutines wait in ``co_debug_event``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import Coroutine, current, give_way, suspend
from bottomhalf.block import BlockError
from bottomhalf.block.alignment import Aligner
from bottomhalf.block.errors import check
from bottomhalf.block.filter import Filter
from bottomhalf.block.limits import RequestLimits, Splitter
from bottomhalf.block.node import co_submit
from bottomhalf.host.protocol import PERM_ALL, File
from bottomhalf.host.request import DISCARD, FLUSH, OP_NAMES, WRITE, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block import Edge, Graph, Node

SECTOR_BYTES: Final = 512
INT_MAX: Final = 2**31 - 1
ERRNO_MAX: Final = 4095  # the kernel's
BLOCK_STATUS: Final = "block-status"
FIRST_STATE: Final = 1

# What happens in the node itself, before and after a request of an op reaches the child.
_BEFORE: Final[dict[int, tuple[str, ...]]] = {
    WRITE: ("pwritev",),
    WRITE_ZEROES: ("pwritev_zero",),
    FLUSH: ("flush_to_os", "flush_to_disk"),
}
_AFTER: Final[dict[int, tuple[str, ...]]] = {WRITE: ("pwritev_done",), WRITE_ZEROES: ("pwritev_done",)}


@dataclass(eq=False)
class ErrorRule:
    """Fail requests after ``event``. ``iotype`` None is all kinds but block-status, ``sector`` -1 is any."""

    event: str
    state: int = 0
    iotype: str | None = None
    error: int = errno.EIO
    sector: int = -1
    once: bool = False
    immediately: bool = False

    def concerns(self, iotype: str, offset: int, length: int) -> bool:
        if iotype != self.iotype and (self.iotype is not None or iotype == BLOCK_STATUS):
            return False
        return self.sector == -1 or offset <= self.sector * SECTOR_BYTES < offset + length


@dataclass(eq=False)
class StateRule:
    """Go to another state after ``event``."""

    event: str
    new_state: int
    state: int = 0


@dataclass(eq=False)
class _Breakpoint:
    event: str
    tag: str


class BlkdebugNode(Filter):
    """A filter above ``image``, which is the option's name in QEMU."""

    driver = "blkdebug"

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        image: Node,
        rules: Sequence[ErrorRule | StateRule] = (),
        align: int = 0,
        limits: RequestLimits | None = None,
        take: int = 0,
        unshare: int = 0,
        read_only: bool = False,
        unmap: bool = False,
    ) -> None:
        limits = limits or RequestLimits()
        _check_limits(limits, align, image.request_alignment)
        for rule in rules:
            if isinstance(rule, ErrorRule) and not 0 <= rule.error <= ERRNO_MAX:
                raise BlockError(f"errno {rule.error} of a blkdebug rule is not between 0 and {ERRNO_MAX}")
        super().__init__(graph, name, file=image, read_only=read_only, unmap=unmap, edge_name="image")
        graph.debugged = True
        self.state = FIRST_STATE
        self._take = take
        self._unshare = unshare
        self._rules: list[ErrorRule | StateRule | _Breakpoint] = list(rules)
        self._injecting: list[ErrorRule] = []
        self._suspended: list[tuple[str, Coroutine]] = []
        self._next_suspends: list[str] = []  # tags that a plain event has left for the next request
        if align:
            self.request_alignment = max(align, image.request_alignment)
        self._aligner = Aligner(self, self._submit_aligned) if align > 1 else None
        self._splitter = Splitter(self, self._submit_fitting, limits) if limits != RequestLimits() else None
        self._limits = limits
        self._plain = self._aligner is None and self._splitter is None
        self._process("none")

    # -- rules --------------------------------------------------------------------------------------------------

    def breakpoint(self, event: str, tag: str) -> None:
        """The next request that comes by the event waits for resume(tag)."""
        self._rules.append(_Breakpoint(event, tag))

    def remove_breakpoint(self, tag: str) -> None:
        """Take breakpoints back, and resume what waits. BlockError if there is neither."""
        kept = [rule for rule in self._rules if not isinstance(rule, _Breakpoint) or rule.tag != tag]
        found = len(kept) < len(self._rules)
        self._rules = kept
        while self.is_suspended(tag):
            self.resume(tag)
            found = True
        if not found:
            raise BlockError(f"There is no breakpoint '{tag}' at {self.describe()}")

    def resume(self, tag: str) -> None:
        """Let one request that waits at a breakpoint go on. BlockError if there is none. Home thread."""
        for entry in self._suspended:
            if entry[0] == tag:
                self._suspended.remove(entry)
                entry[1].context.wake(entry[1])
                return
        raise BlockError(f"No request is suspended as '{tag}' at {self.describe()}")

    def is_suspended(self, tag: str) -> bool:
        return any(entry[0] == tag for entry in self._suspended)

    def _process(self, event: str) -> list[str]:
        """An event happens; the tags as which whoever came by it has to wait."""
        injecting: list[ErrorRule] = []
        tags: list[str] = []
        new_state = self.state
        for rule in list(self._rules):
            if rule.event != event:
                continue
            if isinstance(rule, _Breakpoint):
                self._rules.remove(rule)
                tags.append(rule.tag)
            elif rule.state in (0, self.state):
                if isinstance(rule, ErrorRule):
                    injecting.append(rule)
                else:
                    new_state = rule.new_state
        if injecting:
            self._injecting = injecting
        self.state = new_state
        return tags

    def debug_event(self, event: str) -> None:
        if self._rules:
            self._next_suspends += self._process(event)
        super().debug_event(event)

    async def co_debug_event(self, event: str) -> None:
        if self._rules:
            await self._co_suspend(self._process(event))
        await super().co_debug_event(event)

    async def _co_suspend(self, tags: list[str]) -> None:
        for tag in tags:
            me = current()
            self._suspended.append((tag, me))
            await suspend(f"resume of '{tag}' at {self.describe()}")

    async def _co_fail(self, iotype: str, offset: int, length: int) -> None:
        """Raise what is to be injected into a request."""
        for rule in self._injecting:
            if rule.concerns(iotype, offset, length):
                break
        else:
            return
        if not rule.error:
            return
        if rule.once:
            self._injecting.remove(rule)
            self._rules.remove(rule)
        if not rule.immediately:
            await give_way()
        raise OSError(rule.error, os.strerror(rule.error), self.name)

    @property
    def _watching(self) -> bool:
        return bool(self._rules or self._injecting or self._next_suspends)

    # -- requests -----------------------------------------------------------------------------------------------

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        op = requests[0].op
        if self._plain and op <= FLUSH and not self._watching:
            return self.edge.node.submit_batch(requests)
        if op > FLUSH and not self.unmap and self.ignores(requests):
            return self.finish(requests, 0)
        if self._aligner is not None and op != FLUSH:
            return self._aligner.submit(requests)
        return self._submit_aligned(requests)

    def _submit_aligned(self, requests: list[Request]) -> list[Request]:
        if self._splitter is not None:
            return self._splitter.submit(requests)
        return self._submit_fitting(requests)

    def _submit_fitting(self, requests: list[Request]) -> list[Request]:
        if self._limits.zeroes_alignment or self._limits.discard_alignment:
            requests = self._refuse_unaligned(requests)
            if not requests:
                return requests
        if not self._watching:
            return self.edge.node.submit_batch(requests)
        tags, self._next_suspends = self._next_suspends, []
        pending = []
        for request in requests:
            if self.start(request, self._co_serve_watched(request, tags)):
                pending.append(request)
            tags = []
        return pending

    def _refuse_unaligned(self, requests: list[Request]) -> list[Request]:
        """Zero writes and discards that are smaller than the granularity are not supported; the others."""
        op = requests[0].op
        least = {WRITE_ZEROES: self._limits.zeroes_alignment, DISCARD: self._limits.discard_alignment}.get(op, 0)
        fitting = []
        for request in requests:
            if 0 < request.length < least:
                request.result = -errno.ENOTSUP
            else:
                fitting.append(request)
        return fitting

    async def _co_serve_watched(self, request: Request, tags: list[str]) -> None:
        op = request.op
        await self._co_suspend(tags)
        for event in _BEFORE.get(op, ()):
            await self.co_debug_event(event)
        await self._co_fail(OP_NAMES[op], request.offset, request.length)
        sent = Request(op, request.offset, request.length, request.buffer, request.flags)
        sent.address = request.address
        await co_submit(self.edge.node.submit_batch, sent, self.edge.node)
        for event in _AFTER.get(op, ()):
            await self.co_debug_event(event)
        check(sent.result, self.name)

    def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
        return None if self._watching else super().block_status(offset, length)

    async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        await self._co_fail(BLOCK_STATUS, offset, length)
        return await super().co_block_status(offset, length)

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        return None if self._watching else super().file_range(offset, length)

    def map_reads(self, requests: list[Request], offsets: list[int]) -> File | None:
        return None if self._watching else super().map_reads(requests, offsets)

    def allocated_size(self) -> int | None:
        """QEMU's does not tell either."""
        return None

    def child_permissions(self, edge: Edge, held: int, shared: int) -> tuple[int, int]:
        return held | self._take, shared & (PERM_ALL & ~self._unshare)


def _check_limits(limits: RequestLimits, align: int, below: int) -> None:
    if align and (align > INT_MAX or align & (align - 1)):
        raise BlockError(f"Cannot meet constraints with align {align}")
    least = max(align, below, 1)
    for name, value, step in (
        ("max-transfer", limits.max_transfer, least),
        ("opt-write-zero", limits.zeroes_alignment, least),
        ("max-write-zero", limits.max_zeroes, max(limits.zeroes_alignment, least)),
        ("opt-discard", limits.discard_alignment, least),
        ("max-discard", limits.max_discard, max(limits.discard_alignment, least)),
    ):
        if value and (value >= INT_MAX or value % step):
            raise BlockError(f"Cannot meet constraints with {name} {value}")
