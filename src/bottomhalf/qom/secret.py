# SPDX-License-Identifier: Apache-2.0
"""Secrets: passwords and keys that other objects refer to by name, so that no option holds them.

    tree.create("secret", "pw", {"file": "/run/keys/pw"})
    lookup(tree, "pw")  # the bytes

They are never printed. QEMU lets ``qom-get`` read the property ``data``; here it can only be written, nothing that
makes text of an object shows it, and errors do not quote it. ``file`` is better than ``data``, which stands in the
list of processes.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, ClassVar, Final

from bottomhalf.qom.object import Property, QomObject, UserCreatable
from bottomhalf.qom.tree import Tree
from bottomhalf.qom.values import QomError, one_of, string

SECRET_BYTES_MAX: Final = 1 << 20  # of a file that holds one; keys are tens of bytes
KEY_BYTES: Final = 32  # of the AES-256 key that another secret holds
IV_BYTES: Final = 16
_format: Final = one_of("raw", "base64")


def decode_base64(text: str) -> bytes:
    """QomError, without the text."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise QomError("Base64 data contains invalid characters") from None


class SecretCommon(QomObject, name="secret_common", abstract=True):
    """What all kinds of secrets have."""

    properties: ClassVar[dict[str, Property]] = {
        "format": Property.of("QCryptoSecretFormat", "format", _format),
        "keyid": Property.of("string", "keyid", string),
        "iv": Property.of("string", "iv", string),
    }

    def __init__(self) -> None:
        super().__init__()
        self.format = "raw"
        self.keyid = ""
        self.iv = ""
        self._secret: bytes | None = None

    def reveal(self) -> bytes:
        """The secret itself. QomError while it is not complete."""
        if self._secret is None:
            raise QomError(f"Secret '{self.name}' is not loaded")
        return self._secret


class Secret(SecretCommon, UserCreatable, name="secret"):
    """A secret that is given as text or in a file."""

    properties: ClassVar[dict[str, Property]] = {
        "data": Property("string", None, lambda self, value: setattr(self, "_data", string(value, "data"))),
        "file": Property.of("string", "file", string),
    }

    def __init__(self) -> None:
        super().__init__()
        self._data: str | None = None
        self.file = ""

    def complete(self, tree: Tree) -> None:
        self._secret = self._load(tree)

    def _load(self, tree: Tree) -> bytes:
        if self.file and self._data is not None:
            raise QomError("'file' and 'data' are mutually exclusive")
        if self.file:
            data = self._read(tree)
        elif self._data is not None:
            data = self._data.encode()
        else:
            raise QomError("Either 'file' or 'data' must be provided")
        if self.keyid:
            # What is encrypted is not text: on its way here it is in base64, if it says so.
            return self._decrypt(tree, decode_base64(data.decode("latin-1")) if self.format == "base64" else data)
        return decode_base64(data.decode("latin-1")) if self.format == "base64" else data

    def _read(self, tree: Tree) -> bytes:
        try:
            file = tree.host.open_file(self.file, read_only=True, locking="off")
        except OSError as error:
            reason = f"Failed to open file \u201c{self.file}\u201d: {error.strerror}"
            raise QomError(f"Unable to read {self.file}: {reason}") from None
        try:
            if file.size() > SECRET_BYTES_MAX:
                raise QomError(f"Unable to read {self.file}: it is larger than {SECRET_BYTES_MAX} bytes")
            return file.pread(SECRET_BYTES_MAX, 0)
        except OSError as error:
            raise QomError(f"Unable to read {self.file}: {error.strerror}") from None
        finally:
            file.close()

    def _decrypt(self, tree: Tree, data: bytes) -> bytes:
        """AES-256-CBC with the padding of PKCS#7, under a key that another secret holds."""
        key = lookup(tree, self.keyid)
        if len(key) != KEY_BYTES:
            raise QomError(f"Key should be {KEY_BYTES} bytes in length")
        if not self.iv:
            raise QomError("IV is required to decrypt secret")
        iv = decode_base64(self.iv)
        if len(iv) != IV_BYTES:
            raise QomError(f"IV should be {IV_BYTES} bytes in length not {len(iv)}")
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            raise QomError(
                "Secrets with 'keyid' need the package cryptography: pip install 'bottomhalf[crypto]'"
            ) from None
        if not data or len(data) % IV_BYTES:
            raise QomError(f"Length of the encrypted secret should be a multiple of {IV_BYTES}, not {len(data)}")
        plain = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor().update(data)
        padding = plain[-1]
        if not 0 < padding <= IV_BYTES or plain[-padding:] != bytes([padding]) * padding:
            raise QomError("Incorrect number of padding bytes found on decrypted data")
        return plain[:-padding]


def lookup(tree: Tree, name: str) -> bytes:
    """The secret that the user calls ``name``. QomError."""
    found: Any = tree.user_object(name, QomObject)
    if found is None:
        raise QomError(f"No secret with id '{name}'")
    if not isinstance(found, SecretCommon):
        raise QomError(f"Object with id '{name}' is not a secret")
    return found.reveal()
