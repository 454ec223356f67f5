# SPDX-License-Identifier: Apache-2.0
"""Nodes that let go of their image for a while, and take it back: somebody else may write it meanwhile.

A virtual machine that moves to another host takes its disks with it, and both hosts have the image open then. Only one
of them may write. The other's nodes are inactive: they have written everything they know, hold no permission to write,
and mind nobody who does. Reading goes on, from what they know. When a node becomes active again it reads its tables
anew, for they may be others.

An active node stands on active nodes only. So a node is inactivated with all below it that no other active node
stands on, itself first, and activated after what it stands on. (QEMU: bdrv_inactivate, bdrv_activate.)
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from bottomhalf.block import permissions
from bottomhalf.block.dirty import begin_writing
from bottomhalf.block.drain import check_plain_main
from bottomhalf.block.errors import BlockError, ImageError
from bottomhalf.block.transaction import Transaction
from bottomhalf.block.work import carry_out

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node


def inactivate(graph: Graph, node: Node) -> None:
    """Write everything and let others write. BlockError, and all is as it was. Main thread, outside coroutines."""
    check_plain_main(graph, "inactivate block nodes")
    if not node.active:
        return
    with graph.holding(node), graph.drained(node, subtree=True):
        going = _with_what_is_below(node)
        for each in going:
            for edge in each.parents:
                edge.parent.check_inactive(edge)
            for bitmap in each.bitmaps.values():  # which the image takes with it
                if bitmap.persistent and bitmap.busy:
                    raise BlockError(f"Failed to inactivate node: Bitmap '{bitmap.name}' is currently in use")
        try:
            for each in going:
                if not each.read_only:
                    _wait(graph, each, each.co_inactivate, "Failed to inactivate node")
            with Transaction() as transaction:
                for each in going:
                    _set(transaction, each, False)
                permissions.refresh(*going, transaction=transaction)
        except BaseException:
            for each in going:
                with suppress(BlockError):  # then it cannot be written to; what is on its way says more
                    begin_writing(graph, each)
            raise


def activate(graph: Graph, node: Node) -> None:
    """Take the image back, and what is below. BlockError if others write it, or it cannot be read; what is below may
    be active then. Main thread, outside coroutines."""
    check_plain_main(graph, "activate block nodes")
    if all(each.active for each in permissions.parents_first([node])):
        return  # without waiting for anybody
    with graph.holding(node), graph.drained(node, subtree=True):
        for each in reversed(permissions.parents_first([node])):
            if each.active:
                continue
            with Transaction() as transaction:
                _set(transaction, each, True)
                permissions.refresh(each, transaction=transaction)
            try:
                each.refresh_size()
                _wait(graph, each, each.co_activate, "Could not activate node")
            except BaseException:
                with Transaction() as transaction:
                    _set(transaction, each, False)
                    permissions.refresh(each, transaction=transaction)
                raise
            each.refresh_size()
            for edge in list(each.parents):
                edge.parent.child_resized()


def inactivate_all(graph: Graph) -> None:
    """All nodes, those first that nobody stands on. BlockError: some may be inactive."""
    for node in permissions.parents_first(list(graph.nodes.values())):
        inactivate(graph, node)


def activate_all(graph: Graph) -> None:
    """All nodes. BlockError: some may be active."""
    for node in list(graph.nodes.values()):
        activate(graph, node)


def _with_what_is_below(node: Node) -> list[Node]:
    """The node and those below that nobody else who is active stands on, parents first."""
    going: list[Node] = []
    for each in permissions.parents_first([node]):
        above = [edge.parent for edge in each.parents if getattr(edge.parent, "active", False)]
        if not each.active or any(parent not in going for parent in above):
            if each is node:
                raise BlockError("Node has active parent node")
            continue
        going.append(each)
    return going


def _set(transaction: Transaction, node: Node, active: bool) -> None:
    def now(active: bool) -> None:
        node.active = active
        for edge in node.parents:
            edge.parent.child_active(edge, active)

    now(active)
    transaction.add(abort=partial(now, not active))


def _wait(graph: Graph, node: Node, work: Callable[[], Coroutine[Any, Any, None]], failed: str) -> None:
    """Carry out something of a node's where it lives."""
    try:
        carry_out(graph, node, work(), f"{work.__name__} of {node.describe()}")
    except (OSError, ImageError, BlockError) as why:
        raise BlockError(f"{failed}: {getattr(why, 'strerror', None) or why}") from why
