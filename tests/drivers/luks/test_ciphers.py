# SPDX-License-Identifier: Apache-2.0
"""Ciphers and keys beside OpenSSL's own modes and the vectors of the standards."""

from __future__ import annotations

import hashlib
import random

import pytest

from bottomhalf.block import ImageError
from bottomhalf.drivers.luks import keys
from bottomhalf.drivers.luks.ciphers import BATCH_SECTORS, SectorCipher, key_sizes

ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")


def openssl(key: bytes, mode: object, data: bytes) -> bytes:
    return ciphers.Cipher(ciphers.algorithms.AES(key), mode).encryptor().update(data)


@pytest.mark.parametrize("key_bytes", [32, 64])
@pytest.mark.parametrize("sectors", [1, 8, BATCH_SECTORS, BATCH_SECTORS + 3])
def test_xts_is_that_of_openssl(key_bytes: int, sectors: int) -> None:
    source = random.Random(key_bytes + sectors)
    key, data = source.randbytes(key_bytes), source.randbytes(512 * sectors)
    first = (1 << 32) - 2
    expected = b"".join(
        openssl(key, ciphers.modes.XTS((first + n).to_bytes(16, "little")), data[512 * n : 512 * n + 512])
        for n in range(sectors)
    )
    buffer = bytearray(data)
    cipher = SectorCipher(key, "aes", "xts-plain64")
    cipher.encrypt([(first, memoryview(buffer))])
    assert buffer == expected
    cipher.decrypt([(first + n, memoryview(buffer)[512 * n : 512 * n + 512]) for n in range(sectors)])
    assert buffer == data


def test_xts_vector_of_the_standard() -> None:
    """IEEE 1619-2007, annex B, vector 4: the first and the last block."""
    key = bytes.fromhex("27182818284590452353602874713526") + bytes.fromhex("31415926535897932384626433832795")
    buffer = bytearray(bytes(range(256)) * 2)
    SectorCipher(key, "aes", "xts-plain64").encrypt([(0, memoryview(buffer))])
    assert buffer[:16].hex() == "27a7479befa1d476489f308cd4cfa6e2"


@pytest.mark.parametrize("key_bytes", [16, 24, 32])
@pytest.mark.parametrize("generator", ["plain", "plain64", "essiv:sha256"])
def test_cbc_is_that_of_openssl(key_bytes: int, generator: str) -> None:
    source = random.Random(key_bytes)
    key, data, first = source.randbytes(key_bytes), source.randbytes(1536), (1 << 32) - 1
    expected = b""
    for n in range(3):
        sector = (first + n) & 0xFFFFFFFF if generator == "plain" else first + n
        vector = sector.to_bytes(16, "little")
        if generator.startswith("essiv"):
            vector = openssl(hashlib.sha256(key).digest(), ciphers.modes.ECB(), vector)
        expected += openssl(key, ciphers.modes.CBC(vector), data[512 * n : 512 * n + 512])
    buffer = bytearray(data)
    cipher = SectorCipher(key, "aes", f"cbc-{generator}")
    cipher.encrypt([(first, memoryview(buffer))])
    assert buffer == expected
    cipher.decrypt([(first, memoryview(buffer))])
    assert buffer == data


@pytest.mark.parametrize("hash", ["sha1", "sha256", "sha512"])
def test_all_stripes_are_needed(hash: str) -> None:
    source = random.Random(1)
    key = source.randbytes(40)
    material = keys.split(key, 50, hash, source.randbytes)
    assert keys.merge(material, 40, 50, hash) == key
    for at in range(0, len(material), 97):
        damaged = bytearray(material)
        damaged[at] ^= 1
        assert keys.merge(bytes(damaged), 40, 50, hash) != key


def test_iterations_follow_the_clock() -> None:
    now = iter(range(0, 1 << 40, 40_000_000))
    assert keys.measure("sha256", 32, 2000, lambda: next(now)) == keys.ITERATIONS_MIN * 50


@pytest.mark.parametrize(
    ("cipher", "mode"),
    [
        ("serpent", "xts-plain64"),
        ("twofish", "cbc-plain"),
        ("aes", "ecb"),
        ("aes", "xts-plain99"),
        ("aes", "cbc-essiv"),
        ("aes", "cbc-essiv:md5"),
        ("aes", "xts-plain64:sha256"),
    ],
)
def test_what_is_not_there_is_said(cipher: str, mode: str) -> None:
    with pytest.raises(ImageError, match="not supported"):
        key_sizes(cipher, mode)


def test_keys_are_not_shown() -> None:
    assert repr(SectorCipher(b"K" * 32, "aes", "xts-plain64")) == "<SectorCipher>"
