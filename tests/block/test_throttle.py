# SPDX-License-Identifier: Apache-2.0
"""Throttling: buckets, limits, timers and groups, and the filter that uses them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from bottomhalf.aio import AioContext, IOThread, kick, sleep_ns, wait_while
from bottomhalf.block import BlockError
from bottomhalf.block.throttling import (
    BucketLimit,
    Limits,
    ThrottleGroup,
    ThrottleMember,
    ThrottleState,
    ThrottleTimers,
    throttle_groups,
)
from bottomhalf.block.throttling.limits import (
    BPS_READ,
    BPS_TOTAL,
    BPS_WRITE,
    BUCKETS,
    IOPS_READ,
    IOPS_TOTAL,
    IOPS_WRITE,
    VALUE_MAX,
)
from bottomhalf.block.throttling.state import READ_DIRECTION, WRITE_DIRECTION, Bucket
from bottomhalf.drivers.null import NullAioNode, NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.drivers.throttle import ThrottleNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.request import READ, Request
from bottomhalf.host.sim import SimHost
from tests.block.bench import Bench, bench, discard, flush, read, sim_bench, write, zero

SECOND = 10**9


def one(index: int, **values: int) -> Limits:
    return Limits().with_bucket(index, BucketLimit(**values))


def valid(limits: Limits) -> bool:
    try:
        limits.check()
    except BlockError:
        return False
    return True


# -- QEMU's test-throttle --------------------------------------------------------------------------------------------


def test_leak_bucket() -> None:
    """/throttle/leak_bucket"""
    bucket = Bucket(BucketLimit(avg=150, max=15))
    bucket.level = 1.5
    for expected in (0.5, 0.0, 0.0):
        bucket.leak(SECOND // 150)
        assert bucket.level == pytest.approx(expected, abs=1e-6)
    assert (bucket.avg, bucket.max) == (150, 15)

    bucket = Bucket(BucketLimit(avg=150, max=250, burst_length=2))
    bucket.burst_level = 6
    for expected in (3.5, 1.0, 0.0, 0.0):
        bucket.leak(SECOND // 100)
        assert bucket.burst_level == pytest.approx(expected)


def test_compute_wait() -> None:
    """/throttle/compute_wait"""
    assert Bucket(BucketLimit()).wait_ns() == 0
    bucket = Bucket(BucketLimit(avg=150, max=15))
    bucket.level = 15
    assert bucket.wait_ns() == 0
    bucket.level = 14
    assert bucket.wait_ns() == 0
    bucket.level = 15.5
    assert bucket.wait_ns() == SECOND // 150 // 2

    bucket = Bucket(BucketLimit(avg=10, max=200, burst_length=2))
    for number in range(22):
        bucket.fill(20)
        bucket.leak(SECOND // 10)
        assert bucket.burst_level == pytest.approx(0)
        assert bucket.level == pytest.approx((number + 1) * 19)
        assert bucket.wait_ns() == (0 if number < 21 else pytest.approx(1.8 * SECOND))


@pytest.mark.parametrize("directions", [(True, True), (True, False), (False, True)])
def test_init(directions: tuple[bool, bool]) -> None:
    """/throttle/init /throttle/init_readonly /throttle/init_writeonly"""
    state = ThrottleState(now_ns=0)
    assert state.previous_leak_ns == state.limits.op_size == 0
    assert all(not (b.avg or b.max or b.level or b.burst_level) for b in state.buckets)
    context = AioContext(SimHost(0))
    timers = ThrottleTimers(context, *(int if wanted else None for wanted in directions), clock="virtual")
    assert tuple(timer is not None for timer in timers.timers) == directions
    assert timers.clock == "virtual"
    timers.detach()
    context.close()


def test_destroy_and_have_timer() -> None:
    """/throttle/destroy /throttle/have_timer"""
    context = AioContext(SimHost(0))
    timers = ThrottleTimers(context, int, int)
    assert timers.initialised
    timers.detach()
    assert not timers.initialised
    assert timers.timers == [None, None]
    context.close()


def test_detach_attach() -> None:
    """/throttle/detach_attach: an armed timer does not survive."""
    host = SimHost(0)
    context, other = AioContext(host), AioContext(host)
    fired: list[int] = []
    timers = ThrottleTimers(context, lambda: fired.append(1), int)
    timers.arm_ns(READ_DIRECTION, 0)
    timers.detach()
    assert not timers.initialised
    context.poll(False)
    timers.attach(other)
    assert timers.initialised
    other.poll(False)
    assert not fired
    timers.arm_ns(READ_DIRECTION, 0)
    other.poll(False)
    assert fired
    context.close()
    other.close()


def test_enabled() -> None:
    """/throttle/config/enabled"""
    assert not Limits().enabled
    for index in range(len(BUCKETS)):
        limits = one(index, avg=150)
        assert valid(limits) and limits.enabled
        assert not valid(one(index, avg=-150))


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_conflicting(kind: str) -> None:
    """/throttle/config/conflicting"""
    for total, reads, writes in ((BPS_TOTAL, BPS_READ, BPS_WRITE), (IOPS_TOTAL, IOPS_READ, IOPS_WRITE)):

        def set_(*indices: int) -> bool:
            limits = Limits()
            for index in indices:
                value = BucketLimit(avg=10, max=10 if kind == "max" else 0)
                limits = limits.with_bucket(index, value)
            return valid(limits)

        assert not set_(total, reads)
        assert not set_(total, writes)
        assert not set_(total, reads, writes)
        assert set_(total)
        assert set_(reads, writes)
        mixed = one(total, avg=10).with_bucket(reads, BucketLimit(avg=0, max=10))
        with pytest.raises(BlockError, match="require corresponding"):
            mixed.check()


def test_is_valid() -> None:
    """/throttle/config/is_valid"""
    for index in range(len(BUCKETS)):
        for value, fine in ((-1, False), (0, True), (1, True)):
            assert valid(one(index, avg=value)) == fine
            assert valid(one(index, avg=1, max=value)) == fine


def test_ranges() -> None:
    """/throttle/config/ranges"""
    for index in range(len(BUCKETS)):
        assert valid(one(index, avg=0)) and not one(index, avg=0).enabled
        assert valid(one(index, avg=VALUE_MAX))
        assert not valid(one(index, avg=VALUE_MAX + 1))
        assert valid(one(index, avg=1, max=VALUE_MAX))
        assert not valid(one(index, avg=1, max=VALUE_MAX + 1))
        for length, fine in ((0, False), (1, True), (VALUE_MAX, True), (VALUE_MAX + 1, False)):
            assert valid(one(index, avg=1, max=1, burst_length=length)) == fine
        half = VALUE_MAX // 2
        assert valid(one(index, avg=1, max=2, burst_length=half))
        assert not valid(one(index, avg=1, max=3, burst_length=half))
        assert valid(one(index, avg=1, max=VALUE_MAX, burst_length=1))
        assert not valid(one(index, avg=1, max=VALUE_MAX, burst_length=2))


def test_max() -> None:
    """/throttle/config/max"""
    for index in range(len(BUCKETS)):
        assert not valid(one(index, max=5))
        assert valid(one(index, max=0))
        assert valid(one(index, avg=5))
        assert not valid(one(index, avg=5, max=4))
        assert valid(one(index, avg=5, max=5))


def test_iops_size() -> None:
    """/throttle/config/iops_size"""
    assert not valid(replace(Limits(), op_size=1))
    assert not valid(replace(one(BPS_TOTAL, avg=5), op_size=1))
    for index in (IOPS_TOTAL, IOPS_READ, IOPS_WRITE):
        assert valid(replace(one(index, avg=5), op_size=1))
        assert not valid(replace(one(index, avg=5), op_size=-1))


def test_config_functions() -> None:
    """/throttle/config_functions"""
    limits = replace(one(BPS_READ, avg=6, max=9).with_bucket(IOPS_TOTAL, BucketLimit(5, 8, 3)), op_size=1)
    state = ThrottleState(limits)
    state.account(READ_DIRECTION, 100)
    state.configure(limits, 123)
    assert state.limits == limits
    assert state.previous_leak_ns == 123
    assert not any(bucket.level or bucket.burst_level for bucket in state.buckets)
    assert Limits.from_options(limits.to_options()) == limits
    assert [bucket.avg for bucket in state.buckets] == [limit.avg for limit in limits.buckets]


@pytest.mark.parametrize("avg", [0, 150])
def test_accounting(avg: int) -> None:
    """/throttle/accounting"""
    size = 64 * 512
    for op_size, units in ((0, 1), (13 * 512, 64 / 13), (size, 1), (size + 1, 1)):
        limits = Limits(tuple(BucketLimit(avg=avg) for _ in BUCKETS), op_size)
        state = ThrottleState(limits)
        state.account(READ_DIRECTION, size)
        state.account(WRITE_DIRECTION, size)
        levels = [bucket.level for bucket in state.buckets]
        assert levels == pytest.approx([2 * size, size, size, 2 * units, units, units])


def test_groups(seed: int) -> None:
    """/throttle/groups"""
    with sim_bench(seed) as it:
        groups = throttle_groups(it.graph)
        assert throttle_groups(it.graph) is groups
        for name in ("foo", "bar"):
            groups.create(name)
        nothing = NullCoNode(it.graph).submit_batch
        members = [
            ThrottleMember(groups.find(name), f"m{number}", it.context, nothing)
            for number, name in enumerate(("bar", "foo", "bar"))
        ]
        assert [member.group.name for member in members] == ["bar", "foo", "bar"]
        assert members[0].group is members[2].group is not members[1].group
        limits = Limits.from_options({"bps-read": 285000, "bps-write": 19000, "iops-read": 1, "iops-write": 2})
        members[0].group.set_limits(limits)
        assert members[2].group.limits == limits
        with pytest.raises(BlockError, match="in use"):
            groups.delete("bar")
        for member in members:
            member.close()
            assert not member.timers.initialised
        groups.delete("bar")
        with pytest.raises(BlockError, match="Throttle group 'bar' does not exist"):
            groups.find("bar")
        with pytest.raises(BlockError, match="exists already"):
            groups.create("foo")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"iops-total": 10, "iops-read": 5}, "bps/iops/max total values and read/write values cannot be used"),
        ({"iops-total-max": 10}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"iops-total": 10, "iops-total-max": 5}, "bps_max/iops_max cannot be lower than bps/iops"),
        ({"iops-total": 10, "iops-total-max-length": 0}, "the burst length cannot be 0"),
        ({"iops-total": 10, "iops-total-max-length": 2}, "burst length set without burst rate"),
        ({"iops-size": 5}, "iops size requires an iops value to be set"),
        ({"iops-total": -1}, r"bps/iops/max values must be within \[0, 1000000000000000\]"),
        ({"iops-total": 10, "iops-total-max": 10**15, "iops-total-max-length": 2}, "burst length too high"),
        ({"iops-total": 10, "iops-total-max": 20, "iops-total-max-length": -1}, "burst length too high"),
        ({"bps-write-max-length": 2**33}, r"bps-write-max-length value must be in the range \[0, 4294967295\]"),
    ],
)
def test_texts_of_wrong_limits(options: dict[str, int], text: str) -> None:
    with pytest.raises(BlockError, match=text):
        ThrottleGroup("g", Limits.from_options(options))


# -- the filter ------------------------------------------------------------------------------------------------------


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


def has_room(bucket: Bucket) -> bool:
    level, burst_level = bucket.level - 1e-6, bucket.burst_level - 1e-6
    return level <= bucket.size and (bucket.burst_length == 1 or burst_level <= bucket.burst_size)


def test_a_batch_is_as_good_as_its_requests_one_by_one(seed: int) -> None:
    """The list form lets through exactly what requests one after the other would be let through."""
    chance = random.Random(seed)
    options = {
        "iops-total": chance.choice([0, 10, 1000]),
        "bps-read": chance.choice([0, 10_000, 10**6]),
        "iops-size": 0,
    }
    if options["iops-total"]:
        options["iops-size"] = chance.choice([0, 1000])
        options["iops-total-max"] = chance.choice([0, 2000])
        options["iops-total-max-length"] = chance.choice([1, 3]) if options["iops-total-max"] else 1
    limits = Limits.from_options(options)
    limits.check()
    lists, singly = ThrottleState(limits), ThrottleState(limits)
    for bucket in lists.buckets:
        bucket.size += 1e-6  # sums in another order differ in their last digit
        bucket.burst_size += 1e-6
    now_ns = 0
    for _ in range(50):
        now_ns += chance.randrange(SECOND // 10)
        singly.leak(now_ns)
        lengths = [chance.randrange(4000) for _ in range(chance.randrange(1, 8))]
        before = [(bucket.level, bucket.burst_level) for bucket in singly.buckets]
        fits = True
        for length in lengths:
            fits = fits and not singly.wait_ns(READ_DIRECTION)
            singly.account(READ_DIRECTION, length)
        if not fits:
            for bucket, (level, burst_level) in zip(singly.buckets, before, strict=True):
                bucket.level, bucket.burst_level = level, burst_level
        batch = [Request(READ, 0, length) for length in lengths]
        assert lists.admit(READ_DIRECTION, batch, now_ns) == fits
        for ours, theirs in zip(lists.buckets, singly.buckets, strict=True):
            if ours.avg:
                assert ours.level == pytest.approx(theirs.level)
                assert ours.burst_length == 1 or ours.burst_level == pytest.approx(theirs.burst_level)


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

        def map_reads(self, requests: list[Request], shift: int = 0) -> Any:
            return "file", shift

    with sim_bench(seed) as it:
        group = throttle_groups(it.graph).create("g", Limits.from_options({"bps-read": 1_000_000}))
        node = ThrottleNode(it.graph, file=Cached(it.graph), group=group)
        it.user(node)
        assert node.file_range(0, 60_000) == ("file", 0)
        assert node.map_reads([read(0, 30_000), read(0, 60_000)], 512) == ("file", 512)
        assert group.state.buckets[BPS_READ].level == pytest.approx(150_000)
        assert node.file_range(0, 1) is None and node.map_reads([read(0, 1)]) is None
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
