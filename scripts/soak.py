# SPDX-License-Identifier: Apache-2.0
"""Load the storage daemon from 200 verifying clients for ten minutes, and watch that its memory does not
grow.

    python scripts/soak.py [--seconds 600] [--clients 200] [--growth-mib 32]

fio writes random blocks with checksums and reads them back (``--verify=crc32c``), each client in its own
part of the image. The daemon's resident set is read every second. It fails when a block does not verify,
when the daemon dies or does not end cleanly, or when the median of the last tenth of the run lies more than
``--growth-mib`` above that of the tenth after the warm-up; arenas that 200 connections fill for the first
time are warm-up.
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
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.servers import OURS, SERVERS, Running, Unavailable, running  # noqa: E402
from benchmarks.system import memory_mib  # noqa: E402

PART_MIB: Final = 2  # of the image, for each client
STOP_SECONDS: Final = 10
GRACE_SECONDS: Final = 120  # in which fio may finish its last round of verifying


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=int, default=600, metavar="S", help="how long to load (default 600)"
    )
    parser.add_argument("--clients", type=int, default=200, metavar="N", help="clients at once (default 200)")
    parser.add_argument(
        "--growth-mib", type=float, default=32, metavar="M", help="bound of growth (default 32)"
    )
    parser.add_argument("--server", choices=sorted(SERVERS), default=OURS, help="the server to load")
    options = parser.parse_args(arguments)
    if options.seconds < 10 or options.clients < 1:
        parser.error("at least 10 seconds and 1 client")
    return options


def fio_command(fio: str, sock: Path, options: argparse.Namespace) -> list[str]:
    """Return fio's command line: every client writes its own part, and reads back what it wrote as it
    goes."""
    return [
        *(fio, "--name=soak", "--ioengine=nbd", f"--uri=nbd+unix:///d?socket={sock}"),
        *("--rw=randwrite", "--bsrange=4k-64k", "--iodepth=4", f"--numjobs={options.clients}", "--thread"),
        *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--group_reporting"),
        *(
            f"--size={PART_MIB}m",
            f"--offset_increment={PART_MIB}m",
            "--time_based",
            f"--runtime={options.seconds}",
        ),
        "--output-format=terse",
    ]


def watch(client: subprocess.Popen[bytes], server: Running, seconds: int) -> list[float]:
    """Return the resident set of the server in MiB, once a second, until the client ends."""
    sizes: list[float] = []
    start = time.monotonic()
    while client.poll() is None:
        elapsed = time.monotonic() - start
        if elapsed > seconds + GRACE_SECONDS:
            client.kill()
            client.wait()
            raise RuntimeError(f"fio has not ended {GRACE_SECONDS} s after its time")
        try:
            sizes.append(memory_mib(server.pid)[0])
        except OSError:
            raise RuntimeError(f"the server is gone after {elapsed:.0f} s") from None
        if len(sizes) % 30 == 1:
            print(f"soak: {elapsed:4.0f} s, resident {sizes[-1]:.1f} MiB", flush=True)
        time.sleep(1)
    return sizes


def growth_mib(sizes: Sequence[float]) -> tuple[float, float]:
    """Return the median of the tenth after the warm-up (a fifth of the run) and that of the last tenth."""
    tenth = max(1, len(sizes) // 10)
    return statistics.median(sizes[2 * tenth : 3 * tenth] or sizes), statistics.median(sizes[-tenth:])


def soak(options: argparse.Namespace, fio: str, directory: Path) -> int:
    """Run the load and print the verdict; 0 is success."""
    image = directory / "soak.raw"
    with open(image, "wb") as file:
        file.truncate(options.clients * PART_MIB * 1024 * 1024)
    print(f"soak: {options.server}, {options.clients} clients, {options.seconds} s", flush=True)
    failures = []
    with running(SERVERS[options.server], image) as server, open(directory / "fio.log", "w+b") as log:
        idle = memory_mib(server.pid)[0]
        client = subprocess.Popen(fio_command(fio, server.socket, options), stdout=log, stderr=log)
        try:
            sizes = watch(client, server, options.seconds)
        except RuntimeError as error:
            failures.append(str(error))
            sizes = []
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
        if client.returncode != 0:
            log.seek(0)
            said = log.read().decode(errors="replace").strip()[-2000:]
            failures.append(f"fio ended with status {client.returncode}: {said}")
        if sizes:
            begin, end = growth_mib(sizes)
            print(
                f"soak: resident MiB: idle {idle:.1f}, after warm-up {begin:.1f}, at the end {end:.1f}, "
                f"most {max(sizes):.1f}; growth {end - begin:+.1f} of at most {options.growth_mib:g}"
            )
            if end - begin > options.growth_mib:
                failures.append(f"the server grew by {end - begin:.1f} MiB")
        server.process.terminate()
        try:
            status = server.process.wait(STOP_SECONDS)
            if status not in (0, -signal.SIGTERM):
                failures.append(f"the server ended with status {status}")
        except subprocess.TimeoutExpired:
            failures.append(f"the server has not ended {STOP_SECONDS} s after SIGTERM")
    for failure in failures:
        print(f"soak: FAILED: {failure}")
    if not failures:
        print("soak: passed")
    return 1 if failures else 0


def main(arguments: Sequence[str]) -> int:
    """Find the programs, and soak."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    fio = shutil.which("fio")
    try:
        SERVERS[options.server].find()
    except Unavailable as missing:
        print(f"soak: {options.server} {missing}", file=sys.stderr)
        return 1
    if fio is None:
        print("soak: needs fio (apt package fio)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="bh-soak-", dir=None) as directory:
        return soak(options, fio, Path(directory))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
