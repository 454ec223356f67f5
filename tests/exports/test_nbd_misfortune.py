# SPDX-License-Identifier: Apache-2.0
"""Clients who lie, stall, flood or vanish, and disks that fail: each is told, or sent away; nobody else notices."""

from __future__ import annotations

import errno
import struct

import pytest

from bottomhalf.exports.nbd.buffers import BUFFER_BYTES, KEPT_BYTES_MAX
from bottomhalf.exports.nbd.transmission import (
    ARENA_BYTES_MAX,
    BYTES_IN_FLIGHT_MAX,
    PARSE_BYTES_MAX,
    REQUESTS_IN_FLIGHT_MAX,
    UNSENT_BYTES_MAX,
)
from bottomhalf.host.request import FLUSH, READ, WRITE, WRITE_ZEROES
from bottomhalf.host.sim import Odds
from bottomhalf.wire.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    MAX_REQUEST,
)
from tests.exports.nbd_bench import INET, UNIX, Bench, Peer, check_idle
from tests.wire.nbd.nbd_model import request

KIB = 1 << 10
MIB = 1 << 20


def ask_raw(peer: Peer, command: int, offset: int, length: int, flags: int = 0, data: bytes = b"") -> int:
    """Send what no honest client would; returns the cookie."""
    packet, cookie = peer._client._request(command, flags, offset, length)
    peer.send(packet + data)
    return cookie


# -- bad requests -----------------------------------------------------------------------------------------------


def test_wrong_request_magic_ends_that_connection_after_earlier_requests(seed: int) -> None:
    with Bench(seed) as bench:
        content = bench.disk(64 * KIB)
        bad, good = bench.client("disk"), bench.client("disk")
        first = bad.read(100, 5000)
        second = bad.flush()
        bad.send(b"\x25\x60\x95\x14" + bytes(24) + request(CMD_WRITE, 9, 0, 4, data=b"evil"))
        bad.wait_end()
        assert bad.done[first].data == content[100:5100]
        assert bad.done[second].error == 0
        assert len(bench.log) == 1 and "bad magic of an NBD request" in bench.log[0]
        assert good.good(good.read(0, 64 * KIB)).data == content


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_requests_beyond_the_end_are_refused_one_by_one(seed: int, structured: bool) -> None:
    with Bench(seed) as bench:
        content = bench.disk(8192)
        client = bench.client("disk", structured_replies=structured)
        bad = [
            client.read(8191, 2),
            client.read((1 << 64) - 1, 1),
            client.write(8000, bytes(193)),
            client.trim(0, 8193),
            client.write_zeroes(8192, 1),
            client.cache(8192, 1),
        ]
        last = client.read(8191, 1)
        for cookie in bad:
            completion = client.wait(cookie)
            assert completion.errno == errno.EINVAL
            assert not structured or "past the end" in completion.text
        assert client.good(last).data == content[-1:]
        assert bench.exports[0].statistics.rejected == len(bad)
        assert bench.host.content("disk.raw") == content


def test_unknown_command_is_refused_and_the_connection_lives() -> None:
    with Bench() as bench:
        content = bench.disk(4096)
        client = bench.client("disk")
        completion = client.wait(ask_raw(client, 99, 0, 512))
        assert completion.errno == errno.EINVAL and "unknown command 99" in completion.text
        assert client.good(client.read(0, 4096)).data == content


def test_unknown_flags_are_refused_and_the_connection_lives() -> None:
    with Bench() as bench:
        content = bench.disk(4096)
        client = bench.client("disk")
        for command in (CMD_READ, CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE, CMD_BLOCK_STATUS):
            completion = client.wait(ask_raw(client, command, 0, 512, 0x8000))
            assert completion.errno == errno.EINVAL and "flags 0x8000" in completion.text
        completion = client.wait(ask_raw(client, CMD_WRITE, 0, 512, 0x8000, bytes(512)))
        assert completion.errno == errno.EINVAL
        assert client.good(client.read(0, 4096)).data == content


def test_refused_write_is_read_away_however_it_is_cut(seed: int) -> None:
    """The payload of a write that is refused looks like a request, and must not be taken for one."""
    with Bench(seed) as bench:
        bench.host.network.buffer_bytes = 100 + seed
        content = bench.disk(8192)
        client = bench.client("disk")
        client.packet_max = 17 + seed
        evil = request(CMD_WRITE, 1234, 0, 4, data=b"evil")
        refused = client.write(8192, evil * 100)
        assert client.wait(refused).errno == errno.EINVAL
        assert client.good(client.read(0, 8192)).data == content


@pytest.mark.parametrize("command", [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES])
def test_changes_to_a_read_only_export_are_refused(command: int) -> None:
    with Bench() as bench:
        bench.host.add_file("a.raw", b"x" * 4096)
        bench.export("a", bench.file("a.raw", read_only=True), writable=False)
        client = bench.client("a")
        data = b"y" * 512 if command == CMD_WRITE else b""
        completion = client.wait(ask_raw(client, command, 0, 512, data=data))
        assert completion.errno == errno.EINVAL and "read-only" in completion.text
        client.good(client.flush())
        assert client.good(client.read(0, 4096)).data == b"x" * 4096


def test_write_with_a_length_that_lies_ends_the_connection() -> None:
    with Bench() as bench:
        content = bench.disk(4096)
        client, other = bench.client("disk"), bench.client("disk")
        ask_raw(client, CMD_WRITE, 0, 0xFFFFFFFF)
        client.wait_end()
        assert len(bench.log) == 1 and "too large" in bench.log[0]
        assert other.good(other.read(0, 4096)).data == content


def test_read_with_a_length_that_lies_is_refused_without_memory_for_it() -> None:
    with Bench() as bench:
        bench.disk(4096)
        client = bench.client("disk")
        for length in (MAX_REQUEST + 1, 0xFFFFFFFF):
            assert client.wait(ask_raw(client, CMD_READ, 0, length)).errno == errno.EINVAL
        assert bench.transmission(client).held_bytes == 2 * BUFFER_BYTES


def test_block_status_without_a_context_is_refused() -> None:
    with Bench() as bench:
        bench.disk(4096)
        client = bench.client("disk", contexts=())
        completion = client.wait(client.block_status(0, 512))
        assert completion.errno == errno.EINVAL and "no metadata context" in completion.text


def test_garbage_after_the_handshake(seed: int) -> None:
    with Bench(seed) as bench:
        content = bench.disk(4096)
        for _ in range(5):
            bad = bench.client("disk")
            bad.send(bench.random.randbytes(bench.random.randrange(28, 2000)))
            bad.wait_end()
        good = bench.client("disk")
        assert good.good(good.read(0, 4096)).data == content
        bench.until(lambda: len(bench.server.connections) == 1, "the others to be forgotten")


# -- clients that do not read -----------------------------------------------------------------------------------


def test_client_that_never_reads_is_bounded_and_others_are_not_disturbed(seed: int) -> None:
    with Bench(seed, address=(UNIX, INET)[seed % 2]) as bench:
        content = bench.disk(MIB, cached=("always", "random")[seed // 2 % 2])
        bench.host.network.buffer_bytes = 20_000
        lazy, other = bench.client("disk"), bench.client("disk")
        lazy.pause()
        asked = {}
        for _ in range(1500):
            length = bench.random.choice((1, 4096, 20_000))
            offset = bench.random.randrange(MIB - length)
            asked[lazy.read(offset, length)] = (offset, length)
        transmission = bench.transmission(lazy)
        for start in range(150):
            assert other.good(other.read(start, 4000)).data == content[start : start + 4000]
            assert transmission.in_flight <= REQUESTS_IN_FLIGHT_MAX
            assert transmission._bytes_in_flight < BYTES_IN_FLIGHT_MAX + MAX_REQUEST
            assert transmission.output.unsent_bytes < UNSENT_BYTES_MAX + BYTES_IN_FLIGHT_MAX
            assert transmission._buffers.used_bytes < ARENA_BYTES_MAX
            assert transmission.held_bytes < ARENA_BYTES_MAX + KEPT_BYTES_MAX
        assert not transmission.has_room and not transmission.wants_input
        assert bench.connection(lazy)._watched[0] is None  # we do not even look what it sends
        lazy.resume()
        for completion in lazy.wait_all():
            offset, length = asked.pop(completion.cookie)
            assert completion.data == content[offset : offset + length]
        assert not asked
        check_idle(transmission)


def test_client_that_asks_for_little_and_never_reads_holds_little() -> None:
    """One byte at a time, each request for itself: no reply may hold an arena of its own."""
    with Bench(odds=Odds.calm()) as bench:
        content = bench.disk(64 * KIB, cached="always")
        bench.host.network.buffer_bytes = 300
        lazy = bench.client("disk")
        lazy.pause()
        transmission = bench.transmission(lazy)
        for number in range(3000):
            lazy.read(number, 1)
            bench.context.poll(False)
            bench.context.poll(False)
        assert transmission.output.unsent_bytes > 80_000
        assert transmission.held_bytes <= 3 * BUFFER_BYTES
        lazy.resume()
        assert [completion.data for completion in lazy.wait_all()] == [content[n : n + 1] for n in range(3000)]
        check_idle(transmission)


def test_arenas_that_one_small_request_holds_each_are_bounded() -> None:
    """Between requests that take for ever a client has much served at once: every arena keeps a little of it."""
    with Bench(odds=Odds.calm()) as bench:
        size = 4 * MIB
        bench.host.network.buffer_bytes = 4 * MIB
        bench.host.add_file("a.raw", size, cached="explicit")
        bench.export("a", bench.file("a.raw"))
        bench.host.load("a.raw", 0, MIB)
        bench.host.fault(path="a.raw", op=READ, start=2 * MIB, hold=True)
        client = bench.client("a")
        transmission = bench.transmission(client)
        most = 0
        turns = 400
        for _ in range(turns):
            for _ in range(20):
                client.read(0, 50_000)
            client.read(3 * MIB, 1)
        while client.unsent or most < transmission._buffers.used_bytes:
            before = (client.unsent, len(client.done))
            most = max(most, transmission._buffers.used_bytes)
            for _ in range(20):
                bench.context.poll(False)
            if before == (client.unsent, len(client.done)):
                break
        assert transmission.in_flight > 50
        assert ARENA_BYTES_MAX // 2 < most <= ARENA_BYTES_MAX + 2 * BUFFER_BYTES
        assert not transmission.has_room
        fault = bench.host.faults.rules[0]
        fault.remove()
        assert len(client.wait_all()) == turns * 21
        check_idle(transmission)


def test_client_that_reads_on_after_a_pause_gets_everything_without_another_event(seed: int) -> None:
    """Requests that were received but not served for want of room are served when there is room, though the
    socket brings nothing new."""
    with Bench(seed, odds=Odds.calm()) as bench:
        bench.host.network.buffer_bytes = MIB
        content = bench.disk(256 * KIB, cached="always")
        client = bench.client("disk", structured_replies=seed % 2 == 0)
        client.pause()
        cookies = [client.read(number, 60 * KIB) for number in range(200)]
        for _ in range(200):
            bench.context.poll(False)
        transmission = bench.transmission(client)
        assert not transmission.has_room and not client.unsent
        assert transmission._end > transmission._start  # it lies here, not in the socket
        client.resume()
        for number, cookie in enumerate(cookies):
            assert client.good(cookie).data == content[number : number + 60 * KIB]


def test_broken_client_that_never_reads_gets_no_more_than_it_takes() -> None:
    """A protocol error behind a full socket: the answers before it stay until it reads or goes."""
    with Bench() as bench:
        bench.host.network.buffer_bytes = 1000
        bench.disk(64 * KIB, cached="always")
        client = bench.client("disk")
        client.pause()
        cookie = client.read(0, 50_000)
        client.send(bytes(100))
        for _ in range(100):
            bench.context.poll(False)
        assert len(bench.server.connections) == 1
        client.resume()
        client.wait_end()
        assert client.done[cookie].error == 0
        bench.until(lambda: not bench.server.connections, "the end")


# -- clients that vanish ----------------------------------------------------------------------------------------


def test_client_that_vanishes_before_its_payload_is_complete(seed: int) -> None:
    with Bench(seed) as bench:
        content = bytes(bench.disk(64 * KIB))
        for length in (0, 1, 100, 39_999):
            client = bench.client("disk")
            packet, _ = client._client.write_header(0, 40_000)
            client.send(packet + bytes(length))
            bench.until(lambda client=client: not client.unsent, "the bytes to leave")  # type: ignore[misc]
            client.close()
        bench.until(lambda: not bench.server.connections, "the connections to be forgotten")
        assert bench.host.content("disk.raw") == content


def test_client_that_vanishes_with_requests_in_flight(seed: int) -> None:
    """Completions go into the void, memory is given back only when nobody writes into it, drain does not hang."""
    with Bench(seed, address=(UNIX, INET)[seed % 2]) as bench:
        bench.disk(64 * KIB, cached="never")
        bench.host.fault(path="disk.raw", hold=True)
        fault = bench.host.faults.rules[0]
        client, other = bench.client("disk"), bench.client("disk")
        for number in range(10):
            client.read(number * 100, 5000)
            client.write(60_000 + number, b"x")
            client.flush()
            client.write_zeroes(number * 512, 512)
        transmission = bench.transmission(client)
        bench.until(lambda: transmission.in_flight == 40, "all requests to be in flight")
        if seed % 3 == 0:
            bench.host.cut(client.socket)
        client.close()
        connection = transmission._connection
        bench.until(lambda: connection.closed, "the end to be seen")
        assert connection in bench.server.connections and transmission._buffers.used_bytes
        fault.remove()
        node = bench.graph.find(bench.exports[0].node_name)
        with bench.graph.drained(node):
            assert transmission.in_flight == 0
            assert connection not in bench.server.connections
            assert transmission.held_bytes == 0
        other.good(other.read(0, 64 * KIB))


def test_clients_that_vanish_at_any_moment(seed: int) -> None:
    with Bench(seed) as bench:
        bench.host.network.buffer_bytes = bench.random.choice((500, 10_000, 212_992))
        bench.disk(256 * KIB, direct=seed % 3 == 0)
        for _ in range(12):
            client = bench.client("disk", structured_replies=bench.random.random() < 0.5)
            for _ in range(bench.random.randrange(30)):
                offset = bench.random.randrange(100_000)
                ask = bench.random.randrange(4)
                if ask == 0:
                    client.write(offset, bytes(bench.random.randrange(1, 5000)))
                elif ask == 1:
                    client.flush()
                else:
                    client.read(offset, bench.random.choice((1, 512, 4096, 100_000)))
            for _ in range(bench.random.randrange(20)):
                bench.context.poll(False)
                if bench.random.random() < 0.3:
                    bench.host.advance(50_000)
            if bench.random.random() < 0.5:
                bench.host.cut(client.socket)
            client.close()
        bench.until(lambda: not bench.server.connections, "all to be forgotten")
        backend = bench.exports[0].backend.statistics()
        assert backend.in_flight == backend.parked == 0


def test_connection_that_breaks_while_completions_are_answered(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several arenas' reads complete together; sending the first reply fails: the rest must be given back too."""
    with Bench(seed, odds=Odds(coalesce=1.0, at_once=0.0)) as bench:
        bench.disk(256 * KIB, cached="never")
        client = bench.client("disk")
        transmission = bench.transmission(client)
        bench.host.fault(path="disk.raw", op=READ, hold=True)
        fault = bench.host.faults.rules[0]
        for count in range(1, 6):
            client.read(0, 200 * KIB)
            client.read(3, 3)
            count_now = 2 * count
            bench.until(lambda: transmission.in_flight >= count_now, "two more in flight")  # noqa: B023
        assert transmission._arena.users > 1

        def broken(data: object) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        socket = bench.connection(client).socket
        monkeypatch.setattr(socket, "send", broken)
        monkeypatch.setattr(socket, "sendmsg", broken)
        fault.remove()
        bench.until(lambda: not bench.server.connections, "the connection to be forgotten")
        assert transmission.held_bytes == 0 and transmission._buffers.used_bytes == 0
        assert len(bench.log) == 1


# -- disks that fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_full_disk_is_told_to_the_client_that_wrote(seed: int, structured: bool) -> None:
    with Bench(seed) as bench:
        bench.host.add_file("a.raw", 256 * KIB)
        bench.export("a", bench.file("a.raw"))
        bench.host.disk_free_bytes = 8192
        client, other = bench.client("a", structured_replies=structured), bench.client("a")
        client.good(client.write(0, bytes(4096)))
        failed = client.write(64 * KIB, bytes(20_000))
        read = other.read(0, 512)
        completion = client.wait(failed)
        assert completion.errno == errno.ENOSPC
        assert not structured or completion.text == "no space left on the server's disk"
        other.good(read)
        bench.host.disk_free_bytes = None
        client.good(client.write(64 * KIB, bytes(20_000)))
        assert bench.exports[0].statistics.failed == 1


@pytest.mark.parametrize("op", [READ, WRITE, FLUSH, WRITE_ZEROES])
def test_io_error_is_told_and_the_connection_lives(seed: int, op: int) -> None:
    with Bench(seed, odds=Odds(at_once=0.3)) as bench:
        bench.disk(64 * KIB)
        client = bench.client("disk", structured_replies=seed % 2 == 0)
        asks = {
            READ: lambda: client.read(100, 5000),
            WRITE: lambda: client.write(100, bytes(5000)),
            FLUSH: client.flush,
            WRITE_ZEROES: lambda: client.write_zeroes(0, 4096),
        }
        client.good(client.write(0, bytes(512)))  # or a flush would have nothing to do
        bench.host.fault(path="disk.raw", op=op, errno=errno.EIO, times=1)
        cookie = asks[op]()
        others = [ask() for other, ask in asks.items() if other != op]
        completion = client.wait(cookie)
        assert completion.errno == errno.EIO
        assert completion.text == ("input/output error on the server" if seed % 2 == 0 else "")
        for other in others:
            client.good(other)
        client.good(asks[op]())
        check_idle(bench.transmission(client))


def test_errors_in_the_middle_of_a_batch_of_reads(seed: int) -> None:
    """Replies before and behind a failed read in the same arena stay whole."""
    with Bench(seed) as bench:
        content = bench.disk(64 * 4096, direct=seed % 4 == 3)
        for page in (3, 4, 10, 63):
            bench.host.fault(path="disk.raw", op=READ, errno=errno.EIO, start=page * 4096, end=(page + 1) * 4096)
        client = bench.client("disk", structured_replies=seed % 2 == 0)
        cookies = [client.read(page * 4096, 4096) for page in range(64)]
        for page, cookie in enumerate(cookies):
            completion = client.wait(cookie)
            if page in (3, 4, 10, 63):
                assert completion.errno == errno.EIO
            else:
                assert completion.data == content[page * 4096 : (page + 1) * 4096]
        check_idle(bench.transmission(client))


def test_constants_fit_each_other() -> None:
    """A batch's replies fit into an ordinary arena, and the bounds leave room to go on."""
    assert PARSE_BYTES_MAX + REQUESTS_IN_FLIGHT_MAX * 28 <= BUFFER_BYTES
    assert ARENA_BYTES_MAX > MAX_REQUEST + 4 * BUFFER_BYTES
    assert struct.calcsize(">IHHQQI") == 28
