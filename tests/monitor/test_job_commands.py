# SPDX-License-Identifier: Apache-2.0
"""Jobs over QMP and HMP on the simulated machine: images made while clients come and go and nodes are drained, and the
end of a program that has jobs. What is refused, and in which words, tests/peers/test_jobs_as_qemu.py compares."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bottomhalf.drivers import creating
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.jobs.block_job import BlockJob
from bottomhalf.qapi.jobs import JobType
from tests.monitor.qmp_bench import QmpBench, QmpClient

MIB = 1 << 20


def concluded(bench: QmpBench, client: QmpClient, job_id: str = "j") -> Any:
    """The job as query-jobs tells it when it has ended."""
    bench.until(
        lambda: any(job.id == job_id and job.status == "concluded" for job in bench.storage.jobs.all()), "its end"
    )
    return next(job for job in client.call("query-jobs") if job["id"] == job_id)


def create(client: QmpClient, options: dict[str, Any], job_id: str = "j") -> None:
    client.call("blockdev-create", {"job-id": job_id, "options": options})


def test_an_image_is_made_and_used(seed: int) -> None:
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        create(client, {"driver": "file", "filename": "/new.qcow2", "size": 0})
        assert "error" not in concluded(bench, client)
        client.call("job-dismiss", {"id": "j"})
        client.call("blockdev-add", {"driver": "file", "node-name": "f", "filename": "/new.qcow2"})
        create(client, {"driver": "qcow2", "file": "f", "size": 8 * MIB, "cluster-size": 4096})
        assert "error" not in concluded(bench, client)
        statuses = [event["data"]["status"] for event in client.events if event["event"] == "JOB_STATUS_CHANGE"]
        whole = ["created", "running", "waiting", "pending", "concluded"]
        assert statuses == [*whole, "null", *whole]
        assert Header.parse(bench.host.durable_content("/new.qcow2")).cluster_size == 4096
        client.call("blockdev-add", {"driver": "qcow2", "node-name": "q", "file": "f"})
        client.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "/run/nbd.sock"}}})
        client.call("block-export-add", {"type": "nbd", "id": "e", "node-name": "q", "writable": True})
        assert client.call("query-blockstats", {"query-nodes": True})[1]["node-name"] == "q"


def test_on_a_node_of_an_iothread(seed: int) -> None:
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        bench.host.add_file("/a", b"junk" * 50_000)
        client.call("object-add", {"qom-type": "iothread", "id": "io"})
        client.call("blockdev-add", {"driver": "file", "node-name": "f", "filename": "/a"})
        client.call("x-blockdev-set-iothread", {"node-name": "f", "iothread": "io"})
        create(client, {"driver": "qcow2", "file": "f", "size": MIB, "preallocation": "metadata"})
        assert "error" not in concluded(bench, client)
        client.call("x-blockdev-set-iothread", {"node-name": "f", "iothread": None})
        client.call("blockdev-add", {"driver": "qcow2", "node-name": "q", "file": "f"})
        node = bench.storage.graph.nodes["q"]
        content = bytearray(MIB)
        bench.context.run(node.co_pread(0, memoryview(content)), what="a look")
        assert content == bytes(MIB), "nothing of what was in the file before is seen"


def test_an_image_that_would_be_its_own_data_file_keeps_its_content(seed: int) -> None:
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        bench.host.add_file("/a", b"junk" * 50_000)
        client.call("blockdev-add", {"driver": "file", "node-name": "f", "filename": "/a"})
        create(client, {"driver": "qcow2", "file": "f", "data-file": "f", "size": MIB})
        assert "Permission conflict on node 'f': permissions 'resize' are both" in concluded(bench, client)["error"]
        assert bench.host.content("/a") == b"junk" * 50_000 and list(bench.storage.graph.nodes) == ["f"]


def test_everything_at_any_moment(seed: int) -> None:
    """Images made, cancelled, dismissed and drained in any order: each job ends once, no node and no permission is left
    behind, and what was said to be made is an image."""
    rng = random.Random(seed)
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        for name in "abc":
            bench.host.add_file(f"/{name}", 0)
            client.call("blockdev-add", {"driver": "file", "node-name": name, "filename": f"/{name}"})
        graph = bench.storage.graph
        alive: set[str] = set()
        for number in range(rng.randint(3, 10)):
            act = rng.randrange(4)
            if act <= 1:
                name = rng.choice("abc")
                wanted: dict[str, Any] = {"driver": "qcow2", "file": name, "size": MIB}
                if rng.random() < 0.3:
                    wanted["file"] = {"driver": "raw", "file": name}
                if rng.random() < 0.3:
                    wanted["preallocation"] = "full"
                client.ask("blockdev-create", {"job-id": f"j{number}", "options": wanted})
                bench.until(lambda: client.messages, "an answer")
                client.messages.clear()
                alive.add(f"j{number}")
            elif act == 2 and alive:
                client.ask(rng.choice(["job-cancel", "job-dismiss"]), {"id": rng.choice(sorted(alive))})
                bench.until(lambda: client.messages, "an answer")
                client.messages.clear()
            else:
                with graph.drained(graph.nodes[rng.choice("abc")]):
                    pass
            for _ in range(rng.randint(0, 30)):
                bench.context.schedule_oneshot(lambda: None)  # so that there is something to do
                bench.storage.loop.run_once()
        for job in bench.storage.jobs.all():
            done = concluded(bench, client, str(job.id))
            assert done.get("error") in (None, "Operation canceled") or "ermission" in done["error"], done
            client.call("job-dismiss", {"id": job.id})
        assert sorted(graph.nodes) == ["a", "b", "c"]
        assert not any(node.parents or node.references for node in graph.nodes.values()) and not graph.backends
        for name in "abc":
            content = bench.host.content(f"/{name}")
            if content and not any("Operation" in str(event) for event in client.events):
                assert Header.parse(content).size in (0, MIB)
            create(client, {"driver": "qcow2", "file": name, "size": MIB}, f"last-{name}")
            assert "error" not in concluded(bench, client, f"last-{name}")
            assert Header.parse(bench.host.content(f"/{name}")).size == MIB


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_a_full_or_broken_disk(seed: int, fault: str) -> None:
    """The job says it, and nothing of it is left."""
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        bench.host.add_file("/a", 0)
        client.call("blockdev-add", {"driver": "file", "node-name": "f", "filename": "/a"})
        node = bench.storage.graph.nodes["f"]

        async def fails(offset: int, buffer: memoryview, flags: int = 0) -> None:
            raise OSError(28 if fault == "ENOSPC" else 5, "No space left on device" if fault == "ENOSPC" else "I/O")

        node.co_pwrite = fails  # type: ignore[method-assign]
        create(client, {"driver": "qcow2", "file": "f", "size": MIB})
        assert concluded(bench, client)["error"] == ("No space left on device" if fault == "ENOSPC" else "I/O")
        assert not node.parents and not node.references and list(bench.storage.graph.nodes) == ["f"]


def test_the_program_ends_while_a_job_works(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled and waited for, and everybody hears of it."""
    from bottomhalf.aio.sleep import sleep_ns

    async def slowly(graph: Any, options: Any) -> None:
        await sleep_ns(10**9)

    creators: dict[str, Callable[[Any, Any], Awaitable[None]]] = {"file": slowly}
    monkeypatch.setattr("bottomhalf.monitor.job_commands.CREATORS", creators)
    assert "qcow2" in creating.CREATORS
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        create(client, {"driver": "file", "filename": "/a", "size": 0})
        assert client.call("query-jobs")[0]["status"] == "running"
        assert client.fails("job-dismiss", {"id": "j"}) == (
            "Job 'j' in state 'running' cannot accept command verb 'dismiss'"
        )
        client.call("job-pause", {"id": "j"})
        assert client.fails("job-pause", {"id": "j"}) == "Job is already paused"
        bench.end()
        assert [event["data"]["status"] for event in client.events][-3:] == ["aborting", "concluded", "null"]


class Copying(BlockJob):
    """Stands for a job that copies."""

    type = JobType.BACKUP

    async def run(self) -> None:
        self.progress.total = 10
        self.progress.current = 4
        while not self.is_cancelled:
            await self.wait("its end")


def test_a_block_job_is_listed(seed: int) -> None:
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        client.call("blockdev-add", {"driver": "null-co", "node-name": "n"})
        Copying(bench.storage.jobs, "copy", bench.storage.graph.nodes["n"], speed=3).start()
        assert client.call("query-block-jobs") == [
            {
                "auto-finalize": True,
                "io-status": "ok",
                "device": "copy",
                "auto-dismiss": True,
                "busy": False,
                "len": 10,
                "offset": 4,
                "status": "running",
                "paused": False,
                "speed": 3,
                "ready": False,
                "type": "backup",
            }
        ]
        graph = client.call("x-debug-query-block-graph")
        assert {"name": "copy", "type": "block-job"}.items() <= graph["nodes"][-1].items()
        person = bench.hmp()
        assert person.ask("info jobs") == "copy: backup, running, 4 of 10\n"
        words = "Type backup, device copy: Completed 4 of 10 bytes, speed limit 3 bytes/s\n"
        assert person.ask("info block-jobs") == words
        assert person.ask("job_pause copy") == ""
        assert client.call("query-jobs")[0]["status"] == "paused"
        assert person.ask("job_finalize copy") == (
            "Error: Job 'copy' in state 'paused' cannot accept command verb 'finalize'\n"
        )
        assert person.ask("job_cancel copy") == ""
        bench.until(lambda: not bench.storage.jobs.all(), "its end")
        bench.settle()
        last = [event["data"].get("status", event["event"]) for event in client.events[-4:]]
        assert last == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


def test_blockstats_for_people(seed: int) -> None:
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        bench.serve(client, "d")
        peer = bench.nbd_client("e-d")
        person = bench.hmp()
        assert person.ask("info jobs") == "No jobs\n" and person.ask("info block-jobs") == "No active jobs\n"
        assert person.ask("job_cancel x") == "Error: Job not found\n"
        before = person.ask("info blockstats").splitlines()
        assert before[0].startswith("e-d: rd_bytes=0 wr_bytes=0 unmap_bytes=0 rd_operations=0")
        assert before[1] == "d: wr_highest_offset=0"
        assert person.ask('qemu-io d "write -q 4096 512"') == ""
        assert person.ask("info blockstats").splitlines()[1] == "d: wr_highest_offset=4608"
        peer.close()
