# SPDX-License-Identifier: Apache-2.0
"""The gate for ranges: exclusion, order of arrival, and nobody forgotten."""

from __future__ import annotations

import random

import pytest

from bottomhalf.aio import AioContext, Coroutine, sleep_ns
from bottomhalf.block.serialising import RangeGate
from bottomhalf.host.request import Request
from bottomhalf.host.sim import SimHost
from tests.block.bench import write


def test_overlapping_ones_exclude_each_other_in_order_of_arrival(seed: int) -> None:
    chance = random.Random(seed)
    context = AioContext(SimHost(seed))
    gate = RangeGate("the gate")
    arrived: list[tuple[int, int, int, bool]] = []
    entered: list[int] = []
    inside: dict[int, tuple[int, int, bool]] = {}
    together = 0

    async def pass_it(number: int, alone: bool) -> None:
        nonlocal together
        begin = chance.randrange(100)
        end = begin + chance.randrange(1, 20)
        await sleep_ns(chance.randrange(50))
        arrived.append((number, begin, end, alone))
        place = await gate.enter(begin, end, alone=alone)
        entered.append(number)
        for other_begin, other_end, other_alone in inside.values():
            assert not ((alone or other_alone) and begin < other_end and other_begin < end)
        together = max(together, len(inside))
        inside[number] = (begin, end, alone)
        await sleep_ns(chance.randrange(50))
        del inside[number]
        gate.leave(place)

    coroutines: list[Coroutine] = [context.enter(pass_it(n, chance.random() < 0.4)) for n in range(60)]
    while not all(coroutine.done for coroutine in coroutines):
        context.poll(True)
    assert together > 1, "only what overlaps waits"
    position = {number: place for place, number in enumerate(entered)}
    for index, (number, begin, end, alone) in enumerate(arrived):
        for other, other_begin, other_end, other_alone in arrived[index + 1 :]:
            if (alone or other_alone) and begin < other_end and other_begin < end:
                assert position[number] < position[other], "it was overtaken"
    assert not gate.busy
    context.close()


def test_an_owner_who_raises_does_not_shut_it() -> None:
    gate = RangeGate("the gate")

    class Owner:
        def complete(self, requests: list[Request]) -> None:
            raise ZeroDivisionError

    request = write(0, b"x")
    request.owner = Owner()
    assert gate.submit([request], lambda requests: requests) == [request]
    request.result = 0
    with pytest.raises(ZeroDivisionError):
        request.owner.complete([request])
    assert not gate.busy

    def broken(requests: list[Request]) -> list[Request]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gate.submit([write(0, b"y")], broken)
    assert not gate.busy


def test_a_result_that_is_known_early_does_not_end_a_pending_request() -> None:
    """An engine may set ``result`` long before it tells."""
    told = []
    user = type("Owner", (), {"complete": lambda self, requests: told.extend(requests)})()
    gate = RangeGate("the gate")
    request, other = write(0, b"x"), write(1, b"y")
    request.owner = other.owner = user

    def submit(requests: list[Request]) -> list[Request]:
        requests[0].result = 0
        return requests[:1]

    gate.submit([request, other], submit)
    assert request.owner is not user and other.owner is user
    request.owner.complete([request])  # type: ignore[union-attr]
    assert told == [request] and request.owner is user
    assert not gate.busy


def test_requests_of_several_owners(seed: int) -> None:
    told: list[tuple[int, int]] = []

    def owner(number: int) -> object:
        return type("Owner", (), {"complete": lambda self, rs: told.extend((number, r.offset) for r in rs)})()

    gate = RangeGate("the gate")
    owners = [owner(0), owner(1)]
    requests = [write(n, b"x") for n in range(4)]
    for number, request in enumerate(requests):
        request.owner = owners[number % 2]  # type: ignore[assignment]
    pending = gate.submit(list(requests), lambda submitted: submitted)
    for request in pending:
        request.owner.complete([request])  # type: ignore[union-attr]
    assert sorted(told) == [(0, 0), (0, 2), (1, 1), (1, 3)]
    assert not gate.busy
