# SPDX-License-Identifier: Apache-2.0
"""Our daemon and programs that we did not write: what users of NBD and QMP will do with it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
IMAGE_BYTES = 24 * MIB + 512
SECONDS_MAX = 60
DAEMON = [sys.executable, "-m", "bottomhalf.tools.bh_storage_daemon"]

pytestmark = pytest.mark.peer


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a program to its end; its output."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=SECONDS_MAX, cwd=cwd
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


class Daemon:
    """A running bh-storage-daemon with one raw image."""

    def __init__(self, spawn: Any, folder: Path, *more: str, file: str = "", raw: str = "", export: str = "") -> None:
        self.folder = folder
        self.image = folder / "disk.raw"
        if not self.image.exists():
            make_image(self.image)
        self.socket = folder / "nbd.sock"
        self.qmp = folder / "qmp.sock"
        self.child = spawn(
            [
                *DAEMON,
                *more,
                *("--blockdev", f"driver=file,node-name=f,filename={self.image},discard=unmap{file}"),
                *("--blockdev", f"driver=raw,node-name=d,file=f,discard=unmap{raw}"),
                *("--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=0"),
                *("--export", f"type=nbd,id=e,node-name=d,name=disk,writable=on{export}"),
                *("--chardev", f"socket,id=q,path={self.qmp},server=on,wait=off", "--monitor", "chardev=q"),
            ],
            ready=self.qmp,  # which is set up last
        )

    def uri(self, name: str = "disk") -> str:
        return f"nbd+unix:///{name}?socket={self.socket}"

    def stop(self) -> None:
        assert self.child.stop() == 0, self.child.output()
        assert not self.socket.exists()


def make_image(path: Path) -> None:
    """Data and holes, of a size that is no multiple of anything large."""
    chance = random.Random(7)
    with open(path, "wb") as file:
        file.truncate(IMAGE_BYTES)
        for _ in range(40):
            offset = chance.randrange(0, IMAGE_BYTES - 200_000)
            file.seek(offset)
            file.write(chance.randbytes(chance.randrange(1, 200_000)))


def skip_without_direct(folder: Path) -> None:
    try:
        os.close(os.open(folder / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system refuses O_DIRECT")


@pytest.fixture
def daemon(spawn: Any, tmp_path: Path) -> Iterator[Daemon]:
    served = Daemon(spawn, tmp_path)
    yield served
    served.stop()


def test_nbdinfo(daemon: Daemon, require: Callable[[str], str]) -> None:
    nbdinfo = require("nbdinfo")
    assert run(nbdinfo, "--size", daemon.uri()).strip() == str(IMAGE_BYTES)
    text = run(nbdinfo, daemon.uri())
    for line in ("structured packets", "can_multi_conn: true", "can_fua: true", "can_fast_zero: true"):
        assert line in text
    assert "base:allocation" in text
    extents = [line.split() for line in run(nbdinfo, "--map", daemon.uri()).splitlines()]
    assert sum(int(words[1]) for words in extents) == IMAGE_BYTES
    assert {words[3] for words in extents} >= {"data", "hole,zero"}
    assert 'export="disk"' in run(nbdinfo, "--list", daemon.uri(""))


def test_nbdcopy_both_ways(daemon: Daemon, require: Callable[[str], str], tmp_path: Path) -> None:
    nbdcopy = require("nbdcopy")
    copy = tmp_path / "copy.raw"
    run(nbdcopy, daemon.uri(), copy)
    assert copy.read_bytes() == daemon.image.read_bytes()
    other = tmp_path / "other.raw"
    other.write_bytes(random.Random(8).randbytes(IMAGE_BYTES))
    run(nbdcopy, "--flush", other, daemon.uri())
    assert daemon.image.read_bytes() == other.read_bytes()


def test_qemu_img(daemon: Daemon, require: Callable[[str], str], tmp_path: Path) -> None:
    qemu_img = require("qemu-img")
    assert f"({IMAGE_BYTES} bytes)" in run(qemu_img, "info", daemon.uri())
    copy = tmp_path / "copy.qcow2"
    run(qemu_img, "convert", "-f", "raw", "-O", "qcow2", daemon.uri(), copy)
    assert "identical" in run(qemu_img, "compare", "-f", "raw", "-F", "qcow2", daemon.uri(), copy)
    run(qemu_img, "convert", "-n", "-f", "qcow2", "-O", "raw", copy, daemon.uri())
    assert "identical" in run(qemu_img, "compare", "-f", "raw", "-F", "qcow2", daemon.uri(), copy)


def test_qemu_io(daemon: Daemon, require: Callable[[str], str]) -> None:
    commands = (
        "write -P 7 100001 50003",
        "read -P 7 100001 50003",
        "write -z -u 1M 2M",
        "read -P 0 1M 2M",
        "write -z 4M 64k",
        "write -f -P 3 77 1",
        "read -P 3 77 1",
        "discard 8M 4M",
        "flush",
    )
    words = [word for command in commands for word in ("-c", command)]
    text = run(require("qemu-io"), "-f", "raw", *words, daemon.uri())
    assert "failed" not in text
    assert daemon.image.read_bytes()[MIB : 3 * MIB] == bytes(2 * MIB)


@pytest.mark.parametrize("options", [{}, {"file": ",cache.direct=on"}], ids=["cached", "direct"])
def test_fio_verifies(spawn: Any, require: Callable[[str], str], tmp_path: Path, options: dict[str, str]) -> None:
    fio = require("fio")
    if options:
        skip_without_direct(tmp_path)
    served = Daemon(spawn, tmp_path, **options)
    run(
        fio,
        *("--name=v", "--ioengine=nbd", f"--uri={served.uri()}", "--rw=randwrite", "--bs=4k", "--iodepth=32"),
        *("--size=16m", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"),
        cwd=tmp_path,
    )
    served.stop()


def test_qemu_nbd_lists_us_and_we_list_qemu_nbd(
    daemon: Daemon, spawn: Any, require: Callable[[str], str], tmp_path: Path
) -> None:
    qemu_nbd = require("qemu-nbd")
    ours = run(qemu_nbd, "-L", "-k", daemon.socket)
    assert "exports available: 1" in ours
    assert "export: 'disk'" in ours
    assert f"size:  {IMAGE_BYTES}" in ours
    theirs = tmp_path / "theirs.sock"
    image = tmp_path / "theirs.raw"
    image.write_bytes(bytes(MIB))
    spawn([qemu_nbd, "-t", "-e", "0", "-k", theirs, "-f", "raw", "-x", "their-export", image], ready=theirs)
    listed = run(sys.executable, "-m", "bottomhalf.tools.bh_nbd", "-L", "-k", theirs)
    assert "their-export" in listed
    assert str(MIB) in listed


LIBNBD = """
import nbd, sys
uri = sys.argv[1]
for structured in (True, False):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    if structured:
        h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    assert h.get_structured_replies_negotiated() == structured
    h.pwrite(b"x" * 70000, 12345, nbd.CMD_FLAG_FUA)
    assert h.pread(70000, 12345) == b"x" * 70000
    h.zero(65536, 65536, nbd.CMD_FLAG_FUA)
    assert h.pread(65536, 65536) == bytes(65536)
    h.trim(65536, 1 << 20)
    h.cache(65536, 0)
    h.flush()
    cookies = [h.aio_pread(nbd.Buffer(4096), n * 4096) for n in range(500)]
    while cookies:
        h.poll(-1)
        cookies = [c for c in cookies if not h.aio_command_completed(c)]
    h.set_strict_mode(0)
    for bad in (lambda: h.pread(512, h.get_size()), lambda: h.pwrite(b"y", h.get_size())):
        try:
            bad()
        except nbd.Error as error:
            assert error.errno == "EINVAL", error.errno
        else:
            raise AssertionError("a request beyond the end succeeded")
    if structured:
        seen = []
        h.block_status(1 << 20, 0, lambda name, offset, entries, error: seen.append(sum(entries[::2])))
        assert seen, seen
    assert h.pread(3, 12345) == b"xxx"
    h.shutdown()

many = []
for n in range(int(sys.argv[2])):
    h = nbd.NBD()
    h.connect_uri(uri)
    many.append(h)
for h in many:
    assert h.pread(1, 12345) == b"x"
print("fine")
"""


def test_libnbd_and_two_hundred_clients_at_once(daemon: Daemon, require: Callable[[str], str]) -> None:
    assert run(require("python3-libnbd"), "-c", LIBNBD, daemon.uri(), "200") == "fine\n"


def test_qemu_qmp(daemon: Daemon) -> None:
    protocol = pytest.importorskip("qemu.qmp", reason="needs qemu.qmp (pip)")

    async def talk() -> None:
        client = protocol.QMPClient("tests")
        with client.listener("BLOCK_EXPORT_DELETED") as deleted:
            await client.connect(str(daemon.qmp))
            version = await client.execute("query-version")
            assert version["qemu"]["major"] == 10
            assert version["package"].startswith("bottomhalf-")
            names = {command["name"] for command in await client.execute("query-commands")}
            assert {"quit", "blockdev-add", "block-export-del"} <= names
            nodes = await client.execute("query-named-block-nodes")
            assert {node["node-name"]: node["drv"] for node in nodes} == {"f": "file", "d": "raw"}
            await client.execute("blockdev-add", {"driver": "null-co", "node-name": "n", "size": MIB})
            await client.execute("block-export-add", {"type": "nbd", "id": "n", "node-name": "n"})
            with pytest.raises(protocol.ExecuteError) as refused:
                await client.execute("blockdev-del", {"node-name": "n"})
            assert refused.value.error_class == "GenericError"
            await client.execute("block-export-del", {"id": "n"})
            event = await asyncio.wait_for(deleted.get(), SECONDS_MAX)
            assert event["data"] == {"id": "n"}
            await client.execute("blockdev-del", {"node-name": "n"})
            with pytest.raises(protocol.ExecuteError) as unknown:
                await client.execute("no-such-command")
            assert unknown.value.error_class == "CommandNotFound"
            await client.disconnect()

    asyncio.run(asyncio.wait_for(talk(), SECONDS_MAX))


def test_an_image_in_use_by_qemu_is_refused_by_name(
    spawn: Any, require: Callable[[str], str], tmp_path: Path
) -> None:
    image = tmp_path / "disk.raw"
    make_image(image)
    socket = tmp_path / "theirs.sock"
    spawn([require("qemu-nbd"), "-t", "-k", socket, "-f", "raw", image], ready=socket)
    done = subprocess.run(
        [sys.executable, "-m", "bottomhalf.tools.bottomhalf", "serve", str(image)],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )
    assert done.returncode == 1
    assert "lock" in done.stderr
    assert "qemu-nbd (pid" in done.stderr


def test_qemu_img_respects_our_locks(daemon: Daemon, spawn: Any, require: Callable[[str], str], tmp_path: Path) -> None:
    image = tmp_path / "served.raw"
    make_image(image)
    socket = tmp_path / "serve.sock"
    command = [sys.executable, "-m", "bottomhalf.tools.bottomhalf", "serve", "-q", "-k", str(socket), str(image)]
    served = spawn(command, ready=socket)
    done = subprocess.run(
        [require("qemu-io"), "-f", "raw", "-c", "write 0 512", str(image)],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )
    assert done.returncode == 1
    assert 'Failed to get "write" lock' in done.stderr
    assert served.stop(signal.SIGINT) == 0


def test_in_an_iothread(spawn: Any, require: Callable[[str], str], tmp_path: Path) -> None:
    served = Daemon(spawn, tmp_path, "--object", "iothread,id=io0", export=",iothread=io0")
    copy = tmp_path / "copy.raw"
    run(require("nbdcopy"), served.uri(), copy)
    assert copy.read_bytes() == served.image.read_bytes()
    served.stop()


def test_a_window_over_tcp(spawn: Any, require: Callable[[str], str], tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    make_image(image)
    port = 20000 + os.getpid() % 20000
    child = spawn(
        [
            *(sys.executable, "-m", "bottomhalf.tools.bh_nbd", "-t", "-f", "raw", "-r"),
            *("-b", "127.0.0.1", "-p", str(port), "-o", str(MIB), "-x", "window", image),
        ],
        ready=("127.0.0.1", port),
    )
    copy = tmp_path / "copy.raw"
    run(require("nbdcopy"), f"nbd://127.0.0.1:{port}/window", copy)
    assert copy.read_bytes() == image.read_bytes()[MIB:]
    assert child.stop() == 0


def test_what_was_flushed_survives_the_end_in_the_middle(
    spawn: Any, require: Callable[[str], str], tmp_path: Path
) -> None:
    served = Daemon(spawn, tmp_path)
    run(require("qemu-io"), "-f", "raw", "-c", "write -P 9 0 1M", "-c", "flush", served.uri())
    writer = spawn(
        [require("qemu-io"), "-f", "raw", "-c", "write -P 9 1M 4M", "-c", "write -P 8 8M 8M", served.uri()]
    )
    served.stop()  # whenever that is: before, between or after the writes
    writer.process.wait(SECONDS_MAX)
    assert served.image.read_bytes()[:MIB] == b"\x09" * MIB


def test_qmp_shell(daemon: Daemon) -> None:
    """The shell that people use, with commands that have arguments of every kind."""
    pytest.importorskip("qemu.qmp", reason="needs qemu.qmp (pip)")
    shell = Path(sys.executable).with_name("qmp-shell")
    talk = """
query-version
blockdev-add driver=null-co node-name=n size=1048576
object-add qom-type=iothread id=io poll-max-ns=5
qom-get path=io property=poll-max-ns
qom-set path=io property=poll-max-ns value=7
qom-get path=io property=poll-max-ns
chardev-add id=r backend={'type':'ringbuf','data':{'size':16}}
ringbuf-write device=r data=hello
ringbuf-read device=r size=16
human-monitor-command command-line=qom-list
nonsense
"""
    done = subprocess.run(
        [shell, daemon.qmp], input=talk, capture_output=True, text=True, timeout=SECONDS_MAX, check=True
    )
    for part in ('"major": 10', '{"return": 5}', '{"return": 7}', '{"return": "hello"}', '{"return": "/\\n"}'):
        assert part in done.stdout.replace("\\n", "\\n"), done.stdout
    assert "CommandNotFound" in done.stdout
    assert "GenericError" not in done.stdout


def test_qmp_shell_at_a_terminal(daemon: Daemon, tmp_path: Path) -> None:
    """The same shell as a person sees it, who completes a command."""
    import pty
    import select

    pytest.importorskip("qemu.qmp", reason="needs qemu.qmp (pip)")
    master, slave = pty.openpty()
    shell = subprocess.Popen(
        [Path(sys.executable).with_name("qmp-shell"), daemon.qmp],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "dumb", "HOME": str(tmp_path)},
    )
    os.close(slave)
    seen = b""

    def sees(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([master], [], [], SECONDS_MAX)[0], seen
            seen += os.read(master, 65536)
        seen = seen.partition(text)[2]

    sees(b"(QEMU) ")
    os.write(master, b"query-vers\t\n")
    sees(b"query-version")
    sees(b'"major": 10')
    sees(b"(QEMU) ")
    os.write(master, b"blockdev-del node-name=nope\n")
    sees(b"Failed to find node with node-name='nope'")
    sees(b"(QEMU) ")
    os.write(master, b"\x04")
    assert shell.wait(SECONDS_MAX) == 0
    os.close(master)
