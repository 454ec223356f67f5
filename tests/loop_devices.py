# SPDX-License-Identifier: Apache-2.0
"""Loop devices for tests: real block devices on a file, which root may make and nobody forgets to give back."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def loop_device(backing: Path, *options: str) -> Iterator[str]:
    """A device on the file; the test is skipped where there can be none."""
    losetup = shutil.which("losetup")
    if losetup is None:
        pytest.skip("no loop devices here: losetup is not installed (package mount)")
    made = subprocess.run(
        [losetup, "--find", "--show", *options, str(backing)], capture_output=True, text=True, timeout=30
    )
    if made.returncode:
        pytest.skip(f"no loop devices here: {made.stderr.strip().rpartition(': ')[2]}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run([losetup, "--detach", device], check=True, timeout=30)
