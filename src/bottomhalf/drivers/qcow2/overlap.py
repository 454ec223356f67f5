# SPDX-License-Identifier: Apache-2.0
"""Tables are protected from writes to them by mistake (``overlap-check``).

In an image that is damaged (a counter says that the L1 table is free) an ordinary write would destroy more. So what is
about to be written is compared with the places of tables, and if it is one of them, the image is marked corrupt and not
written any more. Which tables count is a level, as in QEMU: ``constant`` are those whose places hardly change,
``cached`` (the default) also those whose places are in memory, ``all`` also the L2 tables of snapshots, whose L1 tables
are read for that before the first write.

QEMU compares before each write. Here what cannot change is compared once:

* clusters when they are given out, for data or tables (``allocation``);
* the entries of an L2 table before the first write through it, since such writes go where an entry says (``entries``);
* tables at each commit, since two of them may lie at one place (``table``).

So a write into an allocated cluster, which is most of them, costs nothing more.

Clause: none; the levels are QEMU's.
Invariant: no write of ours lands where a table lies that the level protects.
Test: tests/drivers/qcow2/test_overlap.py
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import bitmaps, layout, snapshots, tables
from bottomhalf.drivers.qcow2.layout import COPIED, OFFSET_MASK, ZERO
from bottomhalf.qapi.qcow2_checks import Qcow2OverlapCheckFlags

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.metadata import Metadata

MAIN_HEADER: Final = 1
ACTIVE_L1: Final = 2
ACTIVE_L2: Final = 4
REFCOUNT_TABLE: Final = 8
REFCOUNT_BLOCK: Final = 16
SNAPSHOT_TABLE: Final = 32
INACTIVE_L1: Final = 64
INACTIVE_L2: Final = 128
BITMAP_DIRECTORY: Final = 256

NAMES: Final = {
    MAIN_HEADER: "qcow2_header",
    ACTIVE_L1: "active L1 table",
    ACTIVE_L2: "active L2 table",
    REFCOUNT_TABLE: "refcount table",
    REFCOUNT_BLOCK: "refcount block",
    SNAPSHOT_TABLE: "snapshot table",
    INACTIVE_L1: "inactive L1 table",
    INACTIVE_L2: "inactive L2 table",
    BITMAP_DIRECTORY: "bitmap directory",
}

_CONSTANT: Final = MAIN_HEADER | ACTIVE_L1 | REFCOUNT_TABLE | SNAPSHOT_TABLE | BITMAP_DIRECTORY
_CACHED: Final = _CONSTANT | ACTIVE_L2 | REFCOUNT_BLOCK | INACTIVE_L1
LEVELS: Final = {"none": 0, "constant": _CONSTANT, "cached": _CACHED, "all": _CACHED | INACTIVE_L2}

_FLAGS: Final = {
    "main_header": MAIN_HEADER,
    "active_l1": ACTIVE_L1,
    "active_l2": ACTIVE_L2,
    "refcount_table": REFCOUNT_TABLE,
    "refcount_block": REFCOUNT_BLOCK,
    "snapshot_table": SNAPSHOT_TABLE,
    "inactive_l1": INACTIVE_L1,
    "inactive_l2": INACTIVE_L2,
    "bitmap_directory": BITMAP_DIRECTORY,
}

# Clusters of tables whose places are remembered: those of 128 TB in clusters of 64 KiB. An image that says it has more
# is protected in part; it costs some 60 MB as it is.
PLACES_MAX: Final = 1 << 18


class Corruption(ImageError):
    """The image is damaged in a way that makes writing to it dangerous. ``offset`` and ``size`` in bytes."""

    def __init__(self, text: str, offset: int, size: int) -> None:
        super().__init__(text)
        self.offset = offset
        self.size = size


def flags_of(given: Any) -> int:
    """The tables that ``overlap-check`` names."""
    if given is None:
        return _CACHED
    if not isinstance(given, Qcow2OverlapCheckFlags):
        return LEVELS[str(given)]
    flags = LEVELS[str(given.template or "cached")]
    for name, bit in _FLAGS.items():
        chosen = getattr(given, name)
        if chosen is not None:
            flags = flags | bit if chosen else flags & ~bit
    return flags


class Places:
    """Where the tables of an image lie, by cluster. Kept up to date by ``metadata``."""

    def __init__(self, cluster_bits: int) -> None:
        self._bits = cluster_bits
        self._kinds: dict[int, int] = {}
        self._entries: set[int] = set()  # L2 entries that would lead a write there
        self.protected = _CACHED

    def __len__(self) -> int:
        return len(self._kinds)

    def add(self, kind: int, offset: int, length: int = 1) -> None:
        """A table of some bytes lies there."""
        if not offset and kind != MAIN_HEADER:
            return
        bits = self._bits
        for cluster in range(offset >> bits, (offset + max(length, 1) - 1 >> bits) + 1):
            if len(self._kinds) >= PLACES_MAX and kind not in (MAIN_HEADER, ACTIVE_L1, REFCOUNT_TABLE):
                return
            self._kinds[cluster] = self._kinds.get(cluster, 0) | kind
            entry = cluster << bits | COPIED
            self._entries.update((entry, entry | ZERO))

    def own(self, offset: int) -> None:
        """The L2 table there is the disk's alone from now on: a snapshot that had it, too, is gone."""
        cluster = offset >> self._bits
        if cluster in self._kinds:
            self._kinds[cluster] = ACTIVE_L2

    def remove(self, cluster: int) -> None:
        """Nobody uses the cluster any more."""
        if self._kinds.pop(cluster, 0):
            entry = cluster << self._bits | COPIED
            self._entries.difference_update((entry, entry | ZERO))

    def allocation(self, first: int, count: int) -> None:
        """So many clusters are about to be given out. Corruption if one is in use."""
        if not self.protected or self._kinds.keys().isdisjoint(range(first, first + count)):
            return
        for cluster in range(first, first + count):
            self.table(cluster << self._bits, 0, 1 << self._bits)

    def entries(self, table: array[int], words: int) -> None:
        """A table through which guests are about to write. Corruption if an entry leads to a table."""
        found = table[::words] if words > 1 else table
        if self.protected and not self._entries.isdisjoint(found):
            for entry in found:
                if entry & COPIED:
                    self.table(entry & OFFSET_MASK, 0, 1 << self._bits)

    def table(self, offset: int, own: int, length: int) -> None:
        """Something of the kind ``own`` is about to be written there. Corruption if something else lies there."""
        kinds = self._kinds.get(offset >> self._bits, 0) & self.protected & ~own
        if kinds:
            name = NAMES[kinds & -kinds]
            raise Corruption(f"Preventing invalid write on metadata (overlaps with {name})", offset, length)


async def co_find_places(metadata: Metadata) -> None:
    """Fill in the places of an image whose L1 and refcount table are in memory. OSError, ImageError."""
    header, places, size = metadata.header, metadata.places, metadata.header.cluster_size
    places.add(MAIN_HEADER, 0, size)
    places.add(ACTIVE_L1, header.l1_offset, header.l1_size * 8)
    places.add(REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters * size)
    _add_all(places, REFCOUNT_BLOCK, metadata.refcount_table)
    _add_all(places, ACTIVE_L2, metadata.l1)
    if header.snapshot_count and places.protected & (SNAPSHOT_TABLE | INACTIVE_L1 | INACTIVE_L2):
        await _find_snapshots(metadata)
    extension = header.extension(layout.EXTENSION_BITMAPS)
    if extension is not None and header.autoclear & layout.BITMAPS and places.protected & BITMAP_DIRECTORY:
        try:
            _, offset, length = bitmaps.parse_extension(extension, size)
        except ImageError:
            return  # whoever reads bitmaps says it
        places.add(BITMAP_DIRECTORY, offset, length)


async def _find_snapshots(metadata: Metadata) -> None:
    header, places = metadata.header, metadata.places
    try:
        found, length = await snapshots.co_read(metadata, names=False)
    except ImageError:
        return  # whoever reads snapshots says it
    places.add(SNAPSHOT_TABLE, header.snapshots_offset, length)
    room = PLACES_MAX
    for snapshot in found:
        room -= snapshot.l1_size * 8 + header.cluster_size >> header.cluster_bits
        if room < 0:
            return  # they overlap, or there are too many
        places.add(INACTIVE_L1, snapshot.l1_offset, snapshot.l1_size * 8)
        if places.protected & INACTIVE_L2 and len(places) < PLACES_MAX:
            l1 = tables.unpack(await metadata.read(snapshot.l1_offset, snapshot.l1_size * 8))
            _add_all(places, INACTIVE_L2, l1)


def _add_all(places: Places, kind: int, entries: Iterable[int]) -> None:
    for entry in filter(None, entries):  # in large clusters most are zero
        if len(places) >= PLACES_MAX:
            return
        if entry & OFFSET_MASK:
            places.add(kind, entry & OFFSET_MASK)
