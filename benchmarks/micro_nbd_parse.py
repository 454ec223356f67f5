# SPDX-License-Identifier: Apache-2.0
"""How many nanoseconds one NBD request costs the server's parser, by batch size.

    PYTHONPATH=src python3 benchmarks/micro_nbd_parse.py

Prints the best of several rounds: 4 KiB reads parsed into pooled requests, the same with their replies laid
out in an arena (simple and structured), and 4 KiB writes with their payload. The budget at batch 32 is 200
ns for parsing a read (CPython 3.11).
"""

from __future__ import annotations

import platform
import struct
import time
from collections.abc import Callable

from bottomhalf.wire.nbd.batch import Batch
from bottomhalf.wire.nbd.export import ExportInfo, Negotiated
from bottomhalf.wire.nbd.replies import place_reads
from bottomhalf.wire.nbd.server_transmission import RequestParser

SIZE_BYTES = 1 << 30
BLOCK_BYTES = 4096
ROUNDS = 7
REQUESTS_PER_ROUND = 64_000


def requests(command: int, count: int) -> memoryview:
    payload = bytes(BLOCK_BYTES) if command == 1 else b""
    return memoryview(
        bytearray(
            b"".join(
                struct.pack(">IHHQQI", 0x25609513, 0, command, i, i * BLOCK_BYTES, BLOCK_BYTES) + payload
                for i in range(count)
            )
        )
    )


def best_ns(turn: Callable[[], None], count: int) -> float:
    turns = REQUESTS_PER_ROUND // count
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter_ns()
        for _ in range(turns):
            turn()
        best = min(best, (time.perf_counter_ns() - begin) / (turns * count))
    return best


def measure(count: int) -> list[float]:
    """Nanoseconds per request of a batch of ``count``: read, with simple reply, with structured reply,
    write."""
    info = ExportInfo("", SIZE_BYTES)
    parser = RequestParser(Negotiated(info, info.flags, True, {}, 1, b""))
    batch = Batch()
    reads, writes = requests(0, count), requests(1, count)
    arena = memoryview(bytearray(count * (28 + BLOCK_BYTES)))

    def parse(view: memoryview) -> None:
        batch.clear()
        parser.parse(view, 0, len(view), batch, 1024, 1 << 30)

    def read() -> None:
        parse(reads)
        parser.release(batch.reads)

    def simple() -> None:
        parse(reads)
        place_reads(batch.reads, arena, 0, 4096, False)
        parser.release(batch.reads)

    def structured() -> None:
        parse(reads)
        place_reads(batch.reads, arena, 0, 4096, True)
        parser.release(batch.reads)

    def write() -> None:
        parse(writes)
        parser.release(batch.writes)

    return [best_ns(turn, count) for turn in (read, simple, structured, write)]


def main() -> None:
    print(f"CPython {platform.python_version()}, ns per 4 KiB request, best of {ROUNDS}")
    print(f"{'batch':>6} {'read':>8} {'+simple':>8} {'+struct.':>8} {'write':>8}")
    for count in (1, 8, 32, 128):
        print(f"{count:>6} " + " ".join(f"{ns:>8.0f}" for ns in measure(count)))


if __name__ == "__main__":
    main()
