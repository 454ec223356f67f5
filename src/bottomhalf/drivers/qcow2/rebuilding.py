# SPDX-License-Identifier: Apache-2.0
"""All counters of an image, written anew.

Where a cluster that is in use has no counter, or the tables of counters are themselves damaged, setting counters one
by one cannot be trusted: a block of counters may lie where something else does. So new blocks and a new table are
written where nobody refers to anything, durably, and then the header names them. A crash before that leaves the image
as it was. The old blocks are leaks afterwards.

Where the file has been cut off, entries lead to clusters behind its end. Nothing is put there either, or a guest would
write to it.

Clause: "Host cluster management".
Invariant: until one write of the header nothing that the image has is written over.
Test: tests/peers/test_qcow2_check.py
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import refcounts, tables
from bottomhalf.drivers.qcow2.layout import REFCOUNT_TABLE_BYTES_MAX

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.metadata import Metadata
    from bottomhalf.drivers.qcow2.references import References


async def co_rebuild(metadata: Metadata, references: References) -> None:
    """Let the image count what was counted. Changes ``references``, too: the new tables are among what is used. With
    the lock held. OSError; ImageError if there is no place for so many."""
    header, bits = metadata.header, metadata.header.cluster_bits
    per_block = refcounts.entries_of_block(bits, header.refcount_order)
    blocks: dict[int, int] = {}  # where the blocks go, by index
    table_at = table_clusters = 0
    hint = 0
    while True:
        used = {cluster // per_block for first, page in references.counted() for cluster in _used(first, page)}
        missing = sorted(used - blocks.keys())
        if missing:
            for index in missing:
                hint = _free(references, hint, 1)
                references.set(hint, 1)
                blocks[index] = hint
            continue
        clusters = -(-(max(blocks) + 1) * 8 >> bits)
        if clusters << bits > REFCOUNT_TABLE_BYTES_MAX:
            raise ImageError("the reference count table would be too large")
        if clusters <= table_clusters:
            break
        for cluster in range(table_at, table_at + table_clusters):
            references.set(cluster, 0)
        table_clusters, table_at = clusters, _free(references, 0, clusters)
        for cluster in range(table_at, table_at + table_clusters):
            references.set(cluster, 1)
    table = array("Q", [0]) * (table_clusters << bits >> 3)
    for index, cluster in blocks.items():
        counts = [references.of(index * per_block + n) for n in range(per_block)]
        packed = refcounts.pack(refcounts.of(counts, header.refcount_order), header.refcount_order)
        await metadata.write([(cluster << bits, packed)])
        table[index] = cluster << bits
    await metadata.write([(table_at << bits, tables.pack(table))])
    await metadata.file.co_flush()
    await metadata.use_counters(header.refcount_order, table, table_at << bits)


def _used(first: int, page: array[int]) -> list[int]:
    return [first + n for n, count in enumerate(page) if count]


def _free(references: References, hint: int, count: int) -> int:
    """The first of so many clusters side by side that nobody refers to, from ``hint`` on."""
    run = 0
    cluster = hint
    while run < count:
        run = 0 if references.of(cluster) or cluster in references.beyond else run + 1
        cluster += 1
    return cluster - count
