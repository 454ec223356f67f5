# SPDX-License-Identifier: Apache-2.0
"""Waiting in plain code: poll until a condition is false.

    wait_while(context, lambda: backend.in_flight > 0, what="requests of drive0")

It is the only way for plain code to wait. The waiting thread polls its own context, so that whatever makes the
condition false can happen there; if the condition changes in another thread, that thread calls ``kick()``
afterwards. Inside a coroutine waiting would starve the very loop that has to wake it: an error, await instead.

Each wait is registered with what it waits for while it waits, so that a hang can be told in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bottomhalf.aio.context import AioContext
from bottomhalf.aio.errors import WrongContext
from bottomhalf.aio.thread import own


@dataclass(frozen=True, eq=False)
class Wait:
    """A wait that is going on."""

    what: str
    polling: AioContext  # the waiter's own context
    since_ns: int  # on the host's monotonic clock

    def __str__(self) -> str:
        return f"{self.polling.name} waits for {self.what}"


_waits: list[Wait] = []


def waits() -> tuple[Wait, ...]:
    """The waits of all threads, oldest first."""
    return tuple(_waits)


def wait_while(context: AioContext | None, condition: Callable[[], object], what: str) -> bool:
    """Poll until ``condition()`` is false; whether it was ever true. It may be called any number of times.

    ``context`` is where the condition will change: the caller's own, another one (then whoever changes it must
    kick()), or None for several. The caller must have a context of its own; only the main context's thread may
    wait for another one, for two iothreads waiting for each other would never end. ``what`` completes the
    sentence "X waits for ..."."""
    if not condition():
        return False
    state = own.state
    if state.coroutine is not None:
        raise WrongContext(
            f"coroutine {state.coroutine.name} would wait for {what} by polling, and starve the loop that has "
            "to wake it; await instead"
        )
    polling = context if context is not None and context.is_home else state.context
    if polling is None or not polling.is_home:
        raise WrongContext(f"a thread without a context cannot wait for {what}")
    if context is not polling and not polling.is_main:
        raise WrongContext(
            f"{polling.name} would wait for {what} in {context.name if context else 'several contexts'}; only "
            "the main context may wait for others"
        )
    wait = Wait(what, polling, polling.host.monotonic_ns())
    _waits.append(wait)
    try:
        while condition():  # once more: a kick before the wait was registered went nowhere
            polling.poll(True)
    finally:
        _waits.remove(wait)
    return True


def kick() -> None:
    """Make all waits look at their conditions again. Call it after a change that ends one. From any thread."""
    for wait in tuple(_waits):
        wait.polling.notify()
