# SPDX-License-Identifier: Apache-2.0
"""query-blockstats of QEMU's daemon and of ours while one and the same client reads and writes: the same text."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import bottomhalf
from tests.peers.overlay_conversations import lines_of
from tests.peers.test_same_as_qemu import MIB, OURS, SECONDS_MAX, Lines, assert_same_answers, normal

pytestmark = pytest.mark.peer

# Which nodes are listed in which order, and which node of each is called its parent.
SHAPES = r"""
qmp_capabilities
query-blockstats
query-blockstats {"query-nodes": true}
blockdev-add {"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "node-name": "of", "filename": "{q}"}, \
    "backing": {"driver": "qcow2", "node-name": "b", "file": {"driver": "file", "filename": "{r}"}}}
blockdev-add {"driver": "copy-on-read", "node-name": "c", "file": \
    {"driver": "raw", "node-name": "r", "file": {"driver": "null-co", "node-name": "n0"}}}
blockdev-add {"driver": "blkverify", "node-name": "v", "test": {"driver": "raw", "file": {"driver": "null-co"}}, \
    "raw": {"driver": "null-co", "node-name": "n1"}}
blockdev-add {"driver": "file", "node-name": "f", "filename": "{d}", "discard": "unmap"}
query-blockstats
query-blockstats {"query-nodes": false}
query-blockstats {"query-nodes": true}
query-blockstats {"query-nodes": null}
query-blockstats {"query-nodes": 1}
query-blockstats {"nodes": true}
quit
"""

NODES = r"""
qmp_capabilities
blockdev-add {"driver": "file", "node-name": "f", "filename": "{dir}/d.raw", "discard": "unmap"}
blockdev-add {"driver": "raw", "node-name": "r", "file": "f", "offset": 65536, "size": 524288, "discard": "unmap"}
blockdev-add {"driver": "qcow2", "node-name": "q", "discard": "unmap", "file": \
    {"driver": "file", "node-name": "qf", "filename": "{dir}/q.qcow2", "discard": "unmap"}}
blockdev-add {"driver": "copy-on-read", "node-name": "c", "file": "q"}
blockdev-add {"driver": "file", "node-name": "e", "filename": "{dir}/e.raw"}
nbd-server-start {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}
block-export-add {"type": "nbd", "id": "r", "node-name": "r", "writable": true}
block-export-add {"type": "nbd", "id": "c", "node-name": "c", "writable": true}
block-export-add {"type": "nbd", "id": "e", "node-name": "e", "writable": true}
"""

# What the client does, with what, one after the other; the numbers are compared after each.
CLIENT = [
    ("r", "read 0 64k"),
    ("r", "write 4096 4096"),
    ("r", "write 0 512"),
    ("r", "write -z 16384 4096"),
    ("r", "write -zu 32768 4096"),
    ("r", "discard 64k 64k"),
    ("r", "discard 0 100"),
    ("r", "flush"),
    ("e", "discard 64k 64k"),
    ("e", "write -zu 64k 64k"),
    ("e", "write 524287 1"),
    ("c", "write 4096 4096"),
    ("c", "write 128k 64k"),
    ("c", "write 133072 1"),
    ("c", "write -z 256k 64k"),
    ("c", "discard 128k 64k"),
    ("c", "write 512k 64k"),
    ("c", "write 512k 64k"),
]


def test_shapes(require: Callable[[str], str], tmp_path: Path) -> None:
    assert_same_answers([require("qemu-storage-daemon")], lines_of(SHAPES), [], tmp_path)


def test_numbers(require: Callable[[str], str], tmp_path: Path) -> None:
    qemu_io = require("qemu-io")
    theirs = numbers([require("qemu-storage-daemon")], qemu_io, tmp_path)
    ours = numbers(OURS["qemu-storage-daemon"], qemu_io, tmp_path)
    different = [
        f"{what}\n  QEMU  {them}\n  ours  {us}"
        for what, them, us in zip(["nothing", *CLIENT], theirs, ours, strict=True)
        if them != us
    ]
    assert not different, "\n".join(different)
    assert theirs[0] != theirs[-1]


def numbers(command: list[str], qemu_io: str, tmp_path: Path) -> list[str]:
    """The answer before the first act of the client, and after each."""
    for name in ("d.raw", "e.raw"):
        (tmp_path / name).write_bytes(bytes(MIB))
    bottomhalf.create(tmp_path / "q.qcow2", format="qcow2", size=MIB)
    with subprocess.Popen(
        [*command, "--chardev", "stdio,id=m", "--monitor", "m"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as daemon:
        assert daemon.stdin is not None and daemon.stdout is not None
        reader = Lines(daemon.stdout)

        def ask(line: str) -> str:
            assert daemon.stdin is not None
            daemon.stdin.write(line.encode() + b"\n")
            answer = reader.line()
            while "event" in json.loads(answer):
                answer = reader.line()
            return answer

        try:
            reader.line()
            for line in lines_of(NODES).replace("{dir}", str(tmp_path)).splitlines():
                assert "return" in json.loads(ask(line)), line
            query = '{"execute": "query-blockstats", "arguments": {"query-nodes": true}}'
            said = [normal(ask(query))]
            for name, act in CLIENT:
                uri = f"nbd+unix:///{name}?socket={tmp_path}/s"
                subprocess.run(
                    [qemu_io, "-f", "raw", "-c", act, uri], check=True, capture_output=True, timeout=SECONDS_MAX
                )
                said.append(normal(ask(query)))
            ask('{"execute": "quit"}')
            assert daemon.wait(SECONDS_MAX) == 0
            return said
        finally:
            daemon.kill()
