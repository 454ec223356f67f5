# SPDX-License-Identifier: Apache-2.0
"""Programs that we did not write: found, or the test that needs them skips with the reason.

    def test_with_a_stranger(require, spawn, tmp_path):
        qemu_img = require("qemu-img")
        server = spawn(["nbdkit", "-f", "-U", socket, "null"], ready=socket)

A name that is not in ``PACKAGES`` is an error of the test, so that every requirement is one that
``scripts/strangers.sh`` knows how to meet.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import pytest

# Program: the Debian package that brings it.
PACKAGES: Final = {
    "cryptsetup": "cryptsetup-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-utils",
    "nbdkit": "nbdkit",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "mkfs.ext4": "e2fsprogs",
    "fsck.ext4": "e2fsprogs",
    "fio": "fio",
    "openssl": "openssl",
    "cc": "gcc",
    # Not a program but the interpreter that can `import nbd`: the system's, seldom the one that runs us.
    "python3-libnbd": "python3-libnbd",
}

READY_SECONDS: Final = 20.0
PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


def require(program: str) -> str:
    """Return the path of a foreign program; skip the test, with the reason, when it is not installed."""
    path = find(program)
    if path is None:
        pytest.skip(f"needs {program} (apt package {PACKAGES[program]})")
    return path


@cache
def find(program: str) -> str | None:
    """Return the path of a foreign program, or None."""
    if program not in PACKAGES:
        raise LookupError(f"{program!r} is not in PACKAGES; add it there and to scripts/strangers.sh")
    if program == "python3-libnbd":
        return next((python for python in ("/usr/bin/python3", sys.executable) if _imports_nbd(python)), None)
    return shutil.which(program)


def _imports_nbd(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", "import nbd"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


class Spawned:
    """A child process of a test: its output is kept, and it ends when the test does."""

    def __init__(self, argv: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        self.argv = [str(word) for word in argv]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        parent = os.getpid()

        def die_with_parent() -> None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        self.process = subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            preexec_fn=die_with_parent,
        )

    def output(self) -> str:
        """Return what the process printed until now, both streams in one."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def wait_ready(self, address: str | Path | tuple[str, int], seconds: float = READY_SECONDS) -> None:
        """Wait until a Unix socket (a path) or TCP port (a pair) accepts; fail the test when none does."""
        deadline = time.monotonic() + seconds
        while not _accepts(address):
            if self.process.poll() is not None:
                status = self.process.returncode
                pytest.fail(f"{self.argv} ended with {status} at its start:\n{self.output()}")
            if time.monotonic() > deadline:
                pytest.fail(f"{self.argv} does not listen on {address} after {seconds} s:\n{self.output()}")
            time.sleep(0.005)

    def stop(self, how: int = signal.SIGTERM, seconds: float = 10.0) -> int:
        """End the process and return its exit status; kill it when it does not heed the signal in time."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def close(self) -> None:
        """Kill the process if it still runs, and forget its output."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._output.close()


def _accepts(address: str | Path | tuple[str, int]) -> bool:
    target = address if isinstance(address, tuple) else str(address)
    with socket.socket(socket.AF_UNIX if isinstance(target, str) else socket.AF_INET) as probe:
        try:
            probe.connect(target)
        except OSError:
            return False
    return True
