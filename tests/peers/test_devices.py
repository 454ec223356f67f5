# SPDX-License-Identifier: Apache-2.0
"""Block devices through our programs, read and written by others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from tests.loop_devices import loop_device

SECONDS_MAX = 60
SIZE = 4 << 20
Require = Callable[[str], str]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "backing").write_bytes(bytes(range(256)) * (SIZE // 256))
    with loop_device(tmp_path / "backing") as path:
        yield path


def run(*words: str | Path) -> str:
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=SECONDS_MAX, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("program", ["serve", "serve --direct", "bh-nbd", "bh-nbd --cache=none", "daemon"])
def test_served_and_written_to(
    spawn: Any, require: Require, device: str, tmp_path: Path, program: str
) -> None:
    """Whoever names a device's path need not say more; the daemon takes driver=host_device."""
    socket = tmp_path / "socket"
    tool, _, more = program.partition(" ")
    module = {"serve": "bottomhalf", "bh-nbd": "bh_nbd", "daemon": "bh_storage_daemon"}[tool]
    words = {
        "serve": ["serve", "-q", "-x", "", "-k", str(socket), *more.split(), device],
        "bh-nbd": ["-t", "-f", "raw", "-k", str(socket), *more.split(), device],
        "daemon": [
            *("--blockdev", f"driver=host_device,node-name=n,filename={device},auto-read-only=on"),
            *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
            *("--export", "type=nbd,id=e,node-name=n,name=,writable=on"),
        ],
    }[tool]
    served = spawn([sys.executable, "-m", f"bottomhalf.tools.{module}", *words], ready=socket)
    uri = f"nbd+unix:///?socket={socket}"
    assert json.loads(run(require("qemu-img"), "info", "--output=json", uri))["virtual-size"] == SIZE
    io = ["-c", "read -P 0x11 0x11 1", "-c", "write -P 0x77 1M 64k", "-c", "write -z 2M 64k", "-c", "flush"]
    run(require("qemu-io"), "-f", "raw", *io, uri)
    assert served.stop(signal.SIGINT) == 0
    run(require("qemu-io"), "-f", "raw", "-c", "read -P 0x77 1M 64k", "-c", "read -P 0 2M 64k", device)


def test_the_library(require: Require, device: str) -> None:
    with bottomhalf.open(device) as disk:
        assert disk.size == SIZE and disk.pread(4, 256) == b"\0\1\2\3"
        disk.pwrite(b"ours", 4096)
        disk.flush()
    run(require("qemu-io"), "-f", "raw", "-c", f"read -P {ord('o')} 4096 1", device)


def test_qcow2_on_a_device(require: Require, device: str) -> None:
    """QEMU makes the image there, we write to it, and QEMU finds it sound."""
    run(require("qemu-img"), "create", "-q", "-f", "qcow2", device, "1M")
    with bottomhalf.open(device) as disk:
        assert disk.size == 1 << 20
        disk.pwrite(b"w" * 65536, 65536)
    run(require("qemu-img"), "check", "-q", "-f", "qcow2", device)
    run(require("qemu-io"), "-f", "qcow2", "-c", f"read -P {ord('w')} 64k 64k", device)
    assert bottomhalf.check(device).corruptions == 0


def test_a_read_only_device_is_served_read_only(spawn: Any, tmp_path: Path) -> None:
    (tmp_path / "backing").write_bytes(bytes(SIZE))
    with loop_device(tmp_path / "backing", "--read-only") as device:
        socket = tmp_path / "socket"
        command = [sys.executable, "-m", "bottomhalf.tools.bottomhalf", "serve", "-k", str(socket), device]
        served = spawn(command, ready=socket)
        while "read-only" not in served.output():
            assert served.process.poll() is None, served.output()
        assert served.stop(signal.SIGINT) == 0


def test_the_same_of_a_node_as_qemu(require: Require, device: str) -> None:
    """query-named-block-nodes, member by member."""
    said = []
    for program in ([require("qemu-storage-daemon")], [sys.executable, "-m", "bottomhalf.tools.bh_storage_daemon"]):
        words = [
            *("--chardev", "stdio,id=c", "--monitor", "c"),
            *("--blockdev", f"driver=host_device,node-name=n,filename={device},cache.direct=on,auto-read-only=on"),
            *("--blockdev", "driver=raw,node-name=r,file=n"),
        ]
        commands = ("qmp_capabilities", "query-named-block-nodes", "quit")
        done = subprocess.run(
            [*program, *words],
            input="".join(json.dumps({"execute": name}) + "\n" for name in commands),
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
        )
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        said.append(next(each["return"] for each in answers if isinstance(each.get("return"), list)))
    assert said[0] == said[1]
