# SPDX-License-Identifier: Apache-2.0
"""Readiness, wake-ups and signals of the simulated host.

epoll promises little: that a level-triggered wait with something ready reports something, in no order, and
perhaps not all of it. Programs come to rely on more than that. Therefore ``SimPoller.wait`` gives exactly the
promise: the seed shuffles what is ready, and sometimes leaves part of it for the next wait. When nothing is
ready the wait is what moves virtual time.

    poller = host.poller()
    poller.register(event.fileno(), IN)
    host.at(5_000, event.set)
    poller.wait(-1)  # [(event.fileno(), IN)], 5 us later
"""

from __future__ import annotations

import errno
from typing import Final

from bottomhalf.host.protocol import ERR, HUP, IN, OUT
from bottomhalf.host.sim.world import Deadlock, Descriptor, World, failure

MAX_EVENTS: Final = 128  # taken per wait, as QEMU's fdmon-epoll; the rest stays ready
NESTING_MAX: Final = 5  # pollers within pollers, as Linux's EP_MAX_NESTS + 1

_MASK_NAMES: Final = ((IN, "IN"), (OUT, "OUT"), (ERR, "ERR"), (HUP, "HUP"))


class SimEvent(Descriptor):
    """A host.protocol.Event."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._is_set = False

    def readiness(self) -> int:
        return IN if self._is_set else 0

    def set(self) -> None:
        self.world.threads.preempt()
        self.check_open()
        self._is_set = True

    def clear(self) -> bool:
        self.world.threads.preempt()
        self.check_open()
        was_set, self._is_set = self._is_set, False
        return was_set


class SimSignalSource(Descriptor):
    """A host.protocol.SignalSource. Like signalfd(2), it merges equal signals that were not taken yet."""

    def __init__(self, world: World, numbers: list[int]) -> None:
        super().__init__(world)
        self.numbers = frozenset(numbers)
        self._arrived: list[int] = []

    def readiness(self) -> int:
        return IN if self._arrived else 0

    def arrive(self, number: int) -> None:
        if number not in self._arrived:
            self._arrived.append(number)

    def take(self) -> list[int]:
        self.check_open()
        taken, self._arrived = self._arrived, []
        return taken


class SimPoller(Descriptor):
    """A host.protocol.Poller. All kinds behave alike here; ``name`` is the one that was asked for."""

    def __init__(self, world: World, name: str = "sim") -> None:
        super().__init__(world)
        self.name = name
        self._masks: dict[int, int] = {}

    def register(self, fd: int, mask: int) -> None:
        self._check(fd)
        if fd in self._masks:
            raise failure(errno.EEXIST)
        target = self.world.descriptors[fd]
        if not target.pollable:
            raise failure(errno.EPERM)
        if target is self:
            raise failure(errno.EINVAL)
        if isinstance(target, SimPoller) and (target.watches(self) or target.depth() >= NESTING_MAX):
            raise failure(errno.ELOOP)
        self._masks[fd] = mask

    def modify(self, fd: int, mask: int) -> None:
        self._check(fd)
        if fd not in self._masks:
            raise failure(errno.ENOENT)
        self._masks[fd] = mask

    def unregister(self, fd: int) -> None:
        self._check(fd)
        if fd not in self._masks:
            raise failure(errno.ENOENT)
        del self._masks[fd]

    def forget(self, fd: int) -> None:
        """The descriptor was closed."""
        self._masks.pop(fd, None)

    def readiness(self) -> int:
        return IN if self._collect() else 0

    def watches(self, other: SimPoller) -> bool:
        """Whether the other poller is in this one, at any depth."""
        return any(inner is other or inner.watches(other) for inner in self._inner())

    def depth(self) -> int:
        return 1 + max((inner.depth() for inner in self._inner()), default=0)

    def wait(self, timeout_ns: int) -> list[tuple[int, int]]:
        self.check_open()
        self.check_home()
        world = self.world
        deadline_ns = None if timeout_ns < 0 else world.now_ns + timeout_ns
        if timeout_ns != 0 and world.odds.empty_wait and world.order.random() < world.odds.empty_wait:
            world.note("wait", self._fd, "early")
            return []
        if world.threads.many and timeout_ns:
            return self._wait_among_threads(deadline_ns)
        while True:
            world.count_spin()
            world.run_due()
            ready = self._collect()
            if ready:
                return self._choose(ready)
            if deadline_ns is not None and world.now_ns >= deadline_ns:
                world.note("wait", self._fd)
                if timeout_ns == 0:
                    world.idle_look()
                return []
            next_ns = world.next_time_ns()
            if deadline_ns is not None and (next_ns is None or next_ns > deadline_ns):
                world.now_ns = deadline_ns
            elif next_ns is not None:
                world.now_ns = max(world.now_ns, next_ns)
            else:
                raise Deadlock(world.explained(self._stuck()))

    def _wait_among_threads(self, deadline_ns: int | None) -> list[tuple[int, int]]:
        self.world.count_spin()
        names = ", ".join(repr(self.world.descriptors[fd]) for fd in self._masks)
        if self.world.threads.block(self._collect, deadline_ns, f"{names or 'nothing'} in {self!r}"):
            return self._choose(self._collect())
        self.world.note("wait", self._fd)
        return []

    def _choose(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        world = self.world
        order = world.order
        order.shuffle(ready)
        if len(ready) > 1 and order.random() < world.odds.part_of_ready:
            del ready[order.randrange(1, len(ready)) :]
        del ready[MAX_EVENTS:]
        world.found_work()
        world.note("wait", self._fd, *ready)
        return ready

    def _collect(self) -> list[tuple[int, int]]:
        descriptors = self.world.descriptors
        ready = []
        for fd, mask in self._masks.items():
            found = descriptors[fd].readiness() & (mask | ERR | HUP)
            if found:
                ready.append((fd, found))
        return ready

    def _inner(self) -> list[SimPoller]:
        found = (self.world.descriptors[fd] for fd in self._masks)
        return [descriptor for descriptor in found if isinstance(descriptor, SimPoller)]

    def _check(self, fd: int) -> None:
        self.world.threads.preempt()
        self.check_open()
        if fd < 0:
            raise ValueError(f"file descriptor cannot be a negative integer ({fd})")
        if fd not in self.world.descriptors:
            raise failure(errno.EBADF)

    def _stuck(self) -> str:
        descriptors = self.world.descriptors
        watched = ", ".join(f"{descriptors[fd]!r} for {mask_names(mask)}" for fd, mask in self._masks.items())
        return (
            "nothing can end this wait: nothing is ready and nothing is going to happen; "
            f"watched: {watched or 'nothing'}"
        )


def mask_names(mask: int) -> str:
    """Readiness in words, for messages."""
    return "|".join(name for bit, name in _MASK_NAMES if mask & bit) or "errors"
