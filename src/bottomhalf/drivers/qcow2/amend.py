# SPDX-License-Identifier: Apache-2.0
"""Change what an image is: its version, the width of its counters, lazy refcounts, size, data file (qemu-img amend).

The order is QEMU's: to version 3 first, because what follows may need it, and back to version 2 last. Each step is
durable before the next one begins and leaves a good image, so a crash in between leaves an image of which less was
changed. The header is what switches, and its first sector is written in one piece after everything that it refers to.

    await co_amend(node, AmendOptions(compat="1.1", refcount_bits=64))     # alone with the image

What the image's L1 and L2 tables depend on (cluster size, extended entries) can only be chosen when it is made.

Clause: "Header"; the order is QEMU's.
Invariant: after each step a good image that reads the same.
Test: tests/drivers/qcow2/test_amend.py
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from os import fspath
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.errors import BlockError
from bottomhalf.drivers.keywords import check_kind, check_names
from bottomhalf.drivers.qcow2 import layout, refcounts, snapshots, tables
from bottomhalf.drivers.qcow2.expanding import co_expand
from bottomhalf.drivers.qcow2.resizing import check_size

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.header import Header
    from bottomhalf.drivers.qcow2.metadata import Metadata
    from bottomhalf.drivers.qcow2.node import Qcow2Node

VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
VM_STATE_BYTES_V2_MAX: Final = 0xFFFFFFFF  # of a snapshot, which has 32 bits for it
CREATE_ONLY: Final = frozenset(("cluster_size", "preallocation", "compression_type", "extended_l2", "encryption"))


@dataclass(frozen=True)
class AmendOptions:
    """What is to be changed; None: it stays as it is. Names and meanings are those of qemu-img amend."""

    compat: str | None = None
    refcount_bits: int | None = None
    lazy_refcounts: bool | None = None
    data_file: str | None = None  # the name only: nothing is copied; "" forgets it
    data_file_raw: bool | None = None
    size: int | None = None
    backing_file: str | None = None
    backing_fmt: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> AmendOptions:
        """From the library's keywords. ValueError for one that there is not, or that has no such value."""
        check_names(given, [field.name for field in fields(cls)], "there is")
        made = {name: value for name, value in given.items() if value is not None}
        if "data_file" in made:
            made["data_file"] = fspath(made["data_file"])
        for name, value in made.items():
            check_kind(name, value, _KINDS.get(name, str))
        return cls(**made)


_KINDS: Final = {"lazy_refcounts": bool, "data_file_raw": bool, "refcount_bits": int, "size": int}


async def co_amend(node: Qcow2Node, options: AmendOptions) -> None:
    """Carry it out, or refuse it before anything has changed. BlockError, OSError."""
    header, metadata = node.header, node.metadata
    metadata.settings = replace(metadata.settings, lazy=False)  # nothing is left to be counted later
    version = await co_check(node, options)
    if version > header.version:
        await _upgrade(node)
    if options.refcount_bits is not None:
        await _change_width(node, options.refcount_bits.bit_length() - 1)
    async with metadata.lock:
        if options.data_file is not None or options.data_file_raw is False:
            _set_names(header, options)
            metadata.header_changed()
        if options.lazy_refcounts is not None:
            header.compatible &= ~layout.LAZY_REFCOUNTS
            header.compatible |= layout.LAZY_REFCOUNTS if options.lazy_refcounts else 0
            metadata.header_changed()
        await metadata.commit()
    if options.size is not None and options.size != header.size:
        await node.co_truncate(options.size)
    if version < header.version:
        await _downgrade(node)


def _version(compat: str) -> int:
    if compat not in VERSIONS:
        raise BlockError(f"Unknown compatibility level {compat}")
    return VERSIONS[compat]


async def co_check(node: Qcow2Node, options: AmendOptions) -> int:
    """Whether it can be carried out, as far as can be known before anything has changed; the version that the image is
    to have. BlockError, OSError."""
    header, metadata = node.header, node.metadata
    version = header.version if options.compat is None else _version(options.compat)
    async with metadata.lock:
        await metadata.settle()
        _check(node, options, version)
        if version != header.version:
            size = header.size if options.size is None else options.size
            _check_snapshots((await snapshots.co_read(metadata, names=False))[0], version, size)
        if options.refcount_bits is not None and options.refcount_bits < 1 << header.refcount_order:
            await _used(metadata, refcounts.refcount_max(options.refcount_bits.bit_length() - 1))
    return version


def _check_snapshots(known: list[snapshots.Snapshot], version: int, size: int) -> None:
    """Whether they can be in an image of another version, whose disk has that size."""
    for snapshot in known:
        if version >= 3 and snapshot.disk_bytes is None:
            raise BlockError("a snapshot does not say the size of its disk, as version 3 requires; delete it first")
        # Version 2 need not know where a snapshot says more than that its disk is like the image's.
        if version < 3 and (
            snapshot.disk_bytes not in (None, size) or snapshot.vm_state_bytes > VM_STATE_BYTES_V2_MAX
        ):
            raise BlockError("Internal snapshots prevent downgrade of image")


def _check(node: Qcow2Node, options: AmendOptions, version: int) -> None:
    """What the header and the options say. BlockError, OSError; the texts are QEMU's."""
    header = node.header
    for given, now in ((options.backing_file, header.backing_file), (options.backing_fmt, header.backing_format)):
        if given is not None and given != (now or ""):
            raise BlockError("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.")
    bits = options.refcount_bits
    if bits is not None and (not 1 <= bits <= 64 or bits & (bits - 1)):
        raise BlockError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3:
        if bits not in (None, 16):
            raise BlockError(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above "
                "(use compat=1.1 or greater)"
            )
        if bits is None and 1 << header.refcount_order != 16:
            raise BlockError("compat=0.10 requires refcount_bits=16")
        if options.lazy_refcounts:
            raise BlockError(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
            )
        _check_downgrade(node)
    if options.data_file is not None and not header.external:
        raise BlockError("data-file can only be set for images that use an external data file")
    if options.data_file_raw and not header.raw_data:
        raise BlockError("data-file-raw cannot be set on existing images")
    if options.size is not None and (options.size < 0 or options.size % layout.SECTOR_BYTES):
        raise BlockError("The new size must be a multiple of 512")
    if options.size is not None and options.size != header.size:
        check_size(node, options.size, max(version, header.version))
    larger = replace(header, version=max(version, header.version), extensions=list(header.extensions))
    _set_names(larger, options)
    larger.to_bytes()  # whether it fits


def _check_downgrade(node: Qcow2Node) -> None:
    header = node.header
    if header.external:
        raise BlockError("Cannot downgrade an image with a data file")
    if header.incompatible:
        raise BlockError(f"Cannot downgrade an image with incompatible features {header.incompatible:#x} set")
    if header.autoclear & layout.BITMAPS and header.extension(layout.EXTENSION_BITMAPS) is not None:
        raise BlockError("Cannot downgrade an image with bitmaps; remove them first")


def _set_names(header: Header, options: AmendOptions) -> None:
    if options.data_file is not None:
        name = options.data_file.encode("utf-8", "surrogateescape")
        header.set_extension(layout.EXTENSION_DATA_FILE, name or None)
    if options.data_file_raw is False:
        header.autoclear &= ~layout.RAW_DATA


async def co_rebase(node: Qcow2Node, backing: str | None, format: str | None) -> None:
    """Name another backing file, or none; nothing is read from either. BlockError, OSError."""
    check_backing(node, backing, format)
    async with node.metadata.lock:
        _set_backing(node.header, backing, format)
        node.metadata.header_changed()
        await node.metadata.commit()


def check_backing(node: Qcow2Node, backing: str | None, format: str | None) -> None:
    """BlockError, ImageError if the image cannot name that backing file."""
    if backing is not None and node.header.raw_data:
        raise BlockError("Cannot set a backing file for an image with a raw data file")
    header = replace(node.header, extensions=list(node.header.extensions))
    _set_backing(header, backing, format)
    header.to_bytes()  # whether it fits


def _set_backing(header: Header, backing: str | None, format: str | None) -> None:
    header.backing_file = backing or None
    kept = None if format is None or not backing else format.encode("utf-8", "surrogateescape")
    header.set_extension(layout.EXTENSION_BACKING_FORMAT, kept)


# -- version --------------------------------------------------------------------------------------------------------


async def _upgrade(node: Qcow2Node) -> None:
    header, metadata = node.header, node.metadata
    async with metadata.lock:
        header.version = 3
        header.refcount_order = layout.REFCOUNT_ORDER_DEFAULT
        header.compatible = header.autoclear = 0
        header.header_bytes = layout.HEADER_BYTES_WRITTEN
        metadata.header_changed()
        await metadata.commit()


async def _downgrade(node: Qcow2Node) -> None:
    """Version 2 has no clusters that read as zeroes by their entry: they become what reads so without it."""
    header, metadata = node.header, node.metadata
    await co_expand(node)
    async with metadata.lock:
        await metadata.commit()
        header.version = 2
        header.compatible = header.autoclear = 0
        header.unknown = b""
        header.header_bytes = layout.HEADER_BYTES_V2
        metadata.header_changed()
        await metadata.commit()


# -- counters -------------------------------------------------------------------------------------------------------


async def _change_width(node: Qcow2Node, order: int) -> None:
    """Give the counters another width: all of them are written anew, then the header names the new ones."""
    header, metadata = node.header, node.metadata
    if order == header.refcount_order:
        return
    bits, size = header.cluster_bits, header.cluster_size
    limit, per_block = refcounts.refcount_max(order), refcounts.entries_of_block(bits, order)
    async with metadata.lock:
        await metadata.settle()
        used = await _used(metadata, limit)
        # The new blocks and their table lie side by side, and have to count themselves, and what it took to place them.
        first = places = 0
        while True:
            blocks = -(-used // per_block)
            table_clusters = -(-blocks * 8 // size)
            if table_clusters << bits > layout.REFCOUNT_TABLE_BYTES_MAX:
                raise BlockError(f"the image is too big for counters of {1 << order} bits")
            if blocks + table_clusters <= places:
                break
            if places:
                metadata.free_all(range(first, first + places))
            places = blocks + table_clusters
            first = await metadata.allocate_together(places)
            await metadata.settle()
            used = await _used(metadata, limit)
        await _write_counters(metadata, order, first, blocks)
        table = array("Q", [0]) * (table_clusters * size // 8)
        for n in range(blocks):
            table[n] = (first + n) << bits
        table_at = (first + blocks) << bits
        await metadata.write([(table_at, tables.pack(table))])
        await metadata.file.co_flush()
        before = header.refcount_table_offset >> bits
        old = [entry >> bits for entry in metadata.refcount_table if entry]
        old += range(before, before + header.refcount_table_clusters)
        await metadata.use_counters(order, table, table_at)
        metadata.free_all([*old, *range(first + blocks + table_clusters, first + places)])
        await metadata.settle()


async def _used(metadata: Metadata, limit: int) -> int:
    """The end of what is counted, in clusters. BlockError for a counter above the limit."""
    header, used = metadata.header, 0
    per_block = refcounts.entries_of_block(header.cluster_bits, header.refcount_order)
    for index, entry in enumerate(metadata.refcount_table):
        if not entry:
            continue
        counts = await metadata.counts(index * per_block, per_block)
        for at, count in enumerate(counts):
            if count > limit:
                raise BlockError(
                    f"Cannot decrease refcount entry width to {limit.bit_length()} bits: Cluster at offset "
                    f"{index * per_block + at << header.cluster_bits:#x} has a refcount of {count}"
                )
            if count:
                used = index * per_block + at + 1
    return used


async def _write_counters(metadata: Metadata, order: int, first: int, blocks: int) -> None:
    """All counters, in blocks of another width, from cluster ``first`` on."""
    bits = metadata.header.cluster_bits
    per_block = refcounts.entries_of_block(bits, order)
    for n in range(blocks):
        block = refcounts.of(await metadata.counts(n * per_block, per_block), order)
        await metadata.write([((first + n) << bits, refcounts.pack(block, order))])
