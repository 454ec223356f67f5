# SPDX-License-Identifier: Apache-2.0
"""Locks on a file follow the permissions of those who use it: seen by another opener, byte by byte."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.block import BlockBackend, BlockError, permissions
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import (
    PERM_ALL,
    PERM_CONSISTENT_READ,
    PERM_RESIZE,
    PERM_WRITE,
    PERM_WRITE_UNCHANGED,
)
from bottomhalf.host.sim import SimHost
from tests.block.bench import Bench, bench

READ_WRITE = PERM_CONSISTENT_READ | PERM_WRITE
HELD, NOT_SHARED = 100, 200  # the first bytes of the two groups
F_OFD_GETLK = 36
FLOCK = struct.Struct("hhqqi4x")


def locked_on_linux(path: str) -> set[int]:
    """The bytes that somebody else has locked."""
    fd = os.open(path, os.O_RDWR)
    try:
        found = set()
        for byte in (*range(HELD, HELD + 4), *range(NOT_SHARED, NOT_SHARED + 4)):
            asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            if FLOCK.unpack(fcntl.fcntl(fd, F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK:
                found.add(byte)
        return found
    finally:
        os.close(fd)


@pytest.fixture(params=["sim", "linux"])
def setup(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, str, Callable[[], set[int]]]:
    if request.param == "linux":
        path = tmp_path / "disk"
        path.write_bytes(bytes(4096))
        return LinuxHost(), str(path), lambda: locked_on_linux(str(path))
    host = SimHost(0)
    host.add_file("disk", 4096)

    def locked() -> set[int]:
        found: set[int] = set()
        for opener in host.disk.files["disk"].locks.openers:
            for bit in range(4):
                found |= {HELD + bit} if opener.held & 1 << bit else set()
                found |= {NOT_SHARED + bit} if not opener.shared & 1 << bit else set()
        return found

    return host, "disk", locked


def opener(it: Bench, path: str, held: int, shared: int) -> BlockBackend:
    """A node of its own: a lock of its own."""
    return it.backend(it.file(path, locking="on"), held=held, shared=shared)


def test_basic(setup: Any) -> None:
    """/image-locking/basic"""
    host, path, locked = setup
    with bench(host) as it:
        first = opener(it, path, READ_WRITE, PERM_ALL)
        assert locked() == {100, 101}
        second = opener(it, path, READ_WRITE | PERM_RESIZE, PERM_ALL)
        assert locked() == {100, 101, 103}
        node = it.file(path, locking="on")
        node.monitor_owned = True
        with pytest.raises(BlockError, match="Failed to get shared"):
            it.backend(node, held=READ_WRITE, shared=PERM_WRITE_UNCHANGED)
        second.close()
        assert locked() == {100, 101}
        first.close()
        assert locked() == set()
        it.backend(node, held=READ_WRITE, shared=PERM_WRITE_UNCHANGED)
        node.monitor_owned = False


def test_a_change_that_is_refused_changes_nothing(setup: Any) -> None:
    """/image-locking/set-perm-abort"""
    host, path, locked = setup
    with bench(host) as it:
        opener(it, path, READ_WRITE, PERM_ALL)
        second = opener(it, path, READ_WRITE, PERM_ALL)
        assert locked() == {100, 101}
        edge = second.root
        assert edge is not None
        edge.held, edge.shared = PERM_RESIZE, PERM_WRITE_UNCHANGED
        with pytest.raises(BlockError, match="Failed to get shared"):
            permissions.refresh(edge.node)
        assert locked() == {100, 101}
        edge.held, edge.shared = READ_WRITE, PERM_ALL
        permissions.refresh(edge.node)
        assert locked() == {100, 101}
