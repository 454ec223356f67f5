# SPDX-License-Identifier: Apache-2.0
"""Opening an image runs as a coroutine, and plain code waits for it by name: a protocol that never answers is a hang
that can be explained, and the program goes on when the answer comes."""

from __future__ import annotations

import pytest

from bottomhalf.aio import explain
from bottomhalf.host.request import READ
from bottomhalf.host.sim import Deadlock, SimHost
from bottomhalf.host.sim.faults import Fault
from tests.drivers.qcow2.bench import Disk, disk, make

SECOND_NS = 1_000_000_000

def held_host(seed: int) -> tuple[SimHost, Fault]:
    """A host where reads of the image do not end until the fault is released."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=1 << 20)
    return host, host.fault(path="disk.qcow2", op=READ, hold=True)


def test_a_protocol_that_never_answers_is_explained(seed: int) -> None:
    host, _ = held_host(seed)
    with pytest.raises(Deadlock) as failure:
        Disk(host, "disk.qcow2")
    said = str(failure.value)
    assert (
        "main waits for the opening of disk in node '#block001' (disk.qcow2) (0.0 s): coroutine co_read_header waits "
        "for a read of 512 bytes at 0 of node '#block001' (disk.qcow2)"
    ) in said


def test_a_slow_protocol_is_explained_meanwhile(seed: int) -> None:
    """Whoever asks while the image opens, from another part of the loop, is told; then it opens."""
    host, fault = held_host(seed)
    told: list[str] = []

    def ask() -> None:
        told.append(explain())
        fault.remove()
        fault.release()

    host.at(5 * SECOND_NS, ask)
    with disk(host, "disk.qcow2") as opened:
        assert opened.size == 1 << 20
    assert [line for line in told if "(5.0 s): coroutine co_read_header waits for a read of" in line]
