# SPDX-License-Identifier: Apache-2.0
"""Persistent bitmaps that go back and forth between QEMU's tools and ours, and what NBD clients of both see."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from tests.peers.test_same_as_qemu import OURS, converse

pytestmark = pytest.mark.peer

MIB = 1 << 20
SIZE = 20 * MIB
SECONDS_MAX = 60


def run(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=SECONDS_MAX)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def checksums(daemon: list[str], image: Path, names: list[str]) -> list[str]:
    """What a daemon says of an image's bitmaps, which it opens read-only."""
    file = {"driver": "file", "filename": str(image)}
    lines = [
        command("qmp_capabilities"),
        command("blockdev-add", driver="qcow2", node_name="n", read_only=True, file=file),
        *(command("x-debug-block-dirty-bitmap-sha256", node="n", name=name) for name in names),
        command("quit"),
    ]
    return [answers[0] for _, answers in converse(daemon, lines)[3:-1]]


def command(execute: str, **arguments: Any) -> str:
    return json.dumps(
        {"execute": execute, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
    )


@pytest.mark.parametrize("number", range(2))
def test_back_and_forth(require: Callable[[str], str], tmp_path: Path, number: int) -> None:
    """Each change by QEMU or by us, chosen by chance; both see the same, and QEMU's check finds nothing."""
    qemu_img, qemu_io, daemon = (require(name) for name in ("qemu-img", "qemu-io", "qemu-storage-daemon"))
    image, chance = tmp_path / "a.qcow2", random.Random(number)
    cluster = chance.choice((4096, 65536, 512))
    run(qemu_img, "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", image, str(SIZE))
    names: list[str] = []
    size = SIZE
    for step in range(16):
        what = chance.choice(["add", "write"] * 2 + ["merge", "resize", "clear", "disable", "enable", "remove"])
        qemu = chance.random() < 0.5
        name = chance.choice([*names, ""])
        if what == "add":
            name = f"b{step}"
            granularity = chance.choice((512, 65536, 1 << 20))
            names.append(name)
            if qemu:
                run(qemu_img, "bitmap", "--add", "-g", str(granularity), image, name)
            else:
                bottomhalf.bitmap_add(image, name, granularity=granularity)
        elif what == "write":
            offset, length = chance.randrange(size // MIB) * MIB, chance.choice((512, 70_000, 3 * MIB))
            length = min(length, size - offset)
            if qemu:
                run(qemu_io, "-c", f"write {offset} {length}", image)
            else:
                with bottomhalf.open(image) as disk:
                    disk.pwrite(b"x" * length, offset)
        elif what == "resize":
            size = SIZE + chance.randrange(8) * MIB // 2
            if qemu:
                run(qemu_img, "resize", "-q", "--shrink", image, str(size))
            else:
                bottomhalf.resize(image, size, shrink=True)
        elif name and what == "merge":
            source = chance.choice(names)
            if qemu:
                run(qemu_img, "bitmap", "--merge", source, image, name)
            else:
                bottomhalf.bitmap_merge(image, name, source)
        elif name:
            if qemu:
                run(qemu_img, "bitmap", f"--{what}", image, name)
            else:
                getattr(bottomhalf, f"bitmap_{what}")(image, name)
            if what == "remove":
                names.remove(name)
        assert "No errors were found" in run(qemu_img, "check", image)
        found = bottomhalf.check(image)
        assert not found.corruptions and not found.leaks, found.findings
    specific = json.loads(run(qemu_img, "info", "--output=json", image))["format-specific"]["data"]
    theirs = [(each["name"], each["granularity"], each["flags"]) for each in specific.get("bitmaps", [])]
    ours = [(each.name, each.granularity, ["auto"] if each.enabled else []) for each in bottomhalf.bitmaps(image)]
    assert theirs == ours and sorted(names) == sorted(name for name, _, _ in ours)
    assert checksums([daemon], image, names) == checksums(OURS["qemu-storage-daemon"], image, names)


def test_what_a_crash_leaves(require: Callable[[str], str], tmp_path: Path) -> None:
    """Of ours, and QEMU says so; of QEMU's, and we do."""
    qemu_img, daemon = require("qemu-img"), require("qemu-storage-daemon")
    for ours in (True, False):
        image = tmp_path / f"{ours}.qcow2"
        bottomhalf.create(image, format="qcow2", size=MIB)
        bottomhalf.bitmap_add(image, "b")
        program = OURS["qemu-storage-daemon"] if ours else [daemon]
        file = {"driver": "file", "filename": str(image)}
        with subprocess.Popen(
            [*program, "--chardev", "stdio,id=m", "--monitor", "m"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as killed:
            assert killed.stdin is not None and killed.stdout is not None
            killed.stdout.readline()
            for line in (
                command("qmp_capabilities"),
                command("blockdev-add", driver="qcow2", node_name="n", file=file),
            ):
                killed.stdin.write(line.encode() + b"\n")
                killed.stdin.flush()
                assert b"return" in killed.stdout.readline()
            killed.kill()
        (bitmap,) = bottomhalf.bitmaps(image)
        assert bitmap.inconsistent
        refused = subprocess.run([qemu_img, "bitmap", "--clear", image, "b"], capture_output=True, text=True)
        assert "Bitmap 'b' is inconsistent and cannot be used" in refused.stderr
        with pytest.raises(bottomhalf.block.BlockError, match="Bitmap 'b' is inconsistent and cannot be used"):
            bottomhalf.bitmap_clear(image, "b")
        if ours:
            run(qemu_img, "bitmap", "--remove", image, "b")
        else:
            bottomhalf.bitmap_remove(image, "b")
        assert "No errors were found" in run(qemu_img, "check", image)


def test_what_clients_see(require: Callable[[str], str], tmp_path: Path) -> None:
    """nbdinfo and qemu-img, of an export of ours and of qemu-nbd."""
    nbdinfo, qemu_img, qemu_io = (require(name) for name in ("nbdinfo", "qemu-img", "qemu-io"))
    image, socket = tmp_path / "a.qcow2", tmp_path / "s"
    run(qemu_img, "create", "-q", "-f", "qcow2", image, str(SIZE))
    run(qemu_img, "bitmap", "--add", image, "b")
    run(qemu_img, "bitmap", "--add", "-g", "512", image, "fine")
    run(qemu_io, "-c", "write 1M 100k", "-c", "write 5M 1", "-c", "discard 19M 1M", image)
    seen = []
    for server in ([require("qemu-nbd")], OURS["qemu-nbd"]):
        pid = tmp_path / "pid"
        options = ["-t", "-r", "-f", "qcow2", "-k", str(socket), "-B", "b", "-B", "fine", f"--pid-file={pid}", "--fork"]
        run(*server, *options, image)
        try:
            uri = f"nbd+unix:///?socket={socket}"
            maps = [run(nbdinfo, f"--map=qemu:dirty-bitmap:{name}", uri) for name in ("b", "fine")]
            named = "driver=nbd,server.type=unix,x-dirty-bitmap=qemu:dirty-bitmap:b,server.path="
            maps.append(run(qemu_img, "map", "--output=json", "--image-opts", f"{named}{socket}"))
            contexts = json.loads(run(nbdinfo, "--json", uri))["exports"][0]["contexts"]
            seen.append((maps, contexts))
        finally:
            run("kill", pid.read_text().strip())
            while socket.exists():
                pass
    assert seen[0] == seen[1]
    assert "dirty" in seen[0][0][0]
