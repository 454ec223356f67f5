# SPDX-License-Identifier: Apache-2.0
"""Nodes that a coroutine needs for a while: to have one opened, and to hold permissions on it. The main thread opens,
asks and closes, for these may wait; the coroutine may be of any context.

    async with co_using(node, PERM_WRITE | PERM_RESIZE):
        ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from bottomhalf.block.backend import BlockBackend
from bottomhalf.host.protocol import PERM_ALL

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node


@asynccontextmanager
async def co_using(node: Node, held: int, shared: int = PERM_ALL) -> AsyncIterator[None]:
    """Hold permissions on a node. BlockError if others forbid it."""
    graph = node.graph

    def begin() -> BlockBackend:
        backend = BlockBackend(graph, held=held, shared=shared)
        try:
            backend.insert(node)
        except BaseException:
            backend.close()
            raise
        return backend

    backend = await graph.co_run(begin, f"permissions on {node.describe()}")
    try:
        yield
    finally:
        await graph.co_run(backend.close, f"the end of permissions on {node.describe()}")


@asynccontextmanager
async def co_holding(graph: Graph, find: Callable[[], Node]) -> AsyncIterator[Node]:
    """A node that ``find()``, called by the main thread, finds or opens; it lives until the end of the section, if
    nobody else wants it."""

    def begin() -> Node:
        node = find()
        node.references += 1
        return node

    def end(node: Node) -> None:
        node.references -= 1
        if not graph.is_used(node):
            graph.release(node)

    node = await graph.co_run(begin, "a node to open")
    try:
        yield node
    finally:
        await graph.co_run(partial(end, node), f"{node.describe()} to close")
