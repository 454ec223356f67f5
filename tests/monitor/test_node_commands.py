# SPDX-License-Identifier: Apache-2.0
"""block_resize while the graph changes: the commands themselves, without a monitor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from bottomhalf.aio import sleep_ns
from bottomhalf.block import BlockError
from bottomhalf.host.request import WRITE
from bottomhalf.monitor.node_commands import block_resize
from bottomhalf.qapi.block import BlockResize
from tests.block.bench import read, sim_bench, write
from tests.drivers.helpers import Ram

MIB = 1 << 20


def test_a_node_that_became_a_backing_file_meanwhile_is_not_cut(seed: int) -> None:
    """The command waits for a request; who is told of its end puts an overlay above the node."""
    with sim_bench(seed, base=4 * MIB) as it:
        it.host.set_cached("base", "never")
        base, top = it.file("base", "base"), Ram(it.graph, bytes(4 * MIB), "top")
        base.monitor_owned = top.monitor_owned = True
        user = it.user(base)
        assert user.do(write(3 * MIB, b"x" * 4096)) == [0]
        fault = it.host.fault(path="base", op=WRITE, hold=True)
        user.submit(write(0, b"y" * 4096))
        storage: Any = SimpleNamespace(graph=it.graph, loop=SimpleNamespace(main=it.context))
        told: list[str] = []

        async def resize() -> None:
            try:
                await block_resize(storage, BlockResize(node_name="base", size=MIB))
            except BlockError as error:
                told.append(str(error))

        def snapshot() -> None:
            it.context.timer(fault.remove, name="the write ends").arm_ns(it.context.now_ns() + 10_000_000)
            it.graph.replace_node(base, top)

        it.context.enter(resize())
        it.context.schedule_oneshot(lambda: it.context.schedule_oneshot(snapshot))
        it.context.run(sleep_ns(100_000_000))
        assert told == ["Node 'base' has changed meanwhile"]
        assert base.size == top.size == 4 * MIB
        user.wait()
        below = it.user(base)
        request = read(3 * MIB, 4096)
        assert below.do(request) == [0] and request.buffer == b"x" * 4096


def test_a_node_that_became_read_only_meanwhile_is_not_resized(seed: int) -> None:
    with sim_bench(seed) as it:
        node = Ram(it.graph, bytes(MIB), "disk")
        user = it.user(node, held=1)
        node.delay_ns = 10_000_000
        user.submit(read(0, 512))
        storage: Any = SimpleNamespace(graph=it.graph, loop=SimpleNamespace(main=it.context))
        told: list[str] = []

        async def resize() -> None:
            try:
                await block_resize(storage, BlockResize(node_name="disk", size=2 * MIB))
            except BlockError as error:
                told.append(str(error))

        def reopen() -> None:
            node.read_only = True

        it.context.enter(resize())
        it.context.schedule_oneshot(reopen)
        it.context.run(sleep_ns(100_000_000))
        assert told == ["Image is read-only"] and node.size == MIB
