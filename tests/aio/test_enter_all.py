# SPDX-License-Identifier: Apache-2.0
"""Many coroutines entered with one call: the same as one after the other."""

from __future__ import annotations

import pytest

from bottomhalf.aio import AioContext, AioError, current, deferred, give_way, suspend
from bottomhalf.aio.coroutine import in_coroutine
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import drain


@pytest.mark.parametrize("together", [True, False])
def test_the_same_as_one_by_one(context: AioContext, together: bool) -> None:
    """Whatever each does first: give way, wait, wake another, return, enter a new one, end at once."""
    ran: list[str] = []

    async def gives_way() -> None:
        ran.append("gives way")
        await give_way()
        ran.append("and goes on")

    async def waits() -> str:
        ran.append("waits")
        await suspend("the waker")
        ran.append("was woken")
        return "result"

    async def wakes() -> None:
        context.wake(waiter)
        ran.append("wakes")
        await give_way()
        ran.append("woke")

    async def enters() -> None:
        assert in_coroutine() and current().name.endswith("enters")
        context.enter(gives_way())
        ran.append("enters")

    async def returns() -> int:
        ran.append("returns")
        return 5

    waiter = context.enter(waits())
    bodies = [gives_way(), waits(), wakes(), enters(), returns(), gives_way()]
    if together:
        entered = context.enter_all(bodies)
    else:
        entered = [context.enter(body) for body in bodies]
    assert not in_coroutine()
    ran.append("entered")
    assert [coroutine.done for coroutine in entered] == [False, False, False, True, True, False]
    assert waiter.result() == "result" and entered[4].result() == 5
    assert entered[1].waiting_for == "the waker"
    drain(context)
    context.wake(entered[1])
    assert all(coroutine.done for coroutine in entered)
    assert ran == [
        *("waits", "gives way", "waits", "wakes", "was woken", "enters", "gives way", "returns", "gives way"),
        "entered",
        *("and goes on", "woke", "and goes on", "and goes on", "was woken"),
    ]


def test_used_again(context: AioContext) -> None:
    """Those that have ended and that nobody holds serve the next list; results stay with who holds them."""

    async def returns(number: int) -> int:
        await give_way()
        return number

    held = context.enter_all(returns(n) for n in range(100))
    drain(context)
    for _ in range(3):
        context.enter_all([returns(-1) for _ in range(100)])
        drain(context)
    assert [coroutine.result() for coroutine in held] == list(range(100))


def test_suspended_ones_among_them(context: AioContext) -> None:
    """They go on where they stand in the list, after one that has given way too."""
    ran: list[str] = []

    async def waits() -> None:
        await suspend("the test")
        ran.append("went on")

    async def gives_way() -> None:
        await give_way()

    async def ends() -> None:
        ran.append("ended")

    waiting = context.enter(waits())
    context.enter_all([ends(), gives_way(), waiting, ends()])  # type: ignore[list-item]
    assert ran == ["ended", "went on", "ended"]
    drain(context)


def test_inside_a_coroutine_and_a_section(context: AioContext) -> None:
    """Inside a coroutine they are entered when it suspends; its own deferred section it cannot wait in."""
    ran: list[int] = []

    async def child(number: int) -> None:
        ran.append(number)
        await give_way()

    async def parent() -> None:
        context.enter_all([child(1), child(2)])
        ran.append(0)

    context.enter(parent())
    assert ran == [0, 1, 2]
    drain(context)
    with deferred():
        context.enter_all([child(3)])  # the section is not its own
        with pytest.raises(AioError, match="inside a deferred section"):
            context.enter_all([child_with_a_section(ran)])
    drain(context)
    assert ran == [0, 1, 2, 3, 4]


async def child_with_a_section(ran: list[int]) -> None:
    ran.append(4)
    with deferred():
        await give_way()


def test_from_another_thread(sim: SimHost) -> None:
    context = AioContext(sim)
    ran: list[int] = []

    async def child(number: int) -> None:
        ran.append(number)

    with sim.as_thread(2):
        context.enter_all([child(1), child(2)])
    assert ran == []
    drain(context)
    assert ran == [1, 2]
    context.close()


@pytest.mark.parametrize("handled", [True, False])
def test_failures(context: AioContext, handled: bool) -> None:
    """All are entered; the first exception goes out, the next to the handler, or out of the next poll."""
    ran: list[int] = []
    told: list[str] = []
    if handled:
        context.exception_handler = lambda _, error, where: told.append(f"{error} in {where}")

    async def child(number: int) -> None:
        ran.append(number)
        if number % 2:
            raise ValueError(number)
        await give_way()
        ran.append(-number)

    with pytest.raises(ValueError, match="1"):
        context.enter_all(child(n) for n in (2, 1, 4, 3))
    assert ran == [2, 1, 4, 3]
    if handled:
        assert told == ["3 in coroutine test_failures.<locals>.child"]
    else:
        with pytest.raises(ValueError, match="3"):
            context.poll(False)
    drain(context)
    assert ran == [2, 1, 4, 3, -2, -4]


@pytest.mark.parametrize("culprit", ["interrupt", "no coroutine"])
def test_the_others_are_not_lost(context: AioContext, culprit: str) -> None:
    """Somebody interrupts the program in the middle, or gave something that is no coroutine."""
    ran: list[int] = []

    async def child(number: int) -> None:
        ran.append(number)

    async def interrupted() -> None:
        raise KeyboardInterrupt

    wrong = interrupted() if culprit == "interrupt" else 5
    with pytest.raises(KeyboardInterrupt if culprit == "interrupt" else AioError):
        context.enter_all([child(1), wrong, child(2), child(3)])  # type: ignore[list-item]
    assert ran == [1] and not in_coroutine()
    drain(context)
    assert ran == [1, 2, 3]


def test_a_sleeping_outer_loop_is_told(sim: SimHost) -> None:
    """One that gives way goes on in the next poll, for which an outer loop has to wake up."""
    context = AioContext(sim)
    ran: list[int] = []

    async def child() -> None:
        await give_way()
        ran.append(1)

    context.embed()
    poller = sim.poller()
    poller.register(context.fileno(), 1)
    while context.poll(False):
        pass
    assert poller.wait(0) == []
    context.enter_all([child()])
    assert poller.wait(0) != []
    context.poll(False)
    assert ran == [1]
    context.release()
    context.close()
