# SPDX-License-Identifier: Apache-2.0
"""Every content that a power cut may leave, one after the other, instead of one by chance.

What a disk did not promise yet is a log: writes, zeroes, discards and changes of size, of all the files in question in
the order in which they took effect. A power cut leaves any subset of it, each of them whole or some of its sectors.
That is two to the power of many; so the subsets are bounded, and the bound is what mistakes in an order of writes need:
something missing, and something later there. The states of a log are, with ``reorder=K``:

* the first ``p`` changes whole, for every ``p``: each prefix;
* behind that the next one missing, and of the K - 1 that follow it any subset whole: what was reordered within the
  bound. K = 1 is an order that is kept;
* each of these with the missing one torn instead, or with the last one that is there torn: some sectors from its
  beginning, or some up to its end, for each boundary of 512 bytes within it. Of more than ``BOUNDARIES_MAX``
  boundaries as many are taken, evenly, the first and the last among them. A change within one sector is not torn, nor
  one of size.

Changes that are durable for certain (a write with FUA, behind others) are always there. Contents that are equal are
yielded once.

    for state in host.survivors("disk.qcow2", reorder=3):
        look_at(state.files["disk.qcow2"])

The states at all moments of a run are those at the moments at which something becomes durable, with what does still in
doubt, and those at the end: the moments between are prefixes of these. ``host.before_durable`` is called at each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Final

from bottomhalf.host.sim.disk import SECTOR, Change, Inode

REORDER_DEFAULT: Final = 3
REORDER_MAX: Final = 12  # 2,048 subsets at each place
BOUNDARIES_MAX: Final = 8

Part = tuple[int, int]  # from, to: offsets in the file


class CrashState:
    """Contents by path, and what of the log is in them."""

    __slots__ = ("_log", "_torn", "_whole", "digest", "files")

    def __init__(
        self, files: dict[str, bytes], digest: bytes, log: list[_Entry], whole: set[int], torn: dict[int, Part]
    ) -> None:
        self.files = files
        self.digest = digest  # equal for equal contents
        self._log = log
        self._whole = whole
        self._torn = torn

    def __str__(self) -> str:
        """For messages: a line for each change."""
        lines = []
        for number, entry in enumerate(self._log):
            fate = "there" if number in self._whole else "lost"
            if number in self._torn:
                fate = "only {:#x} to {:#x}".format(*self._torn[number])
            lines.append(f"{entry.path}: {entry.change!r}: {fate}")
        return "\n".join(lines) or "everything is durable"


class _Entry:
    """A change of one of the files."""

    __slots__ = ("change", "index", "path")

    def __init__(self, change: Change, path: str, index: int) -> None:
        self.change = change
        self.path = path
        self.index = index  # of the file


def survivors(
    inodes: list[Inode], unfinished: Iterable[tuple[Inode, Change]] = (), reorder: int = REORDER_DEFAULT
) -> Iterator[CrashState]:
    """The states of some files; see above. ``unfinished``: changes that are under way, and nobody was told of."""
    if not 1 <= reorder <= REORDER_MAX:
        raise ValueError(f"reorder is {reorder}, not 1 to {REORDER_MAX}")
    log = [_Entry(change, inode.path, n) for n, inode in enumerate(inodes) for change in inode.journal]
    log.sort(key=lambda entry: entry.change.number)
    log += [_Entry(change, inode.path, inodes.index(inode)) for inode, change in unfinished if inode in inodes]
    sure = {n for n, entry in enumerate(log) if entry.change.durable and not entry.change.doomed}
    open_ones = [n for n in range(len(log)) if n not in sure]
    seen: set[bytes] = set()
    before = [inode.durable.copy() for inode in inodes]  # with all that comes before the first one that is missing
    position = 0
    for place in range(len(open_ones) + 1):
        stop = open_ones[place] if place < len(open_ones) else len(log)
        for entry in log[position:stop]:
            entry.change.apply_whole(before[entry.index])
        for later, torn in _choices(log, open_ones[place : place + reorder]):
            stores = [store.copy() for store in before]
            for number in range(stop, len(log)):
                entry = log[number]
                if number in torn:
                    entry.change.apply(stores[entry.index], *torn[number])
                elif number in later or number in sure:
                    entry.change.apply_whole(stores[entry.index])
            files = {inode.path: store.content() for inode, store in zip(inodes, stores, strict=True)}
            digest = digest_of(files.values())
            if digest not in seen:
                seen.add(digest)
                yield CrashState(files, digest, log, {*range(stop), *sure, *later} - torn.keys(), torn)
        position = stop


def _choices(log: list[_Entry], window: list[int]) -> Iterator[tuple[set[int], dict[int, Part]]]:
    """Which of a window's changes are there whole, and which torn: its first one is never whole."""
    if not window:
        yield set(), {}
        return
    first, *others = window
    torn_first = [{first: part} for part in tears(log[first].change)]
    for bits in range(1 << len(others)):
        later = [number for n, number in enumerate(others) if bits >> n & 1]
        for torn in [{}, *torn_first]:
            yield set(later), torn
        if later:
            for part in tears(log[later[-1]].change):
                yield set(later[:-1]), {later[-1]: part}


def tears(change: Change) -> Iterator[Part]:
    """The parts of a change that a power cut may leave of it: heads and tails, by sectors."""
    start, end = change.offset, change.offset + change.length
    boundaries = range(start - start % SECTOR + SECTOR, end, SECTOR)  # none, of a change of size
    count = len(boundaries)
    if count > BOUNDARIES_MAX:
        chosen = [boundaries[n * (count - 1) // (BOUNDARIES_MAX - 1)] for n in range(BOUNDARIES_MAX)]
    else:
        chosen = list(boundaries)
    for boundary in chosen:
        yield start, boundary
        yield boundary, end


def digest_of(contents: Iterable[bytes]) -> bytes:
    """A hash of contents and their lengths."""
    digest = blake2b(digest_size=16)
    for content in contents:
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.digest()
