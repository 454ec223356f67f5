# SPDX-License-Identifier: Apache-2.0
"""bh-storage-daemon's command line: what is understood, in which order, and what errors say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.monitor.storage import Storage
from bottomhalf.tools import bh_storage_daemon
from bottomhalf.tools.bh_storage_daemon import OPTIONS, main
from tests.tools.conftest import Outcome, options_in

NAME = "bh-storage-daemon"
NULL = "null-co,node-name=n,size=1048576"


@pytest.fixture
def daemon(tool: Callable[..., Outcome]) -> Callable[..., Outcome]:
    return lambda *words: tool(main, words, NAME)


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "s"


Daemon = Callable[..., Outcome]


def refused(outcome: Outcome) -> str:
    """What it said when it refused."""
    assert outcome.status == 1, outcome
    assert outcome.stdout == ""
    assert outcome.stderr.startswith(f"{NAME}: ")
    return outcome.stderr.removeprefix(f"{NAME}: ").rstrip("\n")


# -- help, version


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["--he"], ["--blockdev", "x", "-h"], ["x", "-h"], ["-h", "-?"]])
def test_help(daemon: Daemon, words: list[str]) -> None:
    outcome = daemon(*words)
    assert outcome.status == 0 and outcome.stderr == ""
    assert outcome.stdout.startswith(f"Usage: {NAME} [options]\n")
    assert options_in(outcome.stdout) >= {option.name for option in OPTIONS}
    assert [line for line in outcome.stdout.splitlines() if len(line) > 101] == []


@pytest.mark.parametrize("words", [["-V"], ["--version"], ["--blockdev", "nonsense", "-V"]])
def test_version(daemon: Daemon, words: list[str]) -> None:
    outcome = daemon(*words)
    assert outcome.status == 0
    assert outcome.stdout.splitlines()[0].startswith(f"{NAME} version ")
    assert "qemu-storage-daemon 10.0.2" in outcome.stdout


def test_answers_to_its_name(tool: Callable[..., Outcome]) -> None:
    assert tool(main, ["-h"], "qemu-storage-daemon").stdout.startswith("Usage: qemu-storage-daemon ")
    assert tool(main, ["--x"], "qemu-storage-daemon").stderr.startswith("qemu-storage-daemon: unrec")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--blockdev", "help"], ["driver=", "node-name=", "file", "null-co"]),
        (["--blockdev", "?"], ["driver="]),
        (["--blockdev", "file,help"], ["filename=TEXT", "locking", "Common options:"]),
        (["--blockdev", "driver=raw,help"], ["offset=", "size="]),
        (["--chardev", "help"], ["path=", "server="]),
        (["--export", "help"], ["node-name=", "nbd"]),
        (["--export", "nbd,help"], ["description="]),
        (["--monitor", "help"], ["chardev="]),
        (["--nbd-server", "help"], ["addr.path=", "max-connections="]),
        (["--object", "help"], ["iothread"]),
        (["--object", "iothread,help"], ["poll-max-ns="]),
    ],
)
def test_help_of_an_option(daemon: Daemon, words: list[str], expected: list[str]) -> None:
    outcome = daemon(*words)
    assert outcome.status == 0 and outcome.stderr == ""
    for text in expected:
        assert text in outcome.stdout


# -- errors


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--nope"], f"unrecognized option '--nope'\nTry '{NAME} --help' for more information."),
        (["--blokdev", "x"], "unrecognized option '--blokdev'\nDid you mean 'blockdev'?"),
        (["-x"], f"invalid option -- 'x'\nTry '{NAME} --help' for more information."),
        (["--blockdev"], f"option '--blockdev' requires an argument\nTry '{NAME} --help' for more information."),
        (["--daemonize=on"], "option '--daemonize' doesn't allow an argument"),
        (["image.raw"], f"image.raw: Unexpected argument\nTry '{NAME} --help' for more information."),
        (["--", "--help"], "--help: Unexpected argument"),
        (["--blockdev", "nope", "image"], "--blockdev nope: Parameter 'driver' does not accept value 'nope'"),
        (["image", "--blockdev", "nope"], "image: Unexpected argument"),
        (["--blockdev=nope"], "--blockdev=nope: Parameter 'driver' does not accept value 'nope'"),
        (["--blo", "nope"], "--blo nope: Parameter 'driver' does not accept value 'nope'"),
        (["--blockdev", "fil,node-name=n"], "Did you mean 'file'?"),
        (["--blockdev", ""], "--blockdev : Parameter 'driver' is missing"),
        (["--blockdev", "null-co"], "--blockdev null-co: 'node-name' must be specified for the root node"),
        (["--blockdev", NULL, "--blockdev", NULL], f"--blockdev {NULL}: Duplicate nodes with node-name='n'"),
        (["--blockdev", "null-co,node-name=1"], "Invalid node-name: '1'"),
        (["--blockdev", "null-co,node-name=n,size=x"], "--blockdev null-co,node-name=n,size=x: Parameter 'size'"),
        (["--blockdev", "null-co,node-name=n,sise=1"], "Parameter 'sise' is unexpected"),
        (["--blockdev", "null-co,node-name=n,read-only=maybe"], "Parameter 'read-only'"),
        (["--blockdev", '{"driver"'], "JSON parse error"),
        (["--blockdev", '{"driver": "null-co", "node-name": 1}'], "Invalid parameter type for 'node-name'"),
        (["--blockdev", "raw,node-name=r,file=nope"], "Cannot find device='nope' nor node-name='nope'"),
        (
            ["--blockdev", "file,node-name=f,filename=/nope/x"],
            "--blockdev file,node-name=f,filename=/nope/x: Could not open '/nope/x': No such file or directory",
        ),
        (["--export", "nbd,id=e,node-name=n"], "Cannot find device='' nor node-name='n'"),
        (["--blockdev", NULL, "--export", "nbd,id=e,node-name=n"], "NBD server not running"),
        (["--export", "nbd,id=e,node-name=n", "--blockdev", NULL], "--export nbd,id=e,node-name=n: Cannot find"),
        (["--monitor", "qmp"], '--monitor qmp: chardev "qmp" not found\nGive --chardev before --monitor.'),
        (["--chardev", "socket,id=q,path=/s"], "Failed to connect to '/s': No such file or directory"),
        (["--chardev", "nope,id=q"], "'nope' is not a valid char driver name"),
        (["--chardev", "stdio"], "chardev: no id specified"),
        (["--chardev", "mux,id=q,chardev=none"], "mux: base chardev none not found"),
        (["--nbd-server", "addr.type=unix,addr.path=/nope/s"], "Failed to bind socket to /nope/s: No such file"),
        (["--nbd-server", "addr.type=unix"], "Parameter 'addr.path' is missing"),
        (["--object", "iothread"], "--object iothread: Parameter 'id' is missing"),
        (["--object", "iothread,id=t", "--object", "iothread,id=t"], "attempt to add duplicate property 't'"),
        (["--object", "nope,id=t"], "Parameter 'qom-type' does not accept value 'nope'"),
        (["--pidfile", "/nope/pid"], "cannot create PID file: Could not create '/nope/pid': No such file or directory"),
    ],
)
def test_errors(daemon: Daemon, words: list[str], text: str) -> None:
    assert text in refused(daemon(*words))


def test_error_after_something_was_set_up(daemon: Daemon, sock: Path) -> None:
    """What was set up is taken down."""
    listens = f"addr.type=unix,addr.path={sock}"
    assert "NBD server already running" in refused(daemon("--nbd-server", listens, "--nbd-server", listens))
    assert not sock.exists()


def test_monitor_modes(daemon: Daemon, sock: Path) -> None:
    chardev = ["--chardev", f"socket,id=q,path={sock},server=on,wait=off"]
    hint = "'pretty' is not compatible with HMP monitors"
    assert hint in refused(daemon(*chardev, "--monitor", "q,mode=readline,pretty=on"))
    assert "chardev 'q' is already in use" in refused(daemon(*chardev, "--monitor", "q", "--monitor", "q"))
    chardev = ["--chardev", f"socket,id=qmp0,path={sock},server=on,wait=off"]
    assert "Did you mean 'qmp0'?" in refused(daemon(*chardev, "--monitor", "qmp"))


def test_chardev_warnings(daemon: Daemon, sock: Path, served: list[Storage]) -> None:
    """A deprecated spelling works, and is told."""
    outcome = daemon("--chardev", f"socket,id=q,path={sock},server,nowait")
    assert outcome.status == 0
    assert outcome.stderr.count("warning: short-form boolean option") == 2
    assert outcome.stderr.startswith(f"{NAME}: --chardev socket,id=q,path={sock},server,nowait: warning: ")


# -- what is set up


def test_everything(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "disk,1.raw"  # a comma is written twice
    image.write_bytes(bytes(1 << 20))
    seen: dict[str, Any] = {}

    def look(storage: Storage) -> None:
        seen.update(
            nodes={name: (node.driver, node.size) for name, node in storage.graph.nodes.items()},
            exports=[(e.id, e.name, e.node_name, e.writable, e.description) for e in storage.exports.exports.values()],
            contexts={name: node.context.name for name, node in storage.graph.nodes.items()},
            address=str(storage.exports.nbd_server and storage.exports.nbd_server.address),
            limits=storage.exports.nbd_server and storage.exports.nbd_server.connections_max,
            monitors=[monitor.chardev.id for monitor in storage.monitors],
            pid=(tmp_path / "pid").read_text(),
            poll_max_ns=storage.tree.resolve("t").get("poll-max-ns"),
        )

    monkeypatch.setattr(Storage, "run_forever", look)
    filename = str(image).replace(",", ",,")
    outcome = daemon(
        *("--object", "iothread,id=t,poll-max-ns=123"),
        *("--blockdev", f"driver=file,node-name=f,filename={filename}"),
        *("--blockdev", json.dumps({"driver": "raw", "node-name": "r", "file": "f", "offset": 4096})),
        *("--blockdev", "null-co,node-name=n,size=1048576"),
        *("--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd,max-connections=7"),
        *("--export", "nbd,id=e1,node-name=r,name=x,writable=on,description=hello"),
        *("--export", json.dumps({"type": "nbd", "id": "e2", "node-name": "n", "iothread": "t"})),
        *("--chardev", f"socket,id=q,path={tmp_path}/qmp,server=on,wait=off"),
        *("--monitor", "chardev=q"),
        *("--pidfile", tmp_path / "pid"),
    )
    assert outcome.status == 0, outcome
    assert seen == {
        "nodes": {"f": ("file", 1 << 20), "r": ("raw", (1 << 20) - 4096), "n": ("null-co", 1 << 20)},
        "exports": [("e1", "x", "r", True, "hello"), ("e2", "n", "n", False, "")],
        "contexts": {"f": "main", "r": "main", "n": "t"},
        "address": f"unix:{tmp_path}/nbd",
        "limits": 7,
        "monitors": ["q"],
        "pid": f"{os.getpid()}\n",
        "poll_max_ns": 123,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk,1.raw"]


def test_order_of_the_words_does_not_matter_to_the_first_pass(
    daemon: Daemon, tmp_path: Path, served: list[Storage]
) -> None:
    pidfile = tmp_path / "pid"
    assert daemon("--pidfile", pidfile, "--blockdev", NULL).status == 0
    assert daemon("--blockdev", NULL, "--pidfile", pidfile).status == 0
    assert "Duplicate" in refused(daemon("--pidfile", pidfile, "--blockdev", NULL, "--blockdev", NULL))
    assert len(served) == 2


def test_pidfile_of_another(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once: the lock is the process's own, so the other one is a child."""
    pidfile = tmp_path / "pid"
    read, write = os.pipe()
    release_read, release_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            from bottomhalf.host.linux.process import PidFile

            PidFile(str(pidfile))
            os.write(write, b"x")
            os.close(release_write)
            os.read(release_read, 1)  # ends when the parent closes its end, or dies
        finally:
            os._exit(0)
    try:
        assert os.read(read, 1) == b"x"
        text = refused(daemon("--pidfile", pidfile))
        assert text == f"cannot create PID file: Cannot lock pid file: another process holds it: {pidfile}"
        assert pidfile.exists()
    finally:
        os.close(release_write)
        os.waitpid(child, 0)
        for fd in (read, write, release_read):
            os.close(fd)


def test_every_schema_option_is_one_of_the_command_line() -> None:
    from bottomhalf.qapi import command_line

    assert {name.removeprefix("--") for name in command_line.OPTIONS} == set(bh_storage_daemon._ACTIONS)
    assert set(bh_storage_daemon._ACTIONS) < {option.name for option in OPTIONS}
