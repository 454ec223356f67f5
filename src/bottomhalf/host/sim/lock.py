# SPDX-License-Identifier: Apache-2.0
"""Locks of the simulated host. Who gets one of those that wait for it is drawn from the seed."""

from __future__ import annotations

from bottomhalf.host.sim.world import World


class SimLock:
    """A host.protocol.Lock."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._holder: int | None = None  # number of the thread

    def acquire(self, timeout_ns: int = -1) -> bool:
        world = self._world
        world.threads.preempt()
        if self._holder is not None:
            deadline_ns = None if timeout_ns < 0 else world.now_ns + timeout_ns
            what = f"a lock that thread {self._holder} holds"
            if not world.threads.block(lambda: self._holder is None, deadline_ns, what):
                if timeout_ns == 0:
                    world.threads.looked_in_vain()
                return False
        self._holder = world.thread_id
        return True

    def release(self) -> None:
        if self._holder is None:
            raise RuntimeError("release unlocked lock")
        self._holder = None
        self._world.threads.preempt()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *raised: object) -> None:
        self.release()
