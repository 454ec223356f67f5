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

from bottomhalf.aio import AioContext, Coroutine
from bottomhalf.block import BlockError
from bottomhalf.block.alignment import WriteGate
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import PERM_CONSISTENT_READ, PERM_RESIZE
from bottomhalf.host.request import FUA, MAY_UNMAP, NO_FALLBACK, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.host.sim import SimHost, files
from tests.block.bench import READ_WRITE, User, bench, discard, flush, read, sim_bench, write, zero

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


class TestGate:
    """The gate alone: exclusion, order of arrival, and nobody forgotten."""

    def test_order_of_arrival(self, seed: int) -> None:
        chance = random.Random(seed)
        context = AioContext(SimHost(seed))
        gate = WriteGate("the gate")
        arrived: list[int] = []
        entered: list[int] = []
        inside: set[int] = set()
        alone_inside: set[int] = set()

        async def pass_it(number: int, alone: bool) -> None:
            from bottomhalf.aio import sleep_ns

            await sleep_ns(chance.randrange(50))
            arrived.append(number)
            await gate.enter(alone=alone)
            entered.append(number)
            assert not alone_inside and not (alone and inside)
            (alone_inside if alone else inside).add(number)
            await sleep_ns(chance.randrange(50))
            (alone_inside if alone else inside).remove(number)
            gate.leave()

        coroutines: list[Coroutine] = [context.enter(pass_it(n, chance.random() < 0.4)) for n in range(60)]
        while not all(coroutine.done for coroutine in coroutines):
            context.poll(True)
        assert entered == arrived
        assert not gate.closed
        context.close()

    def test_an_owner_who_raises_does_not_shut_it(self) -> None:
        gate = WriteGate("the gate")

        class Owner:
            def complete(self, requests: list[Request]) -> None:
                raise ZeroDivisionError

        request = write(0, b"x")
        request.owner = Owner()
        assert gate.submit([request], lambda requests: requests) == [request]
        request.result = 0
        with pytest.raises(ZeroDivisionError):
            request.owner.complete([request])
        gate.submit([write(0, b"y")], lambda requests: [])

    def test_a_result_that_is_known_early_does_not_end_a_pending_request(self) -> None:
        """An engine may set ``result`` long before it tells."""
        told = []
        user = type("Owner", (), {"complete": lambda self, requests: told.extend(requests)})()
        gate = WriteGate("the gate")
        request = write(0, b"x")
        request.owner = user

        def submit(requests: list[Request]) -> list[Request]:
            requests[0].result = 0
            return requests

        gate.submit([request], submit)
        assert request.owner is not user
        request.owner.complete([request])
        assert told == [request] and request.owner is user
        gate.submit([write(0, b"y")], lambda requests: [])
        assert gate._shared == 0

    def test_users_share_a_batch(self, seed: int) -> None:
        """Requests of two owners in one batch come back to each."""
        with sim_bench(seed, disk=SIZE) as it:
            file = it.file("disk", direct=True)
            backend = it.backend(file)
            one, two = User(backend), User(backend)
            mine, others = [write(n * 512, b"a" * 512) for n in range(4)], [write(n * 512, b"b") for n in range(4, 8)]
            for user, requests in ((one, mine), (two, others)):
                for request in requests:
                    request.owner = user.queue
                    user.waiting[id(request)] = request
            mixed = [request for pair in zip(mine, others, strict=True) for request in pair]
            pending = backend.submit(mixed)
            waiting = {id(request) for request in pending}
            for user, requests in ((one, mine), (two, others)):
                user._completed([request for request in requests if id(request) not in waiting])
                user.wait()
