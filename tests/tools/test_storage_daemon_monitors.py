# SPDX-License-Identifier: Apache-2.0
"""The daemon's monitors as processes see them: who is alive while a command hangs, terminals, secrets."""

from __future__ import annotations

import json
import os
import pty
import select
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.conftest import SECONDS_MAX, argv
from tests.tools.test_storage_daemon_process import cpu_ticks

PROMPT = b"(qemu) "
Spawn = Callable[..., Any]


class Peer:
    """A connection to a monitor."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SECONDS_MAX)
        self.socket.connect(str(path))
        self.buffer = b""

    def send(self, data: bytes | str) -> None:
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def until(self, end: bytes) -> bytes:
        while end not in self.buffer:
            data = self.socket.recv(65536)
            assert data, "the monitor hung up"
            self.buffer += data
        found, _, self.buffer = self.buffer.partition(end)
        return found

    def message(self) -> Any:
        return json.loads(self.until(b"\r\n"))

    def is_silent(self) -> bool:
        return not self.buffer and not select.select([self.socket], [], [], 0)[0]

    def close(self) -> None:
        self.socket.close()


def daemon(spawn: Spawn, where: Path, *more: str) -> Any:
    words = []
    for name in ("hmp1", "hmp2", "qmp1", "qmp2"):
        mode = "readline" if name.startswith("hmp") else "control"
        words += ["--chardev", f"socket,id={name},path={where}/{name},server=on,wait=off"]
        words += ["--monitor", f"{name},mode={mode}"]
    words += ["--blockdev", "null-co,node-name=n", "--nbd-server", f"addr.type=unix,addr.path={where}/nbd"]
    return spawn(argv("bh_storage_daemon", [*words, *more]), ready=where / "nbd")


def test_while_a_command_hangs(spawn: Spawn, tmp_path: Path) -> None:
    """A person's command waits for something that this test decides about, so nothing here depends on time."""
    running = daemon(spawn, tmp_path)
    first, second, fast = Peer(tmp_path / "hmp1"), Peer(tmp_path / "hmp2"), Peer(tmp_path / "qmp1")
    first.until(PROMPT)
    second.until(PROMPT)
    assert fast.message()["QMP"]["capabilities"] == ["oob"]
    fast.send('{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
    assert fast.message() == {"return": {}}

    command = f"chardev-add socket,id=w,path={tmp_path}/w,server=on,wait=on"
    first.send(command + "\n")
    first.until(b"\r\n")
    fast.send('{"execute": "query-version", "id": "in-band"}{"exec-oob": "x-explain", "id": "why"}')
    second.send("info version\n")
    answer = fast.message()
    assert answer["id"] == "why"
    while "a client of chardev w" not in answer["return"]:  # the command had not come so far yet
        fast.send('{"exec-oob": "x-explain", "id": "why"}')
        answer = fast.message()
        assert answer["id"] == "why"
    late = Peer(tmp_path / "qmp2")
    assert "QMP" in late.message()
    late.send('{"execute": "qmp_capabilities"}')
    disk = Peer(tmp_path / "nbd")
    while len(disk.buffer) < 18:
        disk.buffer += disk.socket.recv(18)
    assert disk.buffer.startswith(b"NBDMAGICIHAVEOPT")
    fast.send('{"exec-oob": "x-explain", "id": "still"}')
    assert fast.message()["id"] == "still"
    assert first.is_silent() and second.is_silent() and late.is_silent()

    client = Peer(tmp_path / "w")
    assert first.until(PROMPT) == b""
    assert fast.message()["id"] == "in-band"
    assert late.message() == {"return": {}}
    assert b"10.0.2" in second.until(PROMPT)
    for peer in (client, disk, late, fast, second, first):
        peer.close()
    assert running.stop() == 0


def test_a_person_at_a_terminal(tmp_path: Path) -> None:
    """Standard input is a terminal: keys come one by one, ^C ends the program, the terminal is left as it was."""
    import termios

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    words = ["--chardev", "stdio,id=m", "--monitor", "m,mode=readline"]
    process = subprocess.Popen(argv("bh_storage_daemon", words), stdin=slave, stdout=slave, stderr=subprocess.DEVNULL)
    try:
        shown = b""

        def until(end: bytes) -> None:
            nonlocal shown
            while end not in shown:
                assert select.select([master], [], [], SECONDS_MAX)[0], shown
                shown += os.read(master, 65536)
            shown = shown.partition(end)[2]

        until(PROMPT)
        assert not termios.tcgetattr(slave)[3] & (termios.ECHO | termios.ICANON)
        os.write(master, b"info ver\t")
        until(b"info version ")
        os.write(master, b"\r")
        until(b"10.0.2")
        until(PROMPT)
        os.write(master, b"quit\n")
        assert process.wait(SECONDS_MAX) == 0
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        os.close(master)
        os.close(slave)


def test_monitors_cost_nothing_while_nobody_speaks(spawn: Spawn, tmp_path: Path) -> None:
    running = daemon(spawn, tmp_path)
    peers = [Peer(tmp_path / name) for name in ("hmp1", "qmp1")]
    peers[0].until(PROMPT)
    peers[1].message()
    before = cpu_ticks(running.process.pid)
    other = Peer(tmp_path / "nbd")
    for _ in range(20):
        peers[0].send("info name\n")
        peers[0].until(PROMPT)
    assert cpu_ticks(running.process.pid) - before < os.sysconf("SC_CLK_TCK") // 2
    for peer in (*peers, other):
        peer.close()
    assert running.stop() == 0


@pytest.mark.parametrize(
    "option",
    [
        "secret,id=pw,data=hunter2,format=base64,file=/nope",
        "secret,data=hunter2",
        "data=hunter2,qom-type=secret,id=1",
        "secret,id=pw,data=hunter2,,hunter2,file=x",
        '{"qom-type": "secret", "id": "pw", "data": "hunter2", "file": "x"}',
        '{"qom-type": "secret", "data": "hunter\\"hunter2"}',
    ],
)
def test_an_error_does_not_show_a_secret(option: str) -> None:
    done = subprocess.run(
        argv("bh_storage_daemon", ["--object", option]), capture_output=True, text=True, timeout=SECONDS_MAX
    )
    assert done.returncode == 1 and "hunter2" not in done.stderr, done.stderr
    assert "***" in done.stderr


def test_a_hundred_clients_command_storm(spawn: Spawn, tmp_path: Path) -> None:
    """Threads for real: a client after the other pipelines, leaves in the middle, and the next is served."""
    running = daemon(spawn, tmp_path)
    for number in range(100):
        peer = Peer(tmp_path / f"qmp{number % 2 + 1}")
        assert "QMP" in peer.message()
        enable = '{"enable": ["oob"]}' if number % 3 else "{}"
        peer.send(f'{{"execute": "qmp_capabilities", "arguments": {enable}}}' + '{"execute": "query-version"}' * 20)
        for _ in range(number % 22):
            assert peer.message()["return"] is not None
        peer.close()
    assert running.stop() == 0


