# SPDX-License-Identifier: Apache-2.0
"""Threads with a loop of their own: start, stop, work from elsewhere, failures."""

from __future__ import annotations

from functools import partial

import pytest

from bottomhalf.aio import AioContext, IOThread, WrongContext, sleep_ns
from bottomhalf.host.linux import LinuxHost
from tests.aio.helpers import until


def test_stop_runs_what_was_scheduled() -> None:
    """What was scheduled before the stop runs, and what that schedules."""
    for _ in range(50):
        thread = IOThread("io0", LinuxHost(), poll_max_ns=0)
        ran: list[str] = []

        async def body(ran: list[str] = ran) -> None:
            ran.append("coroutine")

        def first(thread: IOThread = thread, ran: list[str] = ran) -> None:
            ran.append("first")
            thread.context.schedule_oneshot(partial(ran.append, "second"))

        thread.context.schedule_oneshot(first)
        thread.context.schedule(body())
        thread.stop()
        assert sorted(ran) == ["coroutine", "first", "second"]


@pytest.mark.parametrize("handled", [False, True])
def test_exceptions(handled: bool) -> None:
    """The thread goes on; without a handler stop() raises the first."""
    thread = IOThread("io0", LinuxHost())
    told: list[str] = []
    if handled:
        thread.context.exception_handler = lambda _context, error, _where: told.append(str(error))
    ran: list[int] = []

    def fail(n: int) -> None:
        raise ValueError(n)

    for n in range(2):
        thread.context.schedule_oneshot(partial(fail, n))
        thread.context.schedule_oneshot(partial(ran.append, n))
    if handled:
        thread.stop()
    else:
        with pytest.raises(ValueError, match="0"):
            thread.stop()
        thread.stop()
    assert ran == [0, 1] and told == (["0", "1"] if handled else [])


def test_cannot_stop_itself() -> None:
    thread = IOThread("io0", LinuxHost())
    thread.context.schedule_oneshot(thread.stop)
    with pytest.raises(WrongContext, match="its own end"):
        thread.stop()


def test_stop_does_not_race_with_the_end() -> None:
    """The thread may see that it has to stop before stop() has woken it: it keeps its context until then."""
    thread = IOThread("io0", LinuxHost(), poll_max_ns=0)
    with thread._stopping:  # as stop() does it, with a long pause in the middle
        thread._running = False
        thread.context.notify()
        thread._thread.join(0.05)
        assert thread._thread.is_alive()
        thread.context.wake_up()  # the descriptor is still its own
    thread._running = True
    thread.stop()
    assert not thread._thread.is_alive()


def test_fails_to_start() -> None:
    class NoPoller(LinuxHost):
        count = 0

        def poller(self, kind: str = "auto"):  # type: ignore[no-untyped-def]
            self.count += 1
            if self.count > 1:
                raise OSError("too many open files")
            return super().poller()

    with pytest.raises(OSError, match="too many"):
        IOThread("io0", NoPoller())


@pytest.mark.parametrize("poll_max_ns", [0, 32_768])
def test_work_from_elsewhere(poll_max_ns: int) -> None:
    """Bottom halves, timers, coroutines and handlers reach a thread that sleeps or polls busily."""
    host = LinuxHost()
    main = AioContext(host)
    thread = IOThread("io0", host, poll_max_ns)
    context = thread.context
    seen: list[str] = []

    def note(what: str) -> None:
        assert context.is_home
        seen.append(what)
        main.notify()

    async def body() -> None:
        await sleep_ns(10_000)
        note("coroutine")

    event = host.event()
    rounds = 50
    for _ in range(rounds):
        seen.clear()
        event.set()
        context.set_fd_handler(event.fileno(), lambda: (event.clear(), note("handler")))
        context.timer(partial(note, "timer")).arm_ns(host.monotonic_ns() + 10_000)
        context.schedule_oneshot(partial(note, "half"))
        context.enter(body())
        until(main, lambda: len(seen) == 4)
        assert sorted(seen) == ["coroutine", "half", "handler", "timer"]
    context.set_fd_handler(event.fileno())
    event.close()
    thread.stop()
    main.close()
