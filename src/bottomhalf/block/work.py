# SPDX-License-Identifier: Apache-2.0
"""Work that plain code of the main thread has a node do, wherever the node lives, and waits for."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from bottomhalf.aio import kick, wait_while

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node

T = TypeVar("T")


def carry_out(graph: Graph, node: Node, body: Coroutine[Any, Any, T], what: str) -> T:
    """Run a coroutine in a node's context; what it returns or raises. ``what`` is it, for those who ask who waits for
    whom. Main thread, outside coroutines."""
    results: list[T] = []
    failures: list[Exception] = []

    async def run() -> None:
        try:
            results.append(await body)
        except Exception as error:
            failures.append(error)
        kick()

    coroutine = node.context.schedule(run())
    own = graph.context if node.context is graph.context else None
    wait_while(own, lambda: not (results or failures), what=what, on=coroutine)
    if failures:
        raise failures[0]
    return results[0]
