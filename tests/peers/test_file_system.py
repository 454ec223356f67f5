# SPDX-License-Identifier: Apache-2.0
"""A real file system on a qcow2 image of ours: the kernel's ext4, through FUSE and NBD, with snapshots and discards."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from tests.loop_devices import loop_device
from tests.peers.programs import READY_SECONDS
from tests.peers.test_qcow2 import run

DISK_BYTES = 192 << 20
FILE_BYTES_MAX = 1 << 20


def plant(root: Path, seed: int, count: int) -> dict[str, str]:
    """New files in new directories; what is in them."""
    chance, planted = random.Random(seed), dict[str, str]()
    for number in range(count):
        file = root / f"{seed}-{chance.randrange(5)}" / f"file{number}"
        file.parent.mkdir(exist_ok=True)
        data = chance.randbytes(chance.choice((0, 10, 5000, 100_000, FILE_BYTES_MAX)))
        file.write_bytes(data)
        planted[str(file.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return planted


def contents(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def mounted(device: str, where: Path) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "ext4", device, where], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        run("umount", where)


@contextmanager
def device(spawn: Callable[..., Any], nbdfuse: str, image: Path, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """The image as a block device, served by our daemon; and its monitor."""
    nbd, monitor, disk = (tmp_path / name for name in ("nbd.sock", "qmp.sock", "disk"))
    for left in (nbd, monitor):
        left.unlink(missing_ok=True)
    disk.touch()
    file = f"driver=file,node-name=file,filename={image},discard=unmap"
    daemon = spawn(
        [
            *(sys.executable, "-m", "bottomhalf.tools.bh_storage_daemon", "--blockdev", file),
            *("--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap"),
            *("--nbd-server", f"addr.type=unix,addr.path={nbd}"),
            *("--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"),
            *("--chardev", f"socket,id=m,path={monitor},server=on,wait=off", "--monitor", "m"),
        ],
        ready=monitor,
    )
    fuse = spawn([nbdfuse, disk, f"nbd+unix:///disk?socket={nbd}"])
    deadline = time.monotonic() + READY_SECONDS
    while disk.stat().st_size != DISK_BYTES:
        if fuse.process.poll() is not None or time.monotonic() > deadline:
            pytest.skip(f"no FUSE here: {fuse.output().strip()}")
    try:
        with loop_device(disk) as made:
            yield made, monitor
    finally:
        # nbdfuse may miss a signal, which one of its threads takes that does not look; it does not miss this.
        subprocess.run(["umount", disk], capture_output=True, check=False)
        fuse.stop(signal.SIGINT, seconds=30)
        assert daemon.stop() == 0


def test_ext4_with_snapshots_and_discards(
    require: Callable[[str], str], spawn: Callable[..., Any], tmp_path: Path
) -> None:
    """Files, a snapshot under a mounted file system, more files, others removed, fstrim, back to the snapshot: fsck
    finds nothing, and every file is what it was."""
    nbdfuse, qemu_img = require("nbdfuse"), require("qemu-img")
    mkfs, fsck = require("mkfs.ext4"), require("fsck.ext4")
    image = tmp_path / "disk.qcow2"
    bottomhalf.create(image, format="qcow2", size=DISK_BYTES)
    with device(spawn, nbdfuse, image, tmp_path) as (made, monitor):
        run(mkfs, "-q", "-F", made)
        with mounted(made, tmp_path / "mnt") as root:
            planted = plant(root, 1, 60)
            run("sync", "-f", root)
            snapshot(monitor, "first")
            for name in list(planted)[::3]:
                (root / name).unlink()
            kept = {name: digest for number, (name, digest) in enumerate(planted.items()) if number % 3}
            kept |= plant(root, 2, 60)
            run("fstrim", root)
            assert contents(root) == kept
        assert run(fsck, "-fn", made)
    assert "No errors" in run(qemu_img, "check", image)
    found = bottomhalf.check(image)
    assert not found.corruptions and not found.leaks, found.findings
    bottomhalf.snapshot_apply(image, "first")
    with device(spawn, nbdfuse, image, tmp_path) as (made, _):
        with mounted(made, tmp_path / "mnt") as root:
            assert contents(root) == planted
        run(fsck, "-fn", made)
    bottomhalf.snapshot_delete(image, "first")
    assert "No errors" in run(qemu_img, "check", image)


def snapshot(monitor: Path, name: str) -> None:
    """Have the daemon make a snapshot, as a management program would."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(monitor))
        stream = client.makefile("rw")
        stream.readline()
        for command in (
            {"execute": "qmp_capabilities"},
            {"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "disk", "name": name}},
        ):
            stream.write(json.dumps(command) + "\n")
            stream.flush()
            answer = json.loads(stream.readline())
            assert answer == {"return": {}}, answer
