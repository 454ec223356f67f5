# SPDX-License-Identifier: Apache-2.0
"""Driver ``compress``: a filter that asks the image below to store compressed whatever is written.

Only an image whose format can compress will do; others are refused when the filter is opened. Formats compress whole
clusters, so the filter's alignment is a cluster, and a write that covers one in part reads it first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bottomhalf.block import BlockError
from bottomhalf.block.alignment import Aligner
from bottomhalf.block.filter import Filter
from bottomhalf.host.request import COMPRESSED, FLUSH, READ, WRITE, Request

if TYPE_CHECKING:
    from bottomhalf.block import Graph, Node


class CompressNode(Filter):
    """A filter above ``file``."""

    driver = "compress"

    def __init__(
        self, graph: Graph, name: str = "", *, file: Node, read_only: bool = False, unmap: bool = False
    ) -> None:
        if not file.can_compress:
            raise BlockError(f"Compression is not supported for underlying format: {file.driver}")
        super().__init__(graph, name, file=file, read_only=read_only, unmap=unmap)
        self.refresh_limits()

    def refresh_limits(self) -> None:
        super().refresh_limits()
        self.request_alignment = max(self.request_alignment, self.edge.node.cluster_bytes)
        self._aligner = Aligner(self, self._submit) if self.request_alignment > 1 else None

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        # Zero writes as well: they must not come into a cluster between its being read and written.
        if self._aligner is not None and requests[0].op not in (READ, FLUSH):
            return self._aligner.submit(requests)
        return self._submit(requests)

    def _submit(self, requests: list[Request]) -> list[Request]:
        op = requests[0].op
        if op == WRITE:
            for request in requests:
                request.flags |= COMPRESSED
        elif op == READ:
            return self.edge.node.submit_batch(requests)
        return super().submit_batch(requests)
