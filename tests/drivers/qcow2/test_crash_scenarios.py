# SPDX-License-Identifier: Apache-2.0
"""Four ways in which another project's qcow2 lost data or space in 2026, with all states that a power cut may leave.

Each scenario is run as it is, and then with what prevents the damage taken out: a test that cannot fail shows nothing.
(Cloud Hypervisor, issue 8606 and pull requests 8624, 8721, 8748, 8597: what happened there, in words.)"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from bottomhalf.aio import gather, sleep_ns
from bottomhalf.drivers.qcow2.counters import Counters, pages_of
from bottomhalf.drivers.qcow2.layout import OFFSET_MASK
from bottomhalf.drivers.qcow2.metadata import Metadata
from bottomhalf.drivers.qcow2.tables import pack
from bottomhalf.host.request import DISCARD, WRITE
from tests.drivers.qcow2.bench import check
from tests.drivers.qcow2.crash_operations import OPERATIONS
from tests.drivers.qcow2.crash_states import IMAGE, Explorer
from tests.drivers.qcow2.test_crash_states import GEOMETRIES, TABLE_FULL, explorer_of

LATE_NS = 10**9  # after everything else
ROUNDS = 12
PLACES = 8  # clusters behind the end of a file that are written to, and one more


def started(name: str, seed: int = 0) -> Explorer:
    explorer = explorer_of(GEOMETRIES[name])
    explorer.begin(seed)
    explorer.current = "the scenario"
    explorer.host.set_cached(IMAGE, "never")  # every request takes its time
    return explorer


def place_of(explorer: Explorer, cluster: int) -> int:
    """The host's offset of a guest's cluster of the first L2 table."""
    return explorer.disk.node.metadata.l2[0].entries[cluster] & OFFSET_MASK


def free_at_once(self: Counters, clusters: Iterable[int], why: int = 0) -> None:
    """Counters.free_all() that does not wait until nothing on the disk refers to the clusters."""
    for cluster in clusters:
        index, at = divmod(cluster, self._per_block)
        block = self._blocks[index]
        self._set(index, block, at, block[at] - 1)
        self._hint = min(self._hint, cluster)


async def open_with_blocks(self: Metadata, original: Callable[[Metadata], Any] = Metadata.open) -> None:
    """Metadata.open() that reads the refcount blocks, too: free_at_once() cannot wait for them."""
    await original(self)
    for index in range(len(self.refcount_table)):
        await self._block(index)


# -- L2 tables overwritten after reuse --------------------------------------------------------------------------------


def reuse_for_a_table(explorer: Explorer) -> None:
    """A write is on its way to a cluster that is discarded meanwhile; then an L2 table is needed."""
    ledger, backend, cluster = explorer.ledger, explorer.disk.backend, explorer.cluster
    explorer.disk.run(backend.co_pwrite(cluster, ledger.now[cluster : 2 * cluster]))  # its table was looked through
    late = b"L" * cluster
    where = place_of(explorer, 0)
    far = ledger.size - cluster
    ledger.may_put(0, late)
    ledger.may_put(0, bytes(cluster))
    ledger.may_put(far, b"F" * cluster)
    held = explorer.host.fault(path=IMAGE, op=WRITE, start=where, end=where + cluster, hold=True, times=1)

    async def meanwhile() -> None:
        await backend.co_discard(0, cluster)
        await backend.co_flush()
        await backend.co_pwrite(far, b"F" * cluster)
        await backend.co_flush()
        assert held.held == 1
        held.remove()

    explorer.do(lambda backend: gather(backend.co_pwrite(0, late), meanwhile()))
    ledger.put_for_good(far, b"F" * cluster)
    ledger.since = [(0, late), (0, bytes(cluster))]
    explorer.look()
    explorer.disk.run(backend.co_flush())
    explorer.look()
    ledger.now[:cluster] = explorer.disk.run(backend.co_pread(0, cluster))
    explorer.end()


def test_l2_tables_overwritten_after_reuse(seed: int) -> None:
    """A late write of the guest's, or whoever else thinks that the cluster is his, must not land in an L2 table."""
    reuse_for_a_table(started("small", seed))


def test_l2_tables_overwritten_after_reuse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without epochs the late write lands in the new L2 table."""
    monkeypatch.setattr(Metadata, "begin", lambda self, count: -1)
    with pytest.raises(AssertionError, match="in operation"):
        reuse_for_a_table(started("small"))


@pytest.mark.parametrize("operations", [("discard", "far"), ("unmap", "allocate"), ("grow", "far")], ids=str)
def test_l2_tables_given_out_while_the_disk_refers_to_them(
    operations: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that the disk still refers to, as a table or as data, is given to nobody: not even without a flush in
    between. (Freed at once instead, the first user of the free cluster is found in somebody else's place.)"""
    name = "small" if operations[0] != "grow" else "backing"
    explorer_of(GEOMETRIES[name]).run(operations)
    explorer = explorer_of(GEOMETRIES[name])
    monkeypatch.setattr(Counters, "free_all", free_at_once)
    monkeypatch.setattr(Metadata, "open", open_with_blocks)
    with pytest.raises(AssertionError, match="in operation"):
        explorer.run(operations)


# -- a late hole punch racing a flush and reuse -----------------------------------------------------------------------


def punch_late(explorer: Explorer) -> None:
    """The file system takes its time to punch the hole; meanwhile others flush, and somebody needs a cluster."""
    ledger, backend, cluster = explorer.ledger, explorer.disk.backend, explorer.cluster
    new = b"N" * 3 * cluster
    place = 4 * cluster
    ledger.may_put(0, bytes(2 * cluster))
    ledger.may_put(place, new)
    held = explorer.host.fault(path=IMAGE, op=DISCARD, hold=True)
    hits = []

    async def discard() -> None:
        await backend.co_discard(0, 2 * cluster)
        await backend.co_flush()

    async def use() -> None:
        await sleep_ns(LATE_NS // 100)
        await backend.co_flush()
        await backend.co_pwrite(place, new)
        await backend.co_flush()

    def release() -> None:
        hits.append(held.hits)
        held.remove()

    explorer.host.at(LATE_NS, release)
    explorer.do(lambda backend: gather(discard(), use(), sleep_ns(2 * LATE_NS)))
    assert hits and hits[0], "no hole was on its way"
    ledger.put_for_good(place, new)
    ledger.put_for_good(0, bytes(2 * cluster))
    explorer.look()
    assert explorer.disk.content() == ledger.now[: ledger.size], "in operation: what was flushed is not there"
    explorer.end()


def test_a_late_hole_punch_racing_a_flush_and_reuse(seed: int) -> None:
    """The hole is punched before anybody can be given the cluster."""
    punch_late(started("small", seed))


def test_a_late_hole_punch_racing_a_flush_and_reuse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for it the hole is in the next owner's data."""
    original = Counters._discard

    async def not_waited_for(self: Counters, clusters: list[int]) -> None:
        self.file.context.enter(original(self, clusters))

    monkeypatch.setattr(Counters, "_discard", not_waited_for)
    with pytest.raises(AssertionError, match="in operation"):
        punch_late(started("small"))


# -- a table published before it was accounted on a full disk ---------------------------------------------------------


def fill_the_disk(free_pages: int | None, full_at: int | None = None, *, power_stays: bool = False) -> int:
    """Write where an L2 table and a refcount block are needed, on a disk with so much space, or with none at one place
    behind the file's end, in clusters; how much failed. Then there is space again."""
    explorer = started("block full")
    if power_stays:
        explorer.host.before_durable = None
    ledger, backend, cluster = explorer.ledger, explorer.disk.backend, explorer.cluster
    if full_at is None:
        assert free_pages is not None
        explorer.host.disk_free_bytes = free_pages * 4096
    else:
        start = explorer.host.disk.files[IMAGE].current.size + full_at * cluster
        fault = explorer.host.fault(path=IMAGE, op=WRITE, errno=errno.ENOSPC, start=start, end=start + cluster)
    far = ledger.size - 2 * cluster
    failures = 0
    for data in (b"1" * cluster, b"2" * 2 * cluster):
        ledger.may_put(far, data)
        for body in (lambda data=data: backend.co_pwrite(far, data), backend.co_flush):
            try:
                explorer.do(lambda backend, body=body: body())
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failures += 1
                found = check(explorer.host, IMAGE)
                assert not found.corruptions, f"with the power on: {found.findings}"
                explorer.look()
    explorer.host.disk_free_bytes = None
    if full_at is not None:
        fault.remove()
    ledger.may_put(far, b"3" * 2 * cluster)
    explorer.do(lambda backend: backend.co_pwrite(far, b"3" * 2 * cluster))
    ledger.put(far, b"3" * 2 * cluster)
    OPERATIONS["flush"](explorer)
    explorer.look()
    explorer.end()
    return failures


def test_a_table_published_before_it_was_accounted_on_a_full_disk() -> None:
    """Where there is no space for the counter of a table, nothing on the disk leads to the table."""
    assert [fill_the_disk(pages) > 0 for pages in range(3)] == [True, False, False]
    failures = [fill_the_disk(None, place) for place in range(PLACES)]
    assert failures[0] and any(failures[1:]) and not failures[-1], failures


def test_a_table_published_before_it_was_accounted_on_a_full_disk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Metadata.commit

    async def publishing_first(self: Metadata, *, counters: bool = False) -> None:
        changed = [table for table in self.l2.values() if table.dirty or table.fresh]
        pieces: list[tuple[int, Any]] = [(table.offset, pack(table.entries)) for table in changed]
        pieces += pages_of(self.header.l1_offset, pack(self.l1), self._dirty_l1)
        await self.write(pieces)
        await original(self, counters=counters)

    monkeypatch.setattr(Metadata, "commit", publishing_first)
    complaints = []
    for place in range(PLACES):
        with pytest.raises(AssertionError, match=r"in operation|with the power on"):
            fill_the_disk(None, place)
        try:
            fill_the_disk(None, place, power_stays=True)
        except AssertionError as error:  # a damaged image even so
            complaints.append(str(error))
    assert any("with the power on" in text for text in complaints), complaints


# -- refcount blocks never reused -------------------------------------------------------------------------------------


def rounds(explorer: Explorer, names: Iterable[str]) -> list[int]:
    """The file's size after each round of operations with a flush after each."""
    sizes = []
    for number in range(ROUNDS):
        if number == 2:  # what may be left was seen by now
            explorer.host.before_durable = None
        for explorer.current in names:
            for each in (explorer.current, "flush"):
                explorer.step += 1
                OPERATIONS[each](explorer)
        sizes.append(explorer.host.disk.files[IMAGE].current.size)
    return sizes


CYCLES: list[tuple[str, tuple[str, ...]]] = [
    ("block full", ("into", "unmap", "discard", "fua")),
    ("block full", ("far", "shrink", "grow")),
    ("small", ("snapshot", "touch", "forget")),
    ("small", ("snapshot", "cross", "revert", "forget")),
    ("small", ("squeeze", "over", "squeeze", "discard")),
]


@pytest.mark.parametrize("name, names", CYCLES, ids=str)
def test_refcount_blocks_never_reused(name: str, names: tuple[str, ...]) -> None:
    """However often something is flushed: what tables and blocks took before is found again, and the file stays."""
    explorer = explorer_of(GEOMETRIES[name], reorder=1)
    explorer.begin()
    sizes = rounds(explorer, names)
    assert sizes[3] == sizes[-1], sizes
    explorer.end()


@pytest.mark.parametrize("name, names", CYCLES, ids=str)
def test_refcount_blocks_never_reused_is_seen(
    name: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without going back to what became free the file grows with each flush."""
    original = Counters.count_down

    async def without_going_back(self: Counters) -> None:
        before = self._hint
        await original(self)
        self._hint = before

    monkeypatch.setattr(Counters, "count_down", without_going_back)
    explorer = explorer_of(GEOMETRIES[name], reorder=1)
    explorer.begin()
    sizes = rounds(explorer, names)
    assert sizes[3] < sizes[-1], sizes


def test_the_old_refcount_table_is_reused_and_not_before_it_is_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the table moves, its place is free from the moment on at which no header refers to it."""

    def moved(act: Callable[[Explorer], object]) -> Explorer:
        explorer = explorer_of(TABLE_FULL, 1)
        explorer.begin()
        explorer.current = "far"
        explorer.disk.run(explorer.disk.node.metadata.refcount(1))  # the block is in memory
        OPERATIONS["far"](explorer)
        act(explorer)
        return explorer

    def flush(explorer: Explorer) -> None:
        OPERATIONS["flush"](explorer)
        OPERATIONS["flush"](explorer)

    explorer = moved(flush)
    metadata = explorer.disk.node.metadata
    assert metadata.header.refcount_table_clusters > 1
    assert explorer.disk.run(metadata.refcount(1)) == 0
    OPERATIONS["allocate"](explorer)
    assert explorer.disk.run(metadata.refcount(1)) == 1
    flush(explorer)
    explorer.end()

    monkeypatch.setattr(Counters, "free_all", free_at_once)
    with pytest.raises(AssertionError, match="in operation"):
        moved(lambda explorer: (OPERATIONS["allocate"](explorer), flush(explorer)))
