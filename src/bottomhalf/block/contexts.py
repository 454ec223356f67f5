# SPDX-License-Identifier: Apache-2.0
"""Which thread a part of the graph runs in, and how it moves to another.

A request passes from node to node by plain calls, so all nodes that are connected, upwards or downwards, share one
AioContext, and whoever uses them follows or refuses. A job links nodes that have no edge to each other.

All are asked first. Those who have something of their own in the old thread, as sockets, leave it. Then, in a drained
section of all of them, each node leaves its context and enters the new one; a driver that cannot enter is a refusal
too, and everybody goes back. While the section waits the graph may change, so
it is looked at again, and the section begun anew if others are concerned now.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from bottomhalf.aio import AioContext
from bottomhalf.block.drain import check_plain_main
from bottomhalf.block.edge import Parent
from bottomhalf.block.transaction import Transaction

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node


def connected(node: Node) -> tuple[list[Node], list[Parent]]:
    """The node and every node that is linked with it in any way, and the users above who are no nodes."""
    from bottomhalf.block.node import Node

    nodes: dict[Node, None] = {node: None}
    users: dict[Parent, None] = {}
    open_ends = [node]

    def found(others: list[Node]) -> None:
        for other in others:
            if other not in nodes:
                nodes[other] = None
                open_ends.append(other)

    while open_ends:
        each = open_ends.pop()
        found([edge.node for edge in each.children])
        for edge in each.parents:
            if isinstance(edge.parent, Node):
                found([edge.parent])
            elif edge.parent not in users:
                users[edge.parent] = None
                found(edge.parent.linked_nodes())
    return list(nodes), list(users)


def move(graph: Graph, node: Node, context: AioContext, ignore: Parent | None = None) -> None:
    """Run the node and everything connected with it in another context from now on. BlockError if one of the users
    above (but for ``ignore``) or a driver does not allow it; then nothing has changed."""
    if node.context is context:
        return
    check_plain_main(graph, f"move {node.describe()} to another thread")
    while True:
        nodes, users = connected(node)
        for user in users:
            if user is not ignore:
                user.check_move(context)
        with ExitStack() as stack:
            for user in users:
                stack.enter_context(user.moving())
            stack.enter_context(graph.drained(*nodes))
            if connected(node) == (nodes, users) and node.context is not context:
                with Transaction() as transaction:
                    for each in nodes:
                        _move_node(transaction, each, context)
                    for user in users:
                        user.move_to(context)
                return
        if node.context is context:
            return  # somebody else has moved it meanwhile


def _move_node(transaction: Transaction, node: Node, context: AioContext) -> None:
    old = node.context
    node.detach_context()
    node.context = context
    transaction.add(abort=partial(_go_back, node, old))
    node.attach_context()
    transaction.add(abort=node.detach_context)


def _go_back(node: Node, old: AioContext) -> None:
    node.context = old
    node.attach_context()


def bring_home(graph: Graph, nodes: list[Node]) -> None:
    """Move those of the nodes that are still there, but have no user above any more, to the main context: the thread
    that they were moved to for his sake may end."""
    for node in nodes:
        if graph.nodes.get(node.name) is node and node.context is not graph.context and not connected(node)[1]:
            move(graph, node, graph.context)
