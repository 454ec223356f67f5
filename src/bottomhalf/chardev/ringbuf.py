# SPDX-License-Identifier: Apache-2.0
"""A device that keeps the last bytes that were written to it, to be read by a command."""

from __future__ import annotations

from typing import Final

from bottomhalf.aio import AioContext
from bottomhalf.chardev.base import Chardev
from bottomhalf.qapi.errors import OptionError

SIZE_DEFAULT: Final = 65536
SIZE_MAX: Final = 1 << 30


class RingbufChardev(Chardev):
    """The newest ``size`` bytes."""

    movable = False

    def __init__(self, chardev_id: str, context: AioContext, kind: str, size: int | None) -> None:
        super().__init__(chardev_id, context)
        self.kind = kind  # type: ignore[misc]  # "memory" is its other name
        self.size = SIZE_DEFAULT if size is None else size
        if self.size <= 0 or self.size & (self.size - 1):
            raise OptionError("size of ringbuf chardev must be power of two", key="size")
        if self.size > SIZE_MAX:
            raise OptionError(f"size of ringbuf chardev must be at most {SIZE_MAX}", key="size")
        self._kept = bytearray()

    def write(self, data: bytes) -> None:
        if self.log_stream is not None:
            self._log(data)
        self._kept += data
        if len(self._kept) > self.size:
            del self._kept[: len(self._kept) - self.size]

    def read(self, count: int) -> bytes:
        """Take the oldest ``count`` bytes, or all."""
        taken = bytes(self._kept[:count])
        del self._kept[:count]
        return taken
