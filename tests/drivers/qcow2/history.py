# SPDX-License-Identifier: Apache-2.0
"""What a read may return while others write: a disk in cells, each with the values that may be in it.

Who has a disk to himself knows every byte. Several users at once do not: of two writes to the same place that are under
way at the same time either may be the last. What is certain: a write that began after another one's end replaces what
that left; a reader finds something that was there, or was being written, between his begin and his end; and once nobody
writes, what one reader found is what the next one finds. That is all that a disk promises, and all that is allowed.

Every change is an interval on a clock of its own, from begin() to end(). A cell is a few bytes that no change divides;
each write has values that no other has, so that a read tells whose it found.

    write = history.begin(first, values)     # cells from this one on
    ...
    history.end(write)

A change can be ``weak``: of the values and of what was there before, either may be left (a discard that need not be
done). ``fail()`` ends a change that was refused: nothing was written.
"""

from __future__ import annotations


class Wrong(AssertionError):
    """What was read cannot be."""


class Change:
    """Values on their way to cells ``first`` and following; None for cells that it leaves alone."""

    __slots__ = ("began", "ended", "first", "values", "weak")

    def __init__(self, first: int, values: list[bytes], began: int, weak: bool) -> None:
        self.first = first
        self.values = values
        self.began = began
        self.ended = 0
        self.weak = weak


class Reading:
    """A read of cells ``first`` and following: what each may be found to be."""

    __slots__ = ("allowed", "first", "quiet")

    def __init__(self, first: int, allowed: list[set[bytes]], quiet: list[bool]) -> None:
        self.first = first
        self.allowed = allowed
        self.quiet = quiet  # nobody wrote from begin to end


class _Cell:
    __slots__ = ("changing", "maybe", "reading")

    def __init__(self, value: bytes) -> None:
        self.maybe: list[tuple[bytes, int]] = [(value, 0)]  # what may be there, and when that change ended
        self.changing: list[tuple[Change, bytes]] = []
        self.reading: list[Reading] = []


class History:
    """The cells of a disk of changing size. ``size`` is in cells; behind it are zeroes, once it grows."""

    def __init__(self, content: list[bytes], most: int) -> None:
        self.cell_bytes = len(content[0])
        self.zero = bytes(self.cell_bytes)
        self.size = len(content)
        self._now = 1
        self._cells = [_Cell(value) for value in content]
        self._cells += [_Cell(self.zero) for _ in range(most - len(content))]

    def __len__(self) -> int:
        return len(self._cells)

    # -- changes ------------------------------------------------------------------------------------------------

    def begin(self, first: int, values: list[bytes], *, weak: bool = False) -> Change:
        self._now += 1
        change = Change(first, values, self._now, weak)
        for cell, value in zip(self._cells[first : first + len(values)], values, strict=True):
            cell.changing.append((change, value))
            for reading in cell.reading:
                reading.allowed[first - reading.first].add(value)
                reading.quiet[first - reading.first] = False
            first += 1
        return change

    def end(self, change: Change) -> None:
        self._now += 1
        first = change.first
        for cell, value in zip(self._cells[first : first + len(change.values)], change.values, strict=True):
            cell.changing.remove((change, value))
            if not change.weak:
                cell.maybe = [(left, ended) for left, ended in cell.maybe if ended > change.began]
            cell.maybe.append((value, self._now))

    def fail(self, change: Change) -> None:
        for cell, value in zip(self._cells[change.first :], change.values, strict=False):
            cell.changing.remove((change, value))

    # -- reads --------------------------------------------------------------------------------------------------

    def look(self, first: int, count: int) -> list[set[bytes]]:
        """What these cells may be now."""
        return [
            {value for value, _ in cell.maybe} | {value for _, value in cell.changing}
            for cell in self._cells[first : first + count]
        ]

    def begin_read(self, first: int, count: int) -> Reading:
        cells = self._cells[first : first + count]
        reading = Reading(first, self.look(first, count), [not cell.changing for cell in cells])
        for cell in cells:
            cell.reading.append(reading)
        return reading

    def drop_read(self, reading: Reading) -> None:
        """It was refused."""
        for cell in self._cells[reading.first : reading.first + len(reading.allowed)]:
            cell.reading.remove(reading)

    def end_read(self, reading: Reading, data: bytes | bytearray) -> None:
        """Wrong if that cannot have been read. Whatever nobody was writing meanwhile is known from now on."""
        self.drop_read(reading)
        size = self.cell_bytes
        found = [bytes(data[at : at + size]) for at in range(0, len(data), size)]
        for number, value in enumerate(found, reading.first):
            at, cell = number - reading.first, self._cells[number]
            if reading.quiet[at]:
                cell.maybe = [(left, ended) for left, ended in cell.maybe if left == value]
                good = bool(cell.maybe)
            else:
                good = value in reading.allowed[at]
            if not good:
                raise Wrong(
                    f"cell {number}: found {value[:4].hex()}, which is none of "
                    f"{sorted(each[:4].hex() for each in reading.allowed[at])}"
                )

    def see(self, first: int, data: bytes | bytearray, what: str) -> list[bytes]:
        """Bytes that were read at one moment; the cells' values. Wrong if they cannot be there now."""
        size = self.cell_bytes
        found = [bytes(data[at : at + size]) for at in range(0, len(data), size)]
        for number, (value, allowed) in enumerate(zip(found, self.look(first, len(found)), strict=True), first):
            if value not in allowed:
                raise Wrong(f"{what}, cell {number}: {value[:4].hex()} is none of {[v[:4].hex() for v in allowed]}")
        return found
