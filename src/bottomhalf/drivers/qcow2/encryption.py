# SPDX-License-Identifier: Apache-2.0
"""LUKS inside qcow2 (header extension "Full disk encryption header pointer", 0x0537be77).

The extension says where clusters with a LUKS header lie. Only the guest's data are encrypted, sector by sector, with
the place in the file, not on the disk, as the vector: a cluster that two snapshots share reads the same in both. Tables
are not, and so everybody sees which clusters are in use. The older method, "aes", is broken and not supported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import BlockError, ImageError
from bottomhalf.drivers.luks.ciphers import SectorCipher
from bottomhalf.drivers.luks.create import LuksOptions, co_create
from bottomhalf.drivers.luks.header import SECTOR_BYTES
from bottomhalf.drivers.luks.node import co_unlock
from bottomhalf.drivers.qcow2 import layout

if TYPE_CHECKING:
    from bottomhalf.block import Node
    from bottomhalf.drivers.qcow2.header import Header
    from bottomhalf.drivers.qcow2.node import Qcow2Node

LUKS: Final = 2  # header field crypt_method; 1 is aes


def header_place(header: Header) -> tuple[int, int]:
    """Where an image's LUKS header is: offset and length in bytes. ImageError."""
    data = header.extension(layout.EXTENSION_CRYPTO)
    if data is None or len(data) != 16:
        raise ImageError("the image is encrypted, but does not say where its encryption header is")
    offset, length = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")
    if offset & (header.cluster_size - 1) or not offset:
        raise ImageError(f"Encryption header offset '{offset}' is not a multiple of cluster size")
    return offset, length


async def co_open_cipher(file: Node, header: Header, format: str | None, password: bytes | None) -> SectorCipher | None:
    """What encrypts the image's data; None if nothing does. ``format`` and password are the user's."""
    if not header.crypt_method:
        if format is not None:
            raise BlockError(f"No encryption in image header, but options specified format '{format}'")
        return None
    if header.crypt_method != LUKS:
        raise BlockError("The encryption method 'aes' of old qcow2 images is not supported; convert it with qemu-img")
    if format not in (None, "luks"):
        raise BlockError(f"Header reported 'luks' encryption format but options specify '{format}'")
    if password is None:
        raise BlockError("Parameter 'encrypt.key-secret' is required for cipher")
    offset, length = header_place(header)
    return (await co_unlock(file, password, base=offset, limit=length)).cipher


async def co_encrypt_new(node: Qcow2Node, options: LuksOptions) -> None:
    """Give an image that has no data yet a LUKS header. The tables are written with the next commit."""
    metadata, header = node.metadata, node.header
    length = options.header().payload * SECTOR_BYTES
    async with metadata.lock:
        first = await metadata.allocate_together(-(-length // header.cluster_size))
        offset = first << header.cluster_bits
        await co_create(node.file, options, base=offset)
        header.set_extension(layout.EXTENSION_CRYPTO, offset.to_bytes(8, "big") + length.to_bytes(8, "big"))
        header.crypt_method = LUKS
        metadata.header_changed()
