# SPDX-License-Identifier: Apache-2.0
"""LUKS inside qcow2 (header extension "Full disk encryption header pointer", 0x0537be77).

The extension says where clusters with a LUKS header lie. Only the guest's data are encrypted, sector by sector, with
the place in the file, not on the disk, as the vector: a cluster that two snapshots share reads the same in both. Tables
are not, and so everybody sees which clusters are in use.

The older method, "aes", has no header: the password's first sixteen bytes are the key, and the vectors, the disk's
sectors, can be foreseen. It hides little (docs/encryption.md) and is here to read what there is.

Clause: "Full disk encryption header pointer", "Data encryption".
Invariant: of the guest's data nothing is stored in plain.
Test: tests/drivers/luks/test_qcow2.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.errors import BlockError, ImageError
from bottomhalf.drivers.luks import library
from bottomhalf.drivers.luks.ciphers import SectorCipher
from bottomhalf.drivers.luks.create import LuksOptions, co_create
from bottomhalf.drivers.luks.header import SECTOR_BYTES
from bottomhalf.drivers.luks.keyslots import SlotChange, co_amend
from bottomhalf.drivers.luks.node import co_unlock
from bottomhalf.drivers.qcow2 import layout

if TYPE_CHECKING:
    from bottomhalf.block import Node
    from bottomhalf.drivers.qcow2.header import Header
    from bottomhalf.drivers.qcow2.node import Qcow2Node

OLD_KEY_BYTES: Final = 16
_FORMATS: Final = {layout.CRYPT_AES: "aes", layout.CRYPT_LUKS: "luks"}


@dataclass(frozen=True)
class OldEncryption:
    """A new image shall be encrypted by the method "aes"."""

    password: bytes = field(repr=False)

    @classmethod
    def of(cls, password: bytes) -> OldEncryption:
        """BlockError without the package that has ciphers."""
        made = cls(password)
        made.cipher()
        return made

    def cipher(self) -> SectorCipher:
        """BlockError without the package that has ciphers."""
        key = self.password[:OLD_KEY_BYTES].ljust(OLD_KEY_BYTES, b"\0")
        return SectorCipher(key, "aes", "cbc-plain64")


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
    method = _FORMATS[header.crypt_method]
    if format not in (None, method):
        raise BlockError(f"Header reported '{method}' encryption format but options specify '{format}'")
    if password is None:
        raise BlockError("Parameter 'encrypt.key-secret' is required for cipher")
    if header.crypt_method == layout.CRYPT_AES:
        return OldEncryption(password).cipher()
    offset, length = header_place(header)
    return (await co_unlock(file, password, base=offset, limit=length)).cipher


def take_options(format: str, options: dict[str, Any]) -> LuksOptions | OldEncryption:
    """Take what is about encryption out of the library's options of a new image. ValueError, BlockError."""
    if format == "luks":
        return library.take_options(options)
    if format != "aes":
        raise ValueError(f"encrypt_format is 'luks', 'aes' or None, not {format!r}")
    return OldEncryption.of(library.take_password(options))


async def co_amend_keys(node: Qcow2Node, secret: str | bytes | None, change: SlotChange, *, force: bool) -> None:
    """Change the passwords of an image. BlockError, OSError."""
    if not node.header.crypt_method:
        raise BlockError("Can't amend encryption options - encryption not present")
    if node.header.crypt_method != layout.CRYPT_LUKS:
        raise BlockError("Only LUKS encryption options can be amended")
    assert secret is not None, "it was opened with that"
    password = secret.encode() if isinstance(secret, str) else secret
    offset, length = header_place(node.header)
    await co_amend(node.file, password, change, base=offset, limit=length, force=force)


async def co_encrypt_new(node: Qcow2Node, options: LuksOptions | OldEncryption) -> None:
    """Let an image that has no data yet be encrypted. The tables are written with the next commit."""
    metadata, header = node.metadata, node.header
    if isinstance(options, OldEncryption):
        header.crypt_method = layout.CRYPT_AES
        metadata.header_changed()
        return
    length = options.header().payload * SECTOR_BYTES
    async with metadata.lock:
        first = await metadata.allocate_together(-(-length // header.cluster_size))
        offset = first << header.cluster_bits
        await co_create(node.file, options, base=offset)
        header.set_extension(layout.EXTENSION_CRYPTO, offset.to_bytes(8, "big") + length.to_bytes(8, "big"))
        header.crypt_method = layout.CRYPT_LUKS
        metadata.header_changed()
