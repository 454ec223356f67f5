# SPDX-License-Identifier: Apache-2.0
"""Requests of clients who mean well: every command, every way through the server, drains, many clients."""

from __future__ import annotations

import errno
from collections import deque

import pytest

from bottomhalf.exports.nbd import metadata
from bottomhalf.exports.nbd import transmission as transmission_module
from bottomhalf.exports.nbd.transmission import BATCHES_AT_ONCE, PARSE_BYTES_MAX
from bottomhalf.host.request import READ, WRITE, Request
from bottomhalf.host.sim import Odds
from bottomhalf.wire.nbd import replies
from bottomhalf.wire.nbd.constants import STATE_HOLE, STATE_ZERO
from tests.exports.nbd_bench import INET, Bench, check_idle

KIB = 1 << 10
MIB = 1 << 20


# -- commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_every_command(seed: int, structured: bool) -> None:
    with Bench(seed) as bench:
        content = bench.disk(64 * KIB)
        client = bench.client("disk", structured_replies=structured)
        client.good(client.write(1000, b"x" * 5000, fua=True))
        content[1000:6000] = b"x" * 5000
        client.good(client.write_zeroes(2000, 100))
        content[2000:2100] = bytes(100)
        client.good(client.write_zeroes(9000, 4096, no_hole=True, fua=True))
        content[9000:13096] = bytes(4096)
        client.good(client.trim(16384, 8192))
        content[16384:24576] = bytes(8192)
        client.good(client.cache(0, 4096))
        assert client.good(client.read(0, 64 * KIB)).data == content
        client.good(client.flush())
        assert bench.host.durable_content("disk.raw") == content
        if structured:
            (extents,) = client.good(client.block_status(0, 64 * KIB)).extents.values()
            assert (8192, STATE_HOLE | STATE_ZERO) in extents
            assert sum(length for length, _ in extents) == 64 * KIB
            assert client.good(client.read(3, 3, dont_fragment=True)).data == content[3:6]
        statistics = bench.exports[0].statistics
        assert (statistics.writes, statistics.write_bytes, statistics.rejected, statistics.failed) == (1, 5000, 0, 0)
        assert statistics.answered == (9 if structured else 7)
        check_idle(bench.transmission(client))


def test_requests_of_no_bytes_succeed() -> None:
    with Bench() as bench:
        bench.disk(4096)
        client = bench.client("disk")
        for ask in (client.read, client.trim, client.write_zeroes, client.cache):
            client.good(ask(100, 0))
        client.good(client.write(4096, b""))


def test_fua_makes_a_write_durable_and_no_fua_does_not(seed: int) -> None:
    with Bench(seed) as bench:
        content = bytes(bench.disk(8192))
        client = bench.client("disk")
        client.good(client.write(4096, b"b" * 512, fua=True))
        assert bench.host.durable_content("disk.raw")[4096:4608] == b"b" * 512
        client.good(client.write(0, b"a" * 512))
        assert bench.host.durable_content("disk.raw")[:4096] == content[:4096]
        client.good(client.flush())
        assert bench.host.durable_content("disk.raw")[:512] == b"a" * 512


def test_writethrough_export_makes_every_write_durable() -> None:
    with Bench() as bench:
        bench.host.add_file("a.raw", 8192)
        bench.export("a", bench.file("a.raw"), writethrough=True)
        client = bench.client("a")
        client.good(client.write(1, b"durable"))
        assert bench.host.durable_content("a.raw")[1:8] == b"durable"


def test_fast_zero_fails_where_the_file_system_cannot() -> None:
    with Bench() as bench:
        bench.host.add_file("a.raw", b"x" * 8192, can_zero=False)
        bench.export("a", bench.file("a.raw"))
        client = bench.client("a")
        assert client.wait(client.write_zeroes(0, 4096, fast=True)).errno == errno.ENOTSUP
        client.good(client.write_zeroes(0, 4096))
        assert bench.host.content("a.raw") == bytes(4096) + b"x" * 4096


def test_block_status_is_cut_where_it_would_take_too_many_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench() as bench:
        bench.host.add_file("holes.raw", 64 * 4096)
        bench.export("holes", bench.file("holes.raw"))
        client = bench.client("holes")
        for page in range(0, 64, 2):
            client.good(client.write(page * 4096, b"data"))
        (extents,) = client.good(client.block_status(0, 64 * 4096)).extents.values()
        assert len(extents) == 64
        (extents,) = client.good(client.block_status(100, 9999, one=True)).extents.values()
        assert extents == [(3996, 0)]
        monkeypatch.setattr(metadata, "EXTENTS_PER_REPLY_MAX", 10)
        (extents,) = client.good(client.block_status(0, 64 * 4096)).extents.values()
        assert len(extents) == 10
        monkeypatch.setattr(transmission_module, "LOOKS_AT_ONCE_MAX", 15)
        packets = [client._client.block_status(0, 64 * 4096) for _ in range(4)]
        client.send(b"".join(packet for packet, _ in packets))
        bench.host.world.odds = Odds.calm()
        counts = [len(next(iter(client.good(cookie).extents.values()))) for _, cookie in packets]
        assert counts[0] == 10 and counts[-1] == 1  # later ones of a greedy batch get less, but something


# -- ways through the server ------------------------------------------------------------------------------------


def test_mixed_batches_of_cached_and_uncached_reads(seed: int) -> None:
    """One receive brings reads of which some are served at once: neighbours travel as one piece."""
    with Bench(seed, odds=Odds.calm()) as bench:
        content = bench.disk(64 * 4096, cached="explicit")
        for page in range(64):
            if bench.random.random() < 0.5:
                bench.host.load("disk.raw", page * 4096, 4096)
        client = bench.client("disk", structured_replies=seed % 2 == 0)
        cookies = {client.read(page * 4096, 4000): page for page in range(64)}
        transmission = bench.transmission(client)
        most = 0

        def look() -> bool:
            nonlocal most
            most = max(most, transmission.in_flight)
            return not client.in_flight

        bench.until(look, "the answers")
        assert 0 < most < 64
        for completion in client.wait_all():
            offset = cookies[completion.cookie] * 4096
            assert completion.data == content[offset : offset + 4000]
        check_idle(transmission)


def test_aligned_reads_are_placed_so_that_the_data_is_aligned(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench(seed) as bench:
        content = bench.disk(256 * KIB, direct=True)
        client = bench.client("disk", structured_replies=seed % 2 == 0)
        transmission = bench.transmission(client)
        header = transmission._header_size
        seen = 0
        place = replies.place_reads

        def checked(
            reads: list[Request], arena: memoryview, position: int, base: int, structured: bool, alignment: int
        ) -> int:
            nonlocal seen
            end_of_all = place(reads, arena, position, base, structured, alignment)
            end = position
            for request in reads:
                assert alignment == (4096 if reads[0].length >= 4096 else 512)
                assert (request.start + header) % alignment == 0
                assert request.start >= end  # no overlap with the one before, nor with the batch before
                end = request.start + header + request.length
                assert end <= transmission._filled or arena is not transmission._arena.view
                seen += 1
            assert end == end_of_all
            return end

        monkeypatch.setattr(replies, "place_reads", checked)
        asked = {}
        for _ in range(60):
            length = bench.random.choice((512, 1024, 4096, 1, 700))
            offset = bench.random.randrange(0, 256 * KIB - length)
            if length % 512 == 0:
                offset -= offset % 512
            asked[client.read(offset, length)] = (offset, length)
            if bench.random.random() < 0.3:
                bench.context.poll(True)
        for completion in client.wait_all():
            offset, length = asked[completion.cookie]
            assert completion.data == content[offset : offset + length]
        assert seen == 60
        check_idle(transmission)


def test_unaligned_writers_that_wake_each_other(seed: int) -> None:
    """A read-modify-write that ends lets the next one go, while we are submitting: answers come from inside."""
    with Bench(seed, odds=Odds(at_once=0.5)) as bench:
        bench.host.network.buffer_bytes = 3000
        content = bench.disk(64 * KIB, direct=True)
        clients = [bench.client("disk"), bench.client("disk", structured_replies=False)]
        for number in range(150):
            client = clients[number % 2]
            start = (number * 389) % (62 * KIB)
            data = bench.random.randbytes(bench.random.choice((1, 100, 389)))
            content[start : start + len(data)] = data
            client.write(start, data)
            client.flush()
            if bench.random.random() < 0.2:
                bench.context.poll(True)
            if number % 50 == 49:
                for each in clients:
                    each.wait_all()
        for each in clients:
            assert all(completion.error == 0 for completion in each.wait_all())
            check_idle(bench.transmission(each))
        assert bench.host.content("disk.raw") == content


@pytest.mark.parametrize("length", [1 * MIB - 1, 1 * MIB, 5 * MIB, 32 * MIB])
@pytest.mark.parametrize("cached", ["always", "never"])
def test_writes_larger_than_the_receive_buffer(length: int, cached: str) -> None:
    with Bench(length) as bench:
        bench.host.network.buffer_bytes = 1 << 20
        bench.host.add_file("a.raw", 33 * MIB, cached=cached)
        bench.export("a", bench.file("a.raw"))
        client = bench.client("a")
        client.packet_max = 3 * MIB
        data = bench.random.randbytes(MIB)
        data = (data * 33)[:length]
        first = client.write(0, b"small")
        large = client.write(777, data)
        again = client.write(777, data)
        last = client.write(33 * MIB - 4, b"tail")
        for cookie in (first, large, again, last):
            client.good(cookie)
        assert bench.host.content("a.raw")[777 : 777 + length] == data
        client.good(client.flush())
        transmission = bench.transmission(client)
        client.good(client.write(0, b"x"))
        check_idle(transmission)
        for _ in range(50):  # small requests do not keep the large buffer for ever
            client.good(client.write(0, bytes(900 * KIB)))
        assert transmission._input.size <= 4 * MIB


def test_payloads_cut_anywhere(seed: int) -> None:
    cut = (1, 2, 27, 28, 29, 100, 555, 4096)[seed % 8]
    with Bench(seed) as bench:
        bench.host.network.buffer_bytes = bench.random.choice((cut, 4 * cut, 200_000))
        content = bench.disk(4096)
        client = bench.client("disk")
        client.packet_max = cut
        count = 10 if cut > 20 else 2
        for _ in range(count):
            start, length = bench.random.randrange(3000), bench.random.randrange(1, 1000)
            data = bench.random.randbytes(length)
            content[start : start + length] = data
            client.good(client.write(start, data))
            assert client.good(client.read(0, 4096)).data == content


def test_input_buffer_turns_over_while_writes_are_pending(seed: int) -> None:
    """Pending writes point into the receive buffer; what comes after them needs another one."""
    with Bench(seed, odds=Odds.calm()) as bench:
        bench.host.network.buffer_bytes = 1 << 20
        bench.host.add_file("a.raw", 4 * MIB, cached="never")
        bench.export("a", bench.file("a.raw"))
        client = bench.client("a")
        fault = bench.host.fault(path="a.raw", op=WRITE, hold=True)
        content = bytearray(4 * MIB)
        for number in range(60):
            data = bench.random.randbytes(60_000)
            content[number * 64 * KIB : number * 64 * KIB + 60_000] = data
            client.write(number * 64 * KIB, data)
        transmission = bench.transmission(client)
        bench.until(lambda: transmission.in_flight == 60, "all writes to be in the engine")
        assert transmission._buffers.used_bytes > 4 * MIB
        fault.remove()
        assert all(completion.error == 0 for completion in client.wait_all())
        assert bench.host.content("a.raw") == content
        check_idle(transmission)


def test_many_requests_beyond_the_bounds_are_all_served() -> None:
    """More in flight than the server takes at a time: it stops reading and goes on by itself."""
    with Bench(odds=Odds.calm()) as bench:
        content = bench.disk(64 * KIB, cached="never")
        client = bench.client("disk")
        transmission = bench.transmission(client)
        most = 0

        def look() -> bool:
            nonlocal most
            most = max(most, transmission.in_flight)
            return not client.in_flight

        cookies = {client.read(number % 4096, 16): number % 4096 for number in range(3000)}
        bench.until(look, "all answers")
        assert most == transmission_module.REQUESTS_IN_FLIGHT_MAX
        for completion in client.wait_all():
            start = cookies[completion.cookie]
            assert completion.data == content[start : start + 16]


def test_requests_whose_result_is_known_before_they_are_told(seed: int) -> None:
    """More than the engine collects before it starts: some are finished before submit returns, yet pending."""
    with Bench(seed, odds=Odds(at_once=0.5, short_recv=0.0, short_send=0.0)) as bench:
        content = bench.disk(64 * KIB, cached="never")
        client = bench.client("disk", structured_replies=seed % 2 == 0)
        for number in range(150):
            client.write(number * 16, bytes([number]))
            content[number * 16] = number
        assert all(completion.error == 0 for completion in client.wait_all())
        cookies = {client.read(number % 4096, 16): number % 4096 for number in range(400)}
        for completion in client.wait_all():
            start = cookies[completion.cookie]
            assert completion.data == content[start : start + 16]
        check_idle(bench.transmission(client))


def test_bytes_in_flight_are_bounded_and_large_reads_all_served() -> None:
    with Bench(odds=Odds.calm()) as bench:
        bench.host.network.buffer_bytes = 8 * MIB
        bench.host.add_file("a.raw", 32 * MIB, cached="never")
        bench.export("a", bench.file("a.raw"))
        client = bench.client("a")
        transmission = bench.transmission(client)
        fault = bench.host.fault(path="a.raw", op=READ, hold=True)
        for _ in range(6):
            client.read(0, 20 * MIB)
        bench.until(lambda: transmission._bytes_in_flight >= transmission_module.BYTES_IN_FLIGHT_MAX, "the bound")
        for _ in range(20):
            bench.context.poll(False)
        assert transmission._bytes_in_flight == 80 * MIB
        assert transmission.in_flight == 4
        fault.remove()
        assert all(completion.error == 0 for completion in client.wait_all())


@pytest.mark.parametrize("latency_ns", [0, 1000])
def test_arenas_that_are_given_back_are_really_free(latency_ns: int) -> None:
    """Requests wait for their next use with views of the memory they had; those may not keep it."""
    with Bench(odds=Odds.calm()) as bench:
        bench.host.network.buffer_bytes = 64 * MIB
        bench.host.add_file("a.raw", 32 * MIB, cached="never" if latency_ns else "always")
        bench.export("a", bench.file("a.raw"))
        client = bench.client("a")
        transmission = bench.transmission(client)
        bench.exports[0].backend.file_range = lambda offset, length: None  # type: ignore[method-assign]
        for _ in range(3):
            for _ in range(4):
                client.read(0, 9 * MIB)
            client.wait_all()
        client.good(client.flush())  # the batch before may stay until the next one
        check_idle(transmission)
        assert transmission.held_bytes <= 12 * MIB
        kept = {id(b.view.obj) for b in (transmission._input, transmission._arena, *transmission._buffers._free)}
        freed = [memory for memory in bench.host.memories if id(memory) not in kept]
        assert bool(freed) == bool(latency_ns)  # one after the other they need only one
        for memory in freed:
            memory.clear()  # BufferError: somebody has a view of it


# -- turns ------------------------------------------------------------------------------------------------------


def test_greedy_client_does_not_keep_the_others_waiting() -> None:
    """It asks for a lot that could be had at once and takes all of it: others have their turn nevertheless."""
    with Bench(odds=Odds.calm()) as bench:
        bench.host.network.buffer_bytes = 1 << 30
        bench.host.add_file("a.raw", 4 * MIB, cached="always")
        bench.export("a", bench.file("a.raw"))
        greedy, modest = bench.client("a"), bench.client("a")
        requests = 1000
        greedy.pause()
        greedy.packet_max = 1 << 30
        for _ in range(requests):
            greedy.read(0, 60 * KIB)
        per_batch = PARSE_BYTES_MAX // (60 * KIB)
        statistics = bench.exports[0].statistics
        turns = 0
        while statistics.reads < requests:
            before = statistics.reads
            bench.context.poll(True)
            served = statistics.reads - before
            assert served <= BATCHES_AT_ONCE * per_batch
            turns += served > 0
        assert turns >= requests // (BATCHES_AT_ONCE * per_batch)
        greedy.resume()
        assert len(greedy.wait_all()) == requests
        modest.good(modest.read(0, 1))


# -- drain ------------------------------------------------------------------------------------------------------


def test_requests_parked_by_a_drain_go_on_afterwards(seed: int) -> None:
    with Bench(seed) as bench:
        content = bench.disk(64 * KIB)
        clients = [bench.client("disk"), bench.client("disk", structured_replies=False)]
        node = bench.graph.find(bench.exports[0].node_name)
        with bench.graph.drained(node):
            cookies = []
            for client in clients:
                cookies.append((client, client.read(100, 5000)))
                client.flush()
            write = clients[0].write(60_000, b"parked")
            for _ in range(50):
                bench.context.poll(False)
            assert [client.in_flight for client in clients] == [3, 2]
            assert bench.exports[0].backend.statistics().parked == 5
            assert [bench.transmission(client).in_flight for client in clients] == [3, 2]
            assert bench.context.engine.in_flight == 0
        for client, cookie in cookies:
            assert client.good(cookie).data == content[100:5100]
        clients[0].good(write)
        for client in clients:
            client.wait_all()
            check_idle(bench.transmission(client))


def test_client_that_vanishes_while_its_requests_are_parked(seed: int) -> None:
    with Bench(seed) as bench:
        bench.disk(64 * KIB)
        client, other = bench.client("disk"), bench.client("disk")
        node = bench.graph.find(bench.exports[0].node_name)
        with bench.graph.drained(node):
            client.read(0, 9000)
            client.write(9000, bytes(9000))
            kept = other.read(5, 5)
            transmission = bench.transmission(client)
            bench.until(lambda: transmission.in_flight == 2, "two requests to be parked")
            client.close()
            bench.until(lambda: transmission._connection.closed, "the end to be seen")
            assert len(bench.exports[0].connections) == 2  # it still has requests below
        other.good(kept)
        bench.until(lambda: len(bench.exports[0].connections) == 1, "the connection to be forgotten")


def test_goodbye_with_requests_in_flight_is_answered_first(seed: int) -> None:
    """DISC behind requests that have to wait, to a client that reads slowly: all answers, then the end."""
    with Bench(seed) as bench:
        bench.host.network.buffer_bytes = 2000
        content = bench.disk(64 * KIB, cached="random")
        client = bench.client("disk")
        cookies = {client.read(number * 5000, 5000): number * 5000 for number in range(12)}
        client.flush()
        client.disconnect()
        client.pause()
        for _ in range(100):
            bench.context.poll(False)
            bench.host.advance(100_000)
        assert bench.server.connections
        client.resume()
        client.wait_end()
        assert client.in_flight == 0 and not client.reset
        for cookie, offset in cookies.items():
            assert client.done[cookie].data == content[offset : offset + 5000]
        assert not bench.log
        bench.until(lambda: not bench.server.connections, "the connection to be forgotten")


def test_nothing_behind_a_goodbye_is_served() -> None:
    with Bench() as bench:
        content = bytes(bench.disk(4096))
        client = bench.client("disk")
        packet, _ = client._client.write(0, b"too late")
        client.send(client._client.disconnect() + packet)
        client.wait_end()
        assert bench.host.content("disk.raw") == content


# -- clients and exports ----------------------------------------------------------------------------------------


def test_clients_of_several_exports_at_once(seed: int) -> None:
    with Bench(seed, address=INET) as bench:
        contents = {name: bench.disk(32 * KIB, name=name) for name in ("a", "b")}
        pairs = [(name, bench.client(name)) for name in ("a", "b") for _ in range(3)]
        for turn in range(20):
            name, client = pairs[turn % len(pairs)]
            data = bench.random.randbytes(300)
            contents[name][turn * 1000 : turn * 1000 + 300] = data
            client.write(turn * 1000, data)
        for _, client in pairs:
            client.wait_all()
        for name, client in pairs:
            assert client.good(client.read(0, 32 * KIB)).data == contents[name]


def test_statistics_count_what_was_asked(seed: int) -> None:
    with Bench(seed) as bench:
        bench.disk(64 * KIB)
        client = bench.client("disk")
        for number in range(30):
            client.read(number * 100, 100)
            client.write(number * 100, bytes(50))
            client.flush()
            if bench.random.random() < 0.3:
                bench.context.poll(True)
        bad = client.read(64 * KIB, 1)
        client.wait_all()
        assert bad not in client.done
        statistics = bench.exports[0].statistics
        assert (statistics.reads, statistics.read_bytes) == (30, 3000)
        assert (statistics.writes, statistics.write_bytes) == (30, 1500)
        assert (statistics.others, statistics.rejected, statistics.failed) == (30, 1, 0)
        assert statistics.answered == 90
        assert statistics.latency_ns >= 0


def test_a_whole_run_repeats_under_its_seed(seed: int) -> None:
    def run() -> list[tuple[object, ...]]:
        with Bench(seed) as bench:
            bench.host.world.trace = deque()
            bench.disk(64 * KIB)
            client = bench.client("disk")
            for number in range(20):
                client.read(number * 1000, 2000)
                client.write(number * 3000, bytes(100))
            client.wait_all()
            return bench.host.trace

    assert run() == run()
