# SPDX-License-Identifier: Apache-2.0
"""Driver ``file``: a regular file or block device of this host.

Reads whose bytes are in the page cache are served where they stand; the rest of a batch goes to the context's
engine with one system call. ``cache.direct=on`` (O_DIRECT) sends everything to the engine. The file's locks follow
the permissions of the graph, so that QEMU and we keep each other from spoiling an image.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from bottomhalf.block import BlockError, Node
from bottomhalf.block.errors import check
from bottomhalf.host.protocol import PERM_ALL, File, ImageInUse
from bottomhalf.host.request import (
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)

if TYPE_CHECKING:
    from bottomhalf.block import Graph


class FileNode(Node):
    """An image file. ``aio`` is io_uring, threads or None for what is best here."""

    driver = "file"
    is_protocol = True

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        filename: str,
        read_only: bool = False,
        auto_read_only: bool = False,
        direct: bool = False,
        no_flush: bool = False,
        locking: str = "auto",
        force_share: bool = False,
        unmap: bool = False,
    ) -> None:
        super().__init__(graph, name, read_only=read_only, unmap=unmap)
        self.filename = filename
        self.no_flush = no_flush
        self.force_share = force_share
        try:
            self.file = self._open(filename, auto_read_only, direct, locking)
        except BaseException:
            graph.forget(self)
            raise
        self.request_alignment = self.file.alignment
        self.memory_alignment = self.file.memory_alignment
        self.size = self.file.size()

    def _open(self, filename: str, auto_read_only: bool, direct: bool, locking: str) -> File:
        host = self.graph.context.host
        try:
            return host.open_file(filename, read_only=self.read_only, direct=direct, locking=locking)
        except OSError as error:
            if auto_read_only and not self.read_only and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
                self.read_only = True
                return self._open(filename, False, direct, locking)
            reason = error.strerror
            if direct and error.errno == errno.EINVAL:
                reason = "the file system does not support O_DIRECT (cache.direct=on)"
            raise BlockError(f"Could not open '{filename}': {reason}") from error

    def open_size(self) -> int:
        return self.file.size()

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        op = requests[0].op
        if op == READ:
            pending = self.file.read_inline(requests)
        elif op == WRITE:
            pending = self.file.write_inline(requests)
        elif op == DISCARD and not self.unmap:
            return self.finish(requests, 0)
        elif op == FLUSH and self.no_flush:
            return self.finish(requests, 0)
        elif op in (FLUSH, DISCARD):
            pending = requests
        else:
            return super().submit_batch(requests)
        if pending:
            self.context.engine.submit(self.file, pending)
        return pending

    async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Zero by fallocate; where the file system cannot, with zero bytes unless the caller forbids that."""
        request = Request(WRITE_ZEROES, offset, length, None, flags if self.unmap else flags & ~MAY_UNMAP)
        await self.context.engine.co_submit(self.file, request)
        if request.result == -errno.ENOTSUP and not flags & NO_FALLBACK:
            await self.write_zero_bytes(offset, length, flags)
            return
        check(request.result, self.filename)
        if flags & FUA:
            await self.co_flush()

    def block_status(self, offset: int, length: int) -> tuple[int, int]:
        return self.file.block_status(offset, length)

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        return (self.file, offset) if self.file.is_cached(offset, length) else None

    def allocated_size(self) -> int:
        return self.file.allocated_size()

    def prefetch(self, offset: int, length: int) -> None:
        self.file.prefetch(offset, length)

    async def co_truncate(self, size: int) -> None:
        self.file.truncate(size)
        self.refresh_size()

    def apply_permissions(self, held: int, shared: int) -> None:
        """Lock the file accordingly. With force-share others may do whatever they like meanwhile."""
        try:
            self.file.set_permissions(held, PERM_ALL if self.force_share else shared)
        except ImageInUse as error:
            refused, _, holder = str(error.strerror).partition(": ")
            text = f"{refused}\nIs another process using the image [{self.filename}]?"
            raise BlockError(f"{text}\n{holder[:1].upper()}{holder[1:]}." if holder else text) from error
        except OSError as error:
            raise BlockError(f"Could not lock '{self.filename}' (locking=on): {error.strerror}") from error

    def close(self) -> None:
        self.file.close()
