# SPDX-License-Identifier: Apache-2.0
"""The header changes, and the power goes: it is the old one or the new one, whatever lies behind its first sector."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from bottomhalf.drivers.qcow2 import layout
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.host.request import FLUSH
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, make

IMAGE = "disk.qcow2"
NAMES = layout.EXTENSION_FEATURE_NAMES
OTHER = 0x12345678  # an extension that nobody knows

Change = Callable[[Header], None]


def extended(length: int, kind: int = OTHER) -> Change:
    return lambda header: header.set_extension(kind, bytes(range(1, length + 1)))


def shortened(kind: int) -> Change:
    return lambda header: header.set_extension(kind, None)


def renamed(name: str | None) -> Change:
    def change(header: Header) -> None:
        header.backing_file = name

    return change


def both(*changes: Change) -> Change:
    def change(header: Header) -> None:
        for each in changes:
            each(header)

    return change


CHANGES: dict[str, Change] = {
    "an extension": extended(24),
    "a long extension": extended(200),
    "another format": extended(13, layout.EXTENSION_BACKING_FORMAT),
    "no format": shortened(layout.EXTENSION_BACKING_FORMAT),
    "a shorter name": renamed("a"),
    "a longer name": renamed("b" * 300),
    "no name": renamed(None),
    "a name and an extension": both(renamed("c" * 60), extended(24)),
    "no name, and an extension": both(renamed(None), extended(100)),
    "a field": lambda header: setattr(header, "autoclear", 1 << 40),
}


def seen(head: bytes) -> tuple[Any, ...]:
    header = Header.parse(head)
    return header.backing_file, [each for each in header.extensions if each[0] != NAMES], header.autoclear


@pytest.mark.parametrize("cluster_size", [1024, 4096, 65536])
@pytest.mark.parametrize("name", ["b", "d" * 47, "e" * 390, "f" * 420])
@pytest.mark.parametrize("change", CHANGES)
def test_the_old_one_or_the_new_one(change: str, name: str, cluster_size: int) -> None:
    if cluster_size == 1024 and (len(name) > 100 or change == "a longer name"):
        name = name[:60]  # there has to be room for two
    for position in range(20):
        host = SimHost(position)
        make(host, IMAGE, size=1 << 20, cluster_size=cluster_size, backing_file=name, backing_fmt="raw")
        opened = Disk(host, IMAGE, backing=None)
        header, metadata = opened.node.header, opened.node.metadata
        CHANGES["an extension" if position % 2 else "a field"](header)  # so that it is not as it was made
        opened.run(metadata.write_header())
        old = seen(host.content(IMAGE))
        fault = host.fault(op=FLUSH, errno=errno.EIO, after=position // 2, times=None)
        CHANGES[change](header)
        try:
            opened.run(metadata.write_header())
        except OSError as error:
            assert error.errno == errno.EIO
        new = header.backing_file, [each for each in header.extensions if each[0] != NAMES], header.autoclear
        for _ in range(12):
            assert seen(host.survivor(IMAGE)) in (old, new)
        hits = fault.hits
        fault.remove()
        if not hits:
            assert seen(host.content(IMAGE)) == seen(host.survivor(IMAGE)) == new
        opened.run(metadata.write_header())  # and again, when the disk is well
        assert seen(host.content(IMAGE)) == new
        opened.abandon()
        if not hits and position % 2:
            return
    raise AssertionError("there is no end of flushes")


def test_a_field_costs_one_flush_also_when_the_name_has_moved() -> None:
    host = SimHost(0)
    make(host, IMAGE, size=1 << 20, cluster_size=65536, backing_file="b" * 40, backing_fmt="raw")
    opened = Disk(host, IMAGE, backing=None)
    header, metadata = opened.node.header, opened.node.metadata
    natural = Header.name_of(bytearray(header.to_bytes()))[0]
    CHANGES["a long extension"](header)
    opened.run(metadata.write_header())
    CHANGES["an extension"](header)  # shorter again: the name stays where it is
    opened.run(metadata.write_header())
    assert Header.name_of(bytearray(host.content(IMAGE)))[0] > natural + 100
    second = host.fault(op=FLUSH, errno=errno.EIO, after=1, times=None)
    CHANGES["a field"](header)
    opened.run(metadata.write_header())
    assert not second.hits and seen(host.survivor(IMAGE))[2] == 1 << 40
    opened.abandon()


@pytest.mark.parametrize("length", [1, 9, 16, 23, 40, 300])
@pytest.mark.parametrize("backing_fmt", ["raw", None])
def test_a_bitmap_of_an_image_with_a_backing_file(length: int, backing_fmt: str | None, tmp_path: Path) -> None:
    """The extensions reach the place of the name. (They were overwritten by it, and nobody could open the image.)"""
    path, base = tmp_path / "top.qcow2", "b" * length
    if length < 256:
        bottomhalf.create(tmp_path / base, size=1 << 20)
    bottomhalf.create(path, format="qcow2", size=1 << 20, backing_file=base, backing_fmt=backing_fmt)
    for name in ("one", "two"):
        bottomhalf.bitmap_add(path, name)
    assert [each.name for each in bottomhalf.bitmaps(path)] == ["one", "two"]
    assert bottomhalf.info(path).backing_file == base
    bottomhalf.bitmap_remove(path, "one")
    bottomhalf.bitmap_remove(path, "two")
    assert bottomhalf.info(path).backing_file == base and bottomhalf.check(path).status == 0
