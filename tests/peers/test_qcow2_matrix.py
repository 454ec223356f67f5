# SPDX-License-Identifier: Apache-2.0
"""Every form that qemu-img can give an image, and a life for each that QEMU and we lead in turn.

The forms are all combinations of what ``FACTORS`` lists, less those that qemu-img refuses. Each is made and filled by
QEMU's tools and read by us; then we write, snapshot, discard, resize; ``qemu-img check`` finds it clean and ``qemu-img
compare`` finds what a plain model says; QEMU writes again, and we read that.

CI runs so many forms that every two values of two factors which can go together do so once; ``--soak`` runs all.
``python -m tests.peers.test_qcow2_matrix PATH PART PARTS`` runs a part of them by itself, in a folder.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import bottomhalf
from bottomhalf.block import BlockError

Require = Callable[[str], str]
KIB: Final = 1 << 10
MIB: Final = 1 << 20

FACTORS: Final[dict[str, tuple[Any, ...]]] = {
    "version": (2, 3),
    "cluster_size": (512, 4 * KIB, 64 * KIB, 2 * MIB),
    "refcount_bits": (1, 2, 4, 8, 16, 32, 64),
    "extended_l2": (False, True),
    "compression": ("none", "zlib", "zstd"),
    "backing": (False, True),
    "data_file": ("none", "data", "raw"),
    "snapshots": (False, True),
    "bitmaps": (False, True),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "lazy_refcounts": (False, True),
}
# A disk of many clusters, but not of more bytes than it takes to be quick.
SIZES: Final = {512: 768 * KIB, 4 * KIB: 2 * MIB, 64 * KIB: 3 * MIB, 2 * MIB: 9 * MIB}
BASE_SEED: Final = 3

Form = dict[str, Any]


def possible(form: Form) -> bool:
    """Whether qemu-img makes it."""
    if form["version"] == 2 and (
        form["refcount_bits"] != 16
        or form["extended_l2"]
        or form["compression"] == "zstd"
        or form["data_file"] != "none"
        or form["lazy_refcounts"]
        or form["bitmaps"]
    ):
        return False
    if form["extended_l2"] and form["cluster_size"] < 16 * KIB:
        return False
    if form["data_file"] != "none" and (form["snapshots"] or form["compression"] != "none"):
        return False
    if form["data_file"] == "raw" and form["backing"]:
        return False
    if form["backing"] and form["preallocation"] != "off" and not form["extended_l2"]:
        return False
    return not (form["snapshots"] and form["refcount_bits"] == 1)


def all_forms() -> list[Form]:
    forms = (dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values()))
    return [form for form in forms if possible(form)]


def pairs_of(form: Form) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(form.items(), 2))


def covering(forms: list[Form], seed: int = 5) -> list[Form]:
    """Few forms in which every pair of values that can go together does: greedily, the best of some at a time."""
    chance = random.Random(seed)
    left = set().union(*map(pairs_of, forms))
    chosen = []
    while left:
        tried = chance.sample(forms, min(len(forms), 300))
        best = max(tried, key=lambda form: len(pairs_of(form) & left))
        if not pairs_of(best) & left:
            best = next(form for form in forms if pairs_of(form) & left)
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


def name_of(form: Form) -> str:
    return ",".join(f"{name}={value}" for name, value in form.items())


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert not done.returncode, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


class Life:
    """One image, and what it should contain."""

    def __init__(self, form: Form, folder: Path) -> None:
        self.form, self.folder = form, folder
        self.path = folder / "disk.qcow2"
        self.cluster: int = form["cluster_size"]
        size = SIZES[self.cluster]
        self.model = bytearray(size)
        self.snapshots: dict[str, bytes] = {}
        self.chance = random.Random(name_of(form))
        self.compresses = form["compression"] != "none"
        self.bitmap_is_kept = False
        self.can_resize = not (form["version"] == 2 and form["snapshots"])

    # -- QEMU's part

    def make(self) -> None:
        form = self.form
        given = {
            "compat": "0.10" if form["version"] == 2 else "1.1",
            "cluster_size": self.cluster,
            "refcount_bits": form["refcount_bits"],
            "preallocation": form["preallocation"],
        }
        for name in ("extended_l2", "lazy_refcounts"):
            if form[name]:
                given[name] = "on"
        if self.compresses:
            given["compression_type"] = form["compression"]
        if form["data_file"] != "none":
            given["data_file"] = self.folder / "data"
            given["data_file_raw"] = "on" if form["data_file"] == "raw" else "off"
        more: list[str | Path] = []
        if form["backing"]:
            base = random.Random(BASE_SEED).randbytes(len(self.model) * 3 // 4 // 512 * 512)
            (self.folder / "base").write_bytes(base)
            self.model[: len(base)] = base
            more = ["-b", self.folder / "base", "-F", "raw"]
        shape = ",".join(f"{name}={value}" for name, value in given.items())
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", shape, *more, self.path, str(len(self.model)))

    def qemu_writes(self, first: bool) -> None:
        commands, used = [], set()
        for _ in range(4):
            offset, length = self._somewhere()
            pattern = self.chance.randrange(1, 256)
            commands.append(f"write -P {pattern} {offset} {length}")
            self.model[offset : offset + length] = bytes([pattern]) * length
            used.update(range(offset // self.cluster, (offset + length - 1) // self.cluster + 1))
        free = [n for n in range(len(self.model) // self.cluster) if n not in used]
        if first and free and self.compresses and self.form["preallocation"] == "off":
            at = free[0] * self.cluster  # QEMU refuses to write compressed where something is allocated
            commands.append(f"write -c -P 200 {at} {self.cluster}")
            self.model[at : at + self.cluster] = b"\xc8" * self.cluster
        if self.form["version"] == 3:
            offset, length = self._somewhere()
            commands.append(f"write -z {self.chance.choice(['', '-u'])} {offset} {length}")
            self.model[offset : offset + length] = bytes(length)
        run("qemu-io", "-f", "qcow2", *(word for each in commands for word in ("-c", each)), self.path)

    def qemu_snapshots(self, name: str) -> None:
        run("qemu-img", "snapshot", "-c", name, self.path)
        self.snapshots[name] = bytes(self.model)

    def qemu_agrees(self) -> None:
        plain = self.folder / "plain"
        plain.write_bytes(self.model)
        run("qemu-img", "check", "-q", "-f", "qcow2", self.path)
        run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", self.path, plain)
        for name, content in self.snapshots.items():
            run("qemu-img", "convert", "-l", name, "-f", "qcow2", "-O", "raw", self.path, plain)
            same = min(len(self.model), len(content))  # QEMU shows it in the size that the disk has now
            assert plain.read_bytes()[:same] == content[:same], f"snapshot {name}"
        if self.form["data_file"] == "raw":
            data = (self.folder / "data").read_bytes()  # QEMU, too, makes whole clusters of it
            assert data == self.model.ljust(len(data), b"\0") and len(data) < len(self.model) + self.cluster

    # -- ours

    def open(self, read_only: bool = False, compress: bool = False) -> bottomhalf.Disk:
        file = {"driver": "file", "filename": str(self.path), "discard": "unmap"}
        options: dict[str, Any] = {"driver": "qcow2", "discard": "unmap", "file": file}
        if compress:
            options = {"driver": "compress", "file": options}
        return bottomhalf.open(options, read_only, backing_files=True)

    def we_read(self) -> None:
        with self.open(read_only=True) as disk:
            self._reads(disk)

    def _reads(self, disk: bottomhalf.Disk) -> None:
        assert disk.size == len(self.model)
        seen = disk.pread(disk.size, 0)
        if seen != self.model:
            at = next(n for n, (one, other) in enumerate(zip(seen, self.model, strict=True)) if one != other)
            raise AssertionError(f"byte {at}: {seen[at]} instead of {self.model[at]}")
        for _ in range(3):
            offset, length = self._somewhere()
            assert disk.pread(length, offset) == self.model[offset : offset + length]

    def we_write(self) -> None:
        with self.open() as disk:
            for _ in range(8):
                self._change(disk)
            self._reads(disk)
        if self.compresses:
            with self.open(compress=True) as disk:
                offset = self.chance.randrange(len(self.model) // self.cluster) * self.cluster
                length = min(self.cluster * self.chance.randrange(1, 3), len(self.model) - offset)
                self._put(disk, offset, bytes([self.chance.randrange(1, 256)]) * length)
                self._reads(disk)

    def _change(self, disk: bottomhalf.Disk) -> None:
        offset, length = self._somewhere()
        kind = self.chance.choice(("write", "write", "write", "fua", "zero", "zero, unmapped", "discard", "flush"))
        if kind == "flush":
            disk.flush()
        elif kind == "discard":
            before = self.model[offset : offset + length]
            disk.discard(offset, length)
            after = disk.pread(length, offset)
            borders = range((offset // self.cluster + 1) * self.cluster - offset, length, self.cluster)
            for start, end in itertools.pairwise((0, *borders, length)):  # all of a cluster's part, or nothing
                assert after[start:end] in (before[start:end], bytes(end - start))
            self.model[offset : offset + length] = after
        elif kind.startswith("zero"):
            disk.write_zeroes(offset, length, unmap="unmapped" in kind)
            self.model[offset : offset + length] = bytes(length)
        else:
            self._put(disk, offset, self.chance.randbytes(length), fua=kind == "fua")

    def _put(self, disk: bottomhalf.Disk, offset: int, data: bytes, fua: bool = False) -> None:
        disk.pwrite(data, offset, fua=fua)
        self.model[offset : offset + len(data)] = data

    def we_snapshot(self) -> None:
        if not self._agreed("-c", lambda: bottomhalf.snapshot_create(self.path, "ours"), "ours"):
            return
        self.snapshots["ours"] = bytes(self.model)
        with self.open() as disk:
            for _ in range(3):
                self._change(disk)
        before = self.chance.choice(list(self.snapshots))
        if self.chance.random() < 0.5 and self._agreed(
            "-a", lambda: bottomhalf.snapshot_apply(self.path, before), before
        ):
            self.model = bytearray(self.snapshots[before])
        if self.chance.random() < 0.5:
            bottomhalf.snapshot_delete(self.path, before)
            del self.snapshots[before]

    def _agreed(self, what: str, ours: Callable[[], object], name: str) -> bool:
        """Do it. Counters may be too narrow for it, and bitmaps could not say what changes: then QEMU has to refuse it
        for a copy, too."""
        copy = self.folder / "copy"
        copy.write_bytes(self.path.read_bytes())
        theirs = subprocess.run(["qemu-img", "snapshot", what, name, copy], capture_output=True, check=False)
        if not theirs.returncode:
            ours()
            return True
        with pytest.raises(OSError, match=r"cannot be counted|active dirty bitmaps") as refused:
            ours()
        assert self.bitmap_is_kept if "bitmaps" in str(refused.value) else self.form["refcount_bits"] < 8
        return False

    def we_resize(self) -> None:
        if not self.can_resize:
            with pytest.raises(OSError, match="Can't resize a v2 image which has snapshots"):
                bottomhalf.resize(self.path, len(self.model) + MIB, follow_names=True)
            return
        for size in (len(self.model) * 2 // 3 // 512 * 512, len(self.model) + self.cluster + 512):
            bottomhalf.resize(self.path, size, shrink=True, follow_names=True)
            del self.model[size:]
            self.model += bytes(size - len(self.model))
        with self.open() as disk:
            self._put(disk, len(self.model) - 700, b"e" * 700)
            self._reads(disk)

    def we_agree(self) -> None:
        found = bottomhalf.check(self.path)
        assert not found.corruptions and not found.leaks, found.findings

    # -- both

    def _somewhere(self) -> tuple[int, int]:
        """A range, often at the borders of clusters, sometimes of several."""
        size = len(self.model)
        length = min(self.chance.choice((1, 512, 700, 4096, self.cluster, 3 * self.cluster // 2)), size // 2)
        offset = self.chance.randrange(size - length)
        if self.chance.random() < 0.5:
            offset = offset // self.cluster * self.cluster
        return offset, length

    def live(self) -> None:
        self.make()
        self.qemu_writes(first=True)
        if self.form["bitmaps"]:
            run("qemu-img", "bitmap", "--add", self.path, "marks")
        if self.form["snapshots"]:
            self.qemu_snapshots("theirs")
            self.qemu_writes(first=False)
        self.we_read()
        if self.form["bitmaps"]:
            self.may_we_write()
        self.we_write()
        if self.form["snapshots"]:
            self.we_snapshot()
        self.we_resize()
        self.we_agree()
        self.qemu_agrees()
        if self.bitmap_is_kept:
            self.qemu_finds_the_bitmap()
        self.qemu_writes(first=False)
        self.we_read()

    def may_we_write(self) -> None:
        """Whoever cannot keep bitmaps up to date says so, and they are taken away."""
        self.bitmap_is_kept = True
        try:
            self.open().close()
        except BlockError as error:
            assert "has bitmaps" in str(error)
            run("qemu-img", "bitmap", "--remove", self.path, "marks")
            self.bitmap_is_kept = False

    def qemu_finds_the_bitmap(self) -> None:
        """It is there, and was closed. (What is in it: tests/drivers/qcow2/test_bitmaps.py.)"""
        about = json.loads(run("qemu-img", "info", "--output=json", self.path))
        (bitmap,) = about["format-specific"]["data"]["bitmaps"]
        assert (bitmap["name"], bitmap["flags"]) == ("marks", ["auto"])


FORMS: Final = all_forms()
CHOSEN: Final = covering(FORMS)


def test_the_chosen_ones_have_every_pair() -> None:
    """Of the values that can go together at all."""
    reached = set().union(*map(pairs_of, CHOSEN))
    assert reached == set().union(*map(pairs_of, FORMS))
    assert len(CHOSEN) < 80


@pytest.mark.parametrize("form", CHOSEN, ids=name_of)
def test_a_life(require: Require, tmp_path: Path, form: Form) -> None:
    require("qemu-img")
    require("qemu-io")
    Life(form, tmp_path).live()


def lives(forms: list[Form], folder: Path, tell: int = 0) -> list[str]:
    """What is wrong, form by form. The files of those that fail stay. ``tell``: print how far it is after so many."""
    failed = []
    for number, form in enumerate(forms):
        each = folder / str(number)
        each.mkdir()
        try:
            Life(form, each).live()
        except Exception as error:
            failed.append(f"{name_of(form)}: {error!r}")
        else:
            for path in each.iterdir():
                path.unlink()
            each.rmdir()
        if tell and number % tell == tell - 1:
            print(number + 1, *failed, sep="\n", flush=True)
    return failed


@pytest.mark.soak
@pytest.mark.hang_seconds(7200)
@pytest.mark.parametrize("cluster_size", FACTORS["cluster_size"])
@pytest.mark.parametrize("version, refcount_bits", [(2, 16), *((3, bits) for bits in FACTORS["refcount_bits"])])
def test_all_lives(require: Require, tmp_path: Path, version: int, refcount_bits: int, cluster_size: int) -> None:
    require("qemu-img")
    require("qemu-io")
    wanted = {"version": version, "refcount_bits": refcount_bits, "cluster_size": cluster_size}
    failed = lives([form for form in FORMS if form.items() >= wanted.items()], tmp_path)
    assert not failed, "\n".join(failed)


if __name__ == "__main__":
    part, parts = int(sys.argv[2]), int(sys.argv[3])
    mine = random.Random(1).sample(FORMS, len(FORMS))[part::parts]
    wrong = lives(mine, Path(sys.argv[1]), 100)
    print(f"{len(mine)} forms, {len(wrong)} failed", *wrong, sep="\n")
    sys.exit(bool(wrong))
