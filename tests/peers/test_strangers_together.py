# SPDX-License-Identifier: Apache-2.0
"""Strangers on top of us, several at once, and what is on the disk when the daemon ends in the middle."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers.programs import Spawned
from tests.tools.test_storage_daemon_process import PlainClient

pytestmark = pytest.mark.peer

MIB = 1 << 20
SECONDS_MAX = 60
DAEMON = [sys.executable, "-m", "bottomhalf.tools.bh_storage_daemon"]
Require = Callable[[str], str]
Spawn = Callable[..., Spawned]


def run(*words: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=SECONDS_MAX, cwd=cwd)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


class Served:
    """A daemon with exports of raw files called a, b, c, each of which begins with its name."""

    def __init__(self, spawn: Spawn, folder: Path, names: str = "abc", more: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.socket = folder / "nbd"
        words = ["--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=0", *more]
        for number, name in enumerate(names):
            image = folder / f"{name}.raw"
            image.write_bytes(name.encode() * 4096 + random.Random(number).randbytes(4 * MIB - 4096))
            words += ["--blockdev", f"file,node-name={name},filename={image},discard=unmap"]
            words += ["--export", f"nbd,id=e{name},node-name={name},writable={'on' if name != 'c' else 'off'}"]
        self.daemon = spawn([*DAEMON, *words], ready=self.socket)

    def uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.socket}"

    def content(self, name: str) -> bytes:
        return (self.folder / f"{name}.raw").read_bytes()


@pytest.fixture
def served(spawn: Spawn, tmp_path: Path) -> Iterator[Served]:
    made = Served(spawn, tmp_path)
    yield made
    assert made.daemon.stop() == 0, made.daemon.output()


def test_several_exports(served: Served, require: Require, tmp_path: Path) -> None:
    listed = run(require("nbdinfo"), "--list", served.uri(""))
    assert [name for name in "abc" if f'export="{name}"' in listed] == ["a", "b", "c"]
    for name in "abc":
        copy = tmp_path / f"copy-{name}"
        run(require("nbdcopy"), served.uri(name), copy)
        assert copy.read_bytes() == served.content(name)
    assert "is_read_only: true" in run(require("nbdinfo"), served.uri("c"))
    run(require("nbdcopy"), served.uri("a"), served.uri("b"))
    assert served.content("b") == served.content("a")


def test_nobody_there(served: Served, require: Require) -> None:
    """An export that does not exist is refused politely, by every kind of client."""
    for command in (
        [require("nbdinfo"), served.uri("nope")],
        [require("qemu-img"), "info", served.uri("nope")],
        [require("nbdcopy"), served.uri("nope"), "-"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX)
        assert done.returncode and ("nope" in done.stderr or "export" in done.stderr), done.stderr


def test_read_only_export(served: Served, require: Require) -> None:
    done = subprocess.run(
        [require("qemu-io"), "-f", "raw", "-c", "write 0 512", served.uri("c")],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )
    assert done.returncode == 1
    assert served.content("c")[:1] == b"c"


def test_qemu_storage_daemon_on_top(served: Served, spawn: Spawn, require: Require, tmp_path: Path) -> None:
    """QEMU's block layer as our client: through its NBD driver and out again."""
    above = tmp_path / "above"
    spawn(
        [
            require("qemu-storage-daemon"),
            *("--blockdev", f"nbd,node-name=n,server.type=unix,server.path={served.socket},export=a"),
            *("--nbd-server", f"addr.type=unix,addr.path={above}"),
            *("--export", "nbd,id=e,node-name=n,name=n,writable=on"),
        ],
        ready=above,
    )
    uri = f"nbd+unix:///n?socket={above}"
    run(require("qemu-io"), "-f", "raw", "-c", "write -P 5 1M 1M", "-c", "discard 2M 1M", "-c", "flush", uri)
    assert served.content("a")[MIB : 2 * MIB] == b"\5" * MIB
    copy = tmp_path / "copy"
    run(require("nbdcopy"), uri, copy)
    assert copy.read_bytes() == served.content("a")


def test_we_serve_what_qemu_made(spawn: Spawn, require: Require, tmp_path: Path) -> None:
    """A qcow2 image as raw bytes: QEMU reads it through us as if it were a file."""
    image = tmp_path / "q.qcow2"
    qemu_img = require("qemu-img")
    run(qemu_img, "create", "-q", "-f", "qcow2", image, "8M")
    run(require("qemu-io"), "-f", "qcow2", "-c", "write -P 9 1M 1M", image)
    sock = tmp_path / "s"
    command = [sys.executable, "-m", "bottomhalf.tools.bh_nbd", "-t", "-e", "0", "-f", "raw", "-k", sock, image]
    server = spawn(command, ready=sock)
    uri = f"nbd+unix:///?socket={sock}"
    assert "file format: qcow2" in run(qemu_img, "info", uri)
    run(require("qemu-io"), "-f", "qcow2", "-c", "read -P 9 1M 1M", "-c", "read -P 0 2M 1M", uri)
    assert server.stop() == 0
    assert "No errors" in run(qemu_img, "check", "-f", "qcow2", image)


@pytest.mark.parametrize("where", ["main", "iothread"])
def test_many_clients_verify_at_once(spawn: Spawn, require: Require, tmp_path: Path, where: str) -> None:
    """Each writes and verifies its own part; together they are two hundred."""
    fio, clients = require("fio"), 200
    image = tmp_path / "d.raw"
    with image.open("wb") as file:
        file.truncate(clients * 64 * 1024)
    sock = tmp_path / "nbd"
    words = ["--nbd-server", f"addr.type=unix,addr.path={sock},max-connections=0"]
    words += ["--blockdev", f"file,node-name=d,filename={image}"]
    export = "nbd,id=e,node-name=d,writable=on"
    if where == "iothread":
        words = ["--object", "iothread,id=t", *words]
        export += ",iothread=t"
    daemon = spawn([*DAEMON, *words, "--export", export], ready=sock)
    run(
        fio,
        *("--name=many", "--ioengine=nbd", f"--uri=nbd+unix:///d?socket={sock}", "--rw=randwrite", "--bs=4k"),
        *("--iodepth=4", f"--numjobs={clients}", "--thread", "--size=64k", "--offset_increment=64k"),
        *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--group_reporting"),
        cwd=tmp_path,
    )
    assert daemon.stop() == 0, daemon.output()


# -- the end in the middle


def test_acknowledged_writes_are_there(spawn: Spawn, tmp_path: Path) -> None:
    """SIGTERM while sixteen writes are in flight: every one that was answered is in the file."""
    served = Served(spawn, tmp_path, "a")
    client = PlainClient(served.socket, "a")
    acknowledged: set[int] = set()
    blocks, block = 4 * MIB // 4096, 4096
    pending: dict[int, int] = {}
    following = iter(range(blocks))

    def ask() -> None:
        number = next(following, None)
        if number is not None:
            packet, cookie = client.client.write(number * block, number.to_bytes(4, "big") * (block // 4))
            pending[cookie] = number
            client.socket.sendall(packet)

    for _ in range(16):
        ask()
    signalled = False
    try:
        while pending:
            data = client.socket.recv(65536)
            if not data:
                break
            for done in client.client.receive(data):
                assert done.error == 0
                acknowledged.add(pending.pop(done.cookie))
                ask()
            if len(acknowledged) > 200 and not signalled:
                signalled = True
                served.daemon.process.send_signal(signal.SIGTERM)
    except (BrokenPipeError, ConnectionResetError):
        pass
    client.close()
    assert served.daemon.process.wait(SECONDS_MAX) == 0
    content = served.content("a")
    assert len(acknowledged) > 200
    for number in acknowledged:
        assert content[number * block : (number + 1) * block] == number.to_bytes(4, "big") * (block // 4)


def test_end_in_the_middle_of_a_copy(spawn: Spawn, require: Require, tmp_path: Path) -> None:
    """Every sector is either as it was or as it should become."""
    served = Served(spawn, tmp_path, "a")
    before = served.content("a")
    source = tmp_path / "source"
    source.write_bytes(random.Random(9).randbytes(4 * MIB))
    copy = spawn([require("nbdcopy"), "--requests=8", "--request-size=65536", source, served.uri("a")])
    assert served.daemon.stop() == 0, served.daemon.output()
    copy.process.wait(SECONDS_MAX)
    after, wanted = served.content("a"), source.read_bytes()
    assert len(after) == len(before)
    for offset in range(0, len(after), 512):
        assert after[offset : offset + 512] in (before[offset : offset + 512], wanted[offset : offset + 512])


def test_killed_after_a_flush(spawn: Spawn, require: Require, tmp_path: Path) -> None:
    served = Served(spawn, tmp_path, "a")
    run(require("qemu-io"), "-f", "raw", "-c", "write -P 9 0 1M", "-c", "flush", served.uri("a"))
    served.daemon.process.kill()
    served.daemon.process.wait(SECONDS_MAX)
    assert served.content("a")[:MIB] == b"\x09" * MIB
    words = ["--nbd-server", f"addr.type=unix,addr.path={served.socket}"]
    words += ["--blockdev", f"file,node-name=a,filename={tmp_path}/a.raw", "--export", "nbd,id=e,node-name=a"]
    again = spawn([*DAEMON, *words], ready=served.socket)
    run(require("qemu-io"), "-r", "-f", "raw", "-c", "read -P 9 0 1M", served.uri("a"))
    assert again.stop() == 0
