# SPDX-License-Identifier: Apache-2.0
"""Load the storage daemon from 200 verifying clients for ten minutes; its memory must not grow.

    python scripts/soak.py [--seconds 600] [--clients 200] [--growth-mib 32]

The load is a row of passes. In each, all clients connect at once, write random blocks with checksums into
their own parts of the image, read all of them back (fio's ``--verify=crc32c``), and leave. The daemon's
resident set is read after each pass, when nobody is connected. It fails when a block does not verify, when
a client is refused, when the daemon dies or does not end cleanly, or when it weighs more than
``--growth-mib`` more after the last quarter of the passes (their median) than after the second quarter; the
first is warm-up.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.servers import OURS, SERVERS, Running, Unavailable, running  # noqa: E402
from benchmarks.system import memory_mib  # noqa: E402

PART_MIB: Final = 2  # of the image, for each client
LOOPS: Final = 4  # of writing and verifying, for each client in a pass
PASSES_MIN: Final = 4
PASS_SECONDS_MAX: Final = 180
STOP_SECONDS: Final = 10


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600, metavar="S", help="how long to load (default 600)")
    parser.add_argument("--clients", type=int, default=200, metavar="N", help="clients at once (default 200)")
    parser.add_argument("--growth-mib", type=float, default=32, metavar="M", help="bound of growth (default 32)")
    parser.add_argument("--server", choices=sorted(SERVERS), default=OURS, help="the server to load")
    options = parser.parse_args(arguments)
    if options.seconds < 10 or options.clients < 1:
        parser.error("at least 10 seconds and 1 client")
    return options


def fio_command(fio: str, sock: Path, clients: int) -> list[str]:
    """Return the command line of one pass."""
    return [
        *(fio, "--name=soak", "--ioengine=nbd", f"--uri=nbd+unix:///d?socket={sock}"),
        *("--rw=randwrite", "--bsrange=4k-64k", "--iodepth=4", f"--numjobs={clients}", "--thread"),
        *("--verify=crc32c", "--verify_fatal=1", f"--loops={LOOPS}", "--group_reporting"),
        *(f"--size={PART_MIB}m", f"--offset_increment={PART_MIB}m", "--output-format=terse"),
    ]


def one_pass(command: list[str], server: Running, log: BinaryIO) -> float:
    """Run fio once and return the server's highest resident set in MiB; ``RuntimeError`` when it went
    wrong."""
    log.seek(0)
    log.truncate()
    start, highest = time.monotonic(), 0.0
    with subprocess.Popen(command, stdout=log, stderr=log) as client:
        try:
            while client.poll() is None:
                if time.monotonic() - start > PASS_SECONDS_MAX:
                    raise RuntimeError(f"a pass has not ended after {PASS_SECONDS_MAX} s")
                try:
                    highest = max(highest, memory_mib(server.pid)[0])
                except OSError:
                    raise RuntimeError("the server is gone") from None
                time.sleep(0.1)
        finally:
            client.kill()
    if client.returncode != 0:
        raise RuntimeError(f"fio ended with status {client.returncode}: {complaints(log)}")
    return highest


def complaints(log: BinaryIO) -> str:
    """Return the first different lines of fio's log that tell of something wrong."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    telling = (line for line in lines if line and "connected to NBD server" not in line and ";" not in line)
    return "\n    ".join(list(dict.fromkeys(telling))[:8])


def soak(options: argparse.Namespace, fio: str, directory: Path) -> list[str]:
    """Run the passes and return what went wrong."""
    image = directory / "soak.raw"
    with open(image, "wb") as file:
        file.truncate(options.clients * PART_MIB * 1024 * 1024)
    say(f"{options.server}, {options.clients} clients at once, {options.seconds} s")
    failures: list[str] = []
    sizes: list[float] = []
    with running(SERVERS[options.server], image) as server, open(directory / "fio.log", "w+b") as log:
        say(f"resident MiB when idle: {memory_mib(server.pid)[0]:.1f}")
        command = fio_command(fio, server.socket, options.clients)
        start = time.monotonic()
        while time.monotonic() - start < options.seconds or len(sizes) < PASSES_MIN:
            try:
                peak = one_pass(command, server, log)
                sizes.append(memory_mib(server.pid)[0])
            except (RuntimeError, OSError) as error:
                failures.append(f"pass {len(sizes) + 1}: {error}")
                break
            elapsed = time.monotonic() - start
            say(f"{elapsed:4.0f} s, pass {len(sizes)}: resident MiB at most {peak:.1f}, after it {sizes[-1]:.1f}")
        failures += stop(server)
    if len(sizes) >= PASSES_MIN:
        quarter = len(sizes) // 4
        begin = statistics.median(sizes[quarter : 2 * quarter])
        end = statistics.median(sizes[-quarter:])
        say(f"resident after warm-up {begin:.1f} MiB, at the end {end:.1f} MiB: {end - begin:+.1f}")
        if end - begin > options.growth_mib:
            failures.append(f"the server grew by {end - begin:.1f} MiB, at most {options.growth_mib:g} are allowed")
    return failures


def stop(server: Running) -> list[str]:
    """End the server as an administrator would, and return what went wrong."""
    server.process.terminate()
    try:
        status = server.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        return [f"the server has not ended {STOP_SECONDS} s after SIGTERM"]
    return [] if status in (0, -signal.SIGTERM) else [f"the server ended with status {status}"]


def say(text: str) -> None:
    """Print a line of progress or of the verdict."""
    print(f"soak: {text}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Find the programs, and soak."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    fio = shutil.which("fio")
    try:
        SERVERS[options.server].find()
    except Unavailable as missing:
        say(f"{options.server} {missing}")
        return 1
    if fio is None:
        say("needs fio (apt package fio)")
        return 1
    with tempfile.TemporaryDirectory(prefix="bh-soak-") as directory:
        failures = soak(options, fio, Path(directory))
    for failure in failures:
        say(f"FAILED: {failure}")
    if not failures:
        say("passed")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
