# SPDX-License-Identifier: Apache-2.0
"""The clients that load a server: fio with its nbd engine, and our batching client in C."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks.servers import Unavailable

Client = Literal["fio", "nbdload"]
NBDLOAD_SOURCE: Final = Path(__file__).with_name("nbdload.c")
EXPORT: Final = "d"


@dataclass(frozen=True)
class Load:
    """What a client does: operation, bytes per request, requests in flight per connection, connections."""

    op: Literal["randread", "randwrite", "seqread"]
    block_size: int
    depth: int
    connections: int = 1


@dataclass(frozen=True)
class Result:
    """What a client saw."""

    ops: int
    seconds: float
    latency_p50_us: float
    latency_p99_us: float


def choose(wanted: Client, cache: Path) -> tuple[Client, str]:
    """Return the client to use and its program; fio stands in for nbdload where there is no C compiler."""
    if wanted == "nbdload":
        try:
            return "nbdload", str(_compiled(cache))
        except Unavailable:
            pass
    fio = shutil.which("fio")
    if fio is None:
        raise Unavailable("needs fio (apt package fio)")
    return "fio", fio


def _compiled(cache: Path) -> Path:
    source = NBDLOAD_SOURCE.read_bytes()
    program = cache / f"nbdload-{hashlib.sha256(source).hexdigest()[:12]}"
    if program.exists():
        return program
    compiler = shutil.which("cc")
    if compiler is None:
        raise Unavailable("needs cc (apt package gcc)")
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = program.with_suffix(f".{os.getpid()}")
    built = subprocess.run([compiler, "-O2", "-o", str(unfinished), str(NBDLOAD_SOURCE)], capture_output=True)
    if built.returncode != 0:
        raise Unavailable(f"cannot compile nbdload.c: {built.stderr.decode(errors='replace').strip()}")
    unfinished.rename(program)
    return program


def run(client: Client, program: str, load: Load, sock: Path, seconds: float) -> Result:
    """Load the server at ``sock`` for some seconds."""
    if client == "nbdload":
        return _run_nbdload(program, load, sock, seconds)
    return _run_fio(program, load, sock, seconds)


def _run_nbdload(program: str, load: Load, sock: Path, seconds: float) -> Result:
    answer = _run_json(
        [
            *(program, "-u", str(sock), "-e", EXPORT, "-o", load.op, "-b", str(load.block_size)),
            *("-d", str(load.depth), "-c", str(load.connections), "-s", str(seconds)),
        ],
        seconds,
    )
    return Result(answer["ops"], answer["seconds"], answer["latency_p50_us"], answer["latency_p99_us"])


def _run_fio(program: str, load: Load, sock: Path, seconds: float) -> Result:
    rw = "read" if load.op == "seqread" else load.op
    answer = _run_json(
        [
            *(program, "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///{EXPORT}?socket={sock}"),
            *(f"--rw={rw}", f"--bs={load.block_size}", f"--iodepth={load.depth}"),
            *(f"--numjobs={load.connections}", "--group_reporting", "--thread", "--norandommap"),
            *("--time_based", f"--runtime={seconds:g}", "--output-format=json"),
        ],
        seconds,
    )
    side = answer["jobs"][0]["write" if load.op == "randwrite" else "read"]
    percentiles = side["clat_ns"].get("percentile", {})
    return Result(
        ops=side["total_ios"],
        seconds=side["total_ios"] / side["iops"] if side["iops"] else seconds,
        latency_p50_us=percentiles.get("50.000000", 0) / 1000,
        latency_p99_us=percentiles.get("99.000000", 0) / 1000,
    )


def _run_json(command: list[str], seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{Path(command[0]).name} has not ended 60 s after its time") from None
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    # fio says "connected to NBD server" on its standard output, before the JSON.
    answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return answer
