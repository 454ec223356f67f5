# SPDX-License-Identifier: Apache-2.0
"""The driver ``qcow2``.

A batch is looked up where it stands: what lies in one piece, in tables that are in memory, goes on to the file as one
list, with the offsets of the host; what reads as zeroes is done at once; what the backing file has goes there as a
list. The rest, which has to read tables, unpack, allocate or copy, becomes coroutines; the writes of a batch share one.

Clause: all of them meet here.
Invariant: in batches or one by one, alone or at the same time: the bytes are those of a plain array.
Test: tests/drivers/qcow2/test_model.py
"""

from __future__ import annotations

import errno
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio import run_in
from bottomhalf.block import BlockError, ImageError, Node
from bottomhalf.block.alignment import Aligner
from bottomhalf.block.edge import ROLE_COW, ROLE_DATA, ROLE_IMAGE
from bottomhalf.block.node import co_io
from bottomhalf.block.written import fits_in
from bottomhalf.block.zeroes import fill_zeroes
from bottomhalf.drivers.qcow2 import layout, opening, resizing, vmstate
from bottomhalf.drivers.qcow2.check import CheckResult, co_check
from bottomhalf.drivers.qcow2.cleaning import Cleaner
from bottomhalf.drivers.qcow2.direct import DirectReads
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.keeping import KeptBitmaps
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from bottomhalf.drivers.qcow2.layout import ZERO as ZERO_FLAG
from bottomhalf.drivers.qcow2.metadata import Metadata
from bottomhalf.drivers.qcow2.reading import Reader
from bottomhalf.drivers.qcow2.runtime import CHANGEABLE, Settings
from bottomhalf.drivers.qcow2.snapshotting import Snapshots
from bottomhalf.drivers.qcow2.squeezing import Squeezer
from bottomhalf.drivers.qcow2.tables import DATA, SQUEEZED, UNALLOCATED
from bottomhalf.drivers.qcow2.together import Passage
from bottomhalf.drivers.qcow2.trouble import Trouble
from bottomhalf.drivers.qcow2.writing import Writer
from bottomhalf.host import protocol
from bottomhalf.host.request import COMPRESSED as COMPRESS
from bottomhalf.host.request import (
    DISCARD,
    FLUSH,
    FUA,
    IN_PROGRESS,
    MAY_UNMAP,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
    deliver,
)

if TYPE_CHECKING:
    from bottomhalf.block import Graph
    from bottomhalf.block.resize import Preallocation
    from bottomhalf.block.transaction import Transaction
    from bottomhalf.drivers.luks.ciphers import SectorCipher
    from bottomhalf.drivers.luks.crypting import CryptFile

_NOT_PLAIN: Final = COMPRESSED | ZERO_FLAG
_SPECIAL: Final = FUA | COMPRESS


async def co_read_header(file: Node) -> Header:
    """The header of the image that a node holds. OSError, ImageError."""
    head = bytearray(min(512, file.size))
    await file.co_pread(0, memoryview(head))
    bits = Header.cluster_bits_of(bytes(head))
    head = bytearray(min(1 << bits, file.size))
    await file.co_pread(0, memoryview(head))
    return Header.parse(bytes(head))


class Qcow2Node(DirectReads):
    """A qcow2 image in ``file``. ``backing`` is what unallocated clusters read from; None: zeroes. ``data_file`` holds
    the guest's data, if the image says that they are in another file.

    Made with a header that was read already; ``open()`` has to follow before the first request."""

    driver = "qcow2"
    supports_backing = True
    handles_fua = True
    preallocates_metadata = True

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        file: Node,
        header: Header,
        backing: Node | None = None,
        data_file: Node | None = None,
        read_only: bool = False,
        unmap: bool = False,
        cipher: SectorCipher | None = None,
    ) -> None:
        super().__init__(graph, name, read_only=read_only, unmap=unmap)
        self._file = self.attach(file, "file", ROLE_IMAGE if data_file is None else ROLE_IMAGE & ~ROLE_DATA)
        self._data = self._file if data_file is None else self.attach(data_file, "data-file", ROLE_DATA)
        if backing is not None:
            self.attach(backing, "backing", ROLE_COW)
        self.crypt: CryptFile | None = None  # what encrypts the guest's data, if something does
        self._aligner: Aligner | None = None
        if cipher is not None:
            from bottomhalf.drivers.luks.crypting import CryptFile

            by_guest = header.crypt_method == layout.CRYPT_AES
            self.crypt = CryptFile(lambda: self._data.node, cipher, by_guest=by_guest)
            self.request_alignment = layout.SECTOR_BYTES
            self._aligner = Aligner(self, self._submit_by_guest if by_guest else self._submit)
        self.refresh_limits()
        self._begin_with(header)

    def _begin_with(self, header: Header) -> None:
        """Nothing is known of the image but its header."""
        self.header = header
        self.metadata = Metadata(
            lambda: self._file.node, header, None if self._data is self._file else lambda: self._data.node
        )
        self.mapping = self.metadata.mapping
        self.writer = Writer(self)
        self._squeezer = Squeezer(self, self.writer)
        self._trouble = Trouble(self)
        self._cleaner = Cleaner(self)
        self.reader = Reader(self)
        self.bitmap_keeper: KeptBitmaps = KeptBitmaps(self, self._guarded)
        self.size = header.size

    async def open(self) -> None:
        """Read the tables that are always in memory. OSError, ImageError. BlockError for what cannot be done yet."""
        header = self.header
        if header.crypt_method and self.crypt is None:
            raise BlockError("Parameter 'encrypt.key-secret' is required for cipher")
        if header.external and self._data is self._file:
            raise BlockError("'data-file' is required for this image")
        if not header.external and self._data is not self._file:
            raise BlockError("'data-file' can only be set for images with an external data file")
        writable = self.active and not self.read_only
        if writable:
            await opening.co_make_writable(self)
        await self.metadata.open()
        await self.bitmap_keeper.load()
        if writable and opening.clear_unknown(self):
            await self._co_commit()
        await self.bitmap_keeper.co_begin_writing()

    # -- the shape of the node ----------------------------------------------------------------------------------

    @property
    def file(self) -> Node:
        return self._file.node

    @property
    def data(self) -> Node:
        """What holds the guest's data: the image's file, or one of their own."""
        return self._data.node

    @property
    def backing(self) -> Node | None:
        return next((edge.node for edge in self.children if edge.name == "backing"), None)

    def refresh_limits(self) -> None:
        self.memory_alignment = max(self.file.memory_alignment, self.data.memory_alignment)

    def open_size(self) -> int:
        return self.header.size

    def allocated_size(self) -> int | None:
        sizes = {edge: edge.node.allocated_size() for edge in (self._file, self._data)}.values()
        return None if None in sizes else sum(size or 0 for size in sizes)

    # -- batches ------------------------------------------------------------------------------------------------

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if self._aligner is not None and requests[0].op != FLUSH:
            return self._aligner.submit(requests)
        return self._submit(requests)

    def _submit(self, requests: list[Request]) -> list[Request]:
        op = requests[0].op
        if op == READ:
            return self._read(requests)
        if op == WRITE:
            return self._write(requests)
        if op == FLUSH and not self.metadata.dirty and not self.mapping.external:
            return self.file.submit_batch(requests)
        if op == DISCARD and not self.unmap:
            return self.finish(requests, 0)
        return [request for request in requests if self.start(request, self._guarded(self._co_change(request)))]

    def _submit_by_guest(self, requests: list[Request]) -> list[Request]:
        """Where vectors depend on the guest's offsets, nothing goes on to the file with the host's."""
        op = requests[0].op
        if op == READ:
            return [r for r in requests if self.start(r, self._guarded(self.co_pread(r.offset, r.buffer)))]
        return self._write_slowly(requests) if op == WRITE else self._submit(requests)

    async def _co_change(self, request: Request) -> None:
        """Serve a flush, a discard or a zero write, which is aligned."""
        op = request.op
        if op == FLUSH:
            await self.co_flush()
        elif op == DISCARD:
            await self.writer.co_zero(request.offset, request.length, unmap=True, discard=True)
        else:
            await self._co_zero(request.offset, request.length, request.flags)

    async def _guarded(self, body: Any) -> Any:
        """Damage that is found on the way is an I/O error to whoever asked."""
        try:
            return await body
        except ImageError as error:
            await self._trouble.co_found(error)
            raise OSError(errno.EIO, str(error), self.name) from error

    def _read(self, requests: list[Request]) -> list[Request]:
        metadata, mapping, backing = self.metadata, self.mapping, self.backing
        l2, l1_shift, bits, mask = metadata.l2, mapping.l1_shift, mapping.cluster_bits, mapping.cluster_mask
        tick = metadata.tick
        last, limit, plain, file_size = mapping.entries - 1, mapping.cluster_size, not mapping.extended, self.data.size
        mapped: list[Request] = []
        below: list[Request] = []
        slow: list[Request] = []
        for request in requests:
            offset, length = request.offset, request.length
            table = l2.get(offset >> l1_shift)
            inside = offset & mask
            if plain and table is not None and inside + length <= limit:
                table.used = tick
                entry = table.entries[offset >> bits & last]
                host = entry & OFFSET_MASK
                if host and not entry & _NOT_PLAIN:
                    host += inside
                    if host + length <= file_size and not host - inside & mask:
                        request.offset = host
                        mapped.append(request)
                        continue
            run = self._one_run(offset, length)
            if run is None:
                slow.append(request)
            elif run.kind == DATA:
                if run.host + length <= file_size:
                    request.offset = run.host
                    mapped.append(request)
                else:
                    slow.append(request)
            elif run.kind == UNALLOCATED and backing is not None:
                if offset + length <= backing.size:
                    below.append(request)
                else:
                    slow.append(request)
            else:
                fill_zeroes(request.buffer)
                request.result = 0
        pending: list[Request] = []
        if mapped:
            pending = self._pass(mapped)
        if below:
            assert backing is not None
            pending = pending + backing.submit_batch(below)
        for request in slow:
            if self.start(request, self._guarded(self.co_pread(request.offset, request.buffer))):
                pending.append(request)
        return pending

    def _pass(self, mapped: list[Request]) -> list[Request]:
        """Send requests with the host's offsets to the file."""
        if self.graph.debugged:
            self.file.debug_event("read_aio" if mapped[0].op == READ else "write_aio")
        pending = (self.crypt or self._data.node).submit_batch(mapped)
        if pending:
            metadata = self.metadata
            epoch = metadata.begin(len(pending))
            passage = metadata.passage
            for request in pending:
                if passage is None or request.owner is not passage.owner or passage.epoch != epoch:
                    passage = metadata.passage = Passage(metadata, epoch, request.owner)
                request.owner = passage
        return pending

    def _write(self, requests: list[Request]) -> list[Request]:
        metadata, mapping = self.metadata, self.mapping
        l2, l1, l1_shift = metadata.l2, metadata.l1, mapping.l1_shift
        bits, mask, last, limit = mapping.cluster_bits, mapping.cluster_mask, mapping.entries - 1, mapping.cluster_size
        extended, tick, data = mapping.extended, metadata.tick, self.data
        known = data.noted if data.noted <= data.size else data.size
        mapped: list[Request] = []
        slow: list[Request] = []
        for request in requests:
            offset, length = request.offset, request.length
            index = offset >> l1_shift
            table = l2.get(index)
            inside = offset & mask
            if table is not None and inside + length <= limit and l1[index] & COPIED and length and table.checked:
                table.used = tick
                host = 0
                if extended:
                    run = self._one_run(offset, length)
                    entry = table.entries[2 * (offset >> bits & last)]
                    if run is not None and run.kind == DATA and entry & COPIED:
                        host = run.host
                else:
                    entry = table.entries[offset >> bits & last]
                    if entry & COPIED and entry & OFFSET_MASK and not entry & _NOT_PLAIN:
                        host = (entry & OFFSET_MASK) + inside
                fits = host and not (host - inside) & mask
                flags = request.flags
                if fits and not (flags & _SPECIAL and (flags & COMPRESS or metadata.dirty)) and (
                    host + length <= known or fits_in(data, host + length)
                ):
                    request.offset = host
                    mapped.append(request)
                    continue
            slow.append(request)
        pending = self._pass(mapped) if mapped else []
        return pending + self._write_slowly(slow) if slow else pending

    def _write_slowly(self, requests: list[Request]) -> list[Request]:
        pending: list[Request] = []
        squeezed = [request for request in requests if request.flags & COMPRESS]
        if squeezed:
            requests = [request for request in requests if not request.flags & COMPRESS]
            pending = [r for r in squeezed if self.start(r, self._guarded(self._squeezer.co_serve(r)))]
        return pending + self._start_writes(requests) if requests else pending

    def _start_writes(self, requests: list[Request]) -> list[Request]:
        """Enter one coroutine for writes that have to allocate or to look up; those that it has not finished."""
        submitting = True

        async def serve() -> None:
            result = 0
            try:
                await self._guarded(self.writer.co_write(requests))
            except OSError as error:
                result = -(error.errno or errno.EIO)
            except BaseException:
                result = -errno.EIO
                raise
            finally:
                for request in requests:
                    if request.result == IN_PROGRESS:
                        request.result = result
                if not submitting:
                    deliver(requests)

        self.context.enter(serve())
        submitting = False
        return [] if requests[0].result != IN_PROGRESS else requests

    # -- coroutines ---------------------------------------------------------------------------------------------

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        """Read any range, through tables that may have to be read first."""
        if self.crypt is not None and (offset | len(buffer)) & (layout.SECTOR_BYTES - 1):
            await co_io(self, READ, offset, len(buffer), buffer, 0)  # comes back in whole sectors
            return
        await self.reader.co_read(offset, buffer)

    @property
    def can_compress(self) -> bool:
        return not self.mapping.external and self.crypt is None

    async def co_pwritev_compressed(self, offset: int, length: int, buffer: memoryview, pos: int = 0) -> None:
        """Store ``buffer[pos:pos + length]`` compressed: whole clusters, the disk's last one may be less. OSError."""
        await self._guarded(self._squeezer.co_write(offset, buffer[pos : pos + length]))

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        if flags & COMPRESS:
            await self.co_pwritev_compressed(offset, len(buffer), buffer)
            if flags & FUA:
                await self.co_flush()
            return
        if self.crypt is not None:
            await co_io(self, WRITE, offset, len(buffer), buffer, flags)
            return
        await self._guarded(self.writer.co_write([Request(WRITE, offset, len(buffer), buffer, flags)]))

    async def co_flush(self) -> None:
        await self._guarded(self._co_commit())

    async def _co_commit(self) -> None:
        async with self.metadata.lock:
            await self.metadata.commit()

    async def co_discard(self, offset: int, length: int) -> None:
        if self.crypt is not None:
            await co_io(self, DISCARD, offset, length, None, 0)
            return
        await self._guarded(self.writer.co_zero(offset, length, unmap=True, discard=True))

    async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if self.crypt is not None:
            await co_io(self, WRITE_ZEROES, offset, length, None, flags)
            return
        await self._co_zero(offset, length, flags)

    async def _co_zero(self, offset: int, length: int, flags: int) -> None:
        unmap = bool(flags & MAY_UNMAP and self.unmap)
        await self._guarded(self.writer.co_zero(offset, length, unmap=unmap, discard=False))
        if flags & FUA:
            await self.co_flush()

    async def co_check(self) -> CheckResult:
        """As check.co_check(): what is written, after what was only in memory is."""
        async with self.metadata.lock:
            await self.metadata.commit(counters=True)
            return await co_check(self.file, self.header)

    async def co_save_vmstate(self, offset: int, buffer: memoryview) -> None:
        await self._guarded(vmstate.co_save(self, offset, buffer))

    async def co_load_vmstate(self, offset: int, buffer: memoryview) -> None:
        await self._guarded(vmstate.co_load(self, offset, buffer))

    @property
    def snapshots(self) -> Snapshots:
        """The image's snapshots; changed in a drained section."""
        return Snapshots(self)

    async def co_truncate(self, size: int) -> None:
        await self._guarded(resizing.co_truncate(self, size))

    async def co_grow(self, size: int, preallocation: Preallocation) -> None:
        await self._guarded(resizing.co_truncate(self, size, str(preallocation)))

    # -- what is where ------------------------------------------------------------------------------------------

    def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
        return None

    async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        status: tuple[int, int] = await self._guarded(self._co_block_status(offset, length))
        return status

    async def _co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        bits = count = 0
        for run in await self.metadata.runs(offset, length):
            found, covered = protocol.ZERO, run.length
            if run.kind in (DATA, SQUEEZED):
                found = protocol.DATA
            elif run.kind == UNALLOCATED and self.backing is not None and offset + count < self.backing.size:
                covered = min(covered, self.backing.size - offset - count)
                found, covered = await self.backing.co_block_status(offset + count, covered)
            if count and found != bits:
                break
            bits, count = found, count + covered
            if covered < run.length:
                break
        return bits, count

    @property
    def cluster_bytes(self) -> int:
        return self.mapping.cluster_size

    @property
    def has_backing(self) -> bool:
        return self.backing is not None

    def is_allocated(self, offset: int, length: int, bottom: Node | None = None) -> tuple[bool, int] | None:
        return None

    async def co_is_allocated(self, offset: int, length: int, bottom: Node | None = None) -> tuple[bool, int]:
        found: tuple[bool, int] = await self._guarded(self._co_is_allocated(offset, length))
        allocated, count = found
        backing = self.backing
        if allocated or bottom is None or bottom is self or backing is None or offset >= backing.size:
            return allocated, count
        return await backing.co_is_allocated(offset, min(count, backing.size - offset), bottom)

    async def _co_is_allocated(self, offset: int, length: int) -> tuple[bool, int]:
        runs = await self.metadata.runs(offset, length)
        allocated = runs[0].kind != UNALLOCATED
        alike = takewhile(lambda run: (run.kind != UNALLOCATED) == allocated, runs)
        return allocated, sum(run.length for run in alike)

    # -- the end ------------------------------------------------------------------------------------------------

    async def co_inactivate(self) -> None:
        self.metadata.let_go()
        settings = self.metadata.settings
        try:
            await self._co_write_all()
            self.bitmap_keeper.release()
        finally:
            self.metadata.settings = settings

    async def co_activate(self) -> None:
        settings = self.metadata.settings
        self._cleaner.stop()
        self.bitmap_keeper.release()
        self._begin_with(await co_read_header(self.file))
        settings.apply(self.metadata)
        await self.open()
        self._cleaner.start()

    def configure(self, branch: Any) -> None:
        """Take the driver's runtime options over. BlockError."""
        Settings.of(branch, self.header, unmap=self.unmap).apply(self.metadata)
        self._cleaner.start()

    def reopen(self, options: Any, transaction: Transaction) -> set[str]:
        """All runtime options may change, and read-only images may become writable if nothing speaks against it."""
        metadata, old = self.metadata, self.metadata.settings
        if not self.read_only:
            opening.check_writable(self.header)
            if self.header.incompatible & layout.DIRTY and not metadata.is_marked_dirty:
                raise BlockError("the image was not closed properly; open it anew for writing, which repairs it")
        elif metadata.is_marked_dirty:  # nothing may wait here, and later nothing can be written
            raise BlockError("Counters are written late: reopen with lazy-refcounts=off before it is made read-only")
        Settings.of(options.branch, self.header, unmap=self.unmap).apply(metadata)
        transaction.add(abort=lambda: old.apply(metadata), commit=self._reopened)
        return set(CHANGEABLE)

    def _reopened(self) -> None:
        self._cleaner.start()
        if not self.read_only:
            opening.clear_unknown(self)

    def detach_context(self) -> None:
        self._cleaner.stop()

    def attach_context(self) -> None:
        self._cleaner.start()

    def close(self) -> None:
        self._cleaner.stop()
        if self.read_only or not self.active:
            return
        self.metadata.let_go()
        what = f"the tables of {self.describe()}"
        run_in(self.context, lambda: self.context.run(self._co_write_all(), what=what), what)

    async def _co_write_all(self) -> None:
        self.metadata.settings = replace(self.metadata.settings, lazy=False)
        try:
            await self.bitmap_keeper.co_store()
        finally:
            await self._guarded(self._co_settle())

    async def _co_settle(self) -> None:
        async with self.metadata.lock:
            await self.metadata.settle()
