# SPDX-License-Identifier: Apache-2.0
"""Events to all monitors, those that come in floods no faster than clients can use them.

The first of a kind goes out at once. Of those that follow within the interval only the newest is kept, and goes out at
its end: a client learns the latest state, late by an interval at most. The timer is the main loop's own, as QEMU's is:
while a command waits in a nested poll, what is kept stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from bottomhalf.aio import MainLoop, Timer
from bottomhalf.qapi.commands import event_data
from bottomhalf.qapi.types import EventType

INTERVAL_NS: Final = 1_000_000_000
KEYS_MAX: Final = 1024  # different sources of limited events that are told apart; the rest counts as one

# Limited events, with the members of their data that tell sources apart.
LIMITED: Final[dict[str, tuple[str, ...]]] = {
    "BLOCK_IO_ERROR": ("qom-path", "device"),
    "QUORUM_FAILURE": (),
    "QUORUM_REPORT_BAD": ("node-name",),
    "VSERPORT_CHANGE": ("id",),
}

Send = Callable[[str, "dict[str, Any] | None", int], object]


class _Source:
    """A source of limited events that spoke less than an interval ago."""

    __slots__ = ("kept", "timer")

    def __init__(self, timer: Timer) -> None:
        self.timer = timer
        self.kept: tuple[dict[str, Any] | None, int] | None = None


class Broadcast:
    """``send(name, data, realtime_ns)`` reaches all monitors, from any thread. So may emit() be called."""

    def __init__(self, loop: MainLoop, send: Send) -> None:
        self._loop = loop
        self._host = loop.main.host
        self._send = send
        self._lock = self._host.lock()
        self._sources: dict[tuple[str, ...], _Source] = {}

    def emit(self, event: EventType) -> None:
        """Tell all monitors of it, now or when its time comes."""
        name, data = type(event).qmp_name, event_data(event)
        now_ns = self._host.realtime_ns()
        members = LIMITED.get(name)
        if members is None:
            self._send(name, data, now_ns)
            return
        key = (name, *(str((data or {}).get(member)) for member in members))
        with self._lock:
            source = self._sources.get(key)
            if source is None and len(self._sources) >= KEYS_MAX:
                key = (name,)
                source = self._sources.get(key)
            if source is not None:
                source.kept = (data, now_ns)
                return
            timer = self._loop.timer(lambda: self._due(key), name=f"rate limit of {name}")
            self._sources[key] = _Source(timer)
        timer.arm_ns(self._loop.main.now_ns() + INTERVAL_NS)
        self._send(name, data, now_ns)

    def _due(self, key: tuple[str, ...]) -> None:
        with self._lock:
            source = self._sources[key]
            kept, source.kept = source.kept, None
            if kept is None:
                del self._sources[key]
        if kept is not None:
            source.timer.arm_ns(self._loop.main.now_ns() + INTERVAL_NS)
            self._send(key[0], *kept)

    def close(self) -> None:
        """Forget what is kept."""
        with self._lock:
            sources, self._sources = self._sources, {}
        for source in sources.values():
            source.timer.cancel()
