# SPDX-License-Identifier: Apache-2.0
"""What any node can be asked to do with writes, whatever its driver: turn zero bytes into zero writes, and tell when
somebody writes beyond a threshold.

    detect_zeroes(node, unmap=True)
    set_write_threshold(node, 1 << 30, on_exceeded)

Few nodes are asked, and the others must not pay, not even a look at a flag per list. So a node that is asked changes
its class: to one that is derived from its driver's and looks at writes before the driver gets them, in each of the two
forms in which they can come. A driver need not know, and a node that is asked no more has its old class again.

A write of zero bytes goes down as a request of its own: the owner's request stays what he made it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from bottomhalf.block.node import Node, co_io
from bottomhalf.block.zeroes import is_zero
from bottomhalf.host.request import COMPRESSED, MAY_UNMAP, WRITE, WRITE_ZEROES, Request


class Watch:
    """What a node is asked to do."""

    __slots__ = ("on_exceeded", "threshold", "zero_flags", "zeroes")

    def __init__(self) -> None:
        self.zeroes = False
        self.zero_flags = 0
        self.threshold = 0
        self.on_exceeded: Callable[[int, int], object] | None = None

    @property
    def idle(self) -> bool:
        return not self.zeroes and not self.threshold

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
            watch, op = self.watch, requests[0].op
            if op in (WRITE, WRITE_ZEROES):
                if watch.threshold:
                    watch.written(max([request.offset + request.length for request in requests]))
                if watch.zeroes and op == WRITE:
                    return self._sort_out_zeroes(requests)
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
            watch.written(offset + len(buffer))
            if watch.zeroes and not flags & COMPRESSED and is_zero(buffer):
                await super().co_write_zeroes(offset, len(buffer), flags | watch.zero_flags)
            else:
                await super().co_pwrite(offset, buffer, flags)

        async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
            self.watch.written(offset + length)
            await super().co_write_zeroes(offset, length, flags)

        async def co_copy_range_to(self, offset: int, length: int, *source: Any) -> None:
            self.watch.written(offset + length)
            await super().co_copy_range_to(offset, length, *source)

    Watched.__name__ = f"Watched{kind.__name__}"
    _classes[kind] = Watched
    return Watched


def watch_of(node: Node) -> Watch | None:
    """What a node is asked to do, None for nothing."""
    return node.__dict__.get("watch")


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
