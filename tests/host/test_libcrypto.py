# SPDX-License-Identifier: Apache-2.0
"""The machine's OpenSSL: what it refuses, what it is asked for in vain, and machines that have none."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from bottomhalf.host import libcrypto


@pytest.fixture
def fresh() -> Iterator[None]:
    libcrypto.load.cache_clear()
    yield
    libcrypto.load.cache_clear()


def there(name: str) -> bool:
    try:
        ctypes.PyDLL(name)
    except OSError:
        return False
    return True


def test_it_is_found_where_it_is(fresh: None) -> None:
    assert (libcrypto.load() is not None) == any(map(there, libcrypto.NAMES))


def test_a_machine_without_it(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcrypto, "NAMES", ("libcrypto.so.nowhere", "libc.so.6"))
    assert libcrypto.load() is None


def test_a_library_that_does_not_know_the_answer(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcrypto, "_CIPHERTEXT", bytes(16))
    assert libcrypto.load() is None


def test_modes_and_keys() -> None:
    make = libcrypto.load()
    if make is None:
        pytest.skip("no libcrypto here")
    assert make("aes-192-xts", bytes(range(48)), True) is None  # OpenSSL has no such mode
    for mode in libcrypto.MODES:
        bits = int(mode.split("-")[1]) * (2 if mode.endswith("xts") else 1)
        key = bytes(range(bits // 8))
        closing, opening = make(mode, key, True), make(mode, key, False)
        assert closing is not None and opening is not None
        buffer = bytearray(b"sector" * 256)
        vectors = bytes(range(48))
        closing.run(vectors, memoryview(buffer))
        assert b"sector" not in buffer and len({bytes(buffer[n : n + 512]) for n in (0, 512, 1024)}) == 3
        opening.run(vectors[16:32], memoryview(buffer)[512:1024])
        assert buffer[512:1024] == (b"sector" * 256)[512:1024]
        closing.run(b"", memoryview(bytearray()))
    with pytest.raises(AssertionError):
        closing.run(bytes(16), memoryview(bytearray(1024)))
    with pytest.raises(TypeError):
        closing.run(bytes(16), memoryview(bytes(512)))  # cannot be written
