# SPDX-License-Identifier: Apache-2.0
"""The graph: all nodes of one program, by name, and changes to them.

Nodes live as long as somebody uses them: a parent, the user who named them ("monitor owned"), or code that holds them
for a while. What may happen to them stands in four modules: ``changes`` of edges, ``drain``, ``contexts``, and
``reopen`` with other options; this one has the names, the life, and a door to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from bottomhalf.aio import AioContext, wait_while
from bottomhalf.aio.coroutine import in_coroutine
from bottomhalf.block import activation, changes, contexts, drain, permissions, reopen
from bottomhalf.block.errors import BlockError

if TYPE_CHECKING:
    from bottomhalf.block.backend import BlockBackend
    from bottomhalf.block.edge import Edge, Parent
    from bottomhalf.block.node import Node

T = TypeVar("T")

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
        self.drained_all_sections = 0  # that are going on: a new node is born into them
        self._generated = 0
        self.debugged = False  # a node listens to debug events: the data plane asks before it tells any
        # Told of images that turn out to be damaged: node, text, offset and size of the write that would have
        # destroyed more (None if it was found in another way), whether the node is of no use any more. Any thread.
        self.image_corrupted: Callable[[Node, str, int | None, int | None, bool], object] | None = None
        # The secret object that a driver's option names, as bytes; set by who has objects. Raises QomError.
        self.find_secret: Callable[[str], bytes] | None = None

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
        node.closed = True
        if self.nodes.get(node.name) is node:
            del self.nodes[node.name]
        children, node.children = node.children, []
        for edge in children:
            edge.node.remove_parent(edge)
            permissions.loosen(edge.node)  # before anything waits
        for edge in children:
            self.release(edge.node)

    def is_used(self, node: Node) -> bool:
        """Whether anybody would miss the node."""
        return bool(node.parents or node.monitor_owned or node.references)

    @contextmanager
    def holding(self, *nodes: Node) -> Iterator[None]:
        """Keep nodes from being closed meanwhile; who has lost all other users by then is closed afterwards."""
        used = [node for node in nodes if self.is_used(node)]
        for node in nodes:
            node.references += 1
        try:
            yield
        finally:
            for node in nodes:
                node.references -= 1
            for node in used:
                if not self.is_used(node):
                    self.release(node)

    def release(self, node: Node) -> None:
        """Somebody does not use the node any more. If nobody does, close it, and then those that only it used;
        otherwise give up the permissions that only he needed. From a coroutine, or another thread, it is done soon."""
        if self.nodes.get(node.name) is not node or node.closed:
            return
        if in_coroutine() or not self.context.is_home:
            self.context.schedule_oneshot(partial(self.release, node))  # closing may wait
            return
        if self.is_used(node):
            permissions.loosen(node)
            return
        node.quiesce()  # a driver starts nothing more of its own, and what it does ends before it is closed
        try:
            own = self.context if node.context is self.context else None
            wait_while(own, lambda: node.in_flight > 0, what=f"work of {node.describe()}, which is to be closed")
            if node.closed or self.is_used(node):
                return
            try:
                node.close()
            finally:
                self.forget(node)
        finally:
            node.unquiesce()

    def check_not_backing(self, node: Node) -> None:
        """BlockError if a node is the backing node of another one, as which it is to stay what it is."""
        for edge in node.parents:
            if edge.name == "backing":
                user = getattr(edge.parent, "name", "")
                raise BlockError(f"Node '{node.name}' is busy: node is used as backing hd of '{user}'")

    def delete(self, name: str) -> None:
        """blockdev-del."""
        node = self.nodes.get(name)
        if node is None:
            raise BlockError(f"Failed to find node with node-name='{name}'")
        self.check_not_backing(node)
        if not node.monitor_owned:
            raise BlockError(f"Node {name} is not owned by the monitor")
        if node.parents or node.references:
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

    def drained(self, *nodes: Node, subtree: bool = False) -> AbstractContextManager[None]:
        """A section in which nothing is in flight at the nodes (with ``subtree``, at all below them too) and nothing
        new arrives. From plain code in the main thread; requests that arrive meanwhile wait and go on afterwards, in
        order."""
        return drain.drained(drain.section(self, nodes, subtree))

    def drained_all(self) -> AbstractContextManager[None]:
        """The same for all nodes, also those that are made meanwhile, and for backends without a medium."""
        return drain.drained(drain.Section(self, self.nodes.values(), everything=True))

    def co_drained(self, *nodes: Node, subtree: bool = False) -> drain.CoDrained:
        """``async with``: drained() for a coroutine, of any context. It must not be part of a request to one of the
        nodes: the section would wait for it."""
        return drain.CoDrained(self, lambda: drain.section(self, nodes, subtree))

    def co_drained_all(self) -> drain.CoDrained:
        """``async with``: drained_all() for a coroutine, of any context."""
        return drain.CoDrained(self, lambda: drain.Section(self, self.nodes.values(), everything=True))

    async def co_run(self, callback: Callable[[], T], what: str = "a change of the block graph") -> T:
        """Let the main thread call ``callback()``, which may open, change, drain and wait; what it returns or raises.
        From a coroutine of any context."""
        return await drain.co_run(self, callback, what)

    # -- changes ------------------------------------------------------------------------------------------------

    def replace_node(self, old: Node, new: Node) -> None:
        """See changes.replace_node. Like all changes: main thread, outside coroutines, requests may be in flight."""
        drain.check_plain_main(self, "change the block graph")
        changes.replace_node(self, old, new)

    def append(self, new: Node, top: Node) -> None:
        """See changes.append."""
        drain.check_plain_main(self, "change the block graph")
        changes.append(self, new, top)

    def undo_append(self, overlay: Node, node: Node, users: Iterable[Edge]) -> None:
        """See changes.undo_append."""
        drain.check_plain_main(self, "change the block graph")
        changes.undo_append(self, overlay, node, users)

    def insert_node(self, filter: Node) -> None:
        """See changes.insert_node."""
        drain.check_plain_main(self, "change the block graph")
        changes.insert_node(self, filter)

    def remove_filter(self, filter: Node) -> None:
        """See changes.remove_filter."""
        drain.check_plain_main(self, "change the block graph")
        changes.remove_filter(self, filter)

    def drop_intermediate(self, top: Node, base: Node) -> None:
        """See changes.drop_intermediate."""
        drain.check_plain_main(self, "change the block graph")
        changes.drop_intermediate(self, top, base)

    def replace_child(self, edge: Edge, node: Node) -> None:
        """See changes.replace_child."""
        drain.check_plain_main(self, "change the block graph")
        changes.replace_child(self, edge, node)

    def attach_child(self, parent: Node, node: Node, name: str, role: int = 0) -> Edge:
        """See changes.attach_child."""
        drain.check_plain_main(self, "change the block graph")
        return changes.attach_child(self, parent, node, name, role)

    def detach_child(self, edge: Edge) -> None:
        """See changes.detach_child."""
        drain.check_plain_main(self, "change the block graph")
        changes.detach_child(self, edge)

    def reopen(self, queue: Mapping[Node, Any]) -> None:
        """See reopen.reopen. Several nodes, all or nothing."""
        reopen.reopen(self, queue)

    def activate(self, node: Node | None) -> None:
        """See activation.activate. None: all nodes."""
        activation.activate_all(self) if node is None else activation.activate(self, node)

    def inactivate(self, node: Node | None) -> None:
        """See activation.inactivate. None: all nodes."""
        activation.inactivate_all(self) if node is None else activation.inactivate(self, node)

    def flush(self, node: Node) -> None:
        """Make a node's content durable. Main thread. BlockError if that fails."""
        reopen.flush(self, node)

    # -- contexts -----------------------------------------------------------------------------------------------

    def connected(self, node: Node) -> list[Node]:
        """The node and every node that is linked with it, in any direction."""
        return contexts.connected(node)[0]

    def move(self, node: Node, context: AioContext, *, ignore: Parent | None = None) -> None:
        """Run the node and everything connected with it in another context from now on. BlockError if a user above
        (but for ``ignore``) or a driver does not allow it; then nothing has changed."""
        contexts.move(self, node, context, ignore)

    def bring_home(self, nodes: list[Node]) -> None:
        """Move those of the nodes that are still there, but have no user above any more, to the main context."""
        contexts.bring_home(self, nodes)
