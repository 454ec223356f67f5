# SPDX-License-Identifier: Apache-2.0
"""cryptsetup reads the headers that we write, and we read those that it writes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import bottomhalf
from bottomhalf.block import BlockError
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


@pytest.mark.parametrize("shape", [
    [],
    ["--cipher", "aes-cbc-essiv:sha256", "--key-size", "256", "--hash", "sha1"],
    ["--cipher", "aes-xts-plain64", "--key-size", "256", "--hash", "sha512"],
], ids=str)  # fmt: skip
def test_we_open_what_cryptsetup_makes(tmp_path: Path, shape: list[str]) -> None:
    """Its header, its second password, and its slots after ours has gone."""
    cryptsetup = require("cryptsetup")
    path, first, second = tmp_path / "a.luks", tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    path.write_bytes(b"")
    os.truncate(path, 8 << 20)
    quick = ["-q", "--iter-time", "10", "--key-file", str(first)]
    subprocess.run([cryptsetup, "luksFormat", "--type", "luks1", *quick, *shape, str(path)], check=True)
    subprocess.run([cryptsetup, "luksAddKey", *quick, str(path), str(second)], check=True)
    for password in (b"one", "two"):
        with bottomhalf.open(path, secret=password) as disk:
            disk.pwrite(b"written", 4096)
            assert disk.pread(7, 4096) == b"written"
    assert b"written" not in path.read_bytes()
    with pytest.raises(BlockError, match="Invalid password"):
        bottomhalf.open(path, secret="three")
    bottomhalf.amend(path, secret="two", state="active", new_secret="three", iter_time=1)
    bottomhalf.amend(path, secret="two", state="inactive", old_secret="one")
    for password, status in ((b"one", 2), (b"two", 0), (b"three", 0)):
        test = [cryptsetup, "open", "--test-passphrase", "--key-file", "-", str(path)]
        assert subprocess.run(test, input=password, capture_output=True).returncode == status
