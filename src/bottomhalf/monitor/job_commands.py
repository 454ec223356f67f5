# SPDX-License-Identifier: Apache-2.0
"""QMP commands about jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.jobs.block_job import BlockJob
from bottomhalf.qapi.jobs import BlockJobInfo, JobInfo

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage


def query_jobs(storage: Storage, arguments: Any) -> list[JobInfo]:
    """query-jobs."""
    return storage.jobs.infos()


def query_block_jobs(storage: Storage, arguments: Any) -> list[BlockJobInfo]:
    """query-block-jobs: those that work on a node, internal ones left out."""
    return [job.block_info() for job in storage.jobs.all() if isinstance(job, BlockJob) and job.id is not None]


HANDLERS: Final[dict[str, Callable[[Storage, Any], Any]]] = {
    "job-pause": lambda storage, arguments: storage.jobs.get(arguments.id).user_pause(),
    "job-resume": lambda storage, arguments: storage.jobs.get(arguments.id).user_resume(),
    "job-cancel": lambda storage, arguments: storage.jobs.get(arguments.id).user_cancel(),
    "job-complete": lambda storage, arguments: storage.jobs.get(arguments.id).user_complete(),
    "job-dismiss": lambda storage, arguments: storage.jobs.get(arguments.id).user_dismiss(),
    "job-finalize": lambda storage, arguments: storage.jobs.get(arguments.id).user_finalize(),
    "query-jobs": query_jobs,
    "query-block-jobs": query_block_jobs,
}
