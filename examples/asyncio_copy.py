# SPDX-License-Identifier: Apache-2.0
"""Copy an image with asyncio, several blocks at a time, and leave holes out.

python asyncio_copy.py [SOURCE TARGET]      without arguments it makes a small image and copies that
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bottomhalf

BLOCK_BYTES = 256 << 10
WORKERS = 8


async def copy(source_path: Path, target_path: Path) -> tuple[int, int]:
    """Copy the source's data to a new target; (bytes copied, size)."""
    with open(target_path, "wb") as target_file:
        target_file.truncate(source_path.stat().st_size)
    async with (
        bottomhalf.open(source_path, read_only=True) as source,
        bottomhalf.open(target_path) as target,
    ):
        extents = await source.block_status()
        blocks = pieces(extents)
        copied = 0

        async def work() -> None:
            nonlocal copied
            for offset, length in blocks:  # one iterator for all workers: each block is taken once
                await target.pwrite(await source.pread(length, offset), offset)
                copied += length

        await asyncio.gather(*(work() for _ in range(WORKERS)))
        return copied, target.size


def pieces(extents: list[tuple[int, int, str]]) -> Iterator[tuple[int, int]]:
    """The extents that hold data, cut into blocks."""
    for offset, length, kind in extents:
        if kind == "data":
            for start in range(offset, offset + length, BLOCK_BYTES):
                yield start, min(BLOCK_BYTES, offset + length - start)


def main() -> None:
    if len(sys.argv) == 3:
        source, target = map(Path, sys.argv[1:])
        copied, size = asyncio.run(copy(source, target))
        print(f"{copied} of {size} bytes copied, the rest are holes")
        return
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.raw"), Path(folder, "target.raw")
        with open(source, "wb") as image:
            image.truncate(16 << 20)
            image.seek(4 << 20)
            image.write(b"bottomhalf " * 200_000)
        copied, size = asyncio.run(copy(source, target))
        same = "the same" if source.read_bytes() == target.read_bytes() else "DIFFERENT"
        print(f"{copied} of {size} bytes copied, the rest are holes; the copy is {same}")


if __name__ == "__main__":
    main()
