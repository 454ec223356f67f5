# SPDX-License-Identifier: Apache-2.0
"""Writes that are stored compressed (chapter "Compressed Clusters Descriptor").

A compressed cluster takes as many bytes as it has, not whole sectors: the next one begins where the last one ended, and
several share a cluster of the host, whose counter says how many. Sectors are not shared by writes, though: all of a
round lie side by side and leave as one write, padded with zeroes to a whole sector, and the next round begins with the
bytes that the padding took.

Compressing takes a thousand times as long as looking up. So it is done in the context's worker threads, several
clusters at a time, before the tables' lock is taken. Clusters that do not become smaller are written as they are.

The order that keeps crashes safe is that of all writes: first the bytes, then the counters that became greater, then
the entries (see ``metadata``). What is added to a shared cluster lies where nobody's bytes are: the end of what was
packed moves on only, and is forgotten when the cluster is free.

Whoever writes compressed over what is there replaces it (QEMU says EIO where a cluster is not compressed itself).

Clause: "Compressed Clusters Descriptor".
Invariant: bytes that an entry refers to are never written again.
Test: tests/drivers/qcow2/test_compressed.py
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import gather
from bottomhalf.drivers.qcow2 import refcounts
from bottomhalf.drivers.qcow2.compression import compress
from bottomhalf.drivers.qcow2.layout import SECTOR_BYTES
from bottomhalf.host.request import FUA, WRITE, Request

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node
    from bottomhalf.drivers.qcow2.writing import Writer

AT_ONCE: Final = 8  # clusters of a request that are compressed at a time, which bounds the memory, too


class Squeezer:
    """The compressed writes of one image."""

    def __init__(self, node: Qcow2Node, writer: Writer) -> None:
        self._node = node
        self._writer = writer
        self._metadata = node.metadata
        self._mapping = node.mapping

    async def co_serve(self, request: Request) -> None:
        """A write with the flag COMPRESSED. OSError, ImageError."""
        await self.co_write(request.offset, request.buffer)
        if request.flags & FUA:
            await self._node.co_flush()

    async def co_write(self, offset: int, data: memoryview) -> None:
        """Store whole clusters compressed; the disk's last one may be less than that. OSError, ImageError."""
        size, name = self._mapping.cluster_size, self._node.name
        if self._mapping.external:
            raise OSError(errno.ENOTSUP, "nothing is stored compressed in an external data file", name)
        if self._node.crypt is not None:
            raise OSError(errno.ENOTSUP, "nothing is stored compressed in an encrypted image", name)
        if offset % size or (len(data) % size and offset + len(data) != self._node.size):
            raise OSError(errno.EINVAL, f"compressed writes are of whole clusters of {size} bytes", name)
        pool, kind = self._node.context.thread_pool, self._node.header.compression_type
        for start in range(0, len(data), AT_ONCE * size):
            part = data[start : start + AT_ONCE * size]
            pieces = [part[at : at + size] for at in range(0, len(part), size)]
            small = await gather(*(pool.call(compress, piece, size, kind) for piece in pieces))
            await self._store(offset + start, pieces, small)

    async def _store(self, offset: int, pieces: list[memoryview], small: list[bytes | None]) -> None:
        size, first = self._mapping.cluster_size, offset >> self._mapping.cluster_bits
        if any(small):
            async with self._metadata.lock:
                end = offset + (len(pieces) - 1) * size + len(pieces[-1])
                if end % size and end != self._node.header.size:
                    small[-1] = None  # the disk has grown meanwhile, the rest of its last cluster is somebody else's
                squeezed = [(first + n, data) for n, data in enumerate(small) if data is not None]
                if squeezed:
                    await self._metadata.make_room_for_changes()
                    await self._put(squeezed)
        plain = [
            Request(WRITE, offset + n * size, len(piece), piece)
            for n, (piece, data) in enumerate(zip(pieces, small, strict=True))
            if data is None
        ]
        if plain:
            await self._writer.co_write(plain)

    async def _put(self, squeezed: list[tuple[int, bytes]]) -> None:
        """Find places, write, set the entries. With the lock held."""
        metadata = self._metadata
        taken: dict[int, list[int]] = {}  # host clusters with a new reference, by guest cluster
        entries: dict[int, int] = {}
        runs: list[tuple[int, bytearray]] = []
        try:
            for cluster, data in squeezed:
                at = await self._place(len(data), taken.setdefault(cluster, []))
                entries[cluster] = self._mapping.squeezed_entry(at, len(data))
                if runs and runs[-1][0] + len(runs[-1][1]) == at:
                    runs[-1][1].extend(data)
                else:
                    runs.append((at, bytearray(data)))
            for at, run in runs:
                run.extend(bytes(-(at + len(run)) % SECTOR_BYTES))
            await metadata.at("write_compressed")
            await metadata.write(runs)
            await metadata.at("l2_update_compressed")
            for cluster, entry in entries.items():
                await self._writer.link(cluster, entry, 0)
                del taken[cluster]
        except BaseException:
            for clusters in taken.values():
                metadata.free_all(clusters)
            metadata.packing = 0
            raise

    async def _place(self, length: int, taken: list[int]) -> int:
        """The host offset for so many bytes, less than a cluster; the clusters that they touch are ``taken``, and have
        one reference more."""
        metadata, bits, size = self._metadata, self._mapping.cluster_bits, self._mapping.cluster_size
        await metadata.at("cluster_alloc_bytes")
        at = metadata.packing
        room = -at % size
        if room and await metadata.refcount(at >> bits) >= refcounts.refcount_max(metadata.header.refcount_order):
            room = 0
        if room < length:
            fresh, _, _ = await metadata.allocate(1)
            taken.append(fresh)
            if room and fresh != (at >> bits) + 1:
                room = 0
            if not room:
                at = fresh << bits
        if room:
            await metadata.refer(at >> bits)
            taken.append(at >> bits)
        end = at + length
        metadata.packing = end if end % size else 0
        return at
