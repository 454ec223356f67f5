# SPDX-License-Identifier: Apache-2.0
"""Waiting in plain code: who may, who is woken, and what is known about it."""

from __future__ import annotations

import threading

import pytest

from bottomhalf.aio import AioContext, IOThread, WrongContext, kick, sleep_ns, wait_while, waits
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import Deadlock, SimHost


def test_waits_while(context: AioContext) -> None:
    left = 3

    def step() -> None:
        nonlocal left
        left -= 1
        if left:
            context.schedule_oneshot(step)

    context.schedule_oneshot(step)
    assert wait_while(context, lambda: left, what="the steps") is True
    assert left == 0
    assert wait_while(context, lambda: left, what="nothing") is False
    assert waits() == ()


def test_is_registered(sim: SimHost) -> None:
    """Who waits, and for what, is known while he does."""
    context = AioContext(sim)
    seen: list[str] = []
    done: list[int] = []

    def look() -> None:
        seen.extend(str(wait) for wait in waits())
        assert waits()[-1].since_ns == begin_ns and waits()[-1].polling is context
        done.append(1)

    begin_ns = context.now_ns()
    context.timer(look).arm_ns(begin_ns + 1000)
    wait_while(context, lambda: not done, what="requests of drive0")
    assert seen == ["main waits for requests of drive0"] and waits() == ()
    context.close()


def test_nested(context: AioContext) -> None:
    """A wait inside a wait: the inner one ends first, each is known."""
    events: list[str] = []

    def inner() -> None:
        context.schedule_oneshot(lambda: events.append("inner"))
        wait_while(context, lambda: "inner" not in events, what="the inner one")
        assert [wait.what for wait in waits()] == ["the outer one"]
        events.append("outer")

    context.schedule_oneshot(inner)
    wait_while(context, lambda: "outer" not in events, what="the outer one")
    assert events == ["inner", "outer"]


def test_not_in_a_coroutine(context: AioContext) -> None:
    async def body() -> None:
        wait_while(context, lambda: True, what="itself")

    with pytest.raises(WrongContext, match=r"body would wait for itself by polling.*await instead"):
        context.enter(body())
    assert waits() == ()


def test_exception_ends_the_wait(context: AioContext) -> None:
    context.schedule_oneshot(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        wait_while(context, lambda: True, what="for ever")
    assert waits() == ()


def test_kick(sim: SimHost) -> None:
    """T90: another thread changes the condition, then kicks. Without the kick nobody looks."""
    for kicks in (True, False):
        context = AioContext(sim)
        done: list[int] = []

        def change(kicks: bool = kicks, done: list[int] = done) -> None:
            with sim.as_thread(2):
                done.append(1)
                if kicks:
                    kick()

        sim.at(1000, change)
        if kicks:
            assert wait_while(context, lambda: not done, what="the other thread") is True  # noqa: B023
        else:
            with pytest.raises(Deadlock):
                wait_while(context, lambda: not done, what="the other thread")  # noqa: B023
        context.close()


def test_kick_before_the_registration(sim: SimHost) -> None:
    """T15: the change and its kick come between the first look at the condition and the registration."""
    context = AioContext(sim)
    looks = 0

    def condition() -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            kick()
            return True
        return looks < 2

    assert wait_while(context, condition, what="x") is True and looks == 2
    context.close()


def test_kick_stress() -> None:
    """T15, with real threads: every kick is answered."""
    context = AioContext(LinuxHost())
    rounds = 2000
    asked = answered = 0
    turn = threading.Semaphore(0)

    def work() -> None:
        nonlocal answered
        for _ in range(rounds):
            turn.acquire()
            answered += 1
            kick()

    thread = threading.Thread(target=work)
    thread.start()
    while asked < rounds:
        asked += 1
        turn.release()
        wait_while(context, lambda: answered < asked, what="an answer")  # noqa: B023
    thread.join()
    assert answered == rounds and waits() == ()
    context.close()


def test_who_may_wait_for_whom(sim: SimHost) -> None:
    """T91: the main context's thread for everybody, an iothread only for itself, a stranger for nobody."""
    main = AioContext(sim, "main")
    with sim.as_thread(2):
        io = AioContext(sim, "io0", is_main=False)
    done: list[int] = []

    def change() -> None:
        with sim.as_thread(2):
            done.append(1)
            kick()

    for context in (io, None):
        done.clear()
        sim.at(1000, change)
        assert wait_while(context, lambda: not done, what="io0") is True
    with sim.as_thread(2):
        for other in (main, None):
            with pytest.raises(WrongContext):
                wait_while(other, lambda: True, what="the main thread")
        io.schedule_oneshot(lambda: done.append(1))
        done.clear()
        assert wait_while(io, lambda: not done, what="itself") is True
        io.close()
    with sim.as_thread(3), pytest.raises(WrongContext):
        wait_while(main, lambda: True, what="anything")
    main.close()


def test_iothread_must_not_wait_for_others() -> None:
    """T91 with a real iothread."""
    host = LinuxHost()
    main = AioContext(host)
    thread = IOThread("io0", host)
    caught: list[str] = []

    def work() -> None:
        for context in (main, None):
            try:
                wait_while(context, lambda: True, what="the main loop")
            except WrongContext as error:
                caught.append(str(error))
        kick()

    thread.context.schedule_oneshot(work)
    wait_while(None, lambda: len(caught) < 2, what="io0")
    assert "io0 would wait for the main loop in main" in caught[0] and "several contexts" in caught[1]
    thread.stop()
    main.close()


def test_hang_is_a_sentence(sim: SimHost) -> None:
    """A wait that nothing can end is told with its name."""
    sim.explain = lambda: "; ".join(str(wait) for wait in waits())
    context = AioContext(sim)
    with pytest.raises(Deadlock, match="main waits for the reply of the server"):
        wait_while(context, lambda: True, what="the reply of the server")
    context.close()


def test_coroutines_go_on_meanwhile(context: AioContext) -> None:
    done: list[int] = []

    async def body() -> None:
        for n in range(3):
            await sleep_ns(1000)
            done.append(n)

    context.enter(body())
    wait_while(context, lambda: len(done) < 3, what="the coroutine")
    assert done == [0, 1, 2]


def test_contexts_left_behind(host: Host) -> None:
    """Contexts that nobody has closed, in the same thread, do not take over its waits."""
    left = [AioContext(host, "left behind") for _ in range(3)]
    main = AioContext(host, "mine")
    second = AioContext(host, "iohandler", is_main=False)
    done: list[int] = []
    main.schedule_oneshot(lambda: done.append(1))
    assert wait_while(None, lambda: not done, what="a bottom half") is True
    second.close()
    main.close()
    for context in left:
        context.close()
    with pytest.raises(WrongContext, match="without a context"):
        wait_while(None, lambda: True, what="anything")
