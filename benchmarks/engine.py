# SPDX-License-Identifier: Apache-2.0
"""The rows of files: our engines and our block layer beside fio, qemu-img bench, and what pip has.

No server and no client: a program reads a file and says how often. fio is what can be had of the machine, a loop in C
around the same system calls; qemu-img bench is the block layer that ours follows; the packages from pip are what else
a Python program could use. Those are put into a virtual environment in the benchmark's cache, each by itself: where
one cannot be installed, or does not run, its row is left out and the reason is said.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import system
from benchmarks.file_load import BLOCK, DEPTH
from benchmarks.report import Line, lines
from benchmarks.rows import Row, Sample, Settings
from benchmarks.servers import OURS, Unavailable

GRACE_SECONDS: Final = 120
_ROOT: Final = Path(__file__).parents[1]
_COMPLETED: Final = re.compile(r"Run completed in (\d+\.\d+) seconds\.")

# What pip is asked for. liburing 2026.3 and later (in Zig) end with an illegal instruction on some processors.
RIVALS: Final = {"aiofile": "aiofile", "caio": "caio", "aiofiles": "aiofiles", "liburing": "liburing<2026"}

Run = Callable[[Settings], Sample]


@dataclass(frozen=True)
class FileRow(Row):
    """One way to read a file, by us and by others."""

    contenders: Mapping[str, Run] = field(default_factory=dict)  # ours under OURS
    cached: bool = True


def _carry_out(command: Sequence[str], seconds: float) -> str:
    """What the program prints. RuntimeError if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = f"{_ROOT / 'src'}:{_ROOT}"
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + GRACE_SECONDS, env=environment, cwd=_ROOT
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{name} has not ended {GRACE_SECONDS} s after its time") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"{name} failed: {said}")
    return done.stdout


def _load(contender: str, *options: str, python: Callable[[Settings], str] | None = None) -> Run:
    """A process that runs benchmarks.file_load."""

    def run(settings: Settings) -> Sample:
        chosen = python(settings) if python is not None else sys.executable
        command = [chosen, "-m", "benchmarks.file_load", contender, str(settings.image), f"{settings.seconds:g}"]
        answer = json.loads(_carry_out([*command, *options], settings.seconds))
        cpu_us = answer["cpu_seconds"] / answer["ops"] * 1e6
        return Sample({"IOPS": answer["ops"] / answer["seconds"]}, cpu_us_per_op=cpu_us)

    return run


def _fio(engine: str, direct: bool) -> Run:
    """fio on the same file, as its defaults are but for what is named."""

    def run(settings: Settings) -> Sample:
        fio = shutil.which("fio")
        if fio is None:
            raise Unavailable("needs fio (apt package fio)")
        answer = _carry_out(
            [
                *(fio, "--name=load", f"--filename={settings.image}", "--readonly", "--rw=randread", f"--bs={BLOCK}"),
                *(f"--iodepth={DEPTH}", f"--ioengine={engine}", f"--direct={int(direct)}", "--norandommap"),
                # It would empty the page cache first.
                *("--invalidate=0", "--thread", "--time_based", f"--runtime={settings.seconds:g}"),
                "--output-format=json",
            ],
            settings.seconds,
        )
        job = json.loads(answer[answer.index("{") :])["jobs"][0]
        rate = job["read"]["iops"]
        if not rate:
            raise RuntimeError(f"fio with {engine} completed no request")
        cpu_us = (job["usr_cpu"] + job["sys_cpu"]) / 100 / rate * 1e6
        return Sample({"IOPS": rate}, cpu_us_per_op=cpu_us)

    return run


def _bench(program: Callable[[], list[str]], count: int, options: Sequence[str]) -> Run:
    """bottomhalf bench or qemu-img bench; both say themselves how long it took."""

    def run(settings: Settings) -> Sample:
        words = [word.format(image=settings.image) for word in options]
        said = _carry_out([*program(), "-c", str(count), *words], 0)
        found = _COMPLETED.search(said)
        if found is None:
            raise RuntimeError(f"{program()[0]} does not say how long it took")
        return Sample({"IOPS": count / max(float(found[1]), 0.001)})

    return run


def _ours_bench() -> list[str]:
    return [sys.executable, "-m", "bottomhalf.tools.bottomhalf", "bench"]


def _qemu_img() -> list[str]:
    path = shutil.which("qemu-img")
    if path is None:
        raise Unavailable("needs qemu-img (apt package qemu-utils)")
    return [path, "bench"]


def _rival_python(rival: str) -> Callable[[Settings], str]:
    """The interpreter of an environment that has the package, made if need be. Unavailable if it cannot be."""

    def find(settings: Settings) -> str:
        version = ".".join(map(str, sys.version_info[:2]))
        place = settings.cache / f"rivals-python{version}"
        python = str(place / "bin" / "python")
        steps: list[list[str]] = []
        if not Path(python).exists():
            steps.append([sys.executable, "-m", "venv", str(place)])
        if not Path(python).exists() or _fails([python, "-c", f"import {rival}"]):
            steps.append([python, "-m", "pip", "install", "--quiet", RIVALS[rival]])
        for step in steps:
            if why := _fails(step):
                raise Unavailable(f"could not be installed: {why}")
        if why := _fails([python, "-c", f"import {rival}"]):
            raise Unavailable(f"cannot be imported: {why}")
        return python

    return find


def _fails(command: Sequence[str]) -> str:
    """Why a command failed; nothing if it did not."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    return (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]


def _beside_fio(
    name: str, about: str, ours: Sequence[str], direct: bool, peers: Mapping[str, float | None]
) -> FileRow:
    contenders = {OURS: _load("ours", *ours)} | {f"fio {engine}": _fio(engine, direct) for engine in peers}
    goals = {f"fio {engine}": goal for engine, goal in peers.items()}
    return FileRow(f"engine-{name}", goals, ("IOPS",), about=about, contenders=contenders, cached=not direct)


def _beside_qemu_img(name: str, about: str, count: int, options: str, goal: float) -> FileRow:
    words = options.split()
    contenders = {OURS: _bench(_ours_bench, count, words), "qemu-img": _bench(_qemu_img, count, words)}
    cached = "none" not in words
    return FileRow(f"bench-{name}", {"qemu-img": goal}, ("IOPS",), about=about, contenders=contenders, cached=cached)


def _beside_rival(rival: str, about: str, ours: str, *options: str, goal: float = 1.0) -> FileRow:
    contenders = {OURS: _load(ours, *options), rival: _load(rival, *options, python=_rival_python(rival))}
    name = f"rival-{rival}" + ("-odirect" if "--direct" in options else "")
    cached = "--direct" not in options
    return FileRow(name, {rival: goal}, ("IOPS",), about=about, contenders=contenders, cached=cached)


_RING: Final = ("--engine", "io_uring", "--direct")
_NATIVE: Final = ("--engine", "linux-aio", "--direct")
_READS: Final = "random 4 KiB reads, 32 in flight"

ROWS: Final[tuple[FileRow, ...]] = (
    _beside_fio("odirect-io_uring", f"{_READS}, past the page cache, by io_uring", _RING, True, {"io_uring": 0.75}),
    _beside_fio("odirect-linux-aio", f"{_READS}, past the page cache, by linux-aio", _NATIVE, True, {"libaio": 0.75}),
    # psync is one at a time: not fio as it is by default, but the least that a read can cost.
    _beside_fio("cached", f"{_READS}, in memory", (), False, {"io_uring": 1.2, "psync": None}),
    _beside_qemu_img("io_uring", "bench -i io_uring: steps of 4 KiB", 300_000, "-f raw -i io_uring {image}", 1.0),
    _beside_qemu_img("threads", "bench -i threads: steps of 4 KiB", 300_000, "-f raw -i threads {image}", 1.0),
    _beside_qemu_img("native", "bench -i native -t none", 75_000, "-f raw -i native -t none {image}", 1.0),
    _beside_qemu_img("odirect", "bench -i io_uring -t none", 75_000, "-f raw -i io_uring -t none {image}", 1.0),
    _beside_qemu_img("null-co", "bench of null-co: the layers alone", 500_000, "--image-opts driver=null-co", 0.5),
    _beside_rival("aiofile", f"{_READS}, in asyncio", "ours-asyncio"),
    _beside_rival("caio", f"{_READS}, in asyncio", "ours-asyncio"),
    _beside_rival("aiofiles", f"{_READS}, in asyncio", "ours-asyncio"),
    _beside_rival("liburing", f"{_READS}, in lists", "ours"),
    _beside_rival("liburing", f"{_READS}, in lists, past the page cache", "ours", *_RING),
)


def measure(row: FileRow, settings: Settings, rounds: int, say: Callable[[str], None]) -> list[Line]:
    """Run all rounds of one row, everybody in turn in each."""
    names = list(row.contenders)
    done: list[dict[str, Sample]] = []
    for number in range(rounds):
        turn = number % len(names)
        samples: dict[str, Sample] = {}
        for name in names[turn:] + names[:turn]:
            system.settle(settings.image, cached=row.cached)
            held = system.Held(settings.image) if row.cached else None
            try:
                meter = system.Meter(os.getpid())
                sample = row.contenders[name](settings)
                meter.stop()
                samples[name] = _with_foreign(sample, meter.foreign_cpus)
            except (RuntimeError, Unavailable) as failure:
                say(f"{row.name}: left out, {name} {failure}")
                return lines(row, OURS, done)
            finally:
                if held is not None:
                    held.release()
        done.append(samples)
        known = ", ".join(f"{name} {sample.values['IOPS']:.4g}" for name, sample in samples.items())
        say(f"{row.name} {number + 1}/{rounds}: {known} IOPS")
    return lines(row, OURS, done)


def _with_foreign(sample: Sample, foreign_cpus: float) -> Sample:
    known: dict[str, Any] = vars(sample) | {"foreign_cpus": foreign_cpus, "client": "itself"}
    return Sample(**known)
