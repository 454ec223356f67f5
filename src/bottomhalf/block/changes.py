# SPDX-License-Identifier: Apache-2.0
"""Changes of the graph while it is in use: put a filter above a node, take it out, replace, attach, detach.

Each is done in the same four steps.

1. A drained section of the nodes concerned. Requests that arrive meanwhile wait in their backends and go on
   afterwards, in order, on the new way.
2. Look again: while the section waited, anything may have run.
3. One transaction: all edges first, then the permissions of all nodes that lost or won a parent, so that only what the
   graph looks like in the end has to be free of conflicts. Nothing in it waits.
4. Parents take over size and alignments of what is below them now, and nodes that nobody uses any more are closed.

A driver keeps its edge objects and finds another node behind them. Main thread, outside coroutines; from a coroutine
``await graph.co_run(...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from bottomhalf.block import permissions, written
from bottomhalf.block.edge import ROLE_COW, ROLE_FILTER, Edge
from bottomhalf.block.errors import BlockError
from bottomhalf.block.transaction import Transaction

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node

DEPTH_MAX: Final = 200  # of edges on top of each other; draining and asking around recurse


# -- single edges ---------------------------------------------------------------------------------------------------


def link(transaction: Transaction, edge: Edge) -> None:
    """Add an edge: the node gets a parent, and a parent that is a node a child."""
    children = _children_of(edge)
    if children is not None:
        children.append(edge)
        transaction.add(abort=lambda: children.remove(edge))
    edge.node.add_parent(edge)
    transaction.add(abort=lambda: edge.node.remove_parent(edge))


def unlink(transaction: Transaction, edge: Edge) -> None:
    """Take an edge away. BlockError if it is frozen."""
    node = edge.node
    if edge.frozen:
        raise BlockError(f"Cannot change '{edge.name}' link from '{_name(edge)}' to '{node.name}'")
    children = _children_of(edge)
    if children is not None:
        place = children.index(edge)
        children.remove(edge)
        transaction.add(abort=lambda: children.insert(place, edge))
    place_above = node.parents.index(edge)
    node.remove_parent(edge)
    transaction.add(abort=lambda: node.add_parent(edge, place_above))


def repoint(transaction: Transaction, edge: Edge, node: Node) -> None:
    """Let an edge lead to another node. BlockError if it is frozen."""
    old = edge.node
    if edge.frozen:
        raise BlockError(f"Cannot change '{edge.name}' link to '{old.name}'")
    place = old.parents.index(edge)
    _swing(edge, node, len(node.parents))
    transaction.add(abort=lambda: _swing(edge, old, place))


def _swing(edge: Edge, node: Node, place: int) -> None:
    """Both nodes are drained, so the parent is quiet already and stays so; it ends with its new child's section."""
    assert edge.quiesced_parent and node.quiesce_counter
    written.settle_above(edge)
    edge.node.parents.remove(edge)
    edge.node = node
    node.parents.insert(place, edge)


def _children_of(edge: Edge) -> list[Edge] | None:
    return getattr(edge.parent, "children", None)


def _name(edge: Edge) -> str:
    return str(getattr(edge.parent, "name", "")) or edge.user


# -- where a node may stand -----------------------------------------------------------------------------------------


def below(node: Node) -> set[Node]:
    """The node and all that it stands on."""
    found = {node}
    open_ends = [node]
    while open_ends:
        for edge in open_ends.pop().children:
            if edge.node not in found:
                found.add(edge.node)
                open_ends.append(edge.node)
    return found


def skip_implicit(node: Node) -> Node:
    """The node, or the first below it that no job put in by itself: what a user means and is shown."""
    while node.implicit:
        node = _filtered(node).node
    return node


def check_place(parent: Node, node: Node, name: str) -> None:
    """BlockError if ``parent`` cannot stand on ``node``: it would stand on itself, or too high."""
    if parent in below(node):
        raise BlockError(f"Making '{node.name}' a {name} child of '{parent.name}' would create a cycle")
    if _levels(parent, _nodes_above) + 1 + _levels(node, _nodes_below) > DEPTH_MAX:
        raise BlockError(f"More than {DEPTH_MAX} block nodes on top of each other")


def _levels(node: Node, following: Callable[[Node], list[Node]]) -> int:
    """Edges along the longest way from the node."""
    known: dict[Node, int] = {}

    def levels(each: Node) -> int:
        if each not in known:
            known[each] = max((1 + levels(other) for other in following(each)), default=0)
        return known[each]

    return levels(node)


def _nodes_below(node: Node) -> list[Node]:
    return [edge.node for edge in node.children]


def _nodes_above(node: Node) -> list[Node]:
    from bottomhalf.block.node import Node

    return [edge.parent for edge in node.parents if isinstance(edge.parent, Node)]


def attach_new(parent: Node, node: Node, name: str, role: int) -> Edge:
    """An edge from a node that is being made; permissions follow when it is complete. See Node.attach()."""
    try:
        check_place(parent, node, name)
        if parent.context is not node.context:
            if parent.children or parent.parents:
                join(parent.graph, node, parent)
            else:
                parent.context = node.context
    except BlockError:
        parent.graph.forget(parent)
        raise
    edge = Edge(parent, node, name, role=role)
    with Transaction() as transaction:
        link(transaction, edge)
    return edge


def join(graph: Graph, node: Node, parent: Node) -> None:
    """Make the two run in one context: the child comes to the parent, or if it may not, the parent to the child."""
    if node.context is not parent.context:
        try:
            graph.move(node, parent.context)
        except BlockError:
            graph.move(parent, node.context)


def make_room(graph: Graph, parent: Node, node: Node, name: str) -> None:
    """BlockError if ``parent`` cannot stand on ``node``, else they run in one context afterwards. May wait; what it has
    found out holds until the next wait."""
    check_place(parent, node, name)
    if node.context is not parent.context:
        join(graph, node, parent)
        check_place(parent, node, name)


# -- changes --------------------------------------------------------------------------------------------------------


def replace_node(graph: Graph, old: Node, new: Node) -> None:
    """All parents of ``old`` use ``new`` instead, except for jobs and for nodes that ``new`` itself stands on (a
    filter above ``old`` keeps its child). ``old`` is closed if nobody is left. BlockError, and nothing has changed."""
    with graph.holding(old, new), graph.drained(old, new):
        join(graph, new, old)
        _check_alive(old, new)
        with Transaction() as transaction:
            edges = _repoint_parents(transaction, old, new)
            permissions.refresh(old, new, transaction=transaction)
        _tell(edges)


def append(graph: Graph, new: Node, top: Node) -> None:
    """Put ``new``, which has no such child yet, above ``top``: a filter gets it as "file", an overlay as "backing",
    and whoever uses ``top`` uses ``new`` from then on. BlockError, and nothing has changed."""
    name, role = ("file", ROLE_FILTER) if new.is_filter else ("backing", ROLE_COW)
    with graph.holding(new, top), graph.drained(top, new):
        make_room(graph, new, top, name)
        _check_alive(new, top)
        if new.child(name) is not None:
            raise BlockError(f"The node {new.name} already has a child '{name}'")
        edge = Edge(new, top, name, role=role)
        with Transaction() as transaction:
            link(transaction, edge)
            edges = _repoint_parents(transaction, top, new)
            permissions.refresh(new, transaction=transaction)
        new.child_replaced(edge)
        _tell(edges)


def undo_append(graph: Graph, overlay: Node, node: Node, users: Iterable[Edge]) -> None:
    """Take back append(): ``users``, the edges that it moved, lead to ``node`` again, and the overlay has no child
    "backing" any more. In the same drained section as append(), so that nothing was written to the overlay."""
    edge = overlay.child("backing")
    assert edge is not None and edge.node is node
    moved = [user for user in users if user.node is overlay]
    with graph.holding(overlay, node), graph.drained(overlay, node):
        with Transaction() as transaction:
            for user in moved:
                repoint(transaction, user, node)
            unlink(transaction, edge)
            permissions.refresh(overlay, node, transaction=transaction)
        overlay.child_replaced(edge)
        _tell(moved)


def insert_node(graph: Graph, filter: Node) -> None:
    """A filter that was made on top of a node takes the place between it and all others who use that node. If that
    cannot be, BlockError: the filter is there still, but nobody's."""
    replace_node(graph, _filtered(filter).node, filter)


def remove_filter(graph: Graph, filter: Node) -> None:
    """Who uses the filter uses what is below it from then on; the filter is closed unless somebody else holds it, and
    then it stays where it is, beside the others. BlockError, and nothing has changed."""
    below_it = _filtered(filter).node
    with graph.holding(filter, below_it), graph.drained(filter, below_it):
        _check_alive(filter, below_it)
        edge = _filtered(filter)
        _check_edge(edge, below_it)
        with Transaction() as transaction:
            edges = _repoint_parents(transaction, filter, below_it)
            if not filter.parents and not filter.monitor_owned and filter.references == 1:
                unlink(transaction, edge)  # what it needs for itself must not stand in the way of the others
            permissions.refresh(filter, below_it, transaction=transaction)
        _tell(edges)


def drop_intermediate(graph: Graph, top: Node, base: Node) -> None:
    """Who uses ``top`` uses ``base`` below it from then on; the nodes in between are closed if nobody else uses them.
    Each parent first writes down its new child, and may wait for that. BlockError or OSError, and the graph has not
    changed."""
    if base is top or base not in below(top):
        raise BlockError(f"Node '{base.name}' is not below '{top.name}'")
    with graph.holding(top, base), graph.drained(*below(top)):
        _check_alive(top, base)
        for edge in list(top.parents):
            if edge in top.parents and _should_move(edge, base):
                edge.parent.backing_renamed(edge, base)
        _check_alive(top, base)
        if base not in below(top):
            raise BlockError(f"Node '{base.name}' is not below '{top.name}' any more")
        with Transaction() as transaction:
            edges = _repoint_parents(transaction, top, base)
            permissions.refresh(top, base, transaction=transaction)
        _tell(edges)


def replace_child(graph: Graph, edge: Edge, node: Node) -> None:
    """One parent uses another node. The old one is closed if nobody else uses it. BlockError, and nothing has
    changed."""
    old = edge.node
    with graph.holding(old, node), graph.drained(old, node):
        if _children_of(edge) is not None:
            make_room(graph, edge.parent, node, edge.name)  # type: ignore[arg-type]  # it has children: a node
        _check_alive(old, node)
        _check_edge(edge, old)
        with Transaction() as transaction:
            repoint(transaction, edge, node)
            permissions.refresh(old, *_with_parent(edge), transaction=transaction)
        _tell([edge])


def attach_child(graph: Graph, parent: Node, node: Node, name: str, role: int = 0) -> Edge:
    """A node that is in use gets one more child. BlockError, and nothing has changed."""
    with graph.holding(parent, node), graph.drained(parent, node):
        make_room(graph, parent, node, name)
        _check_alive(parent, node)
        if parent.child(name) is not None:
            raise BlockError(f"Duplicate child name '{name}'")
        edge = Edge(parent, node, name, role=role)
        with Transaction() as transaction:
            link(transaction, edge)
            permissions.refresh(parent, transaction=transaction)
        parent.child_replaced(edge)
    return edge


def detach_child(graph: Graph, edge: Edge) -> None:
    """A node does without a child, which is closed if nobody else uses it. BlockError, and nothing has changed."""
    node, parent = edge.node, edge.parent
    with graph.holding(node), graph.drained(node):
        _check_edge(edge, node)
        with Transaction() as transaction:
            unlink(transaction, edge)
            permissions.refresh(node, *_with_parent(edge), transaction=transaction)
        parent.child_replaced(edge)


def _filtered(filter: Node) -> Edge:
    edge = next((edge for edge in filter.children if edge.role & ROLE_FILTER == ROLE_FILTER), None)
    if edge is None:
        raise BlockError(f"Node '{filter.name}' is not a filter with a child")
    return edge


def _repoint_parents(transaction: Transaction, old: Node, new: Node) -> list[Edge]:
    """All edges to ``old`` that should lead to ``new``, and now do."""
    stands_on = below(new)
    edges = [edge for edge in old.parents if not edge.parent.stay_at_node and edge.parent not in stands_on]
    for edge in edges:
        if _children_of(edge) is not None:
            check_place(edge.parent, new, edge.name)  # type: ignore[arg-type]  # it has children: a node
        repoint(transaction, edge, new)
    return edges


def _should_move(edge: Edge, new: Node) -> bool:
    return not edge.parent.stay_at_node and edge.parent not in below(new)


def _with_parent(edge: Edge) -> list[Node]:
    """The nodes whose permissions a change at the upper end of an edge concerns."""
    from bottomhalf.block.node import Node

    return [edge.parent] if isinstance(edge.parent, Node) else [edge.node]


def _tell(edges: list[Edge]) -> None:
    for edge in edges:
        edge.parent.child_replaced(edge)


def _check_alive(*nodes: Node) -> None:
    for node in nodes:
        if node.closed:
            raise BlockError(f"Node '{node.name}' was closed meanwhile")


def _check_edge(edge: Edge, node: Node) -> None:
    if edge.node is not node or edge not in node.parents:
        raise BlockError(f"'{edge.name}' of {edge.user} has changed meanwhile")
