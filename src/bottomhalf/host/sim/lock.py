# SPDX-License-Identifier: Apache-2.0
"""A lock of the simulated host, which has one thread: to wait for it is to wait for ever."""

from __future__ import annotations

from bottomhalf.host.sim.world import Deadlock, World


class SimLock:
    """A host.protocol.Lock."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._held = False

    def acquire(self, timeout_ns: int = -1) -> bool:
        if self._held:
            if timeout_ns < 0:
                raise Deadlock(self._world.explained("a lock is held, and there is no other thread to release it"))
            self._world.advance(timeout_ns)
            return False
        self._held = True
        return True

    def release(self) -> None:
        if not self._held:
            raise RuntimeError("release unlocked lock")
        self._held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *raised: object) -> None:
        self.release()
