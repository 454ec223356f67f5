# SPDX-License-Identifier: Apache-2.0
"""A new image: the smallest one that can be opened, which then grows to its size.

Cluster 0 has the header, 1 the refcount table, 2 the first refcount block; L1 follows where the disk's size puts it.

Clause: "Header"; the options are those of BlockdevCreateOptionsQcow2.
Invariant: the first write makes a whole image, of no size; whatever comes then is a change to an image.
Test: tests/drivers/qcow2/test_every_io.py
"""

from __future__ import annotations

import errno
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import move_to
from bottomhalf.block.errors import BlockError, ImageError
from bottomhalf.block.resize import FILE_BYTES_MAX
from bottomhalf.block.using import co_using
from bottomhalf.drivers.qcow2 import layout, refcounts, tables
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.layout import (
    CLUSTER_BITS_DEFAULT,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    EXTENDED_CLUSTER_BITS_MIN,
    REFCOUNT_ORDER_DEFAULT,
    REFCOUNT_ORDER_MAX,
)
from bottomhalf.drivers.qcow2.metadata import refresh_sizes
from bottomhalf.drivers.qcow2.node import Qcow2Node, co_read_header
from bottomhalf.drivers.qcow2.preallocation import MODES, co_preallocate
from bottomhalf.drivers.qcow2.runtime import Settings
from bottomhalf.host.protocol import PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE
from bottomhalf.qapi.block_create import BlockdevCreateOptionsQcow2, BlockdevQcow2Version

if TYPE_CHECKING:
    from bottomhalf.block import Node
    from bottomhalf.drivers.luks.create import LuksOptions
    from bottomhalf.drivers.qcow2.encryption import OldEncryption

_CHANGES: Final = PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE


@dataclass(frozen=True)
class CreateOptions:
    """What an image shall be like. ``size`` and ``cluster_size`` in bytes."""

    size: int
    version: int = 3
    cluster_size: int = 1 << CLUSTER_BITS_DEFAULT
    refcount_bits: int = 1 << REFCOUNT_ORDER_DEFAULT
    extended_l2: bool = False
    lazy_refcounts: bool = False
    compression_type: str = "zlib"
    backing_file: str | None = None
    backing_fmt: str | None = None
    preallocation: str = "off"
    data_file: str | None = None  # the name by which the image knows it
    data_file_raw: bool = False
    encrypt: LuksOptions | OldEncryption | None = None

    @classmethod
    def of(
        cls,
        given: BlockdevCreateOptionsQcow2,
        data_file: str | None = None,
        encrypt: LuksOptions | OldEncryption | None = None,
    ) -> CreateOptions:
        """From the schema's options; ``data_file`` is the name of what ``data-file`` stands for there, and ``encrypt``
        what its ``encrypt`` says, with the password."""
        names = {field.name for field in fields(cls)} - {"version", "data_file", "encrypt"}
        chosen = {name: value for name in names if (value := getattr(given, name)) is not None}
        for name in ("preallocation", "compression_type", "backing_fmt"):
            if name in chosen:
                chosen[name] = str(chosen[name])
        version = 2 if given.version == BlockdevQcow2Version.V2 else 3
        return cls(version=version, data_file=data_file, encrypt=encrypt, **chosen)

    @property
    def preallocates(self) -> str:
        """The mode; a data file that others read by itself needs every cluster to be in its place."""
        return "metadata" if self.data_file_raw and self.preallocation == "off" else self.preallocation

    def header(self) -> Header:
        """The header of the image while it has no disk yet. BlockError for what cannot be."""
        cluster_bits = self.cluster_size.bit_length() - 1
        if not CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX or self.cluster_size & (self.cluster_size - 1):
            smallest, largest = 1 << CLUSTER_BITS_MIN, 1 << (CLUSTER_BITS_MAX - 10)
            raise BlockError(f"Cluster size must be a power of two between {smallest} and {largest}k")
        order = self.refcount_bits.bit_length() - 1
        if not 0 <= order <= REFCOUNT_ORDER_MAX or self.refcount_bits & (self.refcount_bits - 1):
            raise BlockError("Refcount width must be a power of two and may not exceed 64 bits")
        if self.size < 0 or self.size % layout.SECTOR_BYTES:
            raise BlockError("Image size must be a multiple of 512 bytes")
        if self.preallocation not in MODES:
            raise BlockError(f"Parameter 'preallocation' does not accept value '{self.preallocation}'")
        self._check_version(order, cluster_bits)
        self._check_together()
        header = Header(size=0, cluster_bits=cluster_bits, version=self.version, refcount_order=order)
        header.refcount_table_offset = self.cluster_size
        header.refcount_table_clusters = 1
        if self.extended_l2:
            header.incompatible |= layout.EXTENDED_L2
        if self.lazy_refcounts:
            header.compatible |= layout.LAZY_REFCOUNTS
        if self.compression_type == "zstd":
            header.compression_type = layout.ZSTD
            header.incompatible |= layout.COMPRESSION_TYPE
        elif self.compression_type != "zlib":
            raise BlockError(f"compression type is zlib or zstd, not '{self.compression_type}'")
        if self.backing_fmt is not None:
            header.set_extension(layout.EXTENSION_BACKING_FORMAT, self.backing_fmt.encode())
        header.backing_file = self.backing_file
        if self.data_file is not None:
            header.incompatible |= layout.DATA_FILE
            header.set_extension(layout.EXTENSION_DATA_FILE, self.data_file.encode("utf-8", "surrogateescape"))
        if self.data_file_raw:
            header.autoclear |= layout.RAW_DATA
        header.to_bytes()  # whether the names fit
        return header

    def _check_version(self, order: int, cluster_bits: int) -> None:
        if self.version not in (2, 3):
            raise BlockError(f"qcow2 has versions 2 and 3, not {self.version}")
        if self.version == 2:
            if order != REFCOUNT_ORDER_DEFAULT:
                raise BlockError(
                    "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                    "(use version=v3 or greater)"
                )
            for wanted, what in (
                (self.lazy_refcounts, "Lazy refcounts"),
                (self.extended_l2, "Extended L2 entries are"),
                (self.compression_type != "zlib", "Non-zlib compression type is"),
                (self.data_file is not None, "External data files are"),
            ):
                if wanted:
                    raise BlockError(
                        f"{what} only supported with compatibility level 1.1 and above (use version=v3 or greater)"
                    )
        if self.extended_l2 and cluster_bits < EXTENDED_CLUSTER_BITS_MIN:
            raise BlockError("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")

    def _check_together(self) -> None:
        """Options that exclude or need each other."""
        if self.data_file_raw and self.backing_file is not None:
            raise BlockError("Backing file and data-file-raw cannot be used at the same time")
        if self.data_file_raw and self.data_file is None:
            raise BlockError("data-file-raw requires data-file")
        if self.backing_file is not None and self.preallocation != "off" and not self.extended_l2:
            raise BlockError(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on"
            )
        if self.backing_fmt is not None and self.backing_file is None:
            raise BlockError("Backing format cannot be used without backing file")


def create(file: Node, options: CreateOptions, data_file: Node | None = None) -> None:
    """Make an image in ``file``, which is empty, and its data in ``data_file`` if the options name one. Plain code in
    the main thread, which sees to it that nobody else has the nodes. OSError, BlockError."""
    file.graph.context.run(co_create(file, options, data_file), what=f"the making of an image in {file.describe()}")


async def co_create(
    file: Node, options: CreateOptions, data_file: Node | None = None, *, asks: bool = False
) -> None:
    """create() from a coroutine of the main context. With ``asks`` it takes the permissions that it needs; else the
    caller has them. OSError, BlockError."""
    graph, header = file.graph, options.header()
    what = f"an image in {file.describe()}"

    def make() -> Qcow2Node:
        return Qcow2Node(graph, file=file, header=header, data_file=data_file)

    if data_file is file:  # found out before the file loses its content
        node = await graph.co_run(make, what)
        try:
            async with _allowed(node, _CHANGES, asks):  # says which permissions there cannot be
                raise BlockError("The image itself cannot be its data file")
        finally:
            await graph.co_run(lambda: graph.forget(node), what)
    async with _allowed(file, PERM_WRITE | PERM_RESIZE, asks):
        await move_to(file.context)
        if asks:
            await _co_empty(file)
        await _co_begin(file, header)
        try:
            await co_read_header(file)  # there are files that keep nothing
        except ImageError as error:
            raise BlockError("Image is not in qcow2 format") from error
    node = await graph.co_run(make, what)
    try:
        async with _allowed(node, _CHANGES, asks):
            await move_to(file.context)
            await _co_grow(node, options)
            if data_file is not None:
                await data_file.co_flush()
            await file.co_flush()
    finally:
        await graph.co_run(lambda: graph.forget(node), what)
    await move_to(graph.context)


def _allowed(node: Node, held: int, asks: bool) -> AbstractAsyncContextManager[None]:
    return co_using(node, held) if asks else nullcontext()


async def _co_empty(file: Node) -> None:
    """What was in the file is not to be seen in clusters that are allocated and not written. It keeps its size, for not
    every node grows when it is written to; one that cannot change its size keeps its content."""
    size = file.size
    try:
        await file.co_truncate(0)
        await file.co_truncate(size)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EINVAL):
            raise


async def _co_begin(file: Node, header: Header) -> None:
    size = header.cluster_size
    table = tables.unpack(bytes(size))
    table[0] = 2 * size
    block = refcounts.empty(header.cluster_bits, header.refcount_order)
    for cluster in range(3):
        block[cluster] = 1
    first = header.to_bytes().ljust(size, b"\0") + tables.pack(table) + refcounts.pack(block, header.refcount_order)
    await file.co_pwrite(0, memoryview(first))
    refresh_sizes(file)


async def _co_grow(node: Qcow2Node, options: CreateOptions) -> None:
    await node.open()
    if options.encrypt is not None:
        from bottomhalf.drivers.qcow2.encryption import co_encrypt_new

        await co_encrypt_new(node, options.encrypt)
    try:
        if options.size > FILE_BYTES_MAX:
            raise BlockError("Image size cannot be negative")  # which it is in 64 bits
        await node.co_truncate(options.size)
        Settings.default(node.header).apply(node.metadata)  # of a disk of that size
        await co_preallocate(node, 0, options.size, options.preallocates)
    except ImageError:
        raise
    except BlockError as error:
        raise BlockError(f"Could not resize image: {error}") from error
    except OSError as error:
        raise OSError(error.errno, f"Could not resize image: {error.strerror}", error.filename) from error
    async with node.metadata.lock:
        await node.metadata.commit()
