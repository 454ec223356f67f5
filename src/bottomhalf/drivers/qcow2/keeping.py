# SPDX-License-Identifier: Apache-2.0
"""Persistent bitmaps of an open image: read when it is opened, written when it is closed, never believed after a crash.

Facts. A bitmap follows writes in memory, so the image's copy is wrong from the first write on. Other programs may open
the image after a crash of ours, and one that knows nothing of bitmaps may have written to it before.

Consequences, and what is done:

* before anybody writes, the directory on the disk says of each bitmap that it is in use (``co_begin_writing``). Only
  flags change, in place, so a crash in the midst of it leaves each of them good or in use, and nothing was written yet.
  Until then the node is sealed: writes fail;
* when the image is closed, becomes read-only or is handed over, tables, bits and a new directory are written to new
  places; then one write of the header names that directory, and then the old clusters are counted down (``co_store``).
  Before that write the image has the old directory, "in use"; after it the new one. A crash leaks clusters at worst;
* who finds a bitmap in use shows it as inconsistent: it can be removed, and nothing else;
* the header's autoclear bit says that bitmaps are as their last writer left them. Without it they are forgotten, and
  their clusters are leaks (``check`` gives them back).

Bitmaps that were made in memory are not in the image before it is closed. One that is removed leaves it at once.

Clause: "Bitmaps", "Bitmaps extension".
Invariant: a bitmap that may be wrong is never shown as right.
Test: tests/drivers/qcow2/test_bitmaps.py
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.dirty import NamedBitmap, check_usable, drop_bitmap, put_bitmap
from bottomhalf.block.errors import BlockError, ImageError
from bottomhalf.block.watching import watch_bitmaps
from bottomhalf.drivers.qcow2 import bitmaps, layout, overlap, tables
from bottomhalf.drivers.qcow2.bitmaps import ALL_ONES, AUTO, Bitmap
from bottomhalf.drivers.qcow2.header import Header

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node

LOADED_BITS_MAX: Final = 1 << 29  # bytes of memory that all bitmaps of one image may take
WRITTEN_BYTES_AT_ONCE: Final = 4 << 20


class KeptBitmaps:
    """The bitmaps that one image keeps. Home thread."""

    def __init__(self, node: Qcow2Node, guarded: Callable[[Coroutine[Any, Any, None]], Awaitable[None]]) -> None:
        """``guarded`` awaits something and does what has to be done about damage that is found."""
        self._node = node
        self._guarded = guarded
        self._metadata = node.metadata
        self.entries: list[Bitmap] = []  # of the directory on the disk
        self._offset = self._bytes = 0  # where that is
        self._loaded = False

    # -- reading ------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Let the node have the image's bitmaps, if it is active. OSError, ImageError."""
        node, metadata = self._node, self._metadata
        if not node.active:
            return
        self._loaded = True
        found = await co_read_directory(metadata.read, node.header)
        if found is None:
            return
        self.entries, self._offset, self._bytes = found
        room = LOADED_BITS_MAX
        for entry in self.entries:
            if entry.extra:
                raise ImageError("Bitmap extra data is not supported")
            if entry.name in node.bitmaps:
                raise ImageError(f"Bitmap already exists: {entry.name}")
            room -= 0 if entry.in_use else -(-node.header.size // entry.granularity)
            if room < 0:
                raise ImageError(f"the image's bitmaps have more than {LOADED_BITS_MAX} bits")
            bitmap = NamedBitmap(
                node.header.size,
                entry.granularity,
                entry.name,
                enabled=entry.auto,
                persistent=True,
                inconsistent=entry.in_use,
            )
            bitmap.read_only = True
            if not entry.in_use:
                await self._read_bits(entry, bitmap)
            put_bitmap(node, bitmap)

    async def _read_bits(self, entry: Bitmap, bitmap: NamedBitmap) -> None:
        header = self._node.header
        size = header.cluster_size
        if entry.table_size != bitmaps.table_entries(header.size, entry.granularity, size):
            raise ImageError(
                f"Could not read bitmap '{entry.name}' from image: its table has {entry.table_size} entries"
            )
        for n, found in enumerate(await self._table(entry)):
            first = n * size * 8
            if offset := bitmaps.data_offset(found):
                bitmap.load(first, await self._metadata.read(offset, size))
            else:
                bitmap.load_alike(first, size * 8, bool(found & ALL_ONES))

    async def _table(self, entry: Bitmap) -> array[int]:
        """A bitmap's table, checked."""
        table = tables.unpack(await self._metadata.read(entry.table_offset, entry.table_size * 8))
        for found in table:
            try:
                bitmaps.check_table_entry(found, self._node.header.cluster_size)
            except ImageError as error:
                text = f"Could not read bitmap_table table from image for bitmap '{entry.name}': {error}"
                raise ImageError(text) from error
        return table

    def forget_unknown(self) -> bool:
        """Take bitmaps that the last writer did not know out of the header; whether there were such."""
        header = self._node.header
        if header.extension(layout.EXTENSION_BITMAPS) is None or header.autoclear & layout.BITMAPS:
            return False
        header.set_extension(layout.EXTENSION_BITMAPS, None)
        return True

    @property
    def sealed(self) -> bool:
        """Whether the image says of a bitmap that its copy is good, or has some that the node does not."""
        return not self._loaded or any(bitmap.read_only for bitmap in self._node.bitmaps.values())

    # -- the life of an open image --------------------------------------------------------------------------------

    async def co_begin_writing(self) -> None:
        """Let the image say that its bitmaps are in use; then the node may be written to. Nothing happens if it may not
        be in any case. OSError, ImageError."""
        if self._node.active and not self._node.read_only:
            await self._guarded(self._begin())

    async def _begin(self) -> None:
        node, metadata = self._node, self._metadata
        if not self._loaded:
            await self.load()
        if not all(entry.in_use for entry in self.entries):
            async with metadata.lock:
                await metadata.find_places()
                for at in range(self._offset, self._offset + self._bytes, node.header.cluster_size):
                    metadata.places.table(at, overlap.BITMAP_DIRECTORY, node.header.cluster_size)
                marked = [entry.marked() for entry in self.entries]
                await metadata.write([(self._offset, bitmaps.pack_directory(marked))])
                await metadata.file.co_flush()
                self.entries = marked
        self._seal(False)

    def release(self) -> None:
        """The image may become another's: the node has its bitmaps no more. They are stored."""
        node = self._node
        for bitmap in [bitmap for bitmap in node.bitmaps.values() if bitmap.persistent]:
            drop_bitmap(node, bitmap)
        self.entries = []
        self._loaded = False

    def _seal(self, sealed: bool) -> None:
        for bitmap in self._node.bitmaps.values():
            if bitmap.persistent:
                bitmap.read_only = sealed
        watch_bitmaps(self._node)

    # -- writing ------------------------------------------------------------------------------------------------

    async def co_store(self) -> None:
        """Write all bitmaps that belong into the image; the node is sealed then. OSError, ImageError, and the image has
        what it had."""
        await self._guarded(self._store())

    async def _store(self) -> None:
        node, metadata = self._node, self._metadata
        wanted = {bitmap.name: bitmap for bitmap in node.bitmaps.values() if bitmap.persistent}
        if metadata.broken or all(bitmap.inconsistent or bitmap.read_only for bitmap in wanted.values()):
            return
        known = {entry.name for entry in self.entries}
        async with metadata.lock:
            await metadata.find_places()
            kept: list[Bitmap] = []
            old: list[int] = []
            taken: list[int] = []
            try:
                for entry in self.entries:
                    bitmap = wanted[entry.name]
                    if entry.in_use and bitmap.inconsistent:
                        kept.append(entry)
                    else:
                        old += await self._clusters_of(entry)
                        kept.append(await self._write_bits(bitmap, taken))
                for bitmap in reversed(wanted.values()):
                    if bitmap.name not in known and not bitmap.inconsistent:
                        kept.append(await self._write_bits(bitmap, taken))
                await self._replace(kept, old, taken)
            except BaseException:
                metadata.free_all(taken)
                raise
            await metadata.commit()
        self._seal(True)

    async def co_forget(self, name: str) -> None:
        """Take a bitmap out of the image, if it is there. OSError, ImageError."""
        await self._guarded(self._forget(name))

    async def _forget(self, name: str) -> None:
        metadata = self._metadata
        async with metadata.lock:
            entry = next((entry for entry in self.entries if entry.name == name), None)
            if entry is None:
                return
            await metadata.find_places()
            old = await self._clusters_of(entry)
            taken: list[int] = []
            try:
                await self._replace([each for each in self.entries if each is not entry], old, taken)
            except BaseException:
                metadata.free_all(taken)
                raise
            await metadata.commit()

    async def _write_bits(self, bitmap: NamedBitmap, taken: list[int]) -> Bitmap:
        """A bitmap's bits and table at new places, noted in ``taken``; its entry. With the lock held."""
        metadata, size = self._metadata, self._node.header.cluster_size
        bits = size * 8
        table = array("Q", [0]) * bitmaps.table_entries(bitmap.size, bitmap.granularity, size)
        clusters: list[int] = []  # that were allocated together and are not used yet
        missing: list[int] = []
        for n in range(len(table)):
            first = n * bits
            content = bitmap.content(first, min(bits, bitmap.bits - first)) if first < bitmap.bits else 0
            if content < 0:
                missing.append(n)
            elif content:
                table[n] = ALL_ONES
        pieces: list[tuple[int, bytes]] = []
        for at, n in enumerate(missing):
            if not clusters:
                await metadata.make_room_for_changes()
                start, count, _ = await metadata.allocate(len(missing) - at)
                clusters = list(range(start + count - 1, start - 1, -1))
                taken += clusters
            table[n] = clusters.pop() * size
            pieces.append((table[n], bitmap.packed(n * bits, bits)))
            if len(pieces) * size >= WRITTEN_BYTES_AT_ONCE:
                await metadata.write(pieces)
                pieces = []
        await metadata.write(pieces)
        where = await self._place(tables.pack(table), taken)
        flags = AUTO if bitmap.enabled else 0
        return Bitmap(bitmap.name, where, len(table), flags, bitmap.granularity.bit_length() - 1)

    async def _place(self, data: bytes, taken: list[int]) -> int:
        """Write a table to a new place, in whole clusters; its offset. With the lock held."""
        metadata, header = self._metadata, self._node.header
        await metadata.make_room_for_changes()
        count = -(-len(data) >> header.cluster_bits)
        first = await metadata.allocate_together(count)
        taken += range(first, first + count)
        where = first << header.cluster_bits
        await metadata.write([(where, data + bytes(-len(data) % header.cluster_size))])
        return where

    async def _replace(self, entries: list[Bitmap], old: list[int], taken: list[int]) -> None:
        """From the next commit on the header names a directory with these entries, and the clusters ``old`` and those
        of the directory before are not used. With the lock held."""
        metadata, header = self._metadata, self._node.header
        data = bitmaps.pack_directory(entries)
        if len(data) > bitmaps.DIRECTORY_BYTES_MAX or len(entries) > bitmaps.BITMAPS_MAX:
            raise OSError(errno.EFBIG, "Not enough space in the bitmap directory", self._node.name)
        where = await self._place(data, taken) if entries else 0
        before = header.extension(layout.EXTENSION_BITMAPS)
        extension = bitmaps.pack_extension(len(entries), where, len(data)) if entries else None
        header.set_extension(layout.EXTENSION_BITMAPS, extension)
        try:
            header.to_bytes()  # whether it fits
        except ImageError:
            header.set_extension(layout.EXTENSION_BITMAPS, before)
            raise
        header.autoclear &= ~layout.BITMAPS
        header.autoclear |= layout.BITMAPS if entries else 0
        metadata.header_changed()
        first = self._offset >> header.cluster_bits
        metadata.free_all([*old, *range(first, first + -(-self._bytes >> header.cluster_bits))])
        self.entries, self._offset, self._bytes = entries, where, len(data)
        if entries:
            metadata.places.add(overlap.BITMAP_DIRECTORY, where, len(data))

    async def _clusters_of(self, entry: Bitmap) -> list[int]:
        """The clusters of a bitmap's table and bits. Corruption if other tables lie there: they are not to be freed."""
        metadata, header = self._metadata, self._node.header
        size, bits = header.cluster_size, header.cluster_bits
        found = [bitmaps.data_offset(each) >> bits for each in await self._table(entry) if bitmaps.data_offset(each)]
        first = entry.table_offset >> bits
        found += range(first, first + -(-entry.table_size * 8 >> bits))
        for cluster in found:
            metadata.places.table(cluster << bits, 0, size)
        return found

    # -- checks -------------------------------------------------------------------------------------------------

    def check_can_store(self, name: str, granularity: int) -> None:
        """BlockError unless there is room for one bitmap more."""
        node = self._node
        try:
            self._check_room(name, granularity)
        except BlockError as error:
            raise BlockError(f"Can't make bitmap '{name}' persistent in '{node.name}': {error}") from error

    def _check_room(self, name: str, granularity: int) -> None:
        node = self._node
        if node.header.version < 3:
            raise BlockError("Cannot store dirty bitmaps in qcow2 v2 files")
        if granularity.bit_length() - 1 > bitmaps.GRANULARITY_BITS_MAX:
            raise BlockError(f"Granularity exceeds maximum ({1 << bitmaps.GRANULARITY_BITS_MAX} bytes)")
        if -(-node.size // granularity) > bitmaps.BITS_BYTES_MAX * 8:
            raise BlockError("Too much space will be occupied by the bitmap. Use larger granularity")
        if len(name.encode("utf-8", "surrogateescape")) > bitmaps.NAME_BYTES_MAX:
            raise BlockError(f"Name length exceeds maximum ({bitmaps.NAME_BYTES_MAX} characters)")
        names = {entry.name for entry in self.entries}
        names |= {bitmap.name for bitmap in node.bitmaps.values() if bitmap.persistent}
        if len(names) >= bitmaps.BITMAPS_MAX:
            raise BlockError("Maximum number of persistent bitmaps is already reached")
        if sum(map(bitmaps.entry_bytes, [*names, name])) > bitmaps.DIRECTORY_BYTES_MAX:
            raise BlockError("Not enough space in the bitmap directory")

    def check_resize(self) -> None:
        """BlockError if a bitmap cannot follow the disk's size."""
        for bitmap in self._node.bitmaps.values():
            if bitmap.persistent:
                check_usable(bitmap)


async def co_read_directory(
    read: Callable[[int, int], Awaitable[bytearray]], header: Header
) -> tuple[list[Bitmap], int, int] | None:
    """The image's directory of bitmaps, its offset and bytes; None if it has none, or none to be believed.
    ``read(offset, length)`` is awaited. OSError, ImageError."""
    extension = header.extension(layout.EXTENSION_BITMAPS)
    if extension is None or not header.autoclear & layout.BITMAPS:
        return None
    count, offset, length = bitmaps.parse_extension(extension, header.cluster_size)
    return bitmaps.parse_directory(await read(offset, length), count, header.cluster_size), offset, length
