# SPDX-License-Identifier: Apache-2.0
"""Formats by their first bytes, also as qemu-img writes them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bottomhalf.block import BlockError
from bottomhalf.host.sim import SimHost
from bottomhalf.tools.formats import PROBE_BYTES, image_format, probe


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"", "raw"),
        (bytes(512), "raw"),
        (b"QFI", "raw"),
        (b"QFI\xfb\0\0\0\x03", "qcow2"),
        (b"QFI\xfb\0\0\0\x02", "qcow2"),
        (b"QFI\xfb\0\0\0\x01", "qcow"),
        (b"QED\0", "qed"),
        (b"KDMV", "vmdk"),
        (b"# Disk DescriptorFile\n", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"LUKS\xba\xbe\0\x01", "luks"),
        (b"WithoutFreeSpace", "parallels"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
    ],
)
def test_probe(head: bytes, name: str) -> None:
    assert probe(head) == name


@pytest.mark.peer
@pytest.mark.parametrize("name", ["raw", "qcow2", "qcow", "qed", "vmdk", "vhdx", "vpc", "parallels", "vdi"])
def test_images_of_qemu_img(require: Callable[[str], str], tmp_path: Path, name: str) -> None:
    image = tmp_path / "image"
    command = [require("qemu-img"), "create", "-q", "-f", name, image, "1M"]
    if subprocess.run(command, capture_output=True, timeout=30).returncode:
        pytest.skip(f"qemu-img cannot create {name} here")
    with image.open("rb") as file:
        assert probe(file.read(PROBE_BYTES)) == name


def test_image_format() -> None:
    host = SimHost()
    host.add_file("/short", b"QED\0")
    host.add_file("/secret", 512, readable=False)
    assert image_format(host, "/short") == "qed"
    with pytest.raises(BlockError, match="Could not open '/nope': No such file or directory"):
        image_format(host, "/nope")
    with pytest.raises(BlockError, match="Could not open '/secret': Permission denied"):
        image_format(host, "/secret")
