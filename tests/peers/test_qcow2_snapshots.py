# SPDX-License-Identifier: Apache-2.0
"""Snapshots that QEMU's tools made, and ours that they read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import bottomhalf
from bottomhalf.block import BlockError
from tests.peers.test_qcow2 import SHAPES, SIZE, content, options, run, scribble

NAMES = [shape for shape in SHAPES if shape != "refcounts of a bit"]


def known(path: Path) -> list[tuple[str, str]]:
    """What qemu-img lists."""
    told = json.loads(run("qemu-img", "info", "--output=json", path))
    return [(each["id"], each["name"]) for each in told.get("snapshots", [])]


@pytest.mark.parametrize("shape", NAMES)
def test_to_and_fro(require: Callable[[str], str], tmp_path: Path, shape: str) -> None:
    """Either makes, applies and deletes snapshots in turn; each is what it was, and the image is whole."""
    require("qemu-img")
    path, chance = tmp_path / "disk.qcow2", random.Random(shape)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(["size=24M", *SHAPES[shape]]), path)
    model, kept = bytearray(SIZE), dict[str, bytes]()
    for number in range(6):
        with bottomhalf.open(options(path)) as disk:
            scribble(disk, model, number, steps=12)
        name, ours = f"s{number}", chance.random() < 0.5
        if ours:
            assert bottomhalf.snapshot_create(path, name).name == name
        else:
            run("qemu-img", "snapshot", "-c", name, path)
        kept[name] = bytes(model)
        assert [each.name for each in bottomhalf.snapshots(path)] == list(kept)
        assert [(each.id, each.name) for each in bottomhalf.snapshots(path)] == known(path)
        if chance.random() < 0.5:
            back = chance.choice(list(kept))
            if chance.random() < 0.5:
                bottomhalf.snapshot_apply(path, back)
            else:
                run("qemu-img", "snapshot", "-a", back, path)
            model = bytearray(kept[back])
        if len(kept) > 3:
            gone = chance.choice(list(kept))
            if chance.random() < 0.5:
                bottomhalf.snapshot_delete(path, gone)
            else:
                run("qemu-img", "snapshot", "-d", gone, path)
            del kept[gone]
        assert "No errors" in run("qemu-img", "check", path)
        found = bottomhalf.check(path)
        assert not found.corruptions and not found.leaks, found.findings
    assert content(path, tmp_path) == model
    for name, expected in kept.items():
        bottomhalf.snapshot_apply(path, name)
        assert content(path, tmp_path) == expected
    for name in list(kept):
        bottomhalf.snapshot_delete(path, name)
    assert known(path) == []
    assert "No errors" in run("qemu-img", "check", path)


def test_from_the_library(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    bottomhalf.create(path, format="qcow2", size=1 << 20)
    with bottomhalf.open(path) as disk:
        disk.pwrite(b"before", 0)
    assert bottomhalf.snapshots(path) == []
    made = bottomhalf.snapshot_create(path, "first")
    assert (made.id, made.name, made.disk_bytes) == ("1", "first", 1 << 20)
    with bottomhalf.open(path) as disk:
        disk.pwrite(b"after!", 0)
    with pytest.raises(BlockError, match=r"there is no snapshot 'second', but 'first'"):
        bottomhalf.snapshot_apply(path, "second")
    bottomhalf.snapshot_apply(path, "first")
    with bottomhalf.open(path) as disk:
        assert disk.pread(6, 0) == b"before"
    bottomhalf.snapshot_delete(path, "1")
    assert bottomhalf.snapshots(path) == []
    raw = tmp_path / "disk.raw"
    bottomhalf.create(raw, size=1 << 20)
    assert bottomhalf.snapshots(raw) == []
    with pytest.raises(BlockError, match="does not support"):
        bottomhalf.snapshot_create(raw, "x")


@pytest.mark.parametrize("shape", NAMES)
def test_other_sizes(require: Callable[[str], str], tmp_path: Path, shape: str) -> None:
    """Either makes the disk larger and smaller in turn."""
    require("qemu-img")
    path, chance = tmp_path / "disk.qcow2", random.Random(shape)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(["size=8M", *SHAPES[shape]]), path)
    model = bytearray(8 << 20)
    for number in range(5):
        with bottomhalf.open(options(path)) as disk:
            scribble(disk, model, number, steps=8)
        size = chance.choice((1, 3, 30, 70)) * (1 << 20) + chance.randrange(0, 100) * 512
        # What QEMU cuts off within a cluster it shows again when it makes the disk larger.
        if size > len(model) or chance.random() < 0.6:
            bottomhalf.resize(path, size, shrink=True)
        else:
            run("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", path, str(size))
        del model[size:]
        model.extend(bytes(size - len(model)))
        assert "No errors" in run("qemu-img", "check", path)
        assert content(path, tmp_path) == model


def test_smaller_only_on_purpose(tmp_path: Path) -> None:
    for format in ("raw", "qcow2"):
        path = tmp_path / format
        bottomhalf.create(path, format=format, size=1 << 20)
        with pytest.raises(BlockError, match="needs shrink=True"):
            bottomhalf.resize(path, 4096)
        bottomhalf.resize(path, 2 << 20, preallocation="falloc")
        assert bottomhalf.info(path).virtual_size == 2 << 20
        bottomhalf.resize(path, 4096, shrink=True)
        assert bottomhalf.info(path).virtual_size == 4096
        with pytest.raises(ValueError, match="preallocation is one of"):
            bottomhalf.resize(path, 8192, preallocation="some")
