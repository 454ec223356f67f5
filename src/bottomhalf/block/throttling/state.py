# SPDX-License-Identifier: Apache-2.0
"""Leaky buckets, and the two timers of somebody who waits for them.

A bucket is filled by what is done and leaks at the permitted rate. Who finds it no fuller than its size may go, and
then fills it; so one request may overfill it, however large it is, and the next one waits until that has leaked. The
size is a burst's worth: ``max * burst_length``, or a tenth of a second without a burst. A burst that lasts longer than
a second has a bucket of its own, which leaks at the burst rate and holds a tenth of a second of it, so that the burst
does not happen at once.

    state.leak(now_ns)
    wait_ns = state.wait_ns(READ_DIRECTION)
    if not wait_ns:
        state.account(READ_DIRECTION, length)

Levels are floats in bytes or operations; the rates are bounded such that they stay exact enough.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Final

from bottomhalf.aio import AioContext
from bottomhalf.aio.timer import Timer
from bottomhalf.block.throttling.limits import (
    BPS_READ,
    BPS_TOTAL,
    BPS_WRITE,
    IOPS_READ,
    IOPS_TOTAL,
    IOPS_WRITE,
    BucketLimit,
    Limits,
)
from bottomhalf.host.request import Request

SECOND_NS: Final = 1_000_000_000
BURST_FRACTION: Final = 10  # of a second: what may come at once where nothing else is said

READ_DIRECTION: Final = 0
WRITE_DIRECTION: Final = 1
_length: Final = attrgetter("length")

DIRECTIONS: Final = (READ_DIRECTION, WRITE_DIRECTION)


class Bucket:
    """One rate: ``level`` against the average, ``burst_level`` against the burst rate."""

    __slots__ = ("avg", "burst_length", "burst_level", "burst_size", "level", "max", "size")

    def __init__(self, limit: BucketLimit) -> None:
        self.avg = limit.avg
        self.max = limit.max
        self.burst_length = limit.burst_length
        self.level = 0.0
        self.burst_level = 0.0
        self.size = limit.max * limit.burst_length if limit.max else limit.avg / BURST_FRACTION
        self.burst_size = limit.max / BURST_FRACTION

    def leak(self, elapsed_ns: int) -> None:
        level = self.level - self.avg * elapsed_ns / SECOND_NS
        self.level = level if level > 0 else 0.0
        if self.burst_length > 1:
            level = self.burst_level - self.max * elapsed_ns / SECOND_NS
            self.burst_level = level if level > 0 else 0.0

    def fill(self, amount: float) -> None:
        self.level += amount
        self.burst_level += amount  # of no meaning unless a burst lasts longer than a second

    def wait_ns(self) -> int:
        """How long until the next request may go, 0 for now."""
        if not self.avg:
            return 0
        if self.level > self.size:
            return int((self.level - self.size) * SECOND_NS / self.avg)
        if self.burst_length > 1 and self.burst_level > self.burst_size:
            return int((self.burst_level - self.burst_size) * SECOND_NS / self.max)
        return 0


class ThrottleState:
    """Six buckets. Not locked; whoever shares it does that."""

    def __init__(self, limits: Limits | None = None, now_ns: int = 0) -> None:
        self.configure(limits or Limits(), now_ns)

    def configure(self, limits: Limits, now_ns: int) -> None:
        """New limits; what was done before is forgotten. They have been checked."""
        self.limits = limits
        self.previous_leak_ns = now_ns
        self.buckets = buckets = [Bucket(limit) for limit in limits.buckets]
        self.enabled = limits.enabled
        self._leaking = [bucket for bucket in buckets if bucket.avg]
        self._bytes = [[buckets[BPS_TOTAL], buckets[which]] for which in (BPS_READ, BPS_WRITE)]
        self._operations = [[buckets[IOPS_TOTAL], buckets[which]] for which in (IOPS_READ, IOPS_WRITE)]
        self._limited_bytes = [[bucket for bucket in pair if bucket.avg] for pair in self._bytes]
        self._limited_operations = [[bucket for bucket in pair if bucket.avg] for pair in self._operations]

    def leak(self, now_ns: int) -> None:
        """Time has passed. A clock that went back does nothing."""
        elapsed_ns = now_ns - self.previous_leak_ns
        if elapsed_ns <= 0:
            return
        self.previous_leak_ns = now_ns
        for bucket in self._leaking:
            if bucket.level:
                bucket.leak(elapsed_ns)

    def wait_ns(self, direction: int) -> int:
        """How long the next request of a direction has to wait, 0 if it may go."""
        longest = 0
        for bucket in self._limited_bytes[direction]:
            longest = max(longest, bucket.wait_ns())
        for bucket in self._limited_operations[direction]:
            longest = max(longest, bucket.wait_ns())
        return longest

    def units(self, length: int) -> float:
        """How many operations a request counts as."""
        op_size = self.limits.op_size
        return length / op_size if op_size and length > op_size else 1.0

    def account(self, direction: int, length: int) -> None:
        """A request is done now."""
        for bucket in self._bytes[direction]:
            bucket.fill(length)
        for bucket in self._operations[direction]:
            bucket.fill(self.units(length))

    def admit(self, direction: int, requests: list[Request], now_ns: int) -> bool:
        """Account for a list of requests if each of them may go at once; whether they may. This is what every list
        comes by, so it is one loop over the limits that there are, and looks at each request only for its length, and
        only if somebody limits bytes."""
        if now_ns > self.previous_leak_ns:
            self.leak(now_ns)
        units: float = len(requests)
        last_units: float = 1
        if self.limits.op_size:
            units = sum([self.units(request.length) for request in requests])
            last_units = self.units(requests[-1].length)
        limited_bytes, limited_operations = self._limited_bytes[direction], self._limited_operations[direction]
        total = 0
        if limited_bytes:
            total = sum(map(_length, requests))
            before_last = total - requests[-1].length
            for bucket in limited_bytes:
                if bucket.level + before_last > bucket.size or (
                    bucket.burst_length > 1 and bucket.burst_level + before_last > bucket.burst_size
                ):
                    return False
        units_before_last = units - last_units
        for bucket in limited_operations:
            if bucket.level + units_before_last > bucket.size or (
                bucket.burst_length > 1 and bucket.burst_level + units_before_last > bucket.burst_size
            ):
                return False
        for bucket in limited_bytes:
            bucket.level += total
            bucket.burst_level += total
        for bucket in limited_operations:
            bucket.level += units
            bucket.burst_level += units
        return True


class ThrottleTimers:
    """A timer for each direction that has a callback, in one context at a time."""

    def __init__(
        self,
        context: AioContext,
        read: Callable[[], object] | None,
        write: Callable[[], object] | None,
        clock: str = "realtime",
    ) -> None:
        assert read is not None or write is not None
        self.clock = clock
        self._callbacks = (read, write)
        self.timers: list[Timer | None] = [None, None]
        self.attach(context)

    @property
    def initialised(self) -> bool:
        """Whether there are timers now."""
        return any(self.timers)

    def attach(self, context: AioContext) -> None:
        """Make the timers in a context. They are not armed."""
        assert not self.initialised
        self.context = context
        for direction, callback in enumerate(self._callbacks):
            if callback is not None:
                self.timers[direction] = context.timer(callback, self.clock, name="throttling")

    def arm_ns(self, direction: int, deadline_ns: int) -> None:
        """From any thread."""
        timer = self.timers[direction]
        assert timer is not None
        timer.arm_ns(deadline_ns)

    def cancel(self, direction: int) -> None:
        timer = self.timers[direction]
        if timer is not None:
            timer.cancel()

    def detach(self) -> None:
        """Leave the context: the timers are cancelled and gone."""
        for timer in self.timers:
            if timer is not None:
                timer.cancel()
        self.timers = [None, None]
