# SPDX-License-Identifier: Apache-2.0
"""QMP commands about jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block import BlockError
from bottomhalf.drivers.creating import AMENDERS, CREATORS, co_amend
from bottomhalf.jobs.block_job import BlockJob
from bottomhalf.jobs.image_job import AmendJob, ImageJob
from bottomhalf.qapi.block_create import BlockdevCreate, XBlockdevAmend
from bottomhalf.qapi.jobs import BlockJobInfo, JobInfo, JobType

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage


def query_jobs(storage: Storage, arguments: Any) -> list[JobInfo]:
    """query-jobs."""
    return storage.jobs.infos()


def query_block_jobs(storage: Storage, arguments: Any) -> list[BlockJobInfo]:
    """query-block-jobs: those that work on a node, internal ones left out."""
    return [job.block_info() for job in storage.jobs.all() if isinstance(job, BlockJob) and job.id is not None]


def blockdev_create(storage: Storage, arguments: BlockdevCreate) -> None:
    """blockdev-create."""
    options = arguments.options
    creator = CREATORS.get(str(options.driver))
    if creator is None:
        raise BlockError("Driver does not support blockdev-create")
    graph = storage.graph
    ImageJob(
        storage.jobs, arguments.job_id, JobType.CREATE, lambda: creator(graph, options.branch)
    ).start()


def x_blockdev_amend(storage: Storage, arguments: XBlockdevAmend) -> None:
    """x-blockdev-amend."""
    options = arguments.options
    node = storage.graph.find(arguments.node_name)
    if options.driver != node.driver:
        raise BlockError("x-blockdev-amend doesn't support changing the block driver")
    if node.driver not in AMENDERS:
        raise BlockError("Driver does not support x-blockdev-amend")
    force = bool(arguments.force)
    job = AmendJob(storage.jobs, arguments.job_id, node, lambda: co_amend(node, options.branch, force))
    job.start()


HANDLERS: Final[dict[str, Callable[[Storage, Any], Any]]] = {
    "job-pause": lambda storage, arguments: storage.jobs.get(arguments.id).user_pause(),
    "job-resume": lambda storage, arguments: storage.jobs.get(arguments.id).user_resume(),
    "job-cancel": lambda storage, arguments: storage.jobs.get(arguments.id).user_cancel(),
    "job-complete": lambda storage, arguments: storage.jobs.get(arguments.id).user_complete(),
    "job-dismiss": lambda storage, arguments: storage.jobs.get(arguments.id).user_dismiss(),
    "job-finalize": lambda storage, arguments: storage.jobs.get(arguments.id).user_finalize(),
    "blockdev-create": blockdev_create,
    "x-blockdev-amend": x_blockdev_amend,
    "query-jobs": query_jobs,
    "query-block-jobs": query_block_jobs,
}
