# SPDX-License-Identifier: Apache-2.0
"""Several requests to a node at once, from one coroutine: one list, one suspension.

Clause: none, it is ours.
Invariant: each request is done once, with its own result.
Test: tests/drivers/qcow2/test_model.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bottomhalf.aio import Coroutine, current, suspend
from bottomhalf.aio.coroutine import Waitable
from bottomhalf.block import Node
from bottomhalf.block.errors import check
from bottomhalf.block.written import CHANGES_BYTES, note
from bottomhalf.block.zeroes import fill_zeroes
from bottomhalf.host.request import OP_NAMES, READ, Request

if TYPE_CHECKING:
    from bottomhalf.drivers.luks.crypting import CryptFile
    from bottomhalf.drivers.qcow2.metadata import Metadata


class _Batch(Waitable):
    """The owner of the requests. Their buffers are lent, so it cannot be taken back."""

    __slots__ = ("_coroutine", "_left", "_of", "_op")

    def __init__(self, coroutine: Coroutine, op: int, of: str) -> None:
        self._coroutine = coroutine
        self._op = op
        self._of = of
        self._left = 0

    @property
    def what(self) -> str:
        return f"{self._left} {OP_NAMES[self._op]} requests to {self._of}"

    def add(self, count: int) -> None:
        self._left += count

    def complete(self, requests: list[Request]) -> None:
        self._left -= len(requests)
        if not self._left:
            self._coroutine.context.wake(self._coroutine)


async def co_submit_all(node: Node | CryptFile, requests: list[Request]) -> None:
    """Submit requests of one op and wait for the end of all. OSError of the first that failed."""
    batch = _Batch(current(), requests[0].op, node.describe())
    for request in requests:
        request.owner = batch
    offsets = [request.offset for request in requests]
    if CHANGES_BYTES[requests[0].op]:
        end = max([request.offset + request.length for request in requests])
        note(node if isinstance(node, Node) else node.node, end)
    pending = node.submit_batch(requests)
    if pending:
        batch.add(len(pending))
        await suspend(batch)
    for request, offset in zip(requests, offsets, strict=True):
        request.offset = offset
        check(request.result, node.name)


class Passage:
    """The owner of mapped requests that are on their way: counts them out of their epoch, then tells the real one.

    Batches of one owner share it as long as the epoch lasts, so that what ends together is told together."""

    __slots__ = ("_metadata", "epoch", "owner")

    def __init__(self, metadata: Metadata, epoch: int, owner: Any) -> None:
        self._metadata = metadata
        self.epoch = epoch
        self.owner = owner

    def complete(self, requests: list[Request]) -> None:
        owner = self.owner
        for request in requests:
            request.owner = owner
        self._metadata.end(self.epoch, len(requests))
        if owner is not None:
            owner.complete(requests)


def read_from(node: Node | CryptFile, offset: int, part: memoryview, requests: list[Request]) -> None:
    """Note what is to be read for ``part``: what the node has of the range; behind its end are zeroes."""
    count = max(min(len(part), node.size - offset), 0)
    if count:
        requests.append(Request(READ, offset, count, part[:count]))
    if count < len(part):
        fill_zeroes(part[count:])
