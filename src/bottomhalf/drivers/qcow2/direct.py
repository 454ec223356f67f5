# SPDX-License-Identifier: Apache-2.0
"""Reads that leave a qcow2 node without a request: what lies where, for who can look there himself.

An NBD server sends bytes from the page cache; it needs to be told the place, and that the place stays what it is until
it has looked. Somebody who reads a single block would rather have it at once than wait. All of these answer from tables
that are in memory, for plain data in one piece, and leave everything else to the other doors.

Clause: "Cluster mapping".
Invariant: a place that was told stays what it is until whoever asked has looked.
Test: tests/exports/test_nbd_lending.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bottomhalf.block import ImageError, Node
from bottomhalf.drivers.qcow2.layout import COMPRESSED, OFFSET_MASK, ZERO
from bottomhalf.drivers.qcow2.metadata import Metadata
from bottomhalf.drivers.qcow2.tables import DATA, SQUEEZED, UNALLOCATED, Mapping, Run

if TYPE_CHECKING:
    from bottomhalf.drivers.luks.crypting import CryptFile
    from bottomhalf.host.protocol import File
    from bottomhalf.host.request import Request

_NOT_PLAIN: Final = COMPRESSED | ZERO


class DirectReads(Node):
    """The part of Qcow2Node that tells where bytes are."""

    metadata: Metadata
    mapping: Mapping
    crypt: CryptFile | None  # what they are on the disk nobody can read

    @property
    def data(self) -> Node:
        """What holds the guest's data."""
        raise NotImplementedError

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        run = self._one_run(offset, length)
        if run is None or run.kind != DATA or self.crypt is not None:
            return None
        return self.data.pread_nowait(length, run.host)

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        """Where clusters lie side by side, in a table that is in memory."""
        if self.crypt is not None:
            return None
        mapping = self.mapping
        if mapping.extended:
            run = self._one_run(offset, length)
            host = run.host if run is not None and run.kind == DATA else 0
        else:
            table = self.metadata.l2.get(offset >> mapping.l1_shift)
            host = mapping.side_by_side(table.entries, offset, length) if table is not None else 0
        return self.data.file_range(host, length) if host else None

    def map_reads(self, requests: list[Request], offsets: list[int]) -> File | None:
        """What lies in one piece, in tables that are in memory, can be looked at where it is."""
        child = self.data
        if self.crypt is not None or child.map_reads([], []) is None:
            return None
        mapping, l2 = self.mapping, self.metadata.l2
        l1_shift, bits, mask = mapping.l1_shift, mapping.cluster_bits, mapping.cluster_mask
        last, limit, plain = mapping.entries - 1, mapping.cluster_size, not mapping.extended
        places: list[int] = []
        add = places.append
        for request, offset in zip(requests, offsets, strict=True):
            table = l2.get(offset >> l1_shift)
            inside = offset & mask
            if plain and table is not None and inside + request.length <= limit:
                entry = table.entries[offset >> bits & last]
                host = entry & OFFSET_MASK
                if host and not entry & _NOT_PLAIN and not host & mask:
                    add(host + inside)
                    continue
            run = self._one_run(offset, request.length)
            if run is None or run.kind != DATA:
                return None
            add(run.host)
        file = child.map_reads(requests, places)
        if file is not None:
            offsets[:] = places
        return file

    def hold_bytes(self) -> Callable[[], object]:
        """Clusters that are freed from now on are given to nobody."""
        metadata = self.metadata
        epoch = metadata.begin(1)

        def give_back() -> None:
            if self.context.is_home:
                metadata.end(epoch, 1)
            else:  # the node has moved
                self.context.schedule_oneshot(give_back)

        return give_back

    def _one_run(self, offset: int, length: int) -> Run | None:
        """What a range is, if it is of one piece and the tables are in memory."""
        mapping = self.mapping
        index = offset >> mapping.l1_shift
        table = self.metadata.l2.get(index)
        if not length or (offset + length - 1) >> mapping.l1_shift != index:
            return None
        if table is None:
            return None if self.metadata.l1[index] & OFFSET_MASK else Run(UNALLOCATED, 0, length)
        table.used = self.metadata.tick
        try:
            runs = list(mapping.runs(table.entries, offset, length))
        except ImageError:
            return None  # the coroutine will say it
        return runs[0] if len(runs) == 1 and runs[0].kind != SQUEEZED else None
