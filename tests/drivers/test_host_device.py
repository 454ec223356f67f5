# SPDX-License-Identifier: Apache-2.0
"""Driver host_device: on real loop devices, and on the simulated host."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from bottomhalf.block import BlockError
from bottomhalf.block.resize import Preallocation, co_resize
from bottomhalf.drivers.host_device import HostDeviceNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.drivers.registry import describe_node, file_driver
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import DATA, PERM_CONSISTENT_READ
from bottomhalf.host.request import (
    DISCARD,
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bottomhalf.host.sim import SimHost
from tests.block.bench import Bench, bench, discard, flush, read, write, zero
from tests.drivers.helpers import opened
from tests.loop_devices import loop_device

SIZE = 1 << 20
ENGINES = ("io_uring", "native", "threads")


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_bytes(b"x" * SIZE)
    return path


@pytest.fixture
def device(backing: Path) -> Iterator[str]:
    with loop_device(backing) as path:
        yield path


@pytest.fixture(params=["sim", "linux"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Bench, str, str]]:
    """A bench, a device and a file."""
    if request.param == "sim":
        host = SimHost(0)
        host.add_device("/dev/loop0", SIZE)
        host.add_file("file", SIZE)
        with bench(host) as it:
            it.user(HostDeviceNode(it.graph, filename="/dev/loop0")).do(write(0, b"x" * SIZE))
            for backend in list(it.graph.backends):
                backend.close()
            yield it, "/dev/loop0", "file"
        return
    backing = request.getfixturevalue("backing")
    with loop_device(backing) as path, bench(LinuxHost()) as it:
        yield it, path, str(backing)


def device_node(it: Bench, path: str, name: str = "", **options: object) -> HostDeviceNode:
    return HostDeviceNode(it.graph, name, filename=path, **options)  # type: ignore[arg-type]


def test_each_driver_refuses_what_is_the_others(place: tuple[Bench, str, str]) -> None:
    """In QEMU's words."""
    it, device, file = place
    with pytest.raises(BlockError) as caught:
        it.file(device)
    assert str(caught.value) == f"'file' driver requires '{device}' to be a regular file"
    with pytest.raises(BlockError) as caught:
        device_node(it, file)
    assert str(caught.value) == f"'host_device' driver requires '{file}' to be either a character or block device"
    with pytest.raises(BlockError) as caught:
        device_node(it, "/nowhere")
    assert str(caught.value) == "Could not open '/nowhere': No such file or directory"
    assert (file_driver(it.graph, device), file_driver(it.graph, file)) == ("host_device", "file")
    assert file_driver(it.graph, "/nowhere") == "file"


def test_a_character_device_is_none(tmp_path: Path) -> None:
    with bench(LinuxHost()) as it, pytest.raises(BlockError, match=r"^Could not open ./dev/null.: a character device"):
        device_node(it, "/dev/null")


def test_no_holes_and_one_size(place: tuple[Bench, str, str]) -> None:
    it, device, _ = place
    node = device_node(it, device)
    top = RawNode(it.graph, file=node)
    assert node.size == SIZE and node.block_status(0, SIZE) == (DATA, SIZE)
    user = it.user(top)
    assert user.do(read(SIZE - 512, 512), read(SIZE, 512)) == [0, -errno.EIO]
    it.context.run(node.co_truncate(SIZE))
    for size in (SIZE - 512, SIZE + 512):
        with pytest.raises(OSError, match="Cannot resize device files") as caught:
            it.context.run(top.co_truncate(size))
        assert caught.value.errno == errno.ENOTSUP
    text = "Preallocation mode 'full' unsupported for this non-regular file"
    with pytest.raises(OSError, match=text):
        it.context.run(co_resize(node, SIZE + 512, Preallocation.FULL))
    assert node.size == SIZE


def test_no_file_is_made_in_its_place(place: tuple[Bench, str, str]) -> None:
    it, device, _ = place
    with pytest.raises(OSError, match="it is a block device, which has its size already"):
        it.host.create_file(device, SIZE)
    assert it.user(device_node(it, device)).do(read(0, 512)) == [0]


def test_what_it_tells_of_itself(place: tuple[Bench, str, str]) -> None:
    it, device, _ = place
    node = opened(it, {"driver": "raw", "file": {"driver": "host_device", "filename": device, "node-name": "below"}})
    above, below = describe_node(node), describe_node(it.graph.find("below"))
    assert (above.file, below.file, below.drv) == (device, device, "host_device")
    assert (below.image.format, below.image.dirty_flag, above.image.dirty_flag) == ("host_device", False, False)
    specific = below.image.format_specific
    assert specific is not None and specific.type == "file"


@pytest.mark.parametrize("direct", [False, True])
def test_a_device_does_what_a_byte_array_does(seed: int, direct: bool) -> None:
    """Reads, writes, zeroes and discards of any range, on devices that can and that cannot."""
    chance = random.Random(seed)
    host = SimHost(seed)
    able = chance.random() < 0.7
    host.add_device("disk", SIZE, logical_block=chance.choice((512, 4096)), can_zero=able, can_discard=able)
    with bench(host) as it:
        play(it, device_node(it, "disk", direct=direct, unmap=True), chance, 40, zero_after_discard=able)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("aio", ENGINES)
def test_a_loop_device_does_too(device: str, aio: str, direct: bool) -> None:
    if aio == "native" and not direct:
        direct = True
    with bench(LinuxHost()) as it:
        try:
            node = device_node(it, device, direct=direct, unmap=True, aio=aio)
        except BlockError as error:
            pytest.skip(str(error).partition("\n")[0])
        play(it, node, random.Random(7), 150, zero_after_discard=True)


def play(it: Bench, node: HostDeviceNode, chance: random.Random, steps: int, zero_after_discard: bool) -> None:
    user = it.user(node)
    content = bytearray(user_read(it, node))
    for _ in range(steps):
        offset, length = chance.randrange(SIZE), chance.choice((1, 511, 512, 4096, 10_000, 65_536))
        if chance.random() < 0.5:
            offset -= offset % 4096
        length = min(length, SIZE - offset)
        op = chance.choice((READ, WRITE, WRITE_ZEROES, DISCARD))
        flags = chance.choice((0, FUA)) | (chance.choice((0, MAY_UNMAP)) if op == WRITE_ZEROES else 0)
        data = chance.randbytes(length) if op == WRITE else bytes(length)
        request = Request(op, offset, length, memoryview(bytearray(data)) if op <= WRITE else None, flags)
        if op in (READ, DISCARD):
            request.flags = 0
        assert user.do(request) == [0]
        if op == READ:
            assert request.buffer == content[offset : offset + length]
        elif op == DISCARD:
            block = node.file.device_limits().logical_block  # type: ignore[union-attr]
            begin, end = -(-offset // block) * block, (offset + length) // block * block
            if zero_after_discard and begin < end:
                content[begin:end] = bytes(end - begin)
        else:
            content[offset : offset + length] = data
    assert user.do(flush()) == [0]
    assert user_read(it, node) == content


def user_read(it: Bench, node: HostDeviceNode) -> bytes:
    user = it.user(node, held=PERM_CONSISTENT_READ)
    request = read(0, SIZE)
    assert user.do(request) == [0]
    user.backend.close()
    return bytes(request.buffer)


@pytest.mark.parametrize("aio", ENGINES)
def test_zeroes_and_discards_reach_the_device(device: str, backing: Path, aio: str) -> None:
    """The loop device hands them on to its file, where they are holes or zeroes."""
    with bench(LinuxHost()) as it:
        try:
            node = device_node(it, device, direct=True, unmap=True, aio=aio)
        except BlockError as error:
            pytest.skip(str(error).partition("\n")[0])
        user = it.user(node)
        full = os.stat(backing).st_blocks
        assert user.do(discard(0, 65536), zero(65536, 65536, MAY_UNMAP | NO_FALLBACK)) == [0, 0]
        assert user.do(zero(131072, 65536), zero(262144, 65536, FUA)) == [0, 0]
        assert user.do(zero(393216, 65536, NO_FALLBACK)) == [-errno.ENOTSUP]  # zero bytes might have to be written
        assert user.do(flush()) == [0]
    content = backing.read_bytes()
    for offset in (0, 65536, 131072, 262144):
        assert content[offset : offset + 65536] == bytes(65536)
    assert content[393216:] == b"x" * (SIZE - 393216)
    assert os.stat(backing).st_blocks <= full - 2 * 65536 // 512


def test_discards_are_off_unless_asked_for(device: str, backing: Path) -> None:
    with bench(LinuxHost()) as it:
        assert it.user(device_node(it, device)).do(discard(0, SIZE)) == [0]
    assert backing.read_bytes() == b"x" * SIZE


def test_a_read_only_device(backing: Path) -> None:
    """QEMU's words, also where it turns out only when somebody wants to write."""
    with loop_device(backing, "--read-only") as device, bench(LinuxHost()) as it:
        with pytest.raises(BlockError) as caught:
            device_node(it, device)
        assert str(caught.value) == "The device is not writable: Permission denied"
        assert it.user(device_node(it, device, read_only=True), held=PERM_CONSISTENT_READ).do(read(0, 512)) == [0]
        dynamic = device_node(it, device, auto_read_only=True)
        with pytest.raises(BlockError, match=r"^The device is not writable: Permission denied$"):
            it.backend(dynamic)
        assert it.user(dynamic, held=PERM_CONSISTENT_READ).do(read(0, 512)) == [0]


def test_a_read_only_device_of_the_simulated_host() -> None:
    host = SimHost(0)
    host.add_device("disk", SIZE, writable=False)
    with bench(host) as it, pytest.raises(BlockError, match=r"^The device is not writable: Permission denied$"):
        device_node(it, "disk")


def test_large_blocks(backing: Path) -> None:
    """O_DIRECT by the device's own block size; what is smaller is read, changed and written."""
    with loop_device(backing, "--sector-size", "4096") as device, bench(LinuxHost()) as it:
        node = device_node(it, device, direct=True)
        limits = node.file.device_limits()
        assert limits is not None and limits.logical_block == 4096 == node.request_alignment
        assert limits.physical_block >= 4096
        user = it.user(node)
        assert user.do(write(1000, b"w" * 100)) == [0]
        assert user_read(it, node)[990:1110] == b"x" * 10 + b"w" * 100 + b"x" * 10


def test_limits(device: str) -> None:
    """As the queue's files tell them, which is where a person would look."""
    number = os.stat(device).st_rdev
    assert stat.S_ISBLK(os.stat(device).st_mode)
    queue = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue")
    file = LinuxHost().open_file(device, read_only=True)
    limits = file.device_limits()
    assert limits is not None and limits.logical_block == 512
    if queue.is_dir():
        assert limits.max_transfer == int((queue / "max_sectors_kb").read_text()) * 1024
        assert limits.max_discard == int((queue / "discard_max_bytes").read_text())
        assert limits.physical_block == int((queue / "physical_block_size").read_text())
    file.close()


def test_nothing_is_known_where_there_is_no_sysfs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bottomhalf.host.linux import device as module

    monkeypatch.setattr(module, "_queue", lambda number: "/nowhere")
    file = LinuxHost().open_file(device, read_only=True)
    limits = file.device_limits()
    assert limits is not None and (limits.max_transfer, limits.max_discard, limits.logical_block) == (0, 0, 512)
    file.close()


def test_images_are_locked_on_devices(device: str) -> None:
    """Byte for byte as QEMU does: two openers who both write refuse each other."""
    with bench(LinuxHost()) as it:
        it.backend(device_node(it, device), shared=PERM_CONSISTENT_READ)
        with pytest.raises(BlockError, match='Failed to get "write" lock'):
            it.backend(device_node(it, device))
