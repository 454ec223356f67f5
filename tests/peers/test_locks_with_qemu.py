# SPDX-License-Identifier: Apache-2.0
"""Image locks between QEMU's programs and ours: the same answers, whoever came first.

One storage daemon holds an image, QEMU's or ours, and another program comes: QEMU's daemon, ours, qemu-io, qemu-img.
What it is told may not depend on who the holder is, nor (but for what we add) on who the visitor is. Two who only read
are let in always.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bottomhalf import create
from tests.loop_devices import loop_device

SECONDS_MAX = 60
Require = Callable[[str], str]
OURS = [sys.executable, "-m", "bottomhalf.tools.bh_storage_daemon"]


@pytest.fixture(params=["raw", "qcow2", "device"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str, str]]:
    """A path, its format, and the driver that opens it."""
    path = tmp_path / "image"
    if request.param == "qcow2":
        create(path, size=1 << 20, format="qcow2")
        yield str(path), "qcow2", "file"
        return
    path.write_bytes(bytes(1 << 20))
    if request.param == "raw":
        yield str(path), "raw", "file"
        return
    with loop_device(path) as device:
        yield device, "raw", "host_device"


def words(image: tuple[str, str, str], socket: Path, writable: bool) -> list[str]:
    """What either storage daemon takes: the image, and an export that uses it."""
    path, form, driver = image
    read_only = "off" if writable else "on"
    return [
        *("--blockdev", f"driver={driver},node-name=file,filename={path},read-only={read_only},locking=on"),
        *("--blockdev", f"driver={form},node-name=disk,file=file,read-only={read_only}"),
        *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
        *("--export", f"type=nbd,id=e,node-name=disk,writable={'on' if writable else 'off'}"),
    ]


@contextmanager
def held(spawn: Any, who: list[str], image: tuple[str, str, str], socket: Path, writable: bool) -> Iterator[Any]:
    process = spawn([*who, *words(image, socket, writable)], ready=socket)
    try:
        yield process
    finally:
        process.stop(signal.SIGTERM)
        socket.unlink(missing_ok=True)


def come(command: list[str]) -> tuple[bool, str]:
    """Whether a program that ends by itself was let in, and what it says of locks."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, stdin=subprocess.DEVNULL)
    said = re.findall(r'Failed to get (?:shared )?"[a-z ]+" lock|Is another process using the image .*\?', done.stderr)
    return done.returncode == 0, " / ".join(said)


def visitors(require: Require, image: tuple[str, str, str], socket: Path) -> dict[str, list[str]]:
    path, form, _ = image
    bad = ["--chardev", "null,id=null", "--monitor", "chardev=missing"]  # ends a daemon that got so far
    return {
        "qemu-io writes": [require("qemu-io"), "-f", form, "-c", "write 0 512", path],
        "qemu-io reads": [require("qemu-io"), "-r", "-f", form, "-c", "read 0 512", path],
        "qemu-img info": [require("qemu-img"), "info", "-f", form, path],
        "qemu-img convert": [require("qemu-img"), "convert", "-f", form, "-O", "raw", path, f"{socket}.copy"],
        "qemu-img resize": [require("qemu-img"), "resize", "-f", form, path, "1M"],
        "their daemon writes": [require("qemu-storage-daemon"), *words(image, socket, True), *bad],
        "our daemon writes": [*OURS, *words(image, socket, True), *bad],
        "their daemon reads": [require("qemu-storage-daemon"), *words(image, socket, False), *bad],
        "our daemon reads": [*OURS, *words(image, socket, False), *bad],
    }


def test_who_is_refused_does_not_depend_on_who_holds(
    spawn: Any, require: Require, image: tuple[str, str, str], tmp_path: Path
) -> None:
    holders = {"theirs": [require("qemu-storage-daemon")], "ours": OURS}
    came = visitors(require, image, tmp_path / "visitor.sock")
    for writable in (True, False):
        answers: dict[str, dict[str, tuple[bool, str]]] = {}
        for holder, program in holders.items():
            with held(spawn, program, image, tmp_path / f"{holder}.sock", writable):
                answers[holder] = {name: come(command) for name, command in came.items()}
        assert answers["ours"] == answers["theirs"]
        said = {name: text for name, (_, text) in answers["ours"].items()}
        assert said["our daemon writes"] == said["their daemon writes"]
        assert said["our daemon reads"] == said["their daemon reads"]
        if not writable:
            assert not said["our daemon reads"] and not said["qemu-io reads"] and not said["qemu-img info"]
        elif image[1] == "qcow2":
            assert 'Failed to get "write" lock' in said["our daemon writes"], "two would spoil each other's tables"


@pytest.mark.parametrize("holder", ["theirs", "ours"])
def test_the_refusal_names_permission_and_process(
    spawn: Any, require: Require, tmp_path: Path, holder: str
) -> None:
    path = tmp_path / "image"
    create(path, size=1 << 20, format="qcow2")
    image = (str(path), "qcow2", "file")
    program = OURS if holder == "ours" else [require("qemu-storage-daemon")]
    with held(spawn, program, image, tmp_path / "first.sock", True) as process:
        done = subprocess.run(
            [*OURS, *words(image, tmp_path / "second.sock", True)],
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
            stdin=subprocess.DEVNULL,
        )
    name = "python" if holder == "ours" else "qemu-storage-da"
    assert done.returncode == 1
    assert 'Failed to get "write" lock' in done.stderr
    assert f"Is another process using the image [{path}]?" in done.stderr
    assert re.search(rf"{name}.*\(pid {process.process.pid}\)", done.stderr), done.stderr


def test_locks_can_be_turned_off_on_both_sides(spawn: Any, require: Require, tmp_path: Path) -> None:
    """locking=off takes none and asks for none."""
    path = tmp_path / "image"
    create(path, size=1 << 20, format="qcow2")
    image = (str(path), "qcow2", "file")
    unlocked = [word.replace("locking=on", "locking=off") for word in words(image, tmp_path / "off.sock", True)]
    write = [require("qemu-io"), "-f", "qcow2", "-c", "write 0 512", str(path)]
    for program in (OURS, [require("qemu-storage-daemon")]):
        process = spawn([*program, *unlocked], ready=tmp_path / "off.sock")
        assert come(write) == (True, "")
        process.stop(signal.SIGTERM)
        (tmp_path / "off.sock").unlink(missing_ok=True)
    with held(spawn, OURS, image, tmp_path / "on.sock", True):
        assert not come(write)[0]
        process = spawn([*OURS, *unlocked], ready=tmp_path / "off.sock")
        process.stop(signal.SIGTERM)


def test_force_share_reads_what_somebody_writes(spawn: Any, require: Require, tmp_path: Path) -> None:
    path = tmp_path / "image"
    create(path, size=1 << 20, format="qcow2")
    image = (str(path), "qcow2", "file")
    with held(spawn, OURS, image, tmp_path / "on.sock", True):
        assert not come([require("qemu-img"), "info", str(path)])[0]
        assert come([require("qemu-img"), "info", "-U", str(path)])[0]
    with held(spawn, [require("qemu-storage-daemon")], image, tmp_path / "on.sock", True):
        plain = words(image, tmp_path / "s", False)
        shared = [word.replace("read-only=on", "read-only=on,force-share=on") for word in plain]
        process = spawn([*OURS, *shared], ready=tmp_path / "s")
        process.stop(signal.SIGTERM)
