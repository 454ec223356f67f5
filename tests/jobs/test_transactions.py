# SPDX-License-Identifier: Apache-2.0
"""Jobs that end together. The orders are those in which QEMU's daemon was seen to tell them: the newest first."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bottomhalf.block.errors import BlockError
from bottomhalf.jobs.transaction import JobTransaction
from tests.jobs.bench import JobBench, StepJob, job_bench


def pair(bench: JobBench, **options: dict[str, object]) -> tuple[StepJob, StepJob]:
    together = JobTransaction()
    made = []
    for name in ("x", "y"):
        own: dict[str, Any] = options.get(name, {})
        made.append(StepJob(bench.jobs, name, transaction=together, auto_dismiss=False, **own))
    for job in made:
        job.start()
    return made[0], made[1]


def test_both_end_well(seed: int) -> None:
    with job_bench(seed) as bench:
        x, y = pair(bench, x={"turns": 1}, y={"turns": 5})
        bench.until(x, "waiting")
        assert y.status == "running" and not x.account.steps
        bench.until(x, "concluded")
        assert x.info().error is None is y.info().error
        ends = [event for event in bench.events if event[1] in ("pending", "concluded")]
        assert ends == [("y", "pending"), ("x", "pending"), ("y", "concluded"), ("x", "concluded")]
        assert x.account.steps == y.account.steps == ["prepare", "commit", "clean"]


@pytest.mark.parametrize("who", ["x", "y"])
@pytest.mark.parametrize("how", ["run", "prepare"])
def test_one_fails(seed: int, who: str, how: str) -> None:
    with job_bench(seed) as bench:
        jobs = dict(zip("xy", pair(bench, **{who: {"fails": how}, "xy".replace(who, ""): {"turns": 7}}), strict=True))
        other = jobs["xy".replace(who, "")]
        bench.until(jobs[who], "concluded")
        bench.until(other, "concluded")
        assert jobs[who].info().error == ("prepare failed" if how == "prepare" else "Input/output error")
        assert other.info().error == "Operation canceled"
        assert all(job.account.steps[-2:] == ["abort", "clean"] for job in jobs.values())


@pytest.mark.parametrize("who", ["x", "y"])
@pytest.mark.parametrize("pending", [False, True])
def test_one_is_cancelled(seed: int, who: str, pending: bool) -> None:
    with job_bench(seed) as bench:
        x, y = pair(bench, x={"auto_finalize": False}, y={"turns": 2 if pending else 10**6})
        if pending:
            bench.until(x, "pending")
        {"x": x, "y": y}[who].user_cancel()
        bench.until(x, "concluded")
        assert x.info().error == y.info().error == "Operation canceled"
        ends = [event for event in bench.events if event[1] in ("aborting", "concluded")]
        if pending:
            assert ends == [("y", "aborting"), ("y", "concluded"), ("x", "aborting"), ("x", "concluded")]


def test_one_waits_for_the_user_and_so_both_do(seed: int) -> None:
    with job_bench(seed) as bench:
        x, y = pair(bench, x={"auto_finalize": False})
        bench.until(x, "pending")
        bench.settle()
        assert y.status == "pending" and not y.account.steps
        y.user_finalize()
        assert x.status == y.status == "concluded"


def test_cancelled_while_others_have_not_started(seed: int) -> None:
    with job_bench(seed) as bench:
        together = JobTransaction()
        x, y = (StepJob(bench.jobs, name, transaction=together) for name in ("x", "y"))
        x.start()
        x.user_cancel()
        bench.until(x, "null")
        assert y.status == "null" and y.account.steps == ["abort", "clean"] and y.account.turns == 0


def test_cancelling_while_the_other_ends(seed: int) -> None:
    """One has ended but nobody knows it yet when the other is cancelled: both are cancelled."""
    with job_bench(seed) as bench:
        x, y = pair(bench, x={"turns": 10**6}, y={"turns": 0})
        assert y.has_left and y.status == "running"
        x.user_cancel()
        bench.until(x, "concluded")
        assert x.info().error == y.info().error == "Operation canceled"


def test_any_verb_at_any_moment(seed: int) -> None:
    """Jobs in transactions, and users who do whatever they like: what comes out is a legal way for each job (the bench
    looks), commits of all of a transaction or of none, one end for each, and no work while a job is paused."""
    rng = random.Random(seed)
    with job_bench(seed) as bench:
        all_jobs: list[StepJob] = []
        groups: list[list[StepJob]] = []
        for number in range(rng.randint(1, 4)):
            together = JobTransaction()
            group = [
                StepJob(
                    bench.jobs,
                    f"j{number}.{n}",
                    turns=rng.randint(0, 6),
                    pause_ns=rng.choice([0, 1000, 10**6]),
                    gets_ready=rng.random() < 0.3,
                    fails=rng.choice(["", "", "", "run", "prepare"]),
                    transaction=together,
                    auto_finalize=rng.random() < 0.7,
                    auto_dismiss=rng.random() < 0.5,
                )
                for n in range(rng.randint(1, 3))
            ]
            groups.append(group)
            all_jobs += group
        for job in all_jobs:
            if rng.random() < 0.9:
                job.start()
        verbs = ["user_pause", "user_resume", "user_cancel", "user_complete", "user_finalize", "user_dismiss", "drain"]
        for _ in range(rng.randint(5, 60)):
            job = rng.choice(all_jobs)
            verb = rng.choice(verbs)
            if verb == "drain":
                job.pause()
                bench.settle(3)
                job.resume()
            elif verb != "user_cancel" or rng.random() < 0.3:
                try:
                    getattr(job, verb)()
                except BlockError:
                    pass
            for _ in range(rng.randint(0, 3)):
                bench.context.poll(False)
            if rng.random() < 0.2 and any(each.status in ("running", "ready") for each in all_jobs):
                bench.context.poll(True) if any(each.status == "running" for each in all_jobs) else None
        bench.jobs.close()
        for group in groups:
            ways = [job.account.steps for job in group]
            committed = [job for job in group if "commit" in job.account.steps]
            assert len(committed) in (0, len(group)), ways
            for job in group:
                steps = job.account.steps
                assert steps.count("commit") + steps.count("abort") == 1 and steps[-1] == "clean"
                assert job.status == "null"
                assert not job.account.turns_while_paused
                assert ("commit" in steps) == (job.failure is None)
