# SPDX-License-Identifier: Apache-2.0
"""Image files as such: make one, look into one, check one.

    bottomhalf.create("disk.qcow2", format="qcow2", size=10 << 30)
    bottomhalf.info("disk.qcow2").virtual_size
    bottomhalf.check("disk.qcow2", repair="leaks").leaks_fixed

Looking into an image opens that file and no other, whatever it names. Errors are ``bottomhalf.block.BlockError`` (an
``ImageError`` where the image's bytes are at fault) and ``OSError``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockBackend, BlockError, Graph, Node
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE
from bottomhalf.tools.formats import KNOWN, probe

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.check import CheckResult

__all__ = ["create", "check", "info", "ImageInfo"]


class ImageInfo:
    """What an image says about itself. Sizes in bytes; None for what its format does not know."""

    __slots__ = ("actual_size", "backing_file", "backing_format", "cluster_size", "format", "header", "virtual_size")

    def __init__(self, format: str, virtual_size: int, actual_size: int) -> None:
        self.format = format
        self.virtual_size = virtual_size
        self.actual_size = actual_size  # on the host
        self.cluster_size: int | None = None
        self.backing_file: str | None = None
        self.backing_format: str | None = None
        self.header: Any = None  # of a qcow2 image: drivers.qcow2.header.Header

    def __repr__(self) -> str:
        return f"<ImageInfo {self.format} {self.virtual_size} bytes>"


def create(path: str | PathLike[str], *, format: str = "raw", size: int, **options: Any) -> None:
    """Make an image file; one that is there is written over, unless somebody has it open.

    ``options`` are those of the format. qcow2: ``version``, ``cluster_size``, ``refcount_bits``, ``extended_l2``,
    ``lazy_refcounts``, ``compression_type``, ``backing_file``, ``backing_fmt``; with ``encrypt_format="luks"`` it is
    encrypted, with the password ``encrypt_secret`` (str or bytes), and there are ``encrypt_cipher_alg``,
    ``encrypt_cipher_mode``, ``encrypt_ivgen_alg``, ``encrypt_ivgen_hash_alg``, ``encrypt_hash_alg`` and
    ``encrypt_iter_time`` (milliseconds). luks: the same names without ``encrypt_``. ValueError for others."""
    if format == "luks":
        _create_luks(fspath(path), size, options)
        return
    if format not in KNOWN:
        raise ValueError(f"format is one of {', '.join(KNOWN)}, not {format!r}")
    if format == "raw":
        if options:
            raise ValueError(f"raw images have no option {next(iter(options))!r}")
        if size < 0:
            raise ValueError(f"an image of {size} bytes")
        with _opened(fspath(path), writable=True, create=size):
            return
    from bottomhalf.drivers.qcow2.create import CreateOptions
    from bottomhalf.drivers.qcow2.create import create as create_image

    encryption = options.pop("encrypt_format", None)
    if encryption not in (None, "luks"):
        raise ValueError(f"encrypt_format is 'luks' or None, not {encryption!r}")
    if encryption is not None:
        from bottomhalf.drivers.luks.library import take_options

        options["encrypt"] = take_options(options)
    try:
        wanted = CreateOptions(size=size, **options)
    except TypeError:
        known = ", ".join(sorted(set(CreateOptions.__dataclass_fields__) - {"size"}))
        wrong = next(name for name in options if name not in CreateOptions.__dataclass_fields__)
        raise ValueError(f"qcow2 images have no option {wrong!r}, but {known}") from None
    wanted.header()
    with _opened(fspath(path), writable=True, create=0) as (context, file):
        create_image(file, wanted)
        context.run(file.co_flush(), what=f"the making of {fspath(path)}")


def _create_luks(path: str, size: int, options: dict[str, Any]) -> None:
    from bottomhalf.drivers.luks.library import co_make, take_options

    if size < 0 or size % 512:
        raise ValueError(f"an encrypted disk of {size} bytes; its size is a multiple of 512")
    wanted = take_options(options, prefix="")
    wanted.header()
    with _opened(path, writable=True, create=0) as (context, file):
        context.run(co_make(file, wanted, size), what=f"the making of {path}")


def info(path: str | PathLike[str]) -> ImageInfo:
    """What an image is. Reads its header only."""
    with _opened(fspath(path), writable=False) as (context, file):
        format = _format(file)
        found = ImageInfo(format, file.size, file.allocated_size() or 0)
        if format == "qcow2":
            from bottomhalf.drivers.qcow2.node import co_read_header

            header = context.run(co_read_header(file), what=f"the header of {fspath(path)}")
            found.virtual_size = header.size
            found.cluster_size = header.cluster_size
            found.backing_file = header.backing_file
            found.backing_format = header.backing_format
            found.header = header
        return found


def check(path: str | PathLike[str], *, repair: str | None = None) -> CheckResult:
    """Check an image's tables. ``repair`` is "leaks" or "all". BlockError for a format without tables."""
    if repair not in (None, "leaks", "all"):
        raise ValueError(f"repair is 'leaks', 'all' or None, not {repair!r}")
    with _opened(fspath(path), writable=repair is not None) as (context, file):
        format = _format(file)
        if format != "qcow2":
            raise BlockError("This image format does not support checks")
        from bottomhalf.drivers.qcow2.check import co_check
        from bottomhalf.drivers.qcow2.node import co_read_header

        what = f"the check of {fspath(path)}"
        header = context.run(co_read_header(file), what=what)
        return context.run(co_check(file, header, repair), what=what)  # type: ignore[no-any-return]


@contextmanager
def _opened(path: str, *, writable: bool, create: int | None = None) -> Iterator[tuple[AioContext, Node]]:
    """The file of an image as a node that nobody else may change meanwhile; ``create``: made anew, of that size."""
    from bottomhalf.drivers.registry import open_node
    from bottomhalf.qapi.block import BlockdevOptions
    from bottomhalf.qapi.visit import from_json

    context = AioContext(name="image")
    graph = Graph(context)
    held = PERM_CONSISTENT_READ | (PERM_WRITE | PERM_RESIZE if writable else 0)
    backend = BlockBackend(graph, held=held, shared=PERM_ALL & ~(PERM_WRITE | PERM_RESIZE))
    try:
        if create is not None:
            _create_file(context, path, create)
        options = {"driver": "file", "filename": path, "read-only": not writable, "discard": "unmap"}
        node = open_node(graph, from_json(BlockdevOptions, options))
        node.monitor_owned = True
        backend.insert(node)
        yield context, node
    finally:
        backend.close()
        graph.close()
        context.close()


def _create_file(context: AioContext, path: str, size: int) -> None:
    try:
        context.host.create_file(path, size)
    except OSError as error:
        raise BlockError(f"Could not create '{path}': {error.strerror}") from error


def _format(file: Node) -> str:
    head = bytearray(min(512, file.size))
    if head:
        file.context.run(file.co_pread(0, memoryview(head)), what=f"the first bytes of {file.describe()}")
    format = probe(bytes(head))
    if format not in KNOWN:
        raise BlockError(f"the image is {format}, which is not supported yet")
    return format

