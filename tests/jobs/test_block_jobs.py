# SPDX-License-Identifier: Apache-2.0
"""Jobs that stand in the graph: drained sections pause them, they move with their nodes, and they have events."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bottomhalf.aio import current, wait_while
from bottomhalf.block import BlockError, Node
from bottomhalf.block.error_policy import ErrorAction, ErrorPolicy, OnError
from bottomhalf.host.protocol import PERM_ALL, PERM_RESIZE, PERM_WRITE
from bottomhalf.host.request import READ, WRITE
from bottomhalf.jobs.block_job import BlockJob
from bottomhalf.jobs.registry import Jobs
from bottomhalf.qapi.commands import event_data
from bottomhalf.qapi.jobs import JobType
from tests.block.bench import write
from tests.block.parts import threads
from tests.jobs.bench import JobBench, job_bench


class Rounds(BlockJob):
    """Goes round until it is told to complete."""

    type = JobType.BACKUP

    def __init__(self, jobs: Jobs, job_id: str, node: Node, **options: Any) -> None:
        super().__init__(jobs, job_id, node, **options)
        self.rounds = 0
        self.completing = False
        self.strays = 0

    async def run(self) -> None:
        while not self.is_cancelled and not self.completing:
            self.rounds += 1
            self.strays += current().context is not self.context
            await self.sleep_ns(1_000_000)

    def end(self) -> None:
        self.completing = True
        self.enter()


def going(bench: JobBench, job: Rounds) -> None:
    """Poll until it has gone on for some rounds."""
    rounds = job.rounds
    wait_while(None, lambda: job.rounds < rounds + 2 and bench.context.notify() is None, what="the job to go on")


def settled(bench: JobBench, job: Rounds, status: str) -> None:
    wait_while(None, lambda: job.status != status and bench.context.notify() is None, what=f"the job to be {status}")


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_drained_sections_pause_it_once_per_edge(seed: int, everything: bool, in_thread: bool) -> None:
    with job_bench(seed, a=4096, b=4096) as bench, threads(bench.graph_bench, "io") as (thread,):
        graph = bench.graph_bench.graph
        source, target = bench.graph_bench.file("a"), bench.graph_bench.file("b")
        if in_thread:
            graph.move(source, thread.context)
            graph.move(target, thread.context)
        job = Rounds(bench.jobs, "j", source)
        job.use(target, "target", 0, PERM_ALL)
        job.start()
        for node in (source, target, source):
            going(bench, job)
            with graph.drained_all() if everything else graph.drained(node):
                assert job.pause_count == (2 if everything else 1)
                assert (job.paused, job.busy, job.status) == (True, False, "paused")
                rounds = job.rounds
                bench.context.poll(False)
                assert job.rounds == rounds
            assert job.pause_count == 0
        going(bench, job)
        job.end()
        settled(bench, job, "null")
        assert not source.parents and source.closed and target.closed


def test_what_the_user_paused_stays_so_after_a_drained_section(seed: int) -> None:
    with job_bench(seed, a=4096) as bench:
        node = bench.graph_bench.file("a")
        job = Rounds(bench.jobs, "j", node)
        job.start()
        job.user_pause()
        bench.until(job, "paused")
        with bench.graph_bench.graph.drained(node):
            assert job.pause_count == 2
        bench.settle()
        assert job.status == "paused" and bench.path().count("paused") == 1
        job.user_resume()
        going(bench, job)
        with bench.graph_bench.graph.drained(node):
            job.user_cancel()  # the section does not hold it up
            bench.until(job, "null")


def test_it_moves_with_its_node(seed: int) -> None:
    with job_bench(seed, a=4096) as bench, threads(bench.graph_bench, "io") as (thread,):
        node = bench.graph_bench.file("a")
        job = Rounds(bench.jobs, "j", node)
        job.start()
        for context in (thread.context, bench.context, thread.context, bench.context):
            bench.graph_bench.graph.move(node, context)
            assert job.context is context
            going(bench, job)
        assert not job.strays
        bench.graph_bench.graph.move(node, thread.context)
        job.user_pause()
        settled(bench, job, "paused")
        bench.graph_bench.graph.move(node, bench.context)
        job.user_resume()
        going(bench, job)
        assert not job.strays
        job.end()
        settled(bench, job, "null")


def test_its_nodes_are_moved_together(seed: int) -> None:
    with job_bench(seed, a=4096, b=4096) as bench, threads(bench.graph_bench, "io") as (thread,):
        source, target = bench.graph_bench.file("a"), bench.graph_bench.file("b")
        job = Rounds(bench.jobs, "j", source)
        job.use(target, "target", 0, PERM_ALL)
        bench.graph_bench.graph.move(source, thread.context)
        assert target.context is job.context is thread.context
        bench.graph_bench.graph.move(target, bench.context)
        assert source.context is job.context is bench.context


def test_permissions(seed: int) -> None:
    with job_bench(seed, a=4096) as bench:
        node = bench.graph_bench.file("a")
        job = Rounds(bench.jobs, "j", node, shared=PERM_ALL & ~PERM_WRITE)
        with pytest.raises(BlockError, match="'write'"):
            Rounds(bench.jobs, "k", node, held=PERM_WRITE)
        with pytest.raises(BlockError, match="'write'"):
            job.use(node, "target", PERM_WRITE, PERM_ALL)
        assert [each.id for each in bench.jobs.infos()] == ["j"]
        assert bench.path("k") == ["created", "null"]
        job.user_cancel()
        bench.graph_bench.user(bench.graph_bench.file("a"), held=PERM_WRITE | PERM_RESIZE)


def test_events(seed: int) -> None:
    """As QEMU's daemon tells them: of the job's end before it is concluded."""
    with job_bench(seed, a=4096) as bench:
        node = bench.graph_bench.file("a")
        node.monitor_owned = True
        for end, name, last in (
            (Rounds.end, "BLOCK_JOB_COMPLETED", {}),
            (Rounds.user_cancel, "BLOCK_JOB_CANCELLED", {}),
        ):
            job = Rounds(bench.jobs, "j", node, speed=7, auto_finalize=False)
            job.progress.total, job.progress.current = 5, 3
            job.start()
            job.end()
            bench.until(job, "pending")
            assert [event_data(event) for event in bench.others] == [{"type": "backup", "id": "j"}]
            (job.user_finalize if end is Rounds.end else job.user_cancel)()
            event = bench.others[-1]
            assert type(event).qmp_name == name
            expected = {"type": "backup", "device": "j", "len": 5, "offset": 3, "speed": 7, **last}
            assert event_data(event) == expected
            bench.others.clear()
        node.monitor_owned = False


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_that_stops_it(seed: int, number: int) -> None:
    with job_bench(seed, a=4096) as bench:
        node = bench.graph_bench.file("a")
        job = Rounds(bench.jobs, "j", node, policy=ErrorPolicy(OnError.REPORT, OnError.STOP))
        job.start()
        assert job.on_error(READ, number) == ErrorAction.REPORT
        assert job.on_error(WRITE, number) == ErrorAction.STOP
        assert [event_data(event) for event in bench.others] == [
            {"device": "j", "operation": "read", "action": "report"},
            {"device": "j", "operation": "write", "action": "stop"},
        ]
        bench.until(job, "paused")
        info = job.block_info()
        assert (info.io_status, info.paused) == ("nospace" if number == errno.ENOSPC else "failed", True)
        job.user_resume()
        going(bench, job)
        assert job.block_info().io_status == "ok"


def test_a_node_that_loses_its_last_user_meanwhile(seed: int) -> None:
    """The job waits for the user's request; then it is the only one who uses the node."""
    with job_bench(seed, a=4096) as bench:
        it = bench.graph_bench
        it.host.set_cached("a", "never")
        node = it.file("a")
        user = it.user(node)
        fault = it.host.fault(path="a", op=WRITE, hold=True)
        user.submit(write(0, b"x" * 512))
        it.context.timer(fault.remove, name="the write ends").arm_ns(it.context.now_ns() + 10_000_000)
        it.context.schedule_oneshot(user.backend.close)
        job = Rounds(bench.jobs, "j", node)
        assert not node.closed and [edge.node for edge in job.edges] == [node]
        job.clean()
        job.give_up()


def test_a_node_that_is_closed_is_refused(seed: int) -> None:
    with job_bench(seed, a=4096) as bench:
        node = bench.graph_bench.file("a", "a")
        bench.graph_bench.graph.release(node)
        with pytest.raises(BlockError, match=r"^Node 'a' was closed meanwhile$"):
            Rounds(bench.jobs, "j", node)
