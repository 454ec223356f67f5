# SPDX-License-Identifier: Apache-2.0
"""Bottom halves: once each, in the next poll, whoever schedules, cancels, deletes, nests or raises."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial

import pytest

from bottomhalf.aio import AioContext, AioError, BottomHalf
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import drain, until


class Counted:
    """QEMU's fixture: counts, schedules itself again until ``most`` runs, then deletes itself if asked to."""

    def __init__(self, context: AioContext, most: int = 0, delete: bool = False) -> None:
        self.count = 0
        self.most = most
        self.delete = delete
        self.half: BottomHalf | None = context.bottom_half(self.run, name="counted")

    def run(self) -> None:
        assert self.half is not None
        self.count += 1
        if self.count < self.most:
            self.half.schedule()
        elif self.delete:
            self.half.delete()
            self.half = None

    def schedule(self) -> None:
        assert self.half is not None
        self.half.schedule()


def test_schedule(context: AioContext) -> None:
    """/aio/bh/schedule, /aio/bh/flush"""
    counted = Counted(context)
    counted.schedule()
    assert counted.count == 0
    assert context.poll(True) is True
    assert counted.count == 1
    assert context.poll(False) is False
    assert counted.count == 1


def test_schedule10(context: AioContext) -> None:
    """/aio/bh/schedule10: what schedules itself runs in the next poll."""
    counted = Counted(context, 10)
    counted.schedule()
    assert context.poll(False) is True and counted.count == 1
    assert context.poll(True) is True and counted.count == 2
    while counted.count < 10:
        assert context.poll(True) is True
    assert context.poll(False) is False and counted.count == 10


def test_cancel(context: AioContext) -> None:
    """/aio/bh/cancel"""
    counted = Counted(context)
    counted.schedule()
    assert counted.half is not None
    counted.half.cancel()
    assert context.poll(False) is False and counted.count == 0


def test_delete(context: AioContext) -> None:
    """/aio/bh/delete: never runs, and its poll is no progress."""
    counted = Counted(context)
    counted.schedule()
    assert counted.half is not None
    counted.half.delete()
    assert context.poll(False) is False and counted.count == 0


def test_callback_delete_one(context: AioContext) -> None:
    """/aio/bh/callback-delete/one"""
    counted = Counted(context, 1, delete=True)
    counted.schedule()
    while counted.count < 1:
        context.poll(True)
    assert counted.count == 1 and counted.half is None
    assert context.poll(False) is False and counted.count == 1


def test_callback_delete_many(context: AioContext) -> None:
    """/aio/bh/callback-delete/many: one poll runs each once, the others go on until their ends."""
    all_counted = [Counted(context, most, delete=True) for most in (1, 3, 2, 4)]
    for counted in all_counted:
        counted.schedule()
    assert context.poll(False) is True
    assert [counted.count for counted in all_counted] == [1] * 4
    assert all_counted[0].half is None
    while any(counted.half for counted in all_counted):
        assert context.poll(True) is True
    assert [counted.count for counted in all_counted] == [1, 3, 2, 4]
    assert context.poll(False) is False


def test_many_schedules_make_one_run(context: AioContext) -> None:
    counted = Counted(context)
    for _ in range(5):
        counted.schedule()
    assert counted.half is not None
    counted.half.cancel()
    counted.schedule()
    assert context.poll(False) is True and counted.count == 1
    assert context.poll(False) is False and counted.count == 1


def test_deleted_is_deleted(context: AioContext) -> None:
    """Scheduled after its deletion, before or after the loop has seen that, it never runs."""
    counted = Counted(context)
    half = counted.half
    assert half is not None
    half.schedule()
    half.delete()
    half.schedule()
    assert context.poll(False) is False
    half.schedule()
    half.schedule_idle()
    assert context.timeout_ns() == -1
    assert context.poll(False) is False and counted.count == 0
    assert "deleted" in repr(half)


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_taken_back_by_another(context: AioContext, how: str) -> None:
    """A bottom half takes back another of the same batch: that one does not run, or ran before."""
    ran: list[int] = []
    halves: list[BottomHalf] = []

    def run(me: int) -> None:
        ran.append(me)
        getattr(halves[1 - me], how)()

    halves += [context.bottom_half(lambda: run(0)), context.bottom_half(lambda: run(1))]
    for half in halves:
        half.schedule()
    assert context.poll(False) is True
    assert len(ran) == 1
    assert context.poll(False) is False


def test_order(context: AioContext, host: Host) -> None:
    """T1: ours is first in, first out; the simulated host shuffles, so that nobody relies on it."""
    orders = set()
    for _ in range(20):
        ran: list[int] = []
        for n in range(5):
            context.schedule_oneshot(partial(ran.append, n))
        assert context.poll(False) is True
        assert sorted(ran) == list(range(5))
        orders.add(tuple(ran))
    if host.name == "linux":
        assert orders == {(0, 1, 2, 3, 4)}
    else:
        assert len(orders) > 1


def test_oneshot_that_drops_its_owner(context: AioContext) -> None:
    """T2: after the schedule nobody but the loop has to hold a one-shot, and afterwards nobody does."""

    class Owner:
        def run(self) -> None:
            owners.remove(self)

    owners = [Owner() for _ in range(100)]
    left = [weakref.ref(owner) for owner in owners]
    for owner in owners:
        context.schedule_oneshot(owner.run)
    del owner
    context.poll(False)
    gc.collect()
    assert owners == [] and not any(reference() for reference in left)


@pytest.mark.parametrize("own", [False, True])
def test_deleted_then_nested(context: AioContext, own: bool) -> None:
    """T3: a bottom half deletes another, or itself, and polls inside; nothing runs twice, nothing is lost."""
    ran: list[str] = []

    def first() -> None:
        ran.append("first")
        (halves["first"] if own else halves["victim"]).delete()
        context.poll(False)
        ran.append("first ends")

    halves = {
        "first": context.bottom_half(first),
        "victim": context.bottom_half(lambda: ran.append("victim")),
        "other": context.bottom_half(lambda: ran.append("other")),
    }
    for half in halves.values():
        half.schedule()
    context.poll(False)
    assert context.poll(False) is False
    assert ran.count("first") == ran.count("other") == 1
    assert ran.count("victim") <= 1
    if own:
        assert "victim" in ran
    elif "victim" in ran:
        assert ran.index("victim") < ran.index("first")


def test_starves_nobody(context: AioContext, host: Host) -> None:
    """T4: one that schedules itself for ever leaves room for handlers and timers."""
    seen: list[str] = []
    event = host.event()
    event.set()
    context.set_fd_handler(event.fileno(), lambda: (event.clear(), seen.append("handler")))
    context.timer(lambda: seen.append("timer")).arm_ns(0)
    half = context.bottom_half(lambda: half.schedule())
    half.schedule()
    polls = 0
    while len(seen) < 2:
        assert context.poll(True) is True
        polls += 1
        assert polls < 100
    assert sorted(seen) == ["handler", "timer"]
    half.delete()
    context.set_fd_handler(event.fileno())
    event.close()


def test_nested_poll_finishes_the_outer_batch(context: AioContext) -> None:
    """T5: one waits, in a nested poll, for the effect of another of its own batch."""
    effects: list[str] = []

    def wait() -> None:
        until(context, lambda: effects)
        effects.append("waited")

    context.schedule_oneshot(wait)
    context.schedule_oneshot(lambda: effects.append("effect"))
    assert context.poll(True) is True
    assert effects == ["effect", "waited"]


def test_order_of_nested_slices(sim_context: AioContext) -> None:
    """X and Y are scheduled; Y schedules Z and polls: what is left of the outer batch comes before Z."""
    ran: list[str] = []

    def y() -> None:
        ran.append("Y(")
        sim_context.schedule_oneshot(lambda: ran.append("Z"))
        sim_context.poll(True)
        ran.append(")")

    sim_context.schedule_oneshot(lambda: ran.append("X"))
    sim_context.schedule_oneshot(y)
    sim_context.poll(True)
    assert ran in (["X", "Y(", "Z", ")"], ["Y(", "X", "Z", ")"])
    assert sim_context.poll(False) is False


def test_schedules_itself_and_polls(context: AioContext) -> None:
    """T6: then it runs inside itself; that is what it asked for, and it ends when it stops asking."""
    depth = deepest = 0

    def run() -> None:
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        if deepest < 10:
            half.schedule()
            assert context.poll(True) is True
        depth -= 1

    half = context.bottom_half(run)
    half.schedule()
    context.poll(True)
    assert (depth, deepest) == (0, 10)
    assert context.poll(False) is False


def test_idle_does_not_spin(sim: SimHost) -> None:
    """T7: in QEMU an idle bottom half that arms itself again spins in a loop of blocking polls, because scheduling
    it notifies. Ours runs every 10 ms and is no progress."""
    context = AioContext(sim)
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1
        half.schedule_idle()

    half = context.bottom_half(run)
    half.schedule_idle()
    end_ns = context.now_ns() + 100_000_000
    while context.now_ns() < end_ns:
        assert context.poll(True) is False
    assert 9 <= runs <= 11
    half.delete()
    context.close()


def test_idle_and_then_for_good(context: AioContext) -> None:
    """T7: in QEMU the idle mark sticks when an ordinary schedule follows. Ours counts as progress then."""
    counted = Counted(context)
    assert counted.half is not None
    counted.half.schedule_idle()
    counted.half.schedule()
    assert context.timeout_ns() == 0
    counted.half.schedule_idle()  # it is more than that already
    assert context.poll(True) is True and counted.count == 1
    counted.half.schedule_idle()
    assert context.poll(True) is False and counted.count == 2
    counted.schedule()
    assert context.poll(True) is True and counted.count == 3


def test_idle_from_elsewhere(sim: SimHost) -> None:
    """Another thread, or a signal handler, schedules an idle one while the loop sleeps without end."""
    context = AioContext(sim)
    ran: list[int] = []
    half = context.bottom_half(lambda: ran.append(sim.monotonic_ns()))
    for thread in (1, 2):  # 1 is the home thread: as a signal handler does it
        start_ns = context.now_ns()

        def schedule(thread: int = thread) -> None:
            with sim.as_thread(thread):
                half.schedule_idle()

        sim.at(5_000_000, schedule)
        while not ran:
            assert context.poll(True) is False
        assert ran.pop() <= start_ns + 5_000_000 + 10_000_000
    context.close()


def test_idle_between_the_look_and_the_sleep(sim: SimHost) -> None:
    """A signal handler schedules an idle one after the loop has computed that it may sleep without end."""
    ran: list[str] = []

    class Interrupted(AioContext):
        __slots__ = ()

        def timeout_ns(self) -> int:
            answer = super().timeout_ns()
            if not ran:
                half.schedule_idle()
            return answer

    context = Interrupted(sim)
    half = context.bottom_half(lambda: ran.append("ran"))
    start_ns = context.now_ns()
    context.poll(True)
    assert ran and context.now_ns() <= start_ns + 10_000_000
    context.close()


def test_exception_loses_nothing(context: AioContext) -> None:
    """Without a handler it goes out of poll; those behind it run in the next one."""
    ran: list[int] = []

    def run(n: int) -> None:
        ran.append(n)
        if n % 2:
            raise ValueError(n)

    for n in range(6):
        context.schedule_oneshot(lambda n=n: run(n))  # type: ignore[misc]
    caught = []
    for _ in range(4):
        try:
            assert context.poll(True) is True
        except ValueError as error:
            caught.append(error.args[0])
        if len(ran) == 6:
            break
    drain(context)
    assert sorted(ran) == list(range(6)) and sorted(caught) == [1, 3, 5]


def test_exception_handler(context: AioContext) -> None:
    told: list[tuple[AioContext, str, str]] = []
    context.exception_handler = lambda *what: told.append((what[0], str(what[1]), what[2]))
    ran: list[int] = []

    def fail() -> None:
        raise ValueError("no")

    context.schedule_oneshot(lambda: ran.append(1))
    context.bottom_half(fail, name="fails").schedule()
    context.schedule_oneshot(lambda: ran.append(2))
    assert context.poll(True) is True
    assert sorted(ran) == [1, 2] and told == [(context, "no", "bottom half 'fails'")]


@pytest.mark.parametrize("caught", [False, True])
def test_exception_in_a_nested_poll(context: AioContext, caught: bool) -> None:
    """It goes out of the inner poll, into the callback that polls; the rest of both batches runs once."""
    ran: list[str] = []

    def outer() -> None:
        ran.append("outer")
        context.schedule_oneshot(lambda: ran.append("inner"))
        for _ in range(3):
            try:
                context.poll(False)
            except KeyError:
                if not caught:
                    raise

    def fail() -> None:
        ran.append("fail")
        raise KeyError

    context.schedule_oneshot(outer)
    context.schedule_oneshot(fail)
    context.schedule_oneshot(lambda: ran.append("last"))
    for _ in range(5):
        try:
            context.poll(False)
        except KeyError:
            pass
    assert sorted(ran) == ["fail", "inner", "last", "outer"]


def test_interrupt_loses_nothing(context: AioContext) -> None:
    """KeyboardInterrupt is not the exception handler's, and what it interrupts goes on."""
    context.exception_handler = lambda *_: pytest.fail("asked")
    ran: list[int] = []

    def run(n: int) -> None:
        ran.append(n)
        if n == 0:
            raise KeyboardInterrupt

    for n in range(3):
        context.schedule_oneshot(lambda n=n: run(n))  # type: ignore[misc]
    with pytest.raises(KeyboardInterrupt):
        while True:
            assert context.poll(True) is True
    drain(context)
    assert sorted(ran) == [0, 1, 2]


def test_close_is_loud(host: Host) -> None:
    """T10: a scheduled bottom half at the end of its context is lost work."""
    context = AioContext(host)
    half = context.bottom_half(lambda: None, name="flush cache")
    half.schedule()
    with pytest.raises(AioError, match="flush cache"):
        context.close()
    context.poll(False)  # it is still there
    half.schedule()
    half.delete()
    context.close()


def test_names(context: AioContext) -> None:
    assert context.bottom_half(drain, name="x").name == "x"
    assert context.bottom_half(lambda: None).name.endswith("<lambda>")
    assert "not scheduled" in repr(context.bottom_half(lambda: None))


@pytest.mark.parametrize("shots", [False, True])
def test_stress_by_threads(shots: bool) -> None:
    """T8: threads schedule, and cancel, while the loop looks; no schedule is lost, no exception happens."""
    context = AioContext(LinuxHost())
    rounds, threads_count = 2000, 4
    halves = [context.bottom_half(lambda n=n: ran.__setitem__(n, ran[n] + 1)) for n in range(threads_count)]
    ran = [0] * threads_count
    shot = [0] * threads_count
    ended: list[int] = []

    def work(n: int) -> None:
        def count() -> None:
            shot[n] += 1

        for i in range(rounds):
            if shots:
                context.schedule_oneshot(count)
            halves[n].schedule()
            halves[(n + i) % threads_count].schedule_idle()
            if not shots and i % 3 == 0:
                halves[n].cancel()
        halves[n].schedule()  # the last one counts
        context.schedule_oneshot(lambda: ended.append(ran[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(threads_count)]
    for thread in threads:
        thread.start()
    until(context, lambda: len(ended) == threads_count)
    for thread in threads:
        thread.join()
    drain(context)
    assert shot == [rounds if shots else 0] * threads_count
    assert all(count >= 1 for count in ended)
    context.close()
