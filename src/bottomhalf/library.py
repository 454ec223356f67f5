# SPDX-License-Identifier: Apache-2.0
"""The library's face: open a disk image and read and write it, from plain code or from asyncio.

    with bottomhalf.open("disk.raw") as disk:                 # plain code
        data = disk.pread(4096, 0)

    async with bottomhalf.open("disk.raw") as disk:           # asyncio
        data = await disk.pread(4096, 0)

``open`` takes a path or the options of a block node as QMP's blockdev-add takes them. Offsets and lengths are in
bytes, of any alignment. Errors are ``OSError`` (with errno) for I/O, ``bottomhalf.block.BlockError`` for images
that cannot be opened as asked, ``bottomhalf.qapi.errors.OptionError`` for wrong options, and ``ValueError`` for the
use of a disk that is closed.
"""

from __future__ import annotations

import errno
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockBackend, Graph
from bottomhalf.block.errors import check
from bottomhalf.host.protocol import DATA, PERM_ALL, PERM_CONSISTENT_READ, PERM_WRITE, ZERO
from bottomhalf.host.request import DISCARD, FLUSH, FUA, MAY_UNMAP, READ, WRITE, WRITE_ZEROES, Request

if TYPE_CHECKING:
    import asyncio
    import os

    from bottomhalf.aio.asyncio_bridge import Embedded

__all__ = ["open", "Disk", "AsyncDisk", "Extent"]

AT_ONCE_MAX: Final = 16  # requests in a row that are done without giving asyncio's other tasks a turn

Extent: TypeAlias = "tuple[int, int, str]"
"""(offset, length, kind) with kind "data" or "zero"."""


def open(
    image: str | os.PathLike[str] | dict[str, Any],
    read_only: bool = False,
    *,
    format: str | None = None,
    backing_files: bool = False,
    secret: str | bytes | None = None,
) -> Disk:
    """Open an image.

    ``image`` is a path (discards reach the file) or a dict with the options of a block node,
    ``{"driver": "raw", "offset": 1048576, "file": {"driver": "file", "filename": "disk.img"}}``. The ``format`` of a
    path is "raw" or "qcow2"; None looks at its first bytes. Files that an image names, and the caller does not, are
    opened only with ``backing_files``. ``secret`` is the password of an encrypted image, and what the name "secret"
    stands for where a node's options say ``key-secret``. What comes back is for plain code, with or without ``with``;
    ``async with`` on it gives the same for asyncio."""
    if isinstance(image, dict):
        options = dict(image)
        if format is not None:
            raise ValueError("the options of a node say its driver; format is for a path")
    else:
        from os import fspath

        options = {
            "driver": format or _format(fspath(image), secret is not None),
            "discard": "unmap",
            "file": {"driver": _file_driver(fspath(image)), "filename": fspath(image), "discard": "unmap"},
        }
        if secret is not None:
            options |= _encryption(fspath(image), options["driver"])
    if read_only:
        options["read-only"] = True
    return Disk(_Image(options, backing_files, secret))


def _file_driver(path: str) -> str:
    from bottomhalf.host.linux import LinuxHost

    return "host_device" if LinuxHost().is_device(path) else "file"


def _encryption(path: str, driver: str) -> dict[str, Any]:
    """The options by which the image gets the password. ValueError for a format that has none."""
    from bottomhalf.host.linux import LinuxHost
    from bottomhalf.tools.formats import encryption, image_head

    if driver == "luks":
        return {"key-secret": "secret"}
    if driver != "qcow2":
        raise ValueError(f"an image in the format {driver} has no password")
    how = encryption(image_head(LinuxHost(), path)) or "luks"
    return {"encrypt": {"format": how, "key-secret": "secret"}}


def _format(path: str, encrypted: bool) -> str:
    """What an image's first bytes say, of the formats that there are drivers for. A name that is there for another
    reason than an image's is not looked into: opening it tells what is wrong."""
    from bottomhalf.host.linux import LinuxHost
    from bottomhalf.tools.formats import KNOWN, image_format

    found = image_format(LinuxHost(), path)
    return found if found in KNOWN or (encrypted and found == "luks") else "raw"


class _Image:
    """A context, a graph and a backend for one image."""

    def __init__(self, options: dict[str, Any], backing_files: bool, secret: str | bytes | None = None) -> None:
        from bottomhalf.drivers.registry import open_node
        from bottomhalf.qapi.block import BlockdevOptions
        from bottomhalf.qapi.visit import from_json

        self.context = AioContext(name="disk")
        self.graph = Graph(self.context)
        if secret is not None:
            from bottomhalf.drivers.luks.library import know_password

            know_password(self.graph, secret)
        try:
            node = open_node(self.graph, from_json(BlockdevOptions, options), follow_names=backing_files)
            writable = not node.read_only
            node.monitor_owned = True
            self.backend = BlockBackend(
                self.graph,
                held=PERM_CONSISTENT_READ | (PERM_WRITE if writable else 0),
                shared=PERM_ALL & ~PERM_WRITE if writable else PERM_ALL,
            )
            self.backend.insert(node)
        except BaseException:
            self.graph.close()
            self.context.close()
            raise

    def check(self, offset: int = 0, length: int = 0) -> None:
        if self.backend.root is None:
            raise ValueError("the disk is closed")
        if offset < 0 or length < 0 or offset + length > self.backend.size:
            raise OSError(
                errno.EINVAL,
                f"{length} bytes at {offset} are not within the disk's {self.backend.size} bytes",
            )

    def close(self) -> None:
        self.backend.close()
        self.graph.close()
        self.context.close()


class Disk:
    """An open image for plain code. One thread: the one that opened it. ``async with`` gives an AsyncDisk."""

    def __init__(self, image: _Image) -> None:
        self._image = image
        self._backend = image.backend

    @property
    def size(self) -> int:
        """Bytes."""
        return self._backend.size

    def pread(self, length: int, offset: int) -> bytes:
        self._image.check(offset, length)
        if self._image.context.is_home:
            data = self._backend.pread_nowait(length, offset)
            if data is not None:
                return data
        buffer = bytearray(length)
        self._backend.request(READ, offset, length, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill a buffer, without a copy."""
        view = memoryview(buffer).cast("B")
        self._image.check(offset, len(view))
        self._backend.request(READ, offset, len(view), view)

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int, *, fua: bool = False) -> int:
        """Write all of ``data``; returns its length. ``fua``: durable when this returns."""
        view = memoryview(data).cast("B")
        self._image.check(offset, len(view))
        self._backend.request(WRITE, offset, len(view), view, FUA if fua else 0)
        return len(view)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make the range read as zeroes; with ``unmap`` it may become a hole."""
        self._image.check(offset, length)
        self._backend.request(WRITE_ZEROES, offset, length, None, MAY_UNMAP if unmap else 0)

    def discard(self, offset: int, length: int) -> None:
        """The content is not needed any more. A hint: what reads there afterwards is not defined."""
        self._image.check(offset, length)
        self._backend.request(DISCARD, offset, length)

    def flush(self) -> None:
        """Everything written before is durable when this returns."""
        self._image.check()
        self._backend.request(FLUSH, 0, 0)

    def block_status(self, offset: int = 0, length: int | None = None) -> list[Extent]:
        """Extents of the range, up to the end of the disk if ``length`` is None."""
        extents = []
        end = self.size if length is None else offset + length
        self._image.check(offset, end - offset)
        while offset < end:
            status = self._backend.block_status(offset, end - offset)
            if status is None:
                status = self._image.context.run(self._backend.co_block_status(offset, end - offset))
            extents.append(_extent(offset, *status))
            offset += status[1]
        return extents

    def close(self) -> None:
        """Write what is pending and let go of the image. Idempotent."""
        if self._image.backend.root is not None:
            try:
                if not self._backend.node.read_only:
                    self.flush()
            finally:
                self._image.close()

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> AsyncDisk:
        self._async = AsyncDisk(self._image)
        return self._async

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._async.close()


class AsyncDisk:
    """An open image for asyncio code: the same calls, awaited, any number at once."""

    def __init__(self, image: _Image) -> None:
        import asyncio

        from bottomhalf.aio.asyncio_bridge import Embedded

        self._image = image
        self._backend = image.backend
        self._embedded: Embedded = Embedded(image.context).__enter__()
        self._running_loop = asyncio.get_running_loop
        self._give_way = asyncio.sleep
        self._queue = image.backend.queue(self._complete)
        self._at_once = 0
        self._closing: asyncio.Task[None] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self._backend.size

    async def _request(self, op: int, offset: int, length: int, view: memoryview | None = None, flags: int = 0) -> None:
        """One request. What is in memory is there at once; every so often the other tasks get their turn all the
        same. A task that is cancelled leaves, what it has started goes on."""
        loop = self._running_loop()
        if loop is not self._embedded.loop:  # that is an error, and the bridge has the words for it
            await self._embedded.run(self._backend.co_request(op, offset, length, view, flags))
        request = Request(op, offset, length, view, flags)
        request.owner = self._queue
        if self._queue.submit([request]):
            request.context = loop.create_future()
            self._embedded.arrange()
            await request.context
        else:
            self._at_once += 1
            if self._at_once % AT_ONCE_MAX == 0:
                await self._give_way(0)
        check(request.result, self._backend.name)

    @staticmethod
    def _complete(requests: list[Request]) -> None:
        for request in requests:
            if not request.context.done():
                request.context.set_result(None)

    async def pread(self, length: int, offset: int) -> bytes:
        self._image.check(offset, length)
        if self._running_loop() is self._embedded.loop:
            data = self._backend.pread_nowait(length, offset)
            if data is not None:
                self._at_once += 1
                if self._at_once % AT_ONCE_MAX == 0:
                    await self._give_way(0)
                return data
        buffer = bytearray(length)
        await self._request(READ, offset, length, memoryview(buffer))
        return bytes(buffer)

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, *, fua: bool = False) -> int:
        """Write all of ``data`` (not to be changed until then); returns its length."""
        view = memoryview(data).cast("B")
        self._image.check(offset, len(view))
        await self._request(WRITE, offset, len(view), view, FUA if fua else 0)
        return len(view)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._image.check(offset, length)
        await self._request(WRITE_ZEROES, offset, length, None, MAY_UNMAP if unmap else 0)

    async def discard(self, offset: int, length: int) -> None:
        self._image.check(offset, length)
        await self._request(DISCARD, offset, length)

    async def flush(self) -> None:
        self._image.check()
        await self._request(FLUSH, 0, 0)

    async def block_status(self, offset: int = 0, length: int | None = None) -> list[Extent]:
        end = self.size if length is None else offset + length
        self._image.check(offset, end - offset)
        extents = []
        while offset < end:
            status = await self._embedded.run(self._backend.co_block_status(offset, end - offset))
            extents.append(_extent(offset, *status))
            offset += status[1]
        return extents

    async def close(self) -> None:
        """Write what is pending and let go of the image. Idempotent; cancelled, it is done all the same."""
        import asyncio

        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            if not self._backend.node.read_only:
                await self.flush()
        finally:
            self._embedded.__exit__(None, None, None)
            self._image.close()


def _extent(offset: int, bits: int, count: int) -> Extent:
    return offset, count, "zero" if bits & ZERO and not bits & DATA else "data"


