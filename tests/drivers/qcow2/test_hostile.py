# SPDX-License-Identifier: Apache-2.0
"""Images by people who do not wish us well: an ImageError (to a request, EIO), or a right answer; nothing else, no file
but the image opened, no more memory and time than the image's own limits allow."""

from __future__ import annotations

import errno
import random
import resource
import struct
import zlib
from typing import Any

import pytest

from bottomhalf.block import BlockError, ImageError
from bottomhalf.drivers.qcow2.compression import decompress
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, check, make

MUTANTS = 40  # per seed
MEMORY_BYTES_MAX = 256 << 20

INTERESTING = (0, 1, 2, 0x1FF, 0x200, 0xFFFF, 1 << 31, (1 << 32) - 1, COPIED, COMPRESSED, (1 << 63) - 1, (1 << 64) - 1)


def seed_image(seed: int) -> bytes:
    """An image with some of everything."""
    chance = random.Random(seed)
    host = SimHost(seed)
    extended = chance.random() < 0.3
    cluster_size = 16384 if extended else chance.choice((512, 4096))
    shape = {"cluster_size": cluster_size, "extended_l2": extended, "backing_file": "secret"}
    make(host, "disk.qcow2", size=40 * cluster_size, **shape)
    disk = Disk(host, "disk.qcow2", backing=None)
    for n in range(0, 39, 3):
        disk.run(disk.backend.co_pwrite(n * cluster_size, bytes([n]) * (cluster_size + 7)))
    disk.run(disk.backend.co_write_zeroes(5 * cluster_size, cluster_size))
    disk.close()
    return host.content("disk.qcow2")


def mutate(image: bytes, chance: random.Random) -> bytes:
    """Fields of the header and entries of tables, more often than mere bytes."""
    changed = bytearray(image)
    header = Header.parse(image)
    places = [8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104]
    for table, entries in (
        (header.l1_offset, header.l1_size),
        (header.refcount_table_offset, 2),
        (int.from_bytes(image[header.l1_offset : header.l1_offset + 8], "big") & 0x00FF_FFFF_FFFF_FE00, 80),
        (int.from_bytes(image[header.refcount_table_offset :][:8], "big"), 20),
        (header.header_bytes, 20),
    ):
        places += [table + 8 * n for n in range(entries)]
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.choice(places)
        size = chance.choice((1, 4, 8))
        value = chance.choice((chance.choice(INTERESTING), chance.randrange(1 << 64), chance.randrange(len(image))))
        if chance.random() < 0.5 and at + 8 <= len(changed):
            value ^= int.from_bytes(changed[at : at + 8], "big")
        changed[at : at + size] = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "big")
    return bytes(changed[: len(image)])


async def use(disk: Disk) -> None:
    """Read all of it, write here and there; errors are EIO."""
    chance = random.Random(1)
    for _ in range(6):
        length = min(disk.size, chance.choice((1, 512, 70_000)))
        offset = chance.randrange(0, disk.size - length + 1)
        for what in ("read", "status", "write", "flush"):
            try:
                if what == "read":
                    await disk.backend.co_pread(offset, length)
                elif what == "status" and length:
                    await disk.backend.co_block_status(offset, length)
                elif what == "write" and not disk.node.read_only:
                    await disk.backend.co_pwrite(offset, b"w" * length)
                elif what == "flush":
                    await disk.backend.co_flush()
            except OSError as error:
                assert error.errno in (errno.EIO, errno.EFBIG, errno.ENOMEDIUM), error


def test_mutants(seed: int) -> None:
    chance = random.Random(seed)
    image = seed_image(seed)
    opened = refused = 0
    for number in range(MUTANTS):
        host = SimHost(seed)
        host.add_file("disk.qcow2", mutate(image, chance))
        host.add_file("secret", b"secret" * 1000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            check(host, "disk.qcow2")
        except (ImageError, OSError) as error:
            assert isinstance(error, ImageError) or error.errno == errno.EIO, error
        try:
            disk = Disk(host, "disk.qcow2", backing=None, **({"read-only": True} if number % 3 == 0 else {}))
        except BlockError:
            refused += 1
        else:
            opened += 1
            disk.run(use(disk))
            disk.close()
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY_BYTES_MAX
        assert ("open", "secret") not in host.trace
    assert opened and refused


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
