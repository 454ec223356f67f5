# SPDX-License-Identifier: Apache-2.0
"""Random operations of all kinds on images of all kinds, on the simulated host, beside plain bytes; see ``machine``."""

from __future__ import annotations

from typing import Any

import pytest

from bottomhalf.block.resize import Preallocation, co_resize
from bottomhalf.host.request import COMPRESSED, FUA, MAY_UNMAP
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, check, make
from tests.drivers.qcow2.machine import Machine, settings

pytestmark = pytest.mark.hang_seconds(3600)  # a soak


class Driver(Machine):
    """The driver by itself, and a check after each time that it is closed."""

    disk: Disk | None = None

    def make(self, size: int, base: bytes) -> None:
        self.host = SimHost(0)
        if base:
            self.host.add_file("base.raw", base)
        make(self.host, "disk.qcow2", size=size, **self.shape)
        self._open()

    def _open(self) -> None:
        more: dict[str, Any] = {}
        if "data_file" in self.shape:
            more["data-file"] = {"driver": "file", "filename": "data.raw", "discard": "unmap"}
        if "backing_file" in self.shape:
            more["backing"] = {"driver": "raw", "file": {"driver": "file", "filename": "base.raw"}}
        self.disk = Disk(self.host, "disk.qcow2", **more)

    def _close(self) -> None:
        if self.disk is not None:
            self.disk.close()
            self.disk = None
            found = check(self.host, "disk.qcow2")
            assert not found.corruptions and not found.leaks, found.findings

    def carry_out(self, what: str, *arguments: Any) -> bool:
        if what == "reopen":
            self._close()
            self._open()
            return True
        assert self.disk is not None
        try:
            self.disk.run(getattr(self, f"_co_{what}")(*arguments))
        except OSError as error:
            if self.shape.get("refcount_bits", 16) > 2 or "cannot be counted" not in str(error):
                raise
            return False
        return True

    async def _co_write(self, offset: int, length: int, byte: int, fua: bool) -> None:
        await self.disk.backend.co_pwrite(offset, bytes([byte]) * length, FUA if fua else 0)

    async def _co_squeeze(self, offset: int, length: int, byte: int) -> None:
        await self.disk.backend.co_pwrite(offset, bytes([byte]) * length, COMPRESSED)

    async def _co_zero(self, offset: int, length: int, unmap: bool) -> None:
        await self.disk.backend.co_write_zeroes(offset, length, MAY_UNMAP if unmap else 0)

    async def _co_discard(self, offset: int, length: int) -> None:
        await self.disk.backend.co_discard(offset, length)

    async def _co_flush(self) -> None:
        await self.disk.backend.co_flush()

    async def _co_snapshot(self, name: str) -> None:
        await self.disk.node.snapshots.create(name, date_ns=0)

    async def _co_apply(self, name: str) -> None:
        snapshots = self.disk.node.snapshots
        await snapshots.apply(next(each for each in await snapshots.read() if each.name == name))

    async def _co_forget(self, name: str) -> None:
        snapshots = self.disk.node.snapshots
        await snapshots.delete(next(each for each in await snapshots.read() if each.name == name))

    async def _co_resize(self, size: int) -> None:
        await co_resize(self.disk.node, size, Preallocation("off"))

    def look(self) -> bytes:
        assert self.disk is not None
        return self.disk.content()

    def teardown(self) -> None:
        """The snapshots have what they had."""
        try:
            for name, content in self.snapshots.items():
                if self.disk is not None and self.carry_out("apply", name):
                    assert self.look() == content, name
        finally:
            self._close()


TestDriver = Driver.TestCase
TestDriver.settings = settings(60, 30)
