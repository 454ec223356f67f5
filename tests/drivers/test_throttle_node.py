# SPDX-License-Identifier: Apache-2.0
"""The driver throttle: rates are kept, nobody waits for ever, and what need not wait is not touched."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bottomhalf.aio import IOThread, kick, sleep_ns, wait_while
from bottomhalf.block import BlockError
from bottomhalf.block.throttling import (
    Limits,
    throttle_groups,
)
from bottomhalf.block.throttling.limits import (
    BPS_READ,
)
from bottomhalf.drivers.null import NullAioNode, NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.drivers.throttle import ThrottleNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.request import READ, Request
from bottomhalf.host.sim import SimHost
from tests.block.bench import Bench, bench, discard, flush, read, sim_bench, write, zero

SECOND = 10**9


def throttled(it: Bench, name: str = "", below: str = "null", **options: int) -> ThrottleNode:
    groups = throttle_groups(it.graph)
    limits = Limits.from_options({key.replace("_", "-"): value for key, value in options.items()})
    group = groups.by_name.get("g") or groups.create("g", limits)
    child = NullCoNode(it.graph) if below == "null" else NullAioNode(it.graph, latency_ns=1000)
    return ThrottleNode(it.graph, name, file=child, group=group, unmap=True)


def test_with_room_nothing_waits(seed: int) -> None:
    with sim_bench(seed) as it:
        node = throttled(it, iops_total=1000, iops_total_max=100_000, bps_total=10**9, bps_total_max=10**12)
        user = it.user(node)
        assert user.submit(*(read(n * 512, 512) for n in range(64))) == []
        assert user.submit(*(write(n * 512, b"x" * 512) for n in range(64))) == []
        levels = [bucket.level for bucket in node.member.group.state.buckets]
        assert levels == pytest.approx([2 * 64 * 512, 0, 0, 128, 0, 0])


@pytest.mark.parametrize("below", ["null", "aio"])
def test_the_rate_is_kept_and_the_order_too(seed: int, below: str) -> None:
    with sim_bench(seed) as it:
        user = it.user(throttled(it, below=below, iops_total=100))
        requests = [read(n * 512, 512) if n % 3 else write(n * 512, b"w" * 512) for n in range(120)]
        begin_ns = it.context.now_ns()
        for request in requests:
            user.submit(request)
        user.wait()
        elapsed_ns = it.context.now_ns() - begin_ns
        for kind in (True, False):
            order = [request for request in user.told if (request.op == READ) == kind]
            assert order == [request for request in requests if (request.op == READ) == kind]
        # A tenth of a second's worth at once, one more that overfills the bucket, then a hundred per second.
        assert (120 - 11) / 100 - 0.011 <= elapsed_ns / SECOND <= 1.15


def test_bytes_are_limited(seed: int) -> None:
    with sim_bench(seed) as it:
        user = it.user(throttled(it, bps_write=1_000_000))
        begin_ns = it.context.now_ns()
        assert user.do(*(write(n * 10_000, b"w" * 10_000) for n in range(50))) == [0] * 50
        assert 0.38 <= (it.context.now_ns() - begin_ns) / SECOND <= 0.45
        assert user.submit(read(0, 1 << 20)) == [], "reads are not limited"


def test_bursts_last_as_long_as_they_may(seed: int) -> None:
    with sim_bench(seed) as it:
        user = it.user(throttled(it, iops_total=10, iops_total_max=100, iops_total_max_length=3))
        begin_ns = it.context.now_ns()
        user.do(*(read(0, 512) for _ in range(310)))
        burst_ns = it.context.now_ns() - begin_ns
        assert 2.8 <= burst_ns / SECOND <= 3.3, "300 at 100 per second"
        user.do(*(read(0, 512) for _ in range(60)))
        assert (it.context.now_ns() - begin_ns - burst_ns) / SECOND > 3, "then 10 per second"


def test_flushes_do_not_wait(seed: int) -> None:
    with sim_bench(seed) as it:
        user = it.user(throttled(it, iops_total=10))
        user.submit(*(write(0, b"x") for _ in range(20)))
        assert user.submit(flush()) == []
        assert user.waiting
        user.wait()


def test_zero_writes_and_discards_are_writes(seed: int) -> None:
    with sim_bench(seed) as it:
        node = throttled(it, iops_write=10)
        user = it.user(node)
        user.submit(write(0, b"xx"), write(0, b"yy"))
        assert user.submit(discard(0, 512)) and user.submit(zero(512, 512)) and user.submit(discard(0, 512))
        assert node.member.waiting == 3
        user.wait()


def test_members_take_turns(seed: int) -> None:
    """The one that asked first and most does not keep the others out."""
    with sim_bench(seed) as it:
        users = [it.user(throttled(it, iops_total=100)) for _ in range(3)]
        for user, count in zip(users, (300, 30, 30), strict=True):
            user.submit(*(read(n * 512, 512) for n in range(count)))
        wait_while(it.context, lambda: users[1].waiting or users[2].waiting, what="the smaller ones")
        assert len(users[0].told) <= 11 + 31
        assert abs(len(users[1].told) - len(users[2].told)) <= 1
        users[0].wait()


def test_live_change(seed: int) -> None:
    with sim_bench(seed) as it:
        node = throttled(it, iops_total=1)
        user = it.user(node)
        user.submit(*(read(0, 512) for _ in range(100)))
        assert node.member.waiting >= 98
        with pytest.raises(BlockError):
            node.member.group.set_limits(Limits.from_options({"iops-total": -1}))
        begin_ns = it.context.now_ns()
        node.member.group.set_limits(Limits.from_options({"iops-total": 1000}))
        user.wait()
        assert (it.context.now_ns() - begin_ns) / SECOND < 0.2
        node.member.group.set_limits(Limits())
        assert user.submit(*(read(0, 512) for _ in range(1000))) == []


@pytest.mark.parametrize("below", ["null", "aio"])
def test_a_drain_lets_everything_go(seed: int, below: str) -> None:
    with sim_bench(seed) as it:
        node = throttled(it, below=below, iops_total=1)
        user = it.user(RawNode(it.graph, file=node))
        user.submit(*(read(n, 512) for n in range(50)))
        user.submit(*(write(n, b"w") for n in range(50)))
        begin_ns = it.context.now_ns()
        with it.graph.drained(node):
            assert not user.waiting
            assert it.context.now_ns() - begin_ns < SECOND // 10
        user.submit(read(0, 512))
        assert node.member.waiting == 1, "afterwards the limits count again, and so does what was let go"
        node.member.group.set_limits(Limits())
        user.wait()


def test_detached_while_others_wait(seed: int) -> None:
    """A member leaves with the group's only armed timer; QEMU believed that it was still armed, and nobody's request
    went on any more."""
    chance = random.Random(seed)
    with sim_bench(seed) as it:
        users = [it.user(throttled(it, f"n{number}", iops_total=10)) for number in range(3)]
        members = [user.backend.node.member for user in users]  # type: ignore[attr-defined]
        for user in users:
            user.submit(*(read(0, 512) for _ in range(4)))
        leaving = next(member for member in members if member in members[0].group._armed)
        for _ in range(chance.randrange(3)):
            it.context.poll(True)
        leaving.detach()  # with requests in its queue
        others = [user for user, member in zip(users, members, strict=True) if member is not leaving]
        wait_while(it.context, lambda: any(user.waiting for user in others), what="the others")
        leaving.attach(it.context)
        for user in users:
            user.wait()


def test_a_member_closes_while_others_wait(seed: int) -> None:
    with sim_bench(seed) as it:
        first, second = (it.user(throttled(it, f"n{number}", iops_total=10)) for number in range(2))
        first.submit(*(read(0, 512) for _ in range(3)))
        second.submit(*(read(0, 512) for _ in range(3)))
        first.backend.close()
        assert not first.waiting
        second.wait()


@pytest.mark.parametrize("kind", ["sim", "linux"])
def test_members_in_different_threads(kind: str) -> None:
    host = SimHost(7) if kind == "sim" else LinuxHost()
    with bench(host) as it:
        threads = [IOThread(f"t{number}", host) for number in range(2)]
        nodes = [throttled(it, f"n{number}", "aio", iops_total=2000) for number in range(3)]
        users = [it.user(node) for node in nodes]
        for node, thread in zip(nodes, threads, strict=False):
            it.graph.move(node, thread.context)
        assert [node.member.context for node in nodes[:2]] == [thread.context for thread in threads]
        left = [60] * 3

        def start(number: int) -> None:
            user = users[number]
            user.submit(*(read(n * 512, 512) for n in range(60)))

        def completed(number: int) -> None:
            left[number] = len(users[number].waiting)
            kick()

        for number, user in enumerate(users):
            inner = user.queue._on_complete

            def told(requests: list[Request], number: int = number, inner: object = inner) -> None:
                inner(requests)  # type: ignore[operator]
                completed(number)

            user.queue._on_complete = told
            user.backend.context.schedule_oneshot(lambda number=number: start(number))
        wait_while(None, lambda: any(left), what="requests in three threads")
        for node in nodes[:2]:
            it.graph.move(node, it.context)
        for user in users:
            user.backend.close()
        for thread in threads:
            thread.stop()


def test_reads_that_would_leave_without_coming_by(seed: int) -> None:
    """They count, and when they may not go they come by."""

    class Cached(NullCoNode):
        def file_range(self, offset: int, length: int) -> Any:
            return "file", offset

        def map_reads(self, requests: list[Request], offsets: list[int]) -> Any:
            offsets[:] = [offset + 512 for offset in offsets]
            return "file"

    with sim_bench(seed) as it:
        group = throttle_groups(it.graph).create("g", Limits.from_options({"bps-read": 1_000_000}))
        node = ThrottleNode(it.graph, file=Cached(it.graph), group=group)
        it.user(node)
        assert node.file_range(0, 60_000) == ("file", 0)
        offsets = [0, 8192]
        assert node.map_reads([read(0, 30_000), read(8192, 60_000)], offsets) == "file" and offsets == [512, 8704]
        assert group.state.buckets[BPS_READ].level == pytest.approx(150_000)
        assert node.file_range(0, 1) is None and node.map_reads([read(0, 1)], offsets[:1]) is None
        assert offsets == [512, 8704]
        it.context.run(sleep_ns(SECOND))
        assert node.file_range(0, 1) is not None


def test_closing_and_names(seed: int) -> None:
    from bottomhalf.drivers.describe import file_name
    from bottomhalf.drivers.registry import open_node
    from bottomhalf.qapi.block import BlockdevOptions
    from bottomhalf.qapi.visit import from_json

    with sim_bench(seed) as it:
        options = {"driver": "throttle", "throttle-group": "nope", "file": {"driver": "null-co", "size": 4096}}
        with pytest.raises(BlockError, match="Throttle group 'nope' does not exist"):
            open_node(it.graph, from_json(BlockdevOptions, options))
        assert not it.graph.nodes
        group = throttle_groups(it.graph).create("nope")
        node = open_node(it.graph, from_json(BlockdevOptions, options))
        assert file_name(node) == (
            'json:{"throttle-group": "nope", "driver": "throttle", "file": {"driver": "null-co", "size": 4096}}'
        )
        assert len(group.members) == 1
        it.graph.release(node)
        assert not group.members
