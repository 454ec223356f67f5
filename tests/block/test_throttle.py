# SPDX-License-Identifier: Apache-2.0
"""Throttling: buckets, limits, timers and groups, and the filter that uses them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from bottomhalf.aio import AioContext
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
from bottomhalf.drivers.null import NullCoNode
from bottomhalf.host.request import READ, Request
from bottomhalf.host.sim import SimHost
from tests.block.bench import sim_bench

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


# -- lists beside single requests --------------------------------------------------------------------------------------


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
