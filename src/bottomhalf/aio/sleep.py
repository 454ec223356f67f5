# SPDX-License-Identifier: Apache-2.0
"""Sleeping in a coroutine."""

from __future__ import annotations

from typing import Final

from bottomhalf.aio.coroutine import current, suspend

_ASLEEP: Final = "it sleeps, and only its timer may wake it"


async def sleep_ns(duration_ns: int, clock: str = "realtime") -> None:
    """Suspend the coroutine for at least ``duration_ns`` of its context's clock; 0 lets others run.

    Who enters it before the time is up gets an error."""
    me = current()
    context = me.context

    def wake() -> None:
        me.queued = None
        context.wake(me)

    timer = context.timer(wake, clock, name="sleep")
    timer.arm_ns(context.now_ns(clock) + duration_ns)
    me.queued = _ASLEEP
    try:
        await suspend(f"{duration_ns} ns of the {clock} clock")
    finally:
        timer.cancel()
        if me.queued is _ASLEEP:  # it did not get to sleep
            me.queued = None
