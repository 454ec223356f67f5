# SPDX-License-Identifier: Apache-2.0
"""Driver ``file``: a regular file or block device of this host.

Reads whose bytes are in the page cache are served where they stand; the rest of a batch goes to the context's
engine with one system call. ``cache.direct=on`` (O_DIRECT) sends everything to the engine. The file's locks follow
the permissions of the graph, so that QEMU and we keep each other from spoiling an image.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Any

from bottomhalf.block import BlockError, Node
from bottomhalf.block.alignment import Aligner
from bottomhalf.block.errors import check
from bottomhalf.block.generations import Generations
from bottomhalf.host.protocol import AIO_ENGINES, PERM_ALL, File, ImageInUse
from bottomhalf.host.request import (
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    READ,
    WRITE,
    Request,
)

if TYPE_CHECKING:
    from bottomhalf.aio.io import ContextEngine
    from bottomhalf.block import Graph, Transaction


class FileNode(Node):
    """An image file. ``aio`` is "io_uring", "native", "threads", or None for what is best here."""

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
        aio: str | None = None,
    ) -> None:
        super().__init__(graph, name, read_only=read_only, unmap=unmap)
        self.filename = filename
        self._aio = aio
        self._engine_kind = "auto" if aio is None else AIO_ENGINES[aio]
        try:
            self.attach_context()
        except BaseException:
            graph.forget(self)
            raise
        self.no_flush = no_flush
        self.force_share = force_share
        self._locking = locking
        try:
            self.file = self._open(filename, auto_read_only, direct, locking)
        except BaseException:
            graph.forget(self)
            raise
        try:
            self.size = self.file.size()
        except BaseException:
            self.file.close()
            graph.forget(self)
            raise
        self._use(self.file)
        self._can_discard = True
        self._generations = Generations()

    @property
    def engine(self) -> ContextEngine:
        """What carries out the requests that cannot be served where they stand."""
        return self.context.engine_of(self._engine_kind)

    def attach_context(self) -> None:
        """Whoever asks for an engine by name learns at once if it is not to be had."""
        if self._aio is None:
            return
        try:
            self.context.engine_of(self._engine_kind)
        except OSError as error:
            raise BlockError(
                f"aio={self._aio} was specified, but it is not available here: {error.strerror}\n"
                "'bottomhalf doctor' tells what this machine allows, and the likely cause of each refusal."
            ) from error

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

    def _use(self, file: File) -> None:
        self.file = file
        self.request_alignment = file.alignment
        self.memory_alignment = file.memory_alignment
        self._aligner = Aligner(self, self._submit) if self.request_alignment > 1 else None

    def reopen(self, options: Any, transaction: Transaction) -> set[str]:
        """Another way to access the same file: opened beside the old one, which is closed when all have agreed."""
        cache = options.cache
        no_flush, self.no_flush = self.no_flush, bool(cache and cache.no_flush)
        transaction.add(abort=lambda: setattr(self, "no_flush", no_flush))
        direct = bool(cache and cache.direct)
        if (self.read_only, direct) != (self.file.read_only, self.file.direct):
            file = self._open(self.filename, bool(options.auto_read_only), direct, self._locking)
            transaction.add(abort=file.close, commit=partial(self._exchange, file))
        return set()

    def _exchange(self, file: File) -> None:
        file.take_locks(self.file)
        self.file.close()
        self._use(file)

    def open_size(self) -> int:
        return self.file.size()

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if self._aligner is not None and requests[0].op != FLUSH:
            return self._aligner.submit(requests)
        return self._submit(requests)

    def _submit(self, requests: list[Request]) -> list[Request]:
        """Take requests that are aligned."""
        op = requests[0].op
        if op not in (READ, FLUSH):
            self._generations.written += 1
        if op == READ:
            pending = self.file.read_inline(requests)
        elif op == WRITE:
            if self.no_flush:
                for request in requests:
                    request.flags &= ~FUA
            pending = self.file.write_inline(requests)
        elif op == FLUSH:
            if self.no_flush:
                return self.finish(requests, 0)
            pending = self._generations.flush(requests, self.engine.in_flight == 0)
        elif op == DISCARD and not (self.unmap and self._can_discard):
            return self.finish(requests, 0)
        else:
            return [request for request in requests if self.start(request, self._co_zero(request))]
        if pending:
            if op != FLUSH and not all(request.length for request in pending):
                self.finish([request for request in pending if not request.length], 0)
                pending = [request for request in pending if request.length]
            self.engine.submit(self.file, pending)
        return pending

    async def _co_zero(self, request: Request) -> None:
        """Discard or zero by fallocate. Where the file system cannot, a discard is done, for it was a hint, and
        zeroes are written unless the caller forbids that."""
        op, offset, length, flags = request.op, request.offset, request.length, request.flags
        if not length:
            return  # fallocate would refuse it
        sent = Request(op, offset, length, None, flags if self.unmap else flags & ~MAY_UNMAP)
        await self.engine.co_submit(self.file, sent)
        self._generations.written += 1  # now: a flush may have begun meanwhile
        if sent.result == -errno.ENOTSUP:
            if op == DISCARD:
                self._can_discard = False
                return
            if not flags & NO_FALLBACK:
                await self.write_zero_bytes(offset, length, flags, self._submit)
                return
        check(sent.result, self.filename)
        if flags & FUA:
            await self.co_flush()

    def block_status(self, offset: int, length: int) -> tuple[int, int]:
        return self.file.block_status(offset, length)

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        return (self.file, offset) if self.file.is_cached(offset, length) else None

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        return self.file.pread_nowait(length, offset)

    def map_reads(self, requests: list[Request], offsets: list[int]) -> File | None:
        return self.file if self.file.map_reads(requests, offsets) else None

    def allocated_size(self) -> int:
        return self.file.allocated_size()

    def prefetch(self, offset: int, length: int) -> None:
        self.file.prefetch(offset, length)

    async def co_truncate(self, size: int) -> None:
        self._generations.written += 1
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
