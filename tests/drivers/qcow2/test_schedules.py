# SPDX-License-Identifier: Apache-2.0
"""Several users and an administrator at one image: whatever the order, what is read is what may be there, snapshots
keep what they have, and the tables are whole (see ``schedules``).

``--soak`` plays 10,000 schedules. That the play would notice is shown with mistakes that are put into the driver one at
a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from bottomhalf.block import ImageError
from bottomhalf.block.graph import Graph
from bottomhalf.drivers.qcow2 import metadata as metadata_module
from bottomhalf.drivers.qcow2 import tables
from bottomhalf.drivers.qcow2.counters import FREED_OTHER
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED
from bottomhalf.drivers.qcow2.metadata import Metadata
from bottomhalf.drivers.qcow2.node import Qcow2Node
from bottomhalf.drivers.qcow2.reading import Reader
from bottomhalf.drivers.qcow2.refcounts import entries_of_block, refcount_max
from bottomhalf.drivers.qcow2.snapshotting import Snapshots
from bottomhalf.drivers.qcow2.switching import Switch
from bottomhalf.drivers.qcow2.writing import Writer
from tests.drivers.qcow2 import schedules
from tests.drivers.qcow2.history import History, Wrong

AT_A_TIME = 10
LONG_RUN = 10_000
PARTS = 20  # of the long run
FOUND_WITHIN = 400  # seeds

# What each run of so many schedules has to have seen, or the play is not what it says.
SEEN = ("write", "batch", "squeeze", "zero", "discard", "read", "flush", "create", "apply", "resize", "reopen")


def test_schedules(seed: int) -> None:
    for each in range(seed * AT_A_TIME, (seed + 1) * AT_A_TIME):
        schedules.run(each)


@pytest.mark.soak
@pytest.mark.hang_seconds(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_ten_thousand(part: int) -> None:
    each = LONG_RUN // PARTS
    tally: Counter[str] = Counter()
    for seed in range(part * each, (part + 1) * each):
        try:
            schedules.run(seed, tally)
        except BaseException as error:
            error.add_note(f"schedule {seed}")
            raise
    print(dict(tally))
    assert all(tally[what] > each // 10 for what in SEEN), tally
    assert tally["in an iothread"] and tally["check"] and tally["delete"] and tally["refused"]


# -- it would find ----------------------------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]
MISTAKES: dict[str, tuple[Patch, dict[str, Any] | None]] = {}


def mistake(plant: Patch) -> Patch:
    MISTAKES[plant.__name__] = plant, None
    return plant


def mistake_with(**image: Any) -> Callable[[Patch], Patch]:
    """One that shows with one kind of image alone."""

    def add(plant: Patch) -> Patch:
        MISTAKES[plant.__name__] = plant, {"cluster_size": 512, "size": 70 * 512, **image}
        return plant

    return add


@mistake
def no_lock(patch: pytest.MonkeyPatch) -> None:
    """Several allocate at the same time."""

    class Open:
        def __init__(self, what: str) -> None: ...

        async def __aenter__(self) -> None: ...

        async def __aexit__(self, *error: Any) -> None: ...

    patch.setattr(metadata_module, "CoMutex", Open)


@mistake
def freed_clusters_are_given_out_at_once(patch: pytest.MonkeyPatch) -> None:
    """Whoever is still on his way to one is not waited for."""

    async def count_down(self: Metadata) -> None:
        self._active.clear()
        self._held_from = self._epoch + 1
        await original(self)

    original = Metadata.count_down
    patch.setattr(Metadata, "count_down", count_down)


@mistake
def mapped_requests_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    def pass_on(self: Qcow2Node, mapped: Any) -> Any:
        return self._data.node.submit_batch(mapped)

    patch.setattr(Qcow2Node, "_pass", pass_on)


@mistake
def nobody_is_drained(patch: pytest.MonkeyPatch) -> None:
    """Snapshots are made, and sizes changed, while requests are on their way."""
    patch.setattr(Graph, "co_drained", lambda self, *nodes: nullcontext())


@mistake
def a_snapshot_leaves_the_flags(patch: pytest.MonkeyPatch) -> None:
    """The disk's tables say that clusters are its own, which the snapshot has, too."""

    async def split(self: Snapshots, offset: int, place: int, switch: Switch) -> None:
        await original(self, offset, place, switch)
        at = next(n for n, (cluster, _) in enumerate(switch._pieces) if cluster == place << self._mapping.cluster_bits)
        entries = tables.unpack(switch._pieces[at][1])
        for n in range(0, len(entries), self._mapping.words):
            if entries[n] and not entries[n] & COMPRESSED:
                entries[n] |= COPIED
        switch._pieces[at] = (switch._pieces[at][0], tables.pack(entries))

    original = Snapshots._split
    patch.setattr(Snapshots, "_split", split)


@mistake
def entries_before_data(patch: pytest.MonkeyPatch) -> None:
    """Whoever reads finds a new cluster that nothing was written to yet."""

    async def carry_out(self: Writer, batch: Any) -> None:
        links, batch.links = list(batch.links), []
        for cluster, entry, bitmap in links:
            await self.link(cluster, entry, bitmap)
        await original(self, batch)
        batch.clusters.clear()

    original = Writer._carry_out
    patch.setattr(Writer, "_carry_out", carry_out)


@mistake
def old_clusters_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writer, "_free_old", lambda self, old, why: None)


@mistake_with(cluster_size=4096, size=19 * 4096 + 1024, version=2)
def the_unpacked_cluster_is_not_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Its place has other content by now."""
    patch.setattr(Reader, "forget_unpacked", lambda self: None)


@mistake
def tables_are_dropped_before_they_are_written(patch: pytest.MonkeyPatch) -> None:
    def make_room(self: Metadata) -> None:
        while len(self.l2) >= self.settings.l2_tables:
            del self.l2[next(iter(self.l2))]

    patch.setattr(Metadata, "_make_room", make_room)


@mistake
def a_smaller_disk_keeps_its_end(patch: pytest.MonkeyPatch) -> None:
    """What was cut off comes back."""

    async def unlink(node: Any, cluster: int) -> None: ...

    patch.setattr("bottomhalf.drivers.qcow2.resizing._unlink", unlink)


@mistake_with(data_file="data.raw", data_file_raw=True)
def a_raw_data_file_keeps_what_arrives_late(patch: pytest.MonkeyPatch) -> None:
    """Behind the end of a disk that became smaller while it was written: so it was."""
    patch.setattr("bottomhalf.drivers.qcow2.resizing.refresh_sizes", lambda node: None)


@mistake
def a_zero_write_forgets_the_edges(patch: pytest.MonkeyPatch) -> None:
    async def write_zeroes(self: Writer, offset: int, length: int) -> None: ...

    patch.setattr(Writer, "_write_zeroes", write_zeroes)


@mistake
def a_cluster_is_not_filled_up(patch: pytest.MonkeyPatch) -> None:
    """What was in a cluster before is not taken along when a part of it is written elsewhere."""

    async def filled(
        self: Writer, cluster: int, start: int, end: int, inside: int, data: Any, *, zeroes: bool
    ) -> memoryview:
        return memoryview(bytes(inside - start) + bytes(data) + bytes(end - inside - len(data)))

    patch.setattr(Writer, "_filled", filled)


@mistake_with(refcount_bits=2)
def a_snapshot_counts_shared_clusters_once_too_seldom(patch: pytest.MonkeyPatch) -> None:
    """Counters become greater than they can: so it was, with compressed clusters and counters of two bits."""

    async def check_room(self: Snapshots, clusters: Any, more: Any) -> None: ...

    async def refer(self: Metadata, cluster: int) -> None:
        index, at = divmod(cluster, self._per_block)
        block = await self._block(index)
        assert block is not None
        self._set(index, block, at, block[at] + 1 & (1 << (1 << self.header.refcount_order)) - 1)

    async def count(self: Switch, cluster: int, change: int) -> None:
        await original(self, cluster, change)
        order = self._metadata.header.refcount_order
        index, at = divmod(cluster, entries_of_block(self._metadata.header.cluster_bits, order))
        self._blocks[index][at] &= refcount_max(order)

    original = Switch.count
    patch.setattr(Snapshots, "_check_room", check_room)
    patch.setattr(Metadata, "refer", refer)
    patch.setattr(Switch, "count", count)


@mistake_with(data_file="data.raw", data_file_raw=True)
def a_raw_data_file_is_zeroed_by_its_entries(patch: pytest.MonkeyPatch) -> None:
    """A write that was under way at the same time was in the raw file afterwards, and zeroes for the guest: so it
    was."""

    async def outside(self: Writer, first: int, stop: int, *, unmap: bool, discard: bool) -> bool:
        raw = self._node.header.raw_data
        done = await original(self, first, stop, unmap=unmap, discard=discard)
        return done or (raw and not (discard and not self._metadata.settings.passes[0]))

    original = Writer._zero_outside
    patch.setattr(Writer, "_zero_outside", outside)


@mistake
def a_cluster_is_freed_twice(patch: pytest.MonkeyPatch) -> None:
    def free(self: Metadata, cluster: int, why: int = FREED_OTHER) -> None:
        original(self, cluster, why)
        original(self, cluster, why)

    original = Metadata.free
    patch.setattr(Metadata, "free", free)


def found_by(limit: int, image: dict[str, Any] | None = None) -> int | None:
    """The first seed under which something is noticed."""
    for seed in range(limit):
        try:
            schedules.run(seed, image=image)
        except (AssertionError, ImageError, OSError):
            return seed
    return None


@pytest.mark.parametrize("name", MISTAKES)
def test_it_would_find(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, image = MISTAKES[name]
    plant(monkeypatch)
    assert found_by(FOUND_WITHIN, image) is not None


# -- the model itself -------------------------------------------------------------------------------------------------


def history(cells: int = 4) -> History:
    return History([bytes(2)] * cells, cells)


def test_a_later_write_replaces_an_earlier_one() -> None:
    it = history()
    for value in (b"aa", b"bb"):
        it.end(it.begin(1, [value]))
    it.end_read(it.begin_read(0, 3), bytes(2) + b"bb" + bytes(2))
    with pytest.raises(Wrong):
        it.end_read(it.begin_read(1, 1), b"aa")


def test_of_two_at_the_same_time_either_may_be_the_last_but_only_one() -> None:
    for value, other in ((b"aa", b"bb"), (b"bb", b"aa")):
        it = history()
        first, second = it.begin(0, [b"aa"]), it.begin(0, [b"bb"])
        it.end_read(it.begin_read(0, 1), b"aa")  # while both are written
        it.end(first)
        it.end(second)
        it.end_read(it.begin_read(0, 1), value)
        with pytest.raises(Wrong):
            it.end_read(it.begin_read(0, 1), other)
        with pytest.raises(Wrong):
            it.end_read(it.begin_read(0, 1), bytes(2))


def test_a_reader_finds_what_was_there_while_he_read() -> None:
    for value in (bytes(2), b"aa"):
        it = history()
        reading = it.begin_read(0, 2)
        it.end(it.begin(1, [b"aa"]))
        it.end_read(reading, bytes(2) + value)
    reading = it.begin_read(0, 1)
    with pytest.raises(Wrong):
        it.end_read(reading, b"aa")


def test_what_is_weak_may_be_left_undone_and_what_failed_is() -> None:
    it = history()
    it.end(it.begin(0, [b"aa"]))
    it.fail(it.begin(0, [b"cc"]))
    it.end(it.begin(0, [b"bb"], weak=True))
    assert it.look(0, 1) == [{b"aa", b"bb"}]
    with pytest.raises(Wrong):
        it.see(0, b"cc", "a snapshot")
