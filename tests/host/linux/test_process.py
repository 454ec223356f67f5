# SPDX-License-Identifier: Apache-2.0
"""Signals as readiness, pid files, going to the background, image locks between processes, arenas."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.linux.locks import ImageLocks
from bottomhalf.host.linux.memory import LinuxArena
from bottomhalf.host.linux.process import LinuxSignals, PidFile
from bottomhalf.host.protocol import IN, PERM_ALL, PERM_CONSISTENT_READ, PERM_WRITE, ImageInUse

SOURCE = str(Path(__file__).parents[3] / "src")


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_signals() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    source = LinuxSignals([signal.SIGUSR1, signal.SIGUSR2])
    poller = LinuxHost().poller()
    poller.register(source.fileno(), IN)
    assert source.take() == [] and poller.wait(0) == []
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert poller.wait(-1) == [(source.fileno(), IN)]
    taken = source.take()
    assert set(taken) == {signal.SIGUSR1, signal.SIGUSR2}
    assert source.take() == [] and poller.wait(0) == []
    poller.unregister(source.fileno())
    source.close()
    poller.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_signals_of_others_are_not_told() -> None:
    """Another handler's signal goes through the same descriptor and is left out."""
    got: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _frame: got.append(number))
    source = LinuxSignals([signal.SIGUSR1])
    os.kill(os.getpid(), signal.SIGUSR2)
    assert source.take() == [] and got == [signal.SIGUSR2]
    source.close()
    signal.signal(signal.SIGUSR2, before)


def test_pid_file(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    held = PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    second = python(
        "import sys; from bottomhalf.host.linux.process import PidFile; PidFile(sys.argv[1])", str(path)
    )
    assert second.returncode == 1 and "another process holds it" in second.stderr
    assert path.read_text() == f"{os.getpid()}\n"
    held.close()
    assert not path.exists()
    PidFile(str(path)).close()
    with pytest.raises(FileNotFoundError):
        PidFile(str(tmp_path / "nowhere" / "pid"))


BACKGROUND = """
import os, sys
from bottomhalf.host.linux.process import Background
background = Background()
if sys.argv[1] == "fails":
    sys.exit("no such image")
print("ready soon", flush=True)
background.ready()
os.write(int(sys.argv[2]), f"{os.getsid(0) == os.getpid()} {os.getcwd()}".encode())
"""


def test_background() -> None:
    """The parent exits when the child is ready; the child has a session of its own and goes on."""
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    parent = subprocess.run(
        [sys.executable, "-c", BACKGROUND, "works", str(write_end)],
        env={**os.environ, "PYTHONPATH": SOURCE},
        pass_fds=[write_end],
        capture_output=True,
        text=True,
        timeout=60,
    )
    os.close(write_end)
    assert (parent.returncode, parent.stdout) == (0, "ready soon\n")
    assert os.read(read_end, 100) == b"True /"
    os.close(read_end)


def test_background_that_fails() -> None:
    """Errors before ready() reach the terminal, and the parent's status."""
    done = python(BACKGROUND, "fails")
    assert done.returncode == 1 and "no such image" in done.stderr


LOCK = """
import os, sys
from bottomhalf.host.linux.locks import ImageLocks
fd = os.open(sys.argv[1], os.O_RDWR)
ImageLocks(fd, sys.argv[1]).set(int(sys.argv[2]), int(sys.argv[3]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_locks_between_processes(tmp_path: Path) -> None:
    """The refusal names the process that is in the way; nothing has changed after it; it ends with that process."""
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    other = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(path), str(PERM_WRITE), str(PERM_ALL & ~PERM_WRITE)],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin and other.stdout and other.stdout.readline() == "locked\n"
    fd = os.open(path, os.O_RDWR)
    locks = ImageLocks(fd, str(path))
    locks.set(PERM_CONSISTENT_READ, PERM_ALL)
    with pytest.raises(ImageInUse, match=rf'Failed to get "write" lock.*\(pid {other.pid}\)') as caught:
        locks.set(PERM_WRITE, PERM_ALL)
    assert caught.value.errno == errno.EAGAIN
    with pytest.raises(ImageInUse, match='Failed to get shared "write" lock'):
        locks.set(0, PERM_ALL & ~PERM_WRITE)
    assert locks._locked == {100}
    other.communicate("")
    locks.set(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    assert locks._locked == {101, 201}
    locks.set(0, PERM_ALL)
    assert locks._locked == set()
    os.close(fd)


def test_locked_bytes(tmp_path: Path) -> None:
    """Shared locks on bytes 100 + n for what is held and 200 + n for what is not shared, as QEMU's."""
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    fd = os.open(path, os.O_RDWR)
    ImageLocks(fd, str(path)).set(PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL & ~0b1000)
    with open(f"/proc/self/fdinfo/{fd}") as info:
        locked = [line.split() for line in info if line.startswith("lock:")]
    assert all(fields[2] == "OFDLCK" and fields[4] == "READ" for fields in locked)
    # The kernel merges neighbours.
    assert sorted((int(fields[-2]), int(fields[-1])) for fields in locked) == [(100, 101), (203, 203)]
    os.close(fd)


def test_arena() -> None:
    arena = LinuxArena(10_000)
    assert arena.size == 10_000 and arena.address % 4096 == 0 and len(arena.view) == 10_000
    kept = arena.view[100:200]
    kept[:] = b"k" * 100
    arena.close()
    assert bytes(kept) == b"k" * 100  # whoever still looks is not pulled the memory away
    with pytest.raises((ValueError, OSError)):
        LinuxArena(0)
