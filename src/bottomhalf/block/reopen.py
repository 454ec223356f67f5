# SPDX-License-Identifier: Apache-2.0
"""Nodes take other options while they are in use: read-only and back, other caches, another child.

Several nodes change together or not at all. An image becomes writable only if its file does, and what one of them is
refused by another program's lock must not leave the other half changed. So there is one drained section of all nodes,
old children and new ones, and one transaction: common options and children first, then what each driver makes of the
rest, then the permissions that follow.

An option that nobody took over may be given again, but not changed and not left out. (QEMU: bdrv_reopen_multiple.)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from bottomhalf.block import permissions
from bottomhalf.block.changes import check_place, make_room, repoint, skip_implicit
from bottomhalf.block.dirty import begin_writing, end_writing
from bottomhalf.block.drain import check_plain_main
from bottomhalf.block.errors import BlockError
from bottomhalf.block.transaction import Transaction
from bottomhalf.block.watching import detect_zeroes
from bottomhalf.block.work import carry_out

if TYPE_CHECKING:
    from bottomhalf.block.edge import Edge
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node


def reopen(graph: Graph, queue: Mapping[Node, Any]) -> None:
    """Give each node its new options, of the class that its old ones have (``BlockdevOptions``). What they say of
    children by name is carried out; children that are given by options are in the queue themselves, if at all.
    BlockError, and nothing has changed, unless the image of a node that became writable cannot be told so: then that
    node cannot be written to. Main thread, outside coroutines."""
    check_plain_main(graph, "reopen block nodes")
    for node, options in queue.items():
        _check(node, options)
    changes = [change for node, options in queue.items() for change in _children(graph, node, options)]
    ends = [end for edge, new in changes for end in (edge.node, new)]
    with graph.holding(*queue, *ends), graph.drained(*queue, *ends):
        for edge, new in changes:
            make_room(graph, edge.parent, new, edge.name)  # type: ignore[arg-type]  # nodes have children
        try:
            for node, options in queue.items():
                if options.read_only:
                    end_writing(graph, node)
                flush(graph, node)
            _exchange(queue, changes, ends)
        except BaseException:
            for node in queue:
                with suppress(BlockError):  # then it cannot be written to; what is on its way says more
                    begin_writing(graph, node)
            raise
        for node in queue:
            node.refresh_limits()
            node.refresh_size()
            for above in list(node.parents):
                above.parent.child_replaced(above)
        for node in queue:
            begin_writing(graph, node)


def _exchange(queue: Mapping[Node, Any], changes: list[tuple[Edge, Node]], ends: list[Node]) -> None:
    """The change itself. Nothing waits. What was found out before the last wait may not hold any more."""
    now = [end for edge, new in changes for end in (edge.node, new)]
    if now != ends or any(node.closed for node in (*queue, *ends)):
        raise BlockError("The nodes have changed meanwhile")
    before = {node: node.options for node in queue}
    with Transaction() as transaction:
        for node, options in queue.items():
            _take_common(transaction, node, options)
        for edge, new in changes:
            check_place(edge.parent, new, edge.name)  # type: ignore[arg-type]
            repoint(transaction, edge, new)
        for node, options in queue.items():
            _check_rest(node, before[node], options, node.reopen(options, transaction))
        permissions.refresh(*queue, *ends, transaction=transaction)


def flush(graph: Graph, node: Node) -> None:
    """Make a node's content durable, from the main thread, wherever the node lives. BlockError if that fails."""
    if node.read_only:
        return
    try:
        carry_out(graph, node, node.co_flush(), f"a flush of {node.describe()}")
    except OSError as failure:
        raise BlockError(f"Error flushing drive: {failure.strerror}") from failure


def _check(node: Node, options: Any) -> None:
    if node.options is None or options.driver != node.options.driver:
        raise BlockError("Cannot change the option 'driver'")
    if bool(options.force_share) != bool(node.options.force_share):
        raise BlockError("Cannot change the option 'force-share'")


def _children(graph: Graph, node: Node, options: Any) -> list[tuple[Edge, Node]]:
    """Edges that the options let lead elsewhere."""
    changes = []
    for edge in node.children:
        given = getattr(options.branch, edge.name.replace("-", "_"), None)
        if isinstance(given, str):
            new = graph.find(given)
            if new is skip_implicit(edge.node):
                continue
            if edge.node.implicit:
                raise BlockError(f"Cannot replace implicit {edge.name} child of {node.name}")
            changes.append((edge, new))
        elif given is not None and edge.node.inherits_from is not node:
            raise BlockError(f"Cannot change the option '{edge.name}.driver'")
    return changes


def _take_common(transaction: Transaction, node: Node, options: Any) -> None:
    """Read-only, discard, and the options themselves."""
    old = (node.read_only, node.unmap, node.options, node.turning_read_only)

    def undo() -> None:
        node.read_only, node.unmap, node.options, node.turning_read_only = old
        _detect_zeroes(node, node.options)

    def settle() -> None:
        node.turning_read_only = False

    transaction.add(abort=undo, commit=settle)
    node.turning_read_only = bool(options.read_only) and not node.read_only
    node.read_only = bool(options.read_only)
    node.unmap = options.discard == "unmap"
    node.options = options
    _detect_zeroes(node, options)


def _detect_zeroes(node: Node, options: Any) -> None:
    how = options.detect_zeroes or "off"
    detect_zeroes(node, how != "off", unmap=how == "unmap")


def _check_rest(node: Node, old: Any, new: Any, taken: set[str]) -> None:
    """What nobody took over is as it was."""
    for attribute in type(new.branch)._fields:
        if attribute in taken or node.child(attribute.replace("_", "-")) is not None:
            continue
        before, after = getattr(old.branch, attribute), getattr(new.branch, attribute)
        name = attribute.replace("_", "-")
        if after is None and before is not None:
            raise BlockError(f"Option '{name}' cannot be reset to its default value")
        if after != before:
            raise BlockError(f"Cannot change the option '{name}'")
