# SPDX-License-Identifier: Apache-2.0
"""After a power cut everything that was flushed is there, and the tables are whole: at most clusters are leaked.

The simulated disk keeps any of the writes since the last flush, in any order, whole or in part."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, Model, carry_out, check, disk, make, random_steps

GEOMETRIES = [
    {"cluster_size": 512, "size": 64 * 512},
    {"cluster_size": 512, "size": 64 * 512, "refcount_bits": 1},
    {"cluster_size": 512, "size": 300 * 512, "refcount_bits": 64},
    {"cluster_size": 4096, "size": 20 * 4096, "version": 2},
    {"cluster_size": 16384, "size": 6 * 16384, "extended_l2": True},
]
OTHER_FORMS: list[tuple[dict[str, Any], dict[str, Any], int]] = [  # geometry, options of the node, compressed writes
    ({"cluster_size": 512, "size": 64 * 512}, {}, 10),
    ({"cluster_size": 512, "size": 64 * 512, "refcount_bits": 1}, {}, 10),
    ({"cluster_size": 4096, "size": 20 * 4096, "refcount_bits": 4, "compression_type": "zstd"}, {}, 10),
    ({"cluster_size": 16384, "size": 6 * 16384, "extended_l2": True}, {"pass-discard-other": True}, 10),
    ({"cluster_size": 512, "size": 64 * 512, "data_file": "data.raw"}, {}, 0),
    ({"cluster_size": 512, "size": 64 * 512, "data_file": "data.raw", "data_file_raw": True}, {}, 0),
    ({"cluster_size": 16384, "size": 6 * 16384, "extended_l2": True, "data_file": "data.raw"}, {}, 0),
    ({"cluster_size": 512, "size": 64 * 512}, {"discard-no-unref": True, "l2-cache-size": 1024}, 5),
    ({"cluster_size": 512, "size": 64 * 512, "preallocation": "metadata"}, {}, 0),
]


def survive(host: SimHost, path: str, model: Model, chance: int, **options: Any) -> None:
    """One of the disks that a power cut may leave."""
    after = SimHost(chance)
    for each in (path, "data.raw"):
        if each in host.disk.files:
            after.add_file(each, host.survivor(each))
    found = check(after, path)
    assert not found.corruptions and not found.check_errors, found.findings
    with disk(after, path, **options) as reopened:
        assert model.allows(reopened.content())
        reopened.run(reopened.backend.co_pwrite(0, b"it can still be written"))
    found = check(after, path)
    assert not found.corruptions, found.findings


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_random_sequences(seed: int, geometry: dict[str, int]) -> None:
    play(seed, geometry, {}, 0)


def test_other_forms(seed: int) -> None:
    """One form per seed."""
    play(seed, *OTHER_FORMS[seed % len(OTHER_FORMS)])


def play(seed: int, geometry: dict[str, Any], options: dict[str, Any], squeeze: int) -> None:
    sim = SimHost(seed)
    make(sim, "disk.qcow2", **geometry)
    opened = Disk(sim, "disk.qcow2", **options)
    model = Model(opened.size)
    chance = random.Random(seed)
    for step in random_steps(seed, opened.size, 25, geometry["cluster_size"], squeeze=squeeze):
        opened.run(carry_out(opened, model, step))
        if chance.random() < 0.4:
            survive(sim, "disk.qcow2", model, seed, **options)
    assert opened.content() == model.now
    opened.close()
    found = check(sim, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings
    model.flush()
    survive(sim, "disk.qcow2", model, seed, **options)
