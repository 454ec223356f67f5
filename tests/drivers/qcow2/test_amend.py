# SPDX-License-Identifier: Apache-2.0
"""Images that become others: at each failure and after each power cut they are what they were, or what was asked for,
or something between that is a good image all the same."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bottomhalf.block import BlockError
from bottomhalf.drivers.qcow2.amend import AmendOptions, co_amend, co_rebase
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.host.request import FLUSH, OP_NAMES, READ, WRITE
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, check, disk, make

CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [  # how the image is made, what is changed
    ({"version": 2}, {"compat": "1.1"}),
    ({}, {"compat": "0.10"}),
    ({"lazy_refcounts": True}, {"compat": "0.10"}),
    ({"refcount_bits": 64}, {"refcount_bits": 4}),
    ({"refcount_bits": 1}, {"refcount_bits": 2}),
    ({}, {"refcount_bits": 64}),
    ({"refcount_bits": 2}, {"refcount_bits": 16, "compat": "0.10"}),
    ({"version": 2}, {"compat": "1.1", "refcount_bits": 8, "lazy_refcounts": True, "size": 400 * 512}),
    ({"size": 1200 * 512}, {"refcount_bits": 64}),
]
LONG = "a" * 600  # a name that does not fit into the header's first sector


def scene(host: SimHost, made: dict[str, Any]) -> tuple[Disk, bytes]:
    """An open image with data, zero clusters and compressed ones."""
    shape = {"size": 100 * 512, "cluster_size": 512, **made}
    make(host, "disk.qcow2", **shape)
    opened = Disk(host, "disk.qcow2", backing=None)
    for n in range(0, shape["size"] // 512, 7):
        opened.run(opened.backend.co_pwrite(n * 512, bytes([n % 255 + 1]) * 600))
    opened.run(opened.node.co_pwritev_compressed(20 * 512, 2048, memoryview(b"c" * 2048)))
    opened.run(opened.backend.co_write_zeroes(30 * 512, 10 * 512))
    opened.run(opened.backend.co_discard(50 * 512, 5 * 512))
    content = opened.content()
    opened.close()
    return Disk(host, "disk.qcow2", backing=None), content


def good(host: SimHost, content: bytes) -> Header:
    """The image is whole, and has the content (and perhaps zeroes behind it)."""
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.check_errors, found.findings
    with disk(host, "disk.qcow2", backing=None) as opened:
        assert opened.content().rstrip(b"\0") == content.rstrip(b"\0")
        opened.run(opened.backend.co_pwrite(0, b"it can be written"))
        opened.run(opened.backend.co_write_zeroes(0, 512))
    found = check(host, "disk.qcow2")
    assert not found.corruptions, found.findings
    return Header.parse(host.content("disk.qcow2"))


def is_as_asked(header: Header, wanted: dict[str, Any]) -> bool:
    found = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "refcount_bits": 1 << header.refcount_order,
        "lazy_refcounts": bool(header.compatible & 1),
        "size": header.size,
    }
    return all(found[name] == value for name, value in wanted.items())


@pytest.mark.parametrize("made, wanted", CHANGES, ids=str)
def test_what_was_asked_for(made: dict[str, Any], wanted: dict[str, Any]) -> None:
    host = SimHost(0)
    opened, content = scene(host, made)
    opened.run(co_amend(opened.node, AmendOptions(**wanted)))
    opened.close()
    assert is_as_asked(Header.parse(host.content("disk.qcow2")), wanted)
    assert not check(host, "disk.qcow2").leaks
    good(host, content)


@pytest.mark.parametrize("made, wanted", CHANGES, ids=str)
@pytest.mark.parametrize("op", [READ, WRITE, FLUSH], ids=lambda op: OP_NAMES[op])
@pytest.mark.parametrize("times", [1, None])
def test_every_failure(made: dict[str, Any], wanted: dict[str, Any], op: int, times: int | None) -> None:
    for position in range(10_000):
        host = SimHost(position)
        opened, content = scene(host, made)
        fault = host.fault(op=op, errno=errno.EIO, after=position, times=times)
        try:
            opened.run(co_amend(opened.node, AmendOptions(**wanted)))
            failed = False
        except OSError:
            failed = True
        hits = fault.hits
        fault.remove()
        after = SimHost(position)
        after.add_file("disk.qcow2", host.survivor("disk.qcow2"))
        header = good(after, content)
        assert failed or is_as_asked(header, wanted)
        opened.close()
        good(host, content)
        if not hits:
            return
    raise AssertionError("there is no end of I/O")


def test_power_cuts(seed: int) -> None:
    """At each of the flushes, which is where the order of writes shows."""
    made, wanted = CHANGES[seed % len(CHANGES)]
    cuts = 0
    for position in range(10_000):
        host = SimHost(seed)
        opened, content = scene(host, made)
        fault = host.fault(op=FLUSH, errno=errno.EIO, after=position, times=None)
        try:
            opened.run(co_amend(opened.node, AmendOptions(**wanted)))
        except OSError:
            cuts += 1
        for chance in range(2):
            after = SimHost(chance)
            after.add_file("disk.qcow2", host.survivor("disk.qcow2"))
            good(after, content)
        opened.abandon()
        if not fault.hits:
            break
    assert cuts


BASE = bytes(range(1, 101)) * 512  # of each sector's bytes any two neighbours differ


def snapshot_scene(host: SimHost, backing: bool) -> tuple[Disk, list[bytes]]:
    """An image whose snapshots have zero clusters, with a place of their own and without, and share a table of them.
    The contents of the snapshots, then of the disk."""
    more = {"backing_file": "base.raw", "backing_fmt": "raw"} if backing else {}
    make(host, "disk.qcow2", size=100 * 512, cluster_size=512, **more)
    host.add_file("base.raw", BASE)
    disk, seen = opened_with(host, backing), []

    def keep() -> None:
        seen.append(disk.content())
        disk.run(disk.node.snapshots.create(f"s{len(seen)}", date_ns=0))

    disk.run(disk.backend.co_pwrite(0, b"d" * 20 * 512))
    disk.run(disk.backend.co_write_zeroes(5 * 512, 4 * 512))  # they keep their places
    disk.run(disk.backend.co_write_zeroes(30 * 512, 3 * 512))
    disk.run(disk.backend.co_write_zeroes(80 * 512, 3 * 512))
    keep()
    keep()  # which has the same tables
    disk.run(disk.backend.co_pwrite(6 * 512, b"new" * 100))
    disk.run(disk.backend.co_write_zeroes(12 * 512, 2 * 512, 2))
    keep()
    disk.run(disk.backend.co_pwrite(31 * 512, b"newer" * 100))
    seen.append(disk.content())
    disk.run(disk.backend.co_flush())
    return disk, seen


def opened_with(host: SimHost, backing: bool) -> Disk:
    below = {"driver": "raw", "read-only": True, "file": {"driver": "file", "filename": "base.raw", "read-only": True}}
    return Disk(host, "disk.qcow2", backing=below if backing else None)


def good_snapshots(host: SimHost, backing: bool, seen: list[bytes]) -> Header:
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.check_errors, found.findings
    disk = opened_with(host, backing)
    assert disk.content() == seen[-1]
    header = Header.parse(host.content("disk.qcow2"))
    for snapshot, content in zip(disk.run(disk.node.snapshots.read()), seen, strict=False):
        disk.run(disk.node.snapshots.apply(snapshot))
        assert disk.content() == content, snapshot.name
    disk.close()
    assert not check(host, "disk.qcow2").corruptions
    return header


@pytest.mark.parametrize("backing", [False, True])
def test_version_2_for_snapshots_with_zero_clusters(backing: bool) -> None:
    host = SimHost(1)
    disk, seen = snapshot_scene(host, backing)
    disk.run(co_amend(disk.node, AmendOptions(compat="0.10")))
    disk.close()
    assert not check(host, "disk.qcow2").leaks
    assert good_snapshots(host, backing, seen).version == 2


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("op", [READ, WRITE, FLUSH], ids=lambda op: OP_NAMES[op])
def test_every_failure_on_the_way_to_version_2(backing: bool, op: int) -> None:
    for position in range(10_000):
        host = SimHost(position)
        disk, seen = snapshot_scene(host, backing)
        fault = host.fault(op=op, errno=errno.EIO, after=position, times=None if position % 2 else 1)
        try:
            disk.run(co_amend(disk.node, AmendOptions(compat="0.10")))
            failed = False
        except OSError:
            failed = True
        hits = fault.hits
        fault.remove()
        after = SimHost(position)
        after.add_file("base.raw", BASE)
        after.add_file("disk.qcow2", host.survivor("disk.qcow2"))
        header = good_snapshots(after, backing, seen)
        assert failed or header.version == 2
        disk.abandon()
        if not hits:
            assert not failed
            return
    raise AssertionError("there is no end of I/O")


@pytest.mark.parametrize("first, second", [("short", LONG), (LONG, "b" * 500), (LONG, LONG + "b"), (LONG, None)])
def test_the_name_of_the_backing_file_is_one_or_the_other(seed: int, first: str, second: str | None) -> None:
    """Names may be longer than the sector that a power cut leaves whole."""
    for position in range(100):
        host = SimHost(seed)
        make(host, "disk.qcow2", size=1 << 20, cluster_size=65536, backing_file=first, backing_fmt="raw")
        opened = Disk(host, "disk.qcow2", backing=None)
        fault = host.fault(op=FLUSH, errno=errno.EIO, after=position, times=None)
        try:
            opened.run(co_rebase(opened.node, second, "qcow2"))
        except OSError:
            pass
        for _ in range(10):
            header = Header.parse(host.survivor("disk.qcow2"))
            assert (header.backing_file, header.backing_format) in ((first, "raw"), (second, second and "qcow2"))
        hits = fault.hits
        fault.remove()
        opened.abandon()
        if not hits:
            return
    raise AssertionError("there is no end of flushes")


@pytest.mark.parametrize("made, wanted, text", [
    ({}, {"compat": "5"}, "Unknown compatibility level 5"),
    ({}, {"refcount_bits": 3}, "Refcount width must be a power of two and may not exceed 64 bits"),
    ({}, {"size": 1000}, "The new size must be a multiple of 512"),
    ({"refcount_bits": 8}, {"compat": "0.10"}, "compat=0.10 requires refcount_bits=16"),
    ({"version": 2}, {"lazy_refcounts": True}, "Lazy refcounts only supported with compatibility level 1.1"),
    ({"version": 2}, {"refcount_bits": 8}, "Refcount widths other than 16 bits require compatibility level 1.1"),
    ({"compression_type": "zstd"}, {"compat": "0.10"}, "Cannot downgrade an image with incompatible features 0x8"),
    ({}, {"data_file": "x"}, "data-file can only be set for images that use an external data file"),
    ({}, {"data_file_raw": True}, "data-file-raw cannot be set on existing images"),
    ({}, {"backing_file": "x"}, "Cannot amend the backing file"),
    ({"version": 2, "backing_file": "x" * 400}, {"compat": "1.1"}, "does not fit into 512 bytes"),
])
def test_refused(made: dict[str, Any], wanted: dict[str, Any], text: str) -> None:
    """Before anything has changed."""
    host = SimHost(0)
    opened, _ = scene(host, made)
    opened.run(opened.node.co_flush())
    before = host.content("disk.qcow2")
    with pytest.raises(BlockError, match=text):
        opened.run(co_amend(opened.node, AmendOptions(**wanted)))
    assert host.content("disk.qcow2") == before
    opened.close()


def test_a_size_that_no_table_has_room_for_is_refused_before_the_version_changes() -> None:
    host = SimHost(0)
    opened, _ = scene(host, {"version": 2})
    opened.run(opened.node.co_flush())
    before = host.content("disk.qcow2")
    with pytest.raises(OSError, match="the L1 table would be larger than 33554432 bytes") as told:
        opened.run(co_amend(opened.node, AmendOptions(compat="1.1", size=1 << 60)))
    assert told.value.errno == errno.EFBIG
    assert host.content("disk.qcow2") == before
    opened.close()


@pytest.mark.parametrize("made, state, later, wanted, text", [
    ({}, 0, 200 * 512, {"compat": "0.10"}, "Internal snapshots prevent downgrade of image"),
    ({}, 1 << 32, None, {"compat": "0.10"}, "Internal snapshots prevent downgrade of image"),
    ({}, 0, None, {"compat": "0.10", "size": 200 * 512}, "Internal snapshots prevent downgrade of image"),
    ({"version": 2}, 0, None, {"size": 200 * 512}, "Can't resize a v2 image which has snapshots"),
    ({"version": 2}, 0, None, {"compat": "1.1", "refcount_bits": 1}, "Cannot decrease refcount entry width to 1 bits"),
])
def test_refused_for_its_snapshot(
    made: dict[str, Any], state: int, later: int | None, wanted: dict[str, Any], text: str
) -> None:
    """``state`` is how much the snapshot says it has of a machine's, ``later`` the disk's size after that."""
    host = SimHost(0)
    opened, _ = scene(host, made)
    opened.run(opened.node.snapshots.create("s", date_ns=0, vm_state_bytes=state))
    if later is not None:
        opened.run(opened.node.co_truncate(later))
    opened.run(opened.node.co_flush())
    before = host.content("disk.qcow2")
    with pytest.raises((BlockError, OSError), match=text):
        opened.run(co_amend(opened.node, AmendOptions(**wanted)))
    assert host.content("disk.qcow2") == before
    opened.close()
