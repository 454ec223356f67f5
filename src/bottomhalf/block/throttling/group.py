# SPDX-License-Identifier: Apache-2.0
"""Groups: members, each in a context of its own, share one set of limits fairly.

    group = throttle_groups(graph).create("slow", Limits.from_options({"iops-total": 100}))
    member = ThrottleMember(group, "disk0", context, child.submit_batch)
    pending = member.submit(requests)

While the limits leave room for a whole batch it goes on as it came. Nothing is made for a request that need not wait.
What does not fit queues up at its member, per direction, and from then on everybody in the group queues up behind it,
each at his own member. One timer per direction is armed in the whole group, in the context of the member whose turn is
next. When it is due, requests go in turn, one of each member that has some, for as long as there is room; those of
members in other contexts are handed there.

The group's state is under a lock that is held for a few additions, for the members may belong to several threads.

A member that leaves its context takes the timer along. If that was the armed one, somebody else's has to be armed
instead, or the others' requests wait for ever: QEMU had that defect (a timer that was forgotten was still believed to
be armed). What the member itself has queued goes on when it has a context again.

Drained, a member lets everything go at once, limits or not: a drain must not take as long as the limits say. It counts
nevertheless, and the others wait the longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

from bottomhalf.aio import AioContext
from bottomhalf.block.errors import BlockError
from bottomhalf.block.throttling.limits import Limits
from bottomhalf.block.throttling.state import DIRECTIONS, READ_DIRECTION, WRITE_DIRECTION, ThrottleState, ThrottleTimers
from bottomhalf.host.request import READ, Request, deliver
from bottomhalf.host.threads import Lock

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph

Submit: TypeAlias = Callable[[list[Request]], list[Request]]


class ThrottleMember:
    """One queue for reads and one for writes in front of ``send``. Home thread of its context, except close()."""

    def __init__(self, group: ThrottleGroup, name: str, context: AioContext, send: Submit) -> None:
        self.group = group
        self.name = name
        self._take_context(context)
        self.limits_disabled = 0  # depth of drained sections
        self.timers = ThrottleTimers(
            context, partial(self._due, READ_DIRECTION), partial(self._due, WRITE_DIRECTION), group.clock
        )
        self.queues: tuple[deque[Request], deque[Request]] = (deque(), deque())
        self._send = send
        group.register(self)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self.queues[READ_DIRECTION]) + len(self.queues[WRITE_DIRECTION])

    def submit(self, requests: list[Request]) -> list[Request]:
        """Take requests of one op; those that are not done yet."""
        group = self.group
        direction = READ_DIRECTION if requests[0].op == READ else WRITE_DIRECTION
        if self.may_pass(direction, requests):
            return self._send(requests)
        now, later = group.admit_some(self, direction, requests)
        if not now:
            return later
        return [*self._send(now), *later]

    def may_pass(self, direction: int, requests: list[Request]) -> bool:
        """Whether all of them may be done now; then they are accounted for."""
        group = self.group
        if not group.state.enabled and not group.queued:
            return True
        return group.admit(self, direction, requests)

    def _due(self, direction: int) -> None:
        self.group.timer_due(self, direction)

    def go(self, requests: list[Request]) -> None:
        """Send what has waited; it may be of several ops."""
        begin, count = 0, len(requests)
        while begin < count:
            end, op = begin + 1, requests[begin].op
            while end < count and requests[end].op == op:
                end += 1
            batch = requests[begin:end]
            begin = end
            pending = self._send(batch)
            if pending:  # not by ``result``: an engine may have noted that of a pending one already
                held = {id(request) for request in pending}
                batch = [request for request in batch if id(request) not in held]
            if batch:
                deliver(batch)

    def drain_begin(self) -> None:
        """Let everything go, soon: called from any thread, and nothing may be sent from in here."""
        self.limits_disabled += 1
        self.context.schedule_oneshot(self._flush_queues)

    def _flush_queues(self) -> None:
        if self.limits_disabled:
            self.group.restart(self)

    def drain_end(self) -> None:
        self.limits_disabled -= 1

    def detach(self) -> None:
        """Leave the context. What is queued stays so until attach()."""
        self.group.detach(self)

    def attach(self, context: AioContext) -> None:
        """Go on in another context, after detach(). Main thread, nothing is in flight below."""
        self._take_context(context)
        self.timers.attach(context)
        self.group.restart(None)

    def _take_context(self, context: AioContext) -> None:
        self.context = context
        self.now_ns = context.clocks[self.group.clock].now_ns  # asked for every list

    def close(self) -> None:
        """Leave the group. Nothing is queued."""
        assert not self.waiting
        if self.timers.initialised:
            self.detach()
        self.group.unregister(self)


class ThrottleGroup:
    """Limits and the members that share them."""

    def __init__(self, name: str, limits: Limits | None = None, clock: str = "realtime") -> None:
        limits = limits or Limits()
        limits.check()
        self.name = name
        self.clock = clock
        self.state = ThrottleState(limits)
        self.members: list[ThrottleMember] = []
        self._lock = Lock()
        self._waiting = [0, 0]  # requests queued at members
        self._turn: list[ThrottleMember | None] = [None, None]  # who went last
        self._armed: list[ThrottleMember | None] = [None, None]  # whose timer is

    @property
    def queued(self) -> int:
        """Requests that wait, of all members."""
        return self._waiting[READ_DIRECTION] + self._waiting[WRITE_DIRECTION]

    @property
    def limits(self) -> Limits:
        return self.state.limits

    def set_limits(self, limits: Limits) -> None:
        """Other limits from now on, also for what waits. BlockError if they are not valid; then nothing changes."""
        limits.check()
        now_ns = self._now_ns()
        with self._lock:
            self.state.configure(limits, now_ns)
        self.restart(None)

    def _now_ns(self) -> int:
        return self.members[0].now_ns() if self.members else 0

    # -- members ------------------------------------------------------------------------------------------------

    def register(self, member: ThrottleMember) -> None:
        with self._lock:
            self.members.append(member)

    def unregister(self, member: ThrottleMember) -> None:
        with self._lock:
            self.members.remove(member)
            for direction in DIRECTIONS:
                if self._turn[direction] is member:
                    self._turn[direction] = None

    def detach(self, member: ThrottleMember) -> None:
        """The member has no timers any more; somebody else's is armed if it was his turn."""
        with self._lock:
            member.timers.detach()
            for direction in DIRECTIONS:
                if self._armed[direction] is member:
                    self._armed[direction] = None
        self.restart(None)

    # -- requests -----------------------------------------------------------------------------------------------

    def admit(self, member: ThrottleMember, direction: int, requests: list[Request]) -> bool:
        """Whether all of them may go at once; then they are accounted for."""
        now_ns = member.now_ns()
        with self._lock:
            return not self._waiting[direction] and self.state.admit(direction, requests, now_ns)

    def admit_some(
        self, member: ThrottleMember, direction: int, requests: list[Request]
    ) -> tuple[list[Request], list[Request]]:
        """(those that may go at once, those that are queued)."""
        state, queue = self.state, member.queues[direction]
        with self._lock:
            state.leak(member.now_ns())
            disabled, count = bool(member.limits_disabled) and not queue, 0
            for request in requests:
                if not disabled and (self._waiting[direction] or state.wait_ns(direction)):
                    break
                state.account(direction, request.length)
                count += 1
            later = requests[count:]
            if later:
                queue.extend(later)
                self._waiting[direction] += len(later)
                self._arm(direction)
        return requests[:count], later

    def timer_due(self, member: ThrottleMember, direction: int) -> None:
        with self._lock:
            if self._armed[direction] is not member:
                return
            self._armed[direction] = None
            released = self._take(direction, member.now_ns())
        self._go(released, member.context)

    def restart(self, member: ThrottleMember | None) -> None:
        """Look again at what waits: a member lets its queue go (in its own thread), or the limits have changed."""
        everything: list[dict[ThrottleMember, list[Request]]] = []
        now_ns = self._now_ns()
        with self._lock:
            for direction in DIRECTIONS:
                if member is not None:
                    queue = member.queues[direction]
                    for request in queue:
                        self.state.account(direction, request.length)
                    self._waiting[direction] -= len(queue)
                    if queue:
                        everything.append({member: list(queue)})
                    queue.clear()
                armed = self._armed[direction]
                if armed is not None:
                    armed.timers.cancel(direction)
                    self._armed[direction] = None
                everything.append(self._take(direction, now_ns))
        here = member.context if member is not None else None
        for released in everything:
            self._go(released, here)

    def _take(self, direction: int, now_ns: int) -> dict[ThrottleMember, list[Request]]:
        """Take requests out of the queues, in turn, for as long as there is room. Then a timer is armed. Locked."""
        state = self.state
        released: dict[ThrottleMember, list[Request]] = {}
        state.leak(now_ns)
        while self._waiting[direction]:
            member = self._next(direction)
            if member is None or (not member.limits_disabled and state.wait_ns(direction)):
                break
            request = member.queues[direction].popleft()
            self._waiting[direction] -= 1
            state.account(direction, request.length)
            released.setdefault(member, []).append(request)
            self._turn[direction] = member
        self._arm(direction)
        return released

    def _next(self, direction: int) -> ThrottleMember | None:
        """The member after the one that went last, among those that have requests and a timer. Locked."""
        members, last = self.members, self._turn[direction]
        start = members.index(last) + 1 if last is not None else 0
        for number in range(len(members)):
            member = members[(start + number) % len(members)]
            if member.queues[direction] and member.timers.initialised:
                return member
        return None

    def _arm(self, direction: int) -> None:
        """See to it that a timer is armed if somebody waits. Locked; the buckets have leaked."""
        if self._armed[direction] is None and self._waiting[direction]:
            member = self._next(direction)
            if member is not None:
                self._armed[direction] = member
                member.timers.arm_ns(direction, self.state.previous_leak_ns + self.state.wait_ns(direction))

    def _go(self, released: dict[ThrottleMember, list[Request]], here: AioContext | None) -> None:
        """Send what was taken out of the queues, each member's in its own context; ``here`` is the caller's."""
        for member, requests in released.items():
            if member.context is here:
                member.go(requests)
            else:
                member.context.schedule_oneshot(partial(member.go, requests))


class ThrottleGroups:
    """The groups of a graph, by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, ThrottleGroup] = {}

    def create(self, name: str, limits: Limits | None = None) -> ThrottleGroup:
        """A new group. BlockError if the name is taken or the limits are not valid."""
        if name in self.by_name:
            raise BlockError(f"A throttle group with name '{name}' exists already")
        group = self.by_name[name] = ThrottleGroup(name, limits)
        return group

    def find(self, name: str) -> ThrottleGroup:
        group = self.by_name.get(name)
        if group is None:
            raise BlockError(f"Throttle group '{name}' does not exist")
        return group

    def delete(self, name: str) -> None:
        """Forget a group that nobody is a member of. BlockError otherwise."""
        if self.find(name).members:
            raise BlockError(f"object '{name}' is in use, can not be deleted")
        del self.by_name[name]


_groups: WeakKeyDictionary[Graph, ThrottleGroups] = WeakKeyDictionary()


def throttle_groups(graph: Graph) -> ThrottleGroups:
    """The groups of a graph. Main thread."""
    groups = _groups.get(graph)
    if groups is None:
        groups = _groups[graph] = ThrottleGroups()
    return groups
