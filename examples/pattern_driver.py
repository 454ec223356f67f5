# SPDX-License-Identifier: Apache-2.0
"""A complete driver: every 8 bytes of the disk hold their own offset. Run it and it reads itself once.

    python examples/pattern_driver.py
"""

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockBackend, Graph, Node
from bottomhalf.host.protocol import PERM_CONSISTENT_READ


class PatternNode(Node):
    """Reads like nbdkit's pattern plugin: big-endian 64-bit offsets. Nothing can be written."""

    driver = "pattern"

    def __init__(self, graph: Graph, name: str, size: int) -> None:
        super().__init__(graph, name, read_only=True)
        self._size = size
        self.refresh_size()

    def open_size(self) -> int:
        return self._size

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        first = offset // 8
        words = (len(buffer) + offset % 8 + 7) // 8
        data = b"".join((8 * word).to_bytes(8, "big") for word in range(first, first + words))
        buffer[:] = data[offset % 8 : offset % 8 + len(buffer)]


def main() -> None:
    context = AioContext()
    graph = Graph(context)
    backend = BlockBackend(graph, held=PERM_CONSISTENT_READ)
    backend.insert(PatternNode(graph, "pattern", 1 << 20))
    print(context.run(backend.co_pread(4096, 16)).hex(" ", 8))
    backend.close()
    context.close()


if __name__ == "__main__":
    main()
