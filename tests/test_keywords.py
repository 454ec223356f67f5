# SPDX-License-Identifier: Apache-2.0
"""Options of new images as keyword arguments: what there is comes from the schema, and the rest is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from bottomhalf.block import BlockError


def test_a_raw_image_with_options(tmp_path: Path) -> None:
    path = tmp_path / "full.raw"
    bottomhalf.create(path, size=1 << 20, preallocation="falloc", nocow=True, extent_size_hint=1 << 16)
    assert path.stat().st_size == 1 << 20
    with pytest.raises(BlockError, match="Unsupported preallocation mode: metadata"):
        bottomhalf.create(path, size=1 << 20, preallocation="metadata")
    with pytest.raises(BlockError, match="does not accept value 'nope'"):
        bottomhalf.create(path, size=1 << 20, preallocation="nope")
    with pytest.raises(ValueError, match="have no option 'cluster_size', but"):
        bottomhalf.create(path, size=1 << 20, cluster_size=4096)


@pytest.mark.parametrize(
    ("format", "given", "text"),
    [
        ("raw", {"cluster_size": 512}, "raw images have no option 'cluster_size', but extent_size_hint, nocow, "),
        ("qcow2", {"encrypt": {"format": "luks"}}, "no option 'encrypt', but .*, encrypt_format, "),
        ("qcow2", {"clustersize": 512}, "qcow2 images have no option 'clustersize', but backing_file, .*, compat, "),
        ("qcow2", {"encrypt_format": "luks", "encrypt_secret": "pw", "encrypt_iters": 1},
         "encryption has no option 'encrypt_iters', but encrypt_cipher_alg, "),
        ("luks", {"secret": "pw", "iters": 1}, "encryption has no option 'iters', but cipher_alg, "),
    ],
)
def test_an_option_that_there_is_not_is_told_with_those_that_there_are(
    tmp_path: Path, format: str, given: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        bottomhalf.create(tmp_path / "a", format=format, size=1 << 20, **given)
    assert not (tmp_path / "a").exists()
