# SPDX-License-Identifier: Apache-2.0
"""Guests' data in a file of their own: opened through the gate only, every cluster in its place, and, if it is raw,
readable by others at every moment. (Crashes and failing I/O: test_crash, test_faults.)"""

from __future__ import annotations

import random
from typing import Any

import pytest

from bottomhalf.aio import AioContext, gather
from bottomhalf.block import BlockError, Graph
from bottomhalf.drivers.qcow2 import layout
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.registry import open_node
from bottomhalf.host.request import WRITE
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.drivers.qcow2.bench import check, disk, make, replace

CLUSTER = 4096
SIZE = 20 * CLUSTER


def opened_by_options(host: SimHost, *, follow_names: bool = False, **more: Any) -> None:
    context = AioContext(host)
    graph = Graph(context)
    file = {"driver": "file", "filename": "disk.qcow2"}
    try:
        node = open_node(graph, from_json(BlockdevOptions, {"driver": "qcow2", "file": file, **more}),
                         follow_names=follow_names)
        node.monitor_owned = True
    finally:
        graph.close()
        context.close()


def test_the_gate() -> None:
    """The file that the image names is opened if names may be followed; one that was given, always; else none."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=SIZE, data_file="data.raw")
    with pytest.raises(BlockError, match=r"The image names a data file, .data\.raw., which is not opened unless"):
        opened_by_options(host)
    opened_by_options(host, follow_names=True)
    opened_by_options(host, **{"data-file": {"driver": "file", "filename": "data.raw"}})


def test_a_name_is_a_path_and_nothing_else() -> None:
    """Whatever it looks like."""
    for name in ('json:{"driver":"file","filename":"secret"}', "nbd:unix:/secret"):
        host = SimHost(0)
        host.add_file("secret", b"secret")
        host.create_file(name, 0)
        make(host, "disk.qcow2", size=SIZE, data_file=name)
        with disk(host, "disk.qcow2") as opened:
            assert opened.node.data.filename == name  # type: ignore[attr-defined]


def test_one_that_is_missing_or_not_wanted() -> None:
    host = SimHost(0)
    make(host, "disk.qcow2", size=SIZE)
    with pytest.raises(BlockError, match="'data-file' can only be set for images with an external data file"):
        host.create_file("data.raw", 0)
        opened_by_options(host, **{"data-file": {"driver": "file", "filename": "data.raw"}})
    make(host, "other.qcow2", size=SIZE, data_file="data.raw")
    header = Header.parse(host.content("other.qcow2"))
    header.set_extension(layout.EXTENSION_DATA_FILE, None)
    image = header.to_bytes().ljust(header.cluster_size, b"\0") + host.content("other.qcow2")[header.cluster_size :]
    replace(host, "disk.qcow2", image)
    with pytest.raises(BlockError, match="'data-file' is required for this image"):
        opened_by_options(host, follow_names=True)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("extended", [False, True])
def test_random_changes(seed: int, raw: bool, passes: bool, extended: bool) -> None:
    """Equal to a model; a raw file is equal to it byte for byte, discards included. Only tables are counted."""
    host, chance = SimHost(seed), random.Random(seed)
    cluster = 16384 if extended else CLUSTER
    size = 12 * cluster + 512
    make(host, "disk.qcow2", size=size, cluster_size=cluster, extended_l2=extended,
         data_file="data.raw", data_file_raw=raw)
    model = bytearray(size)
    with disk(host, "disk.qcow2", **{"pass-discard-request": passes}) as opened:
        for number in range(40):
            length = min(chance.choice((1, 512, cluster // 2, cluster, 3 * cluster)), size)
            offset = chance.randrange(0, size - length + 1) // 512 * 512
            what = chance.randrange(6)
            if what < 3:
                opened.run(opened.backend.co_pwrite(offset, bytes([number + 1]) * length))
                model[offset : offset + length] = bytes([number + 1]) * length
            elif what == 3:
                opened.run(opened.backend.co_write_zeroes(offset, length, number % 2 * 2))
                model[offset : offset + length] = bytes(length)
            elif what == 4:
                opened.run(opened.backend.co_discard(offset, length))
                left = opened.run(opened.backend.co_pread(offset, length))
                assert all(new in (old, 0) for new, old in zip(left, model[offset : offset + length], strict=True))
                model[offset : offset + length] = left
            else:
                opened.run(opened.backend.co_flush())
            if raw:
                assert host.content("data.raw") == model
        assert opened.content() == model
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings
    assert len(host.content("disk.qcow2")) <= 16 * cluster
    with disk(host, "disk.qcow2", **{"read-only": True}) as opened:
        assert opened.content() == model


def test_what_others_left_in_the_file_is_not_seen() -> None:
    """A cluster is written whole when it is allocated, since the data file may hold anything."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=SIZE, cluster_size=CLUSTER, data_file="data.raw")
    replace(host, "data.raw", b"\xff" * SIZE)
    with disk(host, "disk.qcow2") as opened:
        assert opened.content() == bytes(SIZE)
        opened.run(opened.backend.co_pwrite(CLUSTER + 100, b"new"))
        assert opened.content() == bytes(CLUSTER + 100) + b"new" + bytes(SIZE - CLUSTER - 103)


@pytest.mark.parametrize("raw", [False, True])
def test_resize(raw: bool) -> None:
    """The data file has the disk's size, and a raw one keeps every cluster in its place."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=SIZE, cluster_size=CLUSTER, data_file="data.raw", data_file_raw=raw)
    with disk(host, "disk.qcow2") as opened:
        opened.run(opened.backend.co_truncate(3 * SIZE))
        assert len(host.content("data.raw")) == 3 * SIZE
        opened.run(opened.backend.co_pwrite(3 * SIZE - 3, b"end"))
    assert host.content("data.raw") == bytes(3 * SIZE - 3) + b"end"
    assert check(host, "disk.qcow2").allocated_clusters == (60 if raw else 1)


@pytest.mark.parametrize("discards", [False, True])
def test_a_raw_file_and_the_disk_agree_on_who_was_the_last(seed: int, discards: bool) -> None:
    """Of a write and a zero write that are under way at the same time: both see the same one."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=SIZE, cluster_size=CLUSTER, data_file="data.raw", data_file_raw=True)
    for path in ("disk.qcow2", "data.raw"):
        host.set_cached(path, "never")
    with disk(host, "disk.qcow2", **{"pass-discard-request": True}) as opened:
        backend = opened.backend
        opened.run(backend.co_pwrite(0, b"a" * CLUSTER))

        async def play() -> None:
            zero = backend.co_discard if discards else backend.co_write_zeroes
            host.fault(path="data.raw", op=WRITE, delay_ns=10**9, times=1)
            await gather(backend.co_pwrite(0, b"b" * CLUSTER), zero(0, CLUSTER))

        opened.run(play())
        assert opened.content() == host.content("data.raw")


def test_a_raw_file_that_became_shorter_while_it_was_written(seed: int) -> None:
    """What arrived behind its end does not come back; a zero write that is behind it has nothing to do."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=SIZE, cluster_size=CLUSTER, data_file="data.raw", data_file_raw=True)
    for path in ("disk.qcow2", "data.raw"):
        host.set_cached(path, "never")
    with disk(host, "disk.qcow2") as opened:
        backend = opened.backend

        async def play() -> None:
            await backend.co_pwrite(10 * CLUSTER, b"a")
            slow = host.fault(path="data.raw", op=WRITE, delay_ns=10**9, times=1)
            await gather(
                backend.co_pwrite(10 * CLUSTER, b"b" * CLUSTER),
                backend.co_truncate(5 * CLUSTER),
                backend.co_write_zeroes(12 * CLUSTER, 3 * CLUSTER),
            )
            assert slow.hits
            await backend.co_truncate(SIZE)

        opened.run(play())
        assert opened.content() == bytes(SIZE) == host.content("data.raw")


def test_a_cluster_out_of_its_place_in_a_raw_file() -> None:
    """Others would read something else than we do."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=SIZE, cluster_size=CLUSTER, data_file="data.raw", data_file_raw=True)
    image = bytearray(host.content("disk.qcow2"))
    l1 = Header.parse(bytes(image)).l1_offset
    l2 = int.from_bytes(image[l1 : l1 + 8], "big") & layout.OFFSET_MASK
    image[l2 + 8 : l2 + 16] = (layout.COPIED | 5 * CLUSTER).to_bytes(8, "big")
    replace(host, "disk.qcow2", image)
    with disk(host, "disk.qcow2", **{"read-only": True}) as opened:
        told: list[str] = []
        opened.graph.image_corrupted = lambda node, text, *rest: told.append(text)
        with pytest.raises(OSError):
            opened.content()
        assert "External data file host cluster offset 0x5000 does not match guest cluster offset: 0x1000" in told[0]


def test_compressed_clusters_cannot_be(seed: int) -> None:
    host = SimHost(seed)
    make(host, "disk.qcow2", size=SIZE, cluster_size=CLUSTER, data_file="data.raw")
    with disk(host, "disk.qcow2") as opened:
        assert not opened.node.can_compress
        with pytest.raises(OSError):
            opened.run(opened.node.co_pwritev_compressed(0, CLUSTER, memoryview(bytes(CLUSTER))))
