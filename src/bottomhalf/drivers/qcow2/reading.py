# SPDX-License-Identifier: Apache-2.0
"""Reads that have to wait: for tables that are not in memory, for pieces of several kinds, for what has to be unpacked.

A cluster that somebody frees meanwhile is not given out before such a read is done: it counts as a request that is on
its way (``Metadata.begin``). The compressed cluster that was unpacked last is kept, because guests read on.

Compressed clusters are never encrypted, also in images whose other clusters are. (QEMU writes such ones if it is made
to, by qemu-io; see docs/encryption.md.)

Clause: "Cluster mapping".
Invariant: a read gets what a write that was done before it has put there.
Test: tests/drivers/qcow2/test_schedules.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bottomhalf.block.zeroes import fill_zeroes
from bottomhalf.drivers.qcow2.compression import decompress
from bottomhalf.drivers.qcow2.tables import DATA, SQUEEZED, UNALLOCATED
from bottomhalf.drivers.qcow2.together import co_submit_all, read_from
from bottomhalf.host.request import Request

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node


class Reader:
    """The reads of one image that are coroutines."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._unpacked: tuple[int, bytes] = (0, b"")  # the compressed cluster that was read last: entry, content
        self._forgotten = 0  # how often it had to be forgotten

    async def co_read(self, offset: int, buffer: memoryview) -> None:
        """Read any range, of whole sectors if the image is encrypted. OSError, ImageError."""
        node, metadata = self._node, self._node.metadata
        crypt, backing = node.crypt, node.backing
        data = node.data if crypt is None or crypt.by_guest else crypt
        reads: list[Request] = []
        below: list[Request] = []
        guests: list[tuple[int, memoryview]] = []  # what of it has to be decrypted by the guest's offsets
        epoch = metadata.begin(1)
        try:
            at = 0
            while at < len(buffer):
                forgotten = self._forgotten
                for run in await metadata.runs(offset + at, len(buffer) - at):
                    part = buffer[at : at + run.length]
                    if run.kind == DATA:
                        read_from(data, run.host, part, reads)
                        guests.append((offset + at, part))
                    elif run.kind == SQUEEZED:
                        content = await self._unpack(run.host, forgotten)
                        start = (offset + at) & node.mapping.cluster_mask
                        part[:] = content[start : start + run.length]
                    elif run.kind == UNALLOCATED and backing is not None:
                        read_from(backing, offset + at, part, below)
                    else:
                        fill_zeroes(part)
                    at += run.length
            if reads:
                await metadata.at("read_aio")
                await co_submit_all(data, reads)
                if crypt is not None and crypt.by_guest:
                    crypt.decrypt(guests)
            if below and backing is not None:
                await metadata.at("read_backing_aio")
                await co_submit_all(backing, below)
        finally:
            metadata.end(epoch, 1)

    async def _unpack(self, entry: int, forgotten: int) -> bytes:
        """The content of a compressed cluster; ``forgotten`` is how often one was when the entry was looked up."""
        if self._unpacked[0] == entry:
            return self._unpacked[1]
        node = self._node
        offset, length = node.mapping.squeezed(entry)
        await node.metadata.at("read_compressed")
        data = await node.metadata.read(offset, length)
        content: bytes = await node.context.thread_pool.call(
            decompress, bytes(data), node.mapping.cluster_size, node.header.compression_type
        )
        if forgotten == self._forgotten:  # else the entry may mean something else soon
            self._unpacked = entry, content
        return content

    def forget_unpacked(self) -> None:
        """A compressed cluster is not used any more: its place may get other content."""
        self._unpacked = (0, b"")
        self._forgotten += 1
