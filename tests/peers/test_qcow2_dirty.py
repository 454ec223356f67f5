# SPDX-License-Identifier: Apache-2.0
"""Images that were not closed properly, or are marked corrupt, or have bits that nobody knows: opening one does what it
does in QEMU, with the same words."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import bottomhalf
from tests.peers.damages import DAMAGES, Damaged
from tests.peers.test_qcow2 import run

FEATURE_NAMES: Final = 0x6803F857
CASES: Final[dict[str, Any]] = {
    "dirty": lambda i: i.put(72, 1),
    "dirty and leaked": lambda i: (i.put(72, 1), i.count(i.host(0x100000), 7)),
    "dirty and too low": lambda i: (i.put(72, 1), i.count(i.host(0x100000), 1)),
    "dirty and not counted": lambda i: (i.put(72, 1), i.count(i.host(0x100000), 0)),
    "dirty and flag missing": lambda i: (i.put(72, 1), DAMAGES["L2 entry without COPIED"](i)),
    "dirty and reserved": lambda i: (i.put(72, 1), DAMAGES["L2 entry reserved"](i)),
    "dirty and not to be repaired": lambda i: (i.put(72, 1), i.put(i.l1, 1 << 63 | i.l1)),
    "corrupt": lambda i: i.put(72, 2),
    "corrupt and dirty": lambda i: i.put(72, 3),
    "unknown autoclear bits": lambda i: i.put(88, 0xF0),
    "unknown incompatible bits": lambda i: i.put(72, 0x100020),
    "named incompatible bits": lambda i: (
        i.put(72, 0x100020),
        i.bytes.__setitem__(slice(i.names, i.names + 48), bytes((0, 20)) + b"brand new".ljust(46, b"\0")),
    ),
    "L1 entry damaged": lambda i: DAMAGES["L2 table unaligned"](i),
}


@pytest.fixture(scope="module")
def image(require: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    require("qemu-img")
    require("qemu-io")
    path = tmp_path_factory.mktemp("dirty") / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=8k", path, "4M")
    run("qemu-io", "-c", "write -P 1 0 64k", "-c", "write -P 2 1M 16k", "-c", "write -P 4 2M 8k", path)
    return path.read_bytes()


class Image(Damaged):
    """Clusters of 8 KiB, since smaller ones have no table of features."""

    def __init__(self, image: bytes) -> None:
        super().__init__(image)
        self.names = self.extension(FEATURE_NAMES)

    def entry(self, guest: int) -> int:
        return self.l2[0] + 8 * (guest >> 13)

    def host(self, guest: int) -> int:
        return (self.u64(self.entry(guest)) & 0x00FFFFFFFFFFFE00) >> 13


@pytest.mark.parametrize("how", ["read-only", "writable"])
@pytest.mark.parametrize("case", CASES)
def test_opening(image: bytes, tmp_path: Path, case: str, how: str) -> None:
    damaged = Image(image)
    CASES[case](damaged)
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    ours.write_bytes(damaged.bytes)
    theirs.write_bytes(damaged.bytes)
    words = ["qemu-io", "-f", "qcow2", *(["-r"] if how == "read-only" else []), "-c", "read 0 1k", str(theirs)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    said = ""
    try:
        with bottomhalf.open(ours, read_only=how == "read-only") as disk:
            content = disk.pread(1024, 0)
            assert content == b"\1" * 1024 or case == "dirty and not to be repaired"
    except bottomhalf.block.BlockError as error:
        said = str(error)
    if case == "dirty and not to be repaired" and how == "writable":
        assert "Could not repair dirty image" in said and "Could not repair dirty image" in done.stderr
        return
    assert bool(said) == (done.returncode != 0), (said, done.stderr)
    if said:
        assert done.stderr.strip().split("theirs.qcow2: ")[-1] in said
    after, expected = Image(ours.read_bytes()), Image(theirs.read_bytes())
    assert after.bytes[72:96] == expected.bytes[72:96], "the bits of features"
    if how == "read-only" or said:
        assert after.bytes == damaged.bytes
    else:
        statuses = [
            subprocess.run(["qemu-img", "check", path], capture_output=True).returncode for path in (ours, theirs)
        ]
        assert statuses[0] == statuses[1]
