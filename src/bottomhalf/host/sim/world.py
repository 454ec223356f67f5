# SPDX-License-Identifier: Apache-2.0
"""The simulated world: one clock, one list of what will happen, one table of descriptors, one seed.

A real machine lets time pass, finishes I/O and delivers bytes while the program computes; tests of such a
program sleep, fail once a week and cannot be repeated. Here nothing happens by itself. Time stands still
while the program computes and moves only when it waits, straight to the next thing that was going to happen.
Therefore a test of an hour takes a millisecond, the same seed gives the same run, and a wait that nothing can
end is recognised at once.

    world = World(seed=7)
    world.at(5_000, lambda: print("five microseconds later"))
    world.step()  # moves the clock there and runs it

What must live here: time, the schedule, chance, the descriptor table, the trace. No file, no socket.
"""

from __future__ import annotations

import errno
import os
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from bottomhalf.host.sim.threads import Threads

START_NS: Final = 1_000_000_000_000  # a machine that has been up for a quarter of an hour
EPOCH_NS: Final = 1_700_000_000_000_000_000  # the wall clock when the simulation starts
FIRST_FD: Final = 1000  # so that a number of this world is never a descriptor of the real process
TRACE_ENTRIES_MAX: Final = 1_000_000  # the oldest fall out
SPINS_MAX: Final = 1_000_000  # waits at one instant of virtual time before it is called a livelock
IDLE_LOOKS_FREE: Final = 16  # looks for work, without waiting, before they begin to take time
LOOK_NS: Final = 1_000  # what each of them then takes
LOOKS_PER_SPIN: Final = 10  # looks at the clock count less: a program may look for every request


class Deadlock(RuntimeError):
    """A wait without end that nothing can end, or a loop that turns for ever without time passing."""


@dataclass
class Odds:
    """Probabilities (0 to 1) of what is legal and unkind. The defaults suit tests; ``Odds.calm()`` is a host
    that does only what everybody expects, though still in an order that the seed chose."""

    part_of_ready: float = 0.25  # a wait reports only some of the ready descriptors
    empty_wait: float = 0.0  # a wait comes back early with nothing, as after a signal
    short_send: float = 0.25  # a send takes fewer bytes than there is room for
    short_recv: float = 0.25  # a receive gives fewer bytes than have arrived
    evict: float = 0.25  # a page of a file with cached="random" left the page cache
    refuse_inline_write: float = 0.25  # write_inline leaves a request of such a file to the engine
    coalesce: float = 0.5  # what one enter() starts completes all at once
    at_once: float = (
        0.1  # a request is finished when enter() returns; ``pending`` tells, ``fileno()`` does not
    )
    slow: float = 0.03  # a request takes a hundred times as long as usual
    switch: float = 0.05  # a call of the host lets another thread run first

    @classmethod
    def calm(cls) -> Odds:
        return cls(**{field.name: 0.0 for field in fields(cls)})


class Scheduled:
    """Something that will happen; ``cancel()`` prevents it."""

    __slots__ = ("action", "time_ns")

    def __init__(self, time_ns: int, action: Callable[[], object]) -> None:
        self.time_ns = time_ns
        self.action: Callable[[], object] | None = action

    def cancel(self) -> None:
        self.action = None


class Descriptor:
    """What has a number in the descriptor table and, unless it is a file, can be polled."""

    pollable: ClassVar[bool] = True

    def __init__(self, world: World) -> None:
        self.world = world
        self.closed = False
        self._home: int | None = None
        self._fd = world.add_descriptor(self)

    def fileno(self) -> int:
        """The number, -1 once closed (as a socket object answers)."""
        return -1 if self.closed else self._fd

    def readiness(self) -> int:
        """The readiness mask now."""
        return 0

    def forget(self, fd: int) -> None:
        """Another descriptor was closed."""

    def explain(self) -> str:
        """What it has to say about a wait that nothing can end."""
        return ""

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.world.drop_descriptor(self._fd)

    def check_open(self) -> None:
        if self.closed:
            raise failure(errno.EBADF)

    def check_home(self) -> None:
        """The first thread to use it is the only one that may."""
        thread_id = self.world.thread_id
        if self._home is None:
            self._home = thread_id
        elif self._home != thread_id:
            raise RuntimeError(f"{self!r} belongs to thread {self._home}, used from thread {thread_id}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd {self._fd}{' closed' if self.closed else ''}>"


class World:
    """Time, chance and descriptors of one simulated host."""

    def __init__(self, seed: int, odds: Odds | None, trace: bool) -> None:
        self.seed = seed
        self.odds = Odds() if odds is None else odds
        self.now_ns = START_NS
        self.realtime_offset_ns = EPOCH_NS - START_NS
        self.thread_id = 1
        self.threads: Threads
        self.acting = False  # something happens by itself; no thread takes part in it
        self.descriptors: dict[int, Descriptor] = {}
        self.explain: Callable[[], str] | None = None  # the program's own words about who waits for what
        self.reports: list[Callable[[], str]] = []  # the same of parts of this host
        self.trace: deque[tuple[Any, ...]] | None = deque(maxlen=TRACE_ENTRIES_MAX) if trace else None
        # One stream of chance per subject: another request to the disk does not change what the sockets do.
        self.order = self.chance("order")
        self.disk = self.chance("disk")
        self.network = self.chance("network")
        self._free_fds: list[int] = []
        self._next_fd = FIRST_FD
        self._schedule: list[tuple[int, float, int, Scheduled]] = []
        self._sequence = 0
        self.spins_max = SPINS_MAX
        self._spins = 0  # waits at this instant
        self._looks = 0  # looks at the clock at this instant
        self._idle = 0  # looks for work at this instant that found none
        self._instant_ns = START_NS

    def chance(self, subject: str) -> random.Random:
        """A stream of random numbers for one subject, from the seed."""
        return random.Random(f"{self.seed}/{subject}")

    def note(self, what: str, *details: Any) -> None:
        """Write a line of the trace."""
        if self.trace is not None:
            self.trace.append((self.now_ns - START_NS, what, *details))

    # Descriptors

    def add_descriptor(self, descriptor: Descriptor) -> int:
        """The lowest free number: a kernel reuses numbers at once, and so do we, to find who keeps stale
        ones."""
        if self._free_fds:
            fd = heappop(self._free_fds)
        else:
            fd, self._next_fd = self._next_fd, self._next_fd + 1
        self.descriptors[fd] = descriptor
        return fd

    def drop_descriptor(self, fd: int) -> None:
        del self.descriptors[fd]
        heappush(self._free_fds, fd)
        for descriptor in self.descriptors.values():
            descriptor.forget(fd)  # a closed descriptor leaves every poller

    def drop_everything(self) -> None:
        """The program is gone: nothing that it opened or expected is left."""
        for _, _, _, scheduled in self._schedule:
            scheduled.cancel()
        self._schedule.clear()
        for descriptor in self.descriptors.values():
            descriptor.closed = True
        self.descriptors.clear()
        self._free_fds.clear()
        self._next_fd = FIRST_FD

    # Time

    def at(self, delay_ns: int, action: Callable[[], object], *, any_order: bool = False) -> Scheduled:
        """Have something happen after a delay. What happens at the same instant happens in the order in which
        it was asked for, or, with ``any_order``, in an order that the seed chooses."""
        if delay_ns < 0:
            raise ValueError(f"delay_ns is {delay_ns}, not 0 or more")
        self._sequence += 1
        scheduled = Scheduled(self.now_ns + delay_ns, action)
        tie = self.order.random() if any_order else 0.0
        heappush(self._schedule, (scheduled.time_ns, tie, self._sequence, scheduled))
        return scheduled

    def next_time_ns(self) -> int | None:
        """When the next thing happens, None if nothing ever will."""
        while self._schedule and self._schedule[0][3].action is None:
            heappop(self._schedule)
        return self._schedule[0][0] if self._schedule else None

    def run_due(self) -> None:
        """Let everything happen whose time has come. What that schedules for the same instant is for the next
        call, so that a chain of such things cannot keep this one for ever."""
        last_sequence = self._sequence
        later: list[tuple[int, float, int, Scheduled]] = []
        acting, self.acting = self.acting, True
        try:
            while self._schedule and self._schedule[0][0] <= self.now_ns:
                entry = heappop(self._schedule)
                if entry[2] > last_sequence:
                    later.append(entry)
                    continue
                action, entry[3].action = entry[3].action, None
                if action is not None:
                    action()
        finally:
            self.acting = acting
            for entry in later:
                heappush(self._schedule, entry)

    def step(self) -> bool:
        """Move the clock to the next thing and let it happen; False if nothing is going to."""
        next_ns = self.next_time_ns()
        if next_ns is None:
            return False
        self.now_ns = max(self.now_ns, next_ns)
        self.run_due()
        return True

    def advance(self, delta_ns: int) -> None:
        """Let time pass, and all that happens in it."""
        end_ns = self.now_ns + delta_ns
        while (next_ns := self.next_time_ns()) is not None and next_ns <= end_ns:
            self.step()
            self.count_spin()
        self.now_ns = max(self.now_ns, end_ns)

    def block(self, delay_ns: int) -> None:
        """A call that waits inside the kernel: time passes, and the program is not there to see what
        happens."""
        self.now_ns += delay_ns

    def count_spin(self) -> None:
        """Called once per wait: a loop that never lets time pass is as stuck as one that sleeps for ever."""
        self._notice_time()
        self._spins += 1
        if self._spins > self.spins_max:
            self._spins = 0
            raise self._stuck(f"{self.spins_max} waits")

    def count_look(self) -> None:
        """The same for every look at the clock: somebody may be waiting for it to move."""
        self._notice_time()
        self._looks += 1
        if self._looks > self.spins_max * LOOKS_PER_SPIN:
            self._looks = 0
            raise self._stuck(f"{self.spins_max * LOOKS_PER_SPIN} looks at the clock")

    def idle_look(self) -> None:
        """The program looked for work without waiting and found none. One that does so again and again is
        polling busily until some time has passed; then each look takes a little time."""
        self.threads.looked_in_vain()
        self._notice_time()
        self._idle += 1
        if self._idle > IDLE_LOOKS_FREE:
            self.now_ns += LOOK_NS
            self._instant_ns = self.now_ns  # this alone is no progress

    def found_work(self) -> None:
        """The program found some."""
        self._idle = 0

    def _notice_time(self) -> None:
        if self._instant_ns != self.now_ns:
            self._instant_ns = self.now_ns
            self._spins = self._looks = self._idle = 0

    def _stuck(self, what: str) -> Deadlock:
        return Deadlock(
            self.explained(
                f"{what} without time passing: something stays ready and nobody takes it, or a loop that "
                "does not wait expects what only time can bring"
            )
        )

    def explained(self, sentence: str) -> str:
        """The sentence, what else is known, and the seed."""
        parts = [sentence]
        acting, self.acting = self.acting, True  # whoever explains is not interrupted
        try:
            parts += [text for descriptor in self.descriptors.values() if (text := descriptor.explain())]
            parts += [text for report in self.reports if (text := report())]
            if self.explain is not None:
                parts.append(self.explain())
        finally:
            self.acting = acting
        parts.append(f"seed {self.seed}")
        return "; ".join(parts)


def failure(number: int, path: str | None = None) -> OSError:
    """The OSError of an errno, worded and typed as the real one."""
    if path is None:
        return OSError(number, os.strerror(number))
    return OSError(number, os.strerror(number), path)
