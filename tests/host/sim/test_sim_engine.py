# SPDX-License-Identifier: Apache-2.0
"""The simulated engine: order, buffers, faults, flush and power cuts."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.host.protocol import IN, UnixAddress
from bottomhalf.host.request import FLUSH, FUA, IN_PROGRESS, READ, WRITE, Request
from bottomhalf.host.sim import Deadlock, Odds, SimHost
from bottomhalf.host.sim.engine import SimEngine

SECTOR = 512


def finish(host: SimHost, engine: SimEngine) -> list[Request]:
    """Everything that is in flight, in order of completion."""
    poller, done = host.poller(), []
    poller.register(engine.fileno(), IN)
    while engine.in_flight:
        assert engine.pending or poller.wait(-1)
        done += engine.reap()
    poller.close()
    return done


def write(offset: int, fill: int, length: int = SECTOR, flags: int = 0) -> Request:
    return Request(WRITE, offset, length, bytes([fill]) * length, flags)


def test_nothing_starts_before_enter() -> None:
    host = SimHost(odds=Odds.calm())
    host.add_file("a", b"x" * 512)
    engine, file = host.engine(), host.open_file("a")
    request = Request(READ, 0, 512, bytearray(512))
    engine.prepare(file, request)
    assert engine.in_flight == 1
    host.advance(1_000_000_000)
    assert engine.reap() == [] and request.result == IN_PROGRESS
    engine.enter()
    assert engine.reap() == [] and not engine.pending
    host.advance(1_000_000_000)
    assert engine.in_flight == 1
    assert engine.pending
    assert engine.reap() == [request] and engine.in_flight == 0
    assert request.result == 0 and request.buffer == b"x" * 512


def test_what_finishes_inside_enter_shows_in_pending_only() -> None:
    host = SimHost(odds=Odds(at_once=1.0))
    host.add_file("a", 512)
    engine, file, poller = host.engine(), host.open_file("a"), host.poller()
    poller.register(engine.fileno(), IN)
    request = Request(READ, 0, 512, bytearray(512))
    engine.prepare(file, request)
    engine.enter()
    assert request.result == 0 and engine.pending
    with pytest.raises(Deadlock, match="1 finished inside enter"):
        poller.wait(-1)
    assert engine.reap() == [request]


def test_completions_come_out_of_order_and_in_heaps(seed: int) -> None:
    host = SimHost(seed)
    host.add_file("a", 1 << 20)
    engine, file = host.engine(), host.open_file("a")
    requests = [Request(READ, n * 4096, 4096, bytearray(4096)) for n in range(200)]  # more than the depth
    for request in requests:
        engine.prepare(file, request)
    engine.enter()
    done = finish(host, engine)
    assert done != requests
    assert sorted(done, key=lambda request: request.offset) == requests


def test_some_heaps_complete_at_once_and_some_one_by_one() -> None:
    def reaps(seed: int) -> int:
        host = SimHost(seed)
        host.add_file("a", 1 << 20)
        engine, file, count = host.engine(), host.open_file("a"), 0
        for n in range(8):
            engine.prepare(file, Request(READ, n, 1, bytearray(1)))
        engine.enter()
        while engine.in_flight:
            count += bool(engine.reap())
            host.world.step()
        return count

    assert {reaps(seed) for seed in range(20)} >= {1, 8}


def test_buffer_of_a_read_is_undefined_until_completion() -> None:
    looks = set()
    for seed in range(10):
        host = SimHost(seed)
        host.add_file("a", b"x" * 512)
        engine, file = host.engine(), host.open_file("a")
        request = Request(READ, 0, 512, bytearray(512))
        engine.prepare(file, request)
        engine.enter()
        looks.add(bytes(request.buffer))
    assert looks == {b"x" * 512, b"\xdb" * 512}


def test_misuse_is_refused() -> None:
    host = SimHost()
    host.add_file("a", 512)
    engine, file = host.engine(), host.open_file("a")
    request = Request(READ, 0, 512, bytearray(100))
    with pytest.raises(AssertionError, match="buffer of 100 bytes"):
        engine.prepare(file, request)
    request.buffer = bytearray(512)
    engine.prepare(file, request)
    with pytest.raises(AssertionError, match="twice"):
        engine.prepare(file, request)
    engine.enter()
    finish(host, engine)
    with pytest.raises(AssertionError, match="after it had finished"):
        engine.prepare(file, request)
    with pytest.raises(ValueError):
        host.engine("bogus")
    assert host.engine("io_uring").name == "io_uring"
    host.engine_kinds.remove("io_uring")
    with pytest.raises(OSError):
        host.engine("io_uring")
    assert host.engine().name == "sim"


def test_file_closed_between_prepare_and_enter() -> None:
    host = SimHost()
    host.add_file("a", 512)
    engine, file = host.engine(), host.open_file("a")
    request = Request(READ, 0, 512, bytearray(512))
    engine.prepare(file, request)
    file.close()
    engine.enter()
    finish(host, engine)
    assert request.result == -errno.EBADF


def test_close_waits_for_what_is_in_flight() -> None:
    host = SimHost()
    host.add_file("a", 512)
    engine, file = host.engine(), host.open_file("a")
    request = write(0, 7)
    engine.prepare(file, request)
    engine.close()
    assert request.result == 0
    assert host.content("a") == b"\7" * 512


def test_faults_strike_by_path_op_range_and_count() -> None:
    host = SimHost(odds=Odds.calm())
    host.add_file("a", 1 << 16)
    host.add_file("b", 1 << 16)
    engine, a, b = host.engine(), host.open_file("a"), host.open_file("b")
    fault = host.fault(path="a", op=READ, errno=errno.EIO, start=4096, end=8192, after=1, times=2)

    def read(file: object, offset: int) -> int:
        request = Request(READ, offset, 512, bytearray(512))
        engine.prepare(file, request)  # type: ignore[arg-type]
        engine.enter()
        finish(host, engine)
        return request.result

    assert read(b, 4096) == 0
    assert read(a, 0) == 0
    assert read(a, 8192) == 0
    assert read(a, 4095) == 0  # the first that matches
    assert read(a, 8191) == -errno.EIO
    assert read(a, 5000) == -errno.EIO
    assert read(a, 5000) == 0
    assert fault.hits == 2
    with pytest.raises(ValueError):
        host.fault(path="a")


def test_faults_strike_inline_requests() -> None:
    host = SimHost()
    host.add_file("a", 4096, cached="always")
    file = host.open_file("a")
    host.fault(op=READ, errno=errno.EIO, times=1)
    first, second = (Request(READ, 0, 10, bytearray(10)) for _ in range(2))
    assert file.read_inline([first, second]) == []
    assert (first.result, second.result) == (-errno.EIO, 0)
    host.fault(op=READ, delay_ns=10)
    assert file.read_inline([first]) == [first]  # what takes long is not inline


def test_delay_and_hold() -> None:
    host = SimHost(odds=Odds.calm())
    host.add_file("a", 4096)
    engine, file = host.engine(), host.open_file("a")
    slow = host.fault(path="a", op=READ, delay_ns=10**9, times=1)
    start_ns = host.monotonic_ns()
    engine.prepare(file, Request(READ, 0, 10, bytearray(10)))
    engine.enter()
    finish(host, engine)
    assert slow.hits == 1 and host.monotonic_ns() - start_ns > 10**9
    held = host.fault(path="a", hold=True)
    requests = [write(n * SECTOR, n) for n in range(3)]
    for request in requests:
        engine.prepare(file, request)
    engine.enter()
    host.advance(10**12)
    assert held.held == 3 and engine.reap() == []
    held.release(1)
    host.advance(0)
    assert engine.reap() == requests[:1]
    with pytest.raises(Deadlock, match="never complete"):
        engine.close()
    held.remove()
    engine.close()
    assert [request.result for request in requests] == [0, 0, 0]


def test_failed_write_leaves_old_or_new_sectors(seed: int) -> None:
    host = SimHost(seed)
    host.add_file("a", b"o" * 16 * SECTOR)
    host.fault(op=WRITE, errno=errno.EIO)
    engine, file = host.engine(), host.open_file("a")
    request = write(SECTOR // 2, ord("n"), 8 * SECTOR)
    engine.prepare(file, request)
    engine.enter()
    finish(host, engine)
    assert request.result == -errno.EIO
    content = host.content("a")
    for n in range(1, 8):
        assert len(set(content[n * SECTOR : (n + 1) * SECTOR])) == 1
    assert content[: SECTOR // 2] == b"o" * (SECTOR // 2)


@pytest.mark.parametrize("number", [0, errno.ENOSPC])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_short_transfers(op: int, number: int, seed: int) -> None:
    """The first bytes move, others may come in between, and then the rest moves or fails."""
    host = SimHost(seed, odds=Odds.calm())
    host.add_file("a", b"o" * 4 * SECTOR)
    short = host.fault(op=op, short=SECTOR, errno=number, times=1)
    engine, file = host.engine(), host.open_file("a")
    buffer = bytearray(b"n" * 4 * SECTOR)
    request = Request(op, 0, 4 * SECTOR, memoryview(buffer))
    engine.prepare(file, request)
    engine.enter()
    finish(host, engine)
    assert short.struck == [op] and request.result == -number
    moved = b"o" if op == READ else b"n"
    found = bytes(buffer) if op == READ else host.content("a")
    assert found[:SECTOR] == moved * SECTOR
    assert number or found == moved * 4 * SECTOR
    if op == WRITE:
        assert all(len(set(found[at : at + SECTOR])) == 1 for at in range(0, len(found), SECTOR))


def test_a_short_transfer_can_be_overtaken() -> None:
    """Between its parts somebody else's write takes place."""
    mixed = 0
    for seed in range(50):
        host = SimHost(seed)
        host.add_file("a", bytes(4 * SECTOR))
        host.fault(op=WRITE, short=SECTOR, times=1)
        engine, file = host.engine(), host.open_file("a")
        requests = [write(0, ord("a"), 4 * SECTOR), write(0, ord("b"), 4 * SECTOR)]
        for request in requests:
            engine.prepare(file, request)
        engine.enter()
        while any(request.result == IN_PROGRESS for request in requests):
            host.world.step()
        engine.reap()
        assert set(host.content("a")) <= set(b"ab")
        mixed += len(set(host.content("a"))) == 2
    assert mixed


def test_a_device_moves_something_or_fails() -> None:
    with pytest.raises(ValueError, match="one byte at least"):
        SimHost().fault(op=WRITE, short=0)


# Power cuts


def test_flush_makes_durable_what_completed_before_it_began() -> None:
    host = SimHost()
    host.add_file("a", bytes(2 * SECTOR))
    engine, file = host.engine(), host.open_file("a")
    engine.prepare(file, write(0, 1))
    engine.enter()
    finish(host, engine)
    assert host.durable_content("a")[0] == 0
    held = host.fault(op=FLUSH, hold=True)
    flush, late = Request(FLUSH), write(SECTOR, 2)
    engine.prepare(file, flush)
    engine.enter()
    engine.prepare(file, late)
    engine.enter()
    while late.result == IN_PROGRESS:
        host.world.step()
    held.remove()
    finish(host, engine)
    assert flush.result == 0
    assert host.durable_content("a") == b"\1" * SECTOR + bytes(SECTOR)


def test_power_cut_keeps_any_of_the_unsynced_sectors() -> None:
    survivors = set()
    for seed in range(60):
        host = SimHost(seed)
        host.add_file("a", bytes(4 * SECTOR), cached="always")
        file = host.open_file("a")
        assert file.write_inline([write(0, 1, 2 * SECTOR), write(3 * SECTOR, 2)]) == []
        assert host.content("a")[0] == 1
        host.crash()
        content = host.content("a")
        assert content == host.durable_content("a")
        survivors.add(tuple(content[n * SECTOR] for n in range(4)))
        for n in range(4):
            assert len(set(content[n * SECTOR : (n + 1) * SECTOR])) == 1
        with pytest.raises(OSError):
            file.size()
    assert survivors == {(a, b, 0, c) for a in (0, 1) for b in (0, 1) for c in (0, 2)}


def test_write_in_flight_may_survive() -> None:
    survivors = set()
    for seed in range(40):
        host = SimHost(seed)
        host.add_file("a", bytes(SECTOR))
        engine, file = host.engine(), host.open_file("a")
        engine.prepare(file, write(0, 1))
        engine.enter()
        host.crash()
        survivors.add(host.content("a")[0])
    assert survivors == {0, 1}


def test_fua_is_durable_and_older_writes_do_not_come_back_over_it(seed: int) -> None:
    host = SimHost(seed)
    host.add_file("a", bytes(2 * SECTOR))
    engine, file = host.engine(), host.open_file("a")
    for request in (write(0, 1, 2 * SECTOR), write(0, 2, flags=FUA)):
        engine.prepare(file, request)
        engine.enter()
        finish(host, engine)
    for _ in range(10):
        survivor = host.survivor("a")
        assert survivor[0] == 2 and survivor[SECTOR] in (0, 1)


def test_failed_flush_may_lose_writes_although_the_next_succeeds() -> None:
    outcomes = set()
    for seed in range(40):
        host = SimHost(seed)
        host.add_file("a", bytes(SECTOR))
        host.fault(op=FLUSH, errno=errno.EIO, times=1)
        engine, file = host.engine(), host.open_file("a")
        results = []
        for request in (write(0, 1), Request(FLUSH), Request(FLUSH)):
            engine.prepare(file, request)
            engine.enter()
            results += [done.result for done in finish(host, engine)]
        assert results == [0, -errno.EIO, 0]
        assert host.content("a")[0] == 1
        outcomes.add(host.durable_content("a")[0])
    assert outcomes == {0, 1}


def test_kill_keeps_completed_writes_and_drops_the_program() -> None:
    host = SimHost()
    host.add_file("a", bytes(SECTOR), cached="always")
    file, event = host.open_file("a"), host.event()
    file.set_permissions(15, 0)
    other = host.other_process_lock("a", 0, 15)
    host.listen(UnixAddress("/run/s"))
    happened: list[int] = []
    host.at(5, lambda: happened.append(1))
    file.write_inline([write(0, 9)])
    host.kill()
    other.release()
    assert host.content("a") == b"\x09" * SECTOR
    assert event.closed and not happened
    host.advance(10)
    assert not happened
    host.open_file("a").set_permissions(15, 0)
    with pytest.raises(ConnectionRefusedError):
        host.connect(UnixAddress("/run/s"))  # the file is still there, nobody behind it
    host.listen(UnixAddress("/run/s"))
    host.crash()
    with pytest.raises(FileNotFoundError):
        host.connect(UnixAddress("/run/s"))


steps = st.lists(
    st.tuples(st.sampled_from(["write", "write", "fua", "flush"]), st.integers(0, 7), st.integers(1, 4)),
    max_size=20,
)


@given(steps, st.integers(0, 1000))
def test_power_cut_against_a_model(todo: list[tuple[str, int, int]], seed: int) -> None:
    """Of every sector, one of the values that it had since the last flush or FUA write of it survives."""
    host = SimHost(seed)
    host.add_file("a", bytes(12 * SECTOR))
    engine, file = host.engine(), host.open_file("a")
    possible: list[set[int]] = [{0} for _ in range(12)]
    current = [0] * 12
    for n, (name, sector, count) in enumerate(todo, 1):
        if name == "flush":
            request = Request(FLUSH)
            possible = [{value} for value in current]
        else:
            request = write(sector * SECTOR, n, count * SECTOR, FUA if name == "fua" else 0)
            for i in range(sector, sector + count):
                current[i] = n
                possible[i] = {n} if name == "fua" else possible[i] | {n}
        engine.prepare(file, request)
        engine.enter()
        finish(host, engine)
    for _ in range(3):
        survivor = host.survivor("a")
        for i in range(12):
            values = set(survivor[i * SECTOR : (i + 1) * SECTOR])
            assert len(values) == 1 and values <= possible[i]
