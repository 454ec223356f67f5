# SPDX-License-Identifier: Apache-2.0
"""Small things that many tests of the event core need."""

from __future__ import annotations

from collections.abc import Callable

from bottomhalf.aio import AioContext
from bottomhalf.host.protocol import Host

POLLS_MAX = 100_000  # more than any test needs


def drain(context: AioContext) -> None:
    """Poll until nothing is left to do. Some polls of the simulated host leave ready things for later."""
    idle = 0
    for _ in range(POLLS_MAX):
        idle = 0 if context.poll(False) else idle + 1
        if idle == 2:
            return
    raise AssertionError("there is no end of work")


def until(context: AioContext, condition: Callable[[], object]) -> None:
    """Poll, sleeping if need be, until the condition is true."""
    for _ in range(POLLS_MAX):
        if condition():
            return
        context.poll(True)
    raise AssertionError("the condition never comes true")


class Notifier:
    """QEMU's event notifier as the unit tests use it: a handler that must find the event set, counts, and with
    ``auto_set`` sets it again while ``active``."""

    def __init__(self, context: AioContext, host: Host, active: int = 0, auto_set: bool = False) -> None:
        self.count = 0
        self.active = active
        self.auto_set = auto_set
        self.event = host.event()
        self._context = context
        context.set_fd_handler(self.event.fileno(), self.ready)

    def ready(self) -> None:
        assert self.event.clear()
        self.count += 1
        if self.active > 0:
            self.active -= 1
        if self.auto_set and self.active:
            self.event.set()

    def close(self) -> None:
        self._context.set_fd_handler(self.event.fileno())
        self.event.close()
