# SPDX-License-Identifier: Apache-2.0
"""Files that want aligned requests (O_DIRECT): padding, read-modify-write, and the gate that keeps writes apart."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.block import BlockError
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import PERM_CONSISTENT_READ, PERM_RESIZE
from bottomhalf.host.request import FUA, MAY_UNMAP, NO_FALLBACK, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.host.sim import files
from tests.block.bench import READ_WRITE, bench, discard, flush, read, sim_bench, write, zero

SIZE = 16384


@pytest.fixture(params=[512, 4096])
def alignment(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(files, "DIRECT_ALIGNMENT", request.param)
    return int(request.param)


def pieces(chance: random.Random, size: int) -> list[tuple[int, int]]:
    """The disk cut at random places."""
    cuts = sorted({0, size, *(chance.randrange(size) for _ in range(40))})
    return list(pairwise(cuts))


def test_neighbours_in_one_block_do_not_lose_each_others_writes(seed: int, alignment: int) -> None:
    """All at once, through the file, two windows and two users: everybody's bytes are there in the end."""
    chance = random.Random(seed)
    with sim_bench(seed, disk=SIZE) as it:
        file = it.file("disk", direct=True)
        half = RawNode(it.graph, file=file, offset=alignment * 2 + 100)
        whole = RawNode(it.graph, file=file)
        users = [(it.user(node), shift) for node, shift in ((file, 0), (half, half.offset), (whole, 0), (whole, 0))]
        expected = bytearray(SIZE)
        batches: dict[int, list[Request]] = {}
        for start, end in pieces(chance, SIZE):
            number = chance.randrange(len(users))
            if users[number][1] > start:
                number = 0
            shift = users[number][1]
            data = chance.randbytes(end - start)
            expected[start:end] = data
            batches.setdefault(number, []).append(write(start - shift, data, chance.choice([0, 0, FUA])))
        for number, requests in batches.items():
            chance.shuffle(requests)
            while requests:
                count = chance.randint(1, 5)
                users[number][0].submit(*requests[:count])
                del requests[:count]
                for _ in range(chance.randrange(3)):
                    it.context.poll(False)
        for user, _ in users:
            user.wait()
            assert {request.result for request in user.told} <= {0}
        assert it.host.content("disk") == expected


def test_zeroes_and_discards_keep_out_of_their_neighbours(seed: int, alignment: int) -> None:
    chance = random.Random(seed)
    content = chance.randbytes(SIZE)
    with sim_bench(seed, disk=content) as it:
        user = it.user(it.file("disk", direct=True, unmap=True))
        expected = bytearray(content)
        for start, end in pieces(chance, SIZE):
            kind = chance.randrange(4)
            if kind == 0:
                data = chance.randbytes(end - start)
                expected[start:end] = data
                user.submit(write(start, data))
            elif kind == 1:
                expected[start:end] = bytes(end - start)
                user.submit(zero(start, end - start, chance.choice([0, MAY_UNMAP])))
            elif kind == 2:
                first, last = -(-start // alignment) * alignment, end // alignment * alignment
                if first < last:
                    expected[first:last] = bytes(last - first)
                user.submit(discard(start, end - start))
            else:
                user.submit(flush())
        user.wait()
        assert {request.result for request in user.told} == {0}
        assert it.host.content("disk") == expected


def test_reads_of_any_range(seed: int, alignment: int) -> None:
    content = random.Random(seed).randbytes(SIZE)
    with sim_bench(seed, disk=content) as it:
        user = it.user(it.file("disk", direct=True))
        ranges = [(0, 1), (alignment - 1, 2), (1, SIZE - 2), (SIZE - 1, 1), (alignment, alignment), (5, 0)]
        requests = [read(*each) for each in ranges]
        assert user.do(*requests) == [0] * len(ranges)
        for (offset, length), request in zip(ranges, requests, strict=True):
            assert request.buffer == content[offset : offset + length]


def test_an_aligned_read_passes_a_read_modify_write(seed: int, alignment: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        user = it.user(it.file("disk", direct=True))
        held = it.host.fault(path="disk", op=WRITE, hold=True)
        user.submit(write(1, b"x"))
        it.context.run(user.backend.co_pread(0, alignment))
        assert len(user.waiting) == 1
        held.remove()
        user.wait()


def test_a_write_waits_for_the_read_modify_write_before_it(seed: int, alignment: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        user = it.user(it.file("disk", direct=True))
        held = it.host.fault(path="disk", op=READ, hold=True)
        first, second, third = write(1, b"x"), write(0, b"y" * alignment), write(0, b"z")
        user.submit(first)
        user.submit(second)
        user.submit(third)
        it.host.advance(10**9)
        it.context.poll(False)
        assert user.told == []
        held.remove()
        user.wait()
        assert user.told == [first, second, third]
        assert it.host.content("disk")[:alignment] == b"z" + b"y" * (alignment - 1)


@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_failed_read_modify_write_opens_the_gate_again(seed: int, alignment: int, op: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        user = it.user(it.file("disk", direct=True))
        it.host.fault(path="disk", op=op, errno=errno.EIO, times=1)
        assert user.do(write(1, b"x"), write(3, b"y")) in ([-errno.EIO, 0], [0, -errno.EIO])
        assert user.do(write(0, bytes(alignment)), write(7, b"z")) == [0, 0]


def test_a_zero_write_that_must_not_be_slow(seed: int, alignment: int) -> None:
    with sim_bench(seed, disk=b"x" * SIZE) as it:
        user = it.user(it.file("disk", direct=True))
        assert user.do(zero(1, alignment, NO_FALLBACK)) == [-errno.ENOTSUP]
        assert user.do(zero(alignment, alignment, NO_FALLBACK)) == [0]
        it.host.fault(path="disk", op=WRITE_ZEROES, errno=errno.ENOTSUP)
        assert user.do(zero(3 * alignment, alignment, NO_FALLBACK)) == [-errno.ENOTSUP]
        assert user.do(zero(3, 2 * alignment)) == [0]
        expected = bytearray(b"x" * SIZE)
        expected[3 : 2 * alignment + 3] = bytes(2 * alignment)
        assert it.host.content("disk") == expected


class TestOddSize:
    """An image that ends in the middle of a block."""

    SIZE = 1000

    def test_is_read_to_its_end(self, seed: int, alignment: int) -> None:
        content = random.Random(seed).randbytes(self.SIZE)
        with sim_bench(seed, disk=content) as it:
            user = it.user(it.file("disk", direct=True), held=PERM_CONSISTENT_READ)
            request = read(1, self.SIZE - 1)
            assert user.do(request) == [0]
            assert request.buffer == content[1:]

    def test_has_no_writers(self, seed: int, alignment: int) -> None:
        with sim_bench(seed, disk=self.SIZE) as it:
            file = it.file("disk", direct=True)
            raw = RawNode(it.graph, "raw", file=file)
            expected = (
                "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
            )
            for node in (file, raw):
                with pytest.raises(BlockError, match=f"^{expected}$"):
                    it.backend(node)
                assert file.permissions == (0, 15)

    def test_grows_under_a_writer_who_may_resize(self, seed: int, alignment: int) -> None:
        with sim_bench(seed, disk=b"x" * self.SIZE) as it:
            file = it.file("disk", direct=True)
            user = it.user(file, held=READ_WRITE | PERM_RESIZE)
            assert user.do(write(self.SIZE - 1, b"y")) == [0]
            grown = -(-self.SIZE // alignment) * alignment
            assert it.host.content("disk") == b"x" * (self.SIZE - 1) + b"y" + bytes(grown - self.SIZE)
            assert user.backend.size == file.size == grown


@pytest.fixture
def direct_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "direct.img"
    path.write_bytes(bytes(SIZE))
    try:
        LinuxHost().open_file(str(path), direct=True).close()
    except OSError as error:
        pytest.skip(f"no O_DIRECT in {tmp_path}: {error}")
    yield path


def test_neighbours_on_the_real_host(direct_file: Path) -> None:
    chance = random.Random(5)
    expected = bytearray(SIZE)
    with bench(LinuxHost()) as it:
        user = it.user(it.file(str(direct_file), direct=True))
        for start, end in pieces(chance, SIZE):
            expected[start:end] = chance.randbytes(end - start)
            user.submit(write(start, bytes(expected[start:end])))
        user.wait()
        assert {request.result for request in user.told} == {0}
        everything = read(0, SIZE)
        assert user.do(everything) == [0]
        assert everything.buffer == expected
    assert direct_file.read_bytes() == expected


def test_the_tail_of_an_odd_file_on_the_real_host(direct_file: Path) -> None:
    direct_file.write_bytes(b"z" * 1000)
    with bench(LinuxHost()) as it:
        user = it.user(it.file(str(direct_file), direct=True), held=READ_WRITE | PERM_RESIZE)
        request = read(900, 100)
        assert user.do(request) == [0]
        assert request.buffer == b"z" * 100
        assert user.do(write(999, b"y")) == [0]
        grown = user.backend.size
    assert grown % 512 == 0
    assert direct_file.read_bytes() == b"z" * 999 + b"y" + bytes(grown - 1000)
