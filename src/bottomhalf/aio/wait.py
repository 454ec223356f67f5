# SPDX-License-Identifier: Apache-2.0
"""Waiting in plain code: poll until a condition is false.

    wait_while(context, lambda: backend.in_flight > 0, what="requests of drive0")

It is the only way for plain code to wait. The waiting thread polls its own context, so that whatever makes the
condition false can happen there; if the condition changes in another thread, that thread calls ``kick()``
afterwards. Inside a coroutine waiting would starve the very loop that has to wake it: an error, await instead.

A nested poll serves one context. What only a loop around it delivers (the main loop's own timers, the callbacks of
an asyncio loop) cannot come while it waits. Whoever would suspend a coroutine for such a thing calls
``needs_outer_loop()`` first, and gets an error that says so instead of a hang; so does plain code that would wait for
a coroutine which already waits for such a thing (``Waitable.outer``).

Each wait is registered with what it waits for while it waits; ``explain`` makes sentences of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bottomhalf.aio.errors import WrongContext
from bottomhalf.aio.thread import own

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext
    from bottomhalf.aio.coroutine import Waitable


CHAIN_MAX: Final = 32  # links of "who waits for whom" that are followed


@dataclass(eq=False)
class Wait:
    """A wait of plain code that is going on."""

    what: str
    polling: AioContext  # the waiter's own context
    since_ns: int  # on the host's monotonic clock
    on: Waitable | None  # whose end ends it, as far as it is known

    def __str__(self) -> str:
        return f"{self.polling.name} waits for {self.what}"


_waits: list[Wait] = []


def waits() -> tuple[Wait, ...]:
    """The waits of plain code in all threads, oldest first."""
    return tuple(_waits)


def wait_while(
    context: AioContext | None, condition: Callable[[], object], what: str, on: Waitable | None = None
) -> bool:
    """Poll until ``condition()`` is false; whether it was ever true. It may be called any number of times.

    ``context`` is where the condition will change: the caller's own, another one (then whoever changes it must
    kick()), or None for several. The caller must have a context of its own; only the main context's thread may
    wait for another one, for two iothreads waiting for each other would never end. ``what`` completes the
    sentence "X waits for ...", ``on`` is the coroutine or lock whose end ends the wait, if it is one."""
    if not condition():
        return False
    polling = who_polls(context, what)
    with waiting(polling, what, on):
        while condition():  # once more: a kick before the wait was registered went nowhere
            polling.poll(True)
    return True


@contextmanager
def waiting(polling: AioContext, what: str, on: Waitable | None) -> Iterator[Wait]:
    """Register a wait of this thread while it lasts. WrongContext if ``on`` waits for what it cannot get meanwhile."""
    link: Waitable | None = on
    for _ in range(CHAIN_MAX):
        if link is None:
            break
        if link.outer:
            asked = f"{polling.name} would wait for {what}, and that for {link.what}"
            raise WrongContext(_not_served(asked, link.outer))
        link = next(iter(link.blockers()), None)
    wait = Wait(what, polling, polling.host.monotonic_ns(), on)
    state = own.state
    _waits.append(wait)
    state.waits.append(wait)
    try:
        yield wait
    finally:
        state.waits.remove(wait)
        _waits.remove(wait)


def who_polls(context: AioContext | None, what: str) -> AioContext:
    """The context that the calling thread polls while it waits for ``what`` in ``context``; WrongContext if it may
    not wait."""
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
    return polling


def needs_outer_loop(what: str, deliverer: str) -> None:
    """WrongContext if plain code of this thread is waiting: its nested polls do not serve ``deliverer``, so whoever
    suspended for ``what`` now could wait for ever."""
    going_on = own.state.waits
    if going_on:
        raise WrongContext(_not_served(f"{going_on[-1]}, and meanwhile {what} is asked for", deliverer))


def _not_served(what: str, deliverer: str) -> str:
    return (
        f"{what}; but that is for {deliverer} to deliver, which a nested poll does not serve, so it would never come. "
        "Wait for it outside, or use what the context itself delivers (its own timers, handlers and bottom halves)"
    )


def run_in(context: AioContext, callback: Callable[[], object], what: str = "") -> None:
    """Run ``callback()`` as a one-shot bottom half of another context, and wait until it has run.

    The calling thread's main context is polled meanwhile, so only the main thread may; in the context's own thread
    it is called at once. What the callback raises is raised here."""
    if context.is_home:
        callback()
        return
    what = what or f"a bottom half in {context.name}"
    who_polls(context, what)
    done = False
    failure: BaseException | None = None

    def run() -> None:
        nonlocal done, failure
        try:
            callback()
        except BaseException as error:
            failure = error
        done = True
        kick()

    context.schedule_oneshot(run)
    wait_while(context, lambda: not done, what)
    if failure is not None:
        raise failure


def kick() -> None:
    """Make all waits look at their conditions again. Call it after a change that ends one. From any thread."""
    for wait in tuple(_waits):
        wait.polling.notify()
