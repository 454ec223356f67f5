# SPDX-License-Identifier: Apache-2.0
"""The format as numbers, without a file: what the specification says of bits and bytes, said here a second time and
as slowly as possible."""

from __future__ import annotations

import struct
from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.drivers.qcow2 import bitmaps, refcounts, snapshots, tables
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED, EXTENDED_L2, OFFSET_MASK, ZERO
from bottomhalf.drivers.qcow2.snapshots import Snapshot
from bottomhalf.drivers.qcow2.tables import DATA, SQUEEZED, UNALLOCATED, ZEROES, Mapping

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = {bits: st.integers(0, (1 << bits) - 1) for bits in (16, 32, 56, 63, 64)}


# -- refcounts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(7))
@given(st.binary(min_size=64, max_size=64))
def test_counters(order: int, block: bytes) -> None:
    """Chapter "Host cluster management": below a byte from the least significant bit on, else big-endian."""
    width = 1 << order
    found = refcounts.unpack(block, order)
    for index, count in enumerate(found):
        if width < 8:
            assert count == block[index * width // 8] >> index * width % 8 & (1 << width) - 1
        else:
            assert count == int.from_bytes(block[index * width // 8 : (index + 1) * width // 8], "big")
    assert len(found) == 512 // width
    assert refcounts.pack(found, order) == block == refcounts.pack(refcounts.of(list(found), order), order)


@pytest.mark.parametrize("order", range(7))
def test_a_new_block(order: int) -> None:
    assert refcounts.pack(refcounts.empty(9, order), order) == bytes(512)
    assert refcounts.entries_of_block(9, order) == 512 * 8 >> order
    assert refcounts.refcount_max(order) == 2 ** 2**order - 1


# -- cluster mapping --------------------------------------------------------------------------------------------------

PLACES = st.integers(1, 6).map(lambda n: n << 14)  # near each other, so that some lie side by side
PLAIN = st.one_of(
    st.just(0),
    st.builds(lambda place, flag: place | flag, PLACES, st.sampled_from([0, COPIED])),
    st.builds(lambda place: place | ZERO, st.just(0) | PLACES),
    st.builds(lambda at: COMPRESSED | at, NUMBERS[32]),
)


@st.composite
def extended(draw: st.DrawFn) -> tuple[int, int]:
    entry = draw(st.one_of(st.just(0), PLACES, st.builds(lambda at: COMPRESSED | at, NUMBERS[32])))
    if entry & COMPRESSED:
        return entry, 0
    allocated = draw(NUMBERS[32]) if entry else 0
    return entry, allocated | (draw(NUMBERS[32]) & ~allocated) << 32


def slowly(mapping: Mapping, table: array[int], offset: int) -> tuple[int, int]:
    """What one guest byte is: its kind, and where it is stored (of a compressed one, the entry)."""
    index, inside = offset >> mapping.cluster_bits, offset & mapping.cluster_size - 1
    entry = table[index * mapping.words]
    place = entry & OFFSET_MASK
    if entry & COMPRESSED:
        return SQUEEZED, entry
    if mapping.extended:
        sub = inside * 32 // mapping.cluster_size
        bitmap = table[index * 2 + 1]
        if bitmap >> sub & 1:
            return DATA, place + inside
        return (ZEROES if bitmap >> 32 + sub & 1 else UNALLOCATED), 0
    if entry & ZERO:
        return ZEROES, 0
    return (DATA, place + inside) if place else (UNALLOCATED, 0)


def see_runs(mapping: Mapping, table: array[int], offset: int, length: int) -> None:
    """The runs are what the bytes are, all of them, and as long as can be."""
    at, step = offset, 512
    before: tables.Run | None = None
    for run in mapping.runs(table, offset, length):
        assert run.length > 0
        for inside in {*range(0, run.length, step), run.length - 1}:
            kind, place = slowly(mapping, table, at + inside)
            assert kind == run.kind
            assert place == (run.host + inside if kind == DATA else run.host)
        if before is not None and before.kind == run.kind:
            assert run.kind == SQUEEZED or (run.kind == DATA and before.host + before.length != run.host)
        before, at = run, at + run.length
    assert at == offset + length


@given(st.data(), st.lists(PLAIN, min_size=8, max_size=8))
def test_runs(data: st.DataObject, entries: list[int]) -> None:
    mapping = Mapping(14, extended=False)
    table = array("Q", entries + [0] * (mapping.entries - 8))
    offset = data.draw(st.integers(0, (8 << 14) - 1))
    length = data.draw(st.integers(1, (8 << 14) - offset))
    see_runs(mapping, table, offset, length)
    if (place := mapping.side_by_side(table, offset, length)) != 0:
        assert list(mapping.runs(table, offset, length)) == [(DATA, place, length)]


@given(st.data(), st.lists(extended(), min_size=4, max_size=4))
def test_runs_of_subclusters(data: st.DataObject, entries: list[tuple[int, int]]) -> None:
    mapping = Mapping(14, extended=True)
    table = array("Q", [word for entry in entries for word in entry] + [0] * (2 * mapping.entries - 8))
    offset = data.draw(st.integers(0, (4 << 14) - 1))
    see_runs(mapping, table, offset, data.draw(st.integers(1, (4 << 14) - offset)))


@given(st.binary(max_size=10).map(lambda data: data * 8))
def test_tables_are_big_endian(data: bytes) -> None:
    found = tables.unpack(data)
    assert list(found) == list(struct.unpack(f">{len(data) // 8}Q", data))
    assert tables.pack(found) == data


@given(st.integers(9, 21), NUMBERS[56], st.data())
def test_where_compressed_bytes_lie(bits: int, offset: int, data: st.DataObject) -> None:
    """Chapter "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8) bits of offset, then sectors less one."""
    mapping = Mapping(bits, extended=False)
    split = 62 - (bits - 8)
    offset %= (1 << min(split, 56)) - (1 << bits)
    length = data.draw(st.integers(1, 1 << bits))
    entry = mapping.squeezed_entry(offset, length)
    assert entry & COMPRESSED and not entry & COPIED
    assert entry & (1 << split) - 1 == offset
    sectors = (entry & ~COMPRESSED) >> split
    assert offset // 512 + sectors == (offset + length - 1) // 512
    assert mapping.squeezed(entry)[0] == offset and length <= mapping.squeezed(entry)[1] < length + 512


# -- header -----------------------------------------------------------------------------------------------------------


@given(
    version=st.sampled_from([2, 3]),
    bits=st.sampled_from([12, 16, 21]),
    clusters=st.integers(0, 1 << 20),
    backing=st.none() | TEXT.filter(bool),
    extensions=st.lists(st.tuples(st.integers(1, 9), st.binary(max_size=40)), max_size=5, unique_by=lambda e: e[0]),
    unknown=st.integers(0, 4).map(lambda n: bytes(range(1, 8 * n + 1))),
    numbers=st.fixed_dictionaries({"autoclear": NUMBERS[64], "compatible": NUMBERS[64]}),
    order=st.integers(0, 6),
)
def test_what_a_header_says_it_says_again(
    version: int,
    bits: int,
    clusters: int,
    backing: str | None,
    extensions: list[tuple[int, bytes]],
    unknown: bytes,
    numbers: dict[str, int],
    order: int,
) -> None:
    """Chapters "Header" and "Header extensions": also what we do not know comes out as it came in."""
    made = Header(
        size=clusters << 9,
        cluster_bits=bits,
        version=version,
        backing_file=backing,
        l1_size=clusters,  # more than enough
        l1_offset=3 << bits,
        refcount_table_offset=1 << bits,
        refcount_table_clusters=1,
        extensions=extensions,
    )
    if version == 3:
        made = replace(made, refcount_order=order, unknown=unknown, incompatible=EXTENDED_L2 * (bits > 13), **numbers)
        made.header_bytes += len(unknown)
    else:
        made.header_bytes = 72
    found = Header.parse(made.to_bytes().ljust(1 << bits, b"\0"))
    names = [each for each in found.extensions if each not in extensions]
    assert {kind for kind, _ in names} <= {0x6803F857}  # the table of feature names, which we write ourselves
    found.extensions = [each for each in found.extensions if each not in names]
    assert found == made


# -- tables of names --------------------------------------------------------------------------------------------------

SNAPSHOTS = st.builds(
    Snapshot,
    id=TEXT,
    name=TEXT,
    l1_offset=st.integers(0, 1 << 40).map(lambda n: n << 16),
    l1_size=st.integers(0, 1 << 22),
    date_s=NUMBERS[32],
    date_ns=NUMBERS[32],
    vm_clock_ns=NUMBERS[64],
    vm_state_bytes=NUMBERS[64],
    disk_bytes=NUMBERS[64],
    icount=st.none() | NUMBERS[64],
)


@given(st.lists(SNAPSHOTS, max_size=4))
def test_a_table_of_snapshots(entries: list[Snapshot]) -> None:
    """Chapter "Snapshots": entries begin at multiples of eight."""
    packed = snapshots.pack(entries, 0)
    assert snapshots.parse(packed + b"more", len(entries), 65536) == (entries, len(packed))
    if entries:
        head = struct.unpack(">QIHHIIQII", packed[:40])
        assert head[:2] == (entries[0].l1_offset, entries[0].l1_size)
        assert head[7] == min(entries[0].vm_state_bytes, 0xFFFFFFFF)
        assert head[8] == (24 if entries[0].icount is not None else 16)


BITMAPS: st.SearchStrategy[Any] = st.builds(
    bitmaps.Bitmap,
    name=TEXT.filter(bool),
    table_offset=st.integers(1, 1 << 39).map(lambda n: n << 16),
    table_size=st.integers(1, bitmaps.BITS_BYTES_MAX >> 16),
    flags=st.integers(0, 7),
    granularity_bits=st.integers(9, 31),
    extra=st.binary(max_size=30),
)


@given(st.lists(BITMAPS, max_size=4))
def test_a_directory_of_bitmaps(entries: list[bitmaps.Bitmap]) -> None:
    """Chapter "Bitmaps"."""
    packed = bitmaps.pack_directory(entries)
    assert bitmaps.parse_directory(packed, len(entries), 65536) == entries
    assert len(packed) == sum(bitmaps.entry_bytes(each.name) for each in entries if not each.extra) + sum(
        -(-(24 + len(each.extra) + len(each.name.encode())) // 8) * 8 for each in entries if each.extra
    )
