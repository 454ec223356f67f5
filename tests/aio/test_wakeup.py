# SPDX-License-Identifier: Apache-2.0
"""No wake-up is lost, proven by walking through every interleaving of a loop and a scheduler.

Scheduling a bottom half has four steps: put it into the list, look at ``notify_me``, take it down if it was up, write
the event. notify() has one more, for what does not stand in a list: publish, set ``notified``, look, take, write. The
loop is stopped at each of its own looks and stores (``notified`` and ``notify_me`` become properties, its methods get
hooks), and at each stop some of the other's steps happen. All ways to spread the steps over the stops of a poll that
has other work and of one that sleeps are tried, and thousands of those for two schedulers at a time, of whom one may
rely on the other's write. A loop that sleeps when nothing will wake it is a ``Deadlock`` of the simulated host.

Broken protocols, each with one thing in another order, must be caught by the same walks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import pytest

from bottomhalf.aio import AioContext
from bottomhalf.host.sim import Deadlock, SimHost


class Stepped(AioContext):
    """A context that calls ``stop`` before and after everything that the protocol is about."""

    __slots__ = ("_notified", "_notify_me", "stop")

    def __init__(self, host: SimHost) -> None:
        self.stop: Callable[[], None] = lambda: None
        super().__init__(host)
        wait = self._wait

        def stopped_wait(timeout_ns: int) -> list[tuple[int, int]]:
            self.stop()
            events = wait(timeout_ns)
            self.stop()
            return events

        self._wait = stopped_wait

    @property
    def notified(self) -> bool:  # type: ignore[override]
        self.stop()
        return self._notified

    @notified.setter
    def notified(self, value: bool) -> None:
        self.stop()
        self._notified = value

    @property
    def notify_me(self) -> bool:  # type: ignore[override]
        self.stop()
        return self._notify_me

    @notify_me.setter
    def notify_me(self, value: bool) -> None:
        self.stop()
        self._notify_me = value

    def timeout_ns(self) -> int:
        self.stop()
        return super().timeout_ns()

    def _run_bottom_halves(self) -> bool:
        self.stop()
        progress = super()._run_bottom_halves()
        self.stop()
        return progress


class Scheduler:
    """BottomHalf.schedule() as steps that another thread takes."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.context = walk.context
        self.half = walk.half
        self.somebody_sleeps = False
        self.steps: list[Callable[[], None]] = [self.publish, self.look, self.take, self.write]

    def publish(self) -> None:
        self.half.cancelled = False
        if not self.half.queued:
            self.half.queued = True
            self.context.append_half(self.half)

    def look(self) -> None:
        self.somebody_sleeps = self.context._notify_me

    def take(self) -> None:
        if self.somebody_sleeps:
            self.context._notify_me = False

    def write(self) -> None:
        if self.somebody_sleeps:
            self.context._event.set()


class Notifier(Scheduler):
    """AioContext.notify() after a change that the loop finds only if it looks: here, that it may stop polling."""

    def __init__(self, walk: Walk) -> None:
        super().__init__(walk)
        self.steps = [self.publish, self.set_notified, self.look, self.take, self.write]

    def publish(self) -> None:
        self.walk.run()

    def set_notified(self) -> None:
        self.context._notified = True


class LooksFirst(Scheduler):
    """Broken: whether somebody sleeps is looked up before the work is published."""

    def __init__(self, walk: Walk) -> None:
        super().__init__(walk)
        self.steps = [self.look, self.publish, self.take, self.write]


class TakesLate(Scheduler):
    """Broken: the announcement is taken down after the write; by then it may be the one of the next sleep."""

    def __init__(self, walk: Walk) -> None:
        super().__init__(walk)
        self.steps = [self.publish, self.look, self.write, self.take]


class NotifiesFirst(Notifier):
    """Broken: ``notified`` is set before there is anything to find."""

    def __init__(self, walk: Walk) -> None:
        super().__init__(walk)
        self.steps = [self.set_notified, self.look, self.publish, self.take, self.write]


class SleepsWithoutASecondLook(Stepped):
    """Broken: between computing how long to sleep and announcing the sleep nobody looks at ``notified``."""

    __slots__ = ()

    def _wait_for_work(self) -> list[tuple[int, int]]:
        timeout_ns = self.timeout_ns()
        self.notify_me = True
        try:
            return self._wait(timeout_ns)
        finally:
            self.notify_me = False


class ClearsTooLate(Stepped):
    """Broken: ``notified`` is cleared after the last look at the work. (After the work was taken is not too late
    yet: timeout_ns() looks at it once more before the next sleep.)"""

    __slots__ = ()

    def _wait_for_work(self) -> list[tuple[int, int]]:
        timeout_ns = self.timeout_ns()
        self.notified = False
        return super()._wait_for_work() if timeout_ns == 0 else self._sleep(timeout_ns)

    def _sleep(self, timeout_ns: int) -> list[tuple[int, int]]:
        self.notify_me = True
        try:
            return self._wait(0 if self.notified else timeout_ns)
        finally:
            self.notify_me = False


class Walk:
    """One interleaving: before stop number ``places[i]`` the scheduler has taken its step i."""

    def __init__(self, context_class: type[Stepped], scheduler_class: type[Scheduler], places: tuple[int, ...]):
        self.host = SimHost(0)
        self.host.explain = str  # a hang is what some of these are after; nobody reads about it
        self.context = context_class(self.host)
        self.ran = 0
        self.other = self.context.bottom_half(lambda: None, name="other work")
        self.half = self.context.bottom_half(self.run, name="work")
        self.steps = list(zip(places, scheduler_class(self).steps, strict=True))
        self.stops = 0

    def run(self) -> None:
        self.ran += 1

    def stop(self) -> None:
        while self.steps and self.steps[0][0] <= self.stops:
            self.steps.pop(0)[1]()
        self.stops += 1

    def go_on(self) -> None:
        """The loop sleeps; the other thread, which was only slow, takes its next step."""
        if self.steps:
            self.steps.pop(0)[1]()
            self.host.at(1000, self.go_on)

    def go(self) -> int:
        """Poll until the work has run; how many stops there were. Deadlock if it never does."""
        self.other.schedule()  # the first poll does not sleep
        self.context.stop = self.stop
        self.host.at(1000, self.go_on)
        while not self.ran:
            self.context.poll(True)
        self.context.stop = lambda: None
        while self.steps:
            self.steps.pop(0)[1]()
        self.context.poll(False)
        assert self.ran == 1, "ran twice"
        self.context.close()
        return self.stops


def walks(context_class: type[Stepped], scheduler_class: type[Scheduler]) -> tuple[int, int]:
    """How many interleavings there are, and how many of them lose the wake-up."""
    stops_max = 30  # the two polls have fewer
    # One step after the other at all places; what lies behind the last stop happens while the loop sleeps.
    tried = lost = 0
    steps = len(scheduler_class(Walk(context_class, Scheduler, (0, 0, 0, 0))).steps)
    longest = Walk(context_class, scheduler_class, (stops_max,) * steps)
    try:
        stops = min(longest.go(), stops_max)
    except Deadlock:
        stops = stops_max
    for places in combinations_with_replacement(range(stops + 1), steps):
        tried += 1
        try:
            Walk(context_class, scheduler_class, places).go()
        except Deadlock:
            lost += 1
    return tried, lost


@pytest.mark.parametrize(("scheduler_class", "at_least"), [(Scheduler, 1000), (Notifier, 3000)])
def test_nothing_is_lost(scheduler_class: type[Scheduler], at_least: int) -> None:
    """T11: the protocols in use."""
    tried, lost = walks(Stepped, scheduler_class)
    assert tried > at_least and lost == 0


def _state(walk: Walk) -> tuple[Any, ...]:
    half, context = walk.half, walk.context
    return (half.scheduled, half.queued, context.notified, context._queue == [half], context._event._is_set)


@pytest.mark.parametrize("sleeping", [0, 1])
@pytest.mark.parametrize("scheduler_class", [Scheduler, Notifier])
def test_steps_are_the_real_ones(scheduler_class: type[Scheduler], sleeping: int) -> None:
    """The walk is about the real thing: schedule() and notify() leave the same behind as their steps."""
    states = []
    for by_steps in (False, True):
        walk = Walk(Stepped, Scheduler, (0, 0, 0, 0))
        walk.context.notify_me = bool(sleeping)
        if by_steps:
            for step in scheduler_class(walk).steps:
                step()
        elif scheduler_class is Scheduler:
            walk.half.schedule()
        else:
            walk.context.notify()
        states.append(_state(walk))
        walk.half.delete()
        walk.context.close()
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("context_class", "scheduler_class"),
    [
        (SleepsWithoutASecondLook, Scheduler),
        (SleepsWithoutASecondLook, Notifier),
        (ClearsTooLate, Notifier),
        (Stepped, LooksFirst),
        (Stepped, NotifiesFirst),
    ],
)
def test_broken_protocols_lose_wakeups(context_class: type[Stepped], scheduler_class: type[Scheduler]) -> None:
    """T11: the walk finds what it is meant to find."""
    tried, lost = walks(context_class, scheduler_class)
    assert 0 < lost < tried


class WalkOfTwo(Walk):
    """Two schedulers, each with a bottom half of its own."""

    def __init__(self, scheduler_class: type[Scheduler], first: tuple[int, ...], second: tuple[int, ...]) -> None:
        super().__init__(Stepped, scheduler_class, first)
        self.ran_two = 0
        other = scheduler_class(self)
        other.half = self.context.bottom_half(self.run_two, name="work of the second")
        both = self.steps + list(zip(second, other.steps, strict=True))
        self.steps = sorted(both, key=lambda step: step[0])

    def run_two(self) -> None:
        self.ran_two += 1

    def go(self) -> int:
        self.other.schedule()
        self.context.stop = self.stop
        self.host.at(1000, self.go_on)
        while not (self.ran and self.ran_two):
            self.context.poll(True)
        self.context.stop = lambda: None
        while self.steps:
            self.steps.pop(0)[1]()
        self.context.poll(False)
        assert self.ran == self.ran_two == 1
        self.context.close()
        return self.stops


def lost_by_two(scheduler_class: type[Scheduler], tries: int, stops_max: int = 45) -> int:
    """In how many of so many random interleavings a wake-up is lost. The loop has some polls more than with one."""
    chance = random.Random(7)
    lost = 0
    for _ in range(tries):
        places = [tuple(sorted(chance.randrange(stops_max) for _ in range(4))) for _ in range(2)]
        try:
            WalkOfTwo(scheduler_class, *places).go()
        except Deadlock:
            lost += 1
    return lost


def test_two_schedulers() -> None:
    """Who finds the announcement taken down relies on the write of another, who may be slow."""
    assert lost_by_two(Scheduler, 4000) == 0


def test_two_schedulers_that_take_late() -> None:
    assert lost_by_two(TakesLate, 4000) > 0
