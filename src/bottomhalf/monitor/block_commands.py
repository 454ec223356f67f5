# SPDX-License-Identifier: Apache-2.0
"""QMP commands that change the block graph, or tell it: what they check before, in QEMU's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block import BlockBackend, BlockError, Edge, Node
from bottomhalf.qapi.block import (
    BlockdevReopen,
    BlockPermission,
    XBlockdevChange,
    XBlockdevSetIothread,
)
from bottomhalf.qapi.block_graph import (
    BlockdevSetActive,
    BlockInfo,
    XDbgBlockGraph,
    XDbgBlockGraphEdge,
    XDbgBlockGraphNode,
    XDbgBlockGraphNodeType,
)
from bottomhalf.qapi.errors import OptionError

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage


def blockdev_reopen(storage: Storage, arguments: BlockdevReopen) -> None:
    """blockdev-reopen."""
    from bottomhalf.drivers.registry import reopen_nodes

    reopen_nodes(storage.graph, arguments.options)


def x_blockdev_change(storage: Storage, arguments: XBlockdevChange) -> None:
    """x-blockdev-change."""
    parent = storage.graph.find(arguments.parent, device=arguments.parent)
    if arguments.child is not None and arguments.node is not None:
        raise OptionError("The parameters child and node are in conflict")
    if arguments.child is not None:
        edge = parent.child(arguments.child)
        if edge is None:
            raise BlockError(f"Node '{arguments.parent}' does not have child '{arguments.child}'")
        parent.remove_child(edge)
    elif arguments.node is not None:
        node = storage.graph.nodes.get(arguments.node)
        if node is None:
            raise BlockError(f"Node '{arguments.node}' not found")
        parent.add_child(node)
    else:
        raise OptionError("Either child or node must be specified")


def x_blockdev_set_iothread(storage: Storage, arguments: XBlockdevSetIothread) -> None:
    """x-blockdev-set-iothread."""
    name = arguments.node_name
    node = storage.graph.nodes.get(name)
    if node is None:
        raise BlockError(f"Failed to find node with node-name='{name}'")
    if not arguments.force and any(isinstance(edge.parent, BlockBackend) for edge in node.parents):
        raise BlockError(
            f"Node {name} is associated with a BlockBackend and could be in use (use force=true to override this check)"
        )
    context = storage.loop.main
    if isinstance(arguments.iothread, str):
        from bottomhalf.qom.event_loop import Iothread

        found = storage.tree.user_object(arguments.iothread, Iothread)
        if found is None or found.context is None:
            raise BlockError(f"Cannot find iothread {arguments.iothread}")
        context = found.context
    storage.graph.move(node, context)


def query_block(storage: Storage, arguments: Any) -> list[BlockInfo]:
    """query-block: devices with a name, of which a storage daemon has none."""
    return []


_PERMISSIONS: Final = tuple(BlockPermission)


def x_debug_query_block_graph(storage: Storage, arguments: Any) -> XDbgBlockGraph:
    """x-debug-query-block-graph: users first, then nodes, each with its edges; the last found first, as QEMU does."""
    ids: dict[object, int] = {}
    nodes: list[XDbgBlockGraphNode] = []
    edges: list[XDbgBlockGraphEdge] = []

    def number(found: object) -> int:
        return ids.setdefault(found, len(ids) + 1)

    def add(found: object, kind: XDbgBlockGraphNodeType, name: str, children: list[Edge]) -> None:
        nodes.insert(0, XDbgBlockGraphNode(id=number(found), type=kind, name=name))
        for edge in children:
            edges.insert(
                0,
                XDbgBlockGraphEdge(
                    parent=number(found),
                    child=number(edge.node),
                    name=edge.name,
                    perm=_permissions(edge.held),
                    shared_perm=_permissions(edge.shared),
                ),
            )

    for user, used in _users(storage).items():
        if isinstance(user, BlockBackend):
            add(user, XDbgBlockGraphNodeType.BLOCK_BACKEND, user.name, used)
        else:
            add(user, XDbgBlockGraphNodeType.BLOCK_JOB, getattr(user, "name", ""), used)
    for node in storage.graph.nodes.values():
        add(node, XDbgBlockGraphNodeType.BLOCK_DRIVER, node.name, node.children[::-1])
    return XDbgBlockGraph(nodes=nodes, edges=edges)


def _users(storage: Storage) -> dict[object, list[Edge]]:
    """Backends, also without a medium, then other users who are no nodes, and their edges."""
    users: dict[object, list[Edge]] = {
        backend: [] if backend.root is None else [backend.root] for backend in storage.graph.backends
    }
    for node in storage.graph.nodes.values():
        for edge in node.parents:
            if not isinstance(edge.parent, (Node, BlockBackend)):
                users.setdefault(edge.parent, []).append(edge)
    return users


def _permissions(mask: int) -> list[BlockPermission]:
    return [name for n, name in reversed(list(enumerate(_PERMISSIONS))) if mask >> n & 1]


def blockdev_set_active(storage: Storage, arguments: BlockdevSetActive) -> None:
    """blockdev-set-active."""
    graph = storage.graph
    node = None
    if arguments.node_name is not None:
        node = graph.nodes.get(arguments.node_name)
        if node is None:
            raise BlockError(f"Failed to find node with node-name='{arguments.node_name}'")
    if arguments.active:
        graph.activate(node)
    else:
        graph.inactivate(node)


HANDLERS: Final[dict[str, Callable[[Storage, Any], Any]]] = {
    "blockdev-reopen": blockdev_reopen,
    "blockdev-set-active": blockdev_set_active,
    "query-block": query_block,
    "x-blockdev-change": x_blockdev_change,
    "x-blockdev-set-iothread": x_blockdev_set_iothread,
    "x-debug-query-block-graph": x_debug_query_block_graph,
}
