# SPDX-License-Identifier: Apache-2.0
"""``check`` beside QEMU's: the same numbers, status and text for images damaged in every way we know; what we repair
is whole to QEMU, with the same content as what QEMU repairs."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import bottomhalf
from tests.peers.damages import DAMAGES, EXTENDED, Damaged
from tests.peers.test_qcow2 import run

# Where QEMU 10.0 does something else, and why we do not. (damage, repair): what differs.
DIFFERENCES: Final[dict[tuple[str, str], str]] = {
    ("block unaligned", "all"): "QEMU marks the image corrupt and gives up; the counters can be rebuilt",
    ("block reserved", "all"): "QEMU writes the new counters over the old, which it then finds protected, and gives up",
    ("block behind the end", "all"): "QEMU makes the file as large as the entry says; the counters are rebuilt instead",
    ("another block behind the end", "all"): "as before",
    ("snapshot's L1 too large", "all"): "QEMU protects the impossible table from its own repair, and gives up",
    ("snapshot with a long name", "leaks"): "QEMU gives back, and discards, the table that it could not understand",
    ("snapshot with a long name", "all"): "as before",
    ("65536 snapshots", "all"): "QEMU protects the impossible table from its own repair, and gives up",
    ("unknown autoclear bits", "leaks"): "QEMU clears the bits before it knows of the snapshots, and loses these",
    ("unknown autoclear bits", "all"): "as before",
    **{
        (damage, repair): "QEMU does not open images with such bitmaps; here the check goes on without them"
        for damage in ("bitmap table too large", "bitmap data unaligned", "bitmap with unknown flags")
        for repair in ("", "leaks", "all")
    },
}


@pytest.fixture(scope="module")
def images(require: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One with a snapshot, one with a bitmap (QEMU loses the snapshots of an image that has both when it repairs it),
    one with extended entries."""
    require("qemu-img")
    require("qemu-io")
    folder = tmp_path_factory.mktemp("check")
    made: dict[str, bytes] = {}
    for name in ("snapshot", "bitmap", "extended"):
        path = folder / name
        shape = "cluster_size=16k,extended_l2=on" if name == "extended" else "cluster_size=4k"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", shape, path, "4M")
        first = ("write -P 1 0 64k", "write -P 2 1M 16k", "write -z 128k 8k", "write -P 9 200k 4k", "write -z 200k 4k")
        run("qemu-io", *(word for command in first for word in ("-c", command)), path)
        if name == "snapshot":
            run("qemu-img", "snapshot", "-c", "one", path)
        second = ["write -P 3 4k 8k", "write -P 4 2M 8k", "write -P 6 3500k 8k"]
        second += ["write -c -P 5 3M 8k"] if name != "extended" else []
        run("qemu-io", *(word for command in second for word in ("-c", command)), path)
        if name == "bitmap":
            run("qemu-img", "bitmap", "--add", "-g", "4k", path, "bm")
        made[name] = path.read_bytes()
    return made


def qemu_check(path: Path, repair: str) -> tuple[int, dict[str, Any], list[str]]:
    """Status, numbers and text."""
    words = ["qemu-img", "check", "--output=json", *(["-r", repair] if repair else []), str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr.splitlines()


def our_check(path: Path, repair: str) -> tuple[int, dict[str, Any], list[str]]:
    try:
        found = bottomhalf.check(path, repair=repair or None)
    except bottomhalf.block.ImageError as error:  # QEMU cannot open it either
        return 1, {}, [str(error)]
    return found.status, found.as_json(str(path)) if not found.failure else {}, found.findings


def said(lines: list[str]) -> set[str]:
    """What is about clusters; a warning of QEMU's has no line end."""
    return {match[0] for line in lines if (match := re.search("(ERROR|Leaked|Repairing).*", line))}


CASES = [(damage, DAMAGES[damage], "bitmap" if "bitmap" in damage else "snapshot") for damage in DAMAGES]
CASES += [(f"extended: {damage}", EXTENDED[damage], "extended") for damage in EXTENDED]


@pytest.mark.parametrize("repair", ["", "leaks", "all"], ids=["check", "leaks", "all"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_damages(images: dict[str, bytes], tmp_path: Path, case: Any, repair: str) -> None:
    damage, do, base = case
    image = Damaged(images[base])
    do(image)
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    ours.write_bytes(image.bytes)
    theirs.write_bytes(image.bytes)
    status, numbers, text = our_check(ours, repair)
    expected_status, expected, expected_text = qemu_check(theirs, repair)
    if (damage, repair) not in DIFFERENCES:
        assert status == expected_status, (text[:5], expected_text[:5])
        if expected:
            assert {**numbers, "filename": ""} == {**expected, "filename": ""}
            assert repair or said(text) == said(expected_text)
    else:
        assert (status, numbers) != (expected_status, {**expected, "filename": str(ours)}), "no longer a difference"
    if not repair:
        assert ours.read_bytes() == image.bytes, "a check without a repair has written"
    elif repair == "all" and status != 1:
        again, _, lines = qemu_check(ours, "")
        assert again == status or (damage, "") in DIFFERENCES, lines
        if status == expected_status == 0:
            run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", ours, theirs)
