# SPDX-License-Identifier: Apache-2.0
"""Bottom halves: "run this soon, once, in that context's thread".

    half = context.bottom_half(send_replies, name="send replies")
    half.schedule()          # from any thread, from a signal handler, as often as you like: one run
    half.delete()

A bottom half is three booleans and a place in a list. No lock guards them. Scheduling takes a cancellation back
before it looks at ``queued``; the loop clears ``queued`` before it looks for a cancellation; whoever comes second
sees the other. The list is the evidence: who is about to sleep looks at it after announcing that, who schedules
looks for the announcement after the list. So nothing else needs to be written in the usual case.

Looking at ``queued`` and setting it is one step under the interpreter's global lock, which changes threads only at
calls and jumps back. Without that lock two threads may both put it there: then it runs once more than it had to,
as if the second had scheduled it a little later.

Idle bottom halves are rare and stand in a list of their own, so that the others need not be asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext


class ReentrancyGuard:
    """Tells that callbacks of one owner, a device perhaps, run inside each other.

        guard = ReentrancyGuard()
        half = context.bottom_half(device.run_queue, guard=guard)

    A callback that schedules itself and polls runs inside itself; so does a device whose DMA hits its own registers.
    The guard does not prevent it: ``reentries`` counts, ``on_reentry()`` is called, and a callback that minds looks
    at ``engaged`` first."""

    __slots__ = ("engaged", "on_reentry", "reentries")

    def __init__(self, on_reentry: Callable[[], object] | None = None) -> None:
        self.engaged = False
        self.reentries = 0
        self.on_reentry = on_reentry

    def around(self, callback: Callable[[], object]) -> Callable[[], None]:
        """The callback, guarded. It may delete its bottom half meanwhile."""

        @wraps(callback)
        def guarded() -> None:
            before = self.engaged
            if before:
                self.reentries += 1
                if self.on_reentry is not None:
                    self.on_reentry()
            self.engaged = True
            try:
                callback()
            finally:
                self.engaged = before

        return guarded


class BottomHalf:
    """Made by AioContext.bottom_half(). Belongs to one context for life."""

    __slots__ = ("_name", "callback", "cancelled", "context", "idle", "queued")

    def __init__(self, context: AioContext, callback: Callable[[], object], name: str) -> None:
        self.context = context
        self.callback = callback
        self._name = name
        self.queued = False  # it stands in the context's list
        self.cancelled = False  # but its callback is not wanted any more
        self.idle = False  # wanted when there is nothing better to do

    @property
    def name(self) -> str:
        return self._name or name_of(self.callback)

    @property
    def scheduled(self) -> bool:
        """Whether the callback is going to run."""
        return (self.queued and not self.cancelled) or self.idle

    def schedule(self) -> None:
        """Run the callback in the context's next poll. Callable from any thread and from signal handlers.

        Several calls before the run make one run. Scheduled from a bottom half, it runs in the next poll. After
        delete() nothing happens."""
        self.cancelled = False
        if not self.queued:
            self.queued = True
            context = self.context
            append = context.append_half
            append(self)
            if context.notify_me:
                context.wake_up()

    def schedule_idle(self) -> None:
        """Run the callback when the context has nothing better to do, within 10 ms. Such a run is not progress.

        Callable from any thread and from signal handlers. A schedule() on top turns it into an ordinary one."""
        if not self.scheduled:
            self.idle = True
            context = self.context
            context.idle_halves.append(self)
            # Who sleeps has to learn that he may not sleep for long. The loop itself, which goes on to compute
            # how long it may sleep, need not be told, or it would not sleep at all.
            if context.notify_me or not context.is_home:
                context.notify()

    def cancel(self) -> None:
        """Take back a schedule(). From another thread it may come too late; it never waits."""
        self.cancelled = True
        self.idle = False

    def delete(self) -> None:
        """Cancel for good. Callable from any thread and from the callback itself."""
        self.cancel()
        self.callback = _nothing  # what it holds is held no longer
        self.__class__ = _Deleted

    def __repr__(self) -> str:
        return f"<BottomHalf {self.name!r} {'scheduled' if self.scheduled else 'not scheduled'}>"


class _Deleted(BottomHalf):
    """What a bottom half is after delete(), so that the others need not ask themselves."""

    __slots__ = ()

    def schedule(self) -> None:
        pass

    def schedule_idle(self) -> None:
        pass

    def __repr__(self) -> str:
        return f"<BottomHalf {self._name!r} deleted>"


def name_of(callback: Any) -> str:
    """What to call a callback that was given no name."""
    return getattr(callback, "__qualname__", None) or repr(callback)


def _nothing() -> None:
    pass
