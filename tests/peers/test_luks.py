# SPDX-License-Identifier: Apache-2.0
"""cryptsetup reads the headers that we write."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import bottomhalf
from tests.peers.programs import require

pytest.importorskip("cryptography")
PASSWORD = b"correct horse"


@pytest.mark.parametrize("cipher", ["aes-128", "aes-256"])
@pytest.mark.parametrize("hash", ["sha1", "sha256", "sha512"])
def test_cryptsetup_opens_our_slots(tmp_path: Path, cipher: str, hash: str) -> None:
    """--test-passphrase does all that opening does but for the device that a kernel would make."""
    cryptsetup = require("cryptsetup")
    path = str(tmp_path / "a.luks")
    bottomhalf.create(path, format="luks", size=1 << 20, secret=PASSWORD, iter_time=1, cipher_alg=cipher, hash_alg=hash)

    def run(*arguments: str, password: bytes = b"") -> int:
        return subprocess.run(
            [cryptsetup, *arguments], input=password, capture_output=True, timeout=60
        ).returncode

    assert run("isLuks", "--type", "luks1", path) == 0
    assert run("luksDump", path) == 0
    test = ("open", "--test-passphrase", "--key-file", "-", path)
    assert run(*test, password=PASSWORD) == 0
    assert run(*test, password=b"wrong") == 2
