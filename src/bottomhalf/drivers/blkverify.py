# SPDX-License-Identifier: Apache-2.0
"""Driver ``blkverify``: writes two images alike, and compares them whenever something is read.

``raw`` is the image that is right, ``test`` the one that is tested. A read that differs, or a request that ends
differently on the two, is a mismatch: it is told with its place, and the request fails with EIO. (QEMU's ends the
process there.) What to do then is ``on_mismatch``'s to say; without one it is an error that comes out of the loop, so
that no test passes by accident.

Flushes go to the tested image only, and are not compared.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from bottomhalf.aio.together import gather
from bottomhalf.block import BlockError, Node
from bottomhalf.block.errors import check
from bottomhalf.block.node import co_submit
from bottomhalf.host.request import FLUSH, OP_NAMES, READ, Request

if TYPE_CHECKING:
    from bottomhalf.block import Graph


class Mismatch(BlockError):
    """The two images are not alike."""


class BlkverifyNode(Node):
    """Two children, ``raw`` and ``test``. The size is that of the tested one."""

    driver = "blkverify"
    is_filter = True

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        test: Node,
        raw: Node,
        on_mismatch: Callable[[str], object] | None = None,
        read_only: bool = False,
        unmap: bool = False,
    ) -> None:
        super().__init__(graph, name, read_only=read_only, unmap=unmap)
        self.context = raw.context
        self.request_alignment = max(raw.request_alignment, test.request_alignment)
        self.memory_alignment = max(raw.memory_alignment, test.memory_alignment)
        self._raw = self.attach(raw, "raw")
        self._test = self.attach(test, "test")
        self.on_mismatch = on_mismatch
        self.size = test.size

    def open_size(self) -> int:
        return self._test.node.size

    def written_below(self, end: int) -> list[tuple[Node, int]]:
        return [(self._raw.node, end), (self._test.node, end)]

    def allocated_size(self) -> int | None:
        """QEMU's does not tell either."""
        return None

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if requests[0].op == FLUSH:
            return self._test.node.submit_batch(requests)
        return [request for request in requests if self.start(request, self._co_serve_both(request))]

    async def _co_serve_both(self, request: Request) -> None:
        op, offset, length = request.op, request.offset, request.length
        expected = memoryview(bytearray(length)) if op == READ else request.buffer
        right = Request(op, offset, length, expected, request.flags)
        tested = Request(op, offset, length, request.buffer, request.flags)
        await gather(
            co_submit(self._raw.node.submit_batch, right, self._raw.node),
            co_submit(self._test.node.submit_batch, tested, self._test.node),
        )
        if right.result != tested.result:
            self._mismatch(request, f"return value mismatch {tested.result} != {right.result}")
        if op == READ and right.result == 0:
            found, wanted = bytes(request.buffer), bytes(expected)
            if found != wanted:
                first = next(place for place in range(length) if found[place] != wanted[place])
                self._mismatch(request, f"contents mismatch at offset {offset + first}")
        check(right.result, self.name)

    def _mismatch(self, request: Request, what: str) -> None:
        text = f"blkverify: {OP_NAMES[request.op]} offset {request.offset} bytes {request.length} {what}"
        if self.on_mismatch is None:
            raise Mismatch(text)
        self.on_mismatch(text)
        raise OSError(errno.EIO, text, self.name)
