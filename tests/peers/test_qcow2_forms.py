# SPDX-License-Identifier: Apache-2.0
"""Forms of qcow2 images beside QEMU's tools: compressed clusters, data files, preallocation, amending, options."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from bottomhalf.block import BlockError
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.layout import CORRUPT
from bottomhalf.qapi.errors import OptionError
from tests.peers.test_qcow2 import content, run, scribble

MIB = 1 << 20
SIZE = 6 * MIB

Require = Callable[[str], str]


def opened(path: Path, **more: Any) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return {"driver": "qcow2", "discard": "unmap", "file": file, **more}


def clean(path: Path) -> None:
    """Both find nothing wrong."""
    run("qemu-img", "check", path)
    found = bottomhalf.check(path)
    assert not found.corruptions and not found.leaks, found.findings


def fails(*command: str | Path) -> str:
    """What a tool of QEMU's complains about, without its name and the image's; empty if it does not."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    return done.stderr.strip().removeprefix("qemu-img: ") if done.returncode else ""


# -- compressed clusters


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
def test_written_compressed(require: Require, tmp_path: Path, kind: str, cluster_size: int) -> None:
    """By our filter, at any offset; read by QEMU, which then writes compressed clusters of its own beside ours."""
    require("qemu-img")
    require("qemu-io")
    path, size, chance = tmp_path / "disk.qcow2", SIZE + 512, random.Random(cluster_size)
    bottomhalf.create(path, format="qcow2", size=size, cluster_size=cluster_size, compression_type=kind)
    model = bytearray(size)
    with bottomhalf.open({"driver": "compress", "file": opened(path)}) as disk:
        for number in range(12):
            length = chance.choice((1, 5000, 70_000, 300_000))
            offset = chance.randrange(0, 4 * MIB - length)
            data = chance.randbytes(length) if chance.random() < 0.2 else bytes([number + 1]) * length
            disk.pwrite(data, offset)
            model[offset : offset + length] = data
        disk.pwrite(b"end" * 100, size - 300)
        model[size - 300 :] = b"end" * 100
        assert disk.pread(size, 0) == model
    clean(path)
    assert content(path, tmp_path) == model
    assert bottomhalf.check(path).compressed_clusters > 0
    if cluster_size < MIB:
        run("qemu-io", "-c", f"write -c -P 77 5M {cluster_size * 2}", path)
        model[5 * MIB :][: cluster_size * 2] = b""
        model[5 * MIB : 5 * MIB + cluster_size * 2] = b"M" * cluster_size * 2
    with bottomhalf.open(opened(path)) as disk:
        assert disk.pread(size, 0) == model
        scribble(disk, model, 3, steps=15)
    clean(path)
    assert content(path, tmp_path) == model


def test_packed_as_tightly_as_qemu_does(require: Require, tmp_path: Path) -> None:
    """The same content through both: the images are of about the same size."""
    require("qemu-img")
    raw, theirs, ours = tmp_path / "disk.raw", tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2"
    chance = random.Random(4)
    data = b"".join(chance.randbytes(256) * 256 for _ in range(SIZE // 65536))
    raw.write_bytes(data)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, theirs)
    bottomhalf.create(ours, format="qcow2", size=SIZE)
    with bottomhalf.open({"driver": "compress", "file": opened(ours)}) as disk:
        disk.pwrite(data, 0)
    clean(ours)
    assert os.path.getsize(ours) <= os.path.getsize(theirs) + 2 * 65536


# -- data files


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("maker", ["we", "QEMU"])
def test_data_files(require: Require, tmp_path: Path, raw: bool, extended: bool, maker: str) -> None:
    """There and back; a raw one is the disk's content at each moment."""
    require("qemu-img")
    require("qemu-io")
    path, data = tmp_path / "disk.qcow2", tmp_path / "data.raw"
    if maker == "we":
        bottomhalf.create(
            path, format="qcow2", size=SIZE, extended_l2=extended, data_file=data, data_file_raw=raw
        )
    else:
        shape = f"data_file={data},data_file_raw={'on' if raw else 'off'},extended_l2={'on' if extended else 'off'}"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", shape, path, str(SIZE))
    run("qemu-io", "-c", "write -P 5 0 4k", "-c", "write -P 6 1M 200k", "-c", "write -z 2M 64k", path)
    model = bytearray(content(path, tmp_path))
    with pytest.raises(BlockError, match="The image names a data file"):
        bottomhalf.open(path)
    with bottomhalf.open(path, backing_files=True) as disk:
        assert disk.pread(SIZE, 0) == model
        scribble(disk, model, 9, steps=40)
        disk.discard(4 * MIB, MIB)
        model[4 * MIB : 5 * MIB] = disk.pread(MIB, 4 * MIB)
    clean(path)
    assert content(path, tmp_path) == model
    if raw:
        assert data.read_bytes() == model
    run("qemu-io", "-c", "write -P 5 3M 100k", "-c", "discard 0 1M", path)
    model = bytearray(content(path, tmp_path))
    with bottomhalf.open(path, backing_files=True, read_only=True) as disk:
        assert disk.pread(SIZE, 0) == model


# -- new images


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("external", [False, True])
def test_preallocation(require: Require, tmp_path: Path, mode: str, extended: bool, external: bool) -> None:
    """The map is QEMU's, and so is what the file system has reserved."""
    require("qemu-img")
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    more = {"data_file": tmp_path / "ours.raw"} if external else {}
    bottomhalf.create(ours, format="qcow2", size=SIZE, preallocation=mode, extended_l2=extended, **more)
    shape = f"preallocation={mode},extended_l2={'on' if extended else 'off'}"
    shape += f",data_file={tmp_path / 'theirs.raw'}" if external else ""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", shape, theirs, str(SIZE))
    clean(ours)
    assert run("qemu-img", "map", "--output=json", ours) == run("qemu-img", "map", "--output=json", theirs)
    for suffix in (".qcow2", ".raw") if external else (".qcow2",):
        taken = [os.stat(path.with_suffix(suffix)).st_blocks * 512 for path in (ours, theirs)]
        assert abs(taken[0] - taken[1]) <= 65536
        sizes = [os.path.getsize(path.with_suffix(suffix)) for path in (ours, theirs)]
        assert abs(sizes[0] - sizes[1]) <= 65536
    with bottomhalf.open(ours, backing_files=True) as disk:
        model = bytearray(SIZE)
        assert disk.pread(SIZE, 0) == model
        scribble(disk, model, 5, steps=20)
    clean(ours)
    assert content(ours, tmp_path) == model


@pytest.mark.parametrize("given", [
    {"preallocation": "bad"},
    {"cluster_size": 100},
    {"cluster_size": 4096, "extended_l2": True},
    {"compression_type": "lzo"},
    {"refcount_bits": 3},
    {"compat": "4"},
    {"compat": "0.10", "lazy_refcounts": True},
    {"compat": "0.10", "refcount_bits": 8},
    {"data_file_raw": True},
    {"compat": "0.10", "data_file": "x.raw"},
    {"preallocation": "full", "backing_file": "base.raw", "backing_fmt": "raw"},
    {"data_file": "x.raw", "data_file_raw": True, "backing_file": "base.raw", "backing_fmt": "raw"},
], ids=str)
def test_what_cannot_be_made(
    require: Require, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """In the same words."""
    require("qemu-img")
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(bytes(MIB))
    words = ",".join(f"{name}={_word(value)}" for name, value in given.items())
    theirs = fails("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, "disk.qcow2", "1M")
    with pytest.raises(BlockError) as failed:
        bottomhalf.create("ours.qcow2", format="qcow2", size=MIB, **given)
    assert str(failed.value).splitlines()[0] == theirs.removeprefix("disk.qcow2: ")
    assert not Path("ours.qcow2").exists()


def _word(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


# -- amended images


AMENDED: list[tuple[list[str], dict[str, Any]]] = [
    ([], {"compat": "0.10"}),
    ([], {"lazy_refcounts": True}),
    ([], {"refcount_bits": 1}),
    ([], {"refcount_bits": 64}),
    (["cluster_size=512"], {"refcount_bits": 64}),
    (["refcount_bits=8"], {"compat": "0.10"}),
    (["refcount_bits=8"], {"compat": "0.10", "refcount_bits": 16}),
    (["compat=0.10"], {"compat": "1.1", "lazy_refcounts": True, "refcount_bits": 32, "size": 2 * SIZE}),
    (["compat=0.10"], {"lazy_refcounts": True}),
    (["compat=0.10"], {"refcount_bits": 8}),
    (["extended_l2=on"], {"compat": "0.10"}),
    (["lazy_refcounts=on"], {"compat": "0.10"}),
    ([], {"size": 1000}),
    ([], {"compat": "5"}),
    ([], {"cluster_size": 4096}),
    ([], {"backing_file": "zz"}),
    ([], {"data_file": "x"}),
    ([], {"data_file_raw": True}),
    (["data_file=data.raw", "data_file_raw=on"], {"data_file_raw": False}),
    (["data_file=data.raw"], {"compat": "0.10"}),
    (["data_file=data.raw"], {"size": 2 * SIZE, "refcount_bits": 64}),
]


@pytest.mark.parametrize("shape, wanted", AMENDED, ids=str)
def test_amend(
    require: Require, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: list[str], wanted: dict[str, Any]
) -> None:
    """The same error, or an image of which qemu-img info says the same and that has the same content."""
    require("qemu-img")
    require("qemu-io")
    monkeypatch.chdir(tmp_path)
    said, path = [], Path("disk.qcow2")
    for who in ("QEMU", "we"):
        given = ["-o", ",".join(shape)] if shape else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *given, path, str(SIZE))
        zero = [] if "compat=0.10" in shape else ["-c", "write -z 1M 200k", "-c", "write -z -u 2M 64k"]
        run("qemu-io", "-c", "write -P 1 0 2M", *zero, path)
        if who == "QEMU":
            words = ",".join(f"{name}={_word(value)}" for name, value in wanted.items())
            error = fails("qemu-img", "amend", "-f", "qcow2", "-o", words, path)
        else:
            error = ""
            try:
                bottomhalf.amend(path, follow_names=True, **wanted)
            except BlockError as failed:
                error = str(failed)
        about = run("qemu-img", "info", path)
        facts = [line for line in about.splitlines() if "disk size" not in line and "file length" not in line]
        clean(path)
        said.append((error, facts, content(path, tmp_path)))
    assert said[0] == said[1]


def test_amend_with_snapshots(require: Require, tmp_path: Path) -> None:
    """They keep their content, and the counters of what they share have their width."""
    require("qemu-img")
    require("qemu-io")
    path, shown = tmp_path / "disk.qcow2", tmp_path / "snapshot.raw"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    run("qemu-io", "-c", "write -P 1 0 2M", path)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-io", "-c", "write -P 2 0 1M", path)
    with pytest.raises(BlockError, match=r"Cannot decrease refcount entry width to 1 bits: Cluster at offset 0x"):
        bottomhalf.amend(path, refcount_bits=1)
    for wanted in ({"refcount_bits": 2}, {"refcount_bits": 16, "compat": "0.10"}, {"compat": "1.1"}):
        bottomhalf.amend(path, **wanted)
        clean(path)
        run("qemu-img", "convert", "-l", "one", "-f", "qcow2", "-O", "raw", path, shown)
        assert shown.read_bytes() == b"\1" * 2 * MIB + bytes(SIZE - 2 * MIB)


@pytest.mark.parametrize("backing", [False, True])
def test_amend_with_snapshots_of_zero_clusters(require: Require, tmp_path: Path, backing: bool) -> None:
    """To version 2, as QEMU's own: both have the same content, in the disk and in each snapshot."""
    require("qemu-img")
    require("qemu-io")
    base, shown = tmp_path / "base.raw", tmp_path / "shown.raw"
    base.write_bytes(b"b" * SIZE)
    seen: list[list[bytes]] = []
    for who in ("ours", "theirs"):
        path = tmp_path / who
        more = ["-b", base, "-F", "raw"] if backing else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *more, path, str(SIZE))
        run("qemu-io", "-c", "write -P 1 0 2M", "-c", "write -z 1M 512k", "-c", "write -z -u 3M 128k", path)
        for name in "ab":
            run("qemu-img", "snapshot", "-c", name, path)
        run("qemu-io", "-c", "write -P 2 1100k 10k", "-c", "write -z -u 1M 128k", path)
        run("qemu-img", "snapshot", "-c", "c", path)
        run("qemu-io", "-c", "write -P 3 3M 10k", path)
        if who == "ours":
            bottomhalf.amend(path, compat="0.10")
        else:
            run("qemu-img", "amend", "-f", "qcow2", "-o", "compat=0.10", path)
        if who == "ours":  # QEMU 10.0 leaves flags in theirs that its own check calls errors
            clean(path)
        assert Header.parse(path.read_bytes()[:65536]).version == 2
        seen.append([content(path, tmp_path)])
        for name in "abc":
            run("qemu-img", "convert", "-l", name, "-f", "qcow2", "-O", "raw", path, shown)
            seen[-1].append(shown.read_bytes())
    assert seen[0] == seen[1]
    assert seen[0][1][MIB : MIB + 524288] == bytes(524288)


def test_rebase(require: Require, tmp_path: Path) -> None:
    """A name like QEMU's own; nothing is copied."""
    require("qemu-img")
    base, other, path = tmp_path / "base.raw", tmp_path / "other.raw", tmp_path / "disk.qcow2"
    base.write_bytes(b"b" * SIZE)
    other.write_bytes(b"o" * SIZE)
    bottomhalf.create(path, format="qcow2", size=SIZE, backing_file=str(base), backing_fmt="raw")
    with pytest.raises(BlockError, match="names a backing file"):
        bottomhalf.rebase(path, str(other), "raw")
    bottomhalf.rebase(path, str(other), "raw", unsafe=True)
    assert content(path, tmp_path) == b"o" * SIZE
    bottomhalf.rebase(path, None, unsafe=True)
    assert content(path, tmp_path) == bytes(SIZE)
    run("qemu-img", "rebase", "-u", "-b", base, "-F", "raw", path)
    assert bottomhalf.info(path).backing_file == str(base)
    clean(path)


# -- options of nodes, and damaged images


@pytest.mark.parametrize("given", [
    {"cache-size": 1048576, "l2-cache-size": 1048576, "refcount-cache-size": 1048576},
    {"cache-size": 1048576, "l2-cache-size": 2097152},
    {"cache-size": 1048576, "refcount-cache-size": 2097152},
    {"l2-cache-entry-size": 5000},
    {"l2-cache-entry-size": 131072},
    {"refcount-cache-size": 1 << 50},
    {"cache-clean-interval": 1 << 33},
    {"l2-cache-size": -1},
    {"lazy-refcounts": True},
    {"discard-no-unref": True},
], ids=str)
def test_options_that_cannot_be(require: Require, tmp_path: Path, given: dict[str, Any]) -> None:
    """In the same words; on an image of version 2, for those who need version 3."""
    require("qemu-io")
    path = tmp_path / "disk.qcow2"
    bottomhalf.create(path, format="qcow2", size=1 << 30, compat="0.10")
    words = ",".join(f"{name}={_word(value)}" for name, value in given.items())
    image = f"driver=qcow2,{words},file.driver=file,file.filename={path}"
    theirs = fails("qemu-io", "-c", "read 0 512", "--image-opts", image)
    with pytest.raises((BlockError, OptionError)) as failed:
        bottomhalf.open(opened(path, **given))
    assert str(failed.value) == theirs.removeprefix("qemu-io: can't open: ")


def test_a_damaged_image_is_marked_alike(require: Require, tmp_path: Path) -> None:
    """The counter of the L1 table is lost. Both refuse the write, say the same, and leave the same image."""
    require("qemu-img")
    require("qemu-io")
    path, said = tmp_path / "disk.qcow2", []
    for who in ("QEMU", "we"):
        run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
        with open(path, "r+b") as file:
            file.seek(2 * 65536 + 3 * 2)
            file.write(b"\0\0")
        if who == "QEMU":
            text = subprocess.run(["qemu-io", "-c", "write 0 64k", str(path)], capture_output=True, text=True).stderr
            said.append(text.strip())
        else:
            with pytest.raises(OSError), bottomhalf.open(opened(path)) as disk:
                disk._backend.graph.image_corrupted = lambda node, text, *rest: said.append(f"qcow2: {text}")
                disk.pwrite(bytes(65536), 0)
        assert Header.parse(path.read_bytes()[:65536]).incompatible & CORRUPT
        assert "cannot be opened read/write" in fails("qemu-io", "-c", "read 0 512", path)
    assert said[0] == said[1]


def test_a_backing_format_that_only_others_know(require: Require, tmp_path: Path) -> None:
    """It is a name to us, which QEMU may make something of."""
    require("qemu-img")
    path = tmp_path / "disk.qcow2"
    bottomhalf.create(path, format="qcow2", size=MIB, backing_file="base.vmdk", backing_fmt="vmdk")
    assert "backing file format: vmdk" in run("qemu-img", "info", path)
