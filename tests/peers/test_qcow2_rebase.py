# SPDX-License-Identifier: Apache-2.0
"""Rebasing images beside qemu-img: the content stays, what is copied is the same, and who does it does not matter."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from bottomhalf.block import BlockError
from bottomhalf.drivers.qcow2.header import Header
from tests.peers.test_qcow2 import run

Require = Callable[[str], str]
MIB = 1 << 20
SIZE = 4 * MIB
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clusters of 512": {"cluster_size": 512},
    "clusters of 2M": {"cluster_size": 2 * MIB},
    "version 2": {"compat": "0.10"},
    "extended": {"extended_l2": True},
    "data file": {"data_file": "data.raw"},
}
# The new backing file's size, and what of it is like the old one's.
TARGETS = {"same size": SIZE, "shorter": MIB + 12800, "longer": 2 * SIZE, "none": 0}


def content(path: Path) -> bytes:
    raw = path.with_suffix(".content")
    run("qemu-img", "convert", "-O", "raw", path, raw)
    return raw.read_bytes()


def prepare(shape: dict[str, Any], old_bytes: int, new_bytes: int) -> bytes:
    """disk.qcow2 on old.raw, and new.raw, which is like it in parts; the disk's content."""
    chance = random.Random(old_bytes + new_bytes)
    old = bytearray(b"".join(chance.randbytes(64) * 64 for _ in range(-(-old_bytes // 4096)))[:old_bytes])
    old[MIB // 2 : MIB] = bytes(MIB // 2)
    new = bytearray(chance.randbytes(new_bytes))
    for start in range(0, min(old_bytes, new_bytes), 300_000):
        new[start : start + 150_000] = old[start : min(start + 150_000, new_bytes)]
    Path("old.raw").write_bytes(old)
    Path("new.raw").write_bytes(new)
    bottomhalf.create("disk.qcow2", format="qcow2", size=SIZE, backing_file="old.raw", backing_fmt="raw", **shape)
    zero = [] if "compat" in shape else ["-c", "write -z 1200k 64k", "-c", "discard 2200k 128k"]
    writes = ["-c", "write -P 1 100k 50k", "-c", "write -P 2 2M 10k", "-c", "write -P 3 3M 7k"]
    run("qemu-io", *writes, *zero, "disk.qcow2")
    return content(Path("disk.qcow2"))


def _cases() -> list[Any]:
    """All of them in a soak; every shape, every target, and both sizes of the old file in CI."""
    found = []
    for number, (shape, target, shorter, compress) in enumerate(
        itertools.product(SHAPES, TARGETS, (False, True), (False, True))
    ):
        if compress and shape == "data file":
            continue
        marks = [] if shape == "plain" or number % 5 == 0 else [pytest.mark.soak]
        more = (", old one shorter" if shorter else "") + (", compressed" if compress else "")
        case = (shape, target, 2 * MIB + 512 if shorter else SIZE, compress)
        found.append(pytest.param(*case, marks=marks, id=f"{shape}, {target}{more}"))
    return found


@pytest.mark.parametrize("shape, target, old_bytes, compress", _cases())
def test_rebase(
    require: Require, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    shape: str, target: str, old_bytes: int, compress: bool,
) -> None:  # fmt: skip
    """Beside QEMU's own; what is allocated then is not more."""
    require("qemu-img")
    require("qemu-io")
    monkeypatch.chdir(tmp_path)
    expected = prepare(SHAPES[shape], old_bytes, TARGETS[target])
    theirs = Path("theirs.qcow2")
    if shape != "data file" and not (compress and shape == "extended"):  # QEMU 10.0 aborts on the latter
        shutil.copy("disk.qcow2", theirs)
        new = ["-b", "new.raw", "-F", "raw"] if TARGETS[target] else ["-b", ""]
        run("qemu-img", "rebase", *(["-c"] if compress else []), *new, theirs)
    told: list[tuple[int, int]] = []
    name, kind = ("new.raw", "raw") if TARGETS[target] else (None, None)
    bottomhalf.rebase(
        "disk.qcow2", name, kind, compress=compress, follow_names=True, progress=lambda *now: told.append(now)
    )
    assert bottomhalf.info("disk.qcow2").backing_file == name
    run("qemu-img", "check", "disk.qcow2")
    assert content(Path("disk.qcow2")) == expected
    with bottomhalf.open("disk.qcow2", backing_files=True, read_only=True) as disk:
        assert disk.pread(SIZE, 0) == expected
    assert told[-1] == (SIZE, SIZE) and told == sorted(told)
    if theirs.exists():
        run("qemu-img", "compare", "disk.qcow2", theirs)
        sizes = [bottomhalf.check(each).allocated_clusters for each in ("disk.qcow2", theirs)]
        assert sizes[0] <= sizes[1]
    if shape != "clusters of 2M":  # there are two of them, and both are in use
        assert bool(bottomhalf.check("disk.qcow2").compressed_clusters) == compress


def test_chains(require: Require, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file in the middle of a chain to the one below, and from there to a chain of its own."""
    require("qemu-img")
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(b"b" * 3 * MIB)
    for name, below, kind in (("middle", "base.raw", "raw"), ("top", "middle", "qcow2"), ("other", "base.raw", "raw")):
        bottomhalf.create(name, format="qcow2", size=SIZE, backing_file=below, backing_fmt=kind)
        with bottomhalf.open(name, backing_files=True) as disk:
            disk.pwrite(name.encode() * 40_000, len(name) * 100_001)
    expected = content(Path("top"))
    for below, kind in (("base.raw", "raw"), ("other", "qcow2"), (None, None)):
        bottomhalf.rebase("top", below, kind, follow_names=True)
        assert content(Path("top")) == expected
        run("qemu-img", "check", "top")


def test_encrypted(require: Require, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(b"in the clear" * 100_000)
    bottomhalf.create("disk", format="qcow2", size=SIZE, backing_file="base.raw", backing_fmt="raw",
                      encrypt_format="luks", encrypt_secret="s", encrypt_iter_time=1)  # fmt: skip
    bottomhalf.rebase("disk", None, follow_names=True, secret="s")
    assert b"in the clear" not in Path("disk").read_bytes()
    with bottomhalf.open("disk", secret="s", read_only=True) as disk:
        assert disk.pread(SIZE, 0) == (b"in the clear" * 100_000).ljust(SIZE, b"\0")


@pytest.mark.parametrize("new", [
    ("new.raw", None), ("nosuch", "raw"), ("new.raw", "nosuch"), ("disk.qcow2", "qcow2"), ("x" * 1024, "raw"),
], ids=str)  # fmt: skip
def test_what_cannot_be(
    require: Require, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: tuple[str, str | None]
) -> None:
    """Then nothing has changed; in QEMU's words where they are the user's business."""
    require("qemu-img")
    monkeypatch.chdir(tmp_path)
    expected = prepare({}, SIZE, SIZE)
    before = Path("disk.qcow2").read_bytes()
    name, kind = new
    theirs = subprocess.run(
        ["qemu-img", "rebase", "-b", name, *(["-F", kind] if kind else []), "disk.qcow2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert theirs.returncode
    Path("disk.qcow2").write_bytes(before)
    with pytest.raises((BlockError, OSError)) as failed:
        bottomhalf.rebase("disk.qcow2", name, kind, follow_names=True)
    if new in (("new.raw", None), ("nosuch", "raw"), ("new.raw", "nosuch")):
        assert theirs.stderr.strip() == f"qemu-img: {failed.value}"
    assert Header.parse(Path("disk.qcow2").read_bytes()[:65536]) == Header.parse(before[:65536])
    assert content(Path("disk.qcow2")) == expected
