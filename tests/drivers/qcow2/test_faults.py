# SPDX-License-Identifier: Apache-2.0
"""Every I/O of a sequence of operations fails in turn, once or for ever: what was flushed stays, the tables are whole
(clusters may be leaked), and whoever asked hears of it. (Each of all operations by itself: test_every_io.)"""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from bottomhalf.host.request import FLUSH, OP_NAMES, READ, WRITE
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, Model, carry_out, check, disk, make, random_steps, squeezable

POSITIONS_MAX = 500  # more I/O than the steps below take of one kind
STEPS = 12
SEQUENCES = 1

GEOMETRIES: list[dict[str, Any]] = [
    {"cluster_size": 512, "size": 60 * 512},
    {"cluster_size": 512, "size": 300 * 512, "refcount_bits": 64},
    {"cluster_size": 16384, "size": 5 * 16384, "extended_l2": True},
    {"cluster_size": 512, "size": 60 * 512, "refcount_bits": 4, "squeeze": 10},
    {"cluster_size": 512, "size": 60 * 512, "data_file": "data.raw"},
    {"cluster_size": 512, "size": 60 * 512, "data_file": "data.raw", "data_file_raw": True},
]


async def try_step(opened: Disk, model: Model, step: tuple[str, int, int, int], errors: list[int]) -> bool:
    """Whether the step succeeded. What a failed one was about may be old or new."""
    what, offset, length, byte = step
    try:
        await carry_out(opened, model, step, sure=not errors)
        return True
    except OSError as error:
        errors.append(error.errno or 0)
        if what == "squeeze":
            model.put(offset, squeezable(offset, length, byte))
        elif what in ("write", "zero", "discard"):
            model.put(offset, bytes([byte]) * length if what == "write" else bytes(length))
        return False


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("op", [READ, WRITE, FLUSH], ids=lambda op: OP_NAMES[op])
@pytest.mark.parametrize("number, times", [
    (errno.EIO, 1),
    (errno.ENOSPC, None),
    pytest.param(errno.EIO, None, marks=pytest.mark.soak),
    pytest.param(errno.ENOSPC, 1, marks=pytest.mark.soak),
])
def test_every_position(op: int, number: int, times: int | None, geometry: dict[str, Any]) -> None:
    positions = 0
    geometry = dict(geometry)
    squeeze = geometry.pop("squeeze", 0)
    first = 2 if squeeze else 0  # a sequence that has some of everything
    for seed in range(first, first + SEQUENCES):
        for position in range(POSITIONS_MAX):
            host = SimHost(seed)
            make(host, "disk.qcow2", **geometry)
            opened = Disk(host, "disk.qcow2")
            fault = host.fault(op=op, errno=number, after=position, times=times)
            model = Model(opened.size)
            errors: list[int] = []
            for step in random_steps(seed, opened.size, STEPS, geometry["cluster_size"], squeeze=squeeze):
                before = model.flushed, model.since
                if opened.run(try_step(opened, model, step, errors)) and errors and step[0] == "flush":
                    model.flushed, model.since = before  # it cannot bring back what a failed flush may have lost
            assert set(errors) <= {number} and bool(errors) <= bool(fault.hits)
            hits = fault.hits
            fault.remove()
            _see(host, opened, model)
            if not hits:
                break
            positions += 1
        else:
            raise AssertionError("there is no end of I/O")
    assert positions


def _see(host: SimHost, opened: Disk, model: Model) -> None:
    """The disk as it is now, after a power cut, and closed in order."""
    after = SimHost(host.seed)
    for path in host.disk.files:
        after.add_file(path, host.survivor(path))
    found = check(after, "disk.qcow2")
    assert not found.corruptions and not found.check_errors, found.findings
    with disk(after, "disk.qcow2") as reopened:
        assert model.allows(reopened.content())
    assert model.allows(opened.content())
    opened.close()
    found = check(host, "disk.qcow2")
    assert not found.corruptions, found.findings


def test_a_full_disk(seed: int) -> None:
    """Clusters that there is no space for: the writer hears ENOSPC, what is there stays, and goes on when there is."""
    host, chance = SimHost(seed), random.Random(seed)
    make(host, "disk.qcow2", size=200 * 512, cluster_size=512)
    with disk(host, "disk.qcow2") as opened:
        model = Model(opened.size)
        opened.run(carry_out(opened, model, ("write", 0, 512 * 20, 1)))
        opened.run(carry_out(opened, model, ("flush", 0, 0, 0)))
        host.disk_free_bytes = chance.randrange(0, 20) * 512
        errors: list[int] = []
        for step in random_steps(seed, opened.size, 30, 512):
            before = model.flushed, model.since
            if opened.run(try_step(opened, model, step, errors)) and errors and step[0] == "flush":
                model.flushed, model.since = before
        assert set(errors) <= {errno.ENOSPC}
        host.disk_free_bytes = None
        opened.run(opened.backend.co_flush())
        assert model.allows(opened.content())
    found = check(host, "disk.qcow2")
    assert not found.corruptions, found.findings
