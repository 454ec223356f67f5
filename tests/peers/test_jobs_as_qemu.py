# SPDX-License-Identifier: Apache-2.0
"""Jobs of QEMU's daemon and of ours: the same words, the same answers and events; and QEMU reads what ours has made."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import bottomhalf
from tests.peers.job_conversations import FILES, LUKS, QCOW2, VERBS, job_lines
from tests.peers.test_same_as_qemu import MIB, OURS, SECONDS_MAX, Lines, normal

pytestmark = pytest.mark.peer


def converse(command: Sequence[str], lines: list[str]) -> list[tuple[str, str, list[str]]]:
    """Each line, its answer and the events up to the job's conclusion, if it began one. (Whether an event or the answer
    comes first is not fixed.)"""
    with subprocess.Popen(
        [*command, "--chardev", "stdio,id=m", "--monitor", "m"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as daemon:
        assert daemon.stdin is not None and daemon.stdout is not None
        reader = Lines(daemon.stdout)
        try:
            reader.line()
            said = []
            for line in lines:
                daemon.stdin.write(line.encode() + b"\n")
                answer, events = "", list[str]()
                begins = json.loads(line)["execute"] in ("blockdev-create", "x-blockdev-amend")
                while not answer or (begins and '"return"' in answer and "concluded" not in "".join(events)):
                    message = normal(reader.line())
                    assert message, f"the daemon has ended after {line}"
                    if '"event": ' in message:
                        events.append(message)
                    else:
                        answer = message
                said.append((line, answer, events))
            daemon.stdin.close()
            assert daemon.wait(SECONDS_MAX) == 0
            return said
        finally:
            daemon.kill()


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A qcow2 image whose password is "abc"."""
    pytest.importorskip("cryptography")
    path = tmp_path_factory.mktemp("encrypted") / "e.qcow2"
    bottomhalf.create(
        path, format="qcow2", size=MIB, encrypt_format="luks", encrypt_secret="abc", encrypt_iter_time=10
    )
    return path.read_bytes()


@pytest.mark.parametrize("name", ["VERBS", "FILES", "QCOW2", "LUKS"])
def test_conversation(require: Callable[[str], str], tmp_path: Path, encrypted: bytes, name: str) -> None:
    conversation = {"VERBS": VERBS, "FILES": FILES, "QCOW2": QCOW2, "LUKS": LUKS}[name]
    for mark in "fhdqe":
        conversation = conversation.replace(f"{{{mark}}}", f"{tmp_path}/{mark}")
    lines = job_lines(conversation.replace("{dir}", str(tmp_path)))
    said = []
    for daemon in ([require("qemu-storage-daemon")], OURS["qemu-storage-daemon"]):
        for empty in "fh":
            (tmp_path / empty).write_bytes(b"")
        (tmp_path / "d").write_bytes(bytes(MIB))
        (tmp_path / "e").write_bytes(encrypted)
        bottomhalf.create(tmp_path / "q", format="qcow2", size=MIB)
        said.append(converse(daemon, lines))
    theirs, ours = said
    different = [
        f"{them[0]}\n  QEMU  {them[1:]}\n  ours  {us[1:]}"
        for them, us in zip(theirs, ours, strict=True)
        if them != us and "quit" not in them[0]
    ]
    assert not different, "\n".join(different)


QCOW2_OPTIONS = [
    {},
    {"version": "v2"},
    {"cluster-size": 4096, "refcount-bits": 64, "lazy-refcounts": True},
    {"extended-l2": True, "compression-type": "zstd"},
    {"preallocation": "metadata"},
    {"preallocation": "full", "cluster-size": 512},
    {"data-file": "h", "data-file-raw": True},
    {"backing-file": "/nope/b", "backing-fmt": "raw"},
]


@pytest.mark.parametrize("options", QCOW2_OPTIONS, ids=str)
def test_qemu_reads_the_image(
    require: Callable[[str], str], tmp_path: Path, options: dict[str, object]
) -> None:
    """On a node whose file has been something else before: QEMU finds no fault in it, and describes it as it describes
    the one that its own daemon makes."""
    described = []
    for daemon in ([require("qemu-storage-daemon")], OURS["qemu-storage-daemon"]):
        for name in "fh":
            (tmp_path / name).write_bytes(b"\xee" * 100_000)
        wanted = {"driver": "qcow2", "file": "f", "size": 3 * MIB, **options}
        lines = [
            {"execute": "qmp_capabilities"},
            *(
                {
                    "execute": "blockdev-add",
                    "arguments": {"driver": "file", "node-name": name, "filename": f"{tmp_path}/{name}"},
                }
                for name in "fh"
            ),
            {"execute": "blockdev-create", "arguments": {"job-id": "j", "options": wanted}},
            {"execute": "query-jobs"},
            {"execute": "job-dismiss", "arguments": {"id": "j"}},
            {"execute": "quit"},
        ]
        said = converse(daemon, [json.dumps(line) for line in lines])
        assert "error" not in json.loads(said[4][1])["return"][0], said[4]
        qemu_img = require("qemu-img")
        check = subprocess.run(
            [qemu_img, "check", "-f", "qcow2", tmp_path / "f"], capture_output=True, text=True, timeout=SECONDS_MAX
        )
        assert check.returncode == 0 or "Could not open backing" in check.stderr, check.stdout + check.stderr
        info = subprocess.run(
            [qemu_img, "info", "-f", "qcow2", "--output=json", tmp_path / "f"],
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
            check=True,
        )
        found = json.loads(info.stdout)
        for differs in ("actual-size", "children"):
            found.pop(differs, None)
        described.append(found)
    assert described[0] == described[1]


def test_qemu_opens_a_volume_with_the_password_that_was_added(require: Callable[[str], str], tmp_path: Path) -> None:
    """LUKS made and amended by jobs, with its header in front and in a file of its own. (QEMU's daemon ends when it is
    asked to amend one, so it only reads.)"""
    pytest.importorskip("cryptography")
    for name in "fgh":
        (tmp_path / name).write_bytes(b"\xee" * 10_000)
    luks = {"driver": "luks", "size": MIB, "key-secret": "s", "iter-time": 10}
    volume = {"driver": "luks", "node-name": "l", "file": "f", "key-secret": "s"}
    apart = {"driver": "luks", "node-name": "m", "file": "g", "header": "h", "key-secret": "s"}
    add = {"driver": "luks", "state": "active", "new-secret": "t", "iter-time": 10}
    lines: list[tuple[str, dict[str, object]]] = [
        ("qmp_capabilities", {}),
        ("object-add", {"qom-type": "secret", "id": "s", "data": "abc"}),
        ("object-add", {"qom-type": "secret", "id": "t", "data": "def"}),
        *(("blockdev-add", {"driver": "file", "node-name": n, "filename": f"{tmp_path}/{n}"}) for n in "fgh"),
        ("blockdev-create", {"job-id": "a", "options": {**luks, "file": "f"}}),
        ("blockdev-create", {"job-id": "b", "options": {**luks, "file": "g", "header": "h", "preallocation": "full"}}),
        ("blockdev-add", volume),
        ("blockdev-add", apart),
        ("x-blockdev-amend", {"job-id": "c", "node-name": "l", "options": add}),
        ("x-blockdev-amend", {"job-id": "d", "node-name": "m", "options": add}),
        (
            "x-blockdev-amend",
            {"job-id": "e", "node-name": "l", "options": {"driver": "luks", "state": "inactive", "old-secret": "s"}},
        ),
        ("query-jobs", {}),
        ("quit", {}),
    ]
    said = converse(OURS["qemu-storage-daemon"], [json.dumps({"execute": n, "arguments": a}) for n, a in lines])
    assert not [each for each in said if '"return"' not in each[1]]
    jobs = json.loads(said[-2][1])["return"]
    assert len(jobs) == 5 and not any("error" in job for job in jobs), jobs
    assert (tmp_path / "g").stat().st_size == MIB
    for password, options, opens in (
        ("def", f"driver=luks,key-secret=s,file.filename={tmp_path}/f", True),
        ("abc", f"driver=luks,key-secret=s,file.filename={tmp_path}/f", False),
        ("def", f"driver=luks,key-secret=s,file.filename={tmp_path}/g,header.filename={tmp_path}/h", True),
    ):
        words = ["--object", f"secret,id=s,data={password}", "--image-opts", options, "-c", "write -P 7 0 64k"]
        ran = subprocess.run(
            [require("qemu-io"), *words, "-c", "read -P 7 0 64k"], capture_output=True, text=True, timeout=SECONDS_MAX
        )
        assert (ran.returncode == 0) == opens, ran.stdout + ran.stderr
