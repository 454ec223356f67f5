# SPDX-License-Identifier: Apache-2.0
"""Files on a disk that forgets: the content as programs see it, and what of it would survive a power cut.

A write that has completed lies in a volatile cache until a flush. After a power cut the disk holds everything
up to the last flush and, of the writes since then, any of them, whole or in part, whichever sectors the cache
happened to write back. Therefore a file here is three things: ``current``, what reads see; ``durable``, what
is certain; and the journal of changes between the two. ``survivor()`` plays the journal over the durable
content with a seeded fate for every change, and ``survivors`` enumerates the fates.

What a disk here promises, and the code above may rely on:

* a sector of 512 bytes is never torn;
* a flush makes durable what had completed before the flush *began*, not what completes while it runs;
* a write with FUA is durable when it completes, and older unsynced writes never come back over it;
* after a failed flush, the changes that it was about may be lost although the next flush succeeds (Linux
  marks the pages clean). A failed write leaves old bytes, new bytes, or some sectors of each.

What it does not promise: any order among unsynced changes to different sectors, sizes included.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any, Final

from bottomhalf.host.protocol import DeviceLimits
from bottomhalf.host.sim.locks import LockTable
from bottomhalf.host.sim.store import PAGE, Store
from bottomhalf.host.sim.world import World

SECTOR: Final = 512
WRITEBACK_BYTES: Final = 64 << 20  # unsynced bytes per file before the oldest half is written back

_WRITE: Final = 0
_ZERO: Final = 1
_RESIZE: Final = 2


class Change:
    """One change that may not be durable yet."""

    __slots__ = ("data", "doomed", "durable", "grow", "kind", "length", "number", "offset", "unmap")

    def __init__(
        self,
        kind: int,
        offset: int,
        length: int,
        data: bytes = b"",
        unmap: bool = False,
        grow: bool = True,
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.data = data
        self.unmap = unmap
        self.grow = grow
        self.number = 0  # among the changes of all files
        self.durable = False
        self.doomed = False  # a flush that covered it failed

    def __repr__(self) -> str:
        if self.kind == _RESIZE:
            return f"{self.offset:#x} bytes large"
        what = ("write", "zero, unmap" if self.unmap else "zero")[self.kind]
        return f"{what} {self.offset:#x} to {self.offset + self.length:#x}"

    def apply(self, store: Store, start: int, end: int) -> None:
        """Apply the part between two offsets."""
        if self.kind == _WRITE:
            store.write(start, self.data[start - self.offset : end - self.offset])
        elif self.kind == _ZERO:
            store.zero(start, end - start, unmap=self.unmap, grow=self.grow)

    def apply_whole(self, store: Store) -> None:
        if self.kind == _RESIZE:
            store.resize(self.offset)
        else:
            self.apply(store, self.offset, self.offset + self.length)

    def apply_by_chance(self, store: Store, chance: random.Random) -> None:
        """All of it, nothing, or some of the sectors."""
        fate = chance.randrange(3)
        if fate == 0:
            return
        if fate == 1 or self.kind == _RESIZE:
            self.apply_whole(store)
            return
        start, end = self.offset, self.offset + self.length
        while start < end:
            stop = min(end, start - start % SECTOR + SECTOR)
            if chance.random() < 0.5:
                self.apply(store, start, stop)
            start = stop


class Disk:
    """The space that all files share."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.free_bytes: int | None = None  # None: as much as anybody wants
        self.files: dict[str, Inode] = {}
        self.directories: set[str] = set()
        self.changes = 0  # so many there were
        self.before_durable: Callable[[], object] | None = None  # something is about to become so

    def take(self, pages: int) -> int:
        """Take space for as many of the pages as there is; how many that is."""
        if self.free_bytes is None:
            return pages
        taken = min(pages, self.free_bytes // PAGE)
        self.free_bytes -= taken * PAGE
        return taken

    def give_back(self, pages: int) -> None:
        if self.free_bytes is not None:
            self.free_bytes += pages * PAGE


class Inode:
    """One file, however often it is open. All its operations return 0 or a negative errno."""

    def __init__(self, disk: Disk, path: str, content: Store, cached: str) -> None:
        self.disk = disk
        self.path = path
        self.current = content
        self.durable = content.copy()
        self.locks = LockTable(path)
        self.readable = True
        self.writable = True
        self.can_zero = True  # the file system knows fallocate's ZERO_RANGE and PUNCH_HOLE
        self.can_discard = True
        self.can_copy = True  # copy_file_range
        self.status_waits = False  # a network file system
        self.device: DeviceLimits | None = None  # a block device: it has its size, and no holes
        self.cached = cached
        self.resident: dict[int, bool] = {}  # pages in memory; those not named were not decided yet
        self._journal: list[Change] = []
        self._journal_start = 0  # number of the journal's first change
        self._journal_bytes = 0

    # Content

    def write(self, offset: int, data: Any, durable: bool) -> int:
        """Write as much as there is space for; ENOSPC if that is not all."""
        length = len(data)
        missing = self.current.missing(offset, length)
        taken = self.disk.take(len(missing))
        full = taken < len(missing)
        if full:
            length = max(0, missing[taken] * PAGE - offset)
        if length:
            change = Change(_WRITE, offset, length, bytes(data[:length]))
            change.apply_whole(self.current)
            self._log(change, durable)
            self.touch(offset, length)
        return -errno.ENOSPC if full else 0

    def write_badly(self, offset: int, data: Any) -> None:
        """A write that failed: some of its sectors may have arrived."""
        before = len(self.current.pages)
        change = Change(_WRITE, offset, len(data), bytes(data))
        start = offset
        while start < offset + len(data):
            stop = min(offset + len(data), start - start % SECTOR + SECTOR)
            if stop <= self.current.size and self.disk.world.disk.random() < 0.5:
                change.apply(self.current, start, stop)
                part = Change(_WRITE, start, stop - start, change.data[start - offset : stop - offset])
                self._log(part, False)
            start = stop
        self.disk.take(len(self.current.pages) - before)

    def zero(self, offset: int, length: int, *, unmap: bool, grow: bool, durable: bool) -> int:
        if not grow:
            length = min(length, max(0, self.current.size - offset))
        if not unmap:
            missing = self.current.missing(offset, length)
            taken = self.disk.take(len(missing))
            if taken < len(missing):
                self.disk.give_back(taken)
                return -errno.ENOSPC
        before = len(self.current.pages)
        change = Change(_ZERO, offset, length, unmap=unmap, grow=grow)
        if length:
            change.apply_whole(self.current)
            self._log(change, durable)
        if unmap:
            self.disk.give_back(before - len(self.current.pages))
        return 0

    def resize(self, size: int) -> None:
        before = len(self.current.pages)
        change = Change(_RESIZE, size, 0)
        change.apply_whole(self.current)
        self._log(change, False)
        self.disk.give_back(before - len(self.current.pages))

    # Page cache

    def in_memory(self, offset: int, length: int) -> bool:
        """Whether the page cache has it all. With cached="random" the answer may be different the next
        time."""
        if self.cached == "always":
            return True
        if self.cached == "never":
            return False
        end = min(offset + length, self.current.size)
        if offset >= end:
            return True
        pages = range(offset // PAGE, (end - 1) // PAGE + 1)
        resident = self.resident
        if self.cached == "explicit":
            return all(resident.get(page, False) for page in pages)
        chance = self.disk.world.disk
        if chance.random() < self.disk.world.odds.evict:
            resident[chance.choice(pages)] = False
        for page in pages:
            resident.setdefault(page, chance.random() < 0.5)
        return all(resident[page] for page in pages)

    def touch(self, offset: int, length: int) -> None:
        """The pages of the range have come into memory."""
        if length and self.cached in ("random", "explicit"):
            for page in range(offset // PAGE, (offset + length - 1) // PAGE + 1):
                self.resident[page] = True

    def evict(self, offset: int, length: int) -> None:
        for page in range(offset // PAGE, -(-(offset + length) // PAGE)):
            self.resident[page] = False

    # Durability

    @property
    def journal(self) -> list[Change]:
        """What has happened since the content that is certain, in order."""
        return self._journal

    def mark(self) -> int:
        """The point up to which a flush that begins now makes durable."""
        return self._journal_start + len(self._journal)

    def make_durable(self, mark: int) -> None:
        """A flush that began at the mark has succeeded."""
        covered = self._journal[: max(0, mark - self._journal_start)]
        if self.disk.before_durable is not None and not all(change.durable for change in covered):
            self.disk.before_durable()
        for change in covered:
            change.durable = True
        self._fold()

    def doom(self, mark: int) -> None:
        """A flush that began at the mark has failed."""
        for change in self._journal[: max(0, mark - self._journal_start)]:
            change.doomed = not change.durable

    def unfinished(self, offset: int, data: bytes) -> Change:
        """What a write that is under way may do."""
        return Change(_WRITE, offset, len(data), data)

    def add_unfinished(self, offset: int, data: bytes) -> None:
        """A write that was under way when the power went: it may be on the disk, nobody was told."""
        self._journal.append(self.unfinished(offset, data))

    def survivor(self, chance: random.Random) -> Store:
        """One of the contents that a power cut now could leave."""
        store = self.durable.copy()
        for change in self._journal:
            if change.durable and not change.doomed:
                change.apply_whole(store)
            else:
                change.apply_by_chance(store, chance)
        return store

    def become(self, content: Store) -> None:
        """After a restart: this is what the disk holds, and nothing is in memory."""
        self.disk.give_back(len(self.current.pages))
        self.disk.take(len(content.pages))
        self.current = content
        self.durable = content.copy()
        self._journal_start += len(self._journal)
        self._journal.clear()
        self._journal_bytes = 0
        self.resident.clear()
        self.locks = LockTable(self.path)

    def unsynced_changes(self) -> int:
        """How many changes a power cut now could lose."""
        return sum(1 for change in self._journal if not change.durable or change.doomed)

    def _log(self, change: Change, durable: bool) -> None:
        self.disk.changes += 1
        change.number = self.disk.changes
        self._journal.append(change)
        if durable and self.disk.before_durable is not None:
            self.disk.before_durable()
        change.durable = durable
        self._journal_bytes += len(change.data)
        if self._journal_bytes > WRITEBACK_BYTES:
            for old in self._journal[: len(self._journal) // 2 + 1]:
                old.durable = True  # the kernel did not wait for a flush
        self._fold()

    def _fold(self) -> None:
        """Move the changes at the head of the journal that are durable into the durable content."""
        count = 0
        for change in self._journal:
            if not change.durable:
                break
            if change.doomed:
                change.apply_by_chance(self.durable, self.disk.world.disk)
            else:
                change.apply_whole(self.durable)
            self._journal_bytes -= len(change.data)
            count += 1
        if count:
            del self._journal[:count]
            self._journal_start += count
