# SPDX-License-Identifier: Apache-2.0
"""The numbers of the format, and the limits on what an image may ask of us.

Clause: "Header"; the limits are QEMU's.
Invariant: what an image says of a count, a length or a depth is compared with a number here before anything is read or
reserved for it.
Test: tests/drivers/qcow2/test_hostile.py
"""

from __future__ import annotations

from typing import Final

MAGIC: Final = b"QFI\xfb"

CLUSTER_BITS_MIN: Final = 9
CLUSTER_BITS_MAX: Final = 21
CLUSTER_BITS_DEFAULT: Final = 16
SUBCLUSTERS: Final = 32  # of a cluster, where L2 entries are extended
EXTENDED_CLUSTER_BITS_MIN: Final = 14  # a subcluster has at least 512 bytes
REFCOUNT_ORDER_DEFAULT: Final = 4  # 16 bits
REFCOUNT_ORDER_MAX: Final = 6

# Limits. The first three are QEMU's, and part of the format as everybody knows it.
L1_BYTES_MAX: Final = 32 << 20
REFCOUNT_TABLE_BYTES_MAX: Final = 8 << 20
BACKING_NAME_BYTES_MAX: Final = 1023
SNAPSHOTS_MAX: Final = 65536
SNAPSHOT_TABLE_BYTES_MAX: Final = 64 << 20
EXTENSIONS_MAX: Final = 256

# Header: versions 2 and 3.
HEADER_BYTES_V2: Final = 72
HEADER_BYTES_V3: Final = 104
HEADER_BYTES_WRITTEN: Final = 112

# Incompatible features: who does not know one of them must not open the image.
DIRTY: Final = 1
CORRUPT: Final = 2
DATA_FILE: Final = 4
COMPRESSION_TYPE: Final = 8
EXTENDED_L2: Final = 16
INCOMPATIBLE_KNOWN: Final = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2
# Compatible: may be ignored.
LAZY_REFCOUNTS: Final = 1
# Autoclear: who does not know one of them clears it before the first write.
BITMAPS: Final = 1
RAW_DATA: Final = 2
AUTOCLEAR_KNOWN: Final = BITMAPS | RAW_DATA

FEATURE_NAMES: Final = (  # kind (0 incompatible, 1 compatible, 2 autoclear), bit, name
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)

# Header extensions.
EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
EXTENSION_CRYPTO: Final = 0x0537BE77
EXTENSION_DATA_FILE: Final = 0x44415441

# Header field crypt_method.
CRYPT_AES: Final = 1  # the vectors count from the disk's beginning
CRYPT_LUKS: Final = 2  # and here from the file's

ZLIB: Final = 0
ZSTD: Final = 1

# L1 and L2 entries.
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
COPIED: Final = 1 << 63  # the refcount is exactly one: may be written in place
COMPRESSED: Final = 1 << 62
ZERO: Final = 1  # reads as zeroes, allocated or not (version 3)
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
REFCOUNT_TABLE_RESERVED: Final = 0x1FF

SECTOR_BYTES: Final = 512
