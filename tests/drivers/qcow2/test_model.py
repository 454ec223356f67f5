# SPDX-License-Identifier: Apache-2.0
"""Whatever is asked, in batches or one by one, alone or at the same time: the bytes are those of a bytearray, the
tables are whole, and what was closed can be opened again."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bottomhalf.aio import gather
from bottomhalf.host.request import DISCARD, FLUSH, FUA, MAY_UNMAP, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.host.sim import SimHost
from tests.block.bench import User
from tests.drivers.qcow2.bench import Disk, check, disk, make

GEOMETRIES: list[dict[str, Any]] = [
    {"cluster_size": 512, "size": 100 * 512},
    {"cluster_size": 512, "size": 500 * 512, "refcount_bits": 64},
    {"cluster_size": 4096, "size": 33 * 4096 - 512, "version": 2},
    {"cluster_size": 16384, "size": 9 * 16384 + 512, "extended_l2": True},
    {"cluster_size": 65536, "size": 5 * 65536, "refcount_bits": 2},
]


def _range(chance: random.Random, size: int, cluster: int) -> tuple[int, int]:
    length = min(chance.choice((1, 100, 512, cluster // 2, cluster, 3 * cluster)), size)
    offset = chance.randrange(0, size - length + 1)
    if chance.random() < 0.4:
        offset = min(offset // cluster * cluster, size - length)
    return offset, length


def _batch(chance: random.Random, size: int, cluster: int, number: int) -> list[Request]:
    """Requests of one kind; those that change something do not overlap, so that their order means nothing."""
    op = chance.choice((READ, WRITE, WRITE, WRITE, WRITE_ZEROES, DISCARD, FLUSH))
    if op == FLUSH:
        return [Request(FLUSH)]
    made: list[Request] = []
    for n in range(chance.randrange(1, 7)):
        offset, length = _range(chance, size, cluster)
        if op != READ and any(offset < r.offset + r.length and r.offset < offset + length for r in made):
            continue
        buffer = None
        if op in (READ, WRITE):
            buffer = memoryview(bytearray([(number * 7 + n) % 255 + 1] * length))
        flags = chance.choice({WRITE: (0, 0, FUA), WRITE_ZEROES: (0, MAY_UNMAP)}.get(op, (0,)))
        made.append(Request(op, offset, length, buffer, flags))
    return made


def _apply(opened: Disk, model: bytearray, batch: list[Request], where: list[tuple[int, int]]) -> None:
    for request, (offset, length) in zip(batch, where, strict=True):
        if request.op == READ:
            assert request.buffer == model[offset : offset + length]
        elif request.op == WRITE:
            model[offset : offset + length] = request.buffer
        elif request.op == WRITE_ZEROES:
            model[offset : offset + length] = bytes(length)
        elif request.op == DISCARD:
            left = bytes(opened.run(opened.backend.co_pread(offset, length)))
            assert all(new in (old, 0) for new, old in zip(left, model[offset : offset + length], strict=True))
            model[offset : offset + length] = left


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_batches(seed: int, geometry: dict[str, Any]) -> None:
    host, chance = SimHost(seed), random.Random(seed)
    make(host, "disk.qcow2", **geometry)
    model = bytearray(geometry["size"])
    for _ in range(3):
        with disk(host, "disk.qcow2", **{"pass-discard-request": bool(seed % 2)}) as opened:
            user = User(opened.backend)
            for number in range(25):
                batch = _batch(chance, opened.size, geometry["cluster_size"], number)
                where = [(request.offset, request.length) for request in batch]
                assert user.do(*batch) == [0] * len(batch)
                _apply(opened, model, batch, where)
            assert opened.content() == model
        found = check(host, "disk.qcow2")
        assert not found.corruptions and not found.leaks, found.findings


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_at_the_same_time(seed: int, geometry: dict[str, Any]) -> None:
    """Each of several users has every so many bytes of the disk to himself; clusters belong to all of them."""
    host = SimHost(seed)
    make(host, "disk.qcow2", **geometry)
    size, users, stripe = geometry["size"], 4, 512
    model = bytearray(size)
    with disk(host, "disk.qcow2") as opened:

        async def use(me: int) -> None:
            chance = random.Random(seed * users + me)
            for number in range(15):
                at = chance.randrange(0, size // stripe) // users * users * stripe + me * stripe
                if at + stripe > size:
                    continue
                what = chance.randrange(6)
                if what < 3:
                    data = bytes([number * users + me + 1]) * stripe
                    await opened.backend.co_pwrite(at, data)
                    model[at : at + stripe] = data
                elif what == 3:
                    await opened.backend.co_write_zeroes(at, stripe, chance.choice((0, MAY_UNMAP)))
                    model[at : at + stripe] = bytes(stripe)
                elif what == 4:
                    await opened.backend.co_flush()
                else:
                    assert await opened.backend.co_pread(at, stripe) == model[at : at + stripe]

        async def everybody() -> None:
            await gather(*(use(me) for me in range(users)))

        opened.run(everybody())
        assert opened.content() == model
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings
    with disk(host, "disk.qcow2", **{"read-only": True}) as opened:
        assert opened.content() == model


def test_a_freed_cluster_waits_for_those_who_were_mapped_to_it(seed: int) -> None:
    """A read and a write that are on their way to a cluster which is discarded meanwhile: whoever gets the cluster next
    finds nobody else's bytes in it, and the reader reads the old or the new content of his own."""
    host = SimHost(seed)
    host.create_file("disk.qcow2", 0)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512)
    host.set_cached("disk.qcow2", "never")
    with disk(host, "disk.qcow2") as opened:
        backend = opened.backend

        async def play() -> None:
            await backend.co_pwrite(0, b"a" * 512 * 8)
            await backend.co_flush()

            async def discard_and_reuse() -> None:
                await backend.co_discard(0, 512 * 8)
                await backend.co_flush()
                await backend.co_pwrite(512 * 32, b"x" * 512 * 8)
                await backend.co_flush()
                await backend.co_pwrite(512 * 16, b"y" * 512 * 8)

            async def read() -> None:
                assert set(await backend.co_pread(0, 512 * 8)) <= set(b"ab\0")

            await gather(read(), backend.co_pwrite(0, b"b" * 512 * 8), discard_and_reuse(), read())
            assert await backend.co_pread(512 * 32, 512 * 8) == b"x" * 512 * 8
            assert await backend.co_pread(512 * 16, 512 * 8) == b"y" * 512 * 8

        opened.run(play())
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_grows(seed: int, cluster_size: int) -> None:
    """Also beyond what L1 had room for."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=cluster_size, cluster_size=cluster_size)
    larger = 100 * cluster_size * (cluster_size // 8) if cluster_size == 512 else 50 * cluster_size
    with disk(host, "disk.qcow2") as opened:
        opened.run(opened.backend.co_pwrite(0, b"before"))
        opened.run(opened.backend.co_truncate(larger))
        assert opened.size == larger
        opened.run(opened.backend.co_pwrite(larger - 5, b"after"))
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings
    with disk(host, "disk.qcow2") as opened:
        assert opened.size == larger
        assert opened.run(opened.backend.co_pread(0, 6)) == b"before"
        assert opened.run(opened.backend.co_pread(larger - 5, 5)) == b"after"
