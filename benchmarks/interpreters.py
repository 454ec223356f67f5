# SPDX-License-Identifier: Apache-2.0
"""The rows of the event core, under every interpreter that is here.

Each interpreter runs ``benchmarks.event_core`` in a process of its own. Ours needs nothing installed; uvloop, one of
the peers, is put into a virtual environment in the benchmark's cache. Where that cannot be made (no network, no venv
module) the rows beside uvloop are missing and the reason is said.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.event_core import FLAT, NAMES, ROWS, WAIT_READY
from benchmarks.report import Line
from benchmarks.system import Meter

PREFIX: Final = "aio-"
VERSIONS: Final = ("3.11", "3.13")
_ROOT: Final = Path(__file__).parents[1]


def names() -> list[str]:
    """The rows' names, as --only chooses among them."""
    return [PREFIX + name for name in NAMES]


def describe() -> Iterator[str]:
    """The rows and their goals, a paragraph each."""
    for row in ROWS:
        goals = ", ".join(f"{peer} {row.goals.get(peer, '-')}" for peer in ("asyncio", "uvloop"))
        yield f"{PREFIX + row.name:28} {row.about}\n{'':28} beside (goal): {goals}"
    for name, about, beside in (
        ("pending-flat", f"a bottom half when {FLAT[0]} to {FLAT[-1]} are pending", "1000 pending (0.8)"),
        ("timers-log", f"a timer when {FLAT[2]} to {FLAT[-1]} are armed", f"{FLAT[2]} armed (0.33)"),
        (WAIT_READY, "wait_while() for what is so already", "nothing"),
    ):
        yield f"{PREFIX + name:28} {about}\n{'':28} beside (goal): {beside}"


def interpreters() -> dict[str, str]:
    """The Pythons that are here, by version: the running one, and others of PATH that really start."""
    found = {".".join(map(str, sys.version_info[:2])): sys.executable}
    for version in VERSIONS:
        candidate = shutil.which(f"python{version}")
        paths = [candidate] if candidate else []
        paths += map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), reverse=True))
        for path in paths:
            if version not in found and _version(path) == version:
                found[version] = path
    return dict(sorted(found.items()))


def _version(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _has_uvloop(python: str) -> bool:
    return subprocess.run([python, "-c", "import uvloop"], capture_output=True, check=False).returncode == 0


def with_uvloop(python: str, version: str, cache: Path) -> tuple[str, str]:
    """An interpreter that has uvloop, made if need be; and why it has not, if so."""
    if _has_uvloop(python):
        return python, ""
    place = cache / f"python{version}"
    made = place / "bin" / "python"
    if made.exists() and _has_uvloop(str(made)):
        return str(made), ""
    steps = ([python, "-m", "venv", str(place)], [str(made), "-m", "pip", "install", "--quiet", "uvloop"])
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            return python, f"without uvloop, it could not be installed: {last}"
    return str(made), ""


def measure(chosen_rows: Sequence[str], rounds: int, cache: Path, say: Callable[[str], None]) -> list[Line]:
    """Run rows, by name, under every interpreter."""
    result: list[Line] = []
    only = [word for name in chosen_rows for word in ("--only", name.removeprefix(PREFIX))]
    for version, python in interpreters().items():
        chosen, missing = with_uvloop(python, version, cache)
        if missing:
            say(f"{PREFIX}*: Python {version} {missing}")
        meter = Meter(0)
        done = subprocess.run(
            [chosen, "-m", "benchmarks.event_core", "--json", "--rounds", str(rounds), *only],
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": str(_ROOT / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
        meter.stop()
        if done.returncode:
            last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
            say(f"{PREFIX}*: Python {version}: {last}")
            continue
        answer = json.loads(done.stdout)
        say(f"{PREFIX}*: Python {answer['python']} done")
        result += lines(answer, f"py{version}", meter.foreign_cpus)
    return result


def lines(answer: dict[str, Any], label: str, foreign_cpus: float = 0.0) -> list[Line]:
    """Table lines from what one interpreter printed. A ratio says how many times cheaper ours is."""
    result: list[Line] = []

    def add(
        name: str, ours: list[float], theirs: list[float], peer: str, ratios: list[float], goal: float | None
    ) -> None:
        result.append(_line(f"{PREFIX}{name} {label}", ours, theirs, peer, ratios, goal, foreign_cpus))

    for row in ROWS:
        taken = answer["rows"].get(row.name)
        if taken is None:
            continue
        ours = taken["bottomhalf"]
        for peer in taken:
            if peer != "bottomhalf":
                ratios = [their / our for our, their in zip(ours, taken[peer], strict=True)]
                add(row.name, ours, taken[peer], peer, ratios, row.goals.get(peer))
    pending = {int(count): value for count, value in answer["pending"].items()}
    if pending:
        # Flat: none of many is dearer than one of a thousand. Below a hundred a poll is shared by few, and its own
        # cost shows, which is what the first row is there to say.
        few = min(pending)
        add("pending-flat", [pending[1000]], [pending[few]], f"{few} pending", [pending[1000] / pending[few]], None)
        worst = max(value for count, value in pending.items() if count >= 100)
        add("pending-flat", [pending[1000]], [worst], f"worst of {FLAT[2]}..{FLAT[-1]}", [pending[1000] / worst], 0.8)
    timers = {int(count): value for count, value in answer["timers"].items()}
    if timers:
        # Logarithmic: a hundred times as many timers cost at most as much more as their logarithm.
        least, most = min(timers), max(timers)
        ratio = timers[least] / timers[most]
        add("timers-log", [timers[least]], [timers[most]], f"{most} beside {least}", [ratio], 0.33)
    waits = answer["waits"]
    if waits:
        add(WAIT_READY, waits, waits, "itself", [1.0], None)
    return result


def _line(
    name: str,
    ours: list[float],
    theirs: list[float],
    peer: str,
    ratios: list[float],
    goal: float | None,
    foreign_cpus: float,
) -> Line:
    return Line(
        name=name,
        unit="ns",
        ours=statistics.median(ours),
        peer=statistics.median(theirs),
        peer_name=peer,
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        rounds=len(ratios),
        goal=goal,
        client="",
        client_busy=None,
        ours_cpu_us_per_op=None,
        peer_cpu_us_per_op=None,
        ours_latency_p50_us=None,
        peer_latency_p50_us=None,
        foreign_cpus=foreign_cpus,
    )
