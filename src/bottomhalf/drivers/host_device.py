# SPDX-License-Identifier: Apache-2.0
"""Driver ``host_device``: a block device of this host.

It is a file with these differences. Its size is the device's, and nobody changes that here. It has no holes: all of it
is data. Discards and zeroes are ioctls on whole blocks, also where reads and writes may begin anywhere (through the
page cache), so they are cut: what does not fit is written as zero bytes, or left if it was a discard. Nothing is copied
in the kernel, for copy_file_range(2) knows files only.

Image locks are taken on the device's node, as QEMU does.
"""

from __future__ import annotations

import errno
from typing import ClassVar

from bottomhalf.block.limits import RequestLimits, Splitter
from bottomhalf.block.resize import Preallocation
from bottomhalf.drivers.file import FileNode
from bottomhalf.host.protocol import CHARACTER_DEVICE, File
from bottomhalf.host.request import DISCARD, NO_FALLBACK, Request


class HostDeviceNode(FileNode):
    """A block device. The arguments are those of FileNode."""

    driver = "host_device"
    is_device: ClassVar[bool] = True

    def _use(self, file: File) -> None:
        super()._use(file)
        limits = file.device_limits()
        assert limits is not None
        self._block = limits.logical_block
        if self._aligner is None:  # else all is in whole blocks already
            cut = RequestLimits(zeroes_alignment=self._block, discard_alignment=self._block)
            self._door = Splitter(self, self._submit, cut).submit

    def wrong_kind(self, what: str) -> str:
        if what == CHARACTER_DEVICE:
            return f"Could not open '{self.filename}': {what}"
        return f"'host_device' driver requires '{self.filename}' to be either a character or block device"

    async def _co_zero(self, request: Request) -> None:
        """What is no range of whole blocks is not worth asking the device for, and its refusal would say nothing."""
        if not (request.offset | request.length) & (self._block - 1):
            await super()._co_zero(request)
        elif request.op != DISCARD:
            if request.flags & NO_FALLBACK:
                raise OSError(errno.ENOTSUP, "the range would have to be written", self.filename)
            await self.write_zero_bytes(request.offset, request.length, request.flags, self._submit)

    async def co_truncate(self, size: int) -> None:
        """Nobody can; but it may be asked for the size that it has."""
        if size != self.file.size():
            raise OSError(errno.ENOTSUP, "Cannot resize device files", self.filename)

    async def co_grow(self, size: int, preallocation: Preallocation) -> None:
        text = f"Preallocation mode '{preallocation}' unsupported for this non-regular file"
        raise OSError(errno.ENOTSUP, text, self.filename)

    async def co_copy_range_to(self, offset: int, length: int, file: File, file_offset: int, flags: int) -> None:
        raise OSError(errno.ENOTSUP, "the kernel copies ranges of files alone", self.filename)
