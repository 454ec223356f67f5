# SPDX-License-Identifier: Apache-2.0
"""The main loop's own timers, which no nested poll runs, and waits for what only the loop delivers."""

from __future__ import annotations

import pytest

from bottomhalf.aio import AioContext, Coroutine, MainLoop, WrongContext, kick, run_in, sleep_ns, suspend, wait_while
from bottomhalf.aio.coroutine import Waitable
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import SimHost

SECOND_NS = 1_000_000_000


def test_order(host: Host) -> None:
    """bottom half, descriptor, the context's timer, the loop's timer."""
    loop = MainLoop(host)
    order: list[str] = []
    event = host.event()
    event.set()
    loop.timer(lambda: order.append("loop")).arm_ns(0)
    loop.main.timer(lambda: order.append("context")).arm_ns(0)
    loop.main.set_fd_handler(event.fileno(), lambda: (order.append("descriptor"), event.clear()))
    loop.main.schedule_oneshot(lambda: order.append("half"))
    while len(order) < 4:
        loop.run_once()
    if host.name == "linux":
        assert order == ["half", "descriptor", "context", "loop"]
    assert order.index("half") < order.index("loop")
    loop.main.set_fd_handler(event.fileno())
    loop.close()


def test_nested_polls_never_run_them(sim: SimHost) -> None:
    """T41: due in the midst of a wait, they run after it."""
    loop = MainLoop(sim)
    ran: list[str] = []
    over = False

    def end() -> None:
        nonlocal over
        over = True

    def command() -> None:
        loop.timer(lambda: ran.append("loop")).arm_ns(loop.main.now_ns() + SECOND_NS)
        loop.main.timer(lambda: ran.append("context")).arm_ns(loop.main.now_ns() + SECOND_NS)
        loop.main.timer(end).arm_ns(loop.main.now_ns() + 2 * SECOND_NS)
        wait_while(loop.main, lambda: not over, "the command")
        assert ran == ["context"]

    loop.iohandler.schedule_oneshot(command)
    while len(ran) < 2:
        loop.run_once()
    assert ran == ["context", "loop"] and loop.main.now_ns() >= 2 * SECOND_NS
    loop.close()


@pytest.mark.parametrize("clock", ["realtime", "host", "virtual"])
def test_the_loop_sleeps_until_they_are_due(sim: SimHost, clock: str) -> None:
    loop = MainLoop(sim)
    ran: list[int] = []
    start_ns = loop.main.now_ns(clock)
    timer = loop.timer(lambda: ran.append(loop.main.now_ns(clock)), clock, name="tick")
    timer.arm_ns(start_ns + SECOND_NS)
    turns = 0
    while not ran:
        loop.run_once()
        turns += 1
    assert ran == [start_ns + SECOND_NS] and turns < 10 and timer.name == "tick"
    loop.close()


def test_armed_from_another_thread(sim: SimHost) -> None:
    """While the loop sleeps."""
    loop = MainLoop(sim)
    ran: list[int] = []
    timer = loop.timer(lambda: ran.append(1))

    def elsewhere() -> None:
        with sim.as_thread(2):
            timer.arm_ns(0)

    sim.at(1000, elsewhere)
    while not ran:
        loop.run_once()
    loop.close()


def test_sleep(sim: SimHost) -> None:
    loop = MainLoop(sim)
    steps: list[int] = []

    async def body() -> None:
        for _ in range(3):
            await loop.sleep_ns(SECOND_NS)
            steps.append(loop.main.now_ns())

    start_ns = loop.main.now_ns()
    coroutine = loop.main.enter(body())
    assert coroutine.waiting_for == "a timer of the main loop"
    while not coroutine.done:
        loop.run_once()
    assert steps == [start_ns + n * SECOND_NS for n in (1, 2, 3)]
    endless = loop.main.enter(loop.sleep_ns(1000 * SECOND_NS))
    endless.cancel()
    assert endless.done
    loop.close()


def test_asked_for_in_a_wait(sim: SimHost) -> None:
    """T41: a coroutine that would wait for the loop's timer while plain code waits gets an error that explains."""
    loop = MainLoop(sim)
    told: list[str] = []

    async def retry() -> None:
        await loop.sleep_ns(SECOND_NS)

    def command() -> None:
        with pytest.raises(WrongContext) as failure:
            loop.main.run(retry(), "the end of the command")
        told.append(str(failure.value))
        loop.quit()

    loop.iohandler.schedule_oneshot(command)
    loop.run()
    assert told == [
        "main waits for the end of the command, and meanwhile the end of a sleep of 1000000000 ns is asked for; but "
        "that is for the main loop to deliver, which a nested poll does not serve, so it would never come. Wait for it "
        "outside, or use what the context itself delivers (its own timers, handlers and bottom halves)"
    ]
    loop.close()


def test_waited_for_afterwards(sim: SimHost) -> None:
    """The coroutine waits already; plain code that would wait for its end is told, through any chain."""
    loop = MainLoop(sim)

    async def retry() -> None:
        await loop.sleep_ns(SECOND_NS)

    async def parent() -> None:
        await inner

    inner = loop.main.enter(retry())
    outer = loop.main.enter(parent())
    for on in (inner, outer):
        with pytest.raises(WrongContext, match="that for a timer of the main loop; but that is for the main loop"):
            wait_while(loop.main, lambda on=on: not on.done, "the retry", on=on)
    while not outer.done:
        loop.run_once()
    loop.close()


def test_any_outer_loop(context: AioContext) -> None:
    """Who builds another outer loop says so of what it delivers."""

    class Delivery(Waitable):
        outer = "the post office"

        @property
        def what(self) -> str:
            return "a letter"

    async def body() -> None:
        await suspend(Delivery())

    coroutine = context.enter(body())
    with pytest.raises(WrongContext, match="a letter; but that is for the post office to deliver"):
        wait_while(context, lambda: True, "the mail", on=coroutine)
    context.wake(coroutine)


def test_run_in(sim: SimHost) -> None:
    """aio_wait_bh_oneshot: in another context, waited for; at once in this one; exceptions come back."""
    context = AioContext(sim)
    ran: list[str] = []
    with sim.as_thread(2):
        other = AioContext(sim, "io0", is_main=False)

    def elsewhere() -> None:
        with sim.as_thread(2):
            other.poll(False)

    sim.at(1000, elsewhere)
    run_in(other, lambda: ran.append("there"))
    run_in(context, lambda: ran.append("here"))
    assert ran == ["there", "here"]
    sim.at(1000, elsewhere)
    with pytest.raises(KeyError, match="there"):
        run_in(other, lambda: {}["there"])

    async def body() -> None:
        run_in(other, lambda: None)

    with pytest.raises(WrongContext, match="await instead"):
        context.run(body())
    with sim.as_thread(3), pytest.raises(WrongContext):
        run_in(other, lambda: None)
    with sim.as_thread(2):
        other.close()
    context.close()


def test_coroutines_waited_for_in_turn(context: AioContext) -> None:
    """An ordinary wait inside a wait is fine; each is told apart."""
    done: list[int] = []

    async def body(n: int) -> None:
        await sleep_ns(1000)
        done.append(n)

    inner: list[Coroutine] = []

    def nested() -> None:
        inner.append(context.enter(body(2)))
        wait_while(context, lambda: not inner[0].done, "the inner one", on=inner[0])
        kick()

    context.schedule_oneshot(nested)
    context.run(body(1))
    assert sorted(done) == [1, 2]
