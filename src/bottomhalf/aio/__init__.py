# SPDX-License-Identifier: Apache-2.0
"""The event core (floor 1): AioContext, bottom halves, handlers, timers, coroutines, deferred calls, waiting.

    from bottomhalf.aio import AioContext

    context = AioContext()
    context.bottom_half(lambda: print("soon"), name="hello").schedule()
    context.poll(blocking=True)

It knows nothing of disks; an event loop for anybody.
"""

from bottomhalf.aio.bottom_half import BottomHalf
from bottomhalf.aio.context import AioContext
from bottomhalf.aio.coroutine import Coroutine, current, suspend
from bottomhalf.aio.defer import defer_call, deferred
from bottomhalf.aio.errors import AioError, WrongContext
from bottomhalf.aio.iothread import IOThread
from bottomhalf.aio.locks import CoMutex, CoQueue
from bottomhalf.aio.main_loop import MainLoop
from bottomhalf.aio.sleep import sleep_ns
from bottomhalf.aio.timer import Timer
from bottomhalf.aio.wait import kick, wait_while, waits

__all__ = [
    "AioContext",
    "BottomHalf",
    "Timer",
    "Coroutine",
    "current",
    "suspend",
    "sleep_ns",
    "CoMutex",
    "CoQueue",
    "IOThread",
    "MainLoop",
    "deferred",
    "defer_call",
    "wait_while",
    "kick",
    "waits",
    "AioError",
    "WrongContext",
]
