# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots: other disks in the image, and what a power cut or a failing disk leaves of them."""

from __future__ import annotations

import errno
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from bottomhalf.block import ImageError
from bottomhalf.drivers.qcow2 import snapshots, tally
from bottomhalf.drivers.qcow2.counters import Counters
from bottomhalf.drivers.qcow2.layout import SNAPSHOTS_MAX
from bottomhalf.drivers.qcow2.overlap import Places
from bottomhalf.drivers.qcow2.snapshots import Snapshot
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.request import COMPRESSED, FLUSH, READ, WRITE
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, check, disk, make, squeezable
from tests.drivers.qcow2.bench import replace as replace_file

SHAPES: list[dict[str, Any]] = [
    {"cluster_size": 512, "size": 300 * 512},
    {"cluster_size": 4096, "size": 40 * 4096, "version": 2},
    {"cluster_size": 16384, "size": 8 * 16384, "extended_l2": True},
    {"cluster_size": 512, "size": 100 * 512, "refcount_bits": 8},
    {"cluster_size": 512, "size": 100 * 512, "refcount_bits": 64},
]
POSITIONS_MAX = 400
MACHINE = 700  # bytes of a machine's state, from byte 100 on


class Player:
    """A disk, what it should contain, and what its snapshots should."""

    def __init__(self, host: SimHost, **options: Any) -> None:
        self.host = host
        self.disk = Disk(host, "disk.qcow2", **options)
        self.now = bytearray(self.disk.size)
        self.known: dict[str, tuple[Snapshot, bytes, bytes]] = {}
        self.made = 0

    def run(self, body: Any) -> Any:
        return self.disk.run(body)

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.run(self.disk.backend.co_pwrite(offset, data, flags))
        self.now[offset : offset + len(data)] = data

    def create(self) -> None:
        state = random.Random(self.made).randbytes(MACHINE)
        self.run(self.disk.node.co_save_vmstate(100, memoryview(state)))
        self.made += 1
        made = self.run(
            self.disk.node.snapshots.create(f"s{self.made}", date_ns=self.made, vm_state_bytes=100 + MACHINE)
        )
        self.known[made.id] = made, bytes(self.now), state

    def apply(self, id: str) -> None:
        snapshot, content, state = self.known[id]
        self.run(self.disk.node.snapshots.apply(snapshot))
        self.now = bytearray(content)
        self.see_state(state)

    def see_state(self, state: bytes) -> None:
        found = bytearray(MACHINE)
        self.run(self.disk.node.co_load_vmstate(100, memoryview(found)))
        assert bytes(found) == state

    def delete(self, id: str) -> None:
        self.run(self.disk.node.snapshots.delete(self.known[id][0]))
        del self.known[id]

    def see(self) -> None:
        assert self.disk.content() == self.now
        assert self.run(self.disk.node.snapshots.read()) == [known for known, _, _ in self.known.values()]


def play(player: Player, chance: random.Random, cluster: int, steps: int) -> None:
    size = player.disk.size
    for number in range(steps):
        what = chance.choices(
            ("write", "squeeze", "zero", "discard", "flush", "create", "apply", "delete"), (12, 3, 2, 2, 2, 3, 2, 2)
        )[0]
        length = min(chance.choice((1, 512, cluster, 3 * cluster)), size)
        offset = chance.randrange(0, size - length + 1)
        if what == "write":
            player.write(offset, bytes([number % 255 + 1]) * length)
        elif what == "squeeze":
            offset, length = offset // cluster * cluster, cluster
            length = min(length, size - offset)
            player.write(offset, squeezable(offset, length, number % 255 + 1), COMPRESSED)
        elif what == "zero":
            player.run(player.disk.backend.co_write_zeroes(offset, length))
            player.now[offset : offset + length] = bytes(length)
        elif what == "discard":
            player.run(player.disk.backend.co_discard(offset, length))
            player.now[offset : offset + length] = player.run(player.disk.backend.co_pread(offset, length))
        elif what == "flush":
            player.run(player.disk.backend.co_flush())
        elif what == "create":
            player.create()
        elif player.known:
            getattr(player, what)(chance.choice(list(player.known)))
        if chance.random() < 0.2:
            player.see()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_sequences(seed: int, shape: dict[str, Any]) -> None:
    host, chance = SimHost(seed), random.Random(seed)
    make(host, "disk.qcow2", **shape)
    player = Player(host, **({"l2-cache-size": 2 * shape["cluster_size"]} if chance.random() < 0.3 else {}))
    play(player, chance, shape["cluster_size"], 40)
    player.see()
    player.disk.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks and not found.check_errors, found.findings
    player.disk = Disk(host, "disk.qcow2")
    for id in list(player.known):
        player.apply(id)
        player.see()
    for id in list(player.known):
        player.delete(id)
    player.see()
    player.disk.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def test_resized_between(seed: int) -> None:
    """A snapshot has a size of its own, which the disk takes with it."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512)
    player = Player(host)
    player.write(0, b"small")
    player.create()
    player.run(player.disk.node.co_truncate(400 * 512))
    player.now.extend(bytes(336 * 512))
    player.write(390 * 512, b"large")
    player.create()
    for id, size in (("1", 64), ("2", 400), ("1", 64)):
        player.apply(id)
        assert player.disk.size == size * 512
        player.see()
    player.disk.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


# -- a disk that fails, a power cut -----------------------------------------------------------------------------------


def prepared(seed: int, shape: dict[str, Any]) -> Player:
    """A disk with two snapshots, other content than theirs, all of it durable."""
    host, chance = SimHost(seed), random.Random(seed)
    make(host, "disk.qcow2", **shape)
    player = Player(host)
    play(player, chance, shape["cluster_size"], 6)
    for _ in range(2):
        player.write(chance.randrange(player.disk.size - 2000), b"content" * 200)
        player.create()
    player.write(chance.randrange(player.disk.size - 2000), b"later" * 300)
    player.run(player.disk.backend.co_flush())
    return player


OPERATIONS: dict[str, Callable[[Player], None]] = {
    "create": lambda player: player.create(),
    "apply": lambda player: player.apply(list(player.known)[-2]),
    "delete": lambda player: player.delete(list(player.known)[-2]),
}


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("op", [READ, WRITE, FLUSH])
def test_every_position(op: int, operation: str, shape: dict[str, Any]) -> None:
    """The disk fails from there on, or the power goes: all snapshots and the disk are what they were, or what they
    were to become."""
    for position in range(POSITIONS_MAX):
        player = prepared(position % 3, shape)
        before = dict(player.known), bytes(player.now)
        fault = player.host.fault(op=op, errno=errno.EIO, after=position)
        try:
            OPERATIONS[operation](player)
        except OSError as error:
            assert error.errno == errno.EIO
        else:
            assert not fault.hits or op == READ
        after = dict(player.known), bytes(player.now)
        if operation == "apply":
            after = after[0], before[0][list(before[0])[-2]][1]
        hits = fault.hits
        for chance in range(3):
            _see_survivor(player.host, chance, operation, before, after)
        fault.remove()
        assert player.disk.content() in (before[1], after[1])
        player.disk.close()
        found = check(player.host, "disk.qcow2")
        assert not found.check_errors and not found.corruptions, found.findings
        if not hits:
            break
    else:
        raise AssertionError("there is no end of I/O")
    assert position > 1


State = tuple[dict[str, tuple[Snapshot, bytes, bytes]], bytes]


def _see_survivor(host: SimHost, chance: int, operation: str, before: State, after: State) -> None:
    survivor = SimHost(chance)
    survivor.add_file("disk.qcow2", host.survivor("disk.qcow2"))
    found = check(survivor, "disk.qcow2")
    assert not found.check_errors and not found.corruptions, found.findings
    with disk(survivor, "disk.qcow2") as reopened:
        assert reopened.content() in (before[1], after[1])
        known = {each.id: each for each in reopened.run(reopened.node.snapshots.read())}
        # It may be done although whoever asked was told of a failure: of what had to be written behind it.
        made, gone = known.keys() - before[0].keys(), before[0].keys() - known.keys()
        assert len(made) <= (operation == "create")
        assert gone in (set(), {list(before[0])[-2]} if operation == "delete" else set())
        for id, snapshot in known.items():
            content = before[0][id][1] if id in before[0] else before[1]
            reopened.run(reopened.node.snapshots.apply(snapshot))
            assert reopened.content() == content
    found = check(survivor, "disk.qcow2")
    assert not found.corruptions, found.findings


# -- what cannot be ---------------------------------------------------------------------------------------------------


def refused(player: Player, number: int, **options: Any) -> str:
    with pytest.raises(OSError) as caught:
        player.run(player.disk.node.snapshots.create(**{"name": "new", "date_ns": 0} | options))
    assert caught.value.errno == number
    return str(caught.value.strerror)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512)
    player = Player(host)
    player.create()
    refused(player, errno.EEXIST, id="1")
    refused(player, errno.EEXIST, id="x" * 128)
    refused(player, errno.EINVAL, name="x" * 256)
    monkeypatch.setattr("bottomhalf.drivers.qcow2.layout.SNAPSHOTS_MAX", 1)
    assert "at most 1 snapshots" in refused(player, errno.EFBIG)
    assert SNAPSHOTS_MAX == 65536
    player.see()
    player.disk.close()
    assert not check(host, "disk.qcow2").leaks


@pytest.mark.parametrize("bits, most", [(1, 0), (2, 2)])
def test_counters_that_are_too_narrow(bits: int, most: int) -> None:
    """A cluster cannot be counted more often than its counter goes; nothing has changed then."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512, refcount_bits=bits)
    player = Player(host)
    player.write(0, b"counted")
    for _ in range(most):
        player.run(player.disk.node.snapshots.create("s", date_ns=0))
    assert "cannot be counted" in refused(player, errno.EINVAL)
    player.write(0, b"still")
    player.disk.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


@pytest.mark.parametrize("applies", [False, True])
def test_counters_that_are_too_narrow_for_compressed_clusters(applies: bool) -> None:
    """Two of them in one cluster of the file are two references more: 2 + 2 is more than two bits can say, and a
    counter that wraps around gives the cluster away."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512, refcount_bits=2)
    player = Player(host)
    if applies:  # one that only the snapshot has may become the disk's
        player.write(0, b"1" * 512, COMPRESSED)
        player.run(player.disk.node.snapshots.create("s", date_ns=0))
        made = player.run(player.disk.node.snapshots.read())[0]
        player.known[made.id] = made, bytes(player.now), bytes(MACHINE)
        player.write(512, b"2" * 512, COMPRESSED)
        with pytest.raises(OSError, match="cannot be counted"):
            player.run(player.disk.node.snapshots.apply(made))
    else:
        player.write(0, b"1" * 512 + b"2" * 512, COMPRESSED)
        assert "cannot be counted" in refused(player, errno.EINVAL)
    player.see()
    player.disk.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


@pytest.mark.parametrize("bits, squeezed", [(2, 2), (4, 8), (4, 7)])
def test_compressed_clusters_that_share_one_are_counted_each(bits: int, squeezed: int) -> None:
    """Two of them in a cluster of the host are two references more, for which a counter of two bits has no room. (It
    became zero, and the cluster was given out again.) Seven can be in a snapshot, but not be applied besides."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * 4096, cluster_size=4096, refcount_bits=bits)
    player = Player(host)
    player.write(8192, b"2" * 4096 * squeezed, COMPRESSED)
    player.run(player.disk.node.co_flush())
    if squeezed == 7:
        player.create()
        with pytest.raises(OSError, match="cannot be counted"):
            player.apply("1")
    else:
        assert "cannot be counted" in refused(player, errno.EINVAL)
    player.write(5000, b"new" * 5000)
    player.see()
    player.disk.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def after_a_deleted_snapshot(seed: int, flags: int) -> None:
    """A disk gets a snapshot's tables by applying it; it is deleted, and the disk is written."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=200 * 512, cluster_size=512)
    first = Player(host)
    first.write(0, b"kept" * 128 * 40, flags)
    first.create()
    first.write(0, b"later" * 1000)
    first.disk.close()
    player = Player(host, **{"overlap-check": "all"})
    player.known, player.now = first.known, bytearray(first.known["1"][1])
    player.apply("1")
    player.delete("1")
    player.write(700, b"mine" * 1000)
    player.run(player.disk.backend.co_flush())
    player.see()
    player.disk.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def test_a_deleted_snapshots_tables_are_the_disks_own(seed: int) -> None:
    """Also where ``overlap-check=all`` protects those of snapshots."""
    after_a_deleted_snapshot(seed, 0)
    after_a_deleted_snapshot(seed, COMPRESSED)  # no entry gets a flag, so the table stays where it is


def test_a_deleted_snapshots_tables_would_be_protected_from_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody said that they are the disk's own now."""
    monkeypatch.setattr(Places, "own", lambda self, offset: None)
    with pytest.raises(OSError, match="Input/output error"):
        after_a_deleted_snapshot(0, COMPRESSED)


def test_external_data_files_have_none() -> None:
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512, data_file="data.raw")
    player = Player(host)
    assert "external data file" in refused(player, errno.ENOTSUP)
    with pytest.raises(OSError):
        player.run(player.disk.node.co_save_vmstate(0, memoryview(b"x")))
    player.disk.close()


def test_the_table_is_packed_as_it_was_read() -> None:
    chance = random.Random(1)
    entries = [
        Snapshot(
            id=str(n),
            name="name" * chance.randrange(5) + "\udcff",
            l1_offset=n * 512,
            l1_size=chance.randrange(100),
            date_s=chance.randrange(1 << 32),
            date_ns=chance.randrange(10**9),
            vm_clock_ns=chance.randrange(1 << 64),
            vm_state_bytes=chance.choice((0, 5, 1 << 40)),
            disk_bytes=chance.randrange(1 << 40),
            icount=chance.choice((None, 7)),
        )
        for n in range(20)
    ]
    data = snapshots.pack(entries, 0)
    assert snapshots.parse(data, 20, 512) == (entries, len(data))
    old = replace(entries[0], disk_bytes=None)
    assert snapshots.parse(snapshots.pack([old], 4096), 1, 512)[0] == [replace(old, disk_bytes=4096)]


def test_of_two_with_the_same_id_one_is_deleted() -> None:
    """Nobody makes such an image, but somebody may have edited it."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512)
    with disk(host, "disk.qcow2") as opened:
        for letter in b"ab":
            opened.run(opened.backend.co_pwrite(0, bytes([letter]) * 512))
            opened.run(opened.node.snapshots.create(chr(letter), date_ns=0))
        opened.run(opened.backend.co_flush())
        table = opened.node.header.snapshots_offset
    image = bytearray(host.content("disk.qcow2"))
    at = image.index(b"2b", table)
    image[at : at + 1] = b"1"
    replace_file(host, "disk.qcow2", image)
    with disk(host, "disk.qcow2") as opened:
        one, other = opened.run(opened.node.snapshots.read())
        assert (one.id, one.name, other.id, other.name) == ("1", "a", "1", "b")
        opened.run(opened.node.snapshots.delete(other))
        (left,) = opened.run(opened.node.snapshots.read())
        assert left.name == "a"
        with pytest.raises(OSError, match="there is no snapshot 'b' with the id 1") as caught:
            opened.run(opened.node.snapshots.delete(other))
        assert caught.value.errno == errno.ENOENT
        opened.run(opened.node.snapshots.apply(left))
        assert opened.content()[:512] == b"a" * 512
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def test_a_cluster_that_is_not_counted() -> None:
    """It cannot be shared: whoever finds its counter zero may use it."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512)
    with disk(host, "disk.qcow2") as opened:
        opened.run(opened.backend.co_pwrite(0, b"counted"))
        opened.run(opened.backend.co_flush())
        cluster = opened.node.metadata.l2[0].entries[0] // 512 & 0xFFFF
    image = bytearray(host.content("disk.qcow2"))
    assert image[2 * 512 + 2 * cluster + 1] == 1
    image[2 * 512 + 2 * cluster + 1] = 0
    replace_file(host, "disk.qcow2", image)
    opened = Disk(host, "disk.qcow2")
    with pytest.raises(ImageError, match=f"cluster {cluster} is in use and not counted"):
        opened.run(opened.node.snapshots.create("s", date_ns=0))
    opened.abandon()


def test_a_disk_of_no_size() -> None:
    """There is not even an L1 table."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=0, cluster_size=512)
    with disk(host, "disk.qcow2") as opened:
        made = opened.run(opened.node.snapshots.create("s", date_ns=0))
        opened.run(opened.backend.co_truncate(512))
        opened.run(opened.backend.co_pwrite(0, b"x" * 512))
        opened.run(opened.node.snapshots.apply(made))
        assert opened.size == 0
        opened.run(opened.node.snapshots.delete(made))
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def many(monkeypatch: pytest.MonkeyPatch, clusters: int, **options: Any) -> tuple[SimHost, Disk, Snapshot]:
    """A disk that is another one than its snapshot everywhere; what is freed is counted down in lots of 64."""
    monkeypatch.setattr(Counters, "freed_max", 64)
    host = SimHost(1)
    make(host, "disk.qcow2", size=clusters * 512, cluster_size=512, **options)
    opened = Disk(host, "disk.qcow2")
    made = None
    for content in (b"a", b"b"):
        for at in range(0, opened.size, 1 << 16):
            opened.run(opened.backend.co_pwrite(at, content * min(1 << 16, opened.size - at)))
        opened.run(opened.backend.co_flush())
        if made is None:
            made = opened.run(opened.node.snapshots.create("one", date_ns=1))
    assert isinstance(made, Snapshot)
    return host, opened, made


def test_what_could_not_be_counted_down_the_next_commit_counts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refcount block cannot be read, in the midst of it: nothing is leaked for that."""
    host, opened, made = many(monkeypatch, 4096)
    original, commits = Counters.count_down, 0

    async def failing(self: Counters) -> None:
        nonlocal commits
        commits += 1
        if commits != 12:
            return await original(self)
        for index in [each for each in self._blocks if each not in self._dirty_blocks]:
            del self._blocks[index]  # as if the cache was small
        waiting, fault = self.to_count_down, host.fault(op=READ, errno=errno.EIO, times=1)
        with pytest.raises(OSError):
            await original(self)
        assert fault.hits == 1 and self.to_count_down == waiting
        raise OSError(errno.EIO, "as it said")

    monkeypatch.setattr(Counters, "count_down", failing)
    with pytest.raises(OSError, match="as it said"):
        opened.run(opened.node.snapshots.delete(made))
    assert opened.node.metadata.to_count_down > 1000
    opened.run(opened.backend.co_flush())
    assert opened.content() == b"b" * opened.size
    opened.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings[:5]


def test_what_somebody_holds_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again with each lot, which would take minutes for a large disk."""
    host, opened, made = many(monkeypatch, 4096)
    original, look, looks = Counters.count_down, Counters._block, 0

    async def block(self: Counters, index: int) -> Any:
        nonlocal looks
        looks += 1
        return await look(self, index)

    async def counting(self: Counters) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Counters, "_block", block)
            await original(self)

    monkeypatch.setattr(Counters, "count_down", counting)
    release = opened.node.hold_bytes()
    assert release is not None
    opened.run(opened.node.snapshots.delete(made))
    metadata = opened.node.metadata
    assert metadata.to_count_down > 4096 and 4096 < looks < 2 * metadata.to_count_down
    release()
    opened.run(opened.backend.co_flush())
    opened.run(opened.backend.co_flush())
    assert not metadata.to_count_down
    opened.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings[:5]


@pytest.mark.parametrize("lazy", [False, True])
def test_counters_of_many_clusters_do_not_stay_in_memory(lazy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that change in lots, at least: they are written with each."""
    host, opened, made = many(monkeypatch, 8192, **({"lazy_refcounts": True} if lazy else {}))
    original, most = Counters.count_down, 0

    async def watching(self: Counters) -> None:
        nonlocal most
        await original(self)
        most = max(most, len(self._dirty_blocks))

    monkeypatch.setattr(Counters, "count_down", watching)
    opened.run(opened.node.snapshots.delete(made))
    assert most <= opened.node.metadata.settings.refcount_blocks
    opened.close()
    assert check(host, "disk.qcow2").status == 0


def test_a_table_that_a_snapshot_has_twice() -> None:
    """A small image would lead to billions of clusters that way."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=200 * 512, cluster_size=512)
    with disk(host, "disk.qcow2") as opened:
        opened.run(opened.backend.co_pwrite(0, b"a" * 200 * 512))
        made = opened.run(opened.node.snapshots.create("one", date_ns=1))
    image = bytearray(host.content("disk.qcow2"))
    image[made.l1_offset + 8 : made.l1_offset + 16] = image[made.l1_offset : made.l1_offset + 8]
    replace_file(host, "disk.qcow2", image)
    with disk(host, "disk.qcow2") as opened:
        for act in (opened.node.snapshots.apply, opened.node.snapshots.delete):
            with pytest.raises(ImageError, match=r"snapshot 'one': L2 table offset 0x[0-9a-f]+ is there twice"):
                opened.run(act(made))
        assert opened.content() == b"a" * 200 * 512


@pytest.mark.parametrize("what", ["create", "apply", "delete", "shrink"])
def test_memory_for_large_disks(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cluster more costs in memory while a snapshot comes or goes, or what is behind an end: some bytes of
    counters, and no object. A disk of terabytes has many millions of clusters."""
    monkeypatch.setattr(Counters, "freed_max", 1 << 10)
    monkeypatch.setattr(tally, "PIECE", 1 << 10)

    def peak(count: int) -> int:
        path = str(tmp_path / f"{count}")
        bottomhalf.create(path, format="qcow2", size=count * 4096, cluster_size=4096, preallocation="metadata")
        with disk(LinuxHost(), path) as opened:
            own = opened.node.snapshots
            made = opened.run(own.create("one", date_ns=1))
            if what == "delete":  # half of it is not the disk's any more
                opened.run(opened.backend.co_truncate(count * 2048))
            acts = {
                "create": lambda: own.create("two", date_ns=2),
                "apply": lambda: own.apply(made),
                "delete": lambda: own.delete(made),
                "shrink": lambda: opened.backend.co_truncate(4096),
            }
            tracemalloc.start()
            opened.run(acts[what]())
            _, found = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert not bottomhalf.check(path).corruptions
        return found

    few, many = 8_000, 32_000
    assert (peak(many) - peak(few)) / (many - few) < 24  # batches of tables are in it
