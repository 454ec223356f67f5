# SPDX-License-Identifier: Apache-2.0
"""bottomhalf serve: what it understands, what it picks, what it shows; and the command around it."""

from __future__ import annotations

import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bottomhalf import images
from bottomhalf.exports.nbd.export import ExportStatistics
from bottomhalf.host.protocol import InetAddress, UnixAddress
from bottomhalf.monitor.storage import Storage
from bottomhalf.tools import bottomhalf, serve
from bottomhalf.tools.getopt import UsageError
from bottomhalf.tools.serve import OPTIONS, Screen, Settings, uri
from tests.peers.programs import Spawned
from tests.tools.conftest import Outcome, argv, options_in
from tests.tools.test_storage_daemon_process import PlainClient, wait_for

Tool = Callable[..., Outcome]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


# -- settings


def test_defaults() -> None:
    settings = Settings(["/images/my.disk.raw"])
    assert settings.image == "/images/my.disk.raw" and settings.name == "my.disk"
    assert settings.port is None and settings.socket is None and settings.format is None and settings.qmp is None
    assert not (settings.read_only or settings.direct or settings.quiet or settings.help)


@pytest.mark.parametrize(
    ("image", "name"), [("a", "a"), ("a.raw", "a"), ("x/.raw", ".raw"), ("/dev/sdb", "sdb"), ("d/", "d"), ("a.", "a")]
)
def test_name_of_the_export(image: str, name: str) -> None:
    assert Settings([image]).name == name


def test_all_settings() -> None:
    settings = Settings(["-rnq", "-p", "0", "--bind", "::1", "-x", "n", "-f", "raw", "--qmp", "q", "a"])
    assert (settings.read_only, settings.direct, settings.quiet) == (True, True, True)
    assert (settings.port, settings.bind, settings.name, settings.format) == (0, "::1", "n", "raw")
    assert (settings.qmp, settings.image) == ("q", "a")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("", "no image given"),
        ("a b", "give one image"),
        ("-k s -p 1 a", "--socket and --port exclude each other"),
        ("-b h a", "--bind goes with --port"),
        ("-p x a", "port 'x' is not a number from 0 to 65535"),
        ("-p 65536 a", "port '65536' is not a number from 0 to 65535"),
        ("-p -1 a", "port '-1' is not a number from 0 to 65535"),
        ("--nope a", "unrecognized option '--nope'"),
    ],
)
def test_refused_settings(words: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings(words.split())
    assert str(caught.value) == text


def test_help(tool: Tool) -> None:
    outcome = tool(serve.main, ["--help", "--nope"])
    assert outcome.status == 0 and outcome.stderr == ""
    assert options_in(outcome.stdout) >= {option.name for option in OPTIONS}


# -- what is shown


@pytest.mark.parametrize(
    ("address", "name", "text"),
    [
        (UnixAddress("/run/x.sock"), "disk", "nbd+unix:///disk?socket=/run/x.sock"),
        (UnixAddress("/run/a b?.sock"), "ä/b", "nbd+unix:///%C3%A4%2Fb?socket=/run/a%20b%3F.sock"),
        (UnixAddress("/s"), "", "nbd+unix:///?socket=/s"),
        (InetAddress("127.0.0.1", 10809), "d", "nbd://127.0.0.1:10809/d"),
        (InetAddress("::1", 5), "d", "nbd://[::1]:5/d"),
    ],
)
def test_uri(address: UnixAddress | InetAddress, name: str, text: str) -> None:
    assert uri(address, name) == text


def line(before: ExportStatistics, now: ExportStatistics, clients: int = 1, in_flight: int = 0) -> str:
    export: Any = types.SimpleNamespace(connections=[types.SimpleNamespace(in_flight=in_flight)])
    server: Any = types.SimpleNamespace(connections=[None] * clients)
    return serve._line(export, server, before, now, 0.5)


def test_line() -> None:
    assert line(ExportStatistics(), ExportStatistics(), clients=0) == (
        "0 clients | read 0 B/s 0/s | write 0 B/s 0/s | 0 in flight | latency -"
    )
    now = ExportStatistics(
        reads=1000, read_bytes=4096_000, writes=5, write_bytes=5 << 20, answered=1005, latency_ns=1005 * 38_000
    )
    assert line(ExportStatistics(), now, in_flight=7) == (
        "1 client | read 7.81 MiB/s 2k/s | write 10 MiB/s 10/s | 7 in flight | latency 38 us"
    )
    assert line(now, now, clients=2).startswith("2 clients | read 0 B/s")


def test_screen_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(quiet=False)
    screen.log("hello")
    screen.end()
    assert capsys.readouterr() == ("", "bottomhalf: hello\n")


def test_screen_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.fileno", lambda: -1)  # of which the width is not to be had: 80
    screen = Screen(quiet=False)
    screen._show("x" * 200)
    out = capsys.readouterr().out
    assert out == "\r\x1b[K" + "x" * 79
    screen.log("told")
    captured = capsys.readouterr()
    assert captured.out == "\r\x1b[K" and captured.err == "bottomhalf: told\n"
    screen.end()
    assert capsys.readouterr().out == ""


# -- the command


def test_command(tool: Tool) -> None:
    assert tool(bottomhalf.main, ["--help"]).stdout.startswith("Usage: bottomhalf COMMAND")
    assert tool(bottomhalf.main, ["version"]).stdout.startswith("bottomhalf ")
    assert tool(bottomhalf.main, ["serve", "-h"]).stdout.startswith("Usage: bottomhalf serve")
    outcome = tool(bottomhalf.main, [])
    assert outcome.status == 1 and outcome.stderr.startswith("bottomhalf: no command given\n")
    outcome = tool(bottomhalf.main, ["sreve"])
    assert outcome.stderr == "bottomhalf: unknown command 'sreve'\nDid you mean 'serve'?\n"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("/nope/x", "Could not open '/nope/x': No such file or directory"),
        ("-k /nope/s IMAGE", "Failed to bind socket to /nope/s: No such file or directory"),
        ("-f qed IMAGE", "Unknown format 'qed'; this version serves raw and qcow2"),
        ("VMDK", "is a vmdk image, which this version cannot read yet\nTo serve its bytes as they are"),
        ("-f qcow2 IMAGE", "Image is not in qcow2 format"),
        ("BACKED", "The image names a backing file, 'base.raw', which is not opened unless you say so"),
        ("-p 1 -b nohost.invalid IMAGE", "address resolution failed for nohost.invalid:1: "),
    ],
)
def test_cannot_serve(tool: Tool, tmp_path: Path, image: Path, words: str, text: str) -> None:
    vmdk, backed = tmp_path / "v", tmp_path / "b"
    vmdk.write_bytes(b"KDMV" + bytes(600))
    images.create(backed, format="qcow2", size=1 << 20, backing_file="base.raw", backing_fmt="raw")
    named = {"IMAGE": str(image), "VMDK": str(vmdk), "BACKED": str(backed)}
    given = [named.get(word, word) for word in words.split()]
    outcome = tool(serve.main, given)
    assert outcome.status == 1 and outcome.stdout == ""
    assert outcome.stderr.startswith("bottomhalf serve: ") and text in outcome.stderr


def test_introduces_itself(
    tool: Tool, served: list[Storage], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    outcome = tool(serve.main, [image])
    assert outcome.status == 0, outcome
    where = f"nbd+unix:///disk?socket={tmp_path}/bottomhalf-disk.sock"
    lines = outcome.stdout.splitlines()
    assert lines[0] == f"serving {image} (raw, 1 MiB, writable)"
    assert lines[2] == f"  {where}"
    assert f"  copy it      nbdcopy '{where}' copy.raw" in lines
    assert lines[-1] == "served 0 reads and 0 writes to 0 clients; everything is written"
    assert tool(serve.main, ["-q", "-r", image]).stdout == f"{where}\n"


def test_read_only_image(tool: Tool, served: list[Storage], image: Path, tmp_path: Path) -> None:
    """-r, and an image that cannot be written."""
    assert "read-only" in tool(serve.main, ["-r", "-k", tmp_path / "s", image]).stdout.splitlines()[0]


def test_from_start_to_end(spawn: Callable[..., Spawned], tmp_path: Path, image: Path) -> None:
    """The URI on stdout, QMP beside it, clients, Ctrl-C, and what was done."""
    words = ["serve", "-k", tmp_path / "s", "--qmp", tmp_path / "q", image]
    daemon = spawn(argv("bottomhalf", words), ready=tmp_path / "q")
    client = PlainClient(tmp_path / "s", "disk")
    client.write(512, b"hello")
    assert client.wait(client.client.read(512, 5)) == b"hello"
    second = PlainClient(tmp_path / "s", "")  # the only export has no need of a name
    assert second.wait(second.client.read(512, 5)) == b"hello"
    second.close()
    client.close()
    assert daemon.stop(signal.SIGINT) == 0
    assert daemon.output().splitlines()[-1].startswith("served 2 reads and 1 write")
    assert image.read_bytes()[512:517] == b"hello"
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]


def test_image_is_its_own(spawn: Callable[..., Spawned], tool: Tool, tmp_path: Path, image: Path) -> None:
    """A second writer is told who has it."""
    daemon = spawn(argv("bottomhalf", ["serve", "-k", tmp_path / "s", image]), ready=tmp_path / "s")
    wait_for(lambda: "Ctrl-C" in daemon.output(), "its words")
    outcome = tool(serve.main, ["-k", tmp_path / "s2", image])
    assert outcome.status == 1
    assert "lock" in outcome.stderr and f"(pid {daemon.process.pid})" in outcome.stderr
    assert daemon.stop() == 0
