# SPDX-License-Identifier: Apache-2.0
"""Images by people who do not wish us well: good ones of every form, changed where it hurts.

A mutator that flips bytes finds the magic number. This one knows the format: it walks through a good image and notes
every field that means something (``Field``: what it is, where, how wide), and then gives fields values that mean
something else: the place of another table, its own, the end of the file, one more, far away, all ones. Some changes are
larger: an L1 table that names one table everywhere, a compressed cluster that unpacks to gigabytes, a file that ends in
the middle or goes on for a petabyte, a snapshot table of thousands.

    chance = random.Random(seed)
    image = mutate(form("snapshots"), chance)      # Image: bytes, how long the file is, what was done
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from bottomhalf.drivers.qcow2 import layout
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from bottomhalf.host.request import COMPRESSED as COMPRESS
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, make

SECRET: Final = "secret.raw"  # what images name, and nobody opens

# name: options of the image, beside its size; "snapshots", "bitmaps", "squeezed", "crypto": what it has
FORMS: Final[dict[str, dict[str, object]]] = {
    "small": {"cluster_size": 512, "backing_file": SECRET},
    "usual": {"cluster_size": 4096, "squeezed": True, "snapshots": 2, "backing_file": SECRET, "backing_fmt": "raw"},
    "many snapshots": {"cluster_size": 512, "snapshots": 9, "squeezed": True},
    "version 2": {"cluster_size": 1024, "version": 2, "snapshots": 1, "squeezed": True, "backing_file": SECRET},
    "extended": {"cluster_size": 16384, "extended_l2": True, "snapshots": 1, "squeezed": True},
    "one bit": {"cluster_size": 4096, "refcount_bits": 1},
    "wide": {"cluster_size": 512, "refcount_bits": 64, "snapshots": 1},
    "lazy": {"cluster_size": 4096, "lazy_refcounts": True},
    "zstd": {"cluster_size": 8192, "compression_type": "zstd", "squeezed": True},
    "bitmaps": {"cluster_size": 4096, "bitmaps": True},
    "crypto": {"cluster_size": 4096, "crypto": True},
    "large clusters": {"cluster_size": 65536, "snapshots": 1, "squeezed": True},
}
CLUSTERS: Final = 24  # of the disk
INTERESTING: Final = (
    *(0, 1, 2, 7, 8, 9, 16, 21, 22, 0x1FF, 0x200, 0xFFFF, 0x10000, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 55, 1 << 56),
    *(COPIED, COMPRESSED, COPIED | COMPRESSED, (1 << 63) - 1, (1 << 64) - 1, OFFSET_MASK, COPIED | OFFSET_MASK),
)


@dataclass(frozen=True)
class Field:
    """A number in an image: what it is, where, how many bytes."""

    name: str
    at: int
    size: int = 8


@dataclass
class Image:
    """``length`` is the file's, which may be longer than the bytes that are not zero."""

    data: bytearray
    length: int
    what: list[str] = field(default_factory=list)

    def number(self, at: int, size: int = 8) -> int:
        return int.from_bytes(self.data[at : at + size], "big")

    def put(self, at: int, value: int, size: int = 8) -> None:
        if at + size > len(self.data):
            self.data.extend(bytes(at + size - len(self.data)))
            self.length = max(self.length, len(self.data))
        self.data[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "big")


# -- good images ----------------------------------------------------------------------------------------------------


@cache
def form(name: str) -> bytes:
    """A good image with some of everything that its form can have."""
    options = dict(FORMS[name])
    has = {key: options.pop(key, 0) for key in ("snapshots", "bitmaps", "squeezed", "crypto")}
    size = int(str(options["cluster_size"]))
    host = SimHost(1)
    make(host, "disk.qcow2", size=CLUSTERS * size - (512 if size > 512 else 0), **options)
    disk = Disk(host, "disk.qcow2", **({"backing": None} if "backing_file" in options else {}))

    def write(cluster: int, count: int, byte: int, flags: int = 0) -> None:
        data = bytes([byte]) * min(count * size, disk.size - cluster * size)
        disk.run(disk.backend.co_pwrite(cluster * size, data, flags))

    for n in range(0, CLUSTERS - 4, 3):
        write(n, 2, n + 1)
    disk.run(disk.backend.co_write_zeroes(4 * size, size))
    for number in range(int(str(has["snapshots"]))):
        if number == 0:
            disk.run(disk.node.co_save_vmstate(0, memoryview(b"state" * 100)))
        disk.run(disk.node.snapshots.create(f"s{number}", date_ns=0))
        write(number % 5 * 3, 1, 100 + number)
    if has["squeezed"]:
        write(CLUSTERS - 4, 3, 200, COMPRESS)
    disk.close()
    image = Image(bytearray(host.content("disk.qcow2")), 0)
    if has["bitmaps"]:
        _add_bitmap(image)
    if has["crypto"]:
        _add_crypto(image)
    return bytes(image.data)


def _add(image: Image, kind: int, data: bytes, clusters: list[bytes]) -> int:
    """An extension, and clusters at the end, which are counted; where they begin."""
    header = Header.parse(bytes(image.data[: 1 << image.number(20, 4)]))
    bits = header.cluster_bits
    start = -(-len(image.data) >> bits) << bits
    image.data.extend(bytes(start - len(image.data)))
    for cluster in clusters:
        image.data.extend(cluster.ljust(1 << bits, b"\0"))
    block = image.number(header.refcount_table_offset)
    for n in range(len(clusters)):
        image.put(block + 2 * ((start >> bits) + n), 1, 2)
    header.set_extension(kind, data.replace(b"START...", start.to_bytes(8, "big")))
    made = header.to_bytes()
    image.data[: len(made)] = made
    return start


def _add_bitmap(image: Image) -> None:
    entry = struct.pack(">QIIBBHI", 0, 1, 0, 1, 9, 2, 0) + b"bm"
    directory = entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    extension = struct.pack(">IIQ", 1, 0, len(directory)) + b"START..."
    start = _add(image, layout.EXTENSION_BITMAPS, extension, [directory, b"", b"\xaa" * 100])
    image.put(start, start + 4096)
    image.put(start + 4096, start + 8192)
    image.put(88, 1)


def _add_crypto(image: Image) -> None:
    """The image says that it is encrypted, and has what could be a header."""
    luks = b"LUKS\xba\xbe\0\1" + b"aes".ljust(32, b"\0") + b"xts-plain64".ljust(32, b"\0") + b"sha256".ljust(32, b"\0")
    luks += struct.pack(">II20s32sI40s", 4096, 64, b"d" * 20, b"s" * 32, 1000, b"uuid")
    for n in range(8):
        luks += struct.pack(">II32sII", 0x00AC71F3 if n == 0 else 0x0000DEAD, 1000, b"s" * 32, 8 + 512 * n, 4000)
    _add(image, layout.EXTENSION_CRYPTO, b"START..." + (8192).to_bytes(8, "big"), [luks, b"material"])
    image.put(32, 2, 4)


# -- fields ---------------------------------------------------------------------------------------------------------


@cache
def fields_of(name: str) -> tuple[Field, ...]:
    """Every number of a form that means something."""
    image = Image(bytearray(form(name)), 0)
    header = Header.parse(bytes(image.data[: 1 << image.number(20, 4)]))
    size = header.cluster_size
    found = [
        *(Field("version", 4, 4), Field("backing offset", 8), Field("backing length", 16, 4), Field("bits", 20, 4)),
        *(Field("size", 24), Field("crypt", 32, 4), Field("L1 size", 36, 4), Field("L1 offset", 40)),
        *(Field("refcount table", 48), Field("refcount table clusters", 56, 4), Field("snapshot count", 60, 4)),
        Field("snapshot table", 64),
    ]
    at = 72
    if header.version == 3:
        found += [Field("incompatible", 72), Field("compatible", 80), Field("autoclear", 88), Field("order", 96, 4)]
        found += [Field("header length", 100, 4), Field("compression", 104, 1)]
        at = 112
    while (kind := image.number(at, 4)) != 0:
        length = image.number(at + 4, 4)
        found += [Field("extension type", at, 4), Field("extension length", at + 4, 4)]
        words = range(at + 8, at + 8 + min(length, 64), 8)
        found += [Field(f"extension {kind:x}", word, 8) for word in words]
        at += 8 + -(-length // 8) * 8
    found.append(Field("extension end", at, 4))
    found += _of_tables("", image, header, header.l1_offset, header.l1_size)
    for n in range(4):
        found.append(Field("refcount table entry", header.refcount_table_offset + 8 * n))
    block = image.number(header.refcount_table_offset)
    width = max(1 << header.refcount_order >> 3, 1)
    found += [Field("counter", block + width * n, width) for n in range(-(-len(image.data) // size) + 2)]
    found += _of_snapshots(image, header)
    if (extension := header.extension(layout.EXTENSION_BITMAPS)) is not None:
        start = int.from_bytes(extension[16:24], "big")
        found += [Field("bitmap table", start), Field("bitmap table size", start + 8, 4)]
        found += [Field("bitmap flags", start + 12, 4), Field("bitmap type", start + 16, 1)]
        found += [Field("bitmap granularity", start + 17, 1), Field("bitmap name", start + 18, 2)]
        found += [Field("bitmap extra", start + 20, 4), Field("bitmap table entry", image.number(start))]
    if (extension := header.extension(layout.EXTENSION_CRYPTO)) is not None:
        start = int.from_bytes(extension[:8], "big")
        places = (0, 4, 8, 40, 72, *range(104, 112, 4), 164, *range(208, 248, 4))
        found += [Field("luks", start + at, 4) for at in places]
    return tuple(found)


def _of_tables(whose: str, image: Image, header: Header, l1_at: int, count: int) -> list[Field]:
    """L1 entries, and the entries of the L2 tables that they name."""
    found = []
    for n in range(count):
        found.append(Field(f"{whose}L1 entry", l1_at + 8 * n))
        table = image.number(l1_at + 8 * n) & OFFSET_MASK
        if table and n < 4:
            step = 16 if header.extended_l2 else 8
            for m in range(min(CLUSTERS, header.l2_entries)):
                found.append(Field(f"{whose}L2 entry", table + step * m))
                if header.extended_l2:
                    found.append(Field(f"{whose}L2 bitmap", table + step * m + 8))
    return found


def _of_snapshots(image: Image, header: Header) -> list[Field]:
    found: list[Field] = []
    at = header.snapshots_offset
    for _ in range(header.snapshot_count):
        at = -(-at // 8) * 8
        for name, offset, size in (
            *(("L1 offset", 0, 8), ("L1 size", 8, 4), ("id length", 12, 2), ("name length", 14, 2)),
            *(("VM state", 32, 4), ("extra length", 36, 4), ("large VM state", 40, 8), ("disk size", 48, 8)),
        ):
            found.append(Field(f"snapshot's {name}", at + offset, size))
        found += _of_tables("snapshot's ", image, header, image.number(at), image.number(at + 8, 4))
        lengths = image.number(at + 12, 2) + image.number(at + 14, 2) + image.number(at + 36, 4)
        at += 40 + lengths
    return found


# -- changes --------------------------------------------------------------------------------------------------------


def _value(image: Image, target: Field, fields: tuple[Field, ...], chance: random.Random) -> int:
    """Something that means something else."""
    now = image.number(target.at, target.size)
    bits = max(9, min(image.number(20, 4), 16))
    end = len(image.data) >> bits << bits
    kind = chance.randrange(10)
    if kind == 0:
        return now ^ 1 << chance.randrange(8 * target.size)
    if kind == 1:
        return now + chance.choice((-1, 1, 8, 512, 1 << bits))
    if kind == 2:  # the place of another table, or of the field itself
        other = chance.choice(fields)
        return image.number(other.at, other.size) & OFFSET_MASK | chance.choice((0, COPIED))
    if kind == 3:
        return target.at >> bits << bits | chance.choice((0, COPIED, COMPRESSED))
    if kind == 4:
        return chance.choice((end, end + (1 << bits), len(image.data), end - (1 << bits))) | chance.choice((0, COPIED))
    if kind == 5:
        return chance.randrange((len(image.data) >> bits) + 1) << bits | chance.choice((0, COPIED, COMPRESSED))
    if kind == 6:
        return chance.getrandbits(64)
    return chance.choice(INTERESTING) ^ (now if chance.random() < 0.3 else 0)


def _change_field(image: Image, fields: tuple[Field, ...], chance: random.Random) -> None:
    names = sorted({each.name for each in fields})
    name = chance.choice(names)  # of a kind first, or entries of tables would be all there is
    target = chance.choice([each for each in fields if each.name == name])
    value = _value(image, target, fields, chance)
    image.what.append(f"{target.name} at {target.at:#x}: {image.number(target.at, target.size):#x} -> {value:#x}")
    image.put(target.at, value, target.size)


def _shorten(image: Image, fields: tuple[Field, ...], chance: random.Random) -> None:
    length = chance.choice((chance.randrange(len(image.data)), len(image.data) // 512 * 512 - 512, 72, 104, 4096))
    del image.data[max(length, 1) :]
    image.length = len(image.data)
    image.what.append(f"the file ends at {image.length}")


def _lengthen(image: Image, fields: tuple[Field, ...], chance: random.Random) -> None:
    image.length = len(image.data) + chance.choice((1, 511, 1 << 20, 1 << 32, 1 << 50, (1 << 62) - (1 << 40)))
    image.what.append(f"the file goes on to {image.length:#x}")


def _fill_l1(image: Image, fields: tuple[Field, ...], chance: random.Random) -> None:
    """A long L1 table at the end, that names one table, or its neighbours, or itself."""
    bits = max(9, min(image.number(20, 4), 16))
    count = chance.choice((100, 100, 1000))
    start = -(-len(image.data) >> bits) << bits
    entry = chance.choice((image.number(image.number(40) % len(image.data)), COPIED | start, COPIED | 1 << bits))
    step = chance.choice((0, 0, 512, 1 << bits))
    image.data.extend(bytes(start - len(image.data)))
    image.data.extend(b"".join((entry + step * n & (1 << 64) - 1).to_bytes(8, "big") for n in range(count)))
    image.length = max(image.length, len(image.data))
    image.put(36, count, 4)
    image.put(40, start)
    image.what.append(f"an L1 table of {count} entries, {entry:#x} and {step:#x} more each")


def add_bomb(image: Image, fields: tuple[Field, ...], chance: random.Random) -> None:
    """A compressed cluster that would be gigabytes; entries of all kinds may lead to it."""
    bits = max(9, min(image.number(20, 4), 21))
    start = -(-len(image.data) // 512) * 512
    stream = bomb(image.data[104] if len(image.data) > 104 else 0)
    image.data.extend(bytes(start - len(image.data)) + stream)
    image.length = max(image.length, len(image.data))
    sectors = min(len(stream) // 512 + 1, (1 << (bits - 8)) - 1)
    entry = COMPRESSED | sectors << (62 - (bits - 8)) | start
    targets = [each for each in fields if each.name == "L2 entry"]
    for target in chance.sample(targets, min(len(targets), 3)):
        image.put(target.at, entry)
        if image.number(72) & layout.EXTENDED_L2:
            image.put(target.at + 8, 0)
    image.what.append("a bomb")


@cache
def bomb(kind: int) -> bytes:
    """A stream that unpacks to 512 MiB of zeroes."""
    if kind == 1:
        try:
            import zstandard
        except ImportError:
            return b"\x28\xb5\x2f\xfd"
        return bytes(zstandard.ZstdCompressor().compress(bytes(512 << 20)))
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    head = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    body = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + body * 511


def _many_snapshots(image: Image, fields: tuple[Field, ...], chance: random.Random) -> None:
    """Thousands of snapshots that share a large L1 table."""
    bits = max(9, min(image.number(20, 4), 16))
    start = -(-len(image.data) >> bits) << bits
    count, size = chance.choice(((50, 10), (50, 200), (1000, 10), (300, 4 << 20)))
    l1 = chance.choice((image.number(40), start, 0))
    entry = struct.pack(">QIHHIIQIIQQ", l1, size, 1, 0, 0, 0, 0, 0, 16, 0, 4096) + b"1"
    image.data.extend(bytes(start - len(image.data)) + entry.ljust(64, b"\0") * count)
    image.length = max(image.length, len(image.data))
    image.put(60, count, 4)
    image.put(64, start)
    image.what.append(f"{count} snapshots with {size} L1 entries at {l1:#x}")


def _copy(image: Image, fields: tuple[Field, ...], chance: random.Random) -> None:
    """A piece of the image once more, elsewhere."""
    length = chance.choice((8, 64, 512, 4096))
    source, to = chance.randrange(len(image.data)), chance.randrange(len(image.data))
    piece = image.data[source : source + length]
    image.data[to : to + len(piece)] = piece
    image.length = max(image.length, len(image.data))
    image.what.append(f"{len(piece)} bytes of {source:#x} at {to:#x}")


def huge_disk(image: Image, fields: tuple[Field, ...], chance: random.Random) -> None:
    """A disk as large as the format allows, with the L1 table that it takes, which goes on behind the file's end."""
    bits = image.number(20, 4)
    if not 9 <= bits <= 21:
        return
    count = chance.choice((1000, 1000, 5000, 5000, 1 << 17))
    image.put(36, count, 4)
    image.put(24, min(count << (2 * bits - 3), (1 << 63) - 512))
    image.what.append(f"a disk with {count} L1 entries")


Change = Callable[[Image, tuple[Field, ...], random.Random], None]
_CHANGES: Final[tuple[Change, ...]] = (
    *(_change_field,) * 20,
    *(_shorten, _lengthen, _fill_l1, add_bomb, _many_snapshots, _copy, huge_disk),
)


def mutate(name: str, chance: random.Random) -> Image:
    """An image of a form, changed in one place or a few."""
    data = bytearray(form(name))
    image = Image(data, len(data), [name])
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5))):
        if image.data:
            chance.choice(_CHANGES)(image, fields_of(name), chance)
    return image
