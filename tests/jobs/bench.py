# SPDX-License-Identifier: Apache-2.0
"""Jobs on a simulated machine: kinds that do nothing but keep account of what is done to them, and a look at every
event whether it was allowed to follow the one before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bottomhalf.aio import wait_while
from bottomhalf.block.errors import BlockError
from bottomhalf.jobs.job import Job
from bottomhalf.jobs.registry import Jobs
from bottomhalf.qapi.jobs import JobStatusChange, JobType
from bottomhalf.qapi.types import EventType
from tests.block.bench import Bench, sim_bench

# Facts of QEMU, as its interface has them; the package has them once more, in its own words.
FOLLOWS = {
    "undefined": {"created"},
    "created": {"running", "aborting", "null"},
    "running": {"paused", "ready", "waiting", "aborting"},
    "paused": {"running"},
    "ready": {"standby", "waiting", "aborting"},
    "standby": {"ready"},
    "waiting": {"pending", "aborting"},
    "pending": {"aborting", "concluded"},
    "aborting": {"concluded"},
    "concluded": {"null"},
}


class Account:
    """What was done to a job, in order."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.turns = 0
        self.turns_while_paused = 0


class StepJob(Job):
    """Works for ``turns`` turns, then is ready if it was told to, and fails where it was told to."""

    type = JobType.CREATE

    def __init__(
        self,
        jobs: Jobs,
        job_id: str,
        *,
        turns: int = 3,
        pause_ns: int = 1000,
        gets_ready: bool = False,
        fails: str = "",
        **options: Any,
    ) -> None:
        super().__init__(jobs, job_id, **options)
        self.account = Account()
        self.turns = turns
        self.pause_ns = pause_ns
        self.gets_ready = gets_ready
        self.fails = fails
        self.completing = False
        self.soft = False
        self.progress.total = turns

    async def run(self) -> None:
        while self.account.turns < self.turns and not self.is_cancelled:
            self.account.turns += 1
            self.account.turns_while_paused += self.paused
            self.progress.current += 1
            await self.sleep_ns(self.pause_ns)
        if self.gets_ready and not self.is_cancelled:
            self.set_ready()
            while not (self.completing or self.soft or self.is_cancelled):
                await self.wait("job-complete")
                assert not self.paused
        if self.fails == "run":
            raise OSError(5, "Input/output error")

    def on_complete(self) -> None:
        if not self.gets_ready:
            super().on_complete()
        self.completing = True
        self.enter()

    def on_cancel(self, force: bool) -> bool:
        if not force and self.status in ("ready", "standby"):
            self.soft = True
            return False
        return True

    def prepare(self) -> None:
        self.account.steps.append("prepare")
        if self.fails == "prepare":
            raise BlockError("prepare failed")

    def commit(self) -> None:
        self.account.steps.append("commit")

    def abort(self) -> None:
        self.account.steps.append("abort")

    def clean(self) -> None:
        self.account.steps.append("clean")


class JobBench:
    """A graph's bench and the jobs beside it."""

    def __init__(self, bench: Bench) -> None:
        self.graph_bench = bench
        self.context = bench.context
        self.events: list[tuple[str, str]] = []  # id and status, in order
        self.others: list[EventType] = []
        self._last: dict[str, str] = {}
        self.defects: list[Exception] = []
        self.jobs = Jobs(bench.context, self._told, lambda error, where: self.defects.append(error))

    def _told(self, event: EventType) -> None:
        if not isinstance(event, JobStatusChange):
            self.others.append(event)
            return
        before = self._last.get(event.id, "undefined")
        assert event.status in FOLLOWS[before], f"{event.id} went from {before} to {event.status}"
        self.events.append((event.id, str(event.status)))
        self._last[event.id] = str(event.status)
        if event.status == "null":
            del self._last[event.id]

    def path(self, job_id: str = "j") -> list[str]:
        """Where a job has stood."""
        return [status for each, status in self.events if each == job_id]

    def until(self, job: Job, *statuses: str) -> None:
        """Poll until the job stands there."""
        wait_while(self.context, lambda: job.status not in statuses, what=f"job {job.name} to be {statuses}")

    def settle(self, polls: int = 20) -> None:
        """Let things happen that need no time."""
        for _ in range(polls):
            if not self.context.poll(False):
                return


@contextmanager
def job_bench(seed: int, **files: int | bytes) -> Iterator[JobBench]:
    """A bench whose jobs have all come to an end, and been forgotten, when the test has succeeded."""
    with sim_bench(seed, **files) as bench:
        made = JobBench(bench)
        yield made
        made.jobs.close()
        assert not made.jobs.all()
        assert not made._last, f"never told of the end of {made._last}"
        assert not made.defects
