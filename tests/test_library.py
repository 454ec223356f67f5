# SPDX-License-Identifier: Apache-2.0
"""The library's face: every call in plain code and under asyncio, errors, closing, images in use."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from bottomhalf import library
from bottomhalf.aio import WrongContext
from bottomhalf.block import BlockError
from bottomhalf.host.request import Request
from bottomhalf.qapi.errors import OptionError

SIZE = 1 << 20
CHUNK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


# -- plain code


def test_read(image: Path) -> None:
    content = image.read_bytes()
    with bottomhalf.open(image) as disk:
        assert disk.size == SIZE
        for offset, length in ((0, 0), (0, 1), (1, 511), (4095, 2), (SIZE - 1, 1), (0, SIZE), (SIZE, 0)):
            data = disk.pread(length, offset)
            assert type(data) is bytes and data == content[offset : offset + length]
        buffer = bytearray(1000)
        assert disk.pread_into(buffer, 77) is None
        assert buffer == content[77:1077]
        words = memoryview(bytearray(64)).cast("I")
        disk.pread_into(words, 3)
        assert words.tobytes() == content[3:67]


def test_write(image: Path) -> None:
    expected = bytearray(image.read_bytes())
    with bottomhalf.open(image) as disk:
        for data, offset in ((b"", 0), (b"a", 0), (bytearray(b"bc"), 511), (memoryview(b"x" * 9000), 4000)):
            assert disk.pwrite(data, offset) == len(data)
            expected[offset : offset + len(data)] = data
        disk.pwrite(b"durable", SIZE - 7, fua=True)
        expected[-7:] = b"durable"
        assert disk.pread(SIZE, 0) == expected
        disk.flush()
    assert image.read_bytes() == expected


def test_zeroes_and_discard(image: Path) -> None:
    with bottomhalf.open(image) as disk:
        disk.write_zeroes(CHUNK, 4 * CHUNK)
        disk.write_zeroes(100, 10, unmap=False)
        disk.write_zeroes(0, 0)
        disk.discard(512 * 1024, 64 * 1024)
        disk.discard(5, 0)
        assert disk.pread(4 * CHUNK, CHUNK) == bytes(4 * CHUNK)
        assert disk.pread(10, 100) == bytes(10)
        disk.write_zeroes(0, SIZE)
    assert image.read_bytes() == bytes(SIZE)


def test_block_status(tmp_path: Path) -> None:
    image = tmp_path / "sparse.raw"
    with image.open("wb") as file:
        file.truncate(SIZE)
        file.seek(256 * 1024)
        file.write(b"x" * 65536)
    with bottomhalf.open(image) as disk:
        extents = disk.block_status()
        assert sum(length for _, length, _ in extents) == SIZE
        position = 0
        for offset, length, kind in extents:
            assert offset == position and length > 0 and kind in ("data", "zero")
            position += length
        kinds = {kind for offset, length, kind in extents if offset <= 256 * 1024 < offset + length}
        assert kinds == {"data"}
        (only,) = disk.block_status(256 * 1024 + 5, 100)
        assert only == (256 * 1024 + 5, 100, "data")
        assert disk.block_status(SIZE, 0) == [] and disk.block_status(SIZE) == []


@pytest.mark.parametrize(("length", "offset"), [(1, SIZE), (2, SIZE - 1), (1, -1), (-1, 0), (0, SIZE + 1)])
def test_outside(image: Path, length: int, offset: int) -> None:
    with bottomhalf.open(image) as disk:
        calls: list[Callable[[], object]] = [
            lambda: disk.pread(length, offset),
            lambda: disk.write_zeroes(offset, length),
            lambda: disk.discard(offset, length),
            lambda: disk.block_status(offset, length),
        ]
        if length >= 0:
            calls += [lambda: disk.pwrite(bytes(length), offset), lambda: disk.pread_into(bytearray(length), offset)]
        for call in calls:
            with pytest.raises(OSError, match="not within the disk's 1048576 bytes") as caught:
                call()
            assert caught.value.errno == errno.EINVAL


def test_read_only(image: Path) -> None:
    before = image.read_bytes()
    with bottomhalf.open(image, read_only=True) as disk:
        assert disk.pread(5, 0) == before[:5]
        for call in (
            lambda: disk.pwrite(b"x", 0),
            lambda: disk.write_zeroes(0, 1),
            lambda: disk.discard(0, 1),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EPERM
        disk.flush()
    assert image.read_bytes() == before


def test_several_at_once(image: Path, tmp_path: Path) -> None:
    """Each disk has its own context; they do not disturb each other, whoever is closed first."""
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE))
    first, second = bottomhalf.open(image), bottomhalf.open(other)
    second.pwrite(first.pread(SIZE, 0), 0)
    first.close()
    assert second.pread(10, 5) == image.read_bytes()[5:15]
    third = bottomhalf.open(image)
    second.close()
    assert third.pread(SIZE, 0) == other.read_bytes()
    third.close()


def test_options(image: Path) -> None:
    content = image.read_bytes()
    file = {"driver": "file", "filename": str(image)}
    options: dict[str, Any] = {"driver": "raw", "offset": 512, "size": 1024, "file": file}
    with bottomhalf.open(options) as disk:
        assert disk.size == 1024 and disk.pread(1024, 0) == content[512:1536]
        disk.pwrite(b"in the window", 0)
    with bottomhalf.open(options, read_only=True) as disk, pytest.raises(OSError):
        disk.pwrite(b"x", 0)
    assert "read-only" not in options, "the caller's dict is his own"
    assert image.read_bytes()[512:525] == b"in the window"
    with bottomhalf.open({"driver": "null-co", "size": 1 << 40, "read-zeroes": True}) as disk:
        assert disk.size == 1 << 40 and disk.pread(4096, 1 << 39) == bytes(4096)


def test_direct(image: Path) -> None:
    """O_DIRECT, at any alignment."""
    content = bytearray(image.read_bytes())
    options = {"driver": "file", "filename": str(image), "cache": {"direct": True}}
    try:
        os.close(os.open(image, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system refuses O_DIRECT")
    with bottomhalf.open(options) as disk:
        assert disk.pread(1000, 333) == content[333:1333]
        disk.pwrite(b"unaligned", 10_001)
        content[10_001:10_010] = b"unaligned"
        assert disk.pread(SIZE, 0) == content
    assert image.read_bytes() == content


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("missing.raw", BlockError, "Could not open 'missing.raw': No such file or directory"),
        (".", BlockError, "Could not open '.': "),
        ({}, OptionError, "Parameter 'driver' is missing"),
        ({"driver": "nope"}, OptionError, "Parameter 'driver' does not accept value 'nope'"),
        ({"driver": "file"}, OptionError, "Parameter 'filename' is missing"),
        ({"driver": "file", "filename": 5}, OptionError, "Invalid parameter type for 'filename'"),
        ({"driver": "raw", "file": "nope"}, BlockError, "Cannot find device='nope' nor node-name='nope'"),
        ({"driver": "null-co", "node-name": "!"}, BlockError, "Invalid node-name: '!'"),
    ],
)
def test_cannot_open(
    what: Any, error: type[Exception], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error) as caught:
        bottomhalf.open(what)
    assert str(caught.value).startswith(text)
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing(image: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    disk = bottomhalf.open(image)
    disk.pwrite(b"hello", 0)
    disk.close()
    disk.close()
    with disk:
        pass
    for call in (
        lambda: disk.pread(1, 0),
        lambda: disk.pread_into(bytearray(1), 0),
        lambda: disk.pwrite(b"x", 0),
        lambda: disk.write_zeroes(0, 1),
        lambda: disk.discard(0, 1),
        lambda: disk.flush(),
        lambda: disk.block_status(),
    ):
        with pytest.raises(ValueError, match="the disk is closed"):
            call()
    assert len(os.listdir("/proc/self/fd")) == before
    assert image.read_bytes()[:5] == b"hello"


def test_closes_when_the_body_fails(image: Path) -> None:
    with pytest.raises(ZeroDivisionError), bottomhalf.open(image) as disk:
        disk.pwrite(b"hello", 0)
        raise ZeroDivisionError
    bottomhalf.open(image).close()
    assert image.read_bytes()[:5] == b"hello"


def test_in_use_by_ourselves(image: Path) -> None:
    """One may write; others may read meanwhile."""
    with bottomhalf.open(image) as writer:
        with pytest.raises(BlockError) as caught:
            bottomhalf.open(image)
        assert 'Failed to get "write" lock' in str(caught.value)
        assert writer.pread(9, 9) == image.read_bytes()[9:18]
        with bottomhalf.open(image, read_only=True) as reader:
            writer.pwrite(b"news", 0)
            assert reader.pread(4, 0) == b"news"
    bottomhalf.open(image).close()


def test_in_use_by_another(image: Path) -> None:
    """The error says who has it."""
    code = "import bottomhalf, sys; d = bottomhalf.open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        with pytest.raises(BlockError) as caught:
            bottomhalf.open(image)
        assert f"(pid {holder.pid})" in str(caught.value)
        assert f"[{image}]" in str(caught.value)
    finally:
        holder.communicate(timeout=30)
    bottomhalf.open(image).close()


def test_model(image: Path, seed: int) -> None:
    """Random calls do to the disk what they do to a bytearray."""
    chance = random.Random(seed)
    model = bytearray(image.read_bytes())
    with bottomhalf.open(image) as disk:
        for _ in range(60):
            length = chance.choice((1, 511, 4096, 70_000))
            offset = chance.randrange(SIZE - length + 1)
            match chance.randrange(4):
                case 0:
                    assert disk.pread(length, offset) == model[offset : offset + length]
                case 1:
                    data = chance.randbytes(length)
                    disk.pwrite(data, offset, fua=chance.random() < 0.1)
                    model[offset : offset + length] = data
                case 2:
                    disk.write_zeroes(offset, length, unmap=chance.random() < 0.5)
                    model[offset : offset + length] = bytes(length)
                case 3:
                    for start, count, kind in disk.block_status(offset, length):
                        assert kind == "data" or not any(model[start : start + count])
    assert image.read_bytes() == model


# -- asyncio


def test_asyncio_calls(image: Path) -> None:
    content = bytearray(image.read_bytes())

    async def main() -> None:
        async with bottomhalf.open(image) as disk:
            assert disk.size == SIZE
            assert await disk.pread(10, 5) == content[5:15]
            assert await disk.pwrite(b"hello", 100, fua=True) == 5
            content[100:105] = b"hello"
            await disk.write_zeroes(8192, 4096)
            content[8192:12288] = bytes(4096)
            await disk.write_zeroes(0, 1, unmap=False)
            content[0] = 0
            await disk.flush()
            extents = await disk.block_status()
            assert sum(length for _, length, _ in extents) == SIZE
            assert await disk.pread(SIZE, 0) == content
            await disk.discard(512 * 1024, 4096)
            content[512 * 1024 : 512 * 1024 + 4096] = await disk.pread(4096, 512 * 1024)

    asyncio.run(main())
    assert image.read_bytes() == content


def test_asyncio_many_at_once(image: Path, seed: int) -> None:
    chance = random.Random(seed)
    pages = [chance.randbytes(CHUNK) for _ in range(SIZE // CHUNK)]

    async def main() -> None:
        async with bottomhalf.open(image) as disk:
            numbers = list(range(len(pages)))
            chance.shuffle(numbers)
            await asyncio.gather(*(disk.pwrite(pages[n], n * CHUNK) for n in numbers))
            assert await asyncio.gather(*(disk.pread(CHUNK, n * CHUNK) for n in numbers)) == [
                pages[n] for n in numbers
            ]
            flushes_and_reads = [disk.flush(), *(disk.pread(1, n) for n in range(50)), disk.flush()]
            await asyncio.gather(*flushes_and_reads)

    asyncio.run(main())
    assert image.read_bytes() == b"".join(pages)


def test_asyncio_goes_on_meanwhile(image: Path) -> None:
    """Other tasks get their turns, and timers are on time."""

    async def main() -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(other())
        async with bottomhalf.open(image) as disk:
            for offset in range(0, SIZE, 64 * 1024):
                await disk.pwrite(bytes(64 * 1024), offset, fua=True)
        ticking.cancel()
        assert turns > 16

    asyncio.run(main())


def test_asyncio_takes_what_is_there_at_once() -> None:
    """Without a turn of the loop, but for one now and then, so that nobody starves."""

    async def main() -> None:
        async with bottomhalf.open({"driver": "null-co", "size": 1 << 20, "read-zeroes": True}) as disk:
            waits = 0
            for _ in range(3 * library.AT_ONCE_MAX):
                coroutine = disk.pread(512, 4096)
                try:
                    coroutine.send(None)
                    waits += 1
                    coroutine.send(None)
                except StopIteration as ended:
                    assert ended.value == bytes(512)
            assert waits == 3

    asyncio.run(main())


def test_asyncio_other_loops_are_refused(image: Path) -> None:
    async def main() -> library.AsyncDisk:
        return await bottomhalf.open(image).__aenter__()

    loop = asyncio.new_event_loop()
    disk = loop.run_until_complete(main())
    with pytest.raises(WrongContext, match="does not serve"):
        asyncio.run(disk.pread(512, 0))
    loop.run_until_complete(disk.close())
    loop.close()


def test_asyncio_errors(image: Path) -> None:
    async def main() -> None:
        async with bottomhalf.open(image, read_only=True) as disk:
            with pytest.raises(OSError) as caught:
                await disk.pwrite(b"x", 0)
            assert caught.value.errno == errno.EPERM
            for call in (
                lambda: disk.pread(1, SIZE),
                lambda: disk.write_zeroes(SIZE, 1),
                lambda: disk.discard(-1, 1),
                lambda: disk.block_status(0, SIZE + 1),
            ):
                with pytest.raises(OSError, match="not within"):
                    await call()
            results = await asyncio.gather(
                disk.pread(1, 0), disk.pwrite(b"x", 0), disk.pread(2, 0), return_exceptions=True
            )
            assert [type(result) for result in results] == [bytes, PermissionError, bytes]

    asyncio.run(main())


def test_asyncio_cancelled(image: Path) -> None:
    """The request goes on to its end, its result is dropped, and others are not disturbed."""

    async def main() -> None:
        async with bottomhalf.open(image) as disk:
            tasks = [asyncio.create_task(disk.pwrite(bytes([n]) * CHUNK, n * CHUNK, fua=True)) for n in range(100)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(result == CHUNK for result in results[1::2])
            assert all(result == CHUNK or isinstance(result, asyncio.CancelledError) for result in results[::2])
            await disk.flush()
            for number in range(1, 100, 2):
                assert await disk.pread(1, number * CHUNK) == bytes([number])

    asyncio.run(main())


def test_asyncio_timeout(image: Path) -> None:
    async def main() -> None:
        async with bottomhalf.open({"driver": "null-co", "size": 4096, "latency-ns": 50_000_000}) as disk:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(disk.pread(1, 0), 0.001)

    asyncio.run(main())


def test_asyncio_closing(image: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        async with bottomhalf.open(image) as disk:
            await disk.pwrite(b"hello", 0)
            await asyncio.gather(disk.close(), disk.close())
            await disk.close()
            for call in (
                lambda: disk.pread(1, 0),
                lambda: disk.pwrite(b"x", 0),
                lambda: disk.flush(),
                lambda: disk.block_status(),
            ):
                with pytest.raises(ValueError, match="the disk is closed"):
                    await call()

    asyncio.run(main())
    assert image.read_bytes()[:5] == b"hello"
    assert len(os.listdir("/proc/self/fd")) == before


def test_asyncio_closed_with_requests_under_way(image: Path) -> None:
    """They end first, and those who wait for them are told."""

    async def main() -> list[Any]:
        async with bottomhalf.open(image) as disk:
            tasks = [asyncio.create_task(disk.pwrite(bytes(CHUNK), n * CHUNK, fua=True)) for n in range(50)]
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert asyncio.run(main()) == [CHUNK] * 50
    assert image.read_bytes()[: 50 * CHUNK] == bytes(50 * CHUNK)


def test_asyncio_several_disks(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE))

    async def main() -> None:
        async with bottomhalf.open(image, read_only=True) as source, bottomhalf.open(other) as target:

            async def copy(offset: int) -> None:
                await target.pwrite(await source.pread(CHUNK, offset), offset)

            await asyncio.gather(*(copy(offset) for offset in range(0, SIZE, CHUNK)))

    asyncio.run(main())
    assert other.read_bytes() == image.read_bytes()


def test_plain_after_asyncio(image: Path) -> None:
    """The disk of ``async with`` is closed with it; a new one works in the same thread."""

    async def main() -> None:
        async with bottomhalf.open(image) as disk:
            await disk.pwrite(b"one", 0)

    asyncio.run(main())
    with bottomhalf.open(image) as disk:
        assert disk.pread(3, 0) == b"one"


def test_failing_disk(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is the caller's OSError; closing reports a flush that failed, and closes."""
    from bottomhalf.host.linux.file import LinuxFile

    def broken(self: LinuxFile, requests: list[Request]) -> list[Request]:
        for request in requests:
            request.result = -errno.EIO
        return []

    def broken_at_once(self: LinuxFile, length: int, offset: int) -> bytes | None:
        raise OSError(errno.EIO, "Input/output error")

    with bottomhalf.open(image) as disk:
        for name, how in (("read_inline", broken), ("pread_nowait", broken_at_once)):
            with monkeypatch.context() as patch:
                patch.setattr(LinuxFile, "pread_nowait", lambda self, length, offset: None)
                patch.setattr(LinuxFile, name, how)
                with pytest.raises(OSError) as caught:
                    disk.pread(1, 0)
                assert caught.value.errno == errno.EIO
        assert disk.pread(1, 0) == image.read_bytes()[:1]


def test_start_up_is_lazy() -> None:
    code = "import sys, bottomhalf; print([m for m in sys.modules if m.startswith('bottomhalf.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"


def test_names() -> None:
    assert all(getattr(bottomhalf, name) is not None for name in bottomhalf.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        bottomhalf.nope  # noqa: B018


# -- bitmaps


def test_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    bottomhalf.create(path, format="qcow2", size=SIZE)
    bottomhalf.bitmap_add(path, "a")
    bottomhalf.bitmap_add(path, "b", granularity=512, enabled=False)
    with bottomhalf.open(path) as disk:
        disk.pwrite(b"x" * 10, 70_000)
    found = {bitmap.name: bitmap for bitmap in bottomhalf.bitmaps(path)}
    assert found["a"].dirty == [(65536, 131072)] and found["a"].dirty_bytes == 65536
    assert (found["b"].granularity, found["b"].enabled, found["b"].dirty) == (512, False, [])
    assert [(each.name, each.in_use) for each in bottomhalf.info(path).bitmaps] == [("a", False), ("b", False)]
    other = tmp_path / "other.qcow2"
    bottomhalf.create(other, format="qcow2", size=SIZE)
    bottomhalf.bitmap_add(other, "c")
    bottomhalf.bitmap_merge(other, "c", "a", source_path=path)
    bottomhalf.bitmap_merge(path, "b", "a")
    bottomhalf.bitmap_clear(path, "a")
    bottomhalf.bitmap_disable(path, "a")
    bottomhalf.bitmap_enable(path, "b")
    found = {bitmap.name: bitmap for bitmap in [*bottomhalf.bitmaps(path), *bottomhalf.bitmaps(other)]}
    assert [found[name].dirty for name in "abc"] == [[], [(65536, 131072)], [(65536, 131072)]]
    assert not found["a"].enabled and found["b"].enabled
    bottomhalf.bitmap_remove(path, "a")
    assert [bitmap.name for bitmap in bottomhalf.bitmaps(path)] == ["b"]
    for change in (bottomhalf.bitmap_remove, bottomhalf.bitmap_clear, bottomhalf.bitmap_enable):
        with pytest.raises(BlockError, match="Dirty bitmap 'a' not found"):
            change(path, "a")
    assert bottomhalf.check(path).leaks == 0


def test_bitmaps_of_what_has_none(image: Path, tmp_path: Path) -> None:
    assert bottomhalf.bitmaps(image) == []
    with pytest.raises(BlockError, match="Can't store persistent bitmaps to"):
        bottomhalf.bitmap_add(image, "b")
    old = tmp_path / "old.qcow2"
    bottomhalf.create(old, format="qcow2", size=SIZE, compat="0.10")
    with pytest.raises(BlockError, match="Cannot store dirty bitmaps in qcow2 v2 files"):
        bottomhalf.bitmap_add(old, "b")
