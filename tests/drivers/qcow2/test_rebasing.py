# SPDX-License-Identifier: Apache-2.0
"""A rebase that fails or is cut off at any place: the content is what it was, through whichever file is named then."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bottomhalf.block import BlockError, ImageError, Node
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.rebasing import co_rebase_safely
from bottomhalf.drivers.registry import open_node
from bottomhalf.host.request import FLUSH, OP_NAMES, READ, WRITE
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.drivers.qcow2.bench import Disk, check, make

SIZE = 60 * 512
OLD = b"".join(bytes([n % 200 + 1]) * 512 for n in range(40)) + bytes(512)
NEW = OLD[: 20 * 512] + b"".join(bytes([n % 200 + 30]) * 512 for n in range(20, 90))
SHAPES: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 512, "version": 2},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 512, "data_file": "data.raw"},
]


def raw(name: str) -> dict[str, Any]:
    return {"driver": "raw", "read-only": True, "file": {"driver": "file", "filename": name, "read-only": True}}


def opened(host: SimHost) -> Disk:
    header = Header.parse(host.content("disk.qcow2"))
    more: dict[str, Any] = {"backing": raw(header.backing_file) if header.backing_file else None}
    if header.external:
        more["data-file"] = {"driver": "file", "filename": "data.raw"}
    return Disk(host, "disk.qcow2", **more)


def scene(host: SimHost, shape: dict[str, Any]) -> tuple[Disk, bytes]:
    host.add_file("old.raw", OLD)
    host.add_file("new.raw", NEW)
    make(host, "disk.qcow2", size=SIZE, backing_file="old.raw", backing_fmt="raw", **shape)
    disk = opened(host)
    disk.run(disk.backend.co_pwrite(3000, b"mine" * 300))
    disk.run(disk.backend.co_pwrite(15_000, b"and mine" * 200))
    disk.run(disk.backend.co_flush())
    return disk, disk.content()


def new_file(disk: Disk, name: str | None) -> Node | None:
    if name is None:
        return None
    node = open_node(disk.graph, from_json(BlockdevOptions, raw(name)))
    node.monitor_owned = True
    return node


def good(host: SimHost, content: bytes) -> str | None:
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.check_errors, found.findings
    disk = opened(host)
    assert disk.content() == content
    disk.close()
    return Header.parse(host.content("disk.qcow2")).backing_file


@pytest.mark.parametrize("target", ["new.raw", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [READ, WRITE, FLUSH], ids=lambda op: OP_NAMES[op])
def test_every_failure(op: int, shape: dict[str, Any], target: str | None) -> None:
    for position in range(10_000):
        host = SimHost(position)
        disk, content = scene(host, shape)
        new = new_file(disk, target)
        fault = host.fault(op=op, errno=errno.EIO, after=position, times=None if position % 2 else 1)
        try:
            disk.run(co_rebase_safely(disk.node, new, target, target and "raw"))
            failed = False
        except OSError:
            failed = True
        hits = fault.hits
        fault.remove()
        after = SimHost(position)
        for name in ("old.raw", "new.raw", *(["data.raw"] if "data_file" in shape else [])):
            after.add_file(name, host.survivor(name))
        after.add_file("disk.qcow2", host.survivor("disk.qcow2"))
        named = good(after, content)
        assert failed or named == target
        disk.abandon()
        if not hits:
            assert not failed
            return
    raise AssertionError("there is no end of I/O")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeroes_hide_a_longer_file_and_take_no_clusters(shape: dict[str, Any]) -> None:
    """Version 2 has no other way than to write them."""
    host = SimHost(1)
    disk, content = scene(host, shape)
    before = disk.run(disk.node.co_check()).allocated_clusters
    told: list[tuple[int, int]] = []
    new = new_file(disk, "new.raw")
    disk.run(co_rebase_safely(disk.node, new, "new.raw", "raw", progress=lambda *now: told.append(now)))
    taken = disk.run(disk.node.co_check()).allocated_clusters - before
    disk.close()
    assert good(host, content) == "new.raw"
    assert not check(host, "disk.qcow2").leaks
    assert told[-1] == (SIZE, SIZE)
    if shape["cluster_size"] == 512:
        differ = [n for n in range(40) if OLD[n * 512 : n * 512 + 512] != NEW[n * 512 : n * 512 + 512]]
        assert taken <= len(differ) + (20 if shape.get("version") == 2 else 0)


@pytest.mark.parametrize("name, shape, text", [
    ("x" * 1024, {"cluster_size": 4096}, "does not fit"),
    ("x" * 400, {"cluster_size": 512}, "does not fit"),
], ids=["too long", "too long for the cluster"])  # fmt: skip
def test_a_name_that_does_not_fit_is_refused_before_anything_is_copied(
    name: str, shape: dict[str, Any], text: str
) -> None:
    host = SimHost(2)
    disk, content = scene(host, shape)
    before = host.content("disk.qcow2")
    with pytest.raises(ImageError, match=text):
        disk.run(co_rebase_safely(disk.node, new_file(disk, "new.raw"), name, "raw"))
    assert host.content("disk.qcow2") == before
    disk.run(disk.backend.co_pwrite(0, b"it goes on"))
    disk.close()
    assert good(host, b"it goes on" + content[10:]) == "old.raw"


def test_nothing_is_compressed_in_a_data_file() -> None:
    host = SimHost(3)
    disk, _ = scene(host, SHAPES[3])
    with pytest.raises(BlockError, match="Compression not supported"):
        disk.run(co_rebase_safely(disk.node, None, None, None, compress=True))
    disk.close()
