# SPDX-License-Identifier: Apache-2.0
"""Disks that become larger and smaller while they are used."""

from __future__ import annotations

import errno
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from bottomhalf.aio import gather, give_way, sleep_ns
from bottomhalf.block import BlockError
from bottomhalf.block.resize import Preallocation, co_resize
from bottomhalf.drivers.qcow2.counters import Counters
from bottomhalf.host.request import COMPRESSED, FLUSH, READ, WRITE
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, check, disk, make

SHAPES: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "version": 2},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 512, "refcount_bits": 1},
    {"cluster_size": 512, "data_file": "data.raw"},
    {"cluster_size": 512, "data_file": "data.raw", "data_file_raw": True},
]
POSITIONS_MAX = 400
MIB = 1 << 20


def resized(opened: Disk, model: bytearray, size: int, mode: str = "off") -> None:
    opened.run(co_resize(opened.node, size, Preallocation(mode)))
    del model[size:]
    model.extend(bytes(size - len(model)))
    assert opened.size == size


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_sizes(seed: int, shape: dict[str, Any]) -> None:
    """What is cut off does not come back, and all space is accounted for; snapshots keep what they have."""
    host, chance = SimHost(seed), random.Random(seed)
    cluster = shape["cluster_size"]
    size = chance.randrange(1, 40) * 512
    make(host, "disk.qcow2", **shape, size=size)
    opened, model = Disk(host, "disk.qcow2"), bytearray(size)
    kept: list[tuple[Any, bytes]] = []
    with_snapshots = shape.get("version") != 2 and "refcount_bits" not in shape and "data_file" not in shape
    for number in range(40):
        if chance.random() < 0.7 and model:
            length = min(chance.choice((1, 512, cluster, 3 * cluster)), len(model))
            offset = chance.randrange(len(model) - length + 1)
            data = bytes([number + 1]) * length
            opened.run(opened.backend.co_pwrite(offset, data))
            model[offset : offset + length] = data
        elif with_snapshots and chance.random() < 0.2:
            opened.run(opened.node.co_save_vmstate(0, memoryview(b"machine" * 100)))
            if chance.random() < 0.5:
                kept.append((opened.run(opened.node.snapshots.create("s", date_ns=0)), bytes(model)))
        else:
            size = chance.choice((chance.randrange(0, 60), chance.randrange(0, 2000))) * 512
            mode = chance.choice(("off", "off", "metadata", "falloc", "full"))
            resized(opened, model, size, mode if size > len(model) else "off")
        if chance.random() < 0.3:
            assert opened.content() == model
    assert opened.content() == model
    opened.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks and not found.check_errors, found.findings
    with disk(host, "disk.qcow2") as again:
        assert again.content() == model
        for snapshot, content in kept:
            again.run(again.node.snapshots.apply(snapshot))
            assert again.content() == content


def test_a_longer_backing_file_does_not_come_to_light(seed: int) -> None:
    host = SimHost(seed)
    make(host, "disk.qcow2", size=10 * 512, cluster_size=512)
    host.add_file("base.raw", b"b" * 100 * 512)
    backing = {"driver": "raw", "file": {"driver": "file", "filename": "base.raw"}, "read-only": True}
    with disk(host, "disk.qcow2", backing=backing) as opened:
        model = bytearray(b"b" * 10 * 512)
        for size in (50, 5, 200):
            resized(opened, model, size * 512)
            assert opened.content() == model


def test_what_arrived_behind_the_end_does_not_come_to_light(seed: int) -> None:
    """A write waits for the tables while the disk becomes smaller; where it was to go is no disk any more."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=60 * 512, cluster_size=512)
    with disk(host, "disk.qcow2") as opened:
        backend = opened.backend

        async def late() -> None:
            await sleep_ns(1000)
            with suppress(OSError):
                await backend.co_pwrite(50 * 512, b"x" * 512)

        async def play() -> None:
            await gather(backend.co_pwrite(30 * 512, b"c" * 512), backend.co_truncate(20 * 512), late())
            await backend.co_truncate(60 * 512)

        opened.run(play())
        assert not any(opened.content())
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def test_a_power_cut_brings_no_backing_file_to_light(seed: int) -> None:
    """The size is on the disk after the entries that hide what a longer backing file has."""
    base = b"b" * 100 * 512
    backing = {"driver": "raw", "file": {"driver": "file", "filename": "base.raw"}, "read-only": True}
    for position in range(100):
        host = SimHost(seed)
        make(host, "disk.qcow2", size=10 * 512, cluster_size=512)
        host.add_file("base.raw", base)
        opened = Disk(host, "disk.qcow2", backing=backing)
        fault = host.fault(path="disk.qcow2", op=FLUSH, errno=errno.EIO, after=position)
        with suppress(OSError):
            opened.run(co_resize(opened.node, 50 * 512))
        after = SimHost(seed)
        for path in host.disk.files:
            after.add_file(path, host.survivor(path))
        with disk(after, "disk.qcow2", backing=backing) as reopened:
            assert reopened.content() in (base[: 10 * 512], base[: 10 * 512] + bytes(40 * 512))
        opened.abandon()
        if not fault.hits:
            return
    raise AssertionError("there is no end of flushes")


@pytest.mark.parametrize("to", [7, 300])
def test_a_size_that_failed_is_the_old_one_and_can_be_asked_for_again(to: int) -> None:
    for position in range(POSITIONS_MAX):
        host = SimHost(position)
        make(host, "disk.qcow2", size=100 * 512, cluster_size=512)
        with disk(host, "disk.qcow2") as opened:
            opened.run(opened.backend.co_pwrite(0, b"a" * 512))
            fault = host.fault(errno=errno.EIO, after=position)
            try:
                opened.run(co_resize(opened.node, to * 512))
            except OSError:
                assert opened.size == opened.node.header.size == 100 * 512
            hits = fault.hits
            fault.remove()
            opened.run(co_resize(opened.node, to * 512))
            assert opened.size == opened.node.header.size == to * 512
        if not hits:
            return
    raise AssertionError("there is no end of I/O")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [READ, WRITE, FLUSH])
@pytest.mark.parametrize("to", [7, 300])
def test_every_position(op: int, to: int, shape: dict[str, Any]) -> None:
    """The disk fails from there on, or the power goes: the size is the old or the new one, and what both have is there.
    (What was to be cut off may be zeroes already.)"""
    for position in range(POSITIONS_MAX):
        host = SimHost(position)
        make(host, "disk.qcow2", **shape, size=100 * 512)
        opened = Disk(host, "disk.qcow2")
        content = bytes(range(1, 101)) * 512
        opened.run(opened.backend.co_pwrite(0, content))
        opened.run(opened.backend.co_flush())
        fault = host.fault(op=op, errno=errno.EIO, after=position)
        try:
            opened.run(co_resize(opened.node, to * 512))
        except OSError as error:
            assert error.errno == errno.EIO
        hits = fault.hits
        for chance in range(2):
            after = SimHost(chance)
            for path in host.disk.files:
                after.add_file(path, host.survivor(path))
            found = check(after, "disk.qcow2")
            assert not found.corruptions and not found.check_errors, found.findings
            with disk(after, "disk.qcow2") as reopened:
                assert reopened.size in (100 * 512, to * 512)
                _see(reopened.content(), content, to * 512)
        fault.remove()
        _see(opened.content(), content, to * 512)
        opened.close()
        found = check(host, "disk.qcow2")
        assert not found.corruptions, found.findings
        if not hits:
            break
    else:
        raise AssertionError("there is no end of I/O")
    assert position or op == READ  # all tables may be in memory


def _see(found: bytes, content: bytes, size: int) -> None:
    both = min(size, len(content))
    assert found[:both] == content[:both]
    assert all(now in (0, was) for now, was in zip(found[both:], content[both:], strict=False))
    assert not any(found[len(content) :])


def test_refusals() -> None:
    host = SimHost(0)
    make(host, "disk.qcow2", size=100 * 512, cluster_size=512, version=2)
    with disk(host, "disk.qcow2") as opened:
        for size, number in ((100, errno.EINVAL), (1 << 62, errno.EFBIG)):
            with pytest.raises(OSError) as caught:
                opened.run(co_resize(opened.node, size))
            assert caught.value.errno == number
        with pytest.raises(BlockError, match="Preallocation can't be used for shrinking"):
            opened.run(co_resize(opened.node, 512, Preallocation.FULL))
        opened.run(opened.node.snapshots.create("s", date_ns=0))
        with pytest.raises(OSError, match="Can't resize a v2 image which has snapshots"):
            opened.run(co_resize(opened.node, 512))
        assert opened.size == 100 * 512


def test_a_power_cut_while_it_grows_over_a_longer_backing_file(seed: int) -> None:
    """The backing file behind the old end is never seen: the header tells the new size after the zeroes are there."""
    host = SimHost(seed)
    host.add_file("backing.raw", b"B" * 200 * 512)
    make(host, "disk.qcow2", size=80 * 512 + 512, cluster_size=1024)
    backing = {"driver": "file", "filename": "backing.raw", "read-only": True}
    states: dict[bytes, bytes] = {}

    def note() -> None:
        states.update((state.digest, state.files["disk.qcow2"]) for state in host.survivors("disk.qcow2"))

    with disk(host, "disk.qcow2", backing=backing) as opened:
        host.before_durable = note
        opened.run(opened.backend.co_truncate(190 * 512))
        note()
        host.before_durable = None
    sizes = set()
    for content in states.values():
        after = SimHost(seed)
        after.add_file("disk.qcow2", content)
        after.add_file("backing.raw", b"B" * 200 * 512)
        with disk(after, "disk.qcow2", backing=backing) as reopened:
            sizes.add(reopened.size)
            assert reopened.content() == (b"B" * 81 * 512).ljust(reopened.size, b"\0")
    assert sizes == {81 * 512, 190 * 512}


@pytest.mark.parametrize("size", [20 * 512, 300 * 512])
@pytest.mark.parametrize("op", [WRITE, FLUSH])
def test_a_change_that_failed_does_not_happen_with_the_next_flush(op: int, size: int) -> None:
    """Whoever was told that it failed goes on with the size that he sees, and finds tomorrow what he wrote up to there.
    (It is the new one if what failed was giving back what is behind a nearer end.)"""
    old = 100 * 512
    for position in range(100):
        host = SimHost(position)
        make(host, "disk.qcow2", size=old, cluster_size=512)
        with disk(host, "disk.qcow2") as opened:
            opened.run(opened.backend.co_pwrite(0, b"x" * old))
            opened.run(opened.backend.co_flush())
            fault = host.fault(path="disk.qcow2", op=op, errno=errno.EIO, after=position, times=1)
            try:
                opened.run(opened.backend.co_truncate(size))
            except OSError as error:
                assert error.errno == errno.EIO
            else:
                assert opened.size == size
                fault.remove()
                break
            assert fault.hits == 1
            seen = opened.size
            assert seen == old or seen == size < old
            opened.run(opened.backend.co_pwrite(0, b"y" * seen))
            opened.run(opened.backend.co_flush())
        with disk(host, "disk.qcow2") as opened:
            assert opened.content() == b"y" * seen
    assert position


@pytest.mark.parametrize("shape", [{}, {"version": 2}, {"cluster_size": 16384, "extended_l2": True}], ids=str)
def test_a_power_cut_shows_nothing_of_a_longer_backing_file(shape: dict[str, Any]) -> None:
    """The header says that there is more only when it reads as zeroes."""
    shape = {"cluster_size": 512, **shape}
    old, new = 10 * shape["cluster_size"] + 512, 200 * shape["cluster_size"]
    backing = {"driver": "file", "filename": "base.raw", "read-only": True}
    grown = 0
    for position in range(1000):
        host = SimHost(position)
        host.add_file("base.raw", b"b" * new)
        make(host, "disk.qcow2", size=old, backing_file="base.raw", backing_fmt="raw", **shape)
        opened = Disk(host, "disk.qcow2", backing=backing)
        opened.run(opened.backend.co_pwrite(0, b"mine" * 100))
        opened.run(opened.backend.co_flush())
        fault = host.fault(op=FLUSH, errno=errno.EIO, after=position, times=None)
        try:
            opened.run(co_resize(opened.node, new, Preallocation.OFF))
        except OSError:
            pass
        hits = fault.hits
        fault.remove()
        for chance in range(4):
            after = SimHost(chance)
            after.add_file("base.raw", b"b" * new)
            after.add_file("disk.qcow2", host.survivor("disk.qcow2"))
            assert not check(after, "disk.qcow2").corruptions
            with disk(after, "disk.qcow2", backing=backing) as survivor:
                content = survivor.content()
                grown += survivor.size > old
            assert content == (b"mine" * 100).ljust(old, b"b") + bytes(len(content) - old)
        opened.abandon()
        if not hits:
            assert grown
            return
    raise AssertionError("there is no end of flushes")


def test_a_resize_by_name_hides_what_a_longer_backing_file_has(tmp_path: Path) -> None:
    """bottomhalf.resize() and amend() have to look at that file, and so they need to be allowed to."""
    base, path = tmp_path / "base.raw", tmp_path / "disk.qcow2"
    base.write_bytes(b"b" * 3 * MIB)
    for version, grow in ((2, bottomhalf.resize), (3, bottomhalf.resize), (3, _amend_size)):
        bottomhalf.create(
            path, format="qcow2", size=3 * MIB, version=version, backing_file=str(base), backing_fmt="raw"
        )
        bottomhalf.resize(path, MIB, shrink=True)
        with pytest.raises(BlockError, match="names a backing file"):
            grow(path, 3 * MIB)
        grow(path, 3 * MIB, follow_names=True)
        with bottomhalf.open(path, backing_files=True) as disk:
            assert disk.pread(3 * MIB, 0) == b"b" * MIB + bytes(2 * MIB)


def _amend_size(path: Path, size: int, **more: Any) -> None:
    bottomhalf.amend(path, size=size, **more)


@pytest.mark.parametrize("over", [b"", b"B" * 300 * 512], ids=["alone", "over a backing file"])
def test_a_power_cut_while_it_becomes_smaller(seed: int, over: bytes) -> None:
    """What was behind the end does not come back when it grows again, whatever of it was given back; and with few
    tables in memory nobody sees the backing file where something else was."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=300 * 512, cluster_size=512)
    options: dict[str, Any] = {"l2-cache-size": 1024}
    if over:
        host.add_file("backing.raw", over)
        options["backing"] = {"driver": "file", "filename": "backing.raw", "read-only": True}
    states: dict[bytes, bytes] = {}

    def note() -> None:
        states.update((state.digest, state.files["disk.qcow2"]) for state in host.survivors("disk.qcow2"))

    with disk(host, "disk.qcow2", **options) as opened:
        opened.run(opened.backend.co_pwrite(0, b"x" * 300 * 512))
        opened.run(opened.backend.co_flush())
        for table in (0, 64):  # as many as memory has room for have to be written
            opened.run(opened.backend.co_write_zeroes(table * 512, 512))
        host.before_durable = note
        opened.run(opened.backend.co_truncate(74 * 512))
        note()
        host.before_durable = None
    sizes = set()
    for content in states.values():
        after = SimHost(seed)
        after.add_file("disk.qcow2", content)
        if over:
            after.add_file("backing.raw", over)
        with disk(after, "disk.qcow2", **options) as reopened:
            sizes.add(reopened.size)
            found = reopened.content()
            assert found[512 : 64 * 512] + found[65 * 512 :] == b"x" * (reopened.size - 1024)
            reopened.run(reopened.backend.co_truncate(74 * 512))
            reopened.run(reopened.backend.co_truncate(290 * 512))
            assert reopened.content() == found[: 74 * 512] + bytes(216 * 512)
        result = check(after, "disk.qcow2")
        assert not result.corruptions, result.findings
    assert sizes == {74 * 512, 300 * 512}


def test_the_unpacked_cluster_is_forgotten_with_what_was_cut_off() -> None:
    """Another one may be packed to the same place, and its entry is the same number. (Readers got the old content.)"""
    host = SimHost(0)
    make(host, "disk.qcow2", size=200 * 512, cluster_size=512)
    with disk(host, "disk.qcow2") as opened:
        opened.run(opened.backend.co_pwrite(130 * 512, b"1" * 512, COMPRESSED))
        assert opened.run(opened.backend.co_pread(130 * 512, 512)) == b"1" * 512
        opened.run(opened.backend.co_truncate(100 * 512))
        opened.run(opened.backend.co_truncate(200 * 512))
        opened.run(opened.backend.co_flush())
        for cluster in range(0, 200, 64):  # one of them comes to lie where the first lay
            opened.run(opened.backend.co_pwrite(cluster * 512, b"2" * 512, COMPRESSED))
            assert opened.run(opened.backend.co_pread(cluster * 512, 512)) == b"2" * 512


@pytest.mark.parametrize("in_memory", [True, False])
def test_it_is_forgotten_also_by_who_reads_while_tables_go(in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that nobody drained unpacks a cluster of a table that is next."""
    monkeypatch.setattr(Counters, "freed_max", 1)
    host, cluster, entries = SimHost(0), 4096, 512
    make(host, "disk.qcow2", size=3 * entries * cluster, cluster_size=cluster)
    with disk(host, "disk.qcow2") as opened:
        backend, metadata = opened.backend, opened.node.metadata
        where = 2 * entries * cluster
        opened.run(backend.co_pwrite(entries * cluster, b"P" * cluster))
        opened.run(backend.co_pwrite(where, b"1" * cluster, COMPRESSED))
        opened.run(backend.co_flush())
        old = metadata.l2[2].entries[0]
        if not in_memory:
            metadata.l2.clear()
        read = []
        done = False

        async def reader() -> None:
            while not done:
                read.append(bytes(await backend.co_pread(where, cluster)))
                if not any(read[-1]):
                    return
                await give_way()

        async def truncate() -> None:
            nonlocal done
            await backend.co_truncate(entries * cluster)
            done = True

        async def both() -> None:
            await gather(reader(), truncate())

        opened.run(both())
        assert {*read} <= {b"1" * cluster, bytes(cluster)} and len(read) > 1
        opened.run(backend.co_flush())
        opened.run(backend.co_flush())
        index, entry = 0, 0
        while entry != old:  # whoever comes to lie where it was
            index += 1
            opened.run(backend.co_pwrite(index * cluster, b"2" * cluster, COMPRESSED))
            metadata.packing = 0  # the next one has a cluster of the host to itself
            entry = metadata.l2[0].entries[index]
        assert opened.run(backend.co_pread(index * cluster, cluster)) == b"2" * cluster
