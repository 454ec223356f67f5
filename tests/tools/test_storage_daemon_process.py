# SPDX-License-Identifier: Apache-2.0
"""bh-storage-daemon as a process: how it starts, goes to the background, and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bottomhalf
from tests.exports.nbd_bench import Client, ClientHandshake
from tests.peers.programs import Spawned
from tests.tools.conftest import SECONDS_MAX, Outcome, argv

MIB = 1 << 20
Spawn = Callable[..., Spawned]
Command = Callable[..., Outcome]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return path


def words(tmp_path: Path, image: Path) -> list[str]:
    """A daemon with one writable export and a monitor."""
    return [
        *("--blockdev", f"file,node-name=d,filename={image}"),
        *("--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd"),
        *("--export", "nbd,id=e,node-name=d,writable=on"),
        *("--chardev", f"socket,id=q,path={tmp_path}/qmp,server=on,wait=off", "--monitor", "q"),
    ]


class PlainClient:
    """An NBD client over a blocking socket."""

    def __init__(self, path: Path, export: str = "d") -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SECONDS_MAX)
        self.socket.connect(str(path))
        handshake = ClientHandshake(export)
        while handshake.negotiated is None:
            handshake.receive(self.socket.recv(65536))
            self.socket.sendall(handshake.take_output())
        self.client = Client(handshake.negotiated)
        self.client.receive(handshake.negotiated.leftover)

    def wait(self, packet_and_cookie: tuple[bytes, int]) -> bytes:
        """What an answer brings; it must be success."""
        packet, cookie = packet_and_cookie
        self.socket.sendall(packet)
        done = []
        while not done:
            done = self.client.receive(self.socket.recv(1 << 20))
        assert done[0].cookie == cookie and done[0].error == 0, done
        return bytes(done[0].data or b"")

    def write(self, offset: int, data: bytes) -> None:
        self.wait(self.client.write(offset, data))

    def close(self) -> None:
        self.socket.close()


def said(daemon: Spawned) -> str:
    """What a daemon printed, but for what it says of the one who looked whether it listens."""
    return "".join(line for line in daemon.output().splitlines(True) if "connection lost" not in line)


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Look at something outside of our reach until it is so, or for a bounded time."""
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_in_order(spawn: Spawn, tmp_path: Path, image: Path, number: int) -> None:
    """Status 0, sockets and pid file gone, data written, nothing said."""
    pidfile = tmp_path / "pid"
    daemon = spawn(argv("bh_storage_daemon", [*words(tmp_path, image), "--pidfile", pidfile]), ready=tmp_path / "nbd")
    wait_for(lambda: pidfile.exists() and pidfile.read_text(), "the pid file")
    assert pidfile.read_text() == f"{daemon.process.pid}\n"
    client = PlainClient(tmp_path / "nbd")
    client.write(4096, b"hello")
    assert daemon.stop(number) == 0
    assert said(daemon) == ""
    assert client.socket.recv(1) == b""
    client.close()
    assert sorted(os.listdir(tmp_path)) == ["disk.raw"]
    assert image.read_bytes()[4096:4101] == b"hello"


def test_a_second_signal_does_not_hurt(spawn: Spawn, tmp_path: Path, image: Path) -> None:
    daemon = spawn(argv("bh_storage_daemon", words(tmp_path, image)), ready=tmp_path / "nbd")
    for _ in range(5):
        daemon.process.send_signal(signal.SIGINT)
    assert daemon.stop(signal.SIGTERM) == 0
    assert said(daemon) == ""


def test_killed_it_leaves_a_socket_that_does_not_matter(spawn: Spawn, tmp_path: Path, image: Path) -> None:
    first = spawn(argv("bh_storage_daemon", words(tmp_path, image)), ready=tmp_path / "qmp")
    first.process.kill()
    first.process.wait(SECONDS_MAX)
    assert (tmp_path / "nbd").exists() and (tmp_path / "qmp").exists()
    second = spawn(argv("bh_storage_daemon", words(tmp_path, image)), ready=tmp_path / "nbd")
    assert second.stop() == 0
    assert not (tmp_path / "nbd").exists()


def test_failure_at_start(command: Command, tmp_path: Path, image: Path) -> None:
    outcome = command("bh_storage_daemon", [*words(tmp_path, image), "--export", "nbd,id=e2,node-name=nope"])
    assert outcome.status == 1
    assert outcome.stderr.endswith(
        "--export nbd,id=e2,node-name=nope: Cannot find device='' nor node-name='nope'\n"
    )
    assert os.listdir(tmp_path) == ["disk.raw"]


def test_socket_in_use(spawn: Spawn, command: Command, tmp_path: Path, image: Path) -> None:
    """It is not taken away from whom it belongs to."""
    daemon = spawn(argv("bh_storage_daemon", words(tmp_path, image)), ready=tmp_path / "nbd")
    outcome = command("bh_storage_daemon", ["--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd"])
    assert outcome.status == 1
    assert outcome.stderr.endswith(f"Failed to bind socket to {tmp_path}/nbd: Address already in use\n")
    PlainClient(tmp_path / "nbd").close()
    assert daemon.stop() == 0


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Path]:
    """The pid file of a daemon that goes to the background; who wrote it is gone after the test."""
    pidfile = tmp_path / "pid"
    yield pidfile
    if pidfile.exists():
        os.kill(int(pidfile.read_text()), signal.SIGKILL)


def test_daemonize(command: Command, tmp_path: Path, image: Path, background: Path) -> None:
    """When the parent ends, everything is set up; paths may be relative to where it was started."""
    given = [word.replace(f"{tmp_path}/", "") for word in words(tmp_path, image)]
    outcome = command("bh_storage_daemon", ["--daemonize", *given, "--pidfile", "pid"], cwd=tmp_path)
    assert (outcome.status, outcome.stdout, outcome.stderr) == (0, "", "")
    pid = int(background.read_text())
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert os.getsid(pid) == pid
    client = PlainClient(tmp_path / "nbd")
    client.write(0, b"from afar")
    client.close()
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not is_alive(pid), "its end")
    assert image.read_bytes()[:9] == b"from afar"
    assert os.listdir(tmp_path) == ["disk.raw"]


def test_daemonize_fails(command: Command, tmp_path: Path, image: Path, background: Path) -> None:
    """The parent says why, and exits 1."""
    outcome = command("bh_storage_daemon", ["--daemonize", "--pidfile", background, "--blockdev", "nope"])
    assert outcome.status == 1
    assert "--blockdev nope: Parameter 'driver' does not accept value 'nope'" in outcome.stderr
    assert not background.exists()


def test_daemonize_help(command: Command) -> None:
    assert command("bh_storage_daemon", ["--daemonize", "--help"]).status == 0


def test_wait_for_a_client(spawn: Spawn, tmp_path: Path) -> None:
    """A server with wait=on holds up what comes behind it until somebody has connected."""
    sock, nbd = tmp_path / "qmp", tmp_path / "nbd"
    daemon = spawn(
        argv(
            "bh_storage_daemon",
            [
                *("--chardev", f"socket,id=q,path={sock},server=on", "--monitor", "q"),
                *("--nbd-server", f"addr.type=unix,addr.path={nbd}"),
            ],
        )
    )
    wait_for(sock.exists, "the socket")
    wait_for(lambda: "waiting" in daemon.output(), "the message")
    assert daemon.output() == (
        f"bh_storage_daemon.py: info: QEMU waiting for connection on: disconnected:unix:{sock},server=on\n"
    )
    assert not nbd.exists()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS_MAX)
        client.connect(str(sock))
        daemon.wait_ready(nbd)
        assert client.recv(4096).startswith(b'{"QMP"')
    assert daemon.stop() == 0


def test_wait_for_a_client_ends_with_a_signal(spawn: Spawn, tmp_path: Path) -> None:
    daemon = spawn(argv("bh_storage_daemon", ["--chardev", f"socket,id=q,path={tmp_path}/q,server=on"]))
    wait_for(lambda: "waiting" in daemon.output(), "the message")
    assert daemon.stop() == 0
    assert os.listdir(tmp_path) == []


TALK = '{"execute":"qmp_capabilities"}{"execute":"query-block-exports"}{"execute":"quit"}'


def test_qmp_on_stdio(command: Command) -> None:
    outcome = command("bh_storage_daemon", ["--chardev", "stdio,id=q", "--monitor", "q"], input=TALK)
    assert outcome.status == 0 and outcome.stderr == ""
    lines = outcome.stdout.splitlines()
    assert lines[0].startswith('{"QMP"') and lines[1:] == ['{"return": {}}', '{"return": []}', '{"return": {}}']


def test_qmp_on_stdio_from_a_file(tmp_path: Path) -> None:
    """epoll takes no files; and at its end the daemon goes on."""
    talk = tmp_path / "talk"
    for text, ends in ((TALK, True), (TALK.replace("quit", "query-version"), False)):
        talk.write_text(text)
        with talk.open() as file, subprocess.Popen(
            argv("bh_storage_daemon", ["--chardev", "stdio,id=q", "--monitor", "q"]),
            stdin=file,
            stdout=subprocess.PIPE,
            text=True,
        ) as daemon:
            try:
                assert daemon.stdout is not None
                lines = [daemon.stdout.readline() for _ in range(4)]
                assert all(lines) and '"return"' in lines[3]
                if not ends:
                    assert daemon.poll() is None
                    daemon.terminate()
                assert daemon.wait(SECONDS_MAX) == 0
            finally:
                daemon.kill()


def test_stdin_at_its_end(command: Command, spawn: Spawn, tmp_path: Path) -> None:
    """/dev/null as standard input is no reason to end, nor to spin."""
    daemon = spawn(
        argv(
            "bh_storage_daemon",
            [
                *("--chardev", "stdio,id=q", "--monitor", "q"),
                *("--nbd-server", f"addr.type=unix,addr.path={tmp_path}/s"),
            ],
        ),
        ready=tmp_path / "s",
    )
    before = cpu_ticks(daemon.process.pid)
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as client:  # makes it turn
            client.settimeout(SECONDS_MAX)
            client.connect(f"{tmp_path}/s")
            assert len(client.recv(18)) == 18
    assert cpu_ticks(daemon.process.pid) - before < os.sysconf("SC_CLK_TCK") // 2
    assert daemon.stop() == 0


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_start_up_loads_little() -> None:
    """Scripts call --help and --version often: nothing of the block layer is loaded for them."""
    code = (
        "import sys; from bottomhalf.tools.bh_storage_daemon import main\n"
        "main(['--help'])\n"
        "print(sorted(name for name in sys.modules if name.startswith('bottomhalf')))"
    )
    done = subprocess.run(
        [*argv("x", [])[:1], "-c", code], capture_output=True, text=True, timeout=SECONDS_MAX, check=True
    )
    loaded = done.stdout.splitlines()[-1]
    assert "bottomhalf.tools.bh_storage_daemon" in loaded
    for package in ("aio", "block", "qapi", "wire", "host", "monitor"):
        assert f"bottomhalf.{package}" not in loaded


def test_version_is_the_packages(command: Command) -> None:
    assert bottomhalf.__version__ in command("bh_storage_daemon", ["--version"]).stdout
