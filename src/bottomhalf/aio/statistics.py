# SPDX-License-Identifier: Apache-2.0
"""What the parts of the event core tell about themselves: frozen objects, made when somebody asks.

    print(context.statistics())

Counting costs, so hot paths count once per batch and most of these figures are only looked up. They may be asked for
from any thread; then they need not fit each other exactly.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ThreadPoolStatistics:
    """Of a context's worker threads."""

    threads: int
    idle: int  # threads without work
    queued: int  # requests that no thread has begun
    running: int
    completed: int  # requests whose owners were told, ever


@dataclass(frozen=True)
class EngineStatistics:
    """Of a context's file I/O engine."""

    name: str
    in_flight: int  # requests whose owners have not been told yet


@dataclass(frozen=True)
class ContextStatistics:
    """Of an AioContext. Times in nanoseconds."""

    name: str
    poller: str  # which monitor of descriptors is in use
    sleeping: bool  # it sleeps, or an outer loop sleeps for it
    polls: int
    bottom_halves_run: int
    bottom_halves_queued: int  # cancelled ones that were not passed over yet included
    idle_bottom_halves: int
    coroutines_queued: int  # to be entered in the next poll
    coroutines_kept: int  # ended ones, to be used again
    handlers: int
    handlers_asked: int  # by busy polling
    timers: dict[str, int]  # armed, by clock
    poll_ns: int  # how long it would poll busily now
    poll_max_ns: int
    engine: EngineStatistics | None
    engines: tuple[EngineStatistics, ...]  # others, which files insist on
    thread_pool: ThreadPoolStatistics | None


@dataclass(frozen=True)
class LockStatistics:
    """Of a lock or queue of coroutines."""

    what: str
    holders: int
    waiters: int
