# SPDX-License-Identifier: Apache-2.0
"""Commands that have a node do something: they wait, and so they are coroutines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bottomhalf.aio import current, move_to, suspend
from bottomhalf.block import BlockBackend, BlockError, Node
from bottomhalf.block.resize import co_resize
from bottomhalf.host.protocol import PERM_ALL, PERM_RESIZE
from bottomhalf.qapi.block import BlockResize

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage


async def block_resize(storage: Storage, arguments: BlockResize) -> None:
    """block_resize."""
    node = storage.graph.find(arguments.node_name or "", device=arguments.device or "")
    if arguments.size < 0:
        raise BlockError("Parameter 'size' expects a >0 size")
    if node.read_only:
        raise BlockError("Image is read-only")
    if type(node).co_truncate is Node.co_truncate:
        raise BlockError("Image format driver does not support resize")
    main = storage.loop.main
    backend = BlockBackend(storage.graph, held=PERM_RESIZE, shared=PERM_ALL)
    try:
        backend.insert(node)
        async with storage.graph.co_drained(node):  # nobody is on his way to what is cut off
            if backend.node is not node:  # somebody put another in its place while the section waited
                raise BlockError(f"Node '{node.name}' has changed meanwhile")
            if node.read_only:
                raise BlockError("Image is read-only")
            await move_to(node.context)
            try:
                await co_resize(node, arguments.size)
            finally:
                await move_to(main)
    finally:
        await _closed(storage, backend)


async def _closed(storage: Storage, backend: BlockBackend) -> None:
    """Close a backend, which waits by polling: not in this coroutine."""
    me, main = current(), storage.loop.main

    def close() -> None:
        try:
            backend.close()
        finally:
            main.wake(me)

    main.schedule_oneshot(close)
    await suspend("a backend to close")
