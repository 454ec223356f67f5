# SPDX-License-Identifier: Apache-2.0
"""Encryption of sectors: AES in the modes XTS (IEEE 1619-2007) and CBC, with an initialization vector per sector.

    cipher = SectorCipher(key, "aes", "xts-plain64")
    cipher.decrypt([(sector, buffer), ...])  # in place

Facts: a sector is 512 bytes and has its own vector. OpenSSL encrypts 4 KiB in about a microsecond, and gives a context
another vector in a third of one, but the package ``cryptography`` makes a new context for each, in three. Measured for
4 KiB, of CPU time: 10 us with OpenSSL's own functions, 25 with a context per sector, 21 with what is described next.

Decision: where the machine's OpenSSL can be loaded, its functions are called (``host.libcrypto``). Elsewhere, and for
keys that it refuses, XTS is done by its definition, C = E(P ^ T) ^ T, for a whole list at once: one ECB call of the
package makes the vectors, one handles all the data, and the masks T are computed side by side in one large integer,
each sector's doubling itself five times until it has its 32 blocks. Reading CBC is done in the same way; writing CBC is
a chain, which needs a context per sector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from bottomhalf.block.errors import BlockError, ImageError
from bottomhalf.host import libcrypto

SECTOR_BYTES: Final = 512
BLOCK_BYTES: Final = 16
BATCH_SECTORS: Final = 64  # handled at once: what fits the caches
IV_GENERATORS: Final = ("plain", "plain64", "essiv")
_BLOCK_BITS: Final = 8 * BLOCK_BYTES

Pieces: TypeAlias = Sequence[tuple[int, memoryview]]


def load_cryptography() -> Any:
    """The package that has the ciphers. BlockError that says how to get it."""
    try:
        from cryptography.hazmat.primitives import ciphers
    except ImportError:
        raise BlockError(
            "encryption needs the package cryptography: pip install 'bottomhalf[crypto]'"
        ) from None
    return ciphers


def check_key(cipher: str, mode: str, key_bytes: int) -> None:
    """ImageError for a cipher that we do not have, or that has no such keys. The words are QEMU's, where it says it."""
    chaining, dash, generator = mode.partition("-")
    name, _, digest = generator.partition(":")
    if not dash:
        raise ImageError(f"Unexpected cipher mode string format '{mode}'")
    if name not in IV_GENERATORS:
        raise ImageError(f"IV generator '{name}' not supported")
    if chaining not in ("xts", "cbc"):
        raise ImageError(f"the cipher mode '{mode}' is not supported")
    if chaining == "xts" and key_bytes % 2:
        raise ImageError("XTS cipher key length should be a multiple of 2")
    size = key_bytes // 2 if chaining == "xts" else key_bytes
    if cipher != "aes" or size not in (16, 24, 32):
        raise ImageError(f"Algorithm '{cipher}' with key size {size} bytes not supported")
    if (name == "essiv") != bool(digest) or (digest and digest not in ("sha1", "sha256", "sha512")):
        raise ImageError(f"the initialization vectors '{generator}' are not supported")
    if digest == "sha1" or digest == "sha512":
        raise ImageError(f"essiv:{digest} does not give a key of AES; essiv:sha256 does")


class SectorCipher:
    """A key in its mode. Not for several threads at once."""

    __slots__ = (
        *("_aes", "_cbc", "_ciphers", "_decrypt", "_encrypt", "_essiv", "_key", "_masks", "_vector_bytes"),
        *("_closing", "_opening"),
    )

    def __init__(self, key: bytes, cipher: str, mode: str, *, direct: bool = True) -> None:
        """``mode`` as the header writes it: xts-plain64, cbc-essiv:sha256. Without ``direct`` the machine's OpenSSL is
        not looked for. ImageError, BlockError."""
        check_key(cipher, mode, len(key))
        self._ciphers = load_cryptography()
        self._aes = self._ciphers.algorithms.AES
        chaining, _, generator = mode.partition("-")
        self._cbc = chaining == "cbc"
        data_key, tweak_key = (key, key) if self._cbc else (key[: len(key) // 2], key[len(key) // 2 :])
        self._key = data_key
        self._encrypt, self._decrypt = self._ecb(data_key)
        self._vector_bytes = 4 if generator == "plain" else 8
        self._essiv = self._ecb(hashlib.sha256(key).digest())[0] if generator.startswith("essiv") else None
        self._masks = self._ecb(tweak_key)[0]
        make = libcrypto.load() if direct else None
        name = f"aes-{8 * len(data_key)}-{chaining}"
        self._closing = None if make is None else make(name, key, True)
        self._opening = None if make is None else make(name, key, False)

    def __repr__(self) -> str:
        return "<SectorCipher>"  # never the key

    def _ecb(self, key: bytes) -> tuple[Any, Any]:
        cipher = self._ciphers.Cipher(self._aes(key), self._ciphers.modes.ECB())
        return cipher.encryptor(), cipher.decryptor()

    def decrypt(self, pieces: Pieces) -> None:
        """Decrypt buffers of whole sectors in place; each piece begins with the sector that it names."""
        if self._opening is not None:
            self._run(pieces, self._opening)
        else:
            self._work(pieces, self._open_cbc if self._cbc else self._decrypt_xts)

    def encrypt(self, pieces: Pieces) -> None:
        """The same the other way."""
        if self._closing is not None:
            self._run(pieces, self._closing)
        else:
            self._work(pieces, self._close_cbc if self._cbc else self._encrypt_xts)

    def _run(self, pieces: Pieces, context: libcrypto.Sectors) -> None:
        for sector, view in pieces:
            context.run(self._vectors(range(sector, sector + len(view) // SECTOR_BYTES)), view)

    def _work(self, pieces: Pieces, handle: Any) -> None:
        batch: list[memoryview] = []
        sectors: list[int] = []
        for sector, view in pieces:
            assert not len(view) % SECTOR_BYTES, "whole sectors"
            for at in range(0, len(view), BATCH_SECTORS * SECTOR_BYTES):
                part = view[at : at + BATCH_SECTORS * SECTOR_BYTES]
                first, count = sector + at // SECTOR_BYTES, len(part) // SECTOR_BYTES
                if len(sectors) + count > BATCH_SECTORS:
                    self._handle(sectors, batch, handle)
                    batch, sectors = [], []
                batch.append(part)
                sectors.extend(range(first, first + count))
        if batch:
            self._handle(sectors, batch, handle)

    def _handle(self, sectors: list[int], batch: list[memoryview], handle: Any) -> None:
        if len(batch) == 1:
            batch[0][:] = handle(sectors, bytes(batch[0]))
            return
        done, at = handle(sectors, b"".join(batch)), 0
        for part in batch:
            part[:] = done[at : at + len(part)]
            at += len(part)

    def _vectors(self, sectors: Sequence[int]) -> bytes:
        width = self._vector_bytes
        mask = (1 << 8 * width) - 1
        vectors = b"".join([(sector & mask).to_bytes(BLOCK_BYTES, "little") for sector in sectors])
        return self._essiv.update(vectors) if self._essiv is not None else vectors

    # -- XTS ----------------------------------------------------------------------------------------------------

    def _encrypt_xts(self, sectors: list[int], data: bytes) -> bytes:
        return self._xts(sectors, data, self._encrypt)

    def _decrypt_xts(self, sectors: list[int], data: bytes) -> bytes:
        return self._xts(sectors, data, self._decrypt)

    def _xts(self, sectors: list[int], data: bytes, ecb: Any) -> bytes:
        masks = xts_masks(self._masks.update(self._vectors(sectors)))
        inner = (int.from_bytes(data, "little") ^ masks).to_bytes(len(data), "little")
        return (int.from_bytes(ecb.update(inner), "little") ^ masks).to_bytes(len(data), "little")

    # -- CBC ----------------------------------------------------------------------------------------------------

    def _open_cbc(self, sectors: list[int], data: bytes) -> bytes:
        chain = bytearray(BLOCK_BYTES) + data[:-BLOCK_BYTES]
        vectors = self._vectors(sectors)
        for n in range(len(sectors)):
            chain[n * SECTOR_BYTES : n * SECTOR_BYTES + BLOCK_BYTES] = vectors[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES]
        plain = int.from_bytes(self._decrypt.update(data), "little") ^ int.from_bytes(chain, "little")
        return plain.to_bytes(len(data), "little")

    def _close_cbc(self, sectors: list[int], data: bytes) -> bytes:
        vectors = self._vectors(sectors)
        algorithm, mode, make = self._aes(self._key), self._ciphers.modes.CBC, self._ciphers.Cipher
        return b"".join(
            [
                make(algorithm, mode(vectors[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES]))
                .encryptor()
                .update(data[n * SECTOR_BYTES : (n + 1) * SECTOR_BYTES])
                for n in range(len(sectors))
            ]
        )


def xts_masks(firsts: bytes) -> int:
    """The masks of whole sectors as one little-endian number, from the first block's mask of each.

    A mask is the one before times x in GF(2^128), x^128 = x^7 + x^2 + x + 1 (IEEE 1619-2007, 5.2). Times x^m is a shift
    by m, and what leaves its block comes back as four copies of itself. First come the first blocks of all sectors,
    then the second ones, so that the number is small while there are few; at last they are put in the order of the
    data."""
    count = len(firsts) // BLOCK_BYTES
    masks = int.from_bytes(firsts, "little")
    width = count * _BLOCK_BITS
    for step, (kept, carried) in enumerate(_lanes(count)):
        by = 1 << step
        high = (masks >> (_BLOCK_BITS - by)) & carried
        masks |= (((masks & kept) << by) ^ high ^ (high << 1) ^ (high << 2) ^ (high << 7)) << width
        width *= 2
    if count == 1:
        return masks
    ordered = bytearray(width // 8)
    source, target = memoryview(masks.to_bytes(width // 8, "little")).cast("Q"), memoryview(ordered).cast("Q")
    words = SECTOR_BYTES // 8
    for n in range(count):
        start, end = n * words, (n + 1) * words
        target[start:end:2] = source[2 * n :: 2 * count]
        target[start + 1 : end : 2] = source[2 * n + 1 :: 2 * count]
    return int.from_bytes(ordered, "little")


_LANES: Final[dict[int, list[tuple[int, int]]]] = {}


def _lanes(count: int) -> list[tuple[int, int]]:
    """For each of the five doublings of ``count`` sectors: the bits of a block that stay in it, and the places to which
    those that leave come."""
    found = _LANES.get(count)
    if found is None:
        found = []
        for step in range(5):
            by = 1 << step
            ones = int.from_bytes((b"\x01" + bytes(BLOCK_BYTES - 1)) * (count << step), "little")
            found.append((ones * ((1 << (_BLOCK_BITS - by)) - 1), ones * ((1 << by) - 1)))
        _LANES[count] = found  # at most BATCH_SECTORS of them
    return found
