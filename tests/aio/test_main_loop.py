# SPDX-License-Identifier: Apache-2.0
"""The main thread's two contexts: who is served in a nested poll and who is not."""

from __future__ import annotations

import pytest

from bottomhalf.aio import MainLoop, wait_while
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import Deadlock, SimHost
from tests.aio.helpers import Notifier


def run_until(loop: MainLoop, condition) -> None:  # type: ignore[no-untyped-def]
    for _ in range(10_000):
        if condition():
            return
        loop.run_once()
    raise AssertionError("never")


def test_serves_both(host: Host) -> None:
    loop = MainLoop(host)
    seen: list[str] = []
    notifiers = []
    for context in (loop.main, loop.iohandler):
        name = context.name
        context.schedule_oneshot(lambda name=name: seen.append(f"half of {name}"))  # type: ignore[misc]
        context.timer(lambda name=name: seen.append(f"timer of {name}")).arm_ns(context.now_ns() + 100_000)
        notifiers.append(Notifier(context, host))
        notifiers[-1].event.set()
    run_until(loop, lambda: len(seen) == 4 and all(notifier.count == 1 for notifier in notifiers))
    assert sorted(seen) == [f"{what} of {name}" for what in ("half", "timer") for name in ("iohandler", "main")]
    for notifier in notifiers:
        notifier.close()
    loop.close()


def test_nested_poll_serves_one(host: Host) -> None:
    """While a command waits for a disk, the disk goes on and no other command begins."""
    loop = MainLoop(host)
    seen: list[str] = []
    monitor = Notifier(loop.iohandler, host)

    def command() -> None:
        monitor.event.set()
        loop.iohandler.schedule_oneshot(lambda: seen.append("another command"))
        loop.main.timer(lambda: seen.append("disk")).arm_ns(loop.main.now_ns() + 100_000)
        wait_while(loop.main, lambda: "disk" not in seen, what="the disk")
        assert seen == ["disk"] and monitor.count == 0
        seen.append("done")

    loop.iohandler.schedule_oneshot(command)
    run_until(loop, lambda: len(seen) == 3 and monitor.count)
    assert seen == ["disk", "done", "another command"]
    monitor.close()
    loop.close()


def test_wait_for_the_outer_loop_hangs(sim: SimHost) -> None:
    """T41, T110: what only the I/O handler context can bring never comes in a nested poll; the simulated host says
    so instead of hanging."""
    loop = MainLoop(sim)
    event = sim.event()
    event.set()
    loop.iohandler.set_fd_handler(event.fileno(), event.clear)
    with pytest.raises(Deadlock):
        wait_while(loop.main, lambda: True, what="a line from the monitor")
    loop.iohandler.set_fd_handler(event.fileno())
    loop.close()


@pytest.mark.parametrize("guilty", ["main", "iohandler"])
def test_goes_on_after_exceptions(host: Host, guilty: str) -> None:
    loop = MainLoop(host)
    served: list[int] = []
    notifier = Notifier(loop.iohandler, host)
    for n in range(3):
        getattr(loop, guilty).schedule_oneshot(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run_until(loop, lambda: False)
        notifier.event.set()
        run_until(loop, lambda: notifier.count > n)  # noqa: B023
        loop.iohandler.schedule_oneshot(lambda: served.append(1))
        run_until(loop, lambda: len(served) > n)  # noqa: B023
    notifier.close()
    loop.close()


def test_quit(sim: SimHost) -> None:
    """From a callback, and from another thread while it sleeps."""
    loop = MainLoop(sim)
    loop.main.schedule_oneshot(loop.quit)
    loop.run()
    loop.close()
    loop = MainLoop(sim)

    def elsewhere() -> None:
        with sim.as_thread(2):
            loop.quit()

    sim.at(1000, elsewhere)
    loop.run()
    loop.close()


def test_work_from_another_thread(sim: SimHost) -> None:
    """Both contexts sleep in one wait; work for either ends it."""
    loop = MainLoop(sim)
    seen: list[str] = []

    def elsewhere() -> None:
        with sim.as_thread(2):
            loop.iohandler.schedule_oneshot(lambda: seen.append("iohandler"))
            loop.main.schedule_oneshot(lambda: seen.append("main"))

    for n in range(3):
        sim.at(1000, elsewhere)
        run_until(loop, lambda: len(seen) == 2 * n + 2)  # noqa: B023
    assert sorted(seen) == ["iohandler"] * 3 + ["main"] * 3
    loop.close()


def test_idle_does_not_spin(sim: SimHost) -> None:
    """T7 again: an idle bottom half of the I/O handler context runs every 10 ms there too."""
    loop = MainLoop(sim)
    runs: list[int] = []

    def run() -> None:
        runs.append(1)
        half.schedule_idle()

    half = loop.iohandler.bottom_half(run)
    half.schedule_idle()
    end_ns = loop.main.now_ns() + 100_000_000
    turns = 0
    while loop.main.now_ns() < end_ns:
        loop.run_once()
        turns += 1
    assert 9 <= len(runs) <= 11 and turns < 50
    half.delete()
    loop.close()
