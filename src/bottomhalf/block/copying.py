# SPDX-License-Identifier: Apache-2.0
"""Bytes that go from one node to another without coming by here.

The kernel copies from file to file (copy_file_range(2)), sharing the blocks where the file system can, and no byte
crosses into the program. Two things have to be found for it, one after the other: the file in which the source's bytes
are as they are, and the file in which the target's are to be. So the call goes down on the source's side, each node
adding its offset, until a host file is found; then down on the target's side with that file in hand. A node that does
not define the two doors, because it changes bytes, counts them or must see them (a filter, a format), ends the journey
with ENOTSUP, and nothing has happened yet.

    await source.co_copy_range(0, target, 1 << 20, 65536)     # backends; OSError(ENOTSUP): read and write
    await co_copy(source, 0, target, 1 << 20, 65536)          # either; whatever is possible

The rule is one: whoever cannot says ENOTSUP and leaves everything as it was, or has copied a part; whoever asked then
reads and writes all of it. Any other error is one of the copy.

Both backends have to be free of drained sections at one moment, and are counted from then on: a request that was
counted at one and waited at the other could be what the other's section waits for.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

from bottomhalf.aio import current, move_to
from bottomhalf.block.written import note
from bottomhalf.host.protocol import PERM_CONSISTENT_READ, PERM_WRITE, File
from bottomhalf.host.request import FUA

if TYPE_CHECKING:
    from bottomhalf.block.backend import BlockBackend
    from bottomhalf.block.node import Node

CopyTo: TypeAlias = Callable[[File, int], Awaitable[None]]
"""Takes the source's bytes on: the host file that they are in, and where there."""

COPY_BYTES: Final = 1 << 20  # read and written at a time where the kernel does not copy


def not_supported(node: Node) -> OSError:
    """What a node says that cannot copy ranges."""
    return OSError(errno.ENOTSUP, f"driver {node.driver} cannot copy ranges", node.name)


async def co_copy_range(
    source: BlockBackend, offset: int, target: BlockBackend, target_offset: int, length: int, flags: int = 0
) -> None:
    """Copy a range in the kernel; FUA makes it durable. OSError: ENOTSUP if that is not possible, EPERM without the
    permissions to read and to write, EIO beyond the end of either, ENOMEDIUM. From a coroutine of any context."""
    async with _both_admitted(source, target):
        if source.root is None or target.root is None:
            raise OSError(errno.ENOMEDIUM, "there is no medium", (source if source.root is None else target).name)
        if not source.held & PERM_CONSISTENT_READ:
            raise OSError(errno.EPERM, f"{source.describe()} may not read", source.name)
        if not target.held & PERM_WRITE:
            raise OSError(errno.EPERM, f"{target.describe()} may not write", target.name)
        for backend, start in ((source, offset), (target, target_offset)):
            if start < 0 or length < 0 or start + length > backend.size:
                raise OSError(errno.EIO, f"the range does not lie within {backend.describe()}", backend.name)
        if not length:
            return
        node = target.root.node
        if target.writethrough:
            flags |= FUA

        async def to(file: File, file_offset: int) -> None:
            note(node, target_offset + length)
            await node.co_copy_range_to(target_offset, length, file, file_offset, flags)

        await source.root.node.co_copy_range_from(offset, length, to)


async def co_copy(
    source: BlockBackend, offset: int, target: BlockBackend, target_offset: int, length: int, flags: int = 0
) -> bool:
    """Copy a range in the kernel, or by reading and writing where that is not possible; whether the kernel did it.
    Ranges that overlap in one image are not for it. OSError as the requests say."""
    try:
        await co_copy_range(source, offset, target, target_offset, length, flags)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
    else:
        return True
    end = offset + length
    while offset < end:
        count = min(COPY_BYTES, end - offset)
        await target.co_pwrite(target_offset, await source.co_pread(offset, count), flags)
        offset += count
        target_offset += count
    return False


@asynccontextmanager
async def _both_admitted(source: BlockBackend, target: BlockBackend) -> AsyncIterator[None]:
    """Count a coroutine at both backends as soon as neither is drained, in the target's thread."""
    caller = current().context
    while True:
        await move_to(target.context)
        if source.context is not target.context:
            raise OSError(errno.ENOTSUP, "the two are in different threads", target.name)
        # First count, then look, as in BlockBackend.submit().
        source.in_flight += 1
        target.in_flight += 1
        drained = [backend for backend in (source, target) if backend.drained]
        if not drained and target.context is current().context:
            break
        source.request_ended(1)
        target.request_ended(1)
        if drained:
            await drained[0].co_wait_undrained()
    try:
        yield
    finally:
        source.request_ended(1)
        target.request_ended(1)
        await move_to(caller)
