# SPDX-License-Identifier: Apache-2.0
"""Driver ``file``: a regular file of this host. (``host_device`` is derived from it.)

Reads whose bytes are in the page cache are served where they stand; the rest of a batch goes to the context's
engine with one system call. ``cache.direct=on`` (O_DIRECT) sends everything to the engine. The file's locks follow
the permissions of the graph, so that QEMU and we keep each other from spoiling an image.

With ``auto-read-only=on`` a file is open for reading alone as long as nobody above wants to write, and is opened for
writing too when somebody does: the node itself is never read-only because of it. (QEMU calls it dynamic.)

Ranges are copied from file to file inside the kernel. What it will not copy so is ENOTSUP, here as everywhere: then
the caller reads and writes.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from bottomhalf.block import BlockError, Node
from bottomhalf.block.alignment import Aligner
from bottomhalf.block.errors import check
from bottomhalf.block.generations import Generations
from bottomhalf.block.permissions import WRITING
from bottomhalf.block.resize import Preallocation
from bottomhalf.host.protocol import AIO_ENGINES, PERM_ALL, PERM_RESIZE, DeviceReadOnly, File, ImageInUse
from bottomhalf.host.request import (
    BLOCK_STATUS,
    COPY_RANGE,
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    READ,
    TRUNCATE,
    WRITE,
    Request,
)

if TYPE_CHECKING:
    from bottomhalf.aio.io import ContextEngine
    from bottomhalf.block import Graph, Transaction
    from bottomhalf.block.copying import CopyTo

_WRITERS: Final = WRITING | PERM_RESIZE  # whoever holds one of these needs a file that is open for writing


class DiscardCounts:
    """Discards that went to the file, and how they fared."""

    __slots__ = ("bytes_ok", "failed", "ok")

    def __init__(self) -> None:
        self.ok = self.failed = self.bytes_ok = 0

    def count(self, length_bytes: int, result: int) -> None:
        if result:
            self.failed += 1
        else:
            self.ok += 1
            self.bytes_ok += length_bytes


class FileNode(Node):
    """An image file. ``aio`` is "io_uring", "native", "threads", or None for what is best here."""

    driver = "file"
    is_protocol = True
    is_device: ClassVar[bool] = False

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
        batch_max: int = 0,
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
        self._auto_read_only = auto_read_only
        self._batch_max = batch_max
        try:
            self.file = self._open(read_only or auto_read_only, direct)
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
        self.discards = DiscardCounts()

    def describe(self) -> str:
        """Made-up names tell nobody which file it is."""
        told = super().describe()
        return f"{told} ({self.filename})" if self.name.startswith("#") else told

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

    def _open(self, read_only: bool, direct: bool) -> File:
        filename, host = self.filename, self.graph.context.host
        try:
            file = host.open_file(filename, read_only=read_only, direct=direct, locking=self._locking)
        except OSError as error:
            raise self._cannot_open(error, direct) from error
        if file.is_device != self.is_device:
            file.close()
            raise BlockError(self.wrong_kind(""))
        return file

    def wrong_kind(self, what: str) -> str:
        """What is said of a name that leads to something else (``what``, if that is known)."""
        return f"'file' driver requires '{self.filename}' to be a regular file"

    def _cannot_open(self, error: OSError, direct: bool) -> BlockError:
        reason = error.strerror
        if isinstance(error, DeviceReadOnly):
            return BlockError(f"The device is not writable: {reason}")
        if error.errno == errno.ENOTBLK:
            return BlockError(self.wrong_kind(error.strerror or ""))
        if direct and error.errno == errno.EINVAL:
            reason = "the file system does not support O_DIRECT (cache.direct=on)"
        return BlockError(f"Could not open '{self.filename}': {reason}")

    def _use(self, file: File) -> None:
        self.file = file
        self.request_alignment = file.alignment
        self.memory_alignment = file.memory_alignment
        self._aligner = Aligner(self, self._submit) if self.request_alignment > 1 else None
        self._door = self._submit if self._aligner is None else self._aligner.submit

    def reopen(self, options: Any, transaction: Transaction) -> set[str]:
        """Another way to access the same file: opened beside the old one, which is closed when all have agreed."""
        cache = options.cache
        no_flush, self.no_flush = self.no_flush, bool(cache and cache.no_flush)
        transaction.add(abort=lambda: setattr(self, "no_flush", no_flush))
        direct = bool(cache and cache.direct)
        auto, self._auto_read_only = self._auto_read_only, bool(options.auto_read_only)
        transaction.add(abort=lambda: setattr(self, "_auto_read_only", auto))
        writes = not self.read_only and (not self._auto_read_only or bool(self.permissions[0] & _WRITERS))
        if (not writes, direct) != (self.file.read_only, self.file.direct):
            file = self._open(not writes, direct)
            transaction.add(abort=file.close, commit=partial(self._exchange, file))
        return set()

    def _exchange(self, file: File) -> None:
        file.take_locks(self.file)
        self.file.close()
        self._use(file)

    def open_size(self) -> int:
        return self.file.size()

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if requests[0].op != FLUSH:
            return self._door(requests)
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
            if op != FLUSH and 0 in [request.length for request in pending]:
                self.finish([request for request in pending if not request.length], 0)
                pending = [request for request in pending if request.length]
            self.engine.submit(self.file, pending, self._batch_max)
        return pending

    async def _co_zero(self, request: Request) -> None:
        """Discard or zero by fallocate. Where the file system cannot, a discard is done, for it was a hint, and
        zeroes are written unless the caller forbids that."""
        op, offset, length, flags = request.op, request.offset, request.length, request.flags
        if not length:
            return  # fallocate would refuse it
        sent = Request(op, offset, length, None, flags if self.unmap else flags & ~MAY_UNMAP)
        await self.engine.co_submit(self.file, sent)
        if op == DISCARD:
            self.discards.count(length, sent.result)
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

    def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
        return None if self.file.status_waits else self.file.block_status(offset, length)

    async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        if not self.file.status_waits:
            return self.file.block_status(offset, length)
        answer: list[int] = []
        await self._co_errand(Request(BLOCK_STATUS, offset, length, answer))
        bits, count = answer
        return bits, count

    async def _co_errand(self, request: Request) -> None:
        await self.engine.co_submit(self.file, request)
        check(request.result, self.filename)

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

    async def co_grow(self, size: int, preallocation: Preallocation) -> None:
        try:
            await self._co_errand(Request(TRUNCATE, size, 0, str(preallocation)))
        finally:
            self._generations.written += 1
            self.refresh_size()

    async def co_copy_range_from(self, offset: int, length: int, to: CopyTo) -> None:
        await to(self.file, offset)

    async def co_copy_range_to(self, offset: int, length: int, file: File, file_offset: int, flags: int) -> None:
        """Copy inside the kernel; ENOTSUP if it cannot, and for a range that would have to be read to be written."""
        if self._aligner is None:
            await self._co_copy_range(offset, length, file, file_offset, flags)
        else:
            async with self._aligner.passage(offset, length):
                await self._co_copy_range(offset, length, file, file_offset, flags)

    async def _co_copy_range(self, offset: int, length: int, file: File, file_offset: int, flags: int) -> None:
        if type(file) is not type(self.file):
            raise OSError(errno.ENOTSUP, "the source is a file of another host", self.filename)
        request = Request(COPY_RANGE, offset, length, (file, file_offset), 0 if self.no_flush else flags & FUA)
        try:
            await self._co_errand(request)
        finally:
            self._generations.written += 1

    def apply_permissions(self, held: int, shared: int) -> None:
        """Open the file accordingly, and lock it. With force-share others may do whatever they like meanwhile."""
        file, writers = self.file, bool(held & _WRITERS)
        opened = writers and self._auto_read_only and file.read_only and not self.read_only
        if opened:
            try:
                file.set_read_only(False)
            except OSError as error:
                raise self._cannot_open(error, file.direct) from error
        try:
            self._lock(held, shared)
        except BlockError:
            if opened:
                self._close_for_writing()
            raise
        if self._auto_read_only and not file.read_only and not writers:
            self._close_for_writing()

    def _close_for_writing(self) -> None:
        try:
            self.file.set_read_only(True)
        except OSError:
            pass  # then it stays open for writing, and nobody writes

    def _lock(self, held: int, shared: int) -> None:
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
