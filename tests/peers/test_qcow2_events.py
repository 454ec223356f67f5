# SPDX-License-Identifier: Apache-2.0
"""blkdebug below a qcow2 image: an error that is injected at a named point of the driver's work fails what it fails in
QEMU. Where our order of work is another one (tables are written by the next flush, not by the write that changes them),
the flush fails instead, which is the same to whoever waits for both."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import bottomhalf
from tests.peers.test_qcow2 import run

MIB: Final = 1 << 20
EVENTS: Final = (
    *("l1_update", "l2_load", "l2_update", "l2_update_compressed", "l2_alloc_write", "read_aio", "read_backing_aio"),
    *("read_compressed", "write_aio", "write_compressed", "cow_read", "cow_write", "reftable_load", "reftable_grow"),
    *("refblock_load", "refblock_update_part", "refblock_alloc", "cluster_alloc", "cluster_alloc_bytes"),
    *("cluster_free", "pwritev"),
)
# What, for qemu-io and for us. All of it is followed by a flush.
WORK: Final[dict[str, tuple[str, Callable[[Any], object]]]] = {
    "read": ("read 0 4k", lambda disk: disk.pread(4096, 0)),
    "read compressed": ("read 1M 4k", lambda disk: disk.pread(4096, MIB)),
    "write over": ("write 0 4k", lambda disk: disk.pwrite(b"x" * 4096, 0)),
    "copy on write": ("write 2049k 1k", lambda disk: disk.pwrite(b"x" * 1024, 2049 * 1024)),
    "new table": ("write 3M 4k", lambda disk: disk.pwrite(b"x" * 4096, 3 * MIB)),
    "discard": ("discard 0 8k", lambda disk: disk.discard(0, 8192)),
    "write compressed": ("write -c 2M 4k", lambda disk: disk.pwrite(b"x" * 4096, 2 * MIB)),
}
DIFFERENCES: Final[dict[tuple[str, str], str]] = {
    **{
        ("l2_update", work): "a new table is written whole, at l2_alloc_write"
        for work in ("copy on write", "new table", "write compressed")
    },
    ("refblock_alloc", "discard"): "QEMU comes by there whenever a counter changes, here when a cluster is given out",
}


@pytest.fixture(scope="module")
def image(require: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """An image above a backing file, with some data, one cluster of it compressed."""
    require("qemu-img")
    require("qemu-io")
    folder = tmp_path_factory.mktemp("events")
    path, base = folder / "disk.qcow2", folder / "base.raw"
    base.write_bytes(b"\7" * (4 * MIB))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", base, "-F", "raw", path)
    run("qemu-io", "-c", "write -P 1 0 64k", "-c", "write -c -P 5 1M 4k", path)
    return path.read_bytes(), base


def ours(path: Path, base: Path, event: str, work: str) -> bool:
    """Whether something has failed."""
    rule = {"event": event, "errno": 5, "once": True}
    file = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, "inject-error": [rule]}
    backing = {"driver": "raw", "file": {"driver": "file", "filename": str(base)}}
    options: dict[str, Any] = {"driver": "qcow2", "discard": "unmap", "file": file, "backing": backing}
    if work == "write compressed":
        options = {"driver": "compress", "file": options}
    try:
        with bottomhalf.open(options) as disk:
            failed = 0
            for step in (WORK[work][1], lambda disk: disk.flush()):
                try:
                    step(disk)
                except OSError:
                    failed += 1
            if failed:
                assert disk.pread(1024, 512 * 1024) == b"\7" * 1024, "an error that is injected once is over"
            return bool(failed)
    except (OSError, bottomhalf.block.BlockError):
        return True


@pytest.mark.parametrize("event", EVENTS)
def test_events(image: tuple[bytes, Path], tmp_path: Path, event: str) -> None:
    data, base = image
    path = tmp_path / "disk.qcow2"
    found, expected = {}, {}
    for work, (command, _) in WORK.items():
        path.write_bytes(data)
        found[work] = ours(path, base, event, work)
        path.write_bytes(data)
        file = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}}
        rule = {"event": event, "errno": 5, "once": True}
        options = {"driver": "qcow2", "file": {**file, "inject-error": [rule]}}
        words = ["qemu-io", "-c", command, "-c", "flush", f"json:{json.dumps(options)}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        expected[work] = bool(done.returncode or "Input/output" in done.stdout + done.stderr)
    for work, fails in expected.items():
        assert (found[work] != fails) == ((event, work) in DIFFERENCES), (work, found, expected)
