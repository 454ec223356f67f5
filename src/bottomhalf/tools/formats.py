# SPDX-License-Identifier: Apache-2.0
"""Which format an image has, by its first bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import BlockError

if TYPE_CHECKING:
    from bottomhalf.host.protocol import Host

PROBE_BYTES: Final = 512
KNOWN: Final = ("raw", "qcow2")  # formats that there are drivers for

_MAGIC: Final = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)


def probe(head: bytes) -> str:
    """The format's name; "raw" if nothing else fits, which any sequence of bytes may be."""
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            if name == "qcow2" and head[4:8] == b"\0\0\0\x01":
                return "qcow"
            return name
    return "raw"


def encryption(head: bytes) -> str | None:
    """How the data of a qcow2 image are encrypted, by its first bytes: "aes", "luks" or None."""
    return {b"\0\0\0\1": "aes", b"\0\0\0\2": "luks"}.get(head[32:36]) if probe(head) == "qcow2" else None


def image_format(host: Host, path: str) -> str:
    """The format of an image file. BlockError if it cannot be read."""
    return probe(image_head(host, path))


def image_head(host: Host, path: str) -> bytes:
    """The first bytes of an image file. BlockError if it cannot be read."""
    try:
        file = host.open_file(path, read_only=True, locking="off")
    except OSError as error:
        raise BlockError(f"Could not open '{path}': {error.strerror}") from error
    try:
        return file.pread(PROBE_BYTES, 0)
    finally:
        file.close()
