# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps in memory: which parts of a disk.

    bitmap = DirtyBitmap(node.size, 65536)
    bitmap.set(offset, length)
    for begin, end in bitmap.dirty_ranges(0, bitmap.size): ...

A bit stands for ``granularity`` bytes and is set if any of them is dirty. Kept as one byte per bit: then finding,
counting and filling are calls of ``bytearray`` that run at the speed of memory, where bits in integers would be
loops in Python. A disk of a terabyte in pieces of 64 KiB takes 16 MiB.

A node's named bitmaps are found by ``named_bitmaps(node)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from bottomhalf.block.errors import BlockError

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node

GRANULARITY_MIN: Final = 512  # QEMU's
GRANULARITY_DEFAULT: Final = 65536  # QEMU's, for images without clusters
BITS_MAX: Final = 1 << 28  # memory that one bitmap may take, in bytes
NAME_LENGTH_MAX: Final = 1023  # QEMU's


class DirtyBitmap:
    """Offsets, lengths and sizes in bytes. Ranges lie within ``size``."""

    def __init__(
        self, size: int, granularity: int = GRANULARITY_DEFAULT, name: str = "", *, full: bool = False
    ) -> None:
        if granularity < GRANULARITY_MIN or granularity & (granularity - 1):
            raise BlockError("Granularity must be power of 2 and at least 512")
        if -(-size // granularity) > BITS_MAX:
            raise BlockError(f"A bitmap of {size} bytes in pieces of {granularity} is too large")
        self.size = size
        self.granularity = granularity
        self.name = name
        self._bits = bytearray((b"\1" if full else b"\0") * -(-size // granularity))

    def set(self, offset: int, length: int) -> None:
        """Everything that the range touches is dirty."""
        first, last = self._touched(offset, length)
        self._bits[first:last] = b"\1" * (last - first)

    def reset(self, offset: int, length: int) -> None:
        """What lies wholly within the range is clean. The end of the disk counts as the end of a piece."""
        end = offset + length
        first = -(-offset // self.granularity)
        last = len(self._bits) if end >= self.size else end // self.granularity
        if first < last:
            self._bits[first:last] = bytes(last - first)

    def any(self, offset: int, length: int) -> bool:
        """Whether anything that the range touches is dirty."""
        first, last = self._touched(offset, length)
        return self._bits.find(1, first, last) >= 0

    def all(self, offset: int, length: int) -> bool:
        """Whether everything that the range touches is dirty."""
        first, last = self._touched(offset, length)
        return self._bits.find(0, first, last) < 0

    def run(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether the first byte of the range is dirty, and for how many bytes, within it, the answer is the same."""
        first, last = self._touched(offset, length)
        dirty = bool(self._bits[first])
        change = self._bits.find(not dirty, first, last)
        end = offset + length if change < 0 else change * self.granularity
        return dirty, min(end, offset + length) - offset

    def dirty_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(begin, end) of what is dirty and touched by the range, in pieces' bounds, cut at the end of the disk. The
        bitmap may change meanwhile."""
        first, last = self._touched(offset, length)
        while first < last:
            first = self._bits.find(1, first, last)
            if first < 0:
                return
            end = self._bits.find(0, first, last)
            end = last if end < 0 else end
            yield first * self.granularity, min(end * self.granularity, self.size)
            first = end

    @property
    def count(self) -> int:
        """Dirty bytes, in whole pieces cut at the end of the disk."""
        if not self._bits:
            return 0
        return self._bits.count(1) * self.granularity - (
            len(self._bits) * self.granularity - self.size if self._bits[-1] else 0
        )

    def merge(self, other: DirtyBitmap) -> None:
        """What is dirty there is dirty here. BlockError if the disks differ in size."""
        if other.size != self.size:
            raise BlockError(
                f"Bitmaps are of different sizes (destination size is {self.size}, source size is {other.size}) "
                "and can't be merged"
            )
        for begin, end in other.dirty_ranges(0, other.size):
            self.set(begin, end - begin)

    def truncate(self, size: int) -> None:
        """The disk has another size; what is new is clean."""
        if -(-size // self.granularity) > BITS_MAX:
            raise BlockError(f"A bitmap of {size} bytes in pieces of {self.granularity} is too large")
        bits = -(-size // self.granularity)
        del self._bits[bits:]
        self._bits.extend(bytes(bits - len(self._bits)))
        self.size = size

    def _touched(self, offset: int, length: int) -> tuple[int, int]:
        assert offset >= 0 and length >= 0 and offset + length <= self.size, (offset, length, self.size)
        first = offset // self.granularity
        return first, first if not length else -(-(offset + length) // self.granularity)


_named: WeakKeyDictionary[Node, dict[str, DirtyBitmap]] = WeakKeyDictionary()


def named_bitmaps(node: Node) -> dict[str, DirtyBitmap]:
    """The bitmaps of a node by name; the dict is the node's own."""
    return _named.setdefault(node, {})


def add_bitmap(node: Node, name: str, granularity: int = GRANULARITY_DEFAULT) -> DirtyBitmap:
    """A new, clean bitmap of a node. BlockError."""
    if not name:
        raise BlockError("Bitmap name cannot be empty")
    if len(name) > NAME_LENGTH_MAX:
        raise BlockError(f"Bitmap name is longer than {NAME_LENGTH_MAX} characters")
    bitmaps = named_bitmaps(node)
    if name in bitmaps:
        raise BlockError(f"Bitmap already exists: {name}")
    bitmap = bitmaps[name] = DirtyBitmap(node.size, granularity, name)
    return bitmap


def find_bitmap(graph: Graph, node_name: str, name: str) -> DirtyBitmap:
    """A named bitmap of a named node. BlockError if there is none."""
    node = graph.nodes.get(node_name)
    if node is None:
        raise BlockError(f"Node '{node_name}' not found")
    bitmap = named_bitmaps(node).get(name)
    if bitmap is None:
        raise BlockError(f"Dirty bitmap '{name}' not found")
    return bitmap
