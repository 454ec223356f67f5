# SPDX-License-Identifier: Apache-2.0
"""How often each cluster is used (chapter "Host cluster management"), as numbers: what is read and written in which
order is the business of ``metadata``.

A refcount block has a counter of 1 to 64 bits for each cluster of a stretch of the file. In memory it is an array, for
widths below a byte one byte per counter.

Clause: "Host cluster management".
Invariant: ``pack`` and ``unpack`` are each other's opposite for all seven widths.
Test: tests/drivers/qcow2/test_numbers.py
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Final

_SWAP: Final = sys.byteorder == "little"
_CODES: Final = {3: "B", 4: "H", 5: "I", 6: "Q"}  # of arrays, by order; below a byte see _unpack_bits


def entries_of_block(cluster_bits: int, order: int) -> int:
    """How many clusters a refcount block counts."""
    return 1 << (cluster_bits + 3 - order)


def refcount_max(order: int) -> int:
    """The largest counter of a width."""
    return (1 << (1 << order)) - 1


def unpack(data: bytes | bytearray | memoryview, order: int) -> array[int]:
    """The counters of a block."""
    if order < 3:
        return array("B", _unpack_bits(data, order))
    block = array(_CODES[order])
    assert block.itemsize << 3 == 1 << order
    block.frombytes(data)
    if _SWAP:
        block.byteswap()
    return block


def pack(block: array[int], order: int) -> bytes:
    """A block as it is stored."""
    if order < 3:
        return _pack_bits(block, order)
    if _SWAP:
        block = array(block.typecode, block)
        block.byteswap()
    return block.tobytes()


def of(counts: Iterable[int], order: int) -> array[int]:
    """A block with these counters."""
    return array(_CODES.get(order, "B"), counts)


def empty(cluster_bits: int, order: int) -> array[int]:
    """A block of zeroes."""
    return array(_CODES.get(order, "B"), [0]) * entries_of_block(cluster_bits, order)


def _unpack_bits(data: bytes | bytearray | memoryview, order: int) -> bytearray:
    """Counters of less than a byte stand in it from the least significant bit on. (A block of clusters of 2 MiB has
    16 million counters of a bit, so no loop goes over them.)"""
    width, per_byte = 1 << order, 8 >> order
    mask, packed = (1 << width) - 1, bytes(data)
    counters = bytearray(len(packed) * per_byte)
    for n in range(per_byte):
        counters[n::per_byte] = packed.translate(bytes(byte >> n * width & mask for byte in range(256)))
    return counters


def _pack_bits(block: array[int], order: int) -> bytes:
    width, per_byte = 1 << order, 8 >> order
    raw, packed = block.tobytes(), 0
    for n in range(per_byte):
        packed |= int.from_bytes(raw[n::per_byte], "little") << n * width
    return packed.to_bytes(len(raw) // per_byte, "little")
