# SPDX-License-Identifier: Apache-2.0
"""The same words to QEMU's tools and to ours: the same answers, to the byte, where users compare them as text."""

from __future__ import annotations

import gc
import io
import json
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

import pytest

from bottomhalf.tools import bh_nbd, bh_storage_daemon

pytestmark = pytest.mark.peer

MIB = 1 << 20
SECONDS_MAX = 30
SILENCE_SECONDS = 0.02  # after an answer, for events behind it that QEMU sends in either order
OURS = {
    name: [sys.executable, "-m", f"bottomhalf.tools.{module}"]
    for name, module in (("qemu-storage-daemon", "bh_storage_daemon"), ("qemu-nbd", "bh_nbd"))
}

# A conversation: each line is answered before the next is sent. {dir} and {image} are the test's.
QMP = r"""
{"execute": "query-version"}
{"execute": "qmp_capabilities", "arguments": {"enable": "foo"}}
{"execute": "qmp_capabilities", "arguments": {"x": 1}}
{"execute": "qmp_capabilities", "arguments": {"enable": ["foo"]}}
{"execute": "qmp_capabilities"}
{"execute": "qmp_capabilities", "id": 1}
{"execute": "foo"}
{"execute": "foo", "id": {"a": [1, null, "x"]}}
[1]
{"id": 3}
{"execute": 1}
{"execute": "query-block-exports", "arguments": 1}
{"execute": "query-block-exports", "arguments": {"a": 1}}
{"execute": "query-block-exports", "foo": 1}
{"execute": "query-block-exports",}
xyz
{"exec-oob": "query-block-exports"}
{"execute": "query-block-exports"}
{"execute": "query-named-block-nodes"}
{"execute": "blockdev-add", "arguments": {"driver": "null-co"}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "a", "size": 1048576}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "a"}}
{"execute": "blockdev-add", "arguments": {"driver": "nope", "node-name": "b"}}
{"execute": "blockdev-add", "arguments": {"node-name": "b"}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b"}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b", "filename": "/nope/x"}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b", "filename": 1}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b", "filename": "x", "locking": "maybe"}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "c", "filename": "{image}"}}
{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "d", "file": "nope"}}
{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "d", "file": "c", "offset": 99999999}}
{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "d", "file": "c", "size": 513}}
{"execute": "query-named-block-nodes", "arguments": {"flat": true}}
{"execute": "blockdev-del", "arguments": {}}
{"execute": "blockdev-del", "arguments": {"node-name": "zz"}}
{"execute": "nbd-server-stop"}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a"}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "/nope/x"}}}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix"}}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "nope", "data": {}}}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "{dir}/t"}}}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "1", "node-name": "a"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "zz"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "c"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "f", "node-name": "a"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "f", "node-name": "c", "iothread": "zz"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "f", "node-name": "c", "name": "x"}}
{"execute": "block-export-add", "arguments": {"type": "nope", "id": "g", "node-name": "a"}}
{"execute": "query-block-exports"}
{"execute": "block-export-del", "arguments": {"id": "nope"}}
{"execute": "block-export-del", "arguments": {"id": "e", "mode": "foo"}}
{"execute": "block-export-del", "arguments": {"id": "e"}}
{"execute": "query-block-exports"}
{"execute": "block-export-del", "arguments": {"id": "e"}}
{"execute": "nbd-server-stop"}
{"execute": "blockdev-del", "arguments": {"node-name": "a"}}
{"execute": "blockdev-del", "arguments": {"node-name": "c"}}
{"execute": "query-named-block-nodes"}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "r", "filename": "{image}", "read-only": true}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "r", "node-name": "r", "writable": true}}
{"execute": "quit"}
"""

# The same, about changes of the graph: a command and its arguments on each line, "reopen" is blockdev-reopen of one
# node. {d} and {e} are images.
GRAPH = r"""
qmp_capabilities
blockdev-add {"driver": "file", "node-name": "f", "filename": "{d}"}
blockdev-add {"driver": "file", "node-name": "g", "filename": "{e}", "read-only": true}
blockdev-add {"driver": "raw", "node-name": "r", "file": "f"}
blockdev-add {"driver": "raw", "node-name": "i", "file": {"driver": "file", "filename": "{e}"}}
blockdev-add {"driver": "null-co", "node-name": "n", "size": 1048576}
query-block
x-debug-query-block-graph
x-blockdev-change {"parent": "nope", "node": "f"}
x-blockdev-change {"parent": "r"}
x-blockdev-change {"parent": "r", "child": "file", "node": "f"}
x-blockdev-change {"parent": "r", "child": "nope"}
x-blockdev-change {"parent": "r", "child": "file"}
x-blockdev-change {"parent": "r", "node": "nope"}
x-blockdev-change {"parent": "r", "node": "g"}
x-blockdev-set-iothread {"node-name": "nope", "iothread": null}
x-blockdev-set-iothread {"node-name": "r", "iothread": "nope"}
x-blockdev-set-iothread {"node-name": "r", "iothread": 1}
x-blockdev-set-iothread {"node-name": "r", "iothread": "io0"}
x-blockdev-set-iothread {"node-name": "r", "iothread": null}
nbd-server-start {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}
block-export-add {"type": "nbd", "id": "e", "node-name": "r", "writable": true}
x-blockdev-set-iothread {"node-name": "r", "iothread": "io0"}
x-blockdev-set-iothread {"node-name": "f", "iothread": "io0"}
x-blockdev-set-iothread {"node-name": "r", "iothread": null, "force": true}
block-export-add {"type": "nbd", "id": "n", "node-name": "n", "iothread": "io0", "fixed-iothread": true}
x-blockdev-set-iothread {"node-name": "n", "iothread": null, "force": true}
block-export-del {"id": "n"}
x-debug-query-block-graph
reopen {"driver": "raw", "file": "f"}
reopen {"driver": "raw", "node-name": "nope", "file": "f"}
reopen {"driver": "file", "node-name": "r", "filename": "a"}
reopen {"driver": "raw", "node-name": "r", "file": "f", "read-only": true}
reopen {"driver": "file", "node-name": "f", "filename": "{d}", "read-only": true}
reopen {"driver": "file", "node-name": "f", "filename": "c"}
reopen {"driver": "raw", "node-name": "r", "file": "g"}
reopen {"driver": "raw", "node-name": "r", "file": "n"}
x-debug-query-block-graph
reopen {"driver": "raw", "node-name": "r", "file": "f"}
reopen {"driver": "raw", "node-name": "r", "file": "r"}
reopen {"driver": "raw", "node-name": "r", "file": "nope"}
reopen {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "a"}}
reopen {"driver": "raw", "node-name": "r", "file": "f", "offset": 512}
reopen {"driver": "raw", "node-name": "r", "file": "f", "size": 4096}
reopen {"driver": "raw", "node-name": "i", "file": {"driver": "file", "filename": "{e}"}, "read-only": true}
reopen {"driver": "raw", "node-name": "i", "file": {"driver": "file", "filename": "c"}}
query-named-block-nodes
reopen {"driver": "null-co", "node-name": "n", "size": 2048}
reopen {"driver": "null-co", "node-name": "n", "size": 1048576, "read-zeroes": true}
reopen {"driver": "null-co", "node-name": "n"}
reopen {"driver": "null-co", "node-name": "n", "size": 1048576, "read-only": true}
blockdev-snapshot {"node": "n", "overlay": "nope"}
blockdev-snapshot {"node": "nope", "overlay": "n"}
blockdev-snapshot {"node": "n", "overlay": "i"}
blockdev-snapshot {"node": "n", "overlay": "r"}
block_resize {"node-name": "n", "size": 512}
block_resize {"node-name": "i", "size": -1}
block_resize {"size": 0}
block_resize {"device": "nope", "size": 0}
block_resize {"device": "i", "size": 524288}
block-export-del {"id": "e"}
reopen {"driver": "raw", "node-name": "r", "file": "f"}
block_resize {"node-name": "r", "size": 524288}
query-named-block-nodes
quit
"""


def spelled_out(line: str) -> str:
    """A line of GRAPH as QMP wants it."""
    name, _, arguments = line.partition(" ")
    if name == "reopen":
        name, arguments = "blockdev-reopen", f'{{"options": [{arguments}]}}'
    return f'{{"execute": "{name}", "arguments": {arguments or "{}"}}}'


def converse(command: Sequence[str], lines: list[str]) -> list[tuple[str, list[str]]]:
    """What each line brought, in any order."""
    with subprocess.Popen(
        [*command, "--chardev", "stdio,id=m", "--monitor", "m"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    ) as daemon:
        assert daemon.stdin is not None and daemon.stdout is not None
        reader = Lines(daemon.stdout)
        try:
            said = [("greeting", [reader.line()])]
            for line in lines:
                daemon.stdin.write(line.encode() + b"\n")
                answers = [reader.line()]
                while '"event"' in answers[-1]:
                    answers.append(reader.line())
                if "-del" in line or "-stop" in line:
                    answers += reader.rest()
                said.append((line, sorted(answers)))
            daemon.stdin.close()
            assert daemon.wait(SECONDS_MAX) == 0
            return said
        finally:
            daemon.kill()


class Lines:
    """Lines of a pipe, with a bound on how long to wait for one."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)

    def line(self, seconds: float = SECONDS_MAX) -> str:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not self._selector.select(max(deadline - time.monotonic(), 0)):
                raise TimeoutError
            data = self._pipe.read(65536)
            if not data:
                return ""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def rest(self) -> list[str]:
        lines = []
        try:
            while line := self.line(SILENCE_SECONDS):
                lines.append(line)
        except TimeoutError:
            pass
        return lines


def normal(answer: str) -> str:
    """Without what may differ: time, generated numbers."""
    answer = re.sub(r'"(micro)?seconds": \d+', "T", answer)
    answer = re.sub(r'"package": "[^"]*"', "P", answer)
    answer = re.sub(r'"capabilities": \[[^]]*\]', "C", answer)  # ours has no out-of-band commands
    return re.sub(r"#block\d+", "#block", answer)


def test_qmp(require: Callable[[str], str], tmp_path: Path) -> None:
    """Errors, order of members and elements, generated texts."""
    assert_same_answers([require("qemu-storage-daemon")], QMP, [], tmp_path)


def test_graph_changes(require: Callable[[str], str], tmp_path: Path) -> None:
    """What may be changed while it is in use, what not and why, and the graph and its permissions afterwards."""
    options = ["--object", "iothread,id=io0"]
    conversation = "\n".join(map(spelled_out, GRAPH.strip().splitlines()))
    assert_same_answers([require("qemu-storage-daemon")], conversation, options, tmp_path)


def assert_same_answers(command: list[str], conversation: str, options: list[str], tmp_path: Path) -> None:
    places = {"{dir}": "", "{image}": "/d.raw", "{d}": "/d.raw", "{e}": "/e.raw"}
    for mark, place in places.items():
        conversation = conversation.replace(mark, f"{tmp_path}{place}")
    lines = conversation.strip().splitlines()
    said = []
    for daemon in (command, OURS["qemu-storage-daemon"]):
        for name in ("d.raw", "e.raw"):
            (tmp_path / name).write_bytes(bytes(MIB))
        said.append(converse([*daemon, *options], lines))
    theirs, ours = said
    different = [
        f"{line}\n  QEMU  {them}\n  ours  {us}"
        for (line, them), (_, us) in zip(theirs, ours, strict=True)
        if [normal(each) for each in them] != [normal(each) for each in us]
    ]
    assert not different, "\n".join(different)


def compare(
    require: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    main: Callable[[list[str]], int],
    words: list[str],
    cwd: Path,
) -> None:
    """Status and messages of a command line that is refused. Ours may add advice on lines of its own."""
    theirs = subprocess.run(
        [name, *words], executable=require(name), capture_output=True, text=True, timeout=SECONDS_MAX, cwd=cwd
    )
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [name])
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        main(words)
    gc.enable()
    assert (ended.value.code, stdout.getvalue()) == (theirs.returncode, "")
    expected, got = theirs.stderr.splitlines(), stderr.getvalue().splitlines()
    assert got[:1] == expected[:1]
    assert all(line in got for line in expected if not line.startswith(f"{name}: Try ")), got


@pytest.mark.parametrize(
    "words",
    [
        "--foo",
        "--foo=1",
        "-x",
        "--blockdev",
        "--daemonize=1",
        "foo",
        "--blockdev nope foo",
        "foo --blockdev nope",
        "--blockdev=nope",
        "--blo nope",
        "--blockdev null-co",
        "--blockdev null-co,node-name=a --blockdev null-co,node-name=a",
        "--blockdev null-co,node-name=1a",
        "--blockdev null-co,node-name=a,x=1",
        "--blockdev null-co,node-name=a,size=1M",
        "--blockdev null-co,,x",
        "--blockdev file,node-name=a,filename=/nope/x",
        '--blockdev {"driver":',
        "--export nbd,id=a,node-name=b",
        "--blockdev null-co,node-name=a --export nbd,id=a,node-name=a",
        "--nbd-server addr.type=unix,addr.path=/nope/x",
        "--nbd-server addr.type=inet,addr.host=192.0.2.1,addr.port=1",
        "--nbd-server addr.type=inet,addr.host=nohost.invalid,addr.port=1",
        "--nbd-server addr.type=unix",
        "--monitor foo",
        "--monitor chardev=x,mode=readline",
        "--chardev foo,id=a",
        "--chardev stdio,id=1a",
        "--chardev stdio,id=a --chardev stdio,id=b",
        "--chardev stdio,id=a --monitor a --monitor a",
        "--chardev stdio,id=a --monitor a,mode=readline",
        "--chardev socket,id=a,path=/nope/x",
        "--chardev socket,id=a,path=/nope/x,server=on",
        "--chardev socket,id=a,path=/nope/x,wait=on",
        "--object foo",
        "--object iothread",
        "--object iothread,id=1a",
        "--object iothread,id=a,poll-max-ns=-1",
        "--object iothread,id=a --object iothread,id=a",
        "--pidfile /nope/x",
    ],
)
def test_storage_daemon_errors(
    require: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str
) -> None:
    compare(require, monkeypatch, "qemu-storage-daemon", bh_storage_daemon.main, words.split(" "), tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "a b",
        "-e x d.raw",
        "-e -1 d.raw",
        "-e 5000000000 d.raw",
        "-o 2M d.raw",
        "-o 08 d.raw",
        "--handshake-limit=x d.raw",
        "--cache=foo d.raw",
        "-n --cache=none d.raw",
        "--aio=foo d.raw",
        "--aio=native --aio=native d.raw",
        "--discard=foo d.raw",
        "--detect-zeroes=foo d.raw",
        "--detect-zeroes=unmap d.raw",
        "-k s d.raw",
        "-L a",
        "-L -f raw",
        "-L -k /nope/x",
        "-L -b 127.0.0.1 -p 1",
        "--image-opts -f raw driver=null-co",
        "-f raw -k /nope/x d.raw",
        "-k {dir}/s -f nope d.raw",
        "-k {dir}/s -f raw nope",
        "-k {dir}/s -f raw --aio=native d.raw",
        "-k {dir}/s -f raw -o 1048577 d.raw",
        "-k {dir}/s -f raw --pid-file=/nope/x d.raw",
        "--object nope,id=a d.raw",
        "--object iothread,id=a,x=1 d.raw",
    ],
)
def test_nbd_errors(
    require: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str
) -> None:
    (tmp_path / "d.raw").write_bytes(bytes(MIB))
    given = words.replace("{dir}", str(tmp_path)).split(" ") if words else []
    compare(require, monkeypatch, "qemu-nbd", bh_nbd.main, given, tmp_path)


@pytest.mark.parametrize(
    "words", [["-x", "hello", "-D", "a text"], ["-r"], ["-e", "5"], ["-o", "512"], ["--discard=unmap"]]
)
def test_list(spawn: Callable[..., object], require: Callable[[str], str], tmp_path: Path, words: list[str]) -> None:
    """Both list both servers alike, and the servers differ only in what they negotiate beyond our protocol."""
    qemu_nbd = require("qemu-nbd")
    (tmp_path / "d.raw").write_bytes(bytes(MIB))
    listings = []
    for name, server in (("theirs", [qemu_nbd]), ("ours", OURS["qemu-nbd"])):
        path = tmp_path / name
        spawn([*server, "-t", "-f", "raw", "-k", path, *words, tmp_path / "d.raw"], ready=path)
        for client in ([qemu_nbd], OURS["qemu-nbd"]):
            command = [*client, "-L", "-k", str(path)]
            listing = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=True).stdout
            listings.append(without_extended_headers(listing))
    assert listings[1:] == listings[:-1]


def without_extended_headers(listing: str) -> str:
    def flags(found: re.Match[str]) -> str:
        return f"flags: {int(found[1], 16) & ~0x1000:#x} ("

    listing = re.sub(r"flags: (0x[0-9a-f]+) \(", flags, listing)
    return listing.replace(" block-status-payload", "").replace("64-bit", "32-bit")


def test_member_order_of_a_greeting(require: Callable[[str], str]) -> None:
    """The order is that of QEMU's hash table: the same, though the values differ."""
    greetings = [
        json.loads(converse(command, ['{"execute": "qmp_capabilities"}', '{"execute": "quit"}'])[0][1][0])
        for command in ([require("qemu-storage-daemon")], OURS["qemu-storage-daemon"])
    ]
    orders = [list(greeting["QMP"]) + list(greeting["QMP"]["version"]) for greeting in greetings]
    assert orders[0] == orders[1]
