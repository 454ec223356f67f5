# SPDX-License-Identifier: Apache-2.0
"""Traps that belong to no other file: hand-shakes with a loop in another thread, and objects that are used again."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest

from bottomhalf.aio import AioContext, AioError, Coroutine, IOThread, current, give_way, run_in, suspend
from bottomhalf.aio.coroutine import ENDED_MAX
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import drain, until

HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()


@pytest.mark.parametrize("what", ["bottom half", "timer"])
def test_cancel_from_another_thread_does_not_wait(host: Host, what: str) -> None:
    """T9, T43: the callback may be running. Who needs to know that it is not sends a bottom half after it."""
    main = AioContext(host)
    thread = IOThread("io0", host)
    gate = host.lock()
    gate.acquire()
    begun, ended = host.event(), False

    def callback() -> None:
        nonlocal ended
        begun.set()
        with gate:
            ended = True

    half, timer = thread.context.bottom_half(callback), thread.context.timer(callback)
    if what == "timer":
        timer.arm_ns(0)
    else:
        half.schedule()
    seen: list[int] = []
    main.set_fd_handler(begun.fileno(), lambda: (begun.clear(), seen.append(1)))
    until(main, lambda: seen)
    (timer if what == "timer" else half).cancel()
    assert not ended, "it is in the midst of it"
    gate.release()
    run_in(thread.context, lambda: None, "the hand-shake")
    assert ended and not timer.armed
    main.set_fd_handler(begun.fileno())
    thread.stop()
    begun.close()
    main.close()


def test_the_coroutine_drops_its_context(sim: SimHost) -> None:
    """T55: the last reference to a context is dropped by a coroutine that it runs: it lives until the poll ends."""
    holder = [AioContext(sim)]
    alive = weakref.ref(holder[0])
    ran: list[str] = []

    async def body() -> None:
        await give_way()
        holder.clear()
        gc.collect()
        assert alive() is not None
        ran.append("ended")

    def poll() -> None:
        context = alive()
        assert context is not None
        context.enter(body())
        del context
        while not ran:
            (alive() or pytest.fail("gone too early")).poll(False)

    poll()
    assert ran == ["ended"]


@pytest.mark.skipif(not HAS_GIL, reason="without the global lock coroutines are not used again")
def test_coroutines_are_used_again(context: AioContext) -> None:
    """T56, /basic/no-dangling-access: an ended coroutine that nobody holds serves the next; one that somebody holds, in
    a variable, a list, a lock or as a waiter, stays what it was."""

    async def body(n: int) -> None:
        await give_way()

    context.enter(body(0))
    context.poll(False)
    context.poll(False)
    kept = context.statistics().coroutines_kept
    assert kept >= 1
    held = context.enter(body(1))
    listed = [context.enter(body(2))]
    dropped_id = id(context.enter(body(3)))
    drain(context)
    assert held.done and listed[0].done and "ended" in repr(held)
    later = [context.enter(body(4)) for _ in range(10)]
    assert held not in later and listed[0] not in later
    assert dropped_id in [id(coroutine) for coroutine in later]
    drain(context)
    assert held.result() is None
    with pytest.raises(AioError, match="has ended"):
        context.enter(held)


def test_a_dead_caller_is_not_touched(context: AioContext) -> None:
    """/basic/no-dangling-access: c1 enters c2, c2 waits, c1 ends and is used again; then c2 goes on."""
    inner: list[Coroutine] = []

    async def second() -> str:
        await suspend("the test")
        return "went on"

    async def first() -> None:
        inner.append(context.enter(second()))

    context.enter(first())
    others = [context.enter(give_way_once()) for _ in range(5)]
    context.wake(inner[0])
    assert inner[0].result() == "went on"
    drain(context)
    assert all(other.done for other in others)


async def give_way_once() -> None:
    await give_way()


def test_results_and_failures_survive_reuse(context: AioContext) -> None:
    """What a coroutine returned or raised is its own, whatever runs afterwards."""

    async def answer(n: int) -> int:
        await give_way()
        if n % 3 == 0:
            raise ValueError(n)
        return n

    async def collect() -> None:
        coroutines = [context.enter(answer(n)) for n in range(30)]
        for _ in range(3):
            await give_way()
        for n, coroutine in enumerate(coroutines):
            if n % 3 == 0:
                with pytest.raises(ValueError, match=str(n)):
                    await coroutine
            else:
                assert await coroutine == n

    told: list[str] = []
    context.exception_handler = lambda _, error, where: told.append(str(error))
    context.run(collect())
    context.exception_handler = None


def test_what_is_kept_is_bounded(context: AioContext) -> None:
    for _ in range(3):
        for _ in range(ENDED_MAX + 500):
            context.enter(give_way_once())
        drain(context)
        assert context.statistics().coroutines_kept <= ENDED_MAX
        assert len(context.ended_coroutines) <= ENDED_MAX


def test_a_cancelled_one_is_not_used_again(context: AioContext) -> None:
    """Its request, which found no wait to end, must not be the next one's."""

    async def body() -> None:
        current().cancel()
        await give_way()

    for _ in range(3):
        context.enter(body())
        drain(context)

    async def innocent() -> str:
        await context.enter(give_way_once())
        return "ran to its end"

    entered = [context.enter(innocent()) for _ in range(5)]
    drain(context)
    assert [coroutine.result() for coroutine in entered] == ["ran to its end"] * 5


def test_hammered_from_eight_threads() -> None:
    """Everything that may be called from any thread, from eight at once: bottom halves, one-shots, timers, notify,
    coroutines, handlers; nothing is lost, nothing runs elsewhere. (Under PYTHON_GIL=0 as well, where there is one.)"""
    host = LinuxHost()
    context = AioContext(host)
    rounds, threads_count = 400, 8
    home = threading.get_ident()
    counts = {"half": 0, "oneshot": 0, "timer": 0, "coroutine": 0, "moved": 0, "handler": 0}
    missed = [0] * threads_count
    failures: list[BaseException] = []

    def count(what: str) -> None:
        assert threading.get_ident() == home
        counts[what] += 1

    async def body(what: str) -> None:
        count(what)

    async def woken(n: int, box: list[Coroutine]) -> None:
        box.append(current())
        for _ in range(rounds // 10):
            await suspend("a hammer")
            assert threading.get_ident() == home
        count("moved")

    boxes: list[list[Coroutine]] = [[] for _ in range(threads_count)]
    for n in range(threads_count):
        context.enter(woken(n, boxes[n]))

    def hammer(n: int) -> None:
        try:
            ran = [0]

            def run() -> None:
                ran[0] += 1
                count("half")

            half = context.bottom_half(run)
            event = host.event()
            for turn in range(rounds):
                half.schedule()
                half.schedule()
                context.schedule_oneshot(lambda: count("oneshot"))
                context.timer(lambda: count("timer")).arm_ns(turn % 3)
                context.schedule(body("coroutine"))
                if turn % 10 == 0:
                    coroutine = boxes[n][0]
                    while coroutine.queued is not None and not coroutine.done:
                        pass
                    context.wake(coroutine)
                    event.set()
                    context.set_fd_handler(event.fileno(), lambda: (event.clear(), count("handler")))
                    half.cancel()
                    half.schedule()
                context.notify()
            seen = ran[0]
            half.schedule()
            while ran[0] == seen:
                pass
            missed[n] = 1
        except BaseException as error:
            failures.append(error)
        finally:
            context.notify()  # the condition below has changed

    threads = [threading.Thread(target=hammer, args=(n,)) for n in range(threads_count)]
    for thread in threads:
        thread.start()
    expected = rounds * threads_count
    until(
        context,
        lambda: failures
        or (sum(missed) == threads_count and counts["timer"] == counts["oneshot"] == counts["coroutine"] == expected),
    )
    for thread in threads:
        thread.join()
    assert not failures, failures
    until(context, lambda: counts["moved"] == threads_count)
    assert threads_count <= counts["half"] <= expected * 3 and counts["handler"] >= 1
    for fd in tuple(context._handlers._by_fd):
        context.set_fd_handler(fd)
    drain(context)
    context.close()
