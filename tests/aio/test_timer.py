# SPDX-License-Identifier: Apache-2.0
"""Timers: when, in which order, how often, and what their callbacks may do."""

from __future__ import annotations

from functools import partial

import pytest

from bottomhalf.aio import AioContext, Timer
from bottomhalf.aio.timer import SORT_AFTER
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import Notifier, drain, until

MS = 1_000_000


def test_schedule(sim: SimHost) -> None:
    """/aio/timer/schedule: nothing runs while nobody polls; it arms itself once more."""
    context = AioContext(sim)
    notifier = Notifier(context, sim)
    count = 0

    def fire() -> None:
        nonlocal count
        count += 1
        if count < 2:
            timer.arm_ns(context.now_ns() + 750 * MS)

    timer = context.timer(fire)
    assert not timer.armed
    timer.arm_ns(context.now_ns() + 750 * MS)
    assert timer.armed
    drain(context)
    assert count == 0
    sim.advance(1000 * MS)
    assert count == 0
    assert context.poll(False) is True and count == 1
    drain(context)
    assert count == 1
    assert context.poll(True) is True and count == 2
    assert context.poll(False) is False and not timer.armed
    notifier.close()
    context.close()


def test_waits_no_less(context: AioContext) -> None:
    """On every host, for waits long and short enough to take either system call."""
    for delay_ns in (0, 1, 50_000, 1 * MS + 1, 25 * MS):
        ran: list[int] = []
        deadline_ns = context.now_ns() + delay_ns
        context.timer(partial(ran.append, 1)).arm_ns(deadline_ns)
        until(context, lambda: ran)  # noqa: B023
        assert context.now_ns() >= deadline_ns


def test_order(context: AioContext) -> None:
    """By deadline, then by arming; negative deadlines are 0."""
    ran: list[str] = []
    timers = {name: context.timer(partial(ran.append, name)) for name in "abcdef"}
    for name, deadline_ns in (("f", 9), ("c", 5), ("d", 5), ("a", -3), ("e", 5), ("b", 0)):
        timers[name].arm_ns(deadline_ns)
    assert context.poll(False) is True
    assert ran == list("abcdef")


def test_armed_again_before(context: AioContext) -> None:
    """The latest arm counts, be it earlier or later."""
    ran: list[int] = []
    timer = context.timer(partial(ran.append, 1))
    far_ns = context.now_ns() + 10**15
    timer.arm_ns(far_ns)
    timer.arm_ns(0)
    assert context.poll(False) is True and ran == [1]
    timer.arm_ns(0)
    timer.arm_ns(far_ns)
    assert context.poll(False) is False and timer.armed
    timer.cancel()
    timer.cancel()
    assert not timer.armed and context.timeout_ns() == -1


def test_armed_into_the_past(context: AioContext) -> None:
    """T40: in QEMU a callback that arms its timer into the past loops in the same pass. Ours runs once a pass, and
    does not keep those behind it from running."""
    ran: list[str] = []

    def again() -> None:
        ran.append("again")
        timer.arm_ns(0)

    timer = context.timer(again)
    timer.arm_ns(0)
    context.timer(partial(ran.append, "behind")).arm_ns(1)
    for polls in range(1, 5):
        assert context.poll(True) is True
        assert ran == ["again", "behind", *["again"] * (polls - 1)]
    timer.cancel()
    assert context.poll(False) is False


def test_callbacks_cancel_and_arm(context: AioContext) -> None:
    """One that was due in this pass and is cancelled does not run; one that is armed in it runs in the next."""
    ran: list[str] = []
    timers: dict[str, Timer] = {}

    def first() -> None:
        ran.append("first")
        timers["victim"].cancel()
        timers["later"].arm_ns(0)

    timers["first"] = context.timer(first)
    timers["victim"] = context.timer(partial(ran.append, "victim"))
    timers["later"] = context.timer(partial(ran.append, "later"))
    timers["last"] = context.timer(partial(ran.append, "last"))
    for n, name in enumerate(("first", "victim", "last")):
        timers[name].arm_ns(n)
    context.poll(False)
    assert ran == ["first", "last"]
    context.poll(True)
    assert ran == ["first", "last", "later"]


def test_nested_poll(context: AioContext) -> None:
    """A callback waits for a timer that was due with it, and for one that it has just armed."""
    ran: list[str] = []
    armed = context.timer(partial(ran.append, "armed"))

    def wait() -> None:
        armed.arm_ns(0)
        until(context, lambda: len(ran) == 2)
        ran.append("waited")

    context.timer(wait).arm_ns(0)
    context.timer(partial(ran.append, "due")).arm_ns(1)
    context.poll(True)
    assert sorted(ran[:2]) == ["armed", "due"] and ran[2:] == ["waited"]
    assert context.poll(False) is False


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("position", [0, SORT_AFTER - 1, SORT_AFTER, 30, 99])
def test_nested_poll_among_many(context: AioContext, position: int, others: bool) -> None:
    """One of a hundred that are due waits for all the others, which the pass around it has taken off the heap."""
    ran: list[int] = []
    armed = context.timer(partial(ran.append, 100))

    def run(number: int) -> None:
        if number == position:
            if others:
                armed.arm_ns(0)
            until(context, lambda: len(ran) == 99 + others)
        ran.append(number)

    for number in range(100):
        context.timer(partial(run, number)).arm_ns(number)
    if others:
        context.timer(partial(ran.append, 101)).arm_ns(context.now_ns() + 3600 * 10**9)
    context.poll(True)
    assert ran[99 + others :] == [position]
    assert [number for number in ran[:-1] if number < 100] == [n for n in range(100) if n != position]
    assert context.poll(False) is False


def test_a_nested_poll_waits_for_one_that_the_pass_leaves_alone(context: AioContext) -> None:
    """Armed into the past during the pass, it is for the next; a callback behind it waits for it."""
    ran: list[str] = []
    past = context.timer(partial(ran.append, "past"))

    def wait() -> None:
        until(context, lambda: ran)
        ran.append("waited")

    context.timer(lambda: past.arm_ns(1)).arm_ns(0)
    context.timer(wait).arm_ns(2)
    context.poll(True)
    assert ran == ["past", "waited"]


@pytest.mark.parametrize("due", [1, 2 * SORT_AFTER, 1000])
def test_many_of_which_some_are_due(context: AioContext, due: int) -> None:
    """In order, those of equal deadline in the order of arming, and what a callback cancels does not run."""
    ran: list[int] = []
    last = due // 3 * 2
    later = context.now_ns() + 3600 * 10**9

    def run(number: int) -> None:
        ran.append(number)
        if number == due // 2:
            timers[last].cancel()

    timers = [context.timer(partial(run, n)) for n in range(1000)]
    for number, timer in enumerate(timers):
        timer.arm_ns(number // 4 if number < due else later - number)
    context.poll(False)
    assert ran == [n for n in range(due) if n != last or n == due // 2]
    assert context._timers[0].armed == 1000 - due
    assert context.poll(False) is False


def test_nested_poll_in_a_timer_that_arms_itself(context: AioContext) -> None:
    """It is recursion only as long as the callback asks for it."""
    depth = deepest = 0

    def again() -> None:
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        if deepest < 5:
            timer.arm_ns(0)
            assert context.poll(True) is True
        depth -= 1

    timer = context.timer(again)
    timer.arm_ns(0)
    context.poll(True)
    assert (depth, deepest) == (0, 5)
    assert context.poll(False) is False


@pytest.mark.parametrize("handled", [False, True])
def test_exceptions(context: AioContext, handled: bool) -> None:
    told: list[str] = []
    if handled:
        context.exception_handler = lambda _context, error, where: told.append(f"{where}: {error}")
    ran: list[int] = []

    def fail() -> None:
        raise ValueError("late")

    context.timer(fail, name="watch").arm_ns(0)
    context.timer(partial(ran.append, 1)).arm_ns(1)
    if handled:
        assert context.poll(True) is True
        assert told == ["timer 'watch': late"]
    else:
        with pytest.raises(ValueError, match="late"):
            context.poll(True)
        assert ran == []
        assert context.poll(True) is True
    assert ran == [1]


def test_from_another_thread(sim: SimHost) -> None:
    """T13: armed while the loop sleeps for another timer, later or earlier; cancelled; the last word counts."""
    context = AioContext(sim)
    ran: list[str] = []
    start_ns = context.now_ns()
    late = context.timer(partial(ran.append, "late"))
    late.arm_ns(start_ns + 50 * MS)
    early = context.timer(lambda: ran.append(f"early {(context.now_ns() - start_ns) // MS}"))
    taken_back = context.timer(partial(ran.append, "taken back"))

    def other_thread() -> None:
        with sim.as_thread(2):
            early.arm_ns(start_ns + 20 * MS)
            taken_back.arm_ns(start_ns + 10 * MS)
            taken_back.cancel()
            late.arm_ns(start_ns + 60 * MS)

    sim.at(5 * MS, other_thread)
    until(context, lambda: "late" in ran)
    assert ran == ["early 20", "late"] and context.now_ns() == start_ns + 60 * MS
    context.close()


def test_moved_time_outs_do_not_pile_up(context: AioContext) -> None:
    """A time-out that every request moves, for hours, leaves a bounded heap behind, and the others in it."""
    ran: list[int] = []
    moved = context.timer(partial(ran.append, 0))
    others = [context.timer(partial(ran.append, n)) for n in range(1, 100)]
    far_ns = context.now_ns() + 10**15
    for n, timer in enumerate(others):
        timer.arm_ns(far_ns - n)
    for n in range(10_000):
        moved.arm_ns(far_ns + n)
        if n % 3 == 0:
            moved.cancel()
    assert len(context._timers[0].heap) <= 300
    for timer in others:
        timer.cancel()
    moved.arm_ns(0)
    assert context.poll(False) is True and ran == [0]
    assert context.timeout_ns() == -1


def test_wall_clock(sim: SimHost) -> None:
    """A timer of the wall clock follows its jumps; one made in a callback disturbs nobody."""
    context = AioContext(sim)
    ran: list[str] = []

    def make() -> None:
        context.timer(lambda: ran.append("wall"), clock="host").arm_ns(sim.realtime_ns() + 3600 * 1000 * MS)

    context.timer(make).arm_ns(0)
    assert context.poll(True) is True
    assert context.poll(False) is False
    sim.jump_realtime(3600 * 1000 * MS)
    assert context.poll(False) is True and ran == ["wall"]
    context.close()


def test_names(context: AioContext) -> None:
    assert context.timer(drain).name == "drain"
    assert context.timer(drain, name="retry").name == "retry"


def test_many(context: AioContext, host: Host) -> None:
    """Each once, none early, whatever the order of arming."""
    start_ns = context.now_ns()
    late: list[int] = []
    deadlines = [start_ns + (n * 7919 % 1000) * 1000 for n in range(1000)]
    host.shuffle(deadlines)
    for deadline_ns in deadlines:
        context.timer(lambda d=deadline_ns: late.append(context.now_ns() - d)).arm_ns(deadline_ns)  # type: ignore[misc]
    until(context, lambda: len(late) == 1000)
    assert min(late) >= 0
    assert context.poll(False) is False
