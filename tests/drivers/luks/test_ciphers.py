# SPDX-License-Identifier: Apache-2.0
"""Ciphers and keys beside OpenSSL's own modes and the vectors of the standards."""

from __future__ import annotations

import hashlib
import random

import pytest

from bottomhalf.block import ImageError
from bottomhalf.drivers.luks import keys
from bottomhalf.drivers.luks.ciphers import BATCH_SECTORS, SectorCipher, check_key
from bottomhalf.drivers.luks.header import Header
from bottomhalf.host import libcrypto

ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")


def openssl(key: bytes, mode: object, data: bytes) -> bytes:
    return ciphers.Cipher(ciphers.algorithms.AES(key), mode).encryptor().update(data)


@pytest.fixture(params=[True, False], ids=["the machine's library", "the package alone"])
def direct(request: pytest.FixtureRequest) -> bool:
    """Both ways to encrypt."""
    if request.param and libcrypto.load() is None:
        pytest.skip("no libcrypto here")
    return bool(request.param)


@pytest.mark.parametrize("key_bytes", [32, 64])
@pytest.mark.parametrize("sectors", [1, 8, BATCH_SECTORS, BATCH_SECTORS + 3])
def test_xts_is_that_of_openssl(key_bytes: int, sectors: int, direct: bool) -> None:
    source = random.Random(key_bytes + sectors)
    key, data = source.randbytes(key_bytes), source.randbytes(512 * sectors)
    first = (1 << 32) - 2
    expected = b"".join(
        openssl(key, ciphers.modes.XTS((first + n).to_bytes(16, "little")), data[512 * n : 512 * n + 512])
        for n in range(sectors)
    )
    buffer = bytearray(data)
    cipher = SectorCipher(key, "aes", "xts-plain64", direct=direct)
    cipher.encrypt([(first, memoryview(buffer))])
    assert buffer == expected
    cipher.decrypt([(first + n, memoryview(buffer)[512 * n : 512 * n + 512]) for n in range(sectors)])
    assert buffer == data


EULER = "2718281828459045235360287471352631415926535897932384626433832795"
LONG_EULER = (
    "2718281828459045235360287471352662497757247093699959574966967627"
    "3141592653589793238462643383279502884197169399375105820974944592"
)
COUNTING = (bytes(range(256)) * 2).hex()


@pytest.mark.parametrize("key, sector, plain, encrypted", [
    ("00" * 32, 0, "00" * 32, "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e"),
    ("11" * 16 + "22" * 16, 0x3333333333, "44" * 32,
     "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"),
    ("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0" + "22" * 16, 0x3333333333, "44" * 32,
     "af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89"),
    (EULER, 0, COUNTING, "27a7479befa1d476489f308cd4cfa6e2"),
    (EULER, 1, "27a7479befa1d476489f308cd4cfa6e2", "264d3ca8512194fec312c8c9891f279f"),
    (EULER, 2, "264d3ca8512194fec312c8c9891f279f", "fa762a3680b76007928ed4a4f49a9456"),
    (LONG_EULER, 0xFF, COUNTING, "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"),
], ids=["1", "2", "3", "4", "5", "6", "10"])  # fmt: skip
def test_xts_vectors_of_the_standard(key: str, sector: int, plain: str, encrypted: str, direct: bool) -> None:
    """IEEE 1619-2007, annex B, by number: the beginning of each. Blocks do not depend on each other."""
    buffer = bytearray(bytes.fromhex(plain).ljust(512, b"\0"))
    cipher = SectorCipher(bytes.fromhex(key), "aes", "xts-plain64", direct=direct)
    cipher.encrypt([(sector, memoryview(buffer))])
    assert buffer.hex().startswith(encrypted)
    cipher.decrypt([(sector, memoryview(buffer))])
    assert buffer.hex().startswith(plain)


@pytest.mark.parametrize("hash, password, salt, iterations, derived", [
    ("sha1", b"password", b"salt", 1, "0c60c80f961f0e71f3a9b524af6012062fe037a6"),
    ("sha1", b"password", b"salt", 2, "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957"),
    ("sha1", b"password", b"salt", 4096, "4b007901b765489abead49d926f721d065a429c1"),
    ("sha256", b"passwd", b"salt", 1, "55ac046e56e3089fec1691c22544b605f9418521"),
    ("sha256", b"Password", b"NaCl", 80000, "4ddcd8f60b98be21830cee5ef22701f9641a4418"),
])  # fmt: skip
def test_key_derivation_vectors(hash: str, password: bytes, salt: bytes, iterations: int, derived: str) -> None:
    """RFC 6070, and RFC 7914 section 11, as far as a digest of LUKS goes."""
    header = Header("aes", "xts-plain64", hash, 0, 64, digest_salt=salt, digest_iterations=iterations)
    assert keys.digest_of(header, password).hex() == derived


@pytest.mark.parametrize("key_bytes", [16, 24, 32])
@pytest.mark.parametrize("generator", ["plain", "plain64", "essiv:sha256"])
def test_cbc_is_that_of_openssl(key_bytes: int, generator: str, direct: bool) -> None:
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
    cipher = SectorCipher(key, "aes", f"cbc-{generator}", direct=direct)
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
        ("aes", "ecb-plain"),
        ("aes", "xts-plain99"),
        ("aes", "cbc-essiv"),
        ("aes", "cbc-essiv:md5"),
        ("aes", "xts-plain64:sha256"),
    ],
)
def test_what_is_not_there_is_said(cipher: str, mode: str) -> None:
    with pytest.raises(ImageError, match="not supported"):
        check_key(cipher, mode, 32)


def test_keys_are_not_shown() -> None:
    assert repr(SectorCipher(b"K" * 32, "aes", "xts-plain64")) == "<SectorCipher>"
