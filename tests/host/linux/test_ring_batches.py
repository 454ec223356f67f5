# SPDX-License-Identifier: Apache-2.0
"""The ring engine's way for lists: the same results as one by one, whatever the list is made of."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bottomhalf.host.linux import LinuxHost, job, ring_engine
from bottomhalf.host.linux.file import LinuxFile
from bottomhalf.host.linux.memory import LinuxArena
from bottomhalf.host.linux.ring import ENTRIES, Ring
from bottomhalf.host.linux.ring_engine import RingEngine
from bottomhalf.host.protocol import IN
from bottomhalf.host.request import FLUSH, FUA, IN_PROGRESS, OP_NAMES, READ, WRITE, Request

pytestmark = pytest.mark.needs("io_uring")

BLOCK = 512
BLOCKS = 4 * ENTRIES
WAIT_NS = 10_000_000_000


@pytest.fixture
def engine() -> Iterator[RingEngine]:
    made = RingEngine()
    yield made
    made.close()


@pytest.fixture
def arena() -> Iterator[LinuxArena]:
    made = LinuxArena(BLOCKS * BLOCK)
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["cached", "direct"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LinuxFile]:
    path = tmp_path / "disk"
    path.write_bytes(b"".join(bytes([n % 251]) * BLOCK for n in range(BLOCKS)))
    made = LinuxFile(str(path), direct=request.param)
    yield made
    made.close()


def transfer(op: int, arena: LinuxArena, n: int, blocks: int = 1) -> Request:
    at = n * BLOCK
    request = Request(op, at, blocks * BLOCK, arena.view[at : at + blocks * BLOCK])
    request.address = arena.address + at
    return request


def finish(engine: RingEngine) -> list[Request]:
    """Start what is prepared and wait for all of it."""
    engine.enter()
    done: list[Request] = []
    poller = LinuxHost().poller()
    poller.register(engine.fileno(), IN)
    while engine.in_flight:
        if not engine.pending:
            assert poller.wait(WAIT_NS)
        done += engine.reap()
    poller.close()
    assert engine.reap() == [] and not engine.pending
    assert sorted(engine._free) == list(range(ENTRIES)), "a slot is lost, or free twice"
    assert not any(engine._whole) and not any(engine._jobs), "a finished request is held on to"
    return done


@pytest.mark.parametrize("count", [1, 2, 31, ENTRIES - 1, ENTRIES, ENTRIES + 1, BLOCKS])
def test_lists_of_any_length(engine: RingEngine, file: LinuxFile, arena: LinuxArena, count: int) -> None:
    requests = [transfer(READ, arena, n) for n in range(count)]
    engine.prepare_batch(file, requests)
    assert engine.in_flight == count
    assert sorted(map(id, finish(engine))) == sorted(map(id, requests))
    for n, request in enumerate(requests):
        assert request.result == 0 and request.buffer == bytes([n % 251]) * BLOCK


def test_round_and_round(engine: RingEngine, file: LinuxFile, arena: LinuxArena) -> None:
    """The submission array wraps in the middle of a list, again and again."""
    chance = random.Random(1)
    for _ in range(40):
        requests = [transfer(READ, arena, n) for n in range(chance.randrange(1, 100))]
        for request in requests:
            request.buffer[:] = b"\xff" * BLOCK
        engine.prepare_batch(file, requests)
        assert len(finish(engine)) == len(requests)
        for n, request in enumerate(requests):
            assert request.result == 0 and request.buffer == bytes([n % 251]) * BLOCK


@pytest.mark.parametrize("seed_", range(10))
def test_any_mixture(engine: RingEngine, file: LinuxFile, tmp_path: Path, arena: LinuxArena, seed_: int) -> None:
    """Without an address, at a wrong address, durable, beyond the end; several lists in flight."""
    chance = random.Random(seed_)
    crooked = LinuxArena(2 * BLOCKS * BLOCK)
    expected = bytearray(Path(file.path).read_bytes())
    places = iter(chance.sample(range(BLOCKS), BLOCKS))
    everything: list[Request] = []
    for _ in range(12):
        op = chance.choice([READ, WRITE, WRITE, FLUSH])
        requests = []
        for _ in range(chance.randrange(1, 40)):
            n = next(places)
            if op == FLUSH:
                requests.append(Request(FLUSH))
                continue
            request = transfer(op, arena, n)
            kind = chance.randrange(4)
            if kind == 0:
                request.address = 0
            elif kind == 1:
                at = (len(everything) + len(requests)) * 2 * BLOCK + 1
                request.buffer, request.address = crooked.view[at : at + BLOCK], crooked.address + at
            elif kind == 2 and op == WRITE:
                request.flags = FUA
            if op == WRITE:
                request.buffer[:] = expected[n * BLOCK : n * BLOCK + BLOCK] = chance.randbytes(BLOCK)
            requests.append(request)
        engine.prepare_batch(file, requests)
        everything += requests
        if chance.random() < 0.5:
            engine.enter()
    assert sorted(map(id, finish(engine))) == sorted(map(id, everything))
    for request in everything:
        assert request.result == 0, request
        if request.op == READ:
            assert request.buffer == expected[request.offset : request.offset + BLOCK], OP_NAMES[request.op]
    assert Path(file.path).read_bytes() == expected


def test_beyond_the_end_and_short(engine: RingEngine, file: LinuxFile, arena: LinuxArena) -> None:
    """What does not come back whole goes on by itself, the others are not concerned."""
    size = file.size()
    requests = [transfer(READ, arena, n, 2) for n in range(0, 8, 2)]
    requests[1].offset = size - BLOCK
    requests[2].offset = size + 10 * BLOCK
    engine.prepare_batch(file, requests)
    finish(engine)
    assert [request.result for request in requests] == [0] * 4
    last = bytes([(BLOCKS - 1) % 251]) * BLOCK
    assert requests[1].buffer == last + bytes(BLOCK) and requests[2].buffer == bytes(2 * BLOCK)
    assert requests[3].buffer == bytes([6]) * BLOCK + bytes([7]) * BLOCK


def test_more_than_one_operation_moves(
    engine: RingEngine, file: LinuxFile, arena: LinuxArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ring_engine, job):
        monkeypatch.setattr(module, "OPERATION_BYTES_MAX", BLOCK)
    requests = [transfer(READ, arena, n, 4) for n in (0, 4)]
    engine.prepare_batch(file, requests)
    finish(engine)
    for n, request in zip((0, 4), requests, strict=True):
        assert request.result == 0
        assert request.buffer == b"".join(bytes([m]) * BLOCK for m in range(n, n + 4))


def test_a_bad_descriptor(engine: RingEngine, file: LinuxFile, arena: LinuxArena) -> None:
    """A file that was closed, or may not be written: its requests fail, each of them, and nobody else's."""
    reader = LinuxFile(file.path, read_only=True, locking="off")
    refused = [transfer(WRITE, arena, n) for n in range(8)]
    good = [transfer(READ, arena, n) for n in range(8, 16)]
    engine.prepare_batch(reader, refused)
    engine.prepare_batch(file, good)
    finish(engine)
    assert {request.result for request in refused} == {-errno.EBADF} and {request.result for request in good} == {0}
    reader.close()
    for request in refused:
        request.result = IN_PROGRESS
    engine.prepare_batch(reader, refused)
    finish(engine)
    assert {request.result for request in refused} == {-errno.EBADF}


def test_one_system_call_for_many(
    engine: RingEngine, file: LinuxFile, arena: LinuxArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many."""
    calls: list[int] = []
    enter = Ring.enter

    def counted(ring: Ring, wait_for: int = 0) -> None:
        calls.append(ring.unsubmitted)
        enter(ring, wait_for)

    monkeypatch.setattr(Ring, "enter", counted)
    requests = [transfer(READ, arena, n) for n in range(64)]
    engine.prepare_batch(file, requests)
    engine.enter()
    assert calls == [64]
    finish(engine)
    assert calls.count(64) == 1


def test_a_reap_brings_all_that_is_finished(
    engine: RingEngine, file: LinuxFile, arena: LinuxArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel posts some twenty completions of a kind per entry: the others must not wait for the next turn."""
    slots: list[int] = []
    results: list[int] = []
    really = Ring.completions

    def some(ring: Ring) -> tuple[list[int], list[int]]:
        for held, new in zip((slots, results), really(ring), strict=True):
            held += new
        given = slots[:20], results[:20]
        del slots[:20], results[:20]
        return given

    monkeypatch.setattr(Ring, "completions", some)
    monkeypatch.setattr(Ring, "needs_entering", property(lambda ring: ring.unsubmitted or slots))
    requests = [transfer(READ, arena, n) for n in range(64)]
    engine.prepare_batch(file, requests)
    engine._ring.enter(wait_for=64)
    assert sorted(map(id, engine.reap())) == sorted(map(id, requests)) and engine.in_flight == 0
