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

import bottomhalf
from bottomhalf.qapi.schema import differences
from bottomhalf.tools import bh_nbd, bh_storage_daemon
from tests.peers.bitmap_conversations import IN_MEMORY, PERSISTENT
from tests.peers.conversations import CONTROL, GRAPH, QMP, SNAPSHOTS, spelled_out
from tests.peers.overlay_conversations import BACKING_NAMES, OLD_EXPORTS, OVERLAYS, TRANSACTIONS, lines_of

pytestmark = pytest.mark.peer

MIB = 1 << 20
SECONDS_MAX = 30
DELETED = "BLOCK_EXPORT_DELETED"
SILENCE_SECONDS = 0.02  # after an answer, for events behind it that QEMU sends in either order
OURS = {
    name: [sys.executable, "-m", f"bottomhalf.tools.{module}"]
    for name, module in (("qemu-storage-daemon", "bh_storage_daemon"), ("qemu-nbd", "bh_nbd"))
}


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
                while '"event": ' in answers[-1]:
                    answers.append(reader.line())
                removes = "block-export-del" in line or "nbd-server-remove" in line
                while removes and '"return"' in answers[-1] and not any(DELETED in each for each in answers):
                    answers.insert(0, reader.line())  # it always comes, however busy the machine is
                if any(word in line for word in ("-del", "-stop", "-remove")):
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
        if line.startswith(b"Formatting "):  # QEMU tells standard output of every image that it makes
            return self.line(seconds)
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
    answer = re.sub(r'"(vm-clock|date)-n?sec": \d+', "T", answer)
    return re.sub(r"#block\d+", "#block", answer)


def test_qmp(require: Callable[[str], str], tmp_path: Path) -> None:
    """Errors, order of members and elements, generated texts."""
    assert_same_answers([require("qemu-storage-daemon")], QMP, [], tmp_path)


def test_graph_changes(require: Callable[[str], str], tmp_path: Path) -> None:
    """What may be changed while it is in use, what not and why, and the graph and its permissions afterwards."""
    options = ["--object", "iothread,id=io0"]
    conversation = "\n".join(map(spelled_out, GRAPH.strip().splitlines()))
    assert_same_answers([require("qemu-storage-daemon")], conversation, options, tmp_path)


def test_snapshots(require: Callable[[str], str], tmp_path: Path) -> None:
    conversation = "\n".join(map(spelled_out, SNAPSHOTS.strip().splitlines()))
    assert_same_answers([require("qemu-storage-daemon")], conversation, [], tmp_path)


@pytest.mark.parametrize("conversation", [OVERLAYS, TRANSACTIONS, OLD_EXPORTS, BACKING_NAMES, IN_MEMORY, PERSISTENT])
def test_overlays_and_transactions(require: Callable[[str], str], tmp_path: Path, conversation: str) -> None:
    assert_same_answers([require("qemu-storage-daemon")], lines_of(conversation), [], tmp_path)


def assert_same_answers(command: list[str], conversation: str, options: list[str], tmp_path: Path) -> None:
    places = {"{dir}": "", "{image}": "/d.raw", "{d}": "/d.raw", "{e}": "/e.raw", "{q}": "/q.qcow2", "{r}": "/r.qcow2"}
    for mark, place in places.items():
        conversation = conversation.replace(mark, f"{tmp_path}{place}")
    lines = conversation.strip().splitlines()
    said = []
    for daemon in (command, OURS["qemu-storage-daemon"]):
        for name in ("d.raw", "e.raw"):
            (tmp_path / name).write_bytes(bytes(MIB))
        for name in ("q.qcow2", "r.qcow2"):
            bottomhalf.create(tmp_path / name, format="qcow2", size=MIB)
        said.append(converse([*daemon, *options], lines))
    theirs, ours = said
    different = [
        f"{line}\n  QEMU  {them}\n  ours  {us}"
        for (line, them), (_, us) in zip(theirs, ours, strict=True)
        if [normal(each) for each in them] != [normal(each) for each in us]
    ]
    assert not different, "\n".join(different)


def sorted_lists(answer: str) -> str:
    message = json.loads(answer) if answer.startswith("{") else {}
    if isinstance(message.get("return"), list):
        message["return"].sort(key=json.dumps)
        return json.dumps(message)
    return answer


def test_control_plane(require: Callable[[str], str], tmp_path: Path) -> None:
    """Objects, character devices, out-of-band execution."""
    daemon = require("qemu-storage-daemon")
    (tmp_path / "d.raw").write_bytes(bytes(MIB))
    lines = CONTROL.strip().replace("{dir}", str(tmp_path)).replace("{image}", f"{tmp_path}/d.raw").splitlines()
    theirs = converse([daemon], lines)
    (tmp_path / "d.raw").write_bytes(bytes(MIB))
    ours = converse(OURS["qemu-storage-daemon"], lines)
    different = [
        f"{line}\n  QEMU  {them}\n  ours  {us}"
        for (line, them), (_, us) in zip(theirs, ours, strict=True)
        if [normal(sorted_lists(each)) for each in them] != [normal(sorted_lists(each)) for each in us]
    ]
    assert not different, "\n".join(different)


OURS_ALONE = {"human-monitor-command", "x-explain"}  # of the system emulator; of nobody


def test_schema(require: Callable[[str], str]) -> None:
    """Every command and event that we have is QEMU's, member by member, as a client sees them."""
    lines = ['{"execute": "qmp_capabilities"}', '{"execute": "query-qmp-schema"}', '{"execute": "quit"}']
    theirs, ours = (
        json.loads(converse(command, lines)[2][1][0])["return"]
        for command in ([require("qemu-storage-daemon")], OURS["qemu-storage-daemon"])
    )
    names = {entity["name"] for entity in ours if entity["meta-type"] == "command"}
    assert names >= OURS_ALONE
    found = [each for each in differences(ours, theirs) if each.partition(":")[0] not in OURS_ALONE]
    assert not found, "\n".join(found)


def test_the_table_of_what_is_not_there(require: Callable[[str], str]) -> None:
    """docs/qapi-and-qmp.md names every command that QEMU's daemon has and ours has not, and no other."""
    lines = ['{"execute": "qmp_capabilities"}', '{"execute": "query-commands"}', '{"execute": "quit"}']
    theirs, ours = (
        {each["name"] for each in json.loads(converse(command, lines)[2][1][0])["return"]}
        for command in ([require("qemu-storage-daemon")], OURS["qemu-storage-daemon"])
    )
    page = (Path(__file__).parents[2] / "docs" / "qapi-and-qmp.md").read_text()
    counts = re.search(r"Of the (\d+) commands of QEMU's storage daemon (\d+) are there", page)
    assert counts is not None and counts.groups() == (str(len(theirs)), str(len(theirs & ours)))
    table = page[counts.end() :].partition("\n\n")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(theirs - ours)
    assert ours - theirs == OURS_ALONE


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
        "--chardev null,id=a --chardev null,id=a",
        "--chardev file,id=a",
        "--chardev file,id=a,path=/nope/x",
        "--chardev pipe,id=a,path=/nope/x",
        "--chardev ringbuf,id=a,size=1000",
        "--chardev socket,id=a,path=/nope/x,reconnect=1,server=on",
        "--object secret,id=a",
        "--object secret,id=a,file=/nope/x",
        "--object main-loop,id=a,thread-pool-max=0",
        "--object main-loop,id=a --object main-loop,id=b",
        "--object authz-list,id=a,policy=x",
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
