# SPDX-License-Identifier: Apache-2.0
"""From a password to the key of the disk, and back into a key slot (LUKS 1.2.3, chapters 2.4 and 4).

PBKDF2 makes a key of the password; with it the slot's material is decrypted, 4000 stripes, of which the merge gives the
disk's key; a digest tells whether it is the right one. The stripes are there so that a part of the material that is
overwritten makes all of it useless (anti-forensic splitting).

All of this is computation, seconds of it: callers have it done in a thread. Nothing of it gets into an error or a repr.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Final

from bottomhalf.block.errors import BlockError
from bottomhalf.drivers.luks.ciphers import SectorCipher
from bottomhalf.drivers.luks.header import DIGEST_BYTES, HASHES, SALT_BYTES, STRIPES, Header, KeySlot

ITERATIONS_MIN: Final = 1000  # of a slot and of the digest, as QEMU and cryptsetup
TRIAL_NS: Final = 20_000_000  # long enough to measure
TRIAL_ITERATIONS_MAX: Final = 1 << 22
ITERATION_TIME_MS: Final = 2000  # of a slot, if nobody says otherwise

Random = Callable[[int], bytes]


def diffuse(data: bytes, hash: str) -> bytes:
    """Every bit of the result depends on a digest's worth of the input."""
    size = HASHES[hash]
    parts = []
    for n, at in enumerate(range(0, len(data), size)):
        part = data[at : at + size]
        parts.append(hashlib.new(hash, n.to_bytes(4, "big") + part).digest()[: len(part)])
    return b"".join(parts)


def split(key: bytes, stripes: int, hash: str, random: Random) -> bytes:
    """The key as ``stripes`` times its size of bytes, all of which are needed to get it back."""
    size = len(key)
    noise = random(size * (stripes - 1))
    return noise + _xor(_gather(noise, size, hash), key)


def merge(material: bytes, size: int, stripes: int, hash: str) -> bytes:
    """The key of split()."""
    noise = material[: size * (stripes - 1)]
    return _xor(_gather(noise, size, hash), material[size * (stripes - 1) : size * stripes])


def _gather(noise: bytes, size: int, hash: str) -> bytes:
    last = bytes(size)
    for at in range(0, len(noise), size):
        last = diffuse(_xor(last, noise[at : at + size]), hash)
    return last


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")


def measure(hash: str, size: int, time_ms: int, clock_ns: Callable[[], int]) -> int:
    """PBKDF2 iterations that take about ``time_ms`` here."""
    count = ITERATIONS_MIN
    while True:
        begin = clock_ns()
        hashlib.pbkdf2_hmac(hash, b"password", bytes(SALT_BYTES), count, size)
        took = clock_ns() - begin
        if took >= TRIAL_NS or count >= TRIAL_ITERATIONS_MAX:
            break
        count *= 2
    return max(ITERATIONS_MIN, count * time_ms * 1_000_000 // max(took, TRIAL_NS // 64))


def digest_of(header: Header, key: bytes) -> bytes:
    """What tells the disk's key from others."""
    return hashlib.pbkdf2_hmac(header.hash, key, header.digest_salt, header.digest_iterations, DIGEST_BYTES)


def open_slot(header: Header, slot: KeySlot, material: bytes, password: bytes) -> bytes | None:
    """The disk's key, if the password is that of the slot."""
    derived = hashlib.pbkdf2_hmac(header.hash, password, slot.salt, slot.iterations, header.key_bytes)
    buffer = bytearray(material)
    with memoryview(buffer) as view:
        SectorCipher(derived, header.cipher, header.mode).decrypt([(0, view)])
    key = merge(bytes(buffer), header.key_bytes, STRIPES, header.hash)
    return key if hmac.compare_digest(digest_of(header, key), header.digest) else None


def unlock(header: Header, materials: list[bytes | None], password: bytes) -> tuple[int, bytes]:
    """Slot and key. ``materials`` are those of the active slots. BlockError if the password fits none."""
    for n, (slot, material) in enumerate(zip(header.slots, materials, strict=True)):
        if slot.active and material is not None:
            key = open_slot(header, slot, material, password)
            if key is not None:
                return n, key
    raise BlockError("Invalid password, cannot unlock any keyslot")


def close_slot(header: Header, slot: KeySlot, key: bytes, password: bytes, iterations: int, random: Random) -> bytes:
    """Give the slot a password; the material to be written to its place before the header is."""
    slot.salt, slot.iterations, slot.active = random(SALT_BYTES), iterations, True
    derived = hashlib.pbkdf2_hmac(header.hash, password, slot.salt, iterations, header.key_bytes)
    buffer = bytearray(split(key, STRIPES, header.hash, random).ljust(header.material_bytes, b"\0"))
    with memoryview(buffer) as view:
        SectorCipher(derived, header.cipher, header.mode).encrypt([(0, view)])
    return bytes(buffer)
