# SPDX-License-Identifier: Apache-2.0
"""From what one interpreter printed to the lines of the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.event_core import NAMES, ROWS

from benchmarks import interpreters

ROOT = Path(__file__).parents[2]


def test_lines() -> None:
    """A ratio says how many times cheaper ours is: the median of the rounds', not the medians' ratio."""
    answer = {
        "rows": {"half": {"bottomhalf": [100.0, 200.0, 400.0], "asyncio": [300.0, 1000.0, 1600.0]}},
        "pending": {"1": 900.0, "10": 200.0, "100": 90.0, "1000": 100.0, "10000": 110.0, "100000": 125.0},
        "timers": {"100": 50.0, "1000": 80.0, "100000": 200.0},
        "waits": [90.0],
    }
    half, single, flat, timers, ready = interpreters.lines(answer, "py3.99", 0.25)
    assert (half.name, half.peer_name, half.ours, half.peer) == ("aio-half py3.99", "asyncio", 200.0, 1000.0)
    assert (half.ratio, half.spread, half.rounds, half.goal) == (4.0, (3.0, 5.0), 3, 4)
    assert half.foreign_cpus == 0.25
    assert (single.peer_name, single.ratio, single.goal) == ("1 pending", 100 / 900, None)
    assert (flat.peer_name, flat.ratio, flat.goal) == ("worst of 100..100000", 0.8, 0.8)
    assert (timers.ratio, timers.goal) == (0.25, 0.33)
    assert (ready.name, ready.ours) == ("aio-wait-while-ready py3.99", 90.0)


def test_only_what_was_measured() -> None:
    assert interpreters.lines({"rows": {}, "pending": {}, "timers": {}, "waits": []}, "py3.99") == []


def test_every_row_is_described_and_can_be_measured() -> None:
    """Each by itself, in one short round; what it prints makes at least one line."""
    described = [paragraph.split()[0] for paragraph in interpreters.describe()]
    assert described == interpreters.names() == ["aio-" + name for name in NAMES]
    wanted = [word for row in ROWS for word in ("--only", row.name)] + ["--only", "wait-while-ready"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.event_core", "--json", "--rounds", "1", *wanted],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    made = interpreters.lines(json.loads(done.stdout), "py")
    assert {line.name.split()[0].removeprefix("aio-") for line in made} == {row.name for row in ROWS} | {
        "wait-while-ready"
    }
    assert all(line.ours > 0 and line.peer > 0 for line in made)


def test_an_interpreter_that_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed without a word, or with one: its rows are missing, the reason is said, the others are measured."""
    silent = tmp_path / "python3.11"
    silent.write_text("#!/bin/sh\nexit 3\n")
    talking = tmp_path / "python3.13"
    talking.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    for path in (silent, talking):
        path.chmod(0o755)
    monkeypatch.setattr(interpreters, "interpreters", lambda: {"3.11": str(silent), "3.13": str(talking)})
    monkeypatch.setattr(interpreters, "with_uvloop", lambda python, *_: (python, ""))
    said: list[str] = []
    assert interpreters.measure(["aio-half"], 1, tmp_path, said.append) == []
    assert said == ["aio-*: Python 3.11: status 3", "aio-*: Python 3.13: out of memory"]
