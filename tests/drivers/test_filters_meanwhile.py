# SPDX-License-Identifier: Apache-2.0
"""compress, preallocate and filters in general: what others do while one of their requests is on its way."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bottomhalf.aio import sleep_ns
from bottomhalf.block.edge import ROLE_COW
from bottomhalf.block.filter import Filter
from bottomhalf.block.node import co_io
from bottomhalf.block.resize import Preallocation
from bottomhalf.block.watching import detect_zeroes
from bottomhalf.drivers.compress import CompressNode
from bottomhalf.drivers.copy_on_read import CopyOnReadNode
from bottomhalf.drivers.preallocate import PreallocateNode
from bottomhalf.drivers.registry import reopen_nodes
from bottomhalf.host.protocol import PERM_ALL, PERM_RESIZE
from bottomhalf.host.request import READ, WRITE, WRITE_ZEROES
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.block.bench import READ_WRITE, Bench, bench, discard, read, sim_bench, write, zero
from tests.drivers.helpers import Overlay, Ram, opened
from tests.drivers.qcow2.bench import make

CLUSTER = 65536
MIB = 1 << 20
SIZE = 40_000
A_WHILE_NS = 30_000_000


# -- compress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zero write", "discard", "detected zeroes"])
def test_what_zeroes_a_part_of_a_cluster_waits_for_the_write_to_another(seed: int, how: str) -> None:
    """That write has read the cluster, and would write back what was there."""
    host = SimHost(seed)
    make(host, "top", size=4 * CLUSTER)
    with bench(host) as it:
        file = {"driver": "file", "filename": "top", "discard": "unmap"}
        image = {"driver": "qcow2", "discard": "unmap", "file": file}
        node = opened(it, {"driver": "compress", "discard": "unmap", "file": image})
        if how == "detected zeroes":
            detect_zeroes(node)
        user = it.user(node)
        assert user.do(write(0, b"a" * CLUSTER)) == [0]
        host.set_cached("top", "never")
        fault = host.fault(path="top", op=READ, times=1, hold=True)
        zeroes = {
            "zero write": zero(4096, CLUSTER - 4096),
            "discard": discard(0, CLUSTER),
            "detected zeroes": write(4096, bytes(CLUSTER - 4096)),
        }[how]

        async def main() -> None:
            user.submit(write(0, b"b" * 4096))
            await sleep_ns(A_WHILE_NS)
            user.submit(zeroes)
            await sleep_ns(A_WHILE_NS)
            fault.remove()

        it.context.run(main())
        user.wait()
        request = read(4096, CLUSTER - 4096)
        assert user.do(request) == [0] and not any(request.buffer)


def test_the_clusters_of_another_image(seed: int) -> None:
    host = SimHost(seed)
    make(host, "a", size=4 * CLUSTER)
    make(host, "b", size=4 * CLUSTER, cluster_size=2 * CLUSTER)
    with bench(host) as it:
        first, second = (opened(it, {"driver": "qcow2", "file": {"driver": "file", "filename": name}}) for name in "ab")
        node = CompressNode(it.graph, file=first)
        user = it.user(node)
        it.graph.replace_child(node.edge, second)
        assert node.request_alignment == 2 * CLUSTER
        assert user.do(write(CLUSTER, b"a" * CLUSTER), write(0, b"b" * 4096)) == [0, 0]
        request = read(0, 2 * CLUSTER)
        assert user.do(request) == [0]
        assert request.buffer == b"b" * 4096 + bytes(CLUSTER - 4096) + b"a" * CLUSTER


# -- copy-on-read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_a_copy_does_not_overwrite_what_others_write_to_the_image(seed: int, late: bool) -> None:
    """They use the image below the filter, as QEMU allows. ``late``: it gets its backing image later."""
    host = SimHost(seed)
    host.add_file("base", b"a" * (4 * CLUSTER))
    make(host, "top", size=4 * CLUSTER)
    with bench(host) as it:
        base = it.file("base", "base")
        image: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": "top"}, "backing": None}
        if not late:
            image["backing"] = "base"
        top = opened(it, image)
        kind = type(top)
        node = CopyOnReadNode(it.graph, file=top)
        if late:
            it.graph.attach_child(top, base, "backing", ROLE_COW)
        second = CopyOnReadNode(it.graph, file=top)
        user, above, beside = it.user(node), it.user(second), it.user(top)
        host.set_cached("base", "never")
        fault = host.fault(path="base", op=READ, times=1, hold=True)
        reads = [read(2 * CLUSTER, 4096), read(2 * CLUSTER, 4096)]
        writes = [write(2 * CLUSTER, b"b" * 4096), write(2 * CLUSTER + 4096, b"c" * 4096)]

        async def main() -> None:
            user.submit(reads[0])
            await sleep_ns(A_WHILE_NS)
            beside.submit(writes[0])
            above.submit(writes[1])
            above.submit(reads[1])
            await sleep_ns(A_WHILE_NS)
            fault.remove()

        it.context.run(main())
        for each in (user, above, beside):
            each.wait()
        assert [request.result for request in reads + writes] == [0] * 4
        request = read(2 * CLUSTER, 12288)
        assert beside.do(request) == [0]
        assert request.buffer == b"b" * 4096 + b"c" * 4096 + b"a" * 4096
        assert type(top) is not kind
        user.backend.close()
        above.backend.close()
        assert type(top) is kind, "it has a gate no more"


def test_a_write_on_its_way_when_the_filter_comes(seed: int) -> None:
    """It passes no gate any more; so the filter waits for it."""
    host = SimHost(seed)
    host.add_file("base", b"a" * (4 * CLUSTER))
    make(host, "top", size=4 * CLUSTER)
    with bench(host) as it:
        it.file("base", "base")
        image = {"driver": "qcow2", "file": {"driver": "file", "filename": "top"}, "backing": "base"}
        top = opened(it, image)
        beside = it.user(top)
        host.set_cached("base", "never")
        fault = host.fault(path="base", op=READ, times=1, hold=True)
        beside.submit(write(0, b"b" * 4096))
        it.context.timer(fault.remove, name="it goes on").arm_ns(it.context.now_ns() + A_WHILE_NS)
        user = it.user(CopyOnReadNode(it.graph, file=top))
        user.do(read(0, 4096))
        beside.wait()
        request = read(0, 8192)
        assert beside.do(request) == [0] and request.buffer == b"b" * 4096 + b"a" * 4096


def test_the_gate_follows_a_reopened_filter(seed: int) -> None:
    with sim_bench(seed) as it:
        base = Ram(it.graph, b"a" * SIZE)
        first, second = (Overlay(it.graph, base, name) for name in ("first", "second"))
        first.monitor_owned = second.monitor_owned = True
        options = {"driver": "copy-on-read", "node-name": "filter", "file": "first"}
        node = opened(it, options)
        user = it.user(node)
        assert user.do(read(0, 1)) == [0] and first.stored == {0}
        reopen_nodes(it.graph, [from_json(BlockdevOptions, options | {"file": "second"})])
        assert type(first) is Overlay
        assert user.do(read(4096, 1)) == [0] and (first.stored, second.stored) == ({0}, {1})


# -- preallocate -----------------------------------------------------------------------------------------------------


async def co_grow(node: Any, offset: int, data: bytes) -> None:
    """A write past the end, as a format sends it."""
    await co_io(node, WRITE, offset, len(data), memoryview(bytearray(data)))


def test_a_preallocation_does_not_cover_a_write_whose_own_has_failed(seed: int) -> None:
    with sim_bench(seed, disk=MIB) as it:
        node = PreallocateNode(it.graph, file=it.file("disk", unmap=True), prealloc_size=MIB)
        it.user(node, held=READ_WRITE | PERM_RESIZE)
        it.host.set_cached("disk", "never")
        it.host.fault(path="disk", op=WRITE_ZEROES, errno=errno.ENOSPC, times=1)
        held_write = it.host.fault(path="disk", op=WRITE, start=MIB, end=MIB + 4096, hold=True)

        async def main() -> None:
            it.context.enter(co_grow(node, MIB, b"a" * 4096))
            await sleep_ns(A_WHILE_NS)
            held_zeroes = it.host.fault(path="disk", op=WRITE_ZEROES, hold=True)
            it.context.enter(co_grow(node, MIB + 8192, b"b" * 4096))
            await sleep_ns(A_WHILE_NS)
            held_write.remove()
            await sleep_ns(A_WHILE_NS)
            held_zeroes.remove()
            await sleep_ns(A_WHILE_NS)

        it.context.run(main())
        assert it.host.content("disk")[MIB : MIB + 12288] == b"a" * 4096 + bytes(4096) + b"b" * 4096


def test_a_write_past_the_end_that_fails_leaves_the_file_to_be_truncated(seed: int) -> None:
    with sim_bench(seed, disk=MIB) as it:
        node = PreallocateNode(it.graph, file=it.file("disk"), prealloc_size=MIB)
        user = it.user(node, held=READ_WRITE | PERM_RESIZE)
        it.host.set_cached("disk", "never")
        it.host.fault(path="disk", op=WRITE_ZEROES, errno=errno.ENOSPC, times=1)
        it.host.fault(path="disk", op=WRITE, errno=errno.ENOSPC, times=1)
        with pytest.raises(OSError):
            it.context.run(co_grow(node, MIB, b"a" * 8192))
        it.context.run(user.backend.co_truncate(MIB + 4096))
        assert node.size == len(it.host.content("disk")) == MIB + 4096


def test_the_file_is_cut_back_before_others_may_write_it(seed: int) -> None:
    with sim_bench(seed, disk=MIB) as it:
        node = PreallocateNode(it.graph, file=it.file("disk"), prealloc_size=MIB)
        it.backend(node, held=PERM_ALL, allow_inactive=True)
        it.context.run(co_grow(node, MIB, b"a" * 4096))
        it.graph.inactivate(node)
        assert len(it.host.content("disk")) == MIB + 4096
        other = it.backend(it.file("disk"), held=PERM_ALL)
        it.context.run(other.co_truncate(3 * MIB))
        it.context.run(sleep_ns(A_WHILE_NS))
        assert len(it.host.content("disk")) == 3 * MIB, "its end is the other's affair"
        other.close()
        it.graph.activate(node)
        assert node.size == 3 * MIB


def test_another_file_keeps_its_own_end(seed: int) -> None:
    with sim_bench(seed, small=MIB, large=4 * MIB) as it:
        small, large = it.file("small"), it.file("large")
        node = PreallocateNode(it.graph, file=small, prealloc_size=MIB)
        user = it.user(node, held=READ_WRITE | PERM_RESIZE)
        it.context.run(co_grow(node, MIB, b"a" * 4096))
        it.graph.replace_child(node.edge, large)
        assert node.size == user.backend.size == 4 * MIB
        user.backend.close()
        assert len(it.host.content("large")) == 4 * MIB


def test_a_filter_below_does_not_change_the_end(seed: int) -> None:
    with sim_bench(seed, disk=MIB) as it:
        file = it.file("disk")
        node = PreallocateNode(it.graph, file=file, prealloc_size=MIB)
        user = it.user(node, held=READ_WRITE | PERM_RESIZE)
        it.context.run(co_grow(node, MIB, b"a" * 4096))
        it.graph.insert_node(Plain(it.graph, file=file))
        assert node.size == user.backend.size == MIB + 4096
        assert node.below.is_filter
        user.backend.close()
        assert len(it.host.content("disk")) == MIB + 4096


# -- all of them -----------------------------------------------------------------------------------------------------


class Plain(Filter):
    driver = "plain"


@pytest.mark.parametrize("mode", [Preallocation.FULL, Preallocation.FALLOC])
def test_growing_a_filter_does_not_zero_what_was_written_meanwhile(seed: int, mode: Preallocation) -> None:
    with sim_bench(seed, disk=MIB) as it:
        node = Plain(it.graph, file=it.file("disk"))
        user = it.user(node, held=READ_WRITE | PERM_RESIZE)
        op = WRITE if mode == Preallocation.FULL else WRITE_ZEROES
        fault = it.host.fault(path="disk", op=op, start=MIB, end=2 * MIB, hold=True)
        request = write(5 * MIB, b"a" * 4096)
        it.context.run(_co_growing_and_written(it, user, mode, request, fault))
        user.wait()
        if request.result == 0:  # else he was told that there is no such place yet
            again = read(5 * MIB, 4096)
            assert user.do(again) == [0] and again.buffer == b"a" * 4096
        assert node.size == user.backend.size == 8 * MIB


async def _co_growing_and_written(it: Bench, user: Any, mode: Preallocation, request: Any, fault: Any) -> None:
    growing = it.context.enter(user.backend.co_truncate(8 * MIB, mode))
    await sleep_ns(A_WHILE_NS)
    user.submit(request)
    await sleep_ns(A_WHILE_NS)
    fault.remove()
    await growing
