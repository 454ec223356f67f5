# SPDX-License-Identifier: Apache-2.0
"""Handlers, busy polling, the order within a poll, nesting, misuse."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial

import pytest

from bottomhalf.aio import AioContext, AioError, WrongContext, deferred
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Host, UnixAddress
from bottomhalf.host.sim import Deadlock, Odds, SimHost
from tests.aio.helpers import Notifier, drain, until


def test_event_add_remove(context: AioContext, host: Host) -> None:
    """/aio/event/add-remove"""
    notifier = Notifier(context, host)
    assert context.poll(False) is False and notifier.count == 0
    notifier.close()
    assert context.poll(False) is False


def test_event_wait(context: AioContext, host: Host) -> None:
    """/aio/event/wait"""
    notifier = Notifier(context, host, active=1)
    assert context.poll(False) is False and notifier.count == 0
    notifier.event.set()
    assert context.poll(False) is True and (notifier.count, notifier.active) == (1, 0)
    assert context.poll(False) is False
    context.set_fd_handler(notifier.event.fileno())
    assert context.poll(False) is False and notifier.count == 1
    notifier.close()


def test_event_wait_no_flush(context: AioContext, host: Host) -> None:
    """/aio/event/wait/no-flush-cb"""
    first = Notifier(context, host)
    first.event.set()
    until(context, lambda: first.count)
    first.count = 0
    second = Notifier(context, host, active=1)
    assert context.poll(False) is False
    for n in (1, 2):
        first.event.set()
        assert context.poll(False) is True and first.count == n
        assert context.poll(False) is False
    second.event.set()
    until(context, lambda: second.active == 0)
    assert (first.count, second.count) == (2, 1)
    first.close()
    second.close()
    assert context.poll(False) is False


def test_event_flush(context: AioContext, host: Host) -> None:
    """/aio/event/flush: the handler sets its event again."""
    notifier = Notifier(context, host, active=10, auto_set=True)
    notifier.event.set()
    assert context.poll(False) is True and (notifier.count, notifier.active) == (1, 9)
    assert context.poll(False) is True
    until(context, lambda: notifier.active == 0)
    assert notifier.count == 10
    assert context.poll(False) is False
    notifier.close()
    assert context.poll(False) is False


def test_notification_is_no_progress(context: AioContext) -> None:
    """T16: a blocking poll comes back from it and says so."""
    context.notify()
    assert context.poll(True) is False
    assert context.poll(False) is False


def test_order_in_a_poll(context: AioContext, host: Host) -> None:
    """Bottom halves, handlers, timers."""
    seen: list[str] = []
    event = host.event()
    event.set()
    context.set_fd_handler(event.fileno(), lambda: (seen.append("handler"), event.clear()))
    context.timer(lambda: seen.append("timer")).arm_ns(0)
    context.schedule_oneshot(lambda: seen.append("half"))
    assert context.poll(False) is True
    assert seen == ["half", "handler", "timer"]
    context.set_fd_handler(event.fileno())
    event.close()


def test_reading_writing_and_the_end(context: AioContext, host: Host, tmp_path) -> None:  # type: ignore[no-untyped-def]
    address = UnixAddress(str(tmp_path / "socket"))
    listener = host.listen(address)
    near = host.connect(address)
    accepted = []
    context.set_fd_handler(listener.fileno(), lambda: accepted.append(listener.accept()))
    until(context, lambda: accepted)
    context.set_fd_handler(listener.fileno())
    far = accepted[0]
    seen: list[str] = []
    received = bytearray()
    buffer = bytearray(16)

    def read() -> None:
        count = near.recv_into(buffer)
        received.extend(buffer[:count])
        seen.append("read")

    context.set_fd_handler(near.fileno(), read, lambda: seen.append("write"))
    far.send(b"x")
    until(context, lambda: received)
    assert "write" in seen  # it is writable all the time
    context.set_fd_handler(near.fileno(), read)
    seen.clear()
    drain(context)
    assert "write" not in seen
    far.close()
    until(context, lambda: seen)  # the end of the stream is readable
    context.set_fd_handler(near.fileno(), None, lambda: seen.append("told"))
    until(context, lambda: "told" in seen)  # and who only writes is told too
    context.set_fd_handler(near.fileno())
    near.close()
    listener.close()


def test_handlers_are_asked_for_errors(sim_context: AioContext, sim: SimHost) -> None:
    """Both are called after an error; on a hang-up the reader, and the writer if there is no reader."""
    from bottomhalf.host.protocol import ERR, HUP

    event = sim.event()
    seen: list[str] = []
    for mask, reader, expected in (
        (ERR, True, ["read", "write"]),
        (HUP, True, ["read"]),
        (ERR, False, ["write"]),
        (HUP, False, ["write"]),
    ):
        read = (lambda: seen.append("read")) if reader else None
        sim_context.set_fd_handler(event.fileno(), read, lambda: seen.append("write"))
        sim_context._handlers.dispatch([(event.fileno(), mask)])
        assert seen == expected
        seen.clear()
    sim_context.set_fd_handler(event.fileno())


def test_removed_by_another_handler(context: AioContext, host: Host) -> None:
    """T27: Of two ready handlers that remove each other one runs."""
    notifiers = [host.event(), host.event()]
    seen: list[int] = []

    def ready(me: int) -> None:
        seen.append(me)
        context.set_fd_handler(notifiers[1 - me].fileno())
        notifiers[me].clear()

    for n, event in enumerate(notifiers):
        event.set()
        context.set_fd_handler(event.fileno(), lambda n=n: ready(n))  # type: ignore[misc]
    drain(context)
    assert len(seen) == 1
    for event in notifiers:
        context.set_fd_handler(event.fileno())
        event.close()


def test_removes_itself(context: AioContext, host: Host) -> None:
    """T27: Between its reading and its writing half, too."""
    event = host.event()
    event.set()
    seen: list[str] = []

    def ready() -> None:
        seen.append("read")
        context.set_fd_handler(event.fileno())

    context.set_fd_handler(event.fileno(), ready, lambda: seen.append("write"))
    drain(context)
    assert seen == ["read"] or (seen[-1] == "read" and "write" in seen)
    assert context.poll(False) is False
    event.close()


def test_number_is_used_again(sim_context: AioContext, sim: SimHost) -> None:
    """A handler closes a ready descriptor, and a new one gets its number: it must not inherit the readiness."""
    seen: list[str] = []
    events = [sim.event(), sim.event()]
    new = []

    def ready(me: int) -> None:
        seen.append("ready")
        other = events[1 - me]
        sim_context.set_fd_handler(other.fileno())
        number = other.fileno()
        other.close()
        new.append(sim.event())
        assert new[0].fileno() == number
        sim_context.set_fd_handler(number, lambda: seen.append("wrong"))
        events[me].clear()

    for n, event in enumerate(events):
        event.set()
        sim_context.set_fd_handler(event.fileno(), lambda n=n: ready(n))  # type: ignore[misc]
    drain(sim_context)
    assert seen == ["ready"]


def test_ready_handler_is_dispatched_once(context: AioContext, host: Host) -> None:
    """T28: what a nested poll has dispatched the outer one does not dispatch again."""
    notifiers: list[Notifier] = []

    class Nests(Notifier):
        def ready(self) -> None:
            super().ready()
            drain(context)

    notifiers += [Nests(context, host) for _ in range(4)]
    for notifier in notifiers:
        notifier.event.set()
    until(context, lambda: all(notifier.count for notifier in notifiers))
    drain(context)
    assert [notifier.count for notifier in notifiers] == [1] * 4  # ready() fails when its event is not set
    for notifier in notifiers:
        notifier.close()


def test_nested_aio_poll(sim: SimHost) -> None:
    """/nested-aio-poll, T20: a poll_ready callback polls and is not entered again by that. T24: where QEMU's
    non-blocking poll sees nothing while all handlers can be polled, ours looks."""
    sim.odds.part_of_ready = 0
    context = AioContext(sim)
    context.poll_max_ns = 1_000_000
    sim.tick_ns = 100
    inner, outer = sim.event(), sim.event()
    seen: list[str] = []
    nested = False

    def poll_ready() -> None:
        nonlocal nested
        assert not nested
        nested = True
        inner.set()
        assert context.poll(True) is True
        nested = False
        seen.append("poll_ready")

    context.set_fd_handler(
        outer.fileno(), lambda: (seen.append("read"), outer.clear()), None, lambda: True, poll_ready
    )
    context.set_fd_handler(inner.fileno(), lambda: (seen.append("inner"), inner.clear()))
    outer.set()
    assert context.poll(False) is True and seen == ["read"]
    context._poll_ns = 100_000  # busy polling is on
    for _ in range(3):
        seen.clear()
        assert context.poll(True) is True
        assert seen == ["inner", "poll_ready"]
    context.set_fd_handler(outer.fileno())
    context.set_fd_handler(inner.fileno())
    context.close()


def test_polled_handler_removed_meanwhile(sim_context: AioContext, sim: SimHost) -> None:
    """Busy polling finds a handler; a bottom half of the same poll removes or replaces it."""
    seen: list[str] = []
    sim_context.poll_max_ns = sim_context._poll_ns = 10_000
    sim.tick_ns = 10

    def change(fd: int, replacement: Callable[[], object] | None) -> bool:
        def change() -> None:
            sim_context.set_fd_handler(fd)
            if replacement is not None:
                sim_context.set_fd_handler(fd, None, None, lambda: False, replacement)

        sim_context.schedule_oneshot(change)
        return True

    fd = sim.event().fileno()
    for replacement in (None, lambda: seen.append("new")):
        poll = partial(change, fd, replacement)
        sim_context.set_fd_handler(fd, None, None, poll, lambda: seen.append("old"))
        assert sim_context.poll(True) is True  # the bottom half
        assert seen == []
        sim_context.set_fd_handler(fd)


def test_polled_handler_outlives_an_exception(sim_context: AioContext, sim: SimHost) -> None:
    """A bottom half raises in the poll that has found it: it is served by the next, which does not sleep."""
    seen: list[str] = []
    sim_context.poll_max_ns = sim_context._poll_ns = 10_000
    sim.tick_ns = 10

    def poll() -> bool:
        sim_context.schedule_oneshot(lambda: 1 // 0)
        return True

    event = sim.event()
    sim_context.set_fd_handler(event.fileno(), None, None, poll, lambda: seen.append("served"))
    with pytest.raises(ZeroDivisionError):
        sim_context.poll(True)
    assert sim_context.timeout_ns() == 0
    sim_context.poll(False)
    assert seen == ["served"]
    sim_context.set_fd_handler(event.fileno())


def test_no_busy_polling_without_leave(context: AioContext, host: Host) -> None:
    """T32: with poll_max_ns 0 a poll callback is never asked."""
    event = host.event()
    asked: list[int] = []
    context.set_fd_handler(event.fileno(), event.clear, None, lambda: bool(asked.append(1)), lambda: None)
    for _ in range(3):
        event.set()
        assert context.poll(True) is True
    assert asked == []
    context.set_fd_handler(event.fileno())
    event.close()


def test_poll_needs_poll_ready(context: AioContext, host: Host) -> None:
    event = host.event()
    with pytest.raises(AioError, match="poll_ready"):
        context.set_fd_handler(event.fileno(), None, None, lambda: True)
    event.close()


def test_busy_polling_adapts(sim: SimHost) -> None:
    """With a limit of 32768: 4000, 8000, 16000, 32000, 32768; one wait longer than that, and 0."""
    context = AioContext(sim)
    context.poll_max_ns = 32_768
    sim.tick_ns = 50
    notifier = Notifier(context, sim)
    steps = []
    for delay_ns in (3_000, 5_000, 9_000, 17_000, 32_200, 31_000, 100_000):
        sim.at(delay_ns, notifier.event.set)
        before = notifier.count
        until(context, lambda: notifier.count > before)  # noqa: B023
        steps.append(context._poll_ns)
    assert steps == [4000, 8000, 16000, 32000, 32768, 32768, 0]
    context.poll_shrink = 2
    context._poll_ns = 8000
    sim.at(100_000, notifier.event.set)
    until(context, lambda: notifier.count == 8)
    assert context._poll_ns == 4000
    context.close()


def test_less_busy_polling_at_once(sim: SimHost) -> None:
    """A smaller limit counts although the context has learnt a larger one."""
    context = AioContext(sim)
    context._poll_ns, context.poll_max_ns = 1_000_000, 10_000
    sim.tick_ns = 100
    begin_ns = context.now_ns()
    assert context._poll_busily(begin_ns, -1) is None
    assert context.now_ns() - begin_ns < 20_000
    context.close()


def test_busy_polling_ends_for_a_notification(sim: SimHost) -> None:
    """Who schedules while the loop polls busily writes no event; the loop looks at ``notified``."""
    context = AioContext(sim)
    context.poll_max_ns = context._poll_ns = 1_000_000
    sim.tick_ns = 100
    ran: list[int] = []

    def schedule() -> None:
        with sim.as_thread(2):
            context.schedule_oneshot(lambda: ran.append(sim.monotonic_ns()))
        assert not context._event._is_set  # type: ignore[attr-defined]

    begin_ns = sim.monotonic_ns()
    sim.at(50_000, schedule)
    until(context, lambda: ran)
    assert ran[0] - begin_ns < 100_000
    context.close()


@pytest.mark.parametrize("what", ["handler", "timer", "bottom half", "coroutine"])
def test_changes_wake_a_sleeping_loop(sim: SimHost, what: str) -> None:
    """T13: another thread changes what the loop waits for while it sleeps without end."""
    context = AioContext(sim)
    event = sim.event()
    event.set()
    ran: list[str] = []

    async def body() -> None:
        ran.append("ran")

    def change() -> None:
        with sim.as_thread(2):
            if what == "handler":
                context.set_fd_handler(event.fileno(), lambda: (event.clear(), ran.append("ran")))
            elif what == "timer":
                context.timer(lambda: ran.append("ran")).arm_ns(sim.monotonic_ns() + 1000)
            elif what == "coroutine":
                context.enter(body())
            else:
                context.schedule_oneshot(lambda: ran.append("ran"))

    sim.at(5_000, change)
    until(context, lambda: ran)
    context.set_fd_handler(event.fileno())
    context.close()


def test_blocking_poll_that_nothing_ends(sim: SimHost) -> None:
    """What hangs a real program is an error in the simulated one."""
    context = AioContext(sim)
    with pytest.raises(Deadlock):
        context.poll(True)
    context.close()


def test_early_waits_are_harmless() -> None:
    """T33: EINTR ends a wait without error, and loops test their conditions."""
    sim = SimHost(3, odds=Odds(empty_wait=0.5))
    context = AioContext(sim)
    ran: list[int] = []
    context.timer(lambda: ran.append(1)).arm_ns(context.now_ns() + 10_000_000)
    until(context, lambda: ran)
    context.close()


def test_signals_during_a_blocking_poll() -> None:
    """T33: the handler's bottom half runs, the poll does not fail."""
    context = AioContext(LinuxHost())
    ran: list[int] = []
    half = context.bottom_half(lambda: ran.append(1))
    before = signal.signal(signal.SIGUSR1, lambda *_: half.schedule())
    try:
        for n in range(1, 6):
            sender = threading.Timer(0.002, os.kill, (os.getpid(), signal.SIGUSR1))
            sender.start()
            until(context, lambda n=n: len(ran) >= n)  # type: ignore[misc]
            sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    context.close()


@pytest.mark.parametrize("handled", [False, True])
def test_exceptions_in_handlers(context: AioContext, host: Host, handled: bool) -> None:
    """Other handlers, timers and bottom halves get their turn, once per cause."""
    told: list[str] = []
    if handled:
        context.exception_handler = lambda _context, _error, where: told.append(where)
    seen: list[str] = []

    class Fails(Notifier):
        def ready(self) -> None:
            super().ready()
            raise ValueError("handler")

    notifiers = [Fails(context, host), Notifier(context, host), Fails(context, host)]
    for notifier in notifiers:
        notifier.event.set()
    context.timer(lambda: seen.append("timer")).arm_ns(0)
    context.schedule_oneshot(lambda: seen.append("half"))
    raised = 0
    while not (len(seen) == 2 and all(notifier.count for notifier in notifiers)):
        try:
            context.poll(True)
        except ValueError:
            raised += 1
    drain(context)
    assert [notifier.count for notifier in notifiers] == [1] * 3 and sorted(seen) == ["half", "timer"]
    assert raised == (0 if handled else 2)
    assert all("handler of descriptor" in where for where in told) and len(told) == (2 if handled else 0)
    for notifier in notifiers:
        notifier.close()


@pytest.mark.parametrize("guilty", ["poll", "poll_ready"])
def test_exceptions_in_poll_callbacks(sim: SimHost, guilty: str) -> None:
    context = AioContext(sim)
    context.poll_max_ns = context._poll_ns = 10_000
    sim.tick_ns = 100
    told: list[str] = []
    calls: list[str] = []

    def called(name: str) -> bool:
        calls.append(name)
        if name == guilty:
            raise ValueError(name)
        return True

    event = sim.event()
    context.set_fd_handler(event.fileno(), None, None, lambda: called("poll"), lambda: called("poll_ready"))
    with pytest.raises(ValueError, match=guilty):
        context.poll(True)
    context.exception_handler = lambda _context, _error, where: told.append(where)
    calls.clear()
    assert context.poll(True) is True
    assert calls == ["poll", "poll_ready"] and told == [f"poll handler of descriptor {event.fileno()}"]
    context.set_fd_handler(event.fileno())
    context.close()


def test_only_at_home(sim: SimHost) -> None:
    """T12: a poll by another thread would eat the notifications of the owner."""
    context = AioContext(sim)
    assert context.is_home
    with sim.as_thread(2):
        assert not context.is_home
        for blocking in (False, True):
            with pytest.raises(WrongContext):
                context.poll(blocking)
    context.notify()
    assert context.notified
    context.close()


def test_poll_in_a_deferred_section(context: AioContext) -> None:
    """What the section holds back is done first, and callbacks run outside of it."""
    done: list[str] = []
    from bottomhalf.aio import defer_call

    with deferred():
        defer_call(done.append, "held back")
        context.schedule_oneshot(lambda: defer_call(done.append, "at once"))
        context.poll(True)
        assert done == ["held back", "at once"]
        defer_call(done.append, "later")
        assert len(done) == 2
    assert done[2:] == ["later"]


def test_a_failed_registration_changes_nothing(context: AioContext, host: Host, tmp_path) -> None:
    path = str(tmp_path / "file")
    if isinstance(host, SimHost):
        host.add_file(path, 10)
    else:
        open(path, "wb").close()
    file = host.open_file(path)
    with pytest.raises(PermissionError):
        context.set_fd_handler(file.fileno(), lambda: None)
    context.set_fd_handler(file.fileno())  # nothing to remove
    assert context.poll(False) is False
    file.close()


def test_close_twice_and_repr(host: Host) -> None:
    context = AioContext(host, "io7")
    assert "io7" in repr(context)
    event = host.event()
    context.set_fd_handler(event.fileno(), event.clear)
    context.close()
    context.close()
    event.close()


def test_clocks(sim: SimHost) -> None:
    context = AioContext(sim)
    assert context.now_ns() == context.now_ns("realtime") == sim.monotonic_ns()
    assert context.now_ns("host") == sim.realtime_ns()
    with pytest.raises(AioError, match="no clock 'sundial'"):
        context.now_ns("sundial")
    context.close()


def test_default_host() -> None:
    context = AioContext()
    assert context.host.name == "linux" and context.name == "main"
    ran: list[int] = []
    context.bottom_half(lambda: ran.append(1), name="hello").schedule()
    assert context.poll(blocking=True) is True and ran == [1]
    context.close()
