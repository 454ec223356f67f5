# SPDX-License-Identifier: Apache-2.0
"""The graph: all nodes of one program, by name, and changes to them.

Nodes live as long as somebody uses them: a parent, a backend, or the user who named them ("monitor owned"). All
nodes that are connected share one AioContext.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import AioContext, wait_while
from bottomhalf.block import permissions
from bottomhalf.block.errors import BlockError

if TYPE_CHECKING:
    from bottomhalf.block.backend import BlockBackend
    from bottomhalf.block.node import Node

NODE_NAME_LENGTH_MAX: Final = 31  # QEMU's
_NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._")


def is_well_formed_id(name: str) -> bool:
    """A letter, then letters, digits, - . and _ (QEMU's rule for everything that users name)."""
    return name[:1].isascii() and name[:1].isalpha() and _NAME_CHARACTERS.issuperset(name)


class Graph:
    """The nodes and backends of one program. Changed only by the main context's thread."""

    def __init__(self, context: AioContext) -> None:
        self.context = context
        self.nodes: dict[str, Node] = {}
        self.backends: list[BlockBackend] = []
        self._generated = 0

    # -- names --------------------------------------------------------------------------------------------------

    def claim_name(self, name: str, node: Node) -> str:
        """Register a new node; an empty name gets a generated one, which no user can choose."""
        if not name:
            self._generated += 1
            name = f"#block{self._generated:03}"
        elif not is_well_formed_id(name):
            raise BlockError(f"Invalid node-name: '{name}'")
        elif len(name) > NODE_NAME_LENGTH_MAX:
            raise BlockError("Node name too long")
        elif name in self.nodes:
            raise BlockError(f"Duplicate nodes with node-name='{name}'")
        self.nodes[name] = node
        return name

    def find(self, name: str, *, device: str = "") -> Node:
        """The node of that name. ``device`` is what the user gave where a device's name would do as well."""
        node = self.nodes.get(name)
        if node is None:
            raise BlockError(f"Cannot find device='{device}' nor node-name='{name}'")
        return node

    # -- life ---------------------------------------------------------------------------------------------------

    def forget(self, node: Node) -> None:
        """Undo the registration of a node whose opening failed, and let go of the children that it has."""
        self.nodes.pop(node.name, None)
        children, node.children = node.children, []
        for edge in children:
            edge.node.remove_parent(edge)
            self.release(edge.node)

    def release(self, node: Node) -> None:
        """Somebody does not use the node any more. If nobody does, close it, and then those that only it used;
        otherwise give up the permissions that only he needed."""
        if self.nodes.get(node.name) is not node:
            return
        if node.parents or node.monitor_owned:
            permissions.loosen(node)
            return
        try:
            node.close()
        finally:
            self.forget(node)

    def delete(self, name: str) -> None:
        """blockdev-del."""
        node = self.nodes.get(name)
        if node is None:
            raise BlockError(f"Failed to find node with node-name='{name}'")
        if not node.monitor_owned:
            raise BlockError(f"Node {name} is not owned by the monitor")
        if node.parents:
            raise BlockError(f"Block device {name} is in use")
        node.monitor_owned = False
        self.release(node)

    def close(self) -> None:
        """Let go of everything; backends are closed already."""
        for node in list(self.nodes.values()):
            node.monitor_owned = False
        for node in list(self.nodes.values()):
            self.release(node)

    # -- drain --------------------------------------------------------------------------------------------------

    @contextmanager
    def drained(self, *nodes: Node) -> Iterator[None]:
        """A section in which nothing is in flight at the nodes and nothing new arrives. From plain code in the
        main thread; requests that arrive meanwhile wait and go on afterwards, in order."""
        quiesced: list[Node] = []
        try:
            for node in nodes:
                quiesced.append(node)
                node.quiesce()
            wait_while(
                None if any(node.context is not self.context for node in nodes) else self.context,
                lambda: any(node.busy() for node in nodes),
                what=f"requests in flight at {', '.join(node.describe() for node in nodes)}",
            )
            yield
        finally:
            for node in quiesced:
                node.unquiesce()

    # -- contexts -----------------------------------------------------------------------------------------------

    def connected(self, node: Node) -> list[Node]:
        """The node and every node that is linked with it, in any direction."""
        from bottomhalf.block.node import Node

        found: dict[str, Node] = {}
        open_ends = [node]
        while open_ends:
            each = open_ends.pop()
            if each.name in found:
                continue
            found[each.name] = each
            open_ends += [edge.node for edge in each.children]
            open_ends += [edge.parent for edge in each.parents if isinstance(edge.parent, Node)]
        return list(found.values())

    def move(self, node: Node, context: AioContext, *, ignore: BlockBackend | None = None) -> None:
        """Run the node and everything connected with it in another context from now on. BlockError if one of
        the backends above does not allow it."""
        if node.context is context:
            return
        nodes = self.connected(node)
        for backend in self.backends:
            concerned = backend.root is not None and backend.root.node in nodes and backend is not ignore
            if concerned and not backend.allow_context_change:
                raise BlockError("Cannot change iothread of active block backend")
        with self.drained(*nodes):
            for each in nodes:
                each.context = context
            for backend in self.backends:
                if backend.root is not None and backend.root.node in nodes:
                    backend.context = context

    def bring_home(self, nodes: list[Node]) -> None:
        """Move those of the nodes that are still there, but have no backend above any more, to the main context:
        the thread that they were moved to for its sake may end."""
        for node in nodes:
            if self.nodes.get(node.name) is not node or node.context is self.context:
                continue
            connected = self.connected(node)
            if not any(backend.root is not None and backend.root.node in connected for backend in self.backends):
                self.move(node, self.context)
