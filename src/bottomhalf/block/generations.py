# SPDX-License-Identifier: Apache-2.0
"""A flush that finds nothing written since the last one is free.

Guests flush out of habit, and a flush that has nothing to do still costs a journal commit or a turn of the device's
cache. So a node counts what writes to it (a *generation*), and remembers which generation is known to be durable.

A write counts when it ends, for one that ends after a flush began is not covered by it. Lists end elsewhere, their
owners are told by the engine, and to hear of it would cost every write something. So writes are counted when they
begin, and a flush is remembered only if nothing at all was in flight in its engine when it began: then everything that
has begun has ended. Under load, when that is not so, flushes have something to do anyway.

    generations = Generations()
    generations.written += 1                                      # with every list that writes
    pending = generations.flush(requests, engine.in_flight == 0)  # [] if there is nothing to do
"""

from __future__ import annotations

from bottomhalf.host.request import Owner, Request


class Generations:
    """What was written to a node, and what of it is durable. Home thread."""

    __slots__ = ("_flushed", "written")

    def __init__(self) -> None:
        self.written = 0
        self._flushed = 0

    @property
    def clean(self) -> bool:
        """Whether a flush has nothing to do."""
        return self.written == self._flushed

    def flush(self, requests: list[Request], idle: bool) -> list[Request]:
        """Those flushes that have to be done: all or none. Who does them delivers them, and they tell us."""
        if self.clean:
            for request in requests:
                request.result = 0
            return []
        if idle:
            generation = self.written
            for request in requests:
                request.owner = _Flush(self, generation, request.owner)
        return requests

    def durable(self, generation: int) -> None:
        self._flushed = max(self._flushed, generation)


class _Flush:
    """Owner of a flush: notes its success, then tells the real owner."""

    __slots__ = ("_generation", "_generations", "_owner")

    def __init__(self, generations: Generations, generation: int, owner: Owner | None) -> None:
        self._generations = generations
        self._generation = generation
        self._owner = owner

    def complete(self, requests: list[Request]) -> None:
        for request in requests:
            request.owner = self._owner
            if request.result == 0:
                self._generations.durable(self._generation)
        if self._owner is not None:
            self._owner.complete(requests)
