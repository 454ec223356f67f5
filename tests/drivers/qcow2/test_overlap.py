# SPDX-License-Identifier: Apache-2.0
"""A damaged image is not damaged further: a write that would land in a table is prevented, the image is marked corrupt,
users are told, and nothing is written any more."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bottomhalf.block import BlockError
from bottomhalf.drivers.qcow2 import overlap
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.layout import COPIED, CORRUPT, OFFSET_MASK
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.drivers.qcow2.bench import Disk, disk, make, replace

CLUSTER = 4096
SIZE = 40 * CLUSTER


def image(host: SimHost) -> tuple[bytearray, Header, int]:
    """An image with a cluster of data, its header, and where its L2 table is."""
    make(host, "disk.qcow2", size=SIZE, cluster_size=CLUSTER)
    with disk(host, "disk.qcow2") as opened:
        opened.run(opened.backend.co_pwrite(0, b"d" * CLUSTER))
    content = bytearray(host.content("disk.qcow2"))
    header = Header.parse(bytes(content))
    return content, header, int.from_bytes(content[header.l1_offset :][:8], "big") & OFFSET_MASK


def forget(content: bytearray, header: Header, offset: int) -> None:
    """A counter says that a cluster is free."""
    block = int.from_bytes(content[header.refcount_table_offset :][:8], "big")
    at = block + offset // CLUSTER * 2
    content[at : at + 2] = b"\0\0"


def lead(content: bytearray, l2: int, index: int, offset: int) -> None:
    """An entry leads elsewhere."""
    content[l2 + 8 * index : l2 + 8 * index + 8] = (offset | COPIED).to_bytes(8, "big")


def is_marked(host: SimHost) -> bool:
    return bool(Header.parse(host.content("disk.qcow2")).incompatible & CORRUPT)


def refused(opened: Disk, offset: int) -> list[tuple[Any, ...]]:
    """The write fails and the node is of no use any more; what the graph's user was told."""
    told: list[tuple[Any, ...]] = []
    opened.graph.image_corrupted = lambda *arguments: told.append(arguments)
    with pytest.raises(OSError) as failed:
        opened.run(opened.backend.co_pwrite(offset, b"x" * CLUSTER))
    assert failed.value.errno == errno.EIO
    for body in (opened.backend.co_pwrite(0, b"x"), opened.backend.co_pread(0, 1), opened.backend.co_flush()):
        with pytest.raises(OSError) as failed:
            opened.run(body)
        assert failed.value.errno == errno.ENOMEDIUM
    return told


@pytest.mark.parametrize("name, where", [
    ("active L1 table", "l1"), ("active L2 table", "l2"), ("refcount block", "block"), ("refcount table", "table"),
])
@pytest.mark.parametrize("how", ["a counter is lost", "an entry leads there"])
def test_each_table(name: str, where: str, how: str) -> None:
    host = SimHost(0)
    content, header, l2 = image(host)
    place = {
        "l1": header.l1_offset,
        "l2": l2,
        "table": header.refcount_table_offset,
        "block": int.from_bytes(content[header.refcount_table_offset :][:8], "big"),
    }[where]
    if how == "a counter is lost":
        forget(content, header, place)
    else:
        lead(content, l2, 1, place)
    replace(host, "disk.qcow2", content)
    opened = Disk(host, "disk.qcow2")
    told = refused(opened, CLUSTER)
    text = f"Marking image as corrupt: Preventing invalid write on metadata (overlaps with {name}); further corruption"
    assert [(at, size, fatal) for _, _, at, size, fatal in told] == [(place, CLUSTER, True)]
    assert told[0][1].startswith(text)
    opened.close()
    assert is_marked(host)
    after = host.content("disk.qcow2")
    assert after[CLUSTER:] == content[CLUSTER:], "nothing else was written"
    with pytest.raises(BlockError, match="Image is corrupt; cannot be opened read/write"):
        Disk(host, "disk.qcow2")
    with disk(host, "disk.qcow2", **{"read-only": True}) as again:
        assert again.run(again.backend.co_pread(0, 1)) == b"d"


def test_levels() -> None:
    """What is not protected is written over, as the user wished."""
    for given, caught in (
        ("none", False),
        ("constant", False),
        ("cached", True),
        ("all", True),
        ({"template": "all", "active-l2": False}, False),
        ({"template": "none", "active-l2": True}, True),
        ({}, True),
    ):
        host = SimHost(0)
        content, _, l2 = image(host)
        lead(content, l2, 1, l2)
        replace(host, "disk.qcow2", content)
        opened = Disk(host, "disk.qcow2", **{"overlap-check": given})
        if caught:
            refused(opened, CLUSTER)
        else:
            opened.run(opened.backend.co_pwrite(CLUSTER, bytes(CLUSTER)))
        opened.close()
        assert is_marked(host) == caught, given


def test_flags() -> None:
    assert overlap.flags_of(None) == overlap.LEVELS["cached"]
    every = overlap.LEVELS["all"]
    assert every == sum(overlap.NAMES)

    def given(value: Any) -> int:
        options = {"driver": "qcow2", "file": "f", "overlap-check": value}
        return overlap.flags_of(from_json(BlockdevOptions, options).branch.overlap_check)  # type: ignore[attr-defined]

    names = ("main-header", "active-l1", "active-l2", "refcount-table", "refcount-block", "snapshot-table",
             "inactive-l1", "inactive-l2", "bitmap-directory")
    for name, bit in zip(names, overlap.NAMES, strict=True):
        assert given({"template": "none", name: True}) == bit
        assert given({"template": "all", name: False}) == every & ~bit


def test_places_move_with_tables(seed: int) -> None:
    """A cluster that a table has left may hold data: no false alarm, however long the image is used."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=512, cluster_size=512)
    with disk(host, "disk.qcow2", **{"overlap-check": "all"}) as opened:
        for size in (100, 1000, 5000, 20000):  # L1 and the refcount table move
            opened.run(opened.backend.co_truncate(size * 512))
            for n in range(0, size, size // 60 + 1):
                opened.run(opened.backend.co_pwrite(n * 512, b"x" * 512))
            for n in range(0, size, size // 30 + 1):
                opened.run(opened.backend.co_discard(n * 512, 512))
            opened.run(opened.backend.co_flush())
        kinds = opened.node.metadata.places
        header = opened.node.header
        with pytest.raises(overlap.Corruption, match="active L1"):
            kinds.table(header.l1_offset, 0, 512)
    assert not is_marked(host)
