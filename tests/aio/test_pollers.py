# SPDX-License-Identifier: Apache-2.0
"""A context over every kind of poller: it must not be able to tell them apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bottomhalf.aio import AioContext, IOThread, MainLoop
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import Notifier, drain, until

KINDS = ("epoll", "poll", "io_uring")
MS = 1_000_000


class LinuxWith(LinuxHost):
    """This machine, where "auto" is the kind under test."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def poller(self, kind: str = "auto") -> Any:
        return super().poller(self.kind if kind == "auto" else kind)


class SimWith(SimHost):
    """The simulated machine, the same."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__(seed)
        self.kind = kind

    def poller(self, kind: str = "auto") -> Any:
        return super().poller(self.kind if kind == "auto" else kind)


@pytest.fixture(params=[*KINDS, "sim"])
def machine(request: pytest.FixtureRequest) -> Host:
    """Not called ``host``, of which the package's conftest makes others."""
    return SimWith("io_uring", 3) if request.param == "sim" else LinuxWith(request.param)


@pytest.fixture
def context(machine: Host) -> Iterator[AioContext]:
    made = AioContext(machine)
    yield made
    made.close()


@pytest.fixture
def notifiers(context: AioContext, machine: Host) -> Iterator[list[Notifier]]:
    made = [Notifier(context, machine) for _ in range(100)]
    yield made
    for one in made:
        one.close()


def test_it_is_the_kind(machine: Host, context: AioContext) -> None:
    assert context._poller.name == machine.kind  # type: ignore[attr-defined]


def test_a_hundred(context: AioContext, notifiers: list[Notifier]) -> None:
    for chosen in (notifiers[:1], notifiers, notifiers[::3]):
        before = [one.count for one in notifiers]
        for one in chosen:
            one.event.set()
        until(context, lambda before=before, chosen=chosen: (  # type: ignore[misc]
            sum(one.count for one in notifiers) == sum(before) + len(chosen)
        ))
        drain(context)
        assert [one.count - count for one, count in zip(notifiers, before, strict=True)] == [
            int(one in chosen) for one in notifiers
        ]


def test_removing_itself(context: AioContext, notifiers: list[Notifier]) -> None:
    seen: list[int] = []

    def once(n: int) -> None:
        seen.append(n)
        context.set_fd_handler(notifiers[n].event.fileno())

    for n, one in enumerate(notifiers):
        context.set_fd_handler(one.event.fileno(), lambda n=n: once(n))  # type: ignore[misc]
        one.event.set()
    until(context, lambda: len(seen) == len(notifiers))
    drain(context)
    assert sorted(seen) == list(range(len(notifiers)))
    assert not context.poll(False)


def test_removing_the_others(context: AioContext, notifiers: list[Notifier]) -> None:
    """Whoever comes first, no other one is called, though all are ready and on the list."""
    seen: list[int] = []

    def only(n: int) -> None:
        seen.append(n)
        for other, one in enumerate(notifiers):
            if other != n:
                context.set_fd_handler(one.event.fileno())
        notifiers[n].event.clear()

    for n, one in enumerate(notifiers):
        context.set_fd_handler(one.event.fileno(), lambda n=n: only(n))  # type: ignore[misc]
        one.event.set()
    until(context, lambda: seen)
    drain(context)
    assert len(seen) == 1


def test_replaced_while_ready(context: AioContext, machine: Host) -> None:
    """T31: closed and opened again in its own handler; the new one's handler is called when it is ready only."""
    seen: list[str] = []
    events = [machine.event()]

    def old() -> None:
        seen.append("old")
        context.set_fd_handler(events[0].fileno())
        events[0].close()
        events.append(machine.event())
        context.set_fd_handler(events[1].fileno(), new)

    def new() -> None:
        assert events[1].clear()
        seen.append("new")

    context.set_fd_handler(events[0].fileno(), old)
    events[0].set()
    until(context, lambda: seen)
    drain(context)
    assert seen == ["old"]
    events[1].set()
    until(context, lambda: len(seen) == 2)
    drain(context)
    assert seen == ["old", "new"]
    context.set_fd_handler(events[1].fileno())
    events[1].close()


def test_not_read_comes_again(context: AioContext, machine: Host) -> None:
    """Level-triggered: a handler that leaves something is called again, in nested polls too."""
    event, count = machine.event(), 0

    def look() -> None:
        nonlocal count
        count += 1
        if count in (2, 4):
            context.poll(False)
        if count >= 6:
            event.clear()

    context.set_fd_handler(event.fileno(), look)
    event.set()
    until(context, lambda: count >= 6)
    drain(context)
    assert count == 6
    context.set_fd_handler(event.fileno())
    event.close()


@pytest.mark.parametrize("delay_ns", [1, 1_000, MS + 1, 3 * MS - 1, 21 * MS + 1])
def test_timers_are_never_early(context: AioContext, notifiers: list[Notifier], delay_ns: int) -> None:
    due: list[int] = []
    timer = context.timer(lambda: due.append(context.now_ns()))
    deadline_ns = context.now_ns() + delay_ns
    timer.arm_ns(deadline_ns)
    until(context, lambda: due)
    assert due[0] >= deadline_ns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poll_max_ns", [0, 32_768])
def test_notified_from_another_thread(kind: str, poll_max_ns: int) -> None:
    """Bottom halves, and handlers set and removed from here, reach a loop that sleeps or looks busily."""
    host = LinuxWith(kind)
    thread = IOThread("io0", host, poll_max_ns)
    context = thread.context
    assert context._poller.name == kind  # type: ignore[attr-defined]
    for turn in range(100):
        ran = threading.Event()
        context.schedule_oneshot(ran.set)
        assert ran.wait(60)
        event, called = host.event(), threading.Event()

        def read(event: Any = event, called: threading.Event = called) -> None:
            event.clear()
            called.set()

        if turn % 2:
            event.set()
        context.set_fd_handler(event.fileno(), read)
        event.set()
        assert called.wait(60)
        context.set_fd_handler(event.fileno())
        gone = threading.Event()
        context.schedule_oneshot(gone.set)
        assert gone.wait(60)
        event.close()
    thread.stop()


def test_in_a_main_loop(machine: Host) -> None:
    """The I/O handler context is one descriptor of the main context: it must become readable by an event that nobody
    has waited for, and by a notification, and fall silent."""
    loop = MainLoop(machine)
    seen: list[int] = []
    events = [machine.event() for _ in range(3)]
    for n, event in enumerate(events):

        def read(n: int = n, event: Any = event) -> None:
            assert event.clear()
            seen.append(n)
            if len(seen) == 30:
                loop.quit()
            else:
                events[(n + 1) % 3].set()

        loop.iohandler.set_fd_handler(event.fileno(), read)
    events[0].set()
    loop.run()
    assert seen == [n % 3 for n in range(30)]
    for event in events:
        loop.iohandler.set_fd_handler(event.fileno())
        event.close()
    loop.close()
