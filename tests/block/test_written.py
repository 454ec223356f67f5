# SPDX-License-Identifier: Apache-2.0
"""The highest write of every node is told right, whoever wrote and however the graph has changed meanwhile."""

from __future__ import annotations

import random
from typing import Any

from bottomhalf.block import Graph, Node
from bottomhalf.block.filter import Filter
from bottomhalf.block.written import written_ends
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.request import READ, Request
from tests.block.bench import discard, flush, sim_bench, write, zero

SIZE = 1 << 16


class Passing(Filter):
    driver = "passing"


class Truth(Filter):
    """Sees every request, as the slow way would."""

    driver = "truth"

    def __init__(self, graph: Graph, **options: Any) -> None:
        super().__init__(graph, **options)
        self.seen_end = 0

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if requests[0].op in (1, 4):
            self.seen_end = max(self.seen_end, *[request.offset + request.length for request in requests])
        return super().submit_batch(requests)


def test_writes_and_zero_writes_count_and_others_do_not(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as bench:
        file = bench.file("disk", unmap=True)
        raw = RawNode(bench.graph, file=file, offset=4096)
        user = bench.user(raw)
        user.do(discard(32768, 4096), flush(), Request(READ, 40960, 4096, memoryview(bytearray(4096))))
        assert set(written_ends(bench.graph).values()) == {0}
        user.do(write(8192, b"x" * 512))
        assert written_ends(bench.graph) == {file: 8704 + 4096, raw: 8704}
        user.do(zero(16384, 4096))
        user.do(write(0, b"x"))
        assert written_ends(bench.graph) == {file: 20480 + 4096, raw: 20480}
        assert user.do(write(SIZE - 4096, b"x"), write(100, b"x")) == [-5, 0]  # what is refused was not written
        assert written_ends(bench.graph)[raw] == 20480


def test_a_coroutine_below_the_backends(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as bench:
        file = bench.file("disk")
        passing = Passing(bench.graph, file=file)
        bench.user(passing)
        bench.context.run(passing.co_pwrite(512, memoryview(b"x" * 512)), what="a write")
        assert written_ends(bench.graph) == {file: 1024, passing: 1024}


def test_the_graph_changes(seed: int) -> None:
    """A node knows what was written while it was there, and no more."""
    with sim_bench(seed, one=SIZE, two=SIZE) as bench:
        graph = bench.graph
        one, two = bench.file("one"), bench.file("two")
        two.monitor_owned = True
        top = Passing(graph, file=one)
        top.monitor_owned = True
        one.monitor_owned = True
        user = bench.user(top)
        user.do(write(0, b"x" * 8192))
        between = Passing(graph, file=one)
        between.monitor_owned = True
        graph.insert_node(between)
        assert written_ends(graph) == {one: 8192, two: 0, top: 8192, between: 0}
        user.do(write(0, b"x" * 512))
        assert written_ends(graph)[between] == 512
        edge = top.child("file")
        assert edge is not None
        graph.replace_child(edge, two)
        user.do(write(0, b"x" * 1024))
        assert written_ends(graph) == {one: 8192, two: 1024, top: 8192, between: 512}
        user.backend.remove()
        user.backend.insert(two)
        user.do(write(0, b"x" * 2048))
        assert written_ends(graph) == {one: 8192, two: 2048, top: 8192, between: 512}
        for node in (one, two, top, between):
            node.monitor_owned = False
        user.backend.close()


def test_a_smaller_disk_keeps_its_number(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as bench:
        file = bench.file("disk")
        user = bench.user(file)
        user.do(write(SIZE - 512, b"x" * 512))
        bench.context.run(file.co_truncate(4096), what="a resize")
        assert user.do(write(0, b"x"), write(4096, b"x")) == [0, -5]
        bench.context.run(file.co_truncate(SIZE), what="a resize")
        assert user.do(write(4096, b"x")) == [0]
        assert written_ends(bench.graph) == {file: SIZE}


def test_random_writes_through_changing_filters(seed: int) -> None:
    """Against filters that count every request."""
    rng = random.Random(seed)
    with sim_bench(seed, disk=SIZE) as bench:
        graph = bench.graph
        file = bench.file("disk")
        file.monitor_owned = True
        users = [bench.user(file) for _ in range(2)]
        truths: list[Truth] = []
        for _ in range(60):
            act = rng.randrange(4)
            if act == 0 and len(truths) < 5:
                below: Node = rng.choice([file, *truths])
                truth = Truth(graph, file=below)
                truth.monitor_owned = True
                graph.insert_node(truth)
                truths.append(truth)
            elif act == 1 and truths and rng.random() < 0.3:
                gone = truths.pop(rng.randrange(len(truths)))
                gone.monitor_owned = False
                graph.remove_filter(gone)
            else:
                user = rng.choice(users)
                count = rng.randint(1, 4)
                user.do(*[write(rng.randrange(SIZE - 512), b"x" * rng.randint(1, 512)) for _ in range(count)])
            ends = written_ends(graph)
            assert {truth: ends[truth] for truth in truths} == {truth: truth.seen_end for truth in truths}
            assert all(ends[file] >= ends[truth] for truth in truths)
        file.monitor_owned = False
        for user in users:
            user.backend.close()
        for truth in truths:
            truth.monitor_owned = False
