# SPDX-License-Identifier: Apache-2.0
"""Images by people who do not wish us well: an ImageError (to a request, EIO), or a right answer; nothing else, no file
but the image opened, no more memory and time than the image's own limits allow."""

from __future__ import annotations

import random
import struct
import zlib
from collections import Counter
from typing import Any

import pytest

from bottomhalf.block import BlockError, ImageError
from bottomhalf.drivers.qcow2 import header as header_module
from bottomhalf.drivers.qcow2 import reading, references
from bottomhalf.drivers.qcow2.compression import decompress
from bottomhalf.drivers.qcow2.counters import Counters
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2 import trial as trial_module
from tests.drivers.qcow2.bench import Disk, make
from tests.drivers.qcow2.mutants import FORMS, Image, add_bomb, fields_of, form, huge_disk, mutate
from tests.drivers.qcow2.trial import Limits, Trial, bounded

MUTANTS = 100  # per seed
MUTANTS_LONG = 200  # with --soak
CRAFTED = (
    "an L1 table that names one L2 table",
    "65536 snapshots with L1 tables of 32 MiB, one above the other, in a file of holes",
    "65536 snapshots with one L1 table",
    "a refcount table that names one block",
    "an L1 table of L2 tables in a hole",
    "bombs",
    "zstd bombs",
    "a disk of the largest size",
)


def test_mutants(seed: int, request: pytest.FixtureRequest) -> None:
    """Good images with fields, tables and streams changed, and everything that users do with them."""
    long = request.config.getoption("--soak")
    seen: Counter[str] = Counter()
    for number in range(MUTANTS_LONG if long else MUTANTS):
        mutant(seed, number, seen)
    print(f"seed {seed}: {dict(seen)}")
    assert seen["used"] and seen["repaired"] and seen["not an image"] and seen["damaged"]


def mutant(seed: int, number: int, seen: Counter[str]) -> Trial:
    """One of them, tried."""
    chance = random.Random(f"mutant {seed} {number}")
    trial = Trial(mutate(chance.choice(list(FORMS)), chance), chance, Limits(), seen)
    try:
        trial.run()
    except AssertionError as error:
        raise AssertionError(f"mutant {number} of seed {seed}: {error}") from error.__cause__
    return trial


@pytest.mark.parametrize(("of_seed", "number"), [(11, 130), (220, 157), (380, 22), (100, 23), (115, 101), (402, 36)])
def test_mutants_that_found_something(of_seed: int, number: int) -> None:
    """A disk that was marked corrupt while something waited to be written could not be closed; buffers of 64 MiB were
    not given back; amending to version 2 read the same L1 table for each of 300 snapshots;
    growing gave the same L2 table back a thousand times; that a header could not be written again, to mark the image,
    came out of the loop as an exception."""
    mutant(of_seed, number, Counter())


# -- images made by hand, each the worst of its kind ----------------------------------------------------------------


def crafted(name: str, much: int = 1 << 17) -> Image:
    """``much``: entries of tables, of which a format has a million at most."""
    chance = random.Random(1)
    image = Image(bytearray(form("small")), len(form("small")), [name])
    fields = fields_of("small")
    end = -(-len(image.data) // 512) * 512
    if name == "an L1 table that names one L2 table":
        image.data.extend(image.data[image.number(40) :][:8] * much)
        image.put(36, much, 4)
        image.put(40, end)
    elif name == "65536 snapshots with L1 tables of 32 MiB, one above the other, in a file of holes":
        table = b"".join(
            (end + (8 << 20) + 512 * n).to_bytes(8, "big")
            + (4 << 20).to_bytes(4, "big")
            + b"\0\1".ljust(24, b"\0")
            + (16).to_bytes(4, "big")
            + bytes(16)
            + b"1"
            + bytes(7)
            for n in range(65536)
        )
        image.data.extend(table)
        image.put(60, 65536, 4)
        image.put(64, end)
        image.length = 1 << 50
    elif name == "65536 snapshots with one L1 table":
        entry = image.number(40).to_bytes(8, "big") + (4 << 20).to_bytes(4, "big") + b"\0\1".ljust(24, b"\0")
        image.data.extend((entry + (16).to_bytes(4, "big") + bytes(16) + b"1" + bytes(7)) * 65536)
        image.put(60, 65536, 4)
        image.put(64, end)
        image.length = 1 << 40
    elif name == "a refcount table that names one block":
        image.data.extend(image.data[image.number(48) :][:8] * much)
        image.put(48, end)
        image.put(56, 8 * much // 512, 4)
        image.length = 1 << 45
    elif name == "an L1 table of L2 tables in a hole":
        image.data.extend(b"".join((1 << 40 | n << 9).to_bytes(8, "big") for n in range(much // 8)))
        image.put(36, much // 8, 4)
        image.put(40, end)
        image.length = 1 << 50
    elif name == "bombs":
        image = Image(bytearray(form("large clusters")), len(form("large clusters")), [name])
        add_bomb(image, fields_of("large clusters"), chance)
    elif name == "zstd bombs":
        image = Image(bytearray(form("zstd")), len(form("zstd")), [name])
        add_bomb(image, fields_of("zstd"), chance)
    else:
        assert name == "a disk of the largest size"
        huge_disk(image, fields, random.Random(3))
    image.length = max(image.length, len(image.data))
    return image


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted(name: str, request: pytest.FixtureRequest) -> None:
    """What takes the most, within the limits too."""
    if not request.config.getoption("--soak"):
        Trial(crafted(name), random.Random(1), Limits(), Counter()).run()
        return
    for turn in range(6):  # each goes other ways
        Trial(crafted(name, 1 << 20), random.Random(turn), Limits(), Counter()).run()


def test_a_snapshot_of_exabytes() -> None:
    """Applying it would take an L1 table that no image may have; nothing is placed, and nothing counted, for that."""
    image = Image(bytearray(form("extended")), len(form("extended")))
    image.put(next(each.at for each in fields_of("extended") if each.name == "snapshot's disk size"), 1 << 62)
    host = SimHost(1)
    host.add_file("disk.qcow2", bytes(image.data))
    disk = Disk(host, "disk.qcow2")
    before = disk.content()
    (snapshot,) = disk.run(disk.node.snapshots.read())
    with bounded(Limits()), pytest.raises(ImageError, match="needs too large an L1 table"):
        disk.run(disk.node.snapshots.apply(snapshot))
    assert disk.content() == before
    disk.close()


# -- the harness can fail -------------------------------------------------------------------------------------------


def fails(image: Image, text: str, seeds: int = 12) -> None:
    """Some way through the image finds it."""
    with pytest.raises(AssertionError, match=text):
        for number in range(seeds):
            Trial(image, random.Random(number), Limits(processor_s=2.0), Counter()).run()


def test_planted_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the limit on L1 tables an image gets memory until there is none."""
    image = Image(bytearray(form("small")), len(form("small")), ["a large L1 table"])
    image.put(36, 1 << 28, 4)
    image.length = 1 << 40
    Trial(image, random.Random(1), Limits(), Counter()).run()
    monkeypatch.setattr(header_module, "L1_BYTES_MAX", 1 << 40)
    fails(image, "MemoryError|Overwork|bytes")


def test_planted_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the limit on tables that are read, many snapshots keep the processor busy."""
    name = "65536 snapshots with one L1 table"
    monkeypatch.setattr(references, "TABLE_BYTES_FREE", 1 << 60)
    fails(crafted(name), "TooLong|Overwork", seeds=1)


def test_planted_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that lets names through opens the file that an image names."""
    image = Image(bytearray(form("usual")), len(form("usual")), ["nothing"])
    Trial(image, random.Random(1), Limits(), Counter()).run()
    open_anything = trial_module.open_node
    monkeypatch.setattr(trial_module, "open_node", lambda *given, follow_names: open_anything(*given))
    fails(image, "opened \\['secret.raw'\\]")


def test_planted_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking without a limit unpacks it all."""
    Trial(crafted("bombs"), random.Random(1), Limits(), Counter()).run()

    def unbounded(data: bytes, size: int, kind: int) -> bytes:
        return b"".join([zlib.decompressobj(-12).decompress(data) for _ in range(4)])[:size]

    monkeypatch.setattr(reading, "decompress", unbounded)
    fails(crafted("bombs"), "MemoryError")


def test_planted_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair that says that all is well, and writes nothing."""
    image = Image(bytearray(form("small")), len(form("small")), ["a leak"])
    image.put(image.number(image.number(48)) + 2 * 4, 7, 2)

    async def nothing(self: object, cluster: int, count: int) -> None:
        pass

    monkeypatch.setattr(Counters, "set_refcount", nothing)
    with pytest.raises(AssertionError):
        for number in range(12):
            Trial(image, random.Random(number), Limits(), Counter()).run()


# -- single fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, b"QFI\xfa", "Image is not in qcow2 format"),
        (4, struct.pack(">I", 4), "Unsupported qcow2 version 4"),
        (20, struct.pack(">I", 8), "Unsupported cluster size: 2\\^8"),
        (20, struct.pack(">I", 22), "Unsupported cluster size: 2\\^22"),
        (100, struct.pack(">I", 100), "qcow2 header too short"),
        (100, struct.pack(">I", 1 << 20), "qcow2 header exceeds cluster size"),
        (96, struct.pack(">I", 7), "Reference count entry width too large; may not exceed 64 bits"),
        (72, struct.pack(">Q", 1 << 40), "Unsupported qcow2 feature\\(s\\): Unknown incompatible feature: 10000000000"),
        (72, struct.pack(">Q", 8), "Compression type incompatible feature bit must not be set"),
        (104, b"\7", "unknown compression type: 7"),
        (104, b"\1", "Compression type incompatible feature bit must be set"),
        (56, struct.pack(">I", 0), "Image does not contain a reference count table"),
        (56, struct.pack(">I", 1 << 31), "Reference count table too large"),
        (48, struct.pack(">Q", 1), "Reference count table offset invalid"),
        (60, struct.pack(">I", 65537), "Snapshot table too large"),
        (36, struct.pack(">I", (4 << 20) + 1), "Active L1 table too large"),
        (36, struct.pack(">I", 0), "L1 table is too small"),
        (40, struct.pack(">Q", 77), "Active L1 table offset invalid"),
        (24, struct.pack(">Q", 1 << 63), "Image is too big|L1 table is too small"),
        (8, struct.pack(">Q", 1 << 20), "Invalid backing file offset"),
        (16, struct.pack(">I", 1024), "Backing file name too long"),
        (32, struct.pack(">I", 3), "Unsupported encryption method 3"),
        (112, struct.pack(">II", 1, 1 << 30), "Header extension too large"),
    ],
)
def test_headers(at: int, value: bytes, text: str) -> None:
    """QEMU's words for each."""
    host = SimHost(1)
    make(host, "disk.qcow2", size=1 << 20, backing_file="base", backing_fmt="raw")
    image = bytearray(host.content("disk.qcow2"))
    image[at : at + len(value)] = value
    with pytest.raises(ImageError, match=text):
        Header.parse(bytes(image[:65536]))


def test_headers_are_kept() -> None:
    """What is not known comes out as it came in."""
    made = Header(size=1 << 20, cluster_bits=16, refcount_table_offset=65536, refcount_table_clusters=1, l1_size=8)
    made.l1_offset = 3 << 16
    made.extensions = [(0x12345678, b"unknown"), (0xE2792ACA, b"raw")]
    made.unknown = b"future!!"
    made.backing_file = "b\udcffse"  # a name that is not UTF-8
    again = Header.parse(made.to_bytes().ljust(65536, b"\0"))
    assert again.extension(0x12345678) == b"unknown" and again.unknown == b"future!!"
    assert (again.backing_file, again.backing_format) == (made.backing_file, "raw")
    assert Header.parse(again.to_bytes().ljust(65536, b"\0")) == again


@pytest.mark.parametrize("what", ["too long", "too short", "nonsense"])
def test_compressed_clusters(what: str) -> None:
    """A bomb gives a cluster and no more; what gives less is an error."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    data = packer.compress(bytes(1 << 28 if what == "too long" else 100)) + packer.flush()
    if what == "too long":
        assert decompress(data, 65536, 0) == bytes(65536)
        return
    with pytest.raises(ImageError, match=r"has 100 bytes instead of 65536|cannot be unpacked"):
        decompress(data if what == "too short" else b"\xff" * 100, 65536, 0)


def test_unsupported_things_are_said() -> None:
    """Encryption, data files, images marked corrupt: a clear refusal, and nothing is written."""
    cases: list[tuple[int, bytes, dict[str, Any], str]] = [
        (32, struct.pack(">I", 2), {}, "Parameter 'encrypt.key-secret' is required for cipher"),
        (72, struct.pack(">Q", 4), {}, "'data-file' is required for this image"),
        (72, struct.pack(">Q", 2), {}, "Image is corrupt; cannot be opened read/write"),
    ]
    for at, value, more, text in cases:
        host = SimHost(1)
        make(host, "disk.qcow2", size=1 << 20)
        image = bytearray(host.content("disk.qcow2"))
        image[at : at + len(value)] = value
        host.add_file("damaged.qcow2", bytes(image))
        with pytest.raises(BlockError, match=text):
            Disk(host, "damaged.qcow2", **more)
        assert host.content("damaged.qcow2") == image
        if value == struct.pack(">Q", 2):
            readable = Disk(host, "damaged.qcow2", **{"read-only": True})
            assert readable.content() == bytes(1 << 20)
            readable.close()
