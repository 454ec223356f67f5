# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps in memory: which parts of a disk.

    bitmap = DirtyBitmap(node.size, 65536)
    bitmap.set(offset, length)
    for begin, end in bitmap.dirty_ranges(0, bitmap.size): ...

A bit stands for ``granularity`` bytes and is set if any of them is dirty. Kept as one byte per bit: then finding,
counting and filling are calls of ``bytearray`` that run at the speed of memory, where bits in integers would be
loops in Python. A disk of a terabyte in pieces of 64 KiB takes 16 MiB.

Files and checksums have eight bits to a byte, the lowest first: ``packed`` and ``load`` translate a million bits in a
millisecond or two, with strides of bytes and one large number instead of a loop.

The bitmaps that nodes have, which follow writes, are in ``dirty``.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Final

from bottomhalf.block.errors import BlockError

GRANULARITY_MIN: Final = 512  # QEMU's
GRANULARITY_DEFAULT: Final = 65536  # QEMU's, for images without clusters
BITS_MAX: Final = 1 << 28  # memory that one bitmap may take, in bytes
WORD_BITS: Final = 64  # of which QEMU makes its bitmaps

# A byte of packed bits to its bit n, as a byte.
_BIT: Final = [bytes(byte >> n & 1 for byte in range(256)) for n in range(8)]


class DirtyBitmap:
    """Offsets, lengths and sizes in bytes. Ranges lie within ``size``."""

    def __init__(
        self, size: int, granularity: int = GRANULARITY_DEFAULT, name: str = "", *, full: bool = False
    ) -> None:
        if granularity < GRANULARITY_MIN or granularity & (granularity - 1):
            raise BlockError("Granularity must be power of 2 and at least 512")
        bits = _bits_of(size, granularity)
        self.size = size
        self.granularity = granularity
        self.name = name
        self._shift = granularity.bit_length() - 1
        self._bits = bytearray(bits)
        if full:
            self.fill()

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

    def fill(self) -> None:
        """Everything is dirty."""
        self._bits = bytearray(b"\1" * len(self._bits))

    def clear(self) -> bytearray:
        """Nothing is dirty. What was, for ``exchange``."""
        return self.exchange(bytearray(len(self._bits)))

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
        bits = _bits_of(size, self.granularity)
        del self._bits[bits:]
        self._bits.extend(bytes(bits - len(self._bits)))
        self.size = size

    # -- as others keep it --------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """How many bits there are."""
        return len(self._bits)

    def content(self, first: int, count: int) -> int:
        """What so many bits are, which are there: 0 or 1 if all are, else -1."""
        end = first + count
        bit = self._bits[first]
        return -1 if self._bits.find(not bit, first, end) >= 0 else bit

    def packed(self, first: int, count: int) -> bytes:
        """Bits, eight to a byte, the lowest first; behind the last one are zeroes."""
        bits = self._bits[first : min(first + count, len(self._bits))]
        made = 0
        for n in range(8):
            made |= int.from_bytes(bits[n::8], "little") << n
        return made.to_bytes(-(-count // 8), "little")

    def load(self, first: int, data: bytes | bytearray | memoryview) -> None:
        """Take bits over from such bytes, as many as there are in both."""
        count = min(len(data) * 8, len(self._bits) - first)
        data = bytes(data[: -(-count // 8)])
        bits = bytearray(len(data) * 8)
        for n in range(8):
            bits[n::8] = data.translate(_BIT[n])
        self._bits[first : first + count] = bits[:count]

    def load_alike(self, first: int, count: int, value: bool) -> None:
        """So many bits are all the same."""
        count = min(count, len(self._bits) - first)
        self._bits[first : first + count] = (b"\1" if value else b"\0") * count

    def checksum(self) -> str:
        """SHA-256 of all bits in whole words, by which QEMU compares bitmaps."""
        words = max(-(-len(self._bits) // WORD_BITS), 1)
        return sha256(self.packed(0, words * WORD_BITS)).hexdigest()

    def exchange(self, bits: bytearray) -> bytearray:
        """Put the bits in the place of others that were taken out so before; those that were there."""
        assert len(bits) == len(self._bits)
        self._bits, bits = bits, self._bits
        return bits

    def copy_of_bits(self) -> bytearray:
        """For ``exchange``, later."""
        return bytearray(self._bits)

    def _touched(self, offset: int, length: int) -> tuple[int, int]:
        assert offset >= 0 and length >= 0 and offset + length <= self.size, (offset, length, self.size)
        first = offset // self.granularity
        return first, first if not length else -(-(offset + length) // self.granularity)


def _bits_of(size: int, granularity: int) -> int:
    """How many bits it takes. BlockError if they are too many."""
    bits = -(-size // granularity)
    if bits > BITS_MAX:
        raise BlockError(f"A bitmap of {size} bytes in pieces of {granularity} is too large; use a larger granularity")
    return bits
