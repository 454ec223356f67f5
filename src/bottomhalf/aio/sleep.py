# SPDX-License-Identifier: Apache-2.0
"""Sleeping in a coroutine."""

from __future__ import annotations

from bottomhalf.aio.coroutine import current, suspend


async def sleep_ns(duration_ns: int, clock: str = "realtime") -> None:
    """Suspend the coroutine for at least ``duration_ns`` of its context's clock."""
    me = current()
    timer = me.context.timer(lambda: me.context.wake(me), clock, name=f"sleep of {me.name}")
    timer.arm_ns(me.context.now_ns(clock) + duration_ns)
    await suspend(f"{duration_ns} ns of the {clock} clock")
