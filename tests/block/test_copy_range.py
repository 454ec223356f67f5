# SPDX-License-Identifier: Apache-2.0
"""Copying in the kernel: what reaches it, what is refused on the way, and that drains and gates hold."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from bottomhalf.block import Node
from bottomhalf.block.copying import co_copy
from bottomhalf.block.watching import set_write_threshold, write_threshold
from bottomhalf.drivers.host_device import HostDeviceNode
from bottomhalf.drivers.null import NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import PERM_CONSISTENT_READ
from bottomhalf.host.request import COPY_RANGE, FUA, WRITE
from bottomhalf.host.sim import SimHost
from tests.block.bench import Bench, bench, flush, read, sim_bench, write
from tests.block.parts import threads
from tests.drivers.helpers import opened
from tests.loop_devices import loop_device

SIZE = 1 << 18
CONTENT = bytes(range(256)) * (SIZE // 256)


def outcome(it: Bench, source: Node, at: int, target: Node, to: int, length: int, flags: int = 0) -> int:
    """0, or the errno with which co_copy_range ends. The nodes stay."""
    for node in (source, target):
        node.monitor_owned = True
    near, far = it.backend(source, held=PERM_CONSISTENT_READ), it.backend(target)
    try:
        it.context.run(near.co_copy_range(at, far, to, length, flags))
    except OSError as error:
        return error.errno or 0
    finally:
        near.close()
        far.close()
    return 0


def test_from_file_to_file_through_windows(seed: int) -> None:
    chance = random.Random(seed)
    with sim_bench(seed, here=CONTENT, there=SIZE) as it:
        source, target = it.file("here", read_only=True), it.file("there")
        near = chance.choice((source, RawNode(it.graph, file=source, offset=4096), RawNode(it.graph, file=source)))
        far = chance.choice((target, RawNode(it.graph, file=target, offset=8192, size=65536)))
        shift, far_shift = getattr(near, "offset", 0), getattr(far, "offset", 0)
        expected = bytearray(SIZE)
        for _ in range(10):
            at, to, length = chance.randrange(60_000), chance.randrange(60_000), chance.randrange(5_000)
            flags = chance.choice((0, FUA))
            assert outcome(it, near, at, far, to, length, flags) == 0
            expected[far_shift + to : far_shift + to + length] = CONTENT[shift + at : shift + at + length]
        assert it.host.content("there") == expected


def test_durable_if_asked_for(seed: int) -> None:
    with sim_bench(seed, here=CONTENT, there=SIZE) as it:
        source, target = it.file("here"), it.file("there")
        assert outcome(it, source, 0, target, 0, 8192, FUA) == 0
        assert it.host.disk.files["there"].unsynced_changes() == 0
        near, far = it.backend(source, held=PERM_CONSISTENT_READ), it.backend(target, writethrough=True)
        it.context.run(near.co_copy_range(0, far, 100_000, 8192))
        assert it.host.disk.files["there"].unsynced_changes() == 0
        assert outcome(it, source, 0, target, 50_000, 8192) == 0
        user = it.user(target)
        assert it.host.disk.files["there"].unsynced_changes() == 1
        assert user.do(flush()) == [0]
        assert it.host.disk.files["there"].unsynced_changes() == 0


def test_bounds_permissions_medium() -> None:
    with sim_bench(0, here=CONTENT, there=SIZE) as it:
        source, target = it.file("here"), it.file("there")
        for at, to, length in ((SIZE, 0, 1), (0, SIZE, 1), (-1, 0, 10), (0, -1, 10), (0, 0, SIZE + 1), (0, 0, -1)):
            assert outcome(it, source, at, target, to, length) == errno.EIO
        assert outcome(it, source, SIZE, target, SIZE, 0) == 0
        blind = it.backend(source, held=0)
        reader, writer = it.backend(source, held=PERM_CONSISTENT_READ), it.backend(target)
        deaf = it.backend(target, held=PERM_CONSISTENT_READ)
        for near, far in ((blind, writer), (reader, deaf)):
            with pytest.raises(OSError) as caught:
                it.context.run(near.co_copy_range(0, far, 0, 512))
            assert caught.value.errno == errno.EPERM
        writer.remove()
        with pytest.raises(OSError) as caught:
            it.context.run(reader.co_copy_range(0, writer, 0, 512))
        assert caught.value.errno == errno.ENOMEDIUM
        assert it.host.content("there") == bytes(SIZE)


def test_who_cannot_says_enotsup_and_has_done_nothing(seed: int) -> None:
    """Filters must see what is read and written, null has no file, devices are no files; co_copy reads and writes."""
    host = SimHost(seed)
    host.add_file("here", CONTENT)
    host.add_file("there", SIZE)
    host.add_device("disk", SIZE)
    with bench(host) as it:
        source, target = it.file("here", "here"), it.file("there", "there")
        filtered = opened(it, {"driver": "blkdebug", "image": "there"})
        above = opened(it, {"driver": "copy-on-read", "file": "here"})
        device = HostDeviceNode(it.graph, filename="disk")
        for near, far in (
            (source, filtered),
            (above, target),
            (source, NullCoNode(it.graph, size=SIZE)),
            (NullCoNode(it.graph, size=SIZE), target),
            (device, target),
            (source, device),
        ):
            assert outcome(it, near, 0, far, 0, 4096) == errno.ENOTSUP
        assert host.content("there") == bytes(SIZE) == host.content("disk")
        near, far = it.backend(above, held=PERM_CONSISTENT_READ), it.backend(filtered)
        assert it.context.run(co_copy(near, 1000, far, 2000, 100_000)) is False
        assert host.content("there")[2000:102_000] == CONTENT[1000:101_000]
        straight = it.backend(source, held=PERM_CONSISTENT_READ)
        assert it.context.run(co_copy(straight, 0, it.backend(target), 0, SIZE)) is True
        assert host.content("there") == CONTENT


def test_errors_are_the_copys(seed: int) -> None:
    """Only ENOTSUP is a reason to read and write."""
    with sim_bench(seed, here=CONTENT, there=SIZE) as it:
        source, target = it.file("here"), it.file("there")
        it.host.fault(path="there", op=COPY_RANGE, errno=errno.ENOSPC, times=1)
        near, far = it.backend(source, held=PERM_CONSISTENT_READ), it.backend(target)
        with pytest.raises(OSError) as caught:
            it.context.run(co_copy(near, 0, far, 0, 8192))
        assert caught.value.errno == errno.ENOSPC
        assert it.context.run(co_copy(near, 0, far, 0, 8192)) is True


def test_in_one_file(seed: int) -> None:
    with sim_bench(seed, disk=CONTENT) as it:
        file = it.file("disk")
        assert outcome(it, file, 0, file, 100_000, 50_000) == 0
        assert it.host.content("disk")[100_000:150_000] == CONTENT[:50_000]
        assert outcome(it, file, 0, file, 10, 4096) == errno.ENOTSUP


def test_a_drain_of_either_waits_for_it_and_keeps_it_out(seed: int) -> None:
    """Whichever is drained, nothing of a copy is in flight inside the section; and two sections cannot lock each other
    out."""
    chance = random.Random(seed)
    with sim_bench(seed, here=CONTENT, there=SIZE) as it:
        source, target = it.file("here"), it.file("there")
        near, far = it.backend(source, held=PERM_CONSISTENT_READ), it.backend(target)
        ended: list[int] = []

        async def copy(n: int) -> None:
            await near.co_copy_range(n * 4096, far, n * 4096, 4096)
            ended.append(n)

        for n in range(20):
            it.context.enter(copy(n))
            if chance.random() < 0.4:
                nodes = chance.choice(([source], [target], [source, target]))
                with it.graph.drained(*nodes):
                    assert it.context.engine.in_flight == 0 and near.in_flight == 0 == far.in_flight
                    before = len(ended)
                    it.context.enter(copy(20))
                    it.context.poll(False)
                    assert len(ended) == before
        near.drain()
        far.drain()
        while it.context.poll(False) or near.in_flight or far.in_flight:
            pass
        assert it.host.content("there")[: 20 * 4096] == CONTENT[: 20 * 4096]


def test_no_copy_between_the_two_halves_of_a_read_modify_write(seed: int) -> None:
    """With O_DIRECT: ranges of whole blocks wait at the gate, others are not copied in the kernel."""
    host = SimHost(seed)
    host.add_file("here", b"c" * SIZE)
    host.add_file("there", b"o" * SIZE)
    with bench(host) as it:
        target = it.file("there", direct=True)
        near, user = it.backend(it.file("here"), held=PERM_CONSISTENT_READ), it.user(target)
        held = host.fault(path="there", op=WRITE, hold=True, times=1)
        user.submit(write(100, b"w" * 10))
        while not held.held:
            it.context.poll(True)
        ended: list[bool] = []

        async def copy() -> None:
            await near.co_copy_range(0, user.backend, 0, 512)
            ended.append(True)

        it.context.enter(copy())
        for _ in range(5):
            it.context.poll(False)
        assert not ended and host.content("there")[:512] == b"o" * 512
        held.release()
        user.wait()
        while not ended:
            it.context.poll(True)
        assert host.content("there")[:512] == b"c" * 512, "it came after, and whole"
        assert outcome(it, near.node, 0, target, 100, 512) == errno.ENOTSUP
        assert outcome(it, near.node, 7, target, 512, 512) == 0


def test_a_copy_is_a_write_for_who_watches() -> None:
    with sim_bench(0, here=CONTENT, there=SIZE) as it:
        source, target = it.file("here"), it.file("there")
        exceeded: list[tuple[int, int]] = []
        set_write_threshold(target, 10_000, lambda *what: exceeded.append(what))
        assert outcome(it, source, 0, target, 0, 4096) == 0 and not exceeded
        assert outcome(it, source, 0, target, 8192, 4096) == 0
        assert exceeded == [(2288, 10_000)] and write_threshold(target) == 0


@pytest.mark.parametrize("engine", ["io_uring", "linux-aio", "threads"])
def test_the_real_host(tmp_path: Path, engine: str) -> None:
    (tmp_path / "here").write_bytes(CONTENT)
    (tmp_path / "there").write_bytes(bytes(SIZE))
    aio = {"linux-aio": "native"}.get(engine, engine)
    with bench(LinuxHost()) as it:
        try:
            it.context.engine_of(engine)
        except OSError as error:
            pytest.skip(f"{engine} cannot be had here: {error}")
        source = it.file(str(tmp_path / "here"), read_only=True)
        target = it.file(str(tmp_path / "there"), aio=aio)
        assert outcome(it, source, 1000, target, 3000, 100_000, FUA) == 0
        assert outcome(it, source, 0, RawNode(it.graph, file=target, offset=4096), 200_000, 4096) == 0
    content = (tmp_path / "there").read_bytes()
    assert content[3000:103_000] == CONTENT[1000:101_000] and content[204_096:208_192] == CONTENT[:4096]
    assert not any(content[:3000])


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ETXTBSY])
def test_what_the_kernel_refuses_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import os

    from bottomhalf.host.linux import workers

    def refuse(*rest: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(workers.os, "copy_file_range", refuse)
    (tmp_path / "here").write_bytes(CONTENT)
    (tmp_path / "there").write_bytes(bytes(SIZE))
    with bench(LinuxHost()) as it:
        source, target = it.file(str(tmp_path / "here")), it.file(str(tmp_path / "there"))
        assert outcome(it, source, 0, target, 0, 4096) == errno.ENOTSUP
        near, far = it.backend(source, held=PERM_CONSISTENT_READ), it.backend(target)
        assert it.context.run(co_copy(near, 0, far, 0, SIZE)) is False
    assert (tmp_path / "there").read_bytes() == CONTENT


def test_a_file_and_a_loop_device(tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(CONTENT)
    (tmp_path / "backing").write_bytes(bytes(SIZE))
    with loop_device(tmp_path / "backing") as device, bench(LinuxHost()) as it:
        source, target = it.file(str(tmp_path / "here")), HostDeviceNode(it.graph, filename=device)
        assert outcome(it, source, 0, target, 0, 4096) == errno.ENOTSUP
        assert outcome(it, target, 0, source, 0, 4096) == errno.ENOTSUP
        near, far = it.backend(source, held=PERM_CONSISTENT_READ), it.user(target)
        assert it.context.run(co_copy(near, 0, far.backend, 0, SIZE)) is False
        got = read(0, SIZE)
        assert far.do(got) == [0] and got.buffer == CONTENT


def test_between_threads_and_in_another(seed: int) -> None:
    """Two nodes that live in one other thread are copied there; what lives in two is read and written."""
    host = SimHost(seed)
    host.add_file("here", CONTENT)
    host.add_file("there", SIZE)
    with bench(host) as it, threads(it, "io0") as (thread,):
        near, far = it.backend(it.file("here"), held=PERM_CONSISTENT_READ), it.backend(it.file("there"))
        it.graph.move(near.node, thread.context)
        with pytest.raises(OSError, match="different threads") as caught:
            it.context.run(near.co_copy_range(0, far, 0, 4096))
        assert caught.value.errno == errno.ENOTSUP
        assert it.context.run(co_copy(near, 0, far, 0, 4096)) is False
        it.graph.move(far.node, thread.context)
        it.context.run(near.co_copy_range(8192, far, 8192, 4096))
        assert host.content("there")[:12288] == CONTENT[:4096] + bytes(4096) + CONTENT[8192:12288]
        near.close()
        far.close()
