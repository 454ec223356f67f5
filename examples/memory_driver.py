# SPDX-License-Identifier: Apache-2.0
"""A disk in memory: ``python memory_driver.py`` tries it; with arguments this is a storage daemon that has it."""

from __future__ import annotations

import sys
from typing import Annotated

import bottomhalf
from bottomhalf.block import Node
from bottomhalf.drivers.registry import Opening, register_driver
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.types import Doc, Size, Struct
from bottomhalf.tools import bh_storage_daemon


class MemoryOptions(Struct):
    """A disk that lives as long as the program."""
    size: Annotated[Size, Doc("bytes")]


class Memory(Node):
    driver = "memory"
    def __init__(self, opening: Opening) -> None:
        self.content = bytearray(opening.branch.size)
        super().__init__(opening.graph, **opening.common)
        self.size = len(self.content)

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.content[offset : offset + len(buffer)] = buffer

    async def co_flush(self) -> None: ...  # nothing here is safer than anything else

    async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.write_zero_bytes(offset, length, flags)


BlockdevOptions.register_branch("memory", MemoryOptions)
register_driver("memory", Memory)

if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(bh_storage_daemon.main())
    with bottomhalf.open({"driver": "memory", "size": 1 << 20}) as disk:
        disk.pwrite(b"hello", 4096)
        print(f"{disk.size} bytes, at 4096: {disk.pread(5, 4096)!r}")
