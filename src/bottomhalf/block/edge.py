# SPDX-License-Identifier: Apache-2.0
"""Edges of the graph, and what may stand at their upper end.

An edge is one parent's use of one node. Its role says what the child is to the parent, which decides what the parent
needs of it and who may be put in its place; the parent may be another node, a backend, or a job, and the edge asks it
through ``Parent`` for everything that it cannot know: to be quiet, to move to another thread, to take a new size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar, Final

from bottomhalf.block.errors import BlockError
from bottomhalf.host.protocol import PERM_ALL, PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED

if TYPE_CHECKING:
    from bottomhalf.aio import AioContext
    from bottomhalf.block.node import Node

# What a child is to its parent (QEMU's bits). No role at all: the parent says itself what it needs.
ROLE_DATA: Final = 1  # guest data is stored there
ROLE_METADATA: Final = 2  # tables of the parent's format are
ROLE_FILTERED: Final = 4  # the parent shows the child's data as its own
ROLE_COW: Final = 8  # what the parent has not got is read from there
ROLE_PRIMARY: Final = 16  # the one that counts where only one can
ROLE_IMAGE: Final = ROLE_DATA | ROLE_METADATA | ROLE_PRIMARY
ROLE_FILTER: Final = ROLE_FILTERED | ROLE_PRIMARY


class Edge:
    """A parent's use of a node: its name ("file", "root"), its role, its permissions, whether it was told of a drain.

    A ``frozen`` edge stays where it is: somebody (a job) relies on it."""

    __slots__ = ("frozen", "held", "name", "node", "parent", "quiesced_parent", "role", "shared")

    def __init__(
        self, parent: Parent, node: Node, name: str, held: int = 0, shared: int = PERM_ALL, role: int = 0
    ) -> None:
        self.parent = parent
        self.node = node
        self.name = name
        self.held = held
        self.shared = shared
        self.role = role
        self.quiesced_parent = False
        self.frozen = False

    @property
    def user(self) -> str:
        """The parent in words, for messages."""
        return self.parent.describe()

    def __repr__(self) -> str:
        return f"<Edge {self.name!r} of {self.user} to {self.node.name!r}>"


class Parent:
    """Whatever may have an edge to a node: another node, a backend, a job."""

    stay_at_node: ClassVar[bool] = False  # replace_node() leaves its edges alone: it means this node and no other

    def describe(self) -> str:
        raise NotImplementedError

    def parent_drained_begin(self) -> None:
        """Send nothing more through the edge. Must not wait."""

    def parent_drained_poll(self) -> bool:
        """Whether something sent earlier is still on its way."""
        return False

    def parent_drained_end(self) -> None:
        """Sending is allowed again. Must not wait."""

    def child_resized(self) -> None:
        """The size of the node below has changed."""

    def child_replaced(self, edge: Edge) -> None:
        """The edge leads to another node now. Nothing is in flight. Must not wait."""
        self.child_resized()

    def backing_renamed(self, edge: Edge, node: Node) -> None:
        """The edge is about to lead to ``node``: write that down wherever the parent stores whom it is based on. May
        wait; OSError to refuse."""

    def settle_written(self) -> None:
        """Note at the nodes below what was written to them and not noted yet: the graph is about to change. Drained.
        See ``written``."""

    def check_inactive(self, edge: Edge) -> None:
        """BlockError if the parent cannot do without the permission to change the node."""
        if edge.held & (PERM_WRITE | PERM_WRITE_UNCHANGED | PERM_RESIZE):
            raise BlockError("Failed to inactivate node: Operation not permitted")

    def child_active(self, edge: Edge, active: bool) -> None:
        """The node may not be changed any more, or may again. Must not wait."""

    def check_move(self, context: AioContext) -> None:
        """BlockError if the parent cannot follow the node to another context."""
        raise BlockError(f"Changing iothreads is not supported by {self.describe()}")

    def moving(self) -> AbstractContextManager[None]:
        """Around an attempt to move: leave the old context before it, and go on afterwards in the one where the node is
        then. Main thread; may wait. BlockError if the parent cannot leave now."""
        return nullcontext()

    def move_to(self, context: AioContext) -> None:
        """The node is in another context now, in a drained section, and the parent follows; or goes back there, if
        somebody else refused. Must not wait or fail."""

    def linked_nodes(self) -> list[Node]:
        """Nodes that have to be in the same context as the edge's node because this parent has edges to them too."""
        return []
