# SPDX-License-Identifier: Apache-2.0
"""Growing with and without space that is there already."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.block import BlockError
from bottomhalf.block.resize import Preallocation, co_resize
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import PERM_RESIZE
from bottomhalf.host.sim import SimHost
from tests.block.bench import READ_WRITE, bench, read, sim_bench
from tests.drivers.helpers import Ram

OLD, NEW = 4096, 1 << 20


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
@pytest.mark.parametrize("kind", ["sim", "linux"])
def test_grown_and_shrunk(kind: str, mode: str, tmp_path: Path) -> None:
    host: Any = LinuxHost()
    path = str(tmp_path / "disk")
    Path(path).write_bytes(b"x" * OLD)
    if kind == "sim":
        host, path = SimHost(0), "disk"
        host.add_file(path, b"x" * OLD)
    with bench(host) as it:
        node = RawNode(it.graph, file=it.file(path))
        user = it.user(node, held=READ_WRITE | PERM_RESIZE)
        it.context.run(co_resize(node, NEW, Preallocation(mode)))
        assert node.size == user.backend.size == NEW
        request = read(0, NEW)
        assert user.do(request) == [0]
        assert request.buffer == b"x" * OLD + bytes(NEW - OLD)
        allocated = node.allocated_size()
        assert allocated is not None and (allocated >= NEW) == (mode != "off")
        it.context.run(co_resize(node, OLD))
        assert node.size == OLD


def test_what_cannot_be_asked(seed: int) -> None:
    with sim_bench(seed, disk=OLD) as it:
        node = it.file("disk")
        for size, mode, text in (
            (-1, "off", "Image size cannot be negative"),
            (NEW, "metadata", "Unsupported preallocation mode 'metadata'"),
            (1, "full", "Preallocation can't be used for shrinking files"),
        ):
            with pytest.raises(BlockError, match=text):
                it.context.run(co_resize(node, size, Preallocation(mode)))
        assert node.size == OLD


@pytest.mark.parametrize(("mode", "what"), [("falloc", "write-zeroes"), ("full", "write")])
def test_no_space(seed: int, mode: str, what: str) -> None:
    """The disk has its old size afterwards."""
    with sim_bench(seed) as it:
        ram = Ram(it.graph, b"x" * OLD)
        ram.fail[what] = errno.ENOSPC
        it.user(ram)
        with pytest.raises(OSError) as caught:
            it.context.run(co_resize(ram, NEW, Preallocation(mode)))
        assert caught.value.errno == errno.ENOSPC
        assert ram.size == OLD and ram.content == b"x" * OLD
