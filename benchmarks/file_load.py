# SPDX-License-Identifier: Apache-2.0
"""Random reads of a file for some seconds, by us or by a rival, in a process of their own.

    PYTHONPATH=src python3 -m benchmarks.file_load ours IMAGE SECONDS [--engine io_uring] [--direct]

Everybody reads the same places in the same order, 4 KiB each, 32 in flight, in the form that his own documentation
shows. ``ours`` is a load on the block layer, in lists; ``ours-asyncio`` is ``bottomhalf.open`` with a coroutine per
reader, as the rivals for asyncio are used. It prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import itertools
import json
import mmap
import os
import random
import resource
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

BLOCK: Final = 4096
DEPTH: Final = 32
PLACES: Final = 1 << 16  # random ones, then again from the first
PART: Final = 1 << 15  # reads between two looks at the clock


class Clock:
    """How long to go on, and what was used meanwhile: getting ready does not count."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def start(self) -> None:
        """Everything is ready."""
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._begin = time.monotonic()

    def runs(self) -> bool:
        """Whether to go on."""
        return time.monotonic() < self._begin + self._seconds

    def stop(self) -> None:
        """The last read has come back."""
        self.taken = time.monotonic() - self._begin
        usage, before = resource.getrusage(resource.RUSAGE_SELF), self._usage
        self.cpu = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime


def places(image: str) -> Iterator[int]:
    """Where to read, without end."""
    chance = random.Random(1)
    blocks = os.stat(image).st_size // BLOCK
    return itertools.cycle([chance.randrange(blocks) * BLOCK for _ in range(PLACES)])


def ours(image: str, clock: Clock, engine: str, direct: bool) -> int:
    """The block layer with a load on it."""
    from bottomhalf.aio import AioContext
    from bottomhalf.block import BlockBackend, Graph
    from bottomhalf.block.load import Load
    from bottomhalf.drivers.registry import open_node
    from bottomhalf.qapi.block import BlockdevOptions
    from bottomhalf.qapi.visit import from_json

    context = AioContext()
    context.engine_kind = engine
    graph = Graph(context)
    file = {"driver": "file", "filename": image, "cache": {"direct": direct}}
    node = open_node(graph, from_json(BlockdevOptions, {"driver": "raw", "read-only": True, "file": file}))
    node.monitor_owned = True
    backend = BlockBackend(graph)
    backend.insert(node)
    offsets = places(image)
    done = 0
    clock.start()
    while clock.runs():
        Load(backend, count=PART, depth=DEPTH, length=BLOCK, offsets=offsets).run()
        done += PART
    clock.stop()
    backend.close()
    graph.close()
    context.close()
    return done


def liburing(image: str, clock: Clock, engine: str, direct: bool) -> int:
    """The ring of the package liburing: what finished is collected, and as much submitted with one call."""
    package: Any = importlib.import_module("liburing")
    get_sqe, prep_read, ready = package.io_uring_get_sqe, package.io_uring_prep_read, package.io_uring_cq_ready
    submit_and_wait, wait, seen = package.io_uring_submit_and_wait, package.io_uring_wait_cqe, package.io_uring_cqe_seen
    fd = os.open(image, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    ring, entry = package.io_uring(), package.io_uring_cqe()
    package.io_uring_queue_init(2 * DEPTH, ring)
    offsets = places(image)
    memory = memoryview(mmap.mmap(-1, DEPTH * BLOCK))
    buffers = [memory[at : at + BLOCK] for at in range(0, DEPTH * BLOCK, BLOCK)]

    def start(slot: int) -> None:
        sqe = get_sqe(ring)
        prep_read(sqe, fd, buffers[slot], BLOCK, next(offsets))
        sqe.user_data = slot + 1  # not to be 0

    clock.start()
    for slot in range(DEPTH):
        start(slot)
    done = 0
    while clock.runs():
        for _ in range(PART // DEPTH):
            submit_and_wait(ring, 1)
            slots = []
            for _ in range(ready(ring)):  # io_uring_peek_batch_cqe() gives entries that cannot be looked at
                wait(ring, entry)
                if entry.res != BLOCK:
                    raise RuntimeError("a short read")
                slots.append(entry.user_data - 1)
                seen(ring, entry)
            for slot in slots:
                start(slot)
            done += len(slots)
    clock.stop()
    return done


Read = Callable[[int], Awaitable[object]]


async def _readers(read: Callable[[int], Read], image: str, clock: Clock) -> int:
    """DEPTH coroutines that read one block after the other."""
    offsets = places(image)
    done = 0

    async def reader(read: Read) -> None:
        nonlocal done
        while clock.runs():
            await read(next(offsets))
            done += 1

    readers = [reader(read(number)) for number in range(DEPTH)]
    clock.start()
    await asyncio.gather(*readers)
    clock.stop()
    return done


def ours_asyncio(image: str, clock: Clock, engine: str, direct: bool) -> int:
    """bottomhalf.open in asyncio."""
    import bottomhalf

    async def main() -> int:
        async with bottomhalf.open(image, read_only=True) as disk:
            return await _readers(lambda _: lambda offset: disk.pread(BLOCK, offset), image, clock)

    return asyncio.run(main())


def aiofile(image: str, clock: Clock, engine: str, direct: bool) -> int:
    """AIOFile.read."""
    module = importlib.import_module("aiofile")

    async def main() -> int:
        async with module.AIOFile(image, "rb") as file:
            return await _readers(lambda _: lambda offset: file.read(BLOCK, offset), image, clock)

    return asyncio.run(main())


def caio(image: str, clock: Clock, engine: str, direct: bool) -> int:
    """The context below aiofile, the one that it prefers here."""
    module = importlib.import_module("caio")

    async def main() -> int:
        fd = os.open(image, os.O_RDONLY)
        async with module.AsyncioContext() as context:
            return await _readers(lambda _: lambda offset: context.read(BLOCK, fd, offset), image, clock)

    return asyncio.run(main())


def aiofiles(image: str, clock: Clock, engine: str, direct: bool) -> int:
    """A file object per reader, since each has a position."""
    module: Any = importlib.import_module("aiofiles")

    async def main() -> int:
        files = [await module.open(image, "rb", buffering=0) for _ in range(DEPTH)]

        def reads(number: int) -> Read:
            file = files[number]

            async def read(offset: int) -> None:
                await file.seek(offset)
                await file.read(BLOCK)

            return read

        return await _readers(reads, image, clock)

    return asyncio.run(main())


CONTENDERS: Final[dict[str, Callable[[str, Clock, str, bool], int]]] = {
    "ours": ours,
    "ours-asyncio": ours_asyncio,
    "aiofile": aiofile,
    "caio": caio,
    "aiofiles": aiofiles,
    "liburing": liburing,
}


def main() -> None:
    """Read, and print what was done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.file_load")
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("image")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--direct", action="store_true")
    options = parser.parse_args()
    clock = Clock(options.seconds)
    done = CONTENDERS[options.contender](options.image, clock, options.engine, options.direct)
    print(json.dumps({"ops": done, "seconds": clock.taken, "cpu_seconds": clock.cpu}), flush=True)
    os._exit(0)  # some of the rivals' threads do not end by themselves


if __name__ == "__main__":
    main()
