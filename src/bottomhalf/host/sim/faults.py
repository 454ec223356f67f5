# SPDX-License-Identifier: Apache-2.0
"""Faults on demand, and how long things take.

The fault model, as a contract between this host and the code above it. Each of these happens to real
programs, and the code above must survive it without losing what it promised to anybody:

=====================  =================================================================================
where                  what may happen
=====================  =================================================================================
READ                   fails with an errno; the buffer's content is then undefined
WRITE                  fails with an errno; each sector of the range is then old or new
READ, WRITE            move fewer bytes than asked; the engine goes on with the rest (as its contract says), which
                       others may overtake, or which fails with an errno
FLUSH                  fails with an errno; unsynced writes may then be lost although a later flush succeeds
DISCARD, WRITE_ZEROES  fail with an errno; nothing changed
COPY_RANGE             fails with an errno; each sector of the range is then old or new
any request            takes as long as it likes, is overtaken by others, or does not complete at all
OPEN, TRUNCATE         fail with an errno; nothing changed
CONNECT, ACCEPT        fail with an errno; the peer of a failed accept stays in the queue
send, recv             move fewer bytes than asked; the stream ends or is reset at any byte (``host.cut``)
any allocation         ENOSPC, with the part that fitted written (``host.disk_free_bytes``)
power                  see ``disk``: which unsynced writes survive (``host.crash``)
=====================  =================================================================================

Outside the model: bytes that change silently, a clock that goes back (``realtime_ns`` may), memory that runs
out.

    fault = host.fault(path="a.raw", op=WRITE, errno=EIO, times=1)
    fault = host.fault(path="a.raw", op=READ, hold=True)  # in flight until fault.release()
    fault = host.fault(path="a.raw", op=WRITE, short=512)  # 512 bytes, then the rest; with an errno: then that
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from bottomhalf.host.request import (
    BLOCK_STATUS,
    COPY_RANGE,
    DISCARD,
    FLUSH,
    OP_NAMES,
    READ,
    TRUNCATE,
    WRITE,
    WRITE_ZEROES,
)
from bottomhalf.host.sim.world import World

# Operations that are not requests.
OPEN: Final = 100
CONNECT: Final = 102
ACCEPT: Final = 103

_OTHER_NAMES: Final = {OPEN: "open", CONNECT: "connect", ACCEPT: "accept"}


def op_name(op: int | None) -> str:
    """For messages."""
    if op is None:
        return "any operation"
    return OP_NAMES[op] if op < len(OP_NAMES) else _OTHER_NAMES[op]


class Fault:
    """One rule: which operations it strikes, how, and how often. ``remove()`` ends it."""

    def __init__(
        self,
        world: World,
        path: str | None,
        op: int | None,
        errno: int,
        start: int,
        end: int | None,
        after: int,
        times: int | None,
        delay_ns: int,
        hold: bool,
        short: int | None,
    ) -> None:
        if not (errno or delay_ns or hold or short is not None):
            raise ValueError("a fault needs an errno, a delay_ns, hold=True or short")
        if short is not None and short < 1:
            raise ValueError(f"short is {short}: a device moves one byte at least, or says an errno")
        self.path = path
        self.op = op
        self.errno = errno
        self.start = start
        self.end = end
        self.delay_ns = delay_ns
        self.hold = hold
        self.short = short  # bytes that a READ or WRITE moves at first
        self.struck: list[int] = []  # the ops of the operations struck so far
        self.active = True
        self._world = world
        self._skip = after
        self._left = times
        self._held: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<Fault {op_name(self.op)} of {self.path or 'any path'}, {self.hits} hits>"

    @property
    def hits(self) -> int:
        """How many operations it has struck."""
        return len(self.struck)

    @property
    def waits(self) -> bool:
        """Whether what it strikes cannot be done at once."""
        return self.hold or self.delay_ns > 0 or self.short is not None

    def part(self, op: int, length: int) -> int:
        """How many bytes of such a request move at first; 0: all that do move at once."""
        if self.short is None or op not in (READ, WRITE) or length < 2:
            return 0
        return min(self.short, length - 1)

    @property
    def held(self) -> int:
        """How many requests are in flight because of it."""
        return len(self._held)

    def release(self, count: int | None = None) -> None:
        """Let the held requests (the oldest ``count``) go on. The rule stays; see remove()."""
        count = len(self._held) if count is None else count
        released, self._held = self._held[:count], self._held[count:]
        for resume in released:
            self._world.at(0, resume, any_order=True)

    def remove(self) -> None:
        """Strike no more, and let go what is held."""
        self.active = False
        self.release()

    def keep(self, resume: Callable[[], None]) -> None:
        """The engine's: hold a request."""
        self._held.append(resume)

    def drop_held(self) -> None:
        """The program that waited is gone."""
        self._held.clear()

    def strikes(self, path: str, op: int, offset: int, length: int) -> bool:
        """Whether the rule is about this operation."""
        return (
            self.active
            and self._left != 0
            and self.op in (None, op)
            and self.path in (None, path)
            and (self.end is None or offset < self.end)
            and offset + max(length, 1) > self.start
        )

    def count(self, op: int) -> bool:
        """Count a matching operation; whether it is struck."""
        if self._skip:
            self._skip -= 1
            return False
        if self._left is not None:
            self._left -= 1
        self.struck.append(op)
        return True


class Faults:
    """The rules of a host. The first that matches decides."""

    def __init__(self) -> None:
        self.rules: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        self.rules.append(fault)
        return fault

    def peek(self, path: str, op: int, offset: int = 0, length: int = 0) -> Fault | None:
        """The rule that matches, without counting."""
        for fault in self.rules:
            if fault.strikes(path, op, offset, length):
                return fault
        return None

    def explain(self) -> str:
        """Which requests are held back, for the message of a deadlock."""
        return ", ".join(f"{fault.held} requests held by {fault!r}" for fault in self.rules if fault.held)

    def strike(self, path: str, op: int, offset: int = 0, length: int = 0) -> Fault | None:
        """The rule that strikes this operation, counted."""
        fault = self.peek(path, op, offset, length)
        return fault if fault is not None and fault.count(op) else None


@dataclass
class Latency:
    """How long requests take, as (least, most) nanoseconds by op: an NVMe drive with a cache by default."""

    ranges_ns: dict[int, tuple[int, int]] = field(
        default_factory=lambda: {
            READ: (20_000, 200_000),
            WRITE: (10_000, 150_000),
            FLUSH: (100_000, 2_000_000),
            DISCARD: (20_000, 500_000),
            WRITE_ZEROES: (20_000, 500_000),
            COPY_RANGE: (20_000, 500_000),
            TRUNCATE: (10_000, 200_000),
            BLOCK_STATUS: (1_000, 50_000),
        }
    )

    def draw(self, world: World, op: int) -> int:
        delay_ns = world.disk.randint(*self.ranges_ns[op])
        return delay_ns * 100 if world.disk.random() < world.odds.slow else delay_ns
