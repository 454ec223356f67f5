# SPDX-License-Identifier: Apache-2.0
"""How jobs end: all of a transaction together, or each in one of its own.

    body ends well -> waiting; all wait -> pending -> (finalize) prepare all -> commit, clean, concluded
    any of it fails -> the others are cancelled and waited for -> abort, clean, concluded

Whoever is pending waits for the user if any of them has auto-finalize=off. Jobs are taken the newest first, as QEMU
takes them: its users see the events. Plain code of the main thread; the drivers' steps and the wait for others poll.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bottomhalf.aio import wait_while
from bottomhalf.block.errors import BlockError
from bottomhalf.qapi.jobs import JobStatus

if TYPE_CHECKING:
    from bottomhalf.jobs.job import Job


class JobTransaction:
    """Jobs that end well together or not at all. Jobs that are concluded leave it."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []  # the newest first
        self._aborting = False

    def add(self, job: Job) -> None:
        """For Job: it is made for this transaction."""
        assert not self._aborting
        self._jobs.insert(0, job)

    def remove(self, job: Job) -> None:
        """For Job: it is not to be started."""
        self._jobs.remove(job)

    def ended(self, job: Job) -> None:
        """The body of a job has ended, or was cancelled before it began."""
        job.settle_result()
        if job.failure is not None:
            self.abort(job)
            return
        job.move_on(JobStatus.WAITING)
        if self._aborting or not all(each.status == JobStatus.WAITING for each in self._jobs):
            return
        for each in list(self._jobs):
            each.move_on(JobStatus.PENDING)
            if not each.auto_finalize:
                each.on_event(JobStatus.PENDING)
        if all(each.auto_finalize for each in self._jobs):
            self.finalize()

    def finalize(self) -> None:
        """All are pending: carry out what they have prepared."""
        jobs = list(self._jobs)
        for job in jobs:
            try:
                job.prepare()
            except (OSError, BlockError) as error:
                job.failure = error
                job.settle_result()
                self.abort(job)
                return
            if self._aborting:
                return  # it was cancelled while prepare() waited
        for job in jobs:
            self._conclude(job)

    def abort(self, first: Job) -> None:
        """A job has failed: cancel the others, and conclude all when they have ended."""
        if self._aborting:
            return  # whoever aborts waits for it
        self._aborting = True
        for job in self._jobs:
            if job is not first:
                job.mark_cancelled(force=True)
        while self._jobs:
            job = self._jobs[0]
            if not job.has_ended:
                self._end(job)
            self._conclude(job)

    def _end(self, job: Job) -> None:
        if job.status == JobStatus.CREATED:
            job.settle_result()
            return
        job.enter()
        wait_while(None, lambda: not job.has_ended, what=f"the end of job '{job.name}', which is cancelled")

    def _conclude(self, job: Job) -> None:
        self._jobs.remove(job)
        job.settle_result()
        if job.failure is None:
            job.commit()
        else:
            job.abort()
        job.clean()
        job.on_event(JobStatus.CONCLUDED)
        job.conclude()
