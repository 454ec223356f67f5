# SPDX-License-Identifier: Apache-2.0
"""Requests that must have a range for themselves, beside ordinary ones.

Who reads a block to write it back changed, or copies old data away before it is overwritten, must not have anybody
write there meanwhile, or one of the two writes is lost. So there is a gate before the node: ordinary requests pass it
together; a *serialising* one waits until nobody is inside whose range overlaps its own, and then keeps those out that
come. In order of arrival: who has to wait keeps later ones out as if he were inside, so nobody is starved, and two who
wait for each other cannot exist.

    place = await gate.enter(begin, end, alone=True)
    try:
        ...
    finally:
        gate.leave(place)

Lists of ordinary requests pass with ``submit`` and are inside until their owners know the result; that costs a list of
ranges and one object per batch. As long as nobody serialises, nobody compares ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from bottomhalf.aio import Coroutine, current, suspend
from bottomhalf.host.request import Owner, Request

Submit: TypeAlias = Callable[[list[Request]], list[Request]]


class Place:
    """Somebody inside the gate, or in front of it: his ranges, and who is to be woken when he may enter."""

    __slots__ = ("alone", "count", "gate", "owner", "ranges", "waiter")

    def __init__(self, gate: RangeGate, ranges: list[tuple[int, int]], alone: bool) -> None:
        self.gate = gate
        self.ranges = ranges
        self.alone = alone
        self.waiter: Coroutine | None = None
        self.count = 0  # requests of a list that are pending
        self.owner: Owner | None = None  # whose requests they are

    def conflicts(self, other: Place) -> bool:
        if not (self.alone or other.alone):
            return False
        for begin, end in self.ranges:
            for other_begin, other_end in other.ranges:
                if begin < other_end and other_begin < end:
                    return True
        return False

    def complete(self, requests: list[Request]) -> None:
        """For the owner of pending requests: tell him, then give the place back."""
        for request in requests:
            request.owner = self.owner
        try:
            if self.owner is not None:
                self.owner.complete(requests)
        finally:
            self.count -= len(requests)
            if not self.count:
                self.gate.leave(self)


class RangeGate:
    """See the module. Home thread of the node's context."""

    __slots__ = ("_alone", "_places", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._places: dict[Place, None] = {}  # in order of arrival
        self._alone = 0  # serialising ones among them

    @property
    def busy(self) -> bool:
        """Whether anybody is inside or waits."""
        return bool(self._places)

    def clear(self, requests: list[Request]) -> list[Request]:
        """Those of a list of ordinary requests that need not wait."""
        if not self._alone:
            return requests
        return [request for request in requests if not self._in_the_way(self._place_of([request]))]

    def submit(self, requests: list[Request], submit: Submit) -> list[Request]:
        """Let a list of ordinary requests pass, none of which has to wait (see clear()). What ``submit`` returns."""
        places: list[Place] = []
        first = requests[0].owner
        for request in requests:
            if request.owner is not first:
                groups: dict[int, list[Request]] = {}
                for each in requests:
                    groups.setdefault(id(each.owner), []).append(each)
                for group in groups.values():
                    self._let_in(group, places)
                break
        else:
            self._let_in(requests, places)
        try:
            pending = submit(requests)
        except BaseException:
            for place in places:
                self.leave(place)
            raise
        if len(pending) < len(requests):
            # An engine may have noted the result of a pending request already: membership counts, not ``result``.
            waiting = {id(request) for request in pending}
            for request in requests:
                if id(request) not in waiting:
                    held = request.owner
                    assert isinstance(held, Place)
                    request.owner = held.owner
                    held.count -= 1
            for place in places:
                if not place.count:
                    self.leave(place)
        return pending

    async def enter(self, begin: int, end: int, *, alone: bool) -> Place:
        """Pass as a coroutine: alone, or together with other ordinary ones."""
        place = Place(self, [(begin, end)], alone)
        if (alone or self._alone) and self._in_the_way(place):
            place.waiter = current()
        self._places[place] = None
        self._alone += alone
        if place.waiter is not None:
            await suspend(self._what)
            assert place.waiter is None, "woken by something else than the gate"
        return place

    def leave(self, place: Place) -> None:
        """Give a place back, and let those in who waited for it."""
        del self._places[place]
        self._alone -= place.alone
        if not any(other.waiter is not None for other in self._places):
            return
        earlier: list[Place] = []
        woken: list[Coroutine] = []
        for other in self._places:
            if other.waiter is not None and not any(map(other.conflicts, earlier)):
                woken.append(other.waiter)
                other.waiter = None
            earlier.append(other)
        for coroutine in woken:
            coroutine.context.wake(coroutine)

    def _in_the_way(self, place: Place) -> bool:
        return any(map(place.conflicts, self._places))

    def _place_of(self, requests: list[Request]) -> Place:
        return Place(self, [(request.offset, request.offset + request.length) for request in requests], False)

    def _let_in(self, requests: list[Request], places: list[Place]) -> None:
        place = self._place_of(requests)  # now: those below map offsets in place
        place.owner = requests[0].owner
        place.count = len(requests)
        for request in requests:
            request.owner = place
        self._places[place] = None
        places.append(place)
