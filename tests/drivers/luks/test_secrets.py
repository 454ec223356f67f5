# SPDX-License-Identifier: Apache-2.0
"""A daemon that serves encrypted disks tells nobody a password or a key."""

from __future__ import annotations

from pathlib import Path

import pytest

import bottomhalf
from bottomhalf.monitor.storage import Storage
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.objects import ObjectOptions
from bottomhalf.qapi.visit import from_json, to_json

pytest.importorskip("cryptography")
PASSWORD = "a-password-that-nobody-may-see"


def test_queries_and_errors_are_silent(tmp_path: Path) -> None:
    from bottomhalf.drivers.registry import describe_node

    bottomhalf.create(tmp_path / "a", format="luks", size=1 << 20, secret=PASSWORD, iter_time=1)
    encryption = {"encrypt_format": "luks", "encrypt_secret": PASSWORD, "encrypt_iter_time": 1}
    bottomhalf.create(tmp_path / "b", format="qcow2", size=1 << 20, **encryption)
    storage = Storage()
    try:
        storage.add_object(from_json(ObjectOptions, {"qom-type": "secret", "id": "pw", "data": PASSWORD}))
        storage.add_object(from_json(ObjectOptions, {"qom-type": "secret", "id": "bad", "data": PASSWORD + "!"}))
        shown = []
        for name, options in (
            ("a", {"driver": "luks", "key-secret": "pw"}),
            ("b", {"driver": "qcow2", "encrypt": {"format": "luks", "key-secret": "pw"}}),
        ):
            file = {"driver": "file", "filename": str(tmp_path / name)}
            node = storage.add_node(from_json(BlockdevOptions, {**options, "node-name": name, "file": file}))
            shown += [repr(node), repr(node.options), str(to_json(describe_node(node))), repr(vars(node))]
        with pytest.raises(bottomhalf.block.BlockError) as caught:
            bad = {"driver": "luks", "key-secret": "bad", "file": {"driver": "file", "filename": str(tmp_path / "a")}}
            storage.add_node(from_json(BlockdevOptions, {**bad, "node-name": "c"}))
        shown += [str(caught.value), repr(caught.value)]
        assert all(shown)
        assert not any(PASSWORD in text for text in shown)
    finally:
        storage.close()
