# SPDX-License-Identifier: Apache-2.0
"""Bottom halves: "run this soon, once, in that context's thread".

    half = context.bottom_half(send_replies, name="send replies")
    half.schedule()          # from any thread, from a signal handler, as often as you like: one run
    half.delete()

A bottom half is a few booleans and a place in a list. They are separate attributes because testing bits of one
word costs a third more, and all that is rare hides behind one of them. No lock guards them: scheduling sets
``scheduled`` before it looks at ``queued``, the loop clears ``queued`` before it looks at ``scheduled``; whoever
comes second sees the other. Looking at ``queued`` and setting it is one step, for the interpreter changes threads
only at calls and jumps back; were it two, a bottom half could stand in the list twice, and the second entry would
find nothing scheduled unless the callback has scheduled itself again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext


class BottomHalf:
    """Made by AioContext.bottom_half(). Belongs to one context for life."""

    __slots__ = ("_name", "callback", "context", "deleted", "idle", "queued", "rare", "scheduled")

    def __init__(self, context: AioContext, callback: Callable[[], object], name: str) -> None:
        self.context = context
        self.callback = callback
        self._name = name
        self.scheduled = False  # the callback is wanted
        self.queued = False  # it stands in the context's list
        self.rare = False  # was idle once, or is deleted: the loop has to look closer
        self.idle = False  # scheduled by schedule_idle() only
        self.deleted = False

    @property
    def name(self) -> str:
        return self._name or name_of(self.callback)

    def schedule(self) -> None:
        """Run the callback in the context's next poll. Callable from any thread and from signal handlers.

        Several calls before the run make one run. Scheduled from a bottom half, it runs in the next poll. After
        delete() nothing happens."""
        if self.rare:
            self.idle = False
        self.scheduled = True
        context = self.context
        if not self.queued:
            self.queued = True
            context.append_half(self)
        context.notified = True
        if context.notify_me:
            context.wake_up()

    def schedule_idle(self) -> None:
        """Run the callback when the context has nothing better to do, within 10 ms. Such a run is not progress.

        Callable from any thread. A schedule() on top turns it into an ordinary one."""
        if self.scheduled and not self.idle:
            return
        self.idle = True
        self.rare = True
        self.scheduled = True
        if not self.queued:
            self.queued = True
            self.context.append_half(self)
        self.context.notify_idle()

    def cancel(self) -> None:
        """Take back a schedule(). From another thread it may come too late; it never waits."""
        self.scheduled = False
        self.idle = False

    def delete(self) -> None:
        """Cancel for good. Callable from any thread and from the callback itself."""
        self.deleted = True
        self.rare = True
        self.scheduled = False

    def __repr__(self) -> str:
        state = "deleted" if self.deleted else "scheduled" if self.scheduled else "not scheduled"
        return f"<BottomHalf {self.name!r} {state}>"


def name_of(callback: Any) -> str:
    """What to call a callback that was given no name."""
    return getattr(callback, "__qualname__", None) or repr(callback)
