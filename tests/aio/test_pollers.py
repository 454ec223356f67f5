# SPDX-License-Identifier: Apache-2.0
"""The event core on each monitor of descriptors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from bottomhalf.aio import AioContext, IOThread, MainLoop, sleep_ns
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Poller
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import drain, until


class HostWithPoller(LinuxHost):
    """A machine on which "auto" is what the test wants."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def poller(self, kind: str = "auto") -> Poller:
        return super().poller(self.kind if kind == "auto" else kind)


@pytest.fixture(params=["epoll", "poll", "io_uring"])
def machine(request: pytest.FixtureRequest) -> HostWithPoller:
    return HostWithPoller(request.param)


@pytest.fixture
def context(machine: HostWithPoller) -> Iterator[AioContext]:
    made = AioContext(machine)
    assert made.statistics().poller == machine.kind, "T30: which one is active is never a guess"
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["epoll", "poll", "io_uring"])
def test_by_name(kind: str) -> None:
    context = AioContext(LinuxHost(), poller=kind)
    assert context.statistics().poller == kind
    context.close()
    simulated = SimHost(0)
    simulated.poller_kinds.discard(kind)
    with pytest.raises(OSError):
        AioContext(simulated, poller=kind)


def test_removed_by_itself_and_by_others(context: AioContext, machine: HostWithPoller) -> None:
    """T27: while all are ready; each runs as long as it is there, and not after."""
    events = [machine.event() for _ in range(10)]
    ran: list[int] = []

    def run(n: int) -> None:
        ran.append(n)
        context.set_fd_handler(events[n].fileno())
        context.set_fd_handler(events[(n + 5) % 10].fileno())

    for n, event in enumerate(events):
        context.set_fd_handler(event.fileno(), lambda n=n: run(n))
        event.set()
    drain(context)
    assert len(ran) == 5 and {n % 5 for n in ran} == set(range(5))
    for event in events:
        event.close()


def test_more_than_64_descriptors(context: AioContext, machine: HostWithPoller) -> None:
    """T30: where QEMU would change its monitor, all are still served."""
    events = [machine.event() for _ in range(100)]
    served: set[int] = set()
    for n, event in enumerate(events):
        context.set_fd_handler(event.fileno(), lambda n=n: (served.add(n), events[n].clear()))
    for event in events[::-1]:
        event.set()
    until(context, lambda: len(served) == 100)
    for event in events:
        context.set_fd_handler(event.fileno())
        event.close()


def test_notified_from_another_thread(context: AioContext) -> None:
    ran: list[int] = []
    half = context.bottom_half(lambda: ran.append(1))
    for n in range(20):
        thread = threading.Thread(target=half.schedule)
        thread.start()
        until(context, lambda: len(ran) > n)  # noqa: B023
        thread.join()


def test_timers(context: AioContext) -> None:
    """T34: never early, to the nanosecond."""
    for duration_ns in (1, 10_000, 1_000_001):
        begin = context.now_ns()
        context.run(sleep_ns(duration_ns))
        assert context.now_ns() - begin >= duration_ns


def test_handlers_set_by_another_thread(context: AioContext, machine: HostWithPoller) -> None:
    """T13: while the context sleeps."""
    event = machine.event()
    event.set()
    served: list[int] = []

    def elsewhere() -> None:
        context.set_fd_handler(event.fileno(), lambda: (served.append(1), event.clear()))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    until(context, lambda: served)
    thread.join()
    context.set_fd_handler(event.fileno())
    event.close()


def test_main_loop_and_iothread(machine: HostWithPoller) -> None:
    """One context sleeps in another's wait; one in a thread of its own."""
    loop = MainLoop(machine)
    thread = IOThread("io0", machine)
    order: list[str] = []

    def second() -> None:
        order.append("iohandler")
        loop.quit()

    def first() -> None:
        order.append("io0")
        loop.iohandler.schedule_oneshot(second)

    thread.context.schedule_oneshot(first)
    loop.run()
    assert order == ["io0", "iohandler"]
    thread.stop()
    loop.close()
