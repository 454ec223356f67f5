# SPDX-License-Identifier: Apache-2.0
"""Encryption of many sectors, each with a vector of its own, by the OpenSSL that the machine has.

Facts: a sector of 512 bytes takes AES a seventh of a microsecond, and a context of OpenSSL can be given another vector
for about a third of one. The package ``cryptography`` makes a new context for each vector of XTS, which takes nearly
three. Python itself is linked to the same library on most machines, and ``ctypes`` reaches it: the two calls per sector
together take less than a microsecond. Decision: who encrypts disks asks here first, and has another way where there is
no such library, or the mode is none of OpenSSL's.

    make = load()                                     # None: there is none
    context = make("aes-256-xts", key, encrypt=True)  # None: it does not want this key
    context.run(vectors, view)                        # in place; sixteen bytes of vector for each sector

It computes, and reaches nothing of the world; it is on this floor because ``ctypes`` may do anything. The calls keep
the interpreter's lock, because to give it up and take it again takes longer than a sector.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Final

NAMES: Final = ("libcrypto.so.3", "libcrypto.so.1.1")  # with one of them the functions below are what they are
SECTOR_BYTES: Final = 512
VECTOR_BYTES: Final = 16
MODES: Final = ("aes-128-xts", "aes-256-xts", "aes-128-cbc", "aes-192-cbc", "aes-256-cbc")

# IEEE 1619-2007, annex B, vector 4: the first block.
_KEYS: Final = bytes.fromhex("2718281828459045235360287471352631415926535897932384626433832795")
_CIPHERTEXT: Final = bytes.fromhex("27a7479befa1d476489f308cd4cfa6e2")

_Pointer = ctypes.c_void_p
_Number = ctypes.c_int


class Library:
    """The functions that are used."""

    def __init__(self, library: Any) -> None:
        self.new = library.EVP_CIPHER_CTX_new
        self.new.restype, self.new.argtypes = _Pointer, []
        self.free = library.EVP_CIPHER_CTX_free
        self.free.restype, self.free.argtypes = None, [_Pointer]
        self.start = library.EVP_CipherInit_ex
        self.start.restype = _Number
        self.start.argtypes = [_Pointer, _Pointer, _Pointer, ctypes.c_char_p, ctypes.c_char_p, _Number]
        self.crypt = library.EVP_Cipher
        self.crypt.restype, self.crypt.argtypes = _Number, [_Pointer, _Pointer, _Pointer, ctypes.c_uint]
        self.modes: dict[str, Any] = {}
        for mode in MODES:
            find = getattr(library, "EVP_" + mode.replace("-", "_"))
            find.restype, find.argtypes = _Pointer, []
            self.modes[mode] = find()


class Sectors:
    """A key in one direction. Not for several threads at once."""

    __slots__ = ("_context", "_library")

    def __init__(self, library: Library, mode: str, key: bytes, encrypt: bool) -> None:
        """ValueError if OpenSSL does not want it (keys of two equal halves, for one)."""
        self._library = library
        self._context = library.new()
        if not self._context or library.start(
            self._context, library.modes[mode], None, key, bytes(VECTOR_BYTES), int(encrypt)
        ) != 1:  # fmt: skip
            raise ValueError(f"OpenSSL refuses the key for {mode}")

    def __del__(self) -> None:
        if self._context:
            self._library.free(self._context)
            self._context = None

    def run(self, vectors: bytes, view: memoryview) -> None:
        """Encrypt or decrypt whole sectors in place. ``view`` is contiguous and can be written. RuntimeError if the
        library fails, which with arguments of this shape it does not."""
        count = len(view) // SECTOR_BYTES
        assert len(view) == count * SECTOR_BYTES and len(vectors) == count * VECTOR_BYTES
        if not count:
            return
        start, crypt, context = self._library.start, self._library.crypt, self._context
        lent = ctypes.c_char.from_buffer(view)
        place = ctypes.addressof(lent)
        for at in range(0, count * VECTOR_BYTES, VECTOR_BYTES):
            if (
                start(context, None, None, None, vectors[at : at + VECTOR_BYTES], -1) != 1
                or crypt(context, place, place, SECTOR_BYTES) <= 0
            ):
                raise RuntimeError("OpenSSL has failed to encrypt a sector")
            place += SECTOR_BYTES


Maker = Callable[[str, bytes, bool], "Sectors | None"]


@cache
def load() -> Maker | None:
    """What makes such contexts, if there is a library that knows the standard's answer."""
    for name in NAMES:
        try:
            library = Library(ctypes.PyDLL(name))
            tried = Sectors(library, "aes-128-xts", _KEYS, True)
        except (OSError, AttributeError, ValueError):
            continue
        buffer = bytearray(bytes(range(256)) * 2)
        tried.run(bytes(VECTOR_BYTES), memoryview(buffer))
        if buffer[: len(_CIPHERTEXT)] == _CIPHERTEXT:
            return lambda mode, key, encrypt: _make(library, mode, key, encrypt)
    return None


def _make(library: Library, mode: str, key: bytes, encrypt: bool) -> Sectors | None:
    try:
        return Sectors(library, mode, key, encrypt) if mode in MODES else None
    except ValueError:
        return None
