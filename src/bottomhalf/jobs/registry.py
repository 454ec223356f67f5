# SPDX-License-Identifier: Apache-2.0
"""All jobs of one program, by id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bottomhalf.aio import AioContext, wait_while
from bottomhalf.block.errors import BlockError
from bottomhalf.block.graph import is_well_formed_id
from bottomhalf.jobs.job import Job
from bottomhalf.qapi.jobs import JobInfo, JobStatus, JobStatusChange
from bottomhalf.qapi.types import EventType

# QEMU has no limit. A job that nobody dismisses stays, so a client that goes on making some would fill the memory.
JOBS_MAX: Final = 4096


class Jobs:
    """``emit`` is given every event, from any thread, and ``report_defect`` exceptions that no job should raise. Main
    thread."""

    def __init__(
        self,
        main: AioContext,
        emit: Callable[[EventType], object] | None = None,
        report_defect: Callable[[Exception, str], object] | None = None,
    ) -> None:
        self.main = main
        self.lock = main.host.lock()
        self.emit = emit or (lambda event: None)
        self.report_defect = report_defect or (lambda error, where: None)
        self._jobs: list[Job] = []  # the newest first, as QEMU lists them

    def all(self) -> tuple[Job, ...]:
        """All jobs, the newest first."""
        return tuple(self._jobs)

    def check_id(self, job_id: str | None) -> None:
        """BlockError if no job can be made with that id."""
        if job_id is not None:
            if not is_well_formed_id(job_id):
                raise BlockError(f"Invalid job ID '{job_id}'")
            if self.find(job_id) is not None:
                raise BlockError(f"Job ID '{job_id}' already in use")
        if len(self._jobs) >= JOBS_MAX:
            raise BlockError(f"There are {JOBS_MAX} jobs already; dismiss those that have ended")

    def find(self, job_id: str) -> Job | None:
        """The job of that id."""
        return next((job for job in self._jobs if job.id == job_id), None)

    def get(self, job_id: str) -> Job:
        """The job of that id. BlockError."""
        found = self.find(job_id)
        if found is None:
            raise BlockError("Job not found")
        return found

    def infos(self) -> list[JobInfo]:
        """query-jobs."""
        return [job.info() for job in self._jobs if job.id is not None]

    def add(self, job: Job) -> None:
        """For Job."""
        self._jobs.insert(0, job)

    def remove(self, job: Job) -> None:
        """For Job."""
        self._jobs.remove(job)

    def tell(self, job_id: str, status: JobStatus) -> None:
        """For Job: it stands somewhere else. From any thread."""
        self.emit(JobStatusChange(id=job_id, status=status))

    def finish(self, job: Job) -> None:
        """Wait for a job's last step. (Somebody has to have asked for its end, or it has to come by itself.)"""
        wait_while(
            None,
            lambda: job.status not in (JobStatus.PENDING, JobStatus.CONCLUDED, JobStatus.NULL),
            what=f"the end of job '{job.name}'",
        )

    def close(self) -> None:
        """Cancel all and wait for them; forget those that have ended."""
        while self._jobs:
            job = self._jobs[0]
            job.cancel(force=True)
            if job.status != JobStatus.NULL:
                self.finish(job)
            if job.status == JobStatus.CONCLUDED:
                job.cancel(force=True)
