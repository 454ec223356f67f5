# SPDX-License-Identifier: Apache-2.0
"""Persistent bitmaps: what an image keeps of them, and what a power cut or a failing disk leaves."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from bottomhalf.block import BlockError, ImageError
from bottomhalf.block.dirty import NamedBitmap, add_bitmap, drop_bitmap, merge_bitmaps, set_enabled
from bottomhalf.drivers.qcow2 import bitmaps, keeping, layout
from bottomhalf.drivers.registry import reopen_nodes
from bottomhalf.host.request import FLUSH, READ, WRITE
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.drivers.qcow2.bench import Disk, check, make, replace

SHAPES: list[dict[str, Any]] = [
    {"cluster_size": 512, "size": 3000 * 512},
    {"cluster_size": 4096, "size": 9 << 20},
    {"cluster_size": 16384, "size": 5 << 20, "extended_l2": True},
    {"cluster_size": 512, "size": 3000 * 512, "lazy_refcounts": True},
    {"cluster_size": 65536, "size": 0},
]
GRANULARITIES = (512, 4096, 65536)
POSITIONS_MAX = 400


class Player:
    """A disk and the pieces that each of its bitmaps should have as dirty."""

    def __init__(self, host: SimHost, **options: Any) -> None:
        self.host = host
        self.options = options
        self.disk = self._opened()
        self.dirty: dict[str, set[int]] = {name: set() for name in self.disk.node.bitmaps}

    def _opened(self) -> Disk:
        disk = Disk(self.host, "disk.qcow2", **self.options)
        disk.backend.allow_inactive = True
        return disk

    def bitmap(self, name: str) -> NamedBitmap:
        return self.disk.node.bitmaps[name]

    def add(self, name: str, granularity: int, **options: Any) -> None:
        add_bitmap(self.disk.node, name, granularity, **options)
        self.dirty[name] = set()

    def remove(self, name: str) -> None:
        self.disk.run(self.disk.node.bitmap_keeper.co_forget(name))
        drop_bitmap(self.disk.node, self.bitmap(name))
        del self.dirty[name]

    def touch(self, offset: int, length: int) -> None:
        for name, dirty in self.dirty.items():
            bitmap = self.bitmap(name)
            if bitmap.enabled and length:
                dirty.update(range(offset // bitmap.granularity, (offset + length - 1) // bitmap.granularity + 1))

    def write(self, offset: int, length: int, byte: bytes = b"x") -> None:
        self.disk.run(self.disk.backend.co_pwrite(offset, byte * length))
        self.touch(offset, length)

    def resize(self, size: int) -> None:
        self.disk.run(self.disk.node.co_truncate(size))
        for name, dirty in self.dirty.items():
            dirty.difference_update([piece for piece in dirty if piece * self.bitmap(name).granularity >= size])

    def see(self) -> None:
        assert self.disk.node.bitmaps.keys() == self.dirty.keys()
        for name, dirty in self.dirty.items():
            assert pieces(self.bitmap(name)) == dirty, name

    def close(self) -> None:
        for name in [name for name in self.dirty if not self.bitmap(name).persistent]:
            del self.dirty[name]
        self.disk.close()
        found = check(self.host, "disk.qcow2")
        assert not found.corruptions and not found.leaks and not found.check_errors, found.findings

    def reopen(self) -> None:
        """Close it and open it again."""
        enabled = {name: self.bitmap(name).enabled for name in self.dirty}
        self.close()
        self.disk = self._opened()
        assert {name: self.bitmap(name).enabled for name in self.dirty} == {name: enabled[name] for name in self.dirty}


def pieces(bitmap: NamedBitmap) -> set[int]:
    found: set[int] = set()
    for begin, end in bitmap.dirty_ranges(0, bitmap.size):
        found.update(range(begin // bitmap.granularity, -(-end // bitmap.granularity)))
    return found


def directory(host: SimHost) -> list[bitmaps.Bitmap]:
    """What the image says of its bitmaps."""
    disk = Disk(host, "disk.qcow2", **{"read-only": True, "force-share": True})
    entries = disk.node.bitmap_keeper.entries
    disk.close()
    return entries


def test_random_sequences(seed: int) -> None:
    """Beside a model: writes, discards, sizes, bitmaps of all kinds, and again and again the end of the program."""
    host, chance, shape = SimHost(seed), random.Random(seed), SHAPES[seed % len(SHAPES)]
    make(host, "disk.qcow2", **shape)
    player = Player(host)
    for number in range(60):
        what = chance.choice(
            ("write", "write", "discard", "zero", "resize", "add", "add", "remove", "enable", "merge", "clear", "fill",
             "close", "inactive", "read-only", "flush")
        )  # fmt: skip
        disk, size = player.disk, player.disk.size
        offset = chance.randrange(max(size, 1))
        length = min(chance.choice((0, 1, 512, 30_000, 400_000)), size - offset)
        name = chance.choice([*player.dirty, ""])
        if what == "write":
            player.write(offset, length)
        elif what == "discard":
            disk.run(disk.backend.co_discard(offset, length))
            player.touch(offset, length)
        elif what == "zero":
            disk.run(disk.backend.co_write_zeroes(offset, length))
            player.touch(offset, length)
        elif what == "flush":
            disk.run(disk.backend.co_flush())
        elif what == "resize":
            player.resize(chance.randrange(1, 20_000) * 512)
        elif what == "add" and len(player.dirty) < 5:
            kind = {"persistent": chance.random() < 0.8, "enabled": chance.random() < 0.8}
            player.add(f"b{number}", chance.choice(GRANULARITIES), **kind)
        elif what == "close":
            player.reopen()
        elif what == "inactive":
            disk.graph.inactivate(disk.node)
            assert not any(bitmap.persistent for bitmap in disk.node.bitmaps.values())
            disk.graph.activate(disk.node)
        elif what == "read-only" and "lazy_refcounts" not in shape:
            disk.backend.remove()
            for read_only in (True, False):
                switch(disk, read_only)
            disk.backend.insert(disk.node)
        elif name and what == "remove":
            player.remove(name)
        elif name and what == "enable":
            set_enabled(disk.node, player.bitmap(name), not player.bitmap(name).enabled)
        elif name and what == "clear":
            player.bitmap(name).clear()
            player.dirty[name] = set()
        elif name and what == "fill":
            player.bitmap(name).fill()
            player.dirty[name] = set(range(player.bitmap(name).bits))
        elif name and what == "merge":
            other = chance.choice(list(player.dirty))
            merge_bitmaps(player.bitmap(name), [player.bitmap(other)])
            step, own = player.bitmap(other).granularity, player.bitmap(name).granularity
            for piece in list(player.dirty[other]):
                end = min((piece + 1) * step, size)
                player.dirty[name].update(range(piece * step // own, -(-end // own)))
        player.see()
    player.reopen()
    player.see()
    for name in list(player.dirty):
        player.remove(name)
    player.close()
    assert directory(host) == []


def switch(disk: Disk, read_only: bool) -> None:
    options = {
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "read-only": read_only,
        "file": {"driver": "file", "filename": "disk.qcow2", "discard": "unmap"},
    }
    reopen_nodes(disk.graph, [from_json(BlockdevOptions, options)])


def prepared(seed: int, shape: dict[str, Any], **options: Any) -> Player:
    """A disk with two bitmaps that were stored, a third that was not, and writes since."""
    host, chance = SimHost(seed), random.Random(seed)
    make(host, "disk.qcow2", **shape)
    player = Player(host)
    player.write(0, 600)  # so that the next write there goes into a cluster that is there
    player.add("old", 512, persistent=True)
    player.add("rests", 4096, persistent=True)
    player.write(chance.randrange(1 << 20), 70_000)
    set_enabled(player.disk.node, player.bitmap("rests"), False)
    player.reopen()
    player.add("new", 512, persistent=True)
    player.write(chance.randrange(1 << 20), 5000)
    player.disk.run(player.disk.backend.co_flush())
    return player


def test_in_use_while_it_is_written_to() -> None:
    player = prepared(1, SHAPES[0])
    assert [(entry.name, entry.in_use) for entry in directory(player.host)] == [("rests", True), ("old", True)]
    player.disk.graph.inactivate(player.disk.node)
    flags = [(entry.name, entry.in_use, entry.auto) for entry in directory(player.host)]
    assert flags == [("rests", False, False), ("old", False, True), ("new", False, True)], "new ones come last"
    player.disk.graph.activate(player.disk.node)
    assert all(entry.in_use for entry in directory(player.host))
    player.see()
    player.close()
    assert not any(entry.in_use for entry in directory(player.host))


def test_one_that_is_shown_stays() -> None:
    """An image is not handed over with a bitmap that an export shows."""
    player = prepared(1, SHAPES[0])
    player.bitmap("old").busy = True
    with pytest.raises(BlockError, match="Failed to inactivate node: Bitmap 'old' is currently in use"):
        leave(player)
    player.see()
    player.bitmap("old").busy = False
    leave(player)
    player.disk.graph.activate(player.disk.node)
    player.see()
    player.close()


def test_after_a_crash_they_can_only_be_removed() -> None:
    player = prepared(1, SHAPES[0])
    player.disk.abandon()
    disk = Disk(after_power_cut(player.host, 1), "disk.qcow2")
    assert [(b.name, b.inconsistent, b.enabled) for b in disk.node.bitmaps.values()] == [
        ("rests", True, False),
        ("old", True, False),
    ]
    with pytest.raises(BlockError, match="Bitmap 'rests' is inconsistent and cannot be used"):
        disk.run(disk.node.co_truncate(512))
    with pytest.raises(OSError, match="Device has active dirty bitmaps"):
        made = disk.run(disk.node.snapshots.create("s", date_ns=1))
        disk.run(disk.node.snapshots.apply(made))
    add_bitmap(disk.node, "fresh", persistent=True)
    disk.run(disk.node.bitmap_keeper.co_forget("old"))
    drop_bitmap(disk.node, disk.node.bitmaps["old"])
    host = disk.host
    disk.close()
    assert [(entry.name, entry.in_use) for entry in directory(host)] == [("rests", True), ("fresh", False)]
    found = check(host, "disk.qcow2", "leaks")
    assert not found.corruptions and not found.check_errors, found.findings


# -- a disk that fails, a power cut -----------------------------------------------------------------------------------


def leave(player: Player) -> None:
    player.disk.graph.inactivate(player.disk.node)


def rest(player: Player) -> None:
    player.disk.backend.remove()
    switch(player.disk, True)


def come(player: Player) -> None:
    """Take it back, which says that bitmaps are in use, and write."""
    player.disk.graph.activate(player.disk.node)
    player.write(0, 600, b"y")


def remove(player: Player) -> None:
    player.remove("old")


OPERATIONS: dict[str, Callable[[Player], None]] = {"leave": leave, "rest": rest, "come": come, "remove": remove}


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("op", [READ, WRITE, FLUSH])
def test_every_position(op: int, operation: str, shape: dict[str, Any]) -> None:
    """The disk fails from there on, or the power goes: what the image says to be good is what it was before, or what it
    was to become; nothing is damaged."""
    for position in range(POSITIONS_MAX):
        player = prepared(position % 3, shape)
        if operation == "come":
            player.disk.graph.inactivate(player.disk.node)  # so that closing has nothing to write
        good = {name: set(dirty) for name, dirty in player.dirty.items()}
        fault = player.host.fault(op=op, errno=errno.EIO, after=position)
        try:
            OPERATIONS[operation](player)
        except (OSError, BlockError):
            assert fault.hits
        hits = fault.hits
        for chance in range(3):
            see_survivor(player.host, chance, good, wrote=operation == "come")
        fault.remove()
        if not hits:
            return
        player.disk.abandon()
    pytest.fail(f"{operation} has more than {POSITIONS_MAX} steps")


def after_power_cut(host: SimHost, chance: int) -> SimHost:
    """Another machine, with what the disk may have kept."""
    left = SimHost(chance)
    left.add_file("disk.qcow2", host.survivor("disk.qcow2"))
    return left


def see_survivor(host: SimHost, chance: int, good: dict[str, set[int]], *, wrote: bool) -> None:
    """What a power cut leaves."""
    left = after_power_cut(host, chance)
    found = check(left, "disk.qcow2")
    assert not found.corruptions and not found.check_errors, found.findings
    disk = Disk(left, "disk.qcow2")
    for bitmap in disk.node.bitmaps.values():
        if not bitmap.inconsistent:
            dirty = good[bitmap.name]
            if wrote and bitmap.enabled and b"y" in disk.content()[:600]:
                assert {0, 1} <= dirty, "it was written to while the image said that its bitmaps are good"
            assert pieces(bitmap) == dirty, bitmap.name
    disk.close()
    after = check(left, "disk.qcow2")
    assert not after.corruptions and not after.check_errors and after.leaks <= found.leaks, after.findings


def test_a_disk_that_fails_for_a_while() -> None:
    """Storing fails, the node goes on to be written to, and the next attempt has everything."""
    for position in range(POSITIONS_MAX):
        player = prepared(1, SHAPES[0])
        fault = player.host.fault(op=WRITE, errno=errno.EIO, after=position)
        with pytest.raises(BlockError, match="Failed to inactivate node"):
            leave(player)
            raise BlockError("Failed to inactivate node: it did not")
        hits = fault.hits
        fault.remove()
        if not hits:
            return
        if player.disk.node.active and not player.disk.node.bitmap_keeper.sealed:
            player.write(1000, 1)
            player.see()
            leave(player)
            assert not any(entry.in_use for entry in directory(player.host))
            player.disk.graph.activate(player.disk.node)
            player.see()
            player.close()  # which finds no leaks
        else:
            player.disk.abandon()
    pytest.fail("no end")


def test_an_image_that_cannot_be_told_is_not_written_to() -> None:
    """It becomes writable, but its bitmaps cannot be marked: they would be wrong."""
    player = prepared(1, SHAPES[0])
    rest(player)
    fault = player.host.fault(op=WRITE, errno=errno.EIO)
    with pytest.raises(BlockError, match="bitmaps of 'disk' cannot be marked as in use"):
        switch(player.disk, False)
    fault.remove()
    player.disk.backend.insert(player.disk.node)
    with pytest.raises(OSError, match="not permitted"):
        player.write(0, 1)
    switch_again = player.disk.graph
    player.disk.backend.remove()
    switch(player.disk, False)
    assert switch_again is player.disk.graph
    player.disk.backend.insert(player.disk.node)
    player.write(0, 1)
    player.see()
    player.close()


# -- who does not know bitmaps, and who means harm --------------------------------------------------------------------


def stored(shape: dict[str, Any] = SHAPES[0]) -> tuple[SimHost, bytearray, int, int]:
    """An image with two bitmaps, closed: its host, bytes, where the extension's data are, and the directory."""
    player = prepared(1, shape)
    player.remove("rests")
    player.close()
    content = bytearray(player.host.content("disk.qcow2"))
    at = content.index(struct.pack(">II", layout.EXTENSION_BITMAPS, 24)) + 8
    _, _, _, offset = struct.unpack_from(">IIQQ", content, at)
    return player.host, content, at, offset


def test_somebody_who_knows_no_bitmaps_has_written() -> None:
    """He has cleared the bit; the bitmaps are forgotten, and their clusters leaked."""
    host, content, _, _ = stored()
    struct.pack_into(">Q", content, 88, 0)
    replace(host, "disk.qcow2", content)
    assert directory(host) == []
    player = Player(host)
    assert player.dirty == {}
    player.write(0, 1)
    player.disk.close()
    found = check(host, "disk.qcow2", "leaks")
    assert found.leaks_fixed and not found.corruptions
    assert struct.pack(">II", layout.EXTENSION_BITMAPS, 24) not in host.content("disk.qcow2")[:512]
    player = Player(host)
    player.add("again", 512, persistent=True)
    player.write(0, 1)
    player.reopen()
    player.see()
    player.close()


EXTENSION = [
    (0, ">I", 0, "found bitmaps extension with zero bitmaps"),
    (0, ">I", 65536, "exceeding the QEMU supported maximum of 65535"),
    (0, ">I", 3, "Less bitmaps found than specified"),
    (0, ">I", 1, "More bitmaps found than specified"),
    (4, ">I", 1, "Reserved field is not zero"),
    (8, ">Q", (64 << 20) + 8, "exceeds the maximum supported size"),
    (8, ">Q", 0, "directory size is zero"),
    (8, ">Q", 20, "Broken bitmap directory"),
    (16, ">Q", 1, "invalid bitmap directory offset"),
    (16, ">Q", 0, "invalid bitmap directory offset"),
    (16, ">Q", 1 << 62, "doesn't satisfy the constraints"),
    (16, ">Q", (1 << 64) - 512, "invalid bitmap directory offset"),
    (-4, ">I", 16, "Invalid extension length"),
]
ENTRY = [
    (0, ">Q", 8, "doesn't satisfy the constraints"),
    (0, ">Q", 0, "doesn't satisfy the constraints"),
    (8, ">I", 0, "doesn't satisfy the constraints"),
    (8, ">I", 0x8000001, "doesn't satisfy the constraints"),
    (8, ">I", 2, "its table has 2 entries"),
    (12, ">I", 8, "doesn't satisfy the constraints"),
    (16, ">B", 2, "doesn't satisfy the constraints"),
    (17, ">B", 8, "doesn't satisfy the constraints"),
    (17, ">B", 32, "doesn't satisfy the constraints"),
    (18, ">H", 0, "doesn't satisfy the constraints"),
    (18, ">H", 2000, "Broken bitmap directory"),
    (20, ">I", 8, "bitmap"),
    (20, ">I", (1 << 32) - 1, "Broken bitmap directory"),
]
TABLE = [(0, ">Q", 2, "is invalid"), (0, ">Q", 8, "is invalid"), (0, ">Q", 513, "is invalid")]


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize(("place", "at", "form", "value", "text"), [
    *(("extension", *each) for each in EXTENSION),
    *(("entry", *each) for each in ENTRY),
    *(("table", *each) for each in TABLE),
])  # fmt: skip
def test_hostile(place: str, at: int, form: str, value: int, text: str, read_only: bool) -> None:
    host, content, extension, offset = stored()
    (table,) = struct.unpack_from(">Q", content, offset)
    struct.pack_into(form, content, {"extension": extension, "entry": offset, "table": table}[place] + at, value)
    replace(host, "disk.qcow2", content)
    before = host.content("disk.qcow2")
    with pytest.raises((ImageError, BlockError), match=text):
        Disk(host, "disk.qcow2", **({"read-only": True} if read_only else {}))
    assert host.content("disk.qcow2") == before
    check(host, "disk.qcow2")  # which tells it, or does not look at it


def test_two_of_one_name() -> None:
    host, content, _, offset = stored()
    second = content.index(b"new", offset)
    content[second : second + 3] = b"old"
    replace(host, "disk.qcow2", content)
    with pytest.raises(BlockError, match="Bitmap already exists: old"):
        Disk(host, "disk.qcow2")


def test_more_bits_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    host, _, _, _ = stored()
    monkeypatch.setattr(keeping, "LOADED_BITS_MAX", 3000)
    with pytest.raises(BlockError, match="the image's bitmaps have more than 3000 bits"):
        Disk(host, "disk.qcow2")


@pytest.mark.parametrize("what", ["directory", "table", "bits"])
def test_places_of_other_tables(what: str) -> None:
    """Whoever says that a bitmap lies where L1 does is found out before anything is written or counted down there."""
    host, content, extension, offset = stored()
    (l1,) = struct.unpack_from(">Q", content, 40)
    (table,) = struct.unpack_from(">Q", content, offset)
    if what == "directory":
        count, reserved, size, _ = struct.unpack_from(">IIQQ", content, extension)
        content[l1 : l1 + size] = content[offset : offset + size]  # a directory that is to be believed
        struct.pack_into(">IIQQ", content, extension, count, reserved, size, l1)
    elif what == "table":
        struct.pack_into(">Q", content, offset, l1)
        struct.pack_into(">I", content, offset + 12, bitmaps.IN_USE)
    else:
        struct.pack_into(">Q", content, table, l1)
    replace(host, "disk.qcow2", content)
    if what == "directory":
        with pytest.raises((ImageError, BlockError)):
            Disk(host, "disk.qcow2")
        return
    disk = Disk(host, "disk.qcow2")
    with pytest.raises((ImageError, OSError), match=r"overlaps with active L1 table|is invalid"):
        disk.run(disk.node.bitmap_keeper.co_forget("old"))
    assert bytes(host.content("disk.qcow2")[l1 : l1 + 8]) == bytes(content[l1 : l1 + 8])
    disk.abandon()


# -- limits -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    host = SimHost(1)
    make(host, "disk.qcow2", size=1 << 20)
    make(host, "old.qcow2", size=1 << 20, version=2)
    make(host, "huge.qcow2", size=1 << 50)
    old = Disk(host, "old.qcow2")
    with pytest.raises(BlockError, match="Cannot store dirty bitmaps in qcow2 v2 files"):
        add_bitmap(old.node, "b", persistent=True)
    old.close()
    huge = Disk(host, "huge.qcow2")
    with pytest.raises(BlockError, match="Use larger granularity"):
        add_bitmap(huge.node, "b", 512, persistent=True)
    huge.close()
    disk = Disk(host, "disk.qcow2")
    with pytest.raises(BlockError, match="Name length exceeds maximum"):
        add_bitmap(disk.node, "b" * 1024, persistent=True)
    monkeypatch.setattr(bitmaps, "BITMAPS_MAX", 2)
    add_bitmap(disk.node, "b0", persistent=True)
    add_bitmap(disk.node, "b1", persistent=True)
    with pytest.raises(BlockError, match="Maximum number of persistent bitmaps is already reached"):
        add_bitmap(disk.node, "b2", persistent=True)
    monkeypatch.setattr(bitmaps, "BITMAPS_MAX", 10)
    monkeypatch.setattr(bitmaps, "DIRECTORY_BYTES_MAX", 80)
    with pytest.raises(BlockError, match="Not enough space in the bitmap directory"):
        add_bitmap(disk.node, "b2", persistent=True)
    disk.close()


def test_many() -> None:
    host = SimHost(1)
    make(host, "disk.qcow2", size=1 << 20, cluster_size=512)
    player = Player(host)
    for n in range(300):
        player.add(f"bitmap number {n}", 512, persistent=True, enabled=n % 2 == 0)
    player.write(1000, 100_000)
    player.reopen()
    player.see()
    player.close()
