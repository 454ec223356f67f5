# SPDX-License-Identifier: Apache-2.0
"""The first cluster of an image: header, extensions, the backing file's name (chapters "Header", "Header extensions").

    header = Header.parse(first_cluster)
    first_cluster = header.to_bytes()

What is not known is kept: bytes of a longer header, and extensions, come out as they came in. The name of the backing
file is data here; nobody opens it for having read it.

Clause: "Header", "Header extensions", "Header padding".
Invariant: a header that was parsed comes out as it came in, also what we do not know; nothing is opened.
Test: tests/drivers/qcow2/test_numbers.py
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import layout
from bottomhalf.drivers.qcow2.layout import (
    BACKING_NAME_BYTES_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    EXTENSIONS_MAX,
    HEADER_BYTES_V2,
    HEADER_BYTES_V3,
    HEADER_BYTES_WRITTEN,
    L1_BYTES_MAX,
    MAGIC,
    REFCOUNT_ORDER_DEFAULT,
    REFCOUNT_ORDER_MAX,
    REFCOUNT_TABLE_BYTES_MAX,
    SNAPSHOTS_MAX,
)

# backing offset and length, cluster bits, size, crypt method, L1 size and offset, refcount table's offset and
# clusters, snapshots and their offset
_COMMON: Final = struct.Struct(">QIIQIIQQIIQ")
_COMMON_AT: Final = 8
_VERSION_3: Final = struct.Struct(">QQQII")  # features: incompatible, compatible, autoclear; refcount order, length
_EXTENSION: Final = struct.Struct(">II")
_FEATURE: Final = struct.Struct(">BB46s")


@dataclass
class Header:
    """What the first cluster says. Offsets and sizes are in bytes, table sizes in entries, unless named otherwise."""

    size: int
    cluster_bits: int
    version: int = 3
    backing_file: str | None = None
    crypt_method: int = 0
    l1_size: int = 0
    l1_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = REFCOUNT_ORDER_DEFAULT
    compression_type: int = layout.ZLIB
    header_bytes: int = HEADER_BYTES_WRITTEN
    unknown: bytes = b""  # of a header that is longer than ours
    extensions: list[tuple[int, bytes]] = field(default_factory=list)  # all but the end, in order

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & layout.EXTENDED_L2)

    @property
    def external(self) -> bool:
        """Whether the guest's data lie in a file of their own."""
        return bool(self.incompatible & layout.DATA_FILE)

    @property
    def raw_data(self) -> bool:
        """Whether that file is a raw image of the disk for those who do not know of this one."""
        return self.external and bool(self.autoclear & layout.RAW_DATA)

    @property
    def data_file(self) -> str | None:
        """The name of that file, if the image knows it."""
        data = self.extension(layout.EXTENSION_DATA_FILE)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // (16 if self.extended_l2 else 8)

    @property
    def l1_entries_needed(self) -> int:
        """L1 entries that cover the disk."""
        return -(-self.size // (self.cluster_size * self.l2_entries))

    def extension(self, kind: int) -> bytes | None:
        return next((data for found, data in self.extensions if found == kind), None)

    def set_extension(self, kind: int, data: bytes | None) -> None:
        """Replace, add or (None) remove an extension."""
        for n, (found, _) in enumerate(self.extensions):
            if found == kind:
                self.extensions[n : n + 1] = [] if data is None else [(kind, data)]
                return
        if data is not None:
            self.extensions.append((kind, data))

    @property
    def backing_format(self) -> str | None:
        data = self.extension(layout.EXTENSION_BACKING_FORMAT)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    # -- reading ------------------------------------------------------------------------------------------------

    @staticmethod
    def cluster_bits_of(head: bytes) -> int:
        """How much to read for parse(), from the first 24 bytes. ImageError if this is no qcow2 image."""
        if head[:4] != MAGIC or len(head) < HEADER_BYTES_V2:
            raise ImageError("Image is not in qcow2 format")
        version = int.from_bytes(head[4:8], "big")
        if version not in (2, 3):
            raise ImageError(f"Unsupported qcow2 version {version}")
        bits = int.from_bytes(head[20:24], "big")
        if not CLUSTER_BITS_MIN <= bits <= CLUSTER_BITS_MAX:
            raise ImageError(f"Unsupported cluster size: 2^{bits}")
        return bits

    @classmethod
    def parse(cls, head: bytes) -> Header:
        """From the first cluster (shorter only if the file is). ImageError with what is wrong, and nothing but that."""
        bits = cls.cluster_bits_of(head)
        version = int.from_bytes(head[4:8], "big")
        (
            backing_offset,
            backing_length,
            _,
            size,
            crypt_method,
            l1_size,
            l1_offset,
            refcount_table_offset,
            refcount_table_clusters,
            snapshot_count,
            snapshots_offset,
        ) = _COMMON.unpack_from(head, _COMMON_AT)
        header = cls(
            size=size,
            cluster_bits=bits,
            version=version,
            crypt_method=crypt_method,
            l1_size=l1_size,
            l1_offset=l1_offset,
            refcount_table_offset=refcount_table_offset,
            refcount_table_clusters=refcount_table_clusters,
            snapshot_count=snapshot_count,
            snapshots_offset=snapshots_offset,
            header_bytes=HEADER_BYTES_V2,
        )
        if version == 3:
            header._parse_version_3(head)
        if header.header_bytes > header.cluster_size:
            raise ImageError("qcow2 header exceeds cluster size")
        if backing_offset > header.cluster_size:
            raise ImageError("Invalid backing file offset")
        header._check_features(head, min(backing_offset or header.cluster_size, len(head)))
        header._parse_extensions(head, backing_offset or header.cluster_size)
        if header.refcount_order > REFCOUNT_ORDER_MAX:
            raise ImageError("Reference count entry width too large; may not exceed 64 bits")
        header._check_compression()
        header._check_tables()
        if backing_offset:
            if backing_length > min(BACKING_NAME_BYTES_MAX, header.cluster_size - backing_offset):
                raise ImageError("Backing file name too long")
            name = head[backing_offset : backing_offset + backing_length]
            if len(name) < backing_length:
                raise ImageError("Could not read backing file name")
            header.backing_file = name.decode("utf-8", "surrogateescape")
        return header

    def _parse_version_3(self, head: bytes) -> None:
        if len(head) < HEADER_BYTES_V3:
            raise ImageError("qcow2 header too short")
        (self.incompatible, self.compatible, self.autoclear, self.refcount_order, length) = _VERSION_3.unpack_from(
            head, HEADER_BYTES_V2
        )
        if length < HEADER_BYTES_V3:
            raise ImageError("qcow2 header too short")
        self.header_bytes = length
        if length > HEADER_BYTES_V3:
            self.compression_type = head[HEADER_BYTES_V3] if len(head) > HEADER_BYTES_V3 else 0
        if length > HEADER_BYTES_WRITTEN:
            self.unknown = head[HEADER_BYTES_WRITTEN : min(length, self.cluster_size)]

    def _check_features(self, head: bytes, end: int) -> None:
        unknown = self.incompatible & ~layout.INCOMPATIBLE_KNOWN
        if unknown:
            names = []
            for bit, name in self._feature_names(head, end):
                if unknown >> bit & 1:
                    names.append(name)
                    unknown &= ~(1 << bit)
            if unknown:
                names.append(f"Unknown incompatible feature: {unknown:x}")
            raise ImageError(f"Unsupported qcow2 feature(s): {', '.join(names)}")
        if self.extended_l2 and self.cluster_bits < layout.EXTENDED_CLUSTER_BITS_MIN:
            raise ImageError("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")

    def _feature_names(self, head: bytes, end: int) -> Iterator[tuple[int, str]]:
        """The incompatible features that the image itself names: bit, name. Of an image that is not understood, so
        nothing here is an error."""
        at = self.header_bytes
        while at + _EXTENSION.size <= end:
            kind, length = _EXTENSION.unpack_from(head, at)
            at += _EXTENSION.size
            if kind == layout.EXTENSION_FEATURE_NAMES:
                for place in range(at, min(at + length, end) - _FEATURE.size + 1, _FEATURE.size):
                    feature, bit, name = _FEATURE.unpack_from(head, place)
                    if feature == 0 and bit < 64:
                        yield bit, name.rstrip(b"\0").decode("utf-8", "backslashreplace")
            if kind == layout.EXTENSION_END:
                return
            at += -(-length // 8) * 8

    def _parse_extensions(self, head: bytes, end: int) -> None:
        at = self.header_bytes
        end = min(end, len(head))
        while at < end:
            if at + _EXTENSION.size > end:
                raise ImageError(f"qcow2 header extension at {at} does not fit into the header")
            kind, length = _EXTENSION.unpack_from(head, at)
            at += _EXTENSION.size
            if kind == layout.EXTENSION_END:
                return
            if length > end - at:
                raise ImageError(f"Header extension too large: {length} bytes at {at}")
            if len(self.extensions) == EXTENSIONS_MAX:
                raise ImageError(f"qcow2 header has more than {EXTENSIONS_MAX} extensions")
            self.extensions.append((kind, head[at : at + length]))
            at += -(-length // 8) * 8

    def _check_compression(self) -> None:
        if self.compression_type not in (layout.ZLIB, layout.ZSTD):
            raise ImageError(f"qcow2: unknown compression type: {self.compression_type}")
        named = bool(self.incompatible & layout.COMPRESSION_TYPE)
        if named != (self.compression_type != layout.ZLIB):
            must = "must not" if named else "must"
            raise ImageError(f"qcow2: Compression type incompatible feature bit {must} be set")

    def _check_tables(self) -> None:
        cluster = self.cluster_size
        if self.crypt_method > 2:
            raise ImageError(f"Unsupported encryption method {self.crypt_method}")
        table_bytes = self.refcount_table_clusters << self.cluster_bits
        if table_bytes > REFCOUNT_TABLE_BYTES_MAX:
            raise ImageError("Reference count table too large")
        self._check_table("Reference count table", self.refcount_table_offset, table_bytes)
        if not self.refcount_table_clusters:
            raise ImageError("Image does not contain a reference count table")
        if self.snapshot_count > SNAPSHOTS_MAX:
            raise ImageError("Snapshot table too large")
        self._check_table("Snapshot table", self.snapshots_offset, self.snapshot_count * 40)
        if self.l1_size * 8 > L1_BYTES_MAX:
            raise ImageError("Active L1 table too large")
        self._check_table("Active L1 table", self.l1_offset, self.l1_size * 8)
        if self.size > (L1_BYTES_MAX // 8) * self.l2_entries * cluster:
            raise ImageError("Image is too big")
        if self.l1_size < self.l1_entries_needed:
            raise ImageError("L1 table is too small")

    def _check_table(self, name: str, offset: int, length: int) -> None:
        if length and (not offset or offset % self.cluster_size or offset + length >= 1 << 63):
            raise ImageError(f"{name} offset invalid")

    # -- writing ------------------------------------------------------------------------------------------------

    @staticmethod
    def name_of(head: bytes | bytearray) -> tuple[int, int]:
        """(offset, length) of the backing file's name, as a header that was written says; offset 0: there is none."""
        offset, length = _COMMON.unpack_from(head, _COMMON_AT)[:2]
        return offset, length

    @staticmethod
    def with_name_at(head: bytes | bytearray, offset: int) -> bytes:
        """The same, with the backing file's name elsewhere."""
        return bytes(head[:_COMMON_AT]) + offset.to_bytes(8, "big") + bytes(head[_COMMON_AT + 8 :])

    @staticmethod
    def pack_extensions(extensions: list[tuple[int, bytes]]) -> bytes:
        """A list of extensions, and its end."""
        packed = (_EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8) for kind, data in extensions)
        return b"".join(packed) + _EXTENSION.pack(layout.EXTENSION_END, 0)

    def to_bytes(self, name_at: int = 0) -> bytes:
        """The first cluster's beginning, from the magic to the backing file's name, which begins at ``name_at`` at the
        earliest. ImageError if that is more than a cluster."""
        extensions = [(kind, data) for kind, data in self.extensions if kind != layout.EXTENSION_FEATURE_NAMES]
        if self.version == 3 and self.cluster_size > 4096:
            extensions.insert(self._place_of_feature_names(extensions), (layout.EXTENSION_FEATURE_NAMES, _features()))
        length = HEADER_BYTES_V2 if self.version == 2 else HEADER_BYTES_WRITTEN + len(self.unknown)
        body = self.pack_extensions(extensions)
        name = b"" if self.backing_file is None else self.backing_file.encode("utf-8", "surrogateescape")
        body += bytes(max(name_at - length - len(body), 0) if name else 0)
        backing_offset = length + len(body) if name else 0
        made = MAGIC + self.version.to_bytes(4, "big")
        made += _COMMON.pack(
            backing_offset,
            len(name),
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.snapshot_count,
            self.snapshots_offset,
        )
        if self.version == 3:
            made += _VERSION_3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, length)
            made += bytes([self.compression_type]) + bytes(7) + self.unknown
        made += body + name
        if len(made) > self.cluster_size or len(name) > BACKING_NAME_BYTES_MAX:
            raise ImageError(f"The header with its extensions and names does not fit into {self.cluster_size} bytes")
        return made

    @staticmethod
    def _place_of_feature_names(extensions: list[tuple[int, bytes]]) -> int:
        """Behind those that QEMU writes before it."""
        before = (layout.EXTENSION_BACKING_FORMAT, layout.EXTENSION_DATA_FILE, layout.EXTENSION_CRYPTO)
        return max((n + 1 for n, (kind, _) in enumerate(extensions) if kind in before), default=0)


def _features() -> bytes:
    return b"".join(_FEATURE.pack(kind, bit, name.encode()) for kind, bit, name in layout.FEATURE_NAMES)
