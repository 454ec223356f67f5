# SPDX-License-Identifier: Apache-2.0
"""The event core (floor 1): AioContext, bottom halves, handlers, timers, coroutines, deferred calls, waiting.

    from bottomhalf.aio import AioContext

    context = AioContext()
    context.bottom_half(lambda: print("soon"), name="hello").schedule()
    context.poll(blocking=True)

It knows nothing of disks; an event loop for anybody.
"""

from bottomhalf.aio.bottom_half import BottomHalf, ReentrancyGuard
from bottomhalf.aio.clock import Clocks, clocks_of
from bottomhalf.aio.context import AioContext
from bottomhalf.aio.coroutine import Coroutine, Waitable, current, give_way, shielded, suspend
from bottomhalf.aio.defer import defer_call, deferred
from bottomhalf.aio.entering import move_to
from bottomhalf.aio.errors import AioError, Cancelled, TimedOut, WasCancelled, WrongContext
from bottomhalf.aio.explain import explain
from bottomhalf.aio.instrument import Instrument
from bottomhalf.aio.iothread import IOThread
from bottomhalf.aio.locks import CoMutex, CoQueue, CoRwLock, SharedResource
from bottomhalf.aio.main_loop import MainLoop
from bottomhalf.aio.sleep import Sleep, sleep_ns
from bottomhalf.aio.thread_pool import ThreadPool
from bottomhalf.aio.timer import Timer
from bottomhalf.aio.together import cancel_after, gather, give_up_after
from bottomhalf.aio.wait import kick, run_in, wait_while, waits

__all__ = [
    "AioContext",
    "BottomHalf",
    "ReentrancyGuard",
    "Timer",
    "Clocks",
    "clocks_of",
    "Coroutine",
    "Waitable",
    "current",
    "suspend",
    "give_way",
    "move_to",
    "shielded",
    "sleep_ns",
    "Sleep",
    "CoMutex",
    "CoQueue",
    "CoRwLock",
    "SharedResource",
    "gather",
    "give_up_after",
    "cancel_after",
    "ThreadPool",
    "IOThread",
    "MainLoop",
    "deferred",
    "defer_call",
    "wait_while",
    "run_in",
    "kick",
    "waits",
    "explain",
    "Instrument",
    "AioError",
    "WrongContext",
    "Cancelled",
    "WasCancelled",
    "TimedOut",
]
