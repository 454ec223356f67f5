# SPDX-License-Identifier: Apache-2.0
"""Bottom halves: "run this soon, once, in that context's thread".

    half = context.bottom_half(send_replies, name="send replies")
    half.schedule()          # from any thread, from a signal handler, as often as you like: one run
    half.delete()

A bottom half is three booleans and a place in a list. They are separate attributes because testing bits of one
word costs a third more. No lock guards them: scheduling sets ``scheduled`` before it looks at ``queued``, the loop
clears ``queued`` before it looks at ``scheduled``; whoever comes second sees the other. Two threads may both put
it into the list; the second entry then finds nothing scheduled and does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext


class BottomHalf:
    """Made by AioContext.bottom_half(). Belongs to one context for life."""

    __slots__ = ("_append", "callback", "context", "deleted", "idle", "name", "queued", "scheduled")

    def __init__(self, context: AioContext, append: Any, callback: Callable[[], object], name: str) -> None:
        self.context = context
        self.callback = callback
        self.name = name
        self.scheduled = False  # the callback is wanted
        self.queued = False  # it stands in the context's list
        self.idle = False  # scheduled by schedule_idle() only
        self.deleted = False
        self._append = append

    def schedule(self) -> None:
        """Run the callback in the context's next poll. Callable from any thread and from signal handlers.

        Several calls before the run make one run. Scheduled from a bottom half, it runs in the next poll."""
        self.idle = False
        self.scheduled = True
        if not self.queued:
            self.queued = True
            self._append(self)
        context = self.context
        context.notified = True
        if context.notify_me:
            context.wake_up()

    def schedule_idle(self) -> None:
        """Run the callback when the context has nothing better to do, within 10 ms. Such a run is not progress.

        Callable from any thread. A schedule() on top turns it into an ordinary one."""
        if self.scheduled and not self.idle:
            return
        self.idle = True
        self.scheduled = True
        if not self.queued:
            self.queued = True
            self._append(self)
        self.context.notify_idle()

    def cancel(self) -> None:
        """Take back a schedule(). From another thread it may come too late; it never waits."""
        self.scheduled = False
        self.idle = False

    def delete(self) -> None:
        """Cancel for good. Callable from any thread and from the callback itself."""
        self.deleted = True
        self.scheduled = False

    def __repr__(self) -> str:
        state = "deleted" if self.deleted else "scheduled" if self.scheduled else "not scheduled"
        return f"<BottomHalf {self.name!r} {state}>"
