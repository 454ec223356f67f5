# SPDX-License-Identifier: Apache-2.0
"""bottomhalf console as a script's tool and at a terminal, with our daemon and with QEMU's."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.host.protocol import InetAddress, UnixAddress
from bottomhalf.tools import console
from bottomhalf.tools.getopt import UsageError
from tests.peers.programs import require
from tests.tools.conftest import SECONDS_MAX, Outcome, argv, options_in

Command = Callable[..., Outcome]


@pytest.fixture(params=["ours", "qemu"])
def sockets(request: pytest.FixtureRequest, spawn: Any, tmp_path: Path) -> Iterator[Path]:
    """A directory with the socket ``qmp``, and ``hmp`` if the daemon is ours, and the node ``disk``."""
    words = ["--blockdev", "null-co,node-name=disk,size=1048576"]
    words += ["--chardev", f"socket,id=q,path={tmp_path}/qmp,server=on,wait=off", "--monitor", "q"]
    if request.param == "ours":
        words += ["--chardev", f"socket,id=h,path={tmp_path}/hmp,server=on,wait=off", "--monitor", "h,mode=readline"]
        line = argv("bh_storage_daemon", words)
    else:
        line = [require("qemu-storage-daemon"), *words]
    daemon = spawn([*line, "--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd"], ready=tmp_path / "nbd")
    yield tmp_path
    daemon.stop()


def test_execute(sockets: Path, command: Command) -> None:
    run = command("bottomhalf", ["console", sockets / "qmp", "-e", "query-named-block-nodes flat=on", "--json"])
    assert run.status == 0 and run.stderr == ""
    assert [node["node-name"] for node in json.loads(run.stdout)] == ["disk"]


def test_a_script_by_a_pipe(sockets: Path, command: Command) -> None:
    lines = """\
# a comment, and a blank line

blockdev-add driver=raw node-name=r file=disk
{"execute": "blockdev-del", "arguments": {"node-name": "disk"}}
blockdev-del node-name=r
"""
    run = command("bottomhalf", ["console", sockets / "qmp"], input=lines)
    assert run.status == 1
    assert run.stdout == "{}\n"  # it ends at what fails
    assert run.stderr == "bottomhalf console: line 4: GenericError: Block device disk is in use\n"
    run = command("bottomhalf", ["console", "-k", sockets / "qmp"], input="nope\nblockdev-del node-name=r")
    assert (run.status, run.stdout) == (1, "{}\n")
    assert run.stderr.startswith("bottomhalf console: line 1: The command nope has not been found\n")


def test_a_script_from_a_file(sockets: Path) -> None:
    script = sockets / "script"
    script.write_text("query-version\nexit\nnope\n")
    with script.open() as lines:
        done = subprocess.run(
            argv("bottomhalf", ["console", "--json", sockets / "qmp"]),
            stdin=lines,
            capture_output=True,
            timeout=SECONDS_MAX,
        )
    assert done.returncode == 0 and json.loads(done.stdout)["qemu"]["major"] == 10


def test_help_and_exit(sockets: Path, command: Command) -> None:
    run = command("bottomhalf", ["console", sockets / "qmp", "-e", "help block_resize", "-e", "help", "-e", "exit"])
    assert run.status == 0
    assert "  size=int\n" in run.stdout and "  node-name=string (optional)\n" in run.stdout
    assert "\nblockdev-add\n" in run.stdout
    run = command("bottomhalf", ["console", sockets / "qmp", "-e", "help nope"])
    assert run.status == 1


def test_events_and_the_end_of_the_server(sockets: Path, command: Command) -> None:
    lines = [
        "block-export-add type=nbd id=e node-name=disk",
        "block-export-del id=e",
        "query-block-exports",
        "quit",
        "query-version",
    ]
    words = [word for line in lines for word in ("-e", line)]
    run = command("bottomhalf", ["console", "--json", "--events", *words, sockets / "qmp"])
    assert run.status == 2
    assert '{"event": "BLOCK_EXPORT_DELETED", "data": {"id": "e"}}\n' in run.stdout
    assert run.stderr == "bottomhalf console: the server has hung up\n"


@pytest.mark.parametrize("sockets", ["ours"], indirect=True)
def test_a_monitor_for_people(sockets: Path, command: Command) -> None:
    run = command("bottomhalf", ["console", sockets / "hmp"], input="info version\n\nnope\ninfo block\n")
    assert run.status == 1
    assert "10.0.2" in run.stdout and "unknown command: 'nope'" in run.stdout and "(qemu)" not in run.stdout
    run = command("bottomhalf", ["console", sockets / "hmp", "-e", "quit"])
    assert run.status == 0


def test_no_server(command: Command, tmp_path: Path) -> None:
    run = command("bottomhalf", ["console", tmp_path / "nope", "-e", "query-version"])
    assert (run.status, run.stdout) == (2, "")
    assert run.stderr == f"bottomhalf console: cannot connect to unix:{tmp_path}/nope: No such file or directory\n"


@pytest.mark.parametrize("words", [[], ["a", "b"], ["--nope", "a"], ["-e"], ["tcp:host"], ["tcp:h:99999"]])
def test_wrong_usage(tool: Callable[..., Outcome], words: list[str]) -> None:
    run = tool(console.main, words)
    assert run.status == 1 and run.stderr.startswith("bottomhalf console: ")


def test_help_names_every_option(tool: Callable[..., Outcome]) -> None:
    run = tool(console.main, ["--help"])
    assert run.status == 0
    assert options_in(run.stdout) >= {option.name for option in console.OPTIONS}


def test_addresses() -> None:
    assert console.address_of("/a/b:1") == UnixAddress("/a/b:1")
    assert console.address_of("sock") == UnixAddress("sock")
    assert console.address_of("unix:a:1") == UnixAddress("a:1")
    assert console.address_of("localhost:4444") == InetAddress("localhost", 4444)
    assert console.address_of("tcp:[::1]:4444") == InetAddress("::1", 4444)
    assert console.address_of(":4444") == InetAddress("localhost", 4444)
    with pytest.raises(UsageError):
        console.address_of("h:70000")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tool: Callable[..., Outcome]) -> None:
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    run = tool(console.main, ["/nope"])
    assert run.status == 1 and "pip install 'bottomhalf[ui]'" in run.stderr


def test_what_a_terminal_might_obey_is_not_printed() -> None:
    assert console.as_text({"a": "\x1b[31m\x9b31mé"}) == '{\n  "a": "\\u001b[31m\\u009b31mé"\n}'


# -- at a terminal ----------------------------------------------------------------------------------------------

_ESCAPES = re.compile(rb"\x1b(?:\[[0-9;?]*[a-zA-Z]|[=>]|\][^\x07]*\x07)|\r")


def _take_terminal() -> None:
    """Make standard input the terminal that Ctrl-C comes from."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Person:
    """Somebody at a terminal, who waits for what he sees and never for a time."""

    def __init__(self, words: list[str], where: Path) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "HOME": str(where)}
        self.process = subprocess.Popen(
            argv("bottomhalf", ["console", *words]),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.raw = b""

    def type(self, keys: str) -> None:
        self.raw = b""
        os.write(self.master, keys.encode())

    def is_asked(self) -> None:
        """The prompt is the last thing on the screen."""
        self.sees("(QMP)", lambda shown: shown.rstrip().endswith("(QMP)"))

    def sees(self, text: str, enough: Callable[[str], bool] | None = None) -> None:
        while True:
            shown = _ESCAPES.sub(b"", self.raw).decode(errors="replace")
            if enough(shown) if enough else text in shown:
                return
            assert select.select([self.master], [], [], SECONDS_MAX)[0], f"{text!r} is not in {shown!r}"
            try:
                self.raw += os.read(self.master, 65536)
            except OSError:
                raise AssertionError(f"{text!r} is not in {shown!r}, and the console has ended") from None

    def end(self) -> int:
        """Read to the end; the exit status."""
        while True:
            assert select.select([self.master], [], [], SECONDS_MAX)[0], f"the console does not end: {self.raw!r}"
            try:
                if not os.read(self.master, 65536):
                    break
            except OSError:
                break
        status = self.process.wait(SECONDS_MAX)
        os.close(self.master)
        return status


def test_a_person(sockets: Path) -> None:
    person = Person([str(sockets / "qmp")], sockets)
    person.sees("Connected to QEMU 10.0.2")
    person.is_asked()
    person.type("query-vers\t")
    person.sees("query-version")
    person.type("\r")
    person.sees('"major": 10')
    assert b"\x1b[0;36m" in person.raw  # keys are coloured
    person.is_asked()
    person.type("blockdev-del node-name=di\t")
    person.sees("node-name=disk")  # a name that only the server knows
    person.type("\x03")  # not that one
    person.is_asked()
    person.type('{"execute": "query-block-exports",\r "arguments": {}}\r')  # Enter within brackets goes on
    person.sees("[]")
    person.type("block-export-add type=nbd id=e node-name=disk\r")
    person.sees("{}")
    person.type("block-export-del id=e\r")
    person.sees("BLOCK_EXPORT_DELETED")
    person.type("object-add qom-type=secret id=s data=topmost\r")
    person.sees("{}")
    person.type("nope\r")
    person.sees("The command nope has not been found")
    person.is_asked()
    person.type("\x1b[A")
    person.sees("nope")  # history
    person.type("\x03")
    person.is_asked()
    person.type("\x04")
    assert person.end() == 0
    history = sockets / ".bottomhalf_console_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+query-version\n" in history.read_text() and "topmost" not in history.read_text()


def test_a_person_and_the_end_of_the_server(sockets: Path) -> None:
    person = Person(["--no-history", str(sockets / "qmp")], sockets)
    person.is_asked()
    person.type("quit\r")
    person.sees("{}")
    assert person.end() == 0
    assert not (sockets / ".bottomhalf_console_history").exists()


@pytest.mark.parametrize("sockets", ["ours"], indirect=True)
def test_a_person_who_does_not_want_to_wait(sockets: Path) -> None:
    """A command waits for a client; Ctrl-C brings the prompt back, and the answer comes when the client has come."""
    import socket

    person = Person(["--no-history", str(sockets / "qmp")], sockets)
    person.is_asked()
    arguments = json.dumps(
        {
            "id": "w",
            "backend": {
                "type": "socket",
                "data": {"addr": {"type": "unix", "data": {"path": f"{sockets}/w"}}, "server": True, "wait": True},
            },
        }
    )
    person.type(f"chardev-add {arguments}\r")
    while not (sockets / "w").exists():
        assert person.process.poll() is None
    os.kill(person.process.pid, signal.SIGINT)
    person.sees("chardev-add goes on")
    person.is_asked()
    person.type("exec-oob x-explain\r")
    person.sees("a client of chardev w")
    person.is_asked()
    person.raw = b""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(sockets / "w"))
    person.sees("{}")
    person.is_asked()  # until the prompt is back the terminal takes Ctrl-D for itself
    person.type("\x04")
    assert person.end() == 0
    client.close()


@pytest.mark.parametrize("sockets", ["ours"], indirect=True)
@pytest.mark.parametrize("leave, status", [("\x04", 0), ("\x1d", 0), ("\x03", 130), ("quit\r", 0)])
def test_a_person_and_a_monitor_for_people(sockets: Path, leave: str, status: int) -> None:
    person = Person([str(sockets / "hmp")], sockets)
    person.sees("(qemu) ")
    person.type("info vers\t")
    person.sees("info version")
    person.type("\r")
    person.sees("10.0.2")
    person.sees("(qemu) ")
    person.type(leave)
    assert person.end() == status
