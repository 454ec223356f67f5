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

from bottomhalf.qapi.schema import differences
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


# The same for objects, devices and out-of-band execution; lists whose order is that of a hash table are sorted.
CONTROL = r"""
{"exec-oob": "query-version", "id": 7}
{"exec-oob": "qmp_capabilities"}
{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
{"exec-oob": "query-version", "id": 7}
{"exec-oob": "nope", "id": 7}
{"exec-oob": "query-version"}
{"exec-oob": "query-version", "execute": "query-version"}
{"exec-oob": 1}
{"exec-oob": "qmp_capabilities"}
{"exec-oob": "query-version", "x": 1}
{"exec-oob": "query-version", "arguments": {"x": 1}}
{"execute": "qom-list", "arguments": {"path": "/"}}
{"execute": "qom-list", "arguments": {"path": "/objects"}}
{"execute": "qom-list", "arguments": {"path": "/chardevs"}}
{"execute": "qom-list", "arguments": {"path": "nope"}}
{"execute": "qom-list", "arguments": {"path": ""}}
{"execute": "qom-list", "arguments": {"path": "/machine"}}
{"execute": "qom-list", "arguments": {"path": "m"}}
{"execute": "qom-list-types", "arguments": {"implements": "nope"}}
{"execute": "qom-list-types", "arguments": {"implements": "event-loop-base"}}
{"execute": "qom-list-types", "arguments": {"implements": "event-loop-base", "abstract": true}}
{"execute": "qom-list-types", "arguments": {"implements": "authz-list"}}
{"execute": "qom-list-properties", "arguments": {"typename": "iothread"}}
{"execute": "qom-list-properties", "arguments": {"typename": "secret"}}
{"execute": "qom-list-properties", "arguments": {"typename": "main-loop"}}
{"execute": "qom-list-properties", "arguments": {"typename": "authz-list"}}
{"execute": "qom-list-properties", "arguments": {"typename": "container"}}
{"execute": "qom-list-properties", "arguments": {"typename": "chardev-socket"}}
{"execute": "qom-list-properties", "arguments": {"typename": "event-loop-base"}}
{"execute": "qom-list-properties", "arguments": {"typename": "user-creatable"}}
{"execute": "qom-list-properties", "arguments": {"typename": "nope"}}
{"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io0"}}
{"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io0"}}
{"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "1x"}}
{"execute": "object-add", "arguments": {"qom-type": "nope", "id": "x"}}
{"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io1", "poll-max-ns": -1}}
{"execute":"object-add","arguments":{"qom-type":"iothread","id":"io1","thread-pool-min":5,"thread-pool-max":2}}
{"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io1", "x": 2}}
{"execute": "qom-list", "arguments": {"path": "/objects"}}
{"execute": "qom-list", "arguments": {"path": "/objects/io0"}}
{"execute": "qom-list", "arguments": {"path": "io0"}}
{"execute": "qom-list", "arguments": {"path": "//objects//io0/"}}
{"execute": "qom-get", "arguments": {"path": "io0", "property": "poll-max-ns"}}
{"execute": "qom-get", "arguments": {"path": "io0", "property": "nope"}}
{"execute": "qom-get", "arguments": {"path": "io0", "property": "type"}}
{"execute": "qom-get", "arguments": {"path": "/", "property": "objects"}}
{"execute": "qom-get", "arguments": {"path": "/objects", "property": "io0"}}
{"execute": "qom-get", "arguments": {"path": "zz", "property": "nope"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns", "value": 5}}
{"execute": "qom-get", "arguments": {"path": "io0", "property": "poll-max-ns"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns", "value": "5"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns", "value": -5}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns", "value": 1.5}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns", "value": 18446744073709551615}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "type", "value": "x"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "nope", "value": "x"}}
{"execute": "qom-set", "arguments": {"path": "/objects", "property": "io0", "value": "x"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "thread-pool-max", "value": 1}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "thread-pool-min", "value": 2}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "thread-pool-max", "value": 0}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "aio-max-batch", "value": -1}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0", "data": "abc", "file": "x"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0", "file": "/nope"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0", "data": "abc"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s1", "data": "!!", "format": "base64"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s1", "data": "YWI=", "format": "base64"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s2", "data": "YWI=", "keyid": "zz", "iv": "YWI="}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s2", "data": "YWI=", "keyid": "s0"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s2", "data": "YWI=", "keyid": "io0"}}
{"execute": "qom-list", "arguments": {"path": "s0"}}
{"execute": "qom-get", "arguments": {"path": "s0", "property": "format"}}
{"execute": "qom-get", "arguments": {"path": "s0", "property": "keyid"}}
{"execute": "qom-set", "arguments": {"path": "s0", "property": "data", "value": "xyz"}}
{"execute": "qom-set", "arguments": {"path": "s0", "property": "format", "value": "xyz"}}
{"execute": "qom-set", "arguments": {"path": "s0", "property": "format", "value": 1}}
{"execute": "object-add", "arguments": {"qom-type": "authz-list", "id": "a0"}}
{"execute": "object-add", "arguments": {"qom-type": "authz-list", "id": "a2", "policy": "x"}}
{"execute": "qom-get", "arguments": {"path": "a0", "property": "rules"}}
{"execute": "qom-get", "arguments": {"path": "a0", "property": "policy"}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "rules", "value": [{"match": "fred"}]}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "rules", "value": [{"match": 1, "policy": "allow"}]}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "rules", "value": [{"match": "f", "policy": "maybe"}]}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "rules", "value": 1}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "rules", "value": [{"match": "f", "policy": "allow"}]}}
{"execute": "qom-get", "arguments": {"path": "a0", "property": "rules"}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "policy", "value": "zz"}}
{"execute": "object-add", "arguments": {"qom-type": "main-loop", "id": "ml"}}
{"execute": "object-add", "arguments": {"qom-type": "main-loop", "id": "ml2"}}
{"execute": "qom-list", "arguments": {"path": "ml"}}
{"execute": "object-del", "arguments": {"id": "ml"}}
{"execute": "object-del", "arguments": {"id": "nope"}}
{"execute": "object-del", "arguments": {"id": "io0"}}
{"execute": "object-del", "arguments": {"id": "s0"}}
{"execute": "qom-list", "arguments": {"path": "/objects"}}
{"execute": "chardev-add", "arguments": {"id": "n", "backend": {"type": "null", "data": {}}}}
{"execute": "chardev-add", "arguments": {"id": "n", "backend": {"type": "null", "data": {}}}}
{"execute": "chardev-add", "arguments": {"id": "f", "backend": {"type": "file", "data": {"out": "{dir}/f"}}}}
{"execute": "chardev-add", "arguments": {"id": "f2", "backend": {"type": "file", "data": {"out": "/nope/f"}}}}
{"execute":"chardev-add","arguments":{"id":"f2","backend":{"type":"file","data":{"out":"{dir}/f","in":"/nope/x"}}}}
{"execute": "chardev-add", "arguments": {"id": "p", "backend": {"type": "pipe", "data": {"device": "/nope/p"}}}}
{"execute": "chardev-add", "arguments": {"id": "r", "backend": {"type": "ringbuf", "data": {"size": 1000}}}}
{"execute": "chardev-add", "arguments": {"id": "r", "backend": {"type": "ringbuf", "data": {"size": 16}}}}
{"execute": "chardev-add", "arguments": {"id": "mem", "backend": {"type": "memory", "data": {}}}}
{"execute": "chardev-add", "arguments": {"id": "mux", "backend": {"type": "mux", "data": {"chardev": "zz"}}}}
{"execute": "chardev-add", "arguments": {"id": "mux", "backend": {"type": "mux", "data": {"chardev": "r"}}}}
{"execute":"chardev-add","arguments":{"id":"s","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"{dir}/c"}}}}}}
{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/nope/s"}},"server":false}}}}
{"execute": "chardev-add", "arguments": {"id": "x", "backend": {"type": "nope", "data": {}}}}
{"execute": "chardev-add", "arguments": {"id": "x", "backend": {"type": "stdio", "data": {}}}}
{"execute": "query-chardev"}
{"execute": "ringbuf-write", "arguments": {"device": "r", "data": "hello"}}
{"execute": "ringbuf-read", "arguments": {"device": "r", "size": 1000}}
{"execute": "ringbuf-read", "arguments": {"device": "r", "size": 1000}}
{"execute": "ringbuf-write", "arguments": {"device": "r", "data": "0123456789abcdefghij"}}
{"execute": "ringbuf-read", "arguments": {"device": "r", "size": 1000}}
{"execute": "ringbuf-write", "arguments": {"device": "mem", "data": "hello"}}
{"execute": "ringbuf-write", "arguments": {"device": "mem", "data": "AAEC/w==", "format": "base64"}}
{"execute": "ringbuf-read", "arguments": {"device": "mem", "size": 7, "format": "base64"}}
{"execute": "ringbuf-read", "arguments": {"device": "mem", "size": 7, "format": "base64"}}
{"execute": "ringbuf-read", "arguments": {"device": "mem", "size": 0}}
{"execute": "ringbuf-read", "arguments": {"device": "n", "size": 1}}
{"execute": "ringbuf-read", "arguments": {"device": "zz", "size": 1}}
{"execute": "ringbuf-write", "arguments": {"device": "mem", "data": "!", "format": "base64"}}
{"execute": "chardev-change", "arguments": {"id": "zz", "backend": {"type": "null", "data": {}}}}
{"execute": "chardev-change", "arguments": {"id": "n", "backend": {"type": "ringbuf", "data": {}}}}
{"execute": "chardev-change", "arguments": {"id": "m", "backend": {"type": "null", "data": {}}}}
{"execute": "chardev-change", "arguments": {"id": "mux", "backend": {"type": "null", "data": {}}}}
{"execute": "chardev-remove", "arguments": {"id": "zz"}}
{"execute": "chardev-remove", "arguments": {"id": "m"}}
{"execute": "chardev-remove", "arguments": {"id": "r"}}
{"execute": "chardev-remove", "arguments": {"id": "mux"}}
{"execute": "chardev-remove", "arguments": {"id": "r"}}
{"execute": "chardev-send-break", "arguments": {"id": "n"}}
{"execute": "chardev-send-break", "arguments": {"id": "zz"}}
{"execute": "qom-list", "arguments": {"path": "/chardevs"}}
{"execute": "qom-get", "arguments": {"path": "s", "property": "addr"}}
{"execute": "qom-get", "arguments": {"path": "s", "property": "connected"}}
{"execute": "query-chardev"}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "d", "filename": "{image}"}}
{"execute": "block_resize", "arguments": {"node-name": "d", "size": 2097152}}
{"execute": "block_resize", "arguments": {"node-name": "d", "size": -1}}
{"execute": "block_resize", "arguments": {"node-name": "zz", "size": 1}}
{"execute": "block_resize", "arguments": {"device": "zz", "size": 1}}
{"execute": "block_resize", "arguments": {"size": 1}}
{"execute": "block_resize", "arguments": {"device": "d", "size": 1048576}}
{"execute": "block_resize", "arguments": {"device": "d", "node-name": "d", "size": 1048576}}
{"execute": "query-named-block-nodes"}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "null"}}
{"execute": "block_resize", "arguments": {"node-name": "null", "size": 1}}
{"execute": "quit"}
"""


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
    return re.sub(r"#block\d+", "#block", answer)


def test_qmp(require: Callable[[str], str], tmp_path: Path) -> None:
    """Errors, order of members and elements, generated texts."""
    daemon = require("qemu-storage-daemon")
    (tmp_path / "d.raw").write_bytes(bytes(MIB))
    lines = QMP.strip().replace("{dir}", str(tmp_path)).replace("{image}", f"{tmp_path}/d.raw").splitlines()
    theirs = converse([daemon], lines)
    ours = converse(OURS["qemu-storage-daemon"], lines)
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
