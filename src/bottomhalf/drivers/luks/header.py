# SPDX-License-Identifier: Apache-2.0
"""The header of a LUKS volume (LUKS On-Disk Format Specification 1.2.3, figure 1).

    header = Header.parse(first_592_bytes)

    0  magic  6 version  8 cipher name  40 cipher mode  72 hash  104 payload offset  108 key bytes
    112 digest of the key  132 its salt  164 its iterations  168 uuid  208 eight key slots of 48 bytes

The header is not signed: who can write to the disk chooses every number in it. PBKDF2 runs as long as the header says,
so what it says is added up and limited before any of it is done.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from bottomhalf.block.errors import ImageError

MAGIC: Final = b"LUKS\xba\xbe"
HEADER_BYTES: Final = 592
SECTOR_BYTES: Final = 512
SLOTS: Final = 8
STRIPES: Final = 4000  # cryptsetup and QEMU write no other number, and QEMU reads no other
ACTIVE: Final = 0x00AC71F3
INACTIVE: Final = 0x0000DEAD
DIGEST_BYTES: Final = 20
SALT_BYTES: Final = 32
MATERIAL_ALIGN: Final = 4096
HASHES: Final = {"sha1": 20, "sha256": 32, "sha512": 64}  # bytes of a digest
# Runs of HMAC that all slots together may ask for. Two seconds of a fast machine are about 2**23 for one slot.
WORK_MAX: Final = 1 << 27

_FIXED: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = struct.Struct(">II32sII")


@dataclass
class KeySlot:
    """Where one password's copy of the key lies. ``offset`` in sectors."""

    active: bool = False
    iterations: int = 0
    salt: bytes = bytes(SALT_BYTES)
    offset: int = 0
    stripes: int = STRIPES


@dataclass
class Header:
    """What the first sectors say. ``payload`` in sectors."""

    cipher: str
    mode: str
    hash: str
    payload: int
    key_bytes: int
    digest: bytes = field(default=bytes(DIGEST_BYTES), repr=False)
    digest_salt: bytes = field(default=bytes(SALT_BYTES), repr=False)
    digest_iterations: int = 0
    uuid: str = ""
    slots: list[KeySlot] = field(default_factory=lambda: [KeySlot() for _ in range(SLOTS)], repr=False)

    @property
    def material_bytes(self) -> int:
        """Bytes of a slot's key material, in whole sectors."""
        return -(-self.key_bytes * STRIPES // SECTOR_BYTES) * SECTOR_BYTES

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """ImageError with what is wrong, and nothing but that."""
        if data[: len(MAGIC)] != MAGIC or len(data) < HEADER_BYTES:
            raise ImageError("Volume is not in LUKS format")
        version = int.from_bytes(data[6:8], "big")
        if version != 1:
            raise ImageError(f"LUKS version {version} is not supported")
        (_, _, cipher, mode, hash_, payload, key_bytes, digest, salt, iterations, uuid) = _FIXED.unpack_from(data)
        header = cls(
            _text(cipher, "cipher name"),
            _text(mode, "cipher mode"),
            _text(hash_, "hash spec"),
            payload,
            key_bytes,
            digest,
            salt,
            iterations,
            uuid.partition(b"\0")[0].decode("ascii", "surrogateescape"),
            [],
        )
        for n in range(SLOTS):
            state, count, slot_salt, offset, stripes = _SLOT.unpack_from(data, _FIXED.size + n * _SLOT.size)
            if state not in (ACTIVE, INACTIVE):
                raise ImageError(f"Keyslot {n} state (active/disable) is corrupted")
            header.slots.append(KeySlot(state == ACTIVE, count, slot_salt, offset, stripes))
        return header

    def check(self, *, detached: bool = False) -> None:
        """ImageError for numbers that cannot be, or that would keep us busy for too long."""
        size = HASHES.get(self.hash)
        if size is None:
            raise ImageError(f"Hash algorithm '{self.hash}' not supported")
        if not self.digest_iterations > 0:
            raise ImageError("LUKS key iteration count is zero")
        sectors = self.material_bytes // SECTOR_BYTES
        work, places = self.digest_iterations, []
        for n, slot in enumerate(self.slots):
            if slot.stripes != STRIPES:
                raise ImageError(f"Keyslot {n} is corrupted (stripes {slot.stripes} != {STRIPES})")
            if slot.active:
                if not slot.iterations:
                    raise ImageError(f"Keyslot {n} iteration count is zero")
                work += slot.iterations * -(-self.key_bytes // size) + self.digest_iterations
            places.append((slot.offset, slot.offset + sectors, n))
        if work > WORK_MAX:
            raise ImageError(f"the LUKS header asks for {work} runs of its hash, of which {WORK_MAX} are the limit")
        places.sort()
        for start, end, n in places:
            if start * SECTOR_BYTES < HEADER_BYTES:
                raise ImageError(f"Keyslot {n} is overlapping with the LUKS header")
            if not detached and end > self.payload:
                raise ImageError(f"Keyslot {n} is overlapping with the encrypted payload")
        for (_, end, n), (start, _, other) in pairwise(places):
            if end > start:
                raise ImageError(f"Keyslots {n} and {other} are overlapping in the header")

    def to_bytes(self) -> bytes:
        """The 592 bytes that parse() reads."""
        fixed = _FIXED.pack(
            MAGIC,
            1,
            self.cipher.encode(),
            self.mode.encode(),
            self.hash.encode(),
            self.payload,
            self.key_bytes,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode("ascii", "surrogateescape"),
        )
        return fixed + b"".join(
            _SLOT.pack(ACTIVE if each.active else INACTIVE, each.iterations, each.salt, each.offset, each.stripes)
            for each in self.slots
        )


def _text(field_bytes: bytes, what: str) -> str:
    head, end, _ = field_bytes.partition(b"\0")
    if not end:
        raise ImageError(f"LUKS header {what} is not NUL terminated")
    if not head.isascii() or (head and not head.decode().isprintable()):
        raise ImageError(f"the LUKS header's {what} is not text")
    return head.decode()
