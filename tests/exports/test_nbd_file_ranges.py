# SPDX-License-Identifier: Apache-2.0
"""Reads that the server does not copy: sent from the file, or from the page cache through a mapping."""

from __future__ import annotations

import errno

import pytest

from bottomhalf.exports.nbd.output import _FileRange
from bottomhalf.host.protocol import File
from bottomhalf.host.request import READ, Request
from bottomhalf.host.sim.files import SimFile
from tests.exports.nbd_bench import Bench, Peer, check_idle

KIB = 1 << 10


def file_ranges(bench: Bench, peer: Peer) -> list[_FileRange]:
    """What of a file waits to be sent to a client."""
    return [piece for piece, _ in bench.connection(peer).output._pieces if isinstance(piece, _FileRange)]


# -- sendfile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_large_cached_reads_are_sent_from_the_file(
    seed: int, structured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(seed) as bench:
        content = bench.disk(1 << 20, cached="explicit")
        bench.host.load("disk.raw", 0, 512 * KIB)
        bench.host.network.buffer_bytes = bench.random.choice((900, 50_000, 212_992))
        client = bench.client("disk", structured_replies=structured)
        sent = []
        server_socket = bench.connection(client).socket
        send_file = server_socket.send_file

        def counted(file: File, offset: int, count: int) -> int:
            sent.append(send_file(file, offset, count))
            return sent[-1]

        monkeypatch.setattr(server_socket, "send_file", counted)
        for offset, length, is_sent in (
            (0, 64 * KIB, True),
            (1, 200_000, True),
            (100_000, 65_535, False),  # too small
            (480 * KIB, 64 * KIB, False),  # not all in memory
            (512 * KIB - 70_000, 70_000, True),
        ):
            assert client.good(client.read(offset, length)).data == content[offset : offset + length]
            assert sum(sent) == (length if is_sent else 0)
            sent.clear()
        assert bench.exports[0].backend.statistics().operations[READ] == 5
        assert bench.exports[0].statistics.reads == 5
        check_idle(bench.transmission(client))


def test_drain_does_not_wait_for_a_slow_client_of_a_file_range(seed: int) -> None:
    with Bench(seed) as bench:
        content = bench.disk(1 << 20, cached="always")
        bench.host.network.buffer_bytes = 5000
        client, other = bench.client("disk"), bench.client("disk")
        node = bench.graph.find(bench.exports[0].node_name)
        client.pause()
        cookies = [client.read(3, 300_000), client.read(300_000, 300_000), client.read(10, 10)]
        bench.until(lambda: file_ranges(bench, client), "a range of the file to wait")
        for _ in range(bench.random.randrange(5)):
            bench.context.poll(False)
        before = bench.connection(client).output.unsent_bytes
        with bench.graph.drained(node):
            assert not file_ranges(bench, client)
            assert bench.connection(client).output.unsent_bytes == before
            # The disk belongs to whoever drains it: what he does to it, the client must not see; but what the socket
            # has taken already it shares with the file, and a read that is not over may see a write.
            bench.host.disk.files["disk.raw"].write(0, bytes(1 << 20), True)
        client.resume()
        started = client.good(cookies[0]).data
        assert started[5000:] == content[5003:300_003]
        assert all(now in (0, was) for now, was in zip(started[:5000], content[3:], strict=False))
        for cookie in cookies[1:]:
            client.good(cookie)
        other.good(other.read(0, 100_000))
        check_idle(bench.transmission(client))


def test_file_truncated_while_a_range_waits_ends_that_connection_only(seed: int) -> None:
    with Bench(seed) as bench:
        content = bench.disk(1 << 20, cached="always")
        bench.host.network.buffer_bytes = 5000
        client, other = bench.client("disk"), bench.client("disk")
        client.pause()
        client.read(500_000, 300_000)
        bench.until(lambda: file_ranges(bench, client), "a range of the file to wait")
        bench.host.disk.files["disk.raw"].resize(600_000)
        client.resume()
        client.wait_end()
        assert any("became shorter" in line for line in bench.log)
        assert client.in_flight == 1
        assert other.good(other.read(0, 100_000)).data == content[:100_000]
        assert other.good(other.read(599_000, 60_000)).data == content[599_000:600_000] + bytes(59_000)


def test_file_unreadable_while_a_range_waits_ends_that_connection_only(seed: int) -> None:
    with Bench(seed) as bench:
        bench.disk(1 << 20, cached="always")
        bench.host.network.buffer_bytes = 5000
        client, other = bench.client("disk"), bench.client("disk")
        client.pause()
        client.read(500_000, 300_000)
        bench.until(lambda: file_ranges(bench, client), "a range of the file to wait")
        fault = bench.host.fault(path="disk.raw", op=READ, errno=errno.EIO)
        client.resume()
        client.wait_end()
        assert any("connection lost" in line for line in bench.log)
        assert other.wait(other.read(0, 10)).errno == errno.EIO
        fault.remove()
        other.good(other.read(0, 100_000))


def test_drain_survives_a_file_range_that_cannot_be_read(seed: int) -> None:
    """The bytes were promised; now they cannot be had. The client pays, not whoever drains."""
    with Bench(seed) as bench:
        bench.disk(1 << 20, cached="always")
        bench.host.network.buffer_bytes = 5000
        clients = [bench.client("disk") for _ in range(3)]
        for client in clients:
            client.pause()
            client.read(500_000, 300_000)
        bench.until(lambda: all(file_ranges(bench, client) for client in clients), "ranges to wait")
        fault = bench.host.fault(path="disk.raw", op=READ, errno=errno.EIO, times=2)
        node = bench.graph.find(bench.exports[0].node_name)
        with bench.graph.drained(node):
            assert len(bench.exports[0].connections) == 1
            assert not file_ranges(bench, next(c for c in clients if not c.socket.peer.closed))
        fault.remove()
        assert node.quiesce_counter == 0
        for client in clients:
            client.resume()
        bench.until(lambda: sum(client.ended for client in clients) == 2, "two connections to end")
        (last,) = (client for client in clients if not client.ended)
        last.wait_all()


# -- replies that point at the page cache -----------------------------------------------------------------------


def test_mapped_reads_are_answered_whole_whatever_the_socket_takes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that maps the file: headers and the page cache's bytes leave together, the rest is copied."""

    def map_reads(self: SimFile, requests: list[Request], offsets: list[int]) -> bool:
        for request, start in zip(requests, offsets, strict=True):
            request.buffer = memoryview(self.inode.current.read(start, request.length))
        return self.world.disk.random() < 0.8

    monkeypatch.setattr(SimFile, "map_reads", map_reads)
    with Bench(seed) as bench:
        bench.host.network.buffer_bytes = bench.random.choice((700, 5000, 200_000))
        content = bench.disk(256 * KIB)
        client = bench.client("disk", structured_replies=seed % 2 == 0)
        node = bench.graph.find(bench.exports[0].node_name)
        server_socket = bench.connection(client).socket
        sendmsg = server_socket.sendmsg

        def truncated(buffers: list[memoryview]) -> int:
            mapped = any(buffer.obj.__class__ is bytes and len(buffer) > 28 for buffer in buffers[1:2])
            if mapped and not bench.connection(client).output and bench.random.random() < 0.1:
                raise OSError(errno.EFAULT, "Bad address")
            return sendmsg(buffers)

        monkeypatch.setattr(server_socket, "sendmsg", truncated)
        asked = {}
        for _ in range(100):
            length = bench.random.choice((1, 512, 4096, 20_000))
            offset = bench.random.randrange(256 * KIB - length)
            asked[client.read(offset, length)] = (offset, length)
            if bench.random.random() < 0.2:
                bench.context.poll(False)
            if bench.random.random() < 0.05:
                with bench.graph.drained(node):
                    bench.context.poll(False)
        monkeypatch.setattr(server_socket, "sendmsg", sendmsg)
        for completion in client.wait_all():
            offset, length = asked[completion.cookie]
            assert completion.data == content[offset : offset + length]
        assert bench.exports[0].statistics.answered == 100
        check_idle(bench.transmission(client))
