# SPDX-License-Identifier: Apache-2.0
"""compress, blkverify, copy-on-read, preallocate: what each changes, and that it changes nothing else."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from bottomhalf.aio import IOThread
from bottomhalf.block import BlockError
from bottomhalf.block.errors import check
from bottomhalf.drivers.blkdebug import BlkdebugNode
from bottomhalf.drivers.blkverify import BlkverifyNode, Mismatch
from bottomhalf.drivers.compress import CompressNode
from bottomhalf.drivers.copy_on_read import CopyOnReadNode
from bottomhalf.drivers.preallocate import PreallocateNode
from bottomhalf.drivers.throttle import ThrottleNode
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE
from bottomhalf.host.request import FUA, WRITE, WRITE_ZEROES, Request
from tests.block.bench import READ_WRITE, Bench, flush, read, sim_bench, write, zero
from tests.drivers.helpers import Overlay, Ram, opened, play

SIZE = 40_000  # not whole clusters


def content(seed: int, size: int = SIZE) -> bytes:
    return random.Random(f"content {seed}").randbytes(size)


# -- compress --------------------------------------------------------------------------------------------------------


class Compressing(Ram):
    driver = "compressing"

    @property
    def can_compress(self) -> bool:
        return True

    @property
    def cluster_bytes(self) -> int:
        return 4096


def test_what_is_written_is_to_be_compressed_in_whole_clusters(seed: int) -> None:
    with sim_bench(seed) as it:
        below = Compressing(it.graph, content(seed, 40960))
        user = it.user(CompressNode(it.graph, file=CompressNode(it.graph, file=below)))
        model = bytearray(below.content)
        assert user.do(write(100, b"x" * 5000)) == [0]
        assert below.compressed == 1
        model[100:5100] = b"x" * 5000
        play(user, model, random.Random(seed), 20)
        assert below.content == model


def test_an_image_that_cannot_compress_is_refused() -> None:
    with sim_bench(1, disk=SIZE) as it:
        with pytest.raises(BlockError, match="Compression is not supported for underlying format: file"):
            opened(it, {"driver": "compress", "file": {"driver": "file", "filename": "disk"}})
        assert not it.graph.nodes


# -- blkverify -------------------------------------------------------------------------------------------------------


def test_two_images_that_are_alike(seed: int) -> None:
    with sim_bench(seed, raw=content(seed, 40960), test=content(seed, 40960)) as it:
        options = {
            "driver": "blkverify",
            "raw": {"driver": "file", "filename": "raw"},
            "test": {"driver": "raw", "file": {"driver": "file", "filename": "test"}},
        }
        user = it.user(opened(it, options))
        model = bytearray(content(seed, 40960))
        play(user, model, random.Random(seed), 20)
        assert it.host.content("raw") == it.host.content("test") == model


def test_two_images_that_differ(seed: int) -> None:
    with sim_bench(seed) as it:
        right, tested = Ram(it.graph, content(seed)), Ram(it.graph, content(seed))
        tested.content[1234] ^= 1
        told: list[str] = []
        node = BlkverifyNode(it.graph, raw=right, test=tested, on_mismatch=told.append)
        user = it.user(node)
        assert user.do(read(0, 1234), read(1235, 100)) == [0, 0]
        assert user.do(read(1000, 500)) == [-errno.EIO]
        assert told == ["blkverify: read offset 1000 bytes 500 contents mismatch at offset 1234"]
        tested.fail["write"] = errno.ENOSPC
        assert user.do(write(0, b"x")) == [-errno.EIO]
        assert told[1:] == ["blkverify: write offset 0 bytes 1 return value mismatch -28 != 0"]
        right.fail["write"] = errno.ENOSPC
        assert user.do(write(0, b"x")) == [-errno.ENOSPC], "both failed alike"
        assert len(told) == 2
        node.on_mismatch = None
        user.submit(read(1000, 500))
        with pytest.raises(Mismatch, match="contents mismatch"):
            user.wait()
            it.context.poll(False)
        user.wait()


# -- copy-on-read ----------------------------------------------------------------------------------------------------


def test_what_is_read_is_stored(seed: int) -> None:
    with sim_bench(seed) as it:
        base = Ram(it.graph, content(seed))
        top = Overlay(it.graph, base)
        user = it.user(CopyOnReadNode(it.graph, file=top))
        assert user.do(read(5000, 10), read(39_990, 10)) == [0, 0]
        assert top.stored == {1, 9}
        base.fail["read"] = errno.EIO
        assert user.do(read(4096, 4096), read(36_864, SIZE - 36_864)) == [0, 0], "it is not fetched again"
        assert user.do(read(0, 10)) == [-errno.EIO]
        assert top.stored == {1, 9}


def test_copies_and_writes_do_not_overwrite_each_other(seed: int) -> None:
    with sim_bench(seed) as it:
        base = Ram(it.graph, content(seed))
        top = Overlay(it.graph, base)
        user = it.user(CopyOnReadNode(it.graph, file=top))
        model = bytearray(base.content)
        chance = random.Random(seed)
        for cluster in range(9):
            offset = cluster * 4096 + chance.randrange(3000)
            reads = [read(offset, 1000), read(offset + 10, 5)]
            writes = [write(offset + n * 100, chance.randbytes(50)) for n in range(5)]
            for request in writes:
                model[request.offset : request.offset + 50] = request.buffer
            for request in chance.sample([*reads, *writes], 7):
                user.submit(request)
                if chance.random() < 0.3:
                    it.context.poll(False)
            user.wait()
        everything = read(0, SIZE)
        assert user.do(everything) == [0]
        assert everything.buffer == model
        play(user, model, chance, 20)
        assert base.content == content(seed)


def test_bottom(seed: int) -> None:
    """What lies below ``bottom`` is not copied, what is above or in it is."""
    with sim_bench(seed) as it:
        base = Ram(it.graph, content(seed))
        middle = Overlay(it.graph, base, "middle")
        top = Overlay(it.graph, middle, "top")
        lower = it.user(middle)
        assert lower.do(write(4096, b"middle")) == [0]
        lower.backend.close()
        node = opened(it, {"driver": "copy-on-read", "file": "top", "bottom": "middle"})
        user = it.user(node)
        request = read(0, 12_000)
        assert user.do(request) == [0]
        assert top.stored == {1}
        assert request.buffer[4096:4102] == b"middle" and request.buffer[:4096] == content(seed)[:4096]


def test_with_nothing_below_lists_pass(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "always")
        options: dict[str, Any] = {"driver": "copy-on-read", "file": {"driver": "file", "filename": "disk"}}
        node = opened(it, options)
        user = it.user(node)
        assert user.submit(*(read(n * 512, 512) for n in range(32))) == []
        assert node.children[0].held & 4, "it needs to write unchanged data in any case"
        with pytest.raises(BlockError, match="Bottom node 'nope' not found"):
            opened(it, {**options, "bottom": "nope"})
        filter_node = BlkdebugNode(it.graph, "filter0", image=Ram(it.graph, b""))
        with pytest.raises(BlockError, match="Bottom node 'filter0' is a filter"):
            opened(it, {**options, "bottom": "filter0"})
        it.graph.release(filter_node)


# -- preallocate -----------------------------------------------------------------------------------------------------


def grow(it: Bench, node: Any, op: int, offset: int, data: bytes) -> None:
    """A request past the end, as a format sends it: it does not come from a backend, which would not let it by."""
    from bottomhalf.block.node import co_submit

    async def body() -> None:
        request = Request(op, offset, len(data), memoryview(bytearray(data)) if op == WRITE else None)
        await co_submit(node.submit_batch, request, node)
        check(request.result, "the test")

    it.context.run(body())


@pytest.mark.parametrize("below", ["ram", "file"])
def test_growth_is_allocated_ahead_and_cut_back(seed: int, below: str) -> None:
    with sim_bench(seed, disk=1000) as it:
        file = it.file("disk") if below == "file" else Ram(it.graph, bytes(1000))
        node = PreallocateNode(it.graph, file=file, prealloc_size=8192, prealloc_align=4096)
        user = it.user(node, held=READ_WRITE | PERM_RESIZE)
        grow(it, node, WRITE, 1000, b"a" * 500)
        assert node.size == user.backend.size == 1500
        assert file.open_size() == node.file_end == 12288
        grow(it, node, WRITE, 1500, b"b" * 100)
        grow(it, node, WRITE_ZEROES, 3000, bytes(100))
        assert node.size == 3100 and file.open_size() == 12288, "there is room"
        request = read(1490, 1610)
        assert user.do(request) == [0]
        assert request.buffer == b"a" * 10 + b"b" * 100 + bytes(1500)
        it.context.run(user.backend.co_truncate(5000))
        assert node.size == 5000 and file.open_size() == 12288
        it.context.run(user.backend.co_truncate(2000))
        assert node.size == file.open_size() == 2000
        grow(it, node, WRITE, 2000, b"c" * 20_000)
        assert file.open_size() == 32768 and node.size == 22_000
        node.monitor_owned = True
        user.backend.close()
        for _ in range(100):
            it.context.poll(False)
            if node.in_flight:
                it.context.poll(True)
        assert file.open_size() == 22_000
        assert not node.edge.held & PERM_RESIZE


def test_closing_cuts_back_as_well(seed: int) -> None:
    with sim_bench(seed, disk=1000) as it:
        node = PreallocateNode(it.graph, file=it.file("disk"), prealloc_size=8192)
        user = it.user(node, held=READ_WRITE | PERM_RESIZE)
        grow(it, node, WRITE, 1000, b"a" * 500)
        assert len(it.host.content("disk")) == 1 << 20
        user.backend.close()
        assert it.host.content("disk") == bytes(1000) + b"a" * 500


def test_closing_in_an_iothread(seed: int) -> None:
    with sim_bench(seed, disk=1000) as it:
        node = PreallocateNode(it.graph, file=it.file("disk"), prealloc_size=8192)
        user = it.user(node, held=READ_WRITE | PERM_RESIZE)
        grow(it, node, WRITE, 1000, b"a" * 500)
        thread = IOThread("t", it.host)
        it.graph.move(node, thread.context)
        user.backend.close()
        assert it.host.content("disk") == bytes(1000) + b"a" * 500
        thread.stop()


def test_without_preallocation_it_still_grows(seed: int) -> None:
    with sim_bench(seed) as it:
        file = Ram(it.graph, bytes(1000))
        file.fail["write-zeroes"] = errno.ENOTSUP
        node = PreallocateNode(it.graph, file=file)
        it.user(node, held=READ_WRITE | PERM_RESIZE)
        grow(it, node, WRITE, 1000, b"a" * 500)
        grow(it, node, WRITE, 1500, b"b" * 500)
        assert bytes(file.content[1000:]) == b"a" * 500 + b"b" * 500 and node.size == 2000


def test_many_grow_at_once(seed: int) -> None:
    chance = random.Random(seed)
    with sim_bench(seed) as it:
        file = Ram(it.graph, b"")
        node = PreallocateNode(it.graph, file=file, prealloc_size=chance.choice([0, 3000]), prealloc_align=512)
        it.user(node, held=READ_WRITE | PERM_RESIZE)
        model = bytearray(30_000)

        async def one(number: int) -> None:
            data = bytes([number + 1]) * 1000
            model[number * 1000 : number * 1000 + 1000] = data
            await node.co_pwrite(number * 1000, memoryview(data))

        coroutines = [it.context.enter(one(number)) for number in chance.sample(range(30), 30)]
        while not all(each.done for each in coroutines):
            it.context.poll(True)
        assert node.size == 30_000
        assert bytes(file.content[:30_000]) == model


@pytest.mark.parametrize("align", [1000, 513, 1])
def test_an_alignment_that_cannot_be(align: int) -> None:
    with sim_bench(1, disk=SIZE) as it:
        file = {"driver": "file", "filename": "disk"}
        with pytest.raises(BlockError, match="prealloc-align parameter of preallocate filter is not aligned to 512"):
            opened(it, {"driver": "preallocate", "prealloc-align": align, "file": file})
        it.graph.release(opened(it, {"driver": "preallocate", "prealloc-align": 0, "file": file}))
        assert not it.graph.nodes


# -- all of them -----------------------------------------------------------------------------------------------------


def test_durable_writes_of_a_driver_that_knows_only_flush(seed: int) -> None:
    """FUA is emulated by a flush for coroutine drivers that do not say that they handle it."""

    class Plain(Ram):
        driver = "plain"
        handles_fua = False

        async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
            assert not flags & FUA
            await super().co_pwrite(offset, buffer, flags)

    with sim_bench(seed) as it:
        disk = Plain(it.graph, bytes(SIZE))
        user = it.user(CopyOnReadNode(it.graph, file=disk))
        assert user.do(write(0, b"x", FUA), write(1, b"y")) == [0, 0]
        assert disk.flushes == 1
        assert user.do(zero(0, 10, FUA)) == [0]
        assert disk.flushes == 2
        disk.fail["flush"] = errno.EIO
        assert user.do(write(0, b"x", FUA)) == [-errno.EIO]


def test_a_random_stack_of_filters(seed: int) -> None:
    from bottomhalf.block.limits import RequestLimits
    from bottomhalf.block.throttling import ThrottleGroup

    chance = random.Random(seed)
    with sim_bench(seed, disk=content(seed, 40960)) as it:
        node: Any = it.file("disk", unmap=True)
        for _ in range(chance.randrange(1, 6)):
            match chance.randrange(6):
                case 0:
                    limits = RequestLimits(max_transfer=chance.choice([512, 4096]), zeroes_alignment=1024)
                    node = BlkdebugNode(it.graph, image=node, align=512, limits=limits, unmap=True)
                case 1:
                    node = CopyOnReadNode(it.graph, file=node, unmap=chance.random() < 0.5)
                case 2:
                    node = PreallocateNode(it.graph, file=node, prealloc_align=4096)
                case 3:
                    node = ThrottleNode(it.graph, file=node, group=ThrottleGroup("g"))
                case 4:
                    node = CopyOnReadNode(it.graph, file=Overlay(it.graph, node))
                case _:
                    twin = Ram(it.graph, content(seed, 40960))
                    node = BlkverifyNode(it.graph, raw=node, test=twin, unmap=True)
        user = it.user(node, held=PERM_ALL if chance.random() < 0.5 else READ_WRITE)
        model = bytearray(content(seed, 40960))
        play(user, model, chance, 25)
        assert user.do(flush()) == [0]
        reader = it.user(node, held=PERM_CONSISTENT_READ)
        last = read(0, 40960)
        assert reader.do(last) == [0] and last.buffer == model
