# SPDX-License-Identifier: Apache-2.0
"""The named points of the driver's work: who waits there, what fails there, and that nobody is told where nobody
listens."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bottomhalf.drivers.blkdebug import BlkdebugNode
from bottomhalf.drivers.file import FileNode
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, check, make

CLUSTER = 4096
PLACE = 3 << 20  # has another L2 table, which is new


def image(seed: int, **options: Any) -> SimHost:
    host = SimHost(seed)
    make(host, "disk.qcow2", size=1 << 22, cluster_size=CLUSTER, **options)
    disk = Disk(host, "disk.qcow2")
    disk.run(disk.backend.co_pwrite(0, b"1" * 4 * CLUSTER))
    disk.close()
    return host


def debugged(host: SimHost, *rules: dict[str, Any]) -> tuple[Disk, BlkdebugNode]:
    below = {"driver": "file", "filename": "disk.qcow2", "discard": "unmap"}
    disk = Disk(host, "disk.qcow2", file={"driver": "blkdebug", "image": below, "inject-error": list(rules)})
    file = disk.node.file
    assert isinstance(file, BlkdebugNode)
    return disk, file


@pytest.mark.parametrize("event", ["l2_load", "read_aio"])
def test_a_read_waits(seed: int, event: str) -> None:
    """It is suspended at the point, nothing else is, and goes on when it is told to."""
    disk, file = debugged(image(seed))
    file.breakpoint(event, "A")
    got: list[bytes] = []

    async def read() -> None:
        got.append(bytes(await disk.backend.co_pread(0, 512)))

    disk.context.enter(read())
    while not file.is_suspended("A"):
        disk.context.poll(True)
    assert not got
    file.resume("A")
    while not got:
        disk.context.poll(True)
    assert got == [b"1" * 512]
    assert disk.content()[: 4 * CLUSTER] == b"1" * 4 * CLUSTER
    disk.close()


@pytest.mark.parametrize("event", ["refblock_update_part", "l2_alloc_write", "l1_update", "l2_update", "flush_to_disk"])
def test_a_flush_fails_and_the_next_does_not(seed: int, event: str) -> None:
    """Whatever of a commit fails is done by the next one, and the image is whole."""
    host = image(seed)
    disk, _ = debugged(host, {"event": event, "errno": errno.ENOSPC, "once": True})
    disk.run(disk.backend.co_pwrite(PLACE, b"2" * 5 * CLUSTER))
    disk.run(disk.backend.co_write_zeroes(0, CLUSTER))
    failed = 0
    for _ in range(2):
        try:
            disk.run(disk.backend.co_flush())
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failed += 1
    assert failed == 1
    assert disk.content()[PLACE : PLACE + 5 * CLUSTER] == b"2" * 5 * CLUSTER
    disk.close()
    found = check(host, "disk.qcow2")
    assert not found.status, found


def test_nobody_is_told_where_nobody_listens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read or a write whose table is in memory tells of nothing, if there is no blkdebug in the graph."""
    disk = Disk(image(seed), "disk.qcow2")
    disk.run(disk.backend.co_pread(0, 512))
    disk.run(disk.backend.co_pwrite(0, b"2" * 512))
    told: list[str] = []
    monkeypatch.setattr(FileNode, "debug_event", lambda self, event: told.append(event))
    assert not disk.graph.debugged
    disk.run(disk.backend.co_pwrite(0, b"3" * 512))
    assert bytes(disk.run(disk.backend.co_pread(0, 512))) == b"3" * 512
    assert not told
    disk.close()
