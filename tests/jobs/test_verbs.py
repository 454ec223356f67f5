# SPDX-License-Identifier: Apache-2.0
"""Every verb in every state, against the table of QEMU's interface, and in its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bottomhalf.block.errors import BlockError
from bottomhalf.jobs.job import Job
from bottomhalf.jobs.transaction import JobTransaction
from tests.jobs.bench import JobBench, StepJob, job_bench

ALIVE = {"created", "running", "paused", "ready", "standby"}
ACCEPTED = {
    "cancel": ALIVE | {"waiting", "pending"},
    "pause": ALIVE,
    "complete": {"ready", "standby"},
    "finalize": {"pending"},
    "dismiss": {"concluded"},
}
VERBS: dict[str, Callable[[Job], object]] = {
    "cancel": Job.user_cancel,
    "pause": Job.user_pause,
    "resume": Job.user_resume,
    "complete": Job.user_complete,
    "finalize": Job.user_finalize,
    "dismiss": Job.user_dismiss,
}
STATES = [*sorted(ALIVE), "waiting", "pending", "aborting", "concluded"]


class Asking(StepJob):
    """Asks something of itself while it is aborted."""

    verb = ""
    answer = ""

    def abort(self) -> None:
        super().abort()
        try:
            VERBS[self.verb](self)
            self.answer = "accepted"
        except BlockError as error:
            self.answer = str(error)


def bring_to(bench: JobBench, state: str, **options: Any) -> StepJob:
    """A job that stands there."""
    jobs = bench.jobs
    if state == "waiting":
        together = JobTransaction()
        other = StepJob(jobs, "other", turns=10**6, transaction=together)
        other.start()
        options["transaction"] = together
    job = StepJob(
        jobs,
        "j",
        turns=10**6 if state in ("running", "paused") else 2,
        gets_ready=state in ("ready", "standby"),
        auto_finalize=state != "pending",
        auto_dismiss=False,
        **options,
    )
    if state == "created":
        return job
    job.start()
    if state == "paused":
        job.user_pause()
    elif state == "standby":
        bench.until(job, "ready")
        job.user_pause()
    bench.until(job, state)
    return job


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", [state for state in STATES if state != "aborting"])
def test_verb(seed: int, state: str, verb: str) -> None:
    with job_bench(seed) as bench:
        job = bring_to(bench, state)
        try:
            VERBS[verb](job)
            answer = "accepted"
        except BlockError as error:
            answer = str(error)
        if verb == "resume":
            rests = state in ("paused", "standby")
            assert answer == ("accepted" if rests else "Can't resume a job that was not paused")
        elif state in ACCEPTED[verb] and not (verb == "pause" and state in ("paused", "standby")):
            assert answer == "accepted"
        elif state in ACCEPTED[verb]:
            assert answer == "Job is already paused"
        else:
            assert answer == f"Job 'j' in state '{state}' cannot accept command verb '{verb}'"
        after = {"cancel": "concluded", "dismiss": "null", "complete": "concluded", "finalize": "concluded"}
        if verb == "complete" and state == "standby":
            bench.settle()
            assert job.status == "standby"  # it has heard, and will when it goes on
            job.user_resume()
        if verb in after and answer == "accepted":
            if state == "created":
                assert job.status == "null"  # what was never started is not worth a word
            else:
                bench.until(job, after[verb])
        if verb == "cancel" and answer == "accepted":
            assert job.info().error == "Operation canceled"
            assert job.account.steps == ["abort", "clean"]


@pytest.mark.parametrize("verb", VERBS)
def test_verb_while_aborting(seed: int, verb: str) -> None:
    with job_bench(seed) as bench:
        job = Asking(bench.jobs, "j", fails="run", auto_dismiss=False)
        job.verb = verb
        job.start()
        bench.until(job, "concluded")
        wrong = f"Job 'j' in state 'aborting' cannot accept command verb '{verb}'"
        assert job.answer == ("Can't resume a job that was not paused" if verb == "resume" else wrong)
        assert job.info().error == "Input/output error"


def test_a_kind_that_cannot_be_completed(seed: int) -> None:
    class Never(StepJob):
        def on_complete(self) -> None:
            Job.on_complete(self)

    with job_bench(seed) as bench:
        job = Never(bench.jobs, "j", gets_ready=True)
        job.start()
        bench.until(job, "ready")
        with pytest.raises(BlockError, match=r"^The active block job 'j' cannot be completed$"):
            job.user_complete()
        job.user_cancel()
        with pytest.raises(BlockError, match=r"^The active block job 'j' cannot be completed$"):
            job.user_complete()


@pytest.mark.parametrize("wrong", ["", "1a", "_a", "-a", ".a", "#a", "a b", " ", "12", "ä"])
def test_ids(seed: int, wrong: str) -> None:
    with job_bench(seed) as bench:
        with pytest.raises(BlockError, match="Invalid job ID"):
            StepJob(bench.jobs, wrong)
        StepJob(bench.jobs, "a-b.c_1")
        with pytest.raises(BlockError, match=r"^Job ID 'a-b.c_1' already in use$"):
            StepJob(bench.jobs, "a-b.c_1")
        with pytest.raises(BlockError, match=r"^Job not found$"):
            bench.jobs.get("nope")


def test_the_way_of_a_job(seed: int) -> None:
    with job_bench(seed) as bench:
        job = StepJob(bench.jobs, "j")
        assert [each.id for each in bench.jobs.infos()] == ["j"]
        job.start()
        job.user_pause()
        bench.until(job, "paused")
        turns = job.account.turns
        bench.settle()
        assert job.account.turns == turns
        job.user_resume()
        bench.until(job, "null")
        path = ["created", "running", "paused", "running", "waiting", "pending", "concluded", "null"]
        assert bench.path() == path
        assert job.account.steps == ["prepare", "commit", "clean"]
        assert not bench.jobs.infos()
        StepJob(bench.jobs, "j", auto_dismiss=False)  # the id is free again


def test_soft_cancel_of_a_ready_job_is_an_end_without_loss(seed: int) -> None:
    with job_bench(seed) as bench:
        job = StepJob(bench.jobs, "j", gets_ready=True, auto_dismiss=False)
        job.start()
        bench.until(job, "ready")
        job.user_cancel(force=False)
        bench.until(job, "concluded")
        assert job.info().error is None and job.account.steps == ["prepare", "commit", "clean"]


def test_soft_cancel_before_that_is_not(seed: int) -> None:
    with job_bench(seed) as bench:
        job = StepJob(bench.jobs, "j", turns=10**6, gets_ready=True, auto_dismiss=False)
        job.start()
        job.user_cancel(force=False)
        bench.until(job, "concluded")
        assert job.info().error == "Operation canceled" and job.account.steps == ["abort", "clean"]


def test_a_defect_of_a_job_is_reported_and_ends_it(seed: int) -> None:
    class Broken(StepJob):
        async def run(self) -> None:
            raise ValueError("oops")

    with job_bench(seed) as bench:
        job = Broken(bench.jobs, "j", auto_dismiss=False)
        job.start()
        bench.until(job, "concluded")
        assert job.info().error == "internal error: ValueError: oops"
        assert [str(error) for error in bench.defects] == ["oops"]
        bench.defects.clear()


def test_the_number_of_jobs_is_limited(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bottomhalf.jobs.registry.JOBS_MAX", 3)
    with job_bench(seed) as bench:
        for number in range(3):
            StepJob(bench.jobs, f"j{number}")
        with pytest.raises(BlockError, match="There are 3 jobs already"):
            StepJob(bench.jobs, "j3")
