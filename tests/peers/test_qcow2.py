# SPDX-License-Identifier: Apache-2.0
"""qcow2 images that go back and forth between QEMU's tools and ours."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bottomhalf

MIB = 1 << 20
SIZE = 24 * MIB

SHAPES = {
    "usual": [],
    "version 2": ["compat=0.10"],
    "clusters of 512": ["cluster_size=512"],
    "clusters of 4k": ["cluster_size=4k"],
    "clusters of 2M": ["cluster_size=2M"],
    "extended": ["extended_l2=on", "cluster_size=128k"],
    "extended 16k": ["extended_l2=on", "cluster_size=16k"],
    "refcounts of a bit": ["refcount_bits=1"],
    "refcounts of 4 bits": ["refcount_bits=4", "cluster_size=8k"],
    "refcounts of 64 bits": ["refcount_bits=64", "cluster_size=1k"],
    "lazy": ["lazy_refcounts=on"],
    "preallocated tables": ["preallocation=metadata"],
    "preallocated": ["preallocation=falloc"],
}


def options(path: Path, **more: Any) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return {"driver": "qcow2", "discard": "unmap", "file": file, **more}


def run(*command: str | Path, status: int = 0) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def content(path: Path, tmp_path: Path, format: str = "qcow2") -> bytes:
    """What QEMU reads."""
    raw = tmp_path / "content.raw"
    run("qemu-img", "convert", "-f", format, "-O", "raw", path, raw)
    return raw.read_bytes()


def scribble(disk: bottomhalf.Disk, model: bytearray, seed: int, steps: int = 60) -> None:
    """Random changes, on the disk and on the model."""
    chance = random.Random(seed)
    for number in range(steps):
        length = chance.choice((1, 512, 4096, 65536, 300_000))
        offset = chance.randrange(0, len(model) - length)
        kind = chance.randrange(8)
        if kind < 5:
            model[offset : offset + length] = bytes([number + 1]) * length
            disk.pwrite(bytes([number + 1]) * length, offset)
        elif kind < 7:
            model[offset : offset + length] = bytes(length)
            disk.write_zeroes(offset, length, unmap=kind == 5)
        else:
            disk.flush()


def scribble_by_qemu(path: Path, seed: int, *, compressed: bool = False) -> None:
    chance = random.Random(seed)
    commands: list[str] = []
    if compressed:  # first, for QEMU does not write them over what is there
        commands = [word for n in (1, 4, 9) for word in ("-c", f"write -c -P {80 + n} {2 * n}M 2M")]
    for number in range(12):
        offset, length = chance.randrange(0, SIZE // 4096 - 20) * 4096, chance.choice((4096, 65536))
        kind = chance.choice((f"write -P {number + 65}", "write -z", "write -z -u", f"write -P {number + 97}"))
        commands += ["-c", f"{kind} {offset} {length}"]
    run("qemu-io", *commands, path)


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(require: Callable[[str], str], tmp_path: Path, shape: str) -> None:
    """Made and written by QEMU, read and written by us, checked by both, written by QEMU, read by us."""
    require("qemu-img")
    require("qemu-io")
    path = tmp_path / "disk.qcow2"
    given = ",".join(SHAPES[shape])
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", given] if given else []), path, str(SIZE))
    scribble_by_qemu(path, 1, compressed="prealloc" not in shape)
    model = bytearray(content(path, tmp_path))
    with bottomhalf.open(options(path)) as disk:
        assert disk.pread(SIZE, 0) == model
        scribble(disk, model, 2)
        assert disk.pread(SIZE, 0) == model
    run("qemu-img", "check", path)
    found = bottomhalf.check(path)
    assert not found.corruptions and not found.leaks, found.findings
    assert content(path, tmp_path) == model
    scribble_by_qemu(path, 3)
    model = bytearray(content(path, tmp_path))
    with bottomhalf.open(options(path), read_only=True) as disk:
        assert disk.pread(SIZE, 0) == model


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("extra", [{}, {"refcount_bits": 8}, {"extended_l2": True}, {"lazy_refcounts": True}], ids=str)
def test_made_by_us(
    require: Callable[[str], str], tmp_path: Path, version: int, cluster_size: int, extra: dict[str, Any]
) -> None:
    require("qemu-img")
    path = tmp_path / "disk.qcow2"
    if (version == 2 and extra) or ("extended_l2" in extra and cluster_size < 16384):
        with pytest.raises(bottomhalf.block.BlockError):
            bottomhalf.create(path, format="qcow2", size=SIZE, version=version, cluster_size=cluster_size, **extra)
        assert not path.exists()
        return
    bottomhalf.create(path, format="qcow2", size=SIZE, version=version, cluster_size=cluster_size, **extra)
    run("qemu-img", "check", path)
    run("qemu-io", "-c", "write -P 7 1M 100k", path)
    model = bytearray(SIZE)
    model[MIB : MIB + 102400] = b"\7" * 102400
    with bottomhalf.open(options(path)) as disk:
        assert disk.pread(SIZE, 0) == model
        scribble(disk, model, cluster_size)
    run("qemu-img", "check", path)
    assert content(path, tmp_path) == model
    info = bottomhalf.info(path)
    assert (info.format, info.virtual_size, info.cluster_size) == ("qcow2", SIZE, cluster_size)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", ["4k", "64k", "2M"])
def test_compressed(require: Callable[[str], str], tmp_path: Path, kind: str, cluster_size: str) -> None:
    """All of a disk, read; then written over in parts, which leaves what is not written as it was."""
    require("qemu-img")
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    chance = random.Random(7)
    model = bytearray(b"".join(chance.randbytes(512) * chance.randrange(1, 40) for _ in range(1200))[: 8 * MIB])
    raw.write_bytes(model)
    shape = f"cluster_size={cluster_size},compression_type={kind}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", shape, raw, path)
    with bottomhalf.open(path) as disk:
        assert disk.pread(disk.size, 0)[: len(model)] == model
        model += bytes(disk.size - len(model))
        scribble(disk, model, 8, steps=20)
        assert disk.pread(disk.size, 0) == model
    run("qemu-img", "check", path)
    assert content(path, tmp_path) == model
    found = bottomhalf.check(path)
    assert not found.corruptions and not found.leaks, found.findings


def test_backing(require: Callable[[str], str], tmp_path: Path) -> None:
    """A shorter backing file, and what is hidden of it; a chain of three."""
    require("qemu-img")
    base, middle, top = tmp_path / "base.raw", tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    base.write_bytes(random.Random(1).randbytes(5 * MIB + 512))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle, str(8 * MIB))
    small = ["-o", "cluster_size=4k"]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", *small, top, str(9 * MIB))
    run("qemu-io", "-c", "write -P 66 1000k 100k", middle)
    model = bytearray(content(top, tmp_path))
    with bottomhalf.open(top, backing_files=True) as disk:
        assert disk.size == 9 * MIB and disk.pread(disk.size, 0) == model
        scribble(disk, model, 4)
        disk.discard(3 * MIB, MIB)
        model[3 * MIB : 4 * MIB] = bytes(MIB)
        assert disk.pread(disk.size, 0) == model
    run("qemu-img", "check", top)
    assert content(top, tmp_path) == model
    assert base.read_bytes() == random.Random(1).randbytes(5 * MIB + 512)


def test_snapshots_survive(require: Callable[[str], str], tmp_path: Path) -> None:
    """What QEMU has put aside is as it was, whatever we write afterwards."""
    require("qemu-img")
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=8k", path, str(SIZE))
    scribble_by_qemu(path, 5, compressed=True)
    kept = content(path, tmp_path)
    run("qemu-img", "snapshot", "-c", "first", path)
    model = bytearray(kept)
    with bottomhalf.open(options(path)) as disk:
        scribble(disk, model, 6)
    run("qemu-img", "check", path)
    found = bottomhalf.check(path)
    assert not found.corruptions and not found.leaks, found.findings
    assert content(path, tmp_path) == model
    run("qemu-img", "snapshot", "-a", "first", path)
    assert content(path, tmp_path) == kept
    run("qemu-img", "check", path)


def test_check_finds_what_qemu_finds(require: Callable[[str], str], tmp_path: Path) -> None:
    """Damage of several kinds: the same counts; and what we repair, QEMU finds whole."""
    require("qemu-img")
    path = tmp_path / "disk.qcow2"
    bottomhalf.create(path, format="qcow2", size=SIZE)
    with bottomhalf.open(options(path)) as disk:
        disk.pwrite(b"x" * MIB, 0)
        disk.pwrite(b"y" * MIB, 10 * MIB)
    whole = path.read_bytes()
    header = bottomhalf.info(path).header
    block = int.from_bytes(whole[header.refcount_table_offset :][:8], "big")
    last = path.stat().st_size // header.cluster_size - 1
    for cluster, count in ((last, 0), (last, 5), (last - 3, 2), (1, 0)):
        damaged = bytearray(whole)
        damaged[block + 2 * cluster : block + 2 * cluster + 2] = count.to_bytes(2, "big")
        path.write_bytes(damaged)
        text = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True, check=False)
        found = bottomhalf.check(path)
        said = [line for line in (text.stdout + text.stderr).splitlines() if "cluster" in line and "refcount=" in line]
        assert found.findings == said
        assert bool(found.corruptions) == (text.returncode == 2)
        assert bool(found.leaks) == any("Leaked" in line for line in said)
        bottomhalf.check(path, repair="all")
        run("qemu-img", "check", path)
        again = bottomhalf.check(path)
        assert not again.corruptions and not again.leaks
        with bottomhalf.open(options(path), read_only=True) as disk:
            assert disk.pread(MIB, 10 * MIB) == b"y" * MIB


@pytest.mark.parametrize("named", ["/etc/hostname", "secret.raw", "json:{\"driver\":\"file\"}", "nbd://localhost"])
def test_the_gate(require: Callable[[str], str], tmp_path: Path, named: str) -> None:
    """Looking into an image opens nothing that it names; opening it says so, unless the caller gives the file."""
    path = tmp_path / "disk.qcow2"
    bottomhalf.create(path, format="qcow2", size=SIZE, backing_file=named, backing_fmt="raw")
    info = bottomhalf.info(path)
    assert (info.backing_file, info.backing_format) == (named, "raw")
    assert not bottomhalf.check(path).corruptions
    with pytest.raises(bottomhalf.block.BlockError, match="names a backing file"):
        bottomhalf.open(options(path))
    with bottomhalf.open(options(path, backing=None)) as disk:
        assert disk.pread(512, 0) == bytes(512)
