# SPDX-License-Identifier: Apache-2.0
"""Jobs that make or amend an image: one piece of work, which is done or not. They cannot pause in the middle, and have
to be dismissed, because how they ended is nowhere else to be seen."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from bottomhalf.jobs.job import Job
from bottomhalf.qapi.jobs import JobType

if TYPE_CHECKING:
    from bottomhalf.block.node import Node
    from bottomhalf.jobs.registry import Jobs


class ImageJob(Job):
    """``work()`` is a coroutine of the main context. OSError or BlockError is why it failed."""

    def __init__(self, jobs: Jobs, job_id: str, type: JobType, work: Callable[[], Awaitable[None]]) -> None:
        super().__init__(jobs, job_id, auto_dismiss=False)
        self.type = type  # type: ignore[misc]  # one class for both kinds
        self._work = work

    async def run(self) -> None:
        self.progress.total = 1
        if self.is_cancelled:
            return
        try:
            await self._work()
        finally:
            self.progress.current = 1


class AmendJob(ImageJob):
    """With the node that it changes, which stays while it does."""

    def __init__(self, jobs: Jobs, job_id: str, node: Node, work: Callable[[], Awaitable[None]]) -> None:
        super().__init__(jobs, job_id, JobType.AMEND, work)
        self._node = node
        node.references += 1

    def clean(self) -> None:
        self._node.references -= 1
        if not self._node.graph.is_used(self._node):
            self._node.graph.release(self._node)
