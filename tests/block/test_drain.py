# SPDX-License-Identifier: Apache-2.0
"""Drained sections: nothing in flight, nothing new arrives, and afterwards everything goes on, in order, once."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.aio import IOThread, kick, wait_while
from bottomhalf.block import BlockBackend, BlockError, Graph, Node
from bottomhalf.drivers.null import NullAioNode, NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import PERM_ALL, PERM_RESIZE, PERM_WRITE
from bottomhalf.host.request import READ, WRITE, Request
from tests.block.bench import Bench, User, bench, flush, read, sim_bench, write

SIZE = 65536


class Told(Node):
    """A filter that notes when it is drained, and its parents."""

    driver = "told"

    def __init__(self, graph: Graph, name: str, file: Node, log: list[str]) -> None:
        super().__init__(graph, name)
        self.log = log
        self.drained = False  # set by a test within its section
        self.attach(file, "file")
        self.size = file.size

    def open_size(self) -> int:
        return self.children[0].node.size

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        # Not quiesce_counter: another thread may have begun a section that has yet to wait for this very request.
        assert not self.drained, "a request reaches a drained node"
        return self.children[0].node.submit_batch(requests)

    def drain_begin(self) -> None:
        self.log.append(f"{self.name} begin")

    def drain_end(self) -> None:
        self.log.append(f"{self.name} end")


def test_requests_in_flight_end_first(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "never")
        file = it.file("disk")
        user = it.user(RawNode(it.graph, file=file))
        requests = [read(n * 512, 512) for n in range(40)]
        user.submit(*requests)
        with it.graph.drained(file):
            assert not user.waiting
            assert user.backend.in_flight == 0
        assert len(user.told) == 40


def test_what_arrives_meanwhile_goes_on_afterwards_in_order(seed: int) -> None:
    chance = random.Random(seed)
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "always")
        file = it.file("disk")
        user = it.user(RawNode(it.graph, file=file))
        requests = [write(0, bytes([n])) for n in range(1, 30)]
        reused: list[Request] = []
        with it.graph.drained(file):
            for request in requests[:20]:
                assert user.submit(request) == [request]
            assert user.backend.statistics().parked == 20
            it.context.poll(False)
            assert it.host.content("disk")[:1] == b"\0"
            reused.append(read(0, 1))
            reused[0].owner = user.queue
            user.waiting[id(reused[0])] = reused[0]
            user.queue.submit(reused)
            kept = reused.pop()  # the caller's list is his own
        for request in requests[20:]:
            assert user.submit(request) == [request], "it overtakes those that wait"
            if chance.random() < 0.3:
                break
        user.wait()
        submitted = [request for request in requests if request.result == 0]
        assert user.told == [*submitted[:20], kept, *submitted[20:]]
        assert it.host.content("disk")[:1] == bytes([len(submitted)])
        assert kept.buffer == bytes([20])


def test_nested_sections(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        log: list[str] = []
        file = it.file("disk", "file")
        lower = Told(it.graph, "lower", file, log)
        upper = Told(it.graph, "upper", lower, log)
        user = it.user(upper)
        with it.graph.drained(file):
            assert sorted(log) == ["lower begin", "upper begin"]
            with it.graph.drained(lower), it.graph.drained(file, upper):
                user.submit(read(0, 512))
            assert len(log) == 2
            it.context.poll(False)
            assert user.waiting
        assert sorted(log[2:]) == ["lower end", "upper end"]
        user.wait()
        assert file.quiesce_counter == lower.quiesce_counter == upper.quiesce_counter == 0


def test_children_are_not_drained(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        file = it.file("disk")
        upper = it.user(RawNode(it.graph, file=file))
        lower = it.user(file)
        with it.graph.drained(upper.backend.node):
            assert file.quiesce_counter == 0
            assert lower.do(read(0, 512)) == [0]
            assert upper.submit(read(0, 512))
        upper.wait()


def test_a_new_edge_to_a_drained_node_is_drained(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        log: list[str] = []
        file = it.file("disk")
        with it.graph.drained(file):
            filter = Told(it.graph, "filter", file, log)
            user = it.user(filter)
            assert filter.quiesce_counter == 1
            assert user.submit(write(0, b"x"))
        user.wait()
        assert log == ["filter begin", "filter end"]


def test_an_edge_that_goes_away_ends_the_section_for_its_parent(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        file = it.file("disk")
        file.monitor_owned = True
        user = it.user(file)
        with it.graph.drained(file):
            user.submit(read(0, 1), read(1, 1))
            user.backend.remove()
            assert [request.result for request in user.told] == [-errno.ENOMEDIUM] * 2
            assert not file.parents
            user.backend.insert(file)
            assert user.submit(read(0, 1))
        user.wait()
        assert user.told[-1].result == 0


def test_from_a_bottom_half(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "never")
        file = it.file("disk")
        user = it.user(file)
        drained: list[int] = []

        def drain() -> None:
            with it.graph.drained(file):
                drained.append(len(user.waiting))

        it.context.schedule_oneshot(drain)
        user.submit(*[read(n, 100) for n in range(20)])
        user.submit(flush())
        wait_while(it.context, lambda: not drained, what="the drain")
        assert drained == [0]
        assert len(user.told) == 21


def test_completions_that_submit_again_do_not_keep_a_drain_waiting(seed: int) -> None:
    """A user who always has requests in flight is parked by the drain, and goes on afterwards."""
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "random")
        file = it.file("disk")
        backend = it.backend(file)
        rounds = 0
        pending: list[Request] = []

        def told(requests: list[Request]) -> None:
            nonlocal rounds
            for request in requests:
                rounds += 1
                pending.remove(request)
            if rounds < 100:
                go()

        def go() -> None:
            request = read(rounds % 7 * 512, 512)
            request.owner = queue
            pending.append(request)
            if not queue.submit([request]):
                it.context.schedule_oneshot(lambda: told([request]))

        queue = backend.queue(told)
        go()
        go()
        sections = 0
        while rounds < 100:
            with it.graph.drained(file):
                sections += 1
                before = rounds
                assert backend.in_flight == 0
                for _ in range(3):
                    it.context.poll(False)
                assert rounds <= before + 2  # those that were done when the section began
            it.context.poll(False)
        wait_while(it.context, lambda: pending, what="the rest")
        assert sections > 1


def test_null_aio_in_virtual_time(seed: int) -> None:
    with sim_bench(seed) as it:
        node = NullAioNode(it.graph, latency_ns=1_000_000)
        user = it.user(node)
        start_ns = it.host.monotonic_ns()
        user.submit(read(0, 512))
        with it.graph.drained(node):
            assert it.host.monotonic_ns() - start_ns >= 1_000_000
            assert not user.waiting


def test_work_of_the_node_itself_is_waited_for(seed: int) -> None:
    with sim_bench(seed) as it:
        node = NullCoNode(it.graph)
        it.user(node)
        node.in_flight = 1

        def end() -> None:
            node.in_flight = 0
            kick()

        it.context.timer(end).arm_ns(it.context.now_ns() + 500)
        with it.graph.drained(node):
            assert node.in_flight == 0


def test_a_coroutine_that_asks_for_block_status_waits_too(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        file = it.file("disk")
        backend = it.backend(file)
        with it.graph.drained(file):
            coroutine = it.context.enter(backend.co_block_status(0, SIZE))
            it.context.poll(False)
            assert not coroutine.done and backend.in_flight == 0
        wait_while(it.context, lambda: not coroutine.done, what="the status")
        assert coroutine.result() == (2, SIZE)


def test_an_owner_who_raises_does_not_hold_up_the_others(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "always")
        file = it.file("disk")
        backend = it.backend(file)

        def broken(requests: list[Request]) -> None:
            raise ZeroDivisionError

        queue, user = backend.queue(broken), User(backend)
        with it.graph.drained(file):
            request = read(0, 1)
            request.owner = queue
            queue.submit([request])
            user.submit(read(0, 1))
        with pytest.raises(ZeroDivisionError):
            it.context.poll(False)
        user.wait()


def test_remove_answers_what_is_parked(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "never")
        file = it.file("disk")
        user = it.user(file)
        user.submit(read(0, 512))
        with it.graph.drained(file):
            user.submit(read(0, 512), read(512, 512))
            coroutine = it.context.enter(user.backend.co_block_status(0, 1))
        with pytest.raises(BlockError, match="has no medium"):
            # submitted in between: parked behind the others
            user.submit(write(0, b"x"))
            user.backend.remove()
            coroutine.result()
        assert sorted(request.result for request in user.told) == [-errno.ENOMEDIUM] * 3 + [0]
        assert user.do(read(0, 1)) == [-errno.ENOMEDIUM]


def test_remove_drains_a_node_that_was_put_in_its_place_meanwhile(seed: int) -> None:
    with sim_bench(seed, a=SIZE, b=SIZE) as it:
        for name in "ab":
            it.host.set_cached(name, "never")
        first, second = it.file("a"), it.file("b")
        user = it.user(first)
        writes = [write(0, b"1" * 512), write(0, b"2" * 512)]
        held_first = it.host.fault(path="a", op=WRITE, hold=True)
        held_second = it.host.fault(path="b", op=WRITE, hold=True)
        user.submit(writes[0])
        seen: list[tuple[Any, int]] = []

        def later(callback: Any) -> None:
            it.context.timer(callback, name="later").arm_ns(it.context.now_ns() + 10_000_000)

        def look() -> None:
            seen.append((user.backend.root, second.permissions[0] & PERM_WRITE))
            held_second.remove()

        def replace() -> None:
            user.submit(writes[1])
            later(held_first.remove)
            it.graph.replace_node(first, second)
            wait_while(it.context, lambda: not user.backend.in_flight, what="the second write to begin")
            later(look)

        it.context.schedule_oneshot(replace)
        edge = user.backend.root
        user.backend.remove()
        assert seen == [(edge, PERM_WRITE)], "it stays there until its write has ended"
        assert [request.result for request in writes] == [0, 0]


class TestInAnIothread:
    """The same with requests that another thread submits: real threads, so every run is another."""

    def test_no_request_is_in_a_drained_section(self, tmp_path: Path) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(SIZE))
        with bench(LinuxHost()) as it:
            thread = IOThread("io0", it.host)
            log: list[str] = []
            file = it.file(str(path))
            filter = Told(it.graph, "filter", file, log)
            backend = it.backend(filter, shared=PERM_ALL & ~PERM_RESIZE)
            it.graph.move(file, thread.context)
            assert backend.context is filter.context is thread.context
            count, busy = 0, 0
            stop = False

            def told(requests: list[Request]) -> None:
                nonlocal count, busy
                count += len(requests)
                busy -= len(requests)
                if stop:
                    kick()
                    return
                for _ in requests:
                    thread.context.schedule_oneshot(submit)

            def submit() -> None:
                nonlocal busy
                busy += 1
                request = Request(WRITE if count % 2 else READ, count % 100 * 512, 512, memoryview(bytearray(512)))
                request.owner = queue
                if not queue.submit([request]):
                    told([request])

            queue = backend.queue(told)
            for _ in range(4):
                thread.context.schedule_oneshot(submit)
            sections = 0
            while sections < 200 or count < 500:
                with it.graph.drained(file):
                    filter.drained = True
                    sections += 1
                    before = count
                    assert backend.in_flight == 0
                    assert count <= before + 4
                    filter.drained = False
            stop = True
            wait_while(None, lambda: busy, what="the last requests")
            backend.request(READ, 0, 512, memoryview(bytearray(512)))
            backend.close()
            assert file.name not in it.graph.nodes
            thread.stop()

    def test_move_back_and_forth(self, tmp_path: Path) -> None:
        path = tmp_path / "disk"
        path.write_bytes(b"x" * SIZE)
        with bench(LinuxHost()) as it:
            thread = IOThread("io0", it.host)
            file = it.file(str(path))
            one = it.backend(RawNode(it.graph, file=file))
            two = it.backend(RawNode(it.graph, file=file, offset=512))
            buffer = memoryview(bytearray(512))
            for context in (thread.context, it.context, thread.context):
                it.graph.move(one.node, context)
                assert {one.context, two.context, file.context, two.node.context} == {context}
                one.request(READ, 0, 512, buffer)
                two.request(WRITE, 0, 512, buffer)
            two.close()
            assert file.context is thread.context
            one.close()
            thread.stop()

    def test_a_backend_that_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(512))
        with bench(LinuxHost()) as it:
            thread = IOThread("io0", it.host)
            file = it.file(str(path))
            backend = it.backend(file, allow_context_change=False)
            with pytest.raises(BlockError, match=r"^Cannot change iothread of active block backend$"):
                it.graph.move(file, thread.context)
            assert file.context is it.context
            it.graph.move(file, thread.context, ignore=backend)
            assert backend.context is thread.context
            backend.close()
            assert thread.context.is_home is False
            thread.stop()

    def test_the_last_user_takes_the_node_home(self, tmp_path: Path) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(512))
        with bench(LinuxHost()) as it:
            thread = IOThread("io0", it.host)
            file = it.file(str(path), "disk")
            file.monitor_owned = True
            backend = it.backend(file)
            it.graph.move(file, thread.context)
            backend.close()
            assert file.context is it.context
            again = it.backend(file)
            again.request(READ, 0, 512, memoryview(bytearray(512)))
            thread.stop()


def test_backends_without_a_node_are_no_obstacle(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        empty = BlockBackend(it.graph)
        with it.graph.drained(it.file("disk")):
            pass
        empty.close()
        assert isinstance(it, Bench)
