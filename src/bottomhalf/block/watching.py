# SPDX-License-Identifier: Apache-2.0
"""What any node can be asked to do with writes, whatever its driver: turn zero bytes into zero writes, tell when
somebody writes beyond a threshold, note in bitmaps what is written (see ``dirty``), and keep writes out of a range
that somebody else must have for himself.

    detect_zeroes(node, unmap=True)
    set_write_threshold(node, 1 << 30, on_exceeded)
    watch_bitmaps(node)
    gate = share_gate(node)

Few nodes are asked, and the others must not pay, not even a look at a flag per list. So a node that is asked changes
its class: to one that is derived from its driver's and looks at writes before the driver gets them, in each of the two
forms in which they can come. A driver need not know, and a node that is asked no more has its old class again.

A write of zero bytes goes down as a request of its own: the owner's request stays what he made it.

While an image still says that bitmaps in it are valid, nobody may write: they would be wrong after a crash. A node
that is *sealed* so refuses (EPERM).

Who enters the gate of a node alone (see ``serialising``) writes through the door behind it: ``co_io(node, ...,
submit=behind_gate(node))``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.node import Node, co_io
from bottomhalf.block.serialising import RangeGate
from bottomhalf.block.zeroes import is_zero
from bottomhalf.host.request import COMPRESSED, DISCARD, FLUSH, MAY_UNMAP, READ, WRITE, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block.dirty import NamedBitmap


class Watch:
    """What a node is asked to do."""

    __slots__ = (
        "bitmaps",
        "follows_size",
        "gate",
        "gate_users",
        "on_exceeded",
        "sealed",
        "threshold",
        "zero_flags",
        "zeroes",
    )

    def __init__(self) -> None:
        self.zeroes = False
        self.zero_flags = 0
        self.threshold = 0
        self.on_exceeded: Callable[[int, int], object] | None = None
        self.bitmaps: tuple[NamedBitmap, ...] = ()  # that follow writes
        self.sealed = False
        self.follows_size = False  # there are bitmaps, following writes or not
        self.gate: RangeGate | None = None  # that writes pass
        self.gate_users = 0

    @property
    def idle(self) -> bool:
        return not self.zeroes and not self.threshold and not self.follows_size and self.gate is None

    def mark(self, requests: Iterable[Request]) -> None:
        """Somebody writes, or discards."""
        for bitmap in self.bitmaps:
            bitmap.mark(requests)

    def mark_range(self, node: Node, offset: int, length: int) -> None:
        """The same for coroutines. OSError if nobody may."""
        if self.sealed:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), node.name)
        if self.bitmaps:
            self.mark([Request(WRITE, offset, length)])

    def written(self, end: int) -> None:
        """Somebody writes up to ``end``."""
        threshold = self.threshold
        if threshold and end > threshold:
            self.threshold = 0  # once; who wants to hear again says so
            if self.on_exceeded is not None:
                self.on_exceeded(end - threshold, threshold)


_classes: Final[dict[type[Node], type[Node]]] = {}


def _watching(kind: type[Any]) -> type[Node]:
    """The class of watched nodes of a kind."""
    made = _classes.get(kind)
    if made is not None:
        return made

    class Watched(kind):  # type: ignore[misc]
        driver_class = kind
        watch: Watch

        def submit_batch(self, requests: list[Request]) -> list[Request]:
            gate = self.watch.gate
            if gate is None or requests[0].op in (READ, FLUSH):
                return self.behind_gate(requests)
            clear = gate.clear(requests)
            pending = list(gate.submit(clear, self.behind_gate)) if clear else []
            if len(clear) < len(requests):
                passed = {id(request) for request in clear}
                for request in requests:
                    if id(request) not in passed and self.start(request, self._co_pass(gate, request)):
                        pending.append(request)
            return pending

        async def _co_pass(self, gate: RangeGate, request: Request) -> None:
            offset, length = request.offset, request.length
            place = await gate.enter(offset, offset + length, alone=False)
            try:
                door = self.behind_gate
                await co_io(self, request.op, offset, length, request.buffer, request.flags, submit=door)
            finally:
                gate.leave(place)

        def behind_gate(self, requests: list[Request]) -> list[Request]:
            watch, op = self.watch, requests[0].op
            if op in (WRITE, WRITE_ZEROES):
                if watch.sealed:
                    return _refuse(requests)
                if watch.bitmaps:
                    watch.mark(requests)
                if watch.threshold:
                    watch.written(max([request.offset + request.length for request in requests]))
                if watch.zeroes and op == WRITE:
                    return self._sort_out_zeroes(requests)
            elif op == DISCARD and self.unmap:
                if watch.sealed:
                    return _refuse(requests)
                watch.mark(requests)
            pending: list[Request] = super().submit_batch(requests)
            return pending

        def _sort_out_zeroes(self, requests: list[Request]) -> list[Request]:
            zeroes = [request for request in requests if is_zero(request.buffer) and not request.flags & COMPRESSED]
            others = requests
            if zeroes:
                sorted_out = {id(request) for request in zeroes}
                others = [request for request in requests if id(request) not in sorted_out]
            pending = list(super().submit_batch(others)) if others else []
            for request in zeroes:
                if self.start(request, self._co_zero_instead(request)):
                    pending.append(request)
            return pending

        async def _co_zero_instead(self, request: Request) -> None:
            flags = request.flags | self.watch.zero_flags
            door = super().submit_batch
            await co_io(self, WRITE_ZEROES, request.offset, request.length, None, flags, submit=door)

        async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
            watch = self.watch
            watch.mark_range(self, offset, len(buffer))
            watch.written(offset + len(buffer))
            if watch.zeroes and not flags & COMPRESSED and is_zero(buffer):
                await super().co_write_zeroes(offset, len(buffer), flags | watch.zero_flags)
            else:
                await super().co_pwrite(offset, buffer, flags)

        async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
            self.watch.mark_range(self, offset, length)
            self.watch.written(offset + length)
            await super().co_write_zeroes(offset, length, flags)

        async def co_discard(self, offset: int, length: int) -> None:
            if self.unmap:
                self.watch.mark_range(self, offset, length)
            await super().co_discard(offset, length)

        def refresh_size(self) -> None:
            super().refresh_size()
            for bitmap in self.bitmaps.values():
                bitmap.follow(self.size)

        async def co_copy_range_to(self, offset: int, length: int, *source: Any) -> None:
            self.watch.mark_range(self, offset, length)
            self.watch.written(offset + length)
            gate = self.watch.gate
            if gate is None:
                await super().co_copy_range_to(offset, length, *source)
                return
            place = await gate.enter(offset, offset + length, alone=False)
            try:
                await super().co_copy_range_to(offset, length, *source)
            finally:
                gate.leave(place)

    Watched.__name__ = f"Watched{kind.__name__}"
    _classes[kind] = Watched
    return Watched


def _refuse(requests: list[Request]) -> list[Request]:
    for request in requests:
        request.result = -errno.EPERM
    return []


def watch_of(node: Node) -> Watch | None:
    """What a node is asked to do, None for nothing."""
    return node.__dict__.get("watch")


def unwatched(node: Node) -> type[Node]:
    """The class that the node has when it is asked nothing: its methods, called with the node, are not watched."""
    return type(node) if watch_of(node) is None else node.driver_class  # type: ignore[attr-defined]


def _change(node: Any, change: Callable[[Watch], object]) -> None:
    watch = watch_of(node) or Watch()
    change(watch)
    watched = watch_of(node) is not None
    if watch.idle and watched:
        node.__class__ = node.driver_class
        del node.watch
    elif not watch.idle and not watched:
        node.watch = watch
        node.__class__ = _watching(type(node))


def detect_zeroes(node: Node, wanted: bool = True, *, unmap: bool = False) -> None:
    """From now on writes of zero bytes are zero writes, which may make holes with ``unmap``; or, if that is not
    ``wanted`` any more, what they are. Drained, or not used yet.

    A write that is to be stored compressed is left as it is."""

    def change(watch: Watch) -> None:
        watch.zeroes, watch.zero_flags = wanted, MAY_UNMAP if unmap else 0

    _change(node, change)


def set_write_threshold(
    node: Node, threshold: int, on_exceeded: Callable[[int, int], object] | None = None
) -> None:
    """Call ``on_exceeded(bytes beyond, threshold)`` when a write first ends beyond ``threshold`` bytes, before it is
    done; then forget it. 0 forgets it now. In the home thread, or drained."""

    def change(watch: Watch) -> None:
        watch.threshold, watch.on_exceeded = threshold, on_exceeded

    _change(node, change)


def write_threshold(node: Node) -> int:
    """The threshold that has not been exceeded yet, 0 if there is none."""
    watch = watch_of(node)
    return watch.threshold if watch is not None else 0


def watch_bitmaps(node: Node) -> None:
    """Look anew which of the node's bitmaps follow writes, and whether it may be written to. Drained."""

    def change(watch: Watch) -> None:
        bitmaps = node.bitmaps.values()
        watch.bitmaps = tuple([bitmap for bitmap in bitmaps if bitmap.enabled and not bitmap.inconsistent])
        watch.sealed = any(bitmap.read_only for bitmap in bitmaps)
        watch.follows_size = bool(bitmaps)

    _change(node, change)


def share_gate(node: Node) -> RangeGate:
    """From now on requests that change the node pass a gate: this one, whoever asks. Until drop_gate(), once for each
    time. Drained, or not used yet."""

    def change(watch: Watch) -> None:
        watch.gate = watch.gate or RangeGate(f"other requests that write to {node.describe()}")
        watch.gate_users += 1

    _change(node, change)
    gate = node.watch.gate  # type: ignore[attr-defined]
    assert isinstance(gate, RangeGate)
    return gate


def drop_gate(node: Node) -> None:
    """One user of the node's gate needs it no more. Drained."""

    def change(watch: Watch) -> None:
        watch.gate_users -= 1
        if not watch.gate_users:
            watch.gate = None

    _change(node, change)


def behind_gate(node: Node) -> Callable[[list[Request]], list[Request]]:
    """The door for who is inside the node's gate."""
    return node.behind_gate  # type: ignore[attr-defined,no-any-return]
