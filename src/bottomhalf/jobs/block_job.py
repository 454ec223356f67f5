# SPDX-License-Identifier: Apache-2.0
"""A job that works on nodes: it stands in the graph, rests in drained sections, and has events of its own.

There are no such jobs yet; those that copy will be. What they share is here:

* ``use()`` adds an edge to a node; edges go when the job is concluded. A drained section pauses the job once per edge,
  and waits until its body is at a pause point. What it has in flight through backends, those tell.
* The job runs where its nodes do and moves with them, at its next pause point.
* ``on_error()`` is what a copying job asks about a request that has failed: to report it, to ignore it, or to stop:
  then the job is paused as if by the user, and ``io_status`` says why until he resumes it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from bottomhalf.aio import AioContext
from bottomhalf.block import changes, permissions
from bottomhalf.block.edge import Edge, Parent
from bottomhalf.block.error_policy import ErrorAction, ErrorPolicy
from bottomhalf.block.errors import BlockError
from bottomhalf.block.transaction import Transaction
from bottomhalf.host.protocol import PERM_ALL
from bottomhalf.host.request import READ
from bottomhalf.jobs.job import CANCELLED, Job
from bottomhalf.qapi.block_graph import BlockDeviceIoStatus
from bottomhalf.qapi.jobs import (
    BlockErrorAction,
    BlockJobCancelled,
    BlockJobCompleted,
    BlockJobError,
    BlockJobInfo,
    BlockJobInfoMirror,
    BlockJobPending,
    BlockJobReady,
    IoOperationType,
    JobStatus,
)
from bottomhalf.qapi.types import Empty

if TYPE_CHECKING:
    from bottomhalf.block.node import Node
    from bottomhalf.jobs.registry import Jobs
    from bottomhalf.jobs.transaction import JobTransaction


class BlockJob(Job, Parent):
    """``node`` is the one that it is about. ``speed`` in bytes a second, 0 for no limit."""

    stay_at_node: ClassVar[bool] = True

    def __init__(
        self,
        jobs: Jobs,
        job_id: str | None,
        node: Node,
        *,
        held: int = 0,
        shared: int = PERM_ALL,
        speed: int = 0,
        policy: ErrorPolicy | None = None,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        transaction: JobTransaction | None = None,
    ) -> None:
        """BlockError if the id will not do, or others do not allow what it needs of the node."""
        self.edges: list[Edge] = []
        self.speed = speed
        self.policy = policy or ErrorPolicy()
        self.io_status = BlockDeviceIoStatus.OK
        super().__init__(
            jobs,
            job_id,
            context=node.context,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
            transaction=transaction,
        )
        self.graph = node.graph
        try:
            self.use(node, "main node", held, shared)
        except BaseException:
            self.give_up()
            raise

    def use(self, node: Node, name: str, held: int, shared: int) -> None:
        """One more node that the job works on. BlockError. Main thread."""
        edge = Edge(self, node, name, held, shared)
        with self.graph.holding(node), self.graph.drained(node):
            if node.closed:
                raise BlockError(f"Node '{node.name}' was closed meanwhile")
            with Transaction() as transaction:
                changes.link(transaction, edge)
                permissions.refresh(node, transaction=transaction)
            self.edges.append(edge)

    def clean(self) -> None:
        """The nodes are not needed any more."""
        edges, self.edges = self.edges, []
        for edge in edges:
            node = edge.node
            with self.graph.holding(node), self.graph.drained(node):
                node.remove_parent(edge)
                permissions.loosen(node)
            self.graph.release(node)

    # -- in the graph -------------------------------------------------------------------------------------------

    def describe(self) -> str:
        return f"{self.type} job '{self.name}'"

    def parent_drained_begin(self) -> None:
        self.pause()

    def parent_drained_poll(self) -> bool:
        return self.busy and not self.has_left and not self.has_ended

    def parent_drained_end(self) -> None:
        self.resume()

    def child_resized(self) -> None:
        pass

    def check_move(self, context: AioContext) -> None:
        pass

    def move_to(self, context: AioContext) -> None:
        self.context = context

    def linked_nodes(self) -> list[Node]:
        return [edge.node for edge in self.edges]

    # -- errors -------------------------------------------------------------------------------------------------

    def on_error(self, op: int, number: int) -> ErrorAction:
        """A request of the job has failed with errno ``number``: what to do. To stop: the job rests at its next pause
        point, and then should try again. Its context."""
        action = self.policy.action(op, number)
        if self.id is not None:
            self.jobs.emit(
                BlockJobError(
                    device=self.id,
                    operation=IoOperationType.READ if op == READ else IoOperationType.WRITE,
                    action=BlockErrorAction(action.value),
                )
            )
        if action == ErrorAction.STOP:
            with self.jobs.lock:
                if not self.user_paused:
                    self.user_paused = True
                    self.pause_count += 1
            if self.io_status == BlockDeviceIoStatus.OK:
                nospace = number == errno.ENOSPC
                self.io_status = BlockDeviceIoStatus.NOSPACE if nospace else BlockDeviceIoStatus.FAILED
        return action

    def on_user_resume(self) -> None:
        self.io_status = BlockDeviceIoStatus.OK

    # -- what others are told -----------------------------------------------------------------------------------

    def on_event(self, status: JobStatus) -> None:
        if self.id is None:
            return
        if status == JobStatus.PENDING:
            self.jobs.emit(BlockJobPending(type=self.type, id=self.id))
            return
        numbers = {
            "type": self.type,
            "device": self.id,
            "len": self.progress.total,
            "offset": self.progress.current,
            "speed": self.speed,
        }
        if status == JobStatus.READY:
            self.jobs.emit(BlockJobReady(**numbers))  # type: ignore[arg-type]
        elif self.failure is CANCELLED or self.force_cancelled:
            self.jobs.emit(BlockJobCancelled(**numbers))  # type: ignore[arg-type]
        else:
            self.jobs.emit(BlockJobCompleted(**numbers, error=self.error_text))  # type: ignore[arg-type]

    def block_info(self) -> BlockJobInfo:
        """What query-block-jobs tells of it."""
        assert self.id is not None
        return BlockJobInfo(
            type=self.type,
            device=self.id,
            len=self.progress.total,
            offset=self.progress.current,
            busy=self.busy,
            paused=self.pause_count > 0,
            speed=self.speed,
            io_status=self.io_status,
            ready=self.status in (JobStatus.READY, JobStatus.STANDBY),
            status=self.status,
            auto_finalize=self.auto_finalize,
            auto_dismiss=self.auto_dismiss,
            error=self.error_text,
            branch=BlockJobInfoMirror(actively_synced=False) if self.type == "mirror" else Empty(),
        )
