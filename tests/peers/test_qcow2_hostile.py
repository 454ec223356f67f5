# SPDX-License-Identifier: Apache-2.0
"""Hostile images beside QEMU: what both can read is the same, and whom it calls whole we call whole."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import bottomhalf
from tests.drivers.qcow2.mutants import FORMS, SECRET, mutate

MUTANTS = 3  # per seed, of those that make a file that can be copied
FILE_BYTES_MAX = 8 << 20
DISK_BYTES_MAX = 4 << 20
READABLE = tuple(name for name in FORMS if name != "crypto")


def read_by_us(path: Path) -> bytes | None:
    """None: it cannot be opened or read."""
    options = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None}
    try:
        with bottomhalf.open(options, read_only=True) as disk:
            return disk.pread(disk.size, 0) if disk.size <= DISK_BYTES_MAX else None
    except (bottomhalf.block.BlockError, OSError):
        return None


def read_by_qemu(path: Path) -> bytes | None:
    target = path.with_suffix(".raw")
    target.unlink(missing_ok=True)
    image = f"driver=qcow2,file.driver=file,file.filename={path},backing="
    words = ["qemu-img", "convert", "--image-opts", "-O", "raw", image, str(target)]
    done = subprocess.run(words, capture_output=True, check=False)
    return target.read_bytes() if done.returncode == 0 and target.exists() else None


def test_mutants(require: Callable[[str], str], tmp_path: Path, seed: int) -> None:
    require("qemu-img")
    chance = random.Random(f"beside QEMU {seed}")
    (tmp_path / SECRET).write_bytes(b"secret" * 1000)
    path = tmp_path / "disk.qcow2"
    tried = 0
    while tried < MUTANTS:
        image = mutate(chance.choice(READABLE), chance)
        if image.length > FILE_BYTES_MAX or image.number(24) > DISK_BYTES_MAX:
            continue
        tried += 1
        path.write_bytes(bytes(image.data).ljust(image.length, b"\0"))
        ours = read_by_us(path)
        if ours is not None:
            theirs = read_by_qemu(path)
            assert theirs is None or ours == theirs, image.what
        try:
            status = bottomhalf.check(path).status
        except bottomhalf.block.ImageError:
            continue
        done = subprocess.run(["qemu-img", "check", path], capture_output=True, check=False)
        if status == 0:
            assert done.returncode in (0, 1), (image.what, done.stderr)
        elif done.returncode == 0:
            pytest.fail(f"QEMU finds nothing wrong with {image.what}: {bottomhalf.check(path).findings}")
