# SPDX-License-Identifier: Apache-2.0
"""bh-nbd: the options of qemu-nbd, its errors in its words, and how long it lives."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.monitor.storage import Storage
from bottomhalf.tools.bh_nbd import LATER, OPTIONS, Settings, main
from bottomhalf.tools.getopt import UsageError
from tests import seccomp
from tests.peers.programs import Spawned
from tests.tools.conftest import SECONDS_MAX, Outcome, argv, options_in
from tests.tools.test_storage_daemon_process import PlainClient, is_alive, wait_for

NAME = "bh-nbd"
MIB = 1 << 20
Spawn = Callable[..., Spawned]


@pytest.fixture
def nbd(tool: Callable[..., Outcome]) -> Callable[..., Outcome]:
    return lambda *words: tool(main, words, NAME)


Nbd = Callable[..., Outcome]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(bytes([number]) * 4096 for number in range(MIB // 4096)))
    return path


def refused(outcome: Outcome) -> str:
    assert outcome.status == 1, outcome
    assert outcome.stderr.startswith(f"{NAME}: ")
    return outcome.stderr.removeprefix(f"{NAME}: ").rstrip("\n")


# -- options


def test_help(nbd: Nbd) -> None:
    outcome = nbd("--help", "--nope")
    assert outcome.status == 0 and outcome.stdout.startswith(f"Usage: {NAME} [OPTIONS] FILE\n")
    assert options_in(outcome.stdout) >= {option.name for option in OPTIONS}


def test_version(nbd: Nbd, tool: Callable[..., Outcome]) -> None:
    assert nbd("-V").stdout.startswith(f"{NAME} ")
    assert tool(main, ["--version"], "qemu-nbd").stdout.startswith("qemu-nbd ")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("", f"Invalid number of arguments\nTry `{NAME} --help' for more information."),
        ("a b", f"Invalid number of arguments\nTry `{NAME} --help' for more information."),
        ("--nope", f"unrecognized option '--nope'\nTry `{NAME} --help' for more information."),
        ("-p", f"option requires an argument -- 'p'\nTry `{NAME} --help' for more information."),
        ("-e x a", "Invalid shared device number 'x'"),
        ("-e -1 a", "Invalid shared device number '-1'"),
        ("-e 5000000000 a", "Invalid shared device number '5000000000'"),
        ("-e 1_0 a", "Invalid shared device number '1_0'"),
        ("-o 2M a", "Invalid offset '2M'"),
        ("-o 08 a", "Invalid offset '08'"),
        ("-o 0x a", "Invalid offset '0x'"),
        ("--handshake-limit x a", "Invalid handshake limit 'x'"),
        (
            "--cache=x a",
            "Invalid cache mode `x'\nIt is one of none, off, directsync, writeback, unsafe, writethrough.",
        ),
        ("-n --cache=none a", "-n and --cache can only be specified once"),
        ("--cache=none -n a", "-n and --cache can only be specified once"),
        ("--aio=x a", "Invalid aio mode 'x'\nIt is one of threads, native, io_uring."),
        ("--aio=threads --aio=native a", "--aio can only be specified once"),
        ("--discard=x a", "Invalid discard mode `x'\nIt is one of ignore, off, unmap, on."),
        ("--discard=on --discard=on a", "--discard can only be specified once"),
        ("--detect-zeroes=x a", "Failed to parse detect_zeroes mode: invalid parameter value: x\nIt is one of"),
        (
            "--detect-zeroes=unmap a",
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
        ("-k s a", "socket path must be absolute"),
        ("-p abc a", "port 'abc' is not a number from 0 to 65535"),
        ("-p 70000 a", "port '70000' is not a number from 0 to 65535"),
        ("--image-opts -f raw driver=null-co", "--image-opts and -f are mutually exclusive"),
        ("-L a", "List mode is incompatible with a file name"),
        ("-L -f raw", "List mode is incompatible with per-device settings"),
        ("-L --fork", "List mode is incompatible with per-device settings"),
        ("-L -x e", "List mode is incompatible with per-device settings"),
        ("-L -k /nope/s", "Failed to connect to '/nope/s': No such file or directory"),
        ("--object nope,id=x a", "Parameter 'qom-type' does not accept value 'nope'"),
        ("-k /nope/s a", "Failed to bind socket to /nope/s: No such file or directory"),
    ],
)
def test_refused(nbd: Nbd, words: str, text: str) -> None:
    assert refused(nbd(*words.split())).startswith(text)


@pytest.mark.parametrize("option", LATER, ids=lambda option: option.name)
def test_later(nbd: Nbd, option: Any) -> None:
    words = [f"--{option.name}", *(["x"] if option.takes else []), "image"]
    assert refused(nbd(*words)) == f"option '--{option.name}' is not supported yet"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-f", "raw", "/nope/x"], "Failed to blk_new_open '/nope/x': Could not open '/nope/x': No such file"),
        (["/nope/x"], "Failed to blk_new_open '/nope/x': Could not open '/nope/x': No such file"),
        (["-f", "qed", "IMAGE"], "Failed to blk_new_open 'IMAGE': Unknown driver 'qed'"),
        (["-f", "", "IMAGE"], "Failed to blk_new_open 'IMAGE': Unknown driver ''"),
        (
            ["-f", "raw", "--aio=native", "IMAGE"],
            "Failed to blk_new_open 'IMAGE': aio=native was specified, but it requires cache.direct=on",
        ),
        (["-f", "raw", "-o", "1048577", "IMAGE"], "Offset (1048577) cannot be greater than size of the containing"),
        (["-f", "raw", "-x", "n" * 5000, "IMAGE"], "export name 'nnnnnnnnnnnnnnnnnnnn...' too long"),
        (["-f", "raw", "--pid-file=/nope/p", "IMAGE"], "Could not create '/nope/p': No such file or directory"),
        (["--image-opts", "driver=file"], "Failed to blk_new_open 'driver=file': Parameter 'filename' is missing"),
        (["--image-opts", "nope"], "Failed to blk_new_open 'nope': "),
        (["VMDK"], "Failed to blk_new_open 'VMDK': 'VMDK' is a vmdk image, which this version cannot read yet"),
    ],
)
def test_cannot_serve(nbd: Nbd, tmp_path: Path, image: Path, words: list[str], text: str) -> None:
    vmdk = tmp_path / "v"
    vmdk.write_bytes(b"KDMV" + bytes(600))

    def real(word: str) -> str:
        return word.replace("IMAGE", str(image)).replace("VMDK", str(vmdk))

    assert refused(nbd("-k", tmp_path / "s", *map(real, words))).startswith(real(text))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (False, False, False)),
        ("-n", (True, False, False)),
        ("--cache=none", (True, False, False)),
        ("--cache=writeback", (False, False, False)),
        ("--cache=writethrough", (False, False, True)),
        ("--cache=directsync", (True, False, True)),
        ("--cache=unsafe", (False, True, False)),
    ],
)
def test_cache_modes(words: str, expected: tuple[bool, bool, bool]) -> None:
    settings = Settings([*words.split(), "a"])
    assert (settings.direct, settings.no_flush, settings.writethrough) == expected


@pytest.mark.parametrize(("text", "value"), [("512", 512), ("0x200", 512), ("01000", 512), ("0", 0), (" +5", 5)])
def test_numbers(text: str, value: int) -> None:
    assert Settings(["-o", text, "a"]).offset == value


def test_socket_activation_is_refused(nbd: Nbd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listening elsewhere than the service manager believes would be worse."""
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert refused(nbd("a")).startswith("socket activation is not supported yet")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert refused(nbd("/nope/x")).startswith("Failed to")


# -- what is served


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is set up when it would begin to serve."""
    seen: dict[str, Any] = {}

    def run(storage: Storage) -> None:
        export = storage.exports.exports["qemu-nbd-export"]
        server = storage.exports.nbd_server
        assert server is not None
        node = storage.graph.nodes["#block001"]
        seen.update(
            name=export.name,
            description=export.description,
            size=export.backend.size,
            writable=export.writable,
            writethrough=export.backend.writethrough,
            shared=server.connections_max,
            limit_ns=server.handshake_max_ns,
            address=str(server.address),
            unmap=export.backend.node.unmap,
            direct=getattr(getattr(node, "file", None), "direct", None),
            no_flush=getattr(node, "no_flush", None),
            driver=export.backend.node.driver,
        )

    monkeypatch.setattr(Storage, "run_forever", run)
    return seen


def test_defaults(nbd: Nbd, image: Path, tmp_path: Path, look: dict[str, Any]) -> None:
    assert nbd("-f", "raw", "-k", tmp_path / "s", image).stderr == ""
    assert look == {
        "name": "",
        "description": "",
        "size": MIB,
        "writable": True,
        "writethrough": False,
        "shared": 1,
        "limit_ns": 10 * 10**9,
        "address": f"unix:{tmp_path}/s",
        "unmap": False,
        "direct": False,
        "no_flush": False,
        "driver": "raw",
    }


def test_everything_else(nbd: Nbd, image: Path, tmp_path: Path, look: dict[str, Any]) -> None:
    outcome = nbd(
        *("-f", "raw", "-t", "-v", "-e", "0", "-x", "name", "-D", "text", "--handshake-limit=3", "-o", "4096"),
        *("--cache=unsafe", f"--aio={'threads' if seccomp.missing('io_uring') else 'io_uring'}"),
        *("--discard=unmap", "--detect-zeroes=unmap", "-b", "127.0.0.1", "-p", "0"),
        *("--object", "iothread,id=t", image),
    )
    assert outcome.status == 0, outcome
    port = look.pop("address").removeprefix("127.0.0.1:")
    assert int(port) > 0
    assert look == {
        "name": "name",
        "description": "text",
        "size": MIB - 4096,
        "writable": True,
        "writethrough": False,
        "shared": 0,
        "limit_ns": 3 * 10**9,
        "unmap": True,
        "direct": False,
        "no_flush": True,
        "driver": "raw",
    }


def test_read_only(nbd: Nbd, image: Path, tmp_path: Path, look: dict[str, Any]) -> None:
    assert nbd("-r", "-k", tmp_path / "s", image).stderr == ""  # without a warning: nothing can be written
    assert look["writable"] is False


def test_image_opts(nbd: Nbd, image: Path, tmp_path: Path, look: dict[str, Any]) -> None:
    opts = f"driver=raw,offset=512,file.driver=file,file.filename={image}"
    assert nbd("--image-opts", "-o", "512", "--cache=unsafe", "-k", tmp_path / "s", opts).status == 0
    assert look["size"] == MIB - 1024 and look["no_flush"] is True
    assert nbd("--image-opts", "-r", "-k", tmp_path / "s", "driver=null-co,size=4096").status == 0
    assert (look["driver"], look["size"], look["writable"]) == ("null-co", 4096, False)


def test_warns_when_it_guesses(nbd: Nbd, image: Path, tmp_path: Path, look: dict[str, Any]) -> None:
    outcome = nbd("-k", tmp_path / "s", image)
    assert outcome.status == 0
    lines = outcome.stderr.splitlines()
    assert lines[0] == f"WARNING: Image format was not specified for '{image}' and probing guessed raw."
    assert all(line.startswith("         ") for line in lines[1:])


# -- life


def test_ends_with_its_last_client(spawn: Spawn, image: Path, tmp_path: Path) -> None:
    """One who only looked does not count."""
    daemon = spawn(argv("bh_nbd", ["-f", "raw", "-k", tmp_path / "s", image]), ready=tmp_path / "s")
    client = PlainClient(tmp_path / "s", "")
    client.write(0, b"hello")
    client.close()
    assert daemon.process.wait(SECONDS_MAX) == 0
    assert not (tmp_path / "s").exists()
    assert image.read_bytes()[:5] == b"hello"
    assert daemon.output() == ""


def test_persistent(spawn: Spawn, image: Path, tmp_path: Path) -> None:
    daemon = spawn(argv("bh_nbd", ["-t", "-f", "raw", "-k", tmp_path / "s", image]), ready=tmp_path / "s")
    for number in range(3):
        client = PlainClient(tmp_path / "s", "")
        assert client.wait(client.client.read(4096 * number, 1)) == bytes([number])
        client.close()
    assert daemon.process.poll() is None
    assert daemon.stop(signal.SIGTERM) == 0


def test_shared(spawn: Spawn, image: Path, tmp_path: Path) -> None:
    """Two at once; the third waits until one has left."""
    daemon = spawn(argv("bh_nbd", ["-e", "2", "-f", "raw", "-k", tmp_path / "s", image]), ready=tmp_path / "s")
    first, second = PlainClient(tmp_path / "s", ""), PlainClient(tmp_path / "s", "")
    with socket.socket(socket.AF_UNIX) as third:
        third.settimeout(SECONDS_MAX)
        third.connect(str(tmp_path / "s"))
        third.setblocking(False)
        first.wait(first.client.read(0, 1))
        with pytest.raises(BlockingIOError):
            third.recv(1)
        first.close()
        third.settimeout(SECONDS_MAX)
        assert third.recv(8) == b"NBDMAGIC"
    second.wait(second.client.read(0, 1))
    second.close()
    assert daemon.process.wait(SECONDS_MAX) == 0


def test_fork(command: Callable[..., Outcome], image: Path, tmp_path: Path) -> None:
    """Ready when the parent ends; paths may be relative; ends with its client."""
    words = ["--fork", "--pid-file=pid", "-f", "raw", "-k", tmp_path / "s", "disk.raw"]
    outcome = command("bh_nbd", words, cwd=tmp_path)
    assert (outcome.status, outcome.stderr) == (0, "")
    pid = int((tmp_path / "pid").read_text())
    try:
        PlainClient(tmp_path / "s", "").close()
        wait_for(lambda: not is_alive(pid), "its end")
        assert os.listdir(tmp_path) == ["disk.raw"]
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_fork_fails(command: Callable[..., Outcome], image: Path) -> None:
    outcome = command("bh_nbd", ["--fork", "-f", "raw", "-k", "/nope/s", image])
    assert outcome.status == 1
    assert outcome.stderr == "bh_nbd.py: Failed to bind socket to /nope/s: No such file or directory\n"


def test_list(spawn: Spawn, nbd: Nbd, image: Path, tmp_path: Path) -> None:
    words = ["-t", "-r", "-f", "raw", "-x", "hello", "-D", "a text", "-k", tmp_path / "s", image]
    daemon = spawn(argv("bh_nbd", words), ready=tmp_path / "s")
    outcome = nbd("-L", "-k", tmp_path / "s")
    assert outcome.status == 0 and outcome.stderr == ""
    assert outcome.stdout == (
        "exports available: 1\n"
        " export: 'hello'\n"
        "  description: a text\n"
        f"  size:  {MIB}\n"
        "  flags: 0x48f ( readonly flush fua df cache )\n"
        "  min block: 1\n"
        "  opt block: 4096\n"
        "  max block: 33554432\n"
        "  transaction size: 32-bit\n"
        "  available meta contexts: 1\n"
        "   base:allocation\n"
    )
    assert daemon.stop() == 0


def test_list_of_a_strange_server(nbd: Nbd, spawn: Spawn, tmp_path: Path) -> None:
    """One that does not speak NBD, and one that hangs up."""
    path = str(tmp_path / "s")
    for answer, text in ((b"HTTP/1.1 400 no\r\n\r\n", "bad first magic"), (b"", "closed the connection")):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            child = os.fork()
            if child == 0:
                listener.settimeout(SECONDS_MAX)
                try:
                    accepted, _ = listener.accept()
                    accepted.send(answer)
                    accepted.shutdown(socket.SHUT_WR)
                    accepted.settimeout(SECONDS_MAX)
                    accepted.recv(1)
                finally:
                    os._exit(0)
            try:
                assert text in refused(nbd("-L", "-k", path))
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        os.unlink(path)


def test_usage_error_is_one() -> None:
    with pytest.raises(UsageError):
        Settings([])
