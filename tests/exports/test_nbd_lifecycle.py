# SPDX-License-Identifier: Apache-2.0
"""Connections, exports and servers that come and go: limits, removal, stop, and exports of another thread."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from bottomhalf.aio import AioContext, wait_while
from bottomhalf.block import BlockError
from bottomhalf.exports.nbd.connection import Connection
from bottomhalf.exports.nbd.export import NbdExport
from bottomhalf.exports.nbd.output import _FileRange
from bottomhalf.exports.nbd.server import ACCEPT_PAUSE_NS
from bottomhalf.host.protocol import File
from bottomhalf.host.request import READ, WRITE
from bottomhalf.host.sim import Odds
from bottomhalf.host.sim.faults import ACCEPT
from bottomhalf.wire.nbd.errors import NegotiationRefused
from tests.exports.nbd_bench import UNIX, Bench, Peer, check_idle

KIB = 1 << 10
MIB = 1 << 20
OTHER_THREAD = 2
PUMP_NS = 5_000


# -- limits -----------------------------------------------------------------------------------------------------


def test_clients_beyond_the_limit_wait_in_the_backlog(seed: int) -> None:
    with Bench(seed, connections_max=2) as bench:
        content = bench.disk(4096)
        first, second = bench.client("disk"), bench.client("disk")
        third, fourth = bench.peer(), bench.peer()
        bench.settle()
        assert len(bench.server.connections) == 2 and bench.server.clients_seen == 2
        assert not third.raw and not fourth.raw
        assert first.good(first.read(0, 4096)).data == content
        first.disconnect()
        third.negotiate("disk")
        assert third.good(third.read(0, 4096)).data == content
        assert len(bench.server.connections) == 2 and not fourth.raw
        second.close()
        fourth.negotiate("disk")
        assert fourth.good(fourth.read(0, 4096)).data == content
        assert bench.server.clients_seen == 4


def test_zero_is_no_limit() -> None:
    with Bench(connections_max=0) as bench:
        bench.disk(4096)
        clients = [bench.client("disk") for _ in range(110)]
        for client in clients:
            client.good(client.read(0, 1))


def test_handshakes_count_against_the_limit_and_time_out(seed: int) -> None:
    with Bench(seed, connections_max=1, handshake_seconds_max=10) as bench:
        content = bench.disk(4096)
        bench.peer()  # says nothing
        client = bench.client("disk")
        assert client.good(client.read(0, 4096)).data == content


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
def test_running_out_of_descriptors_pauses_accepting(number: int) -> None:
    with Bench() as bench:
        content = bench.disk(4096)
        client = bench.client("disk")
        fault = bench.host.fault(path=str(UNIX), op=ACCEPT, errno=number, times=3)
        began_ns = bench.host.monotonic_ns()
        late = bench.peer()
        bench.until(lambda: bench.log, "the complaint")
        for _ in range(50):
            bench.context.poll(False)
        assert fault.hits == 1  # it does not spin
        assert client.good(client.read(0, 4096)).data == content
        late.negotiate("disk")
        assert bench.host.monotonic_ns() - began_ns >= 3 * ACCEPT_PAUSE_NS
        assert late.good(late.read(0, 4096)).data == content
        assert len(bench.log) == 3 and all("cannot accept" in line for line in bench.log)


def test_accepting_goes_on_at_once_when_a_client_leaves() -> None:
    """Its descriptor is free now."""
    with Bench() as bench:
        bench.disk(4096)
        client = bench.client("disk")
        bench.host.fault(path=str(UNIX), op=ACCEPT, errno=errno.EMFILE, times=1)
        began_ns = bench.host.monotonic_ns()
        late = bench.peer()
        bench.until(lambda: bench.log, "the complaint")
        client.disconnect()
        late.negotiate("disk")
        assert bench.host.monotonic_ns() - began_ns < ACCEPT_PAUSE_NS


def test_a_client_that_is_gone_before_it_is_accepted_is_no_trouble() -> None:
    with Bench() as bench:
        bench.disk(4096)
        bench.host.fault(path=str(UNIX), op=ACCEPT, errno=errno.ECONNABORTED, times=1)
        client = bench.client("disk")
        client.good(client.read(0, 4096))
        assert not bench.log


# -- removal ----------------------------------------------------------------------------------------------------


def remove(bench: Bench, export: NbdExport) -> list[str]:
    """Begin to remove an export; what happens to it is noted in the list."""
    events: list[str] = []
    export.on_idle = lambda: events.append("idle")
    export.disconnect()
    bench.server.drop(export)
    return events


def test_export_removed_while_clients_are_connected(seed: int) -> None:
    """They are sent away; requests in flight finish first; then, once, the export is idle."""
    with Bench(seed) as bench:
        contents = {name: bench.disk(64 * KIB, name=name, cached="never") for name in ("a", "b")}
        clients = [bench.client("a") for _ in range(3)]
        other = bench.client("b")
        export = bench.exports[0]
        fault = bench.host.fault(path="a.raw", hold=True)
        for client in clients[:2]:
            client.read(0, 4096)
            client.write(0, b"last words" * 100)
            client.flush()
        transmissions = [bench.transmission(client) for client in clients[:2]]
        bench.until(lambda: all(each.in_flight == 3 for each in transmissions), "requests in flight")
        events = remove(bench, export)
        for client in clients:
            client.wait_end()
        assert export.shutting_down and len(export.connections) == 2 and events == []
        assert other.good(other.read(0, 64 * KIB)).data == contents["b"]
        late = bench.peer()
        late.negotiate("a")
        assert isinstance(late.error, NegotiationRefused)
        fault.remove()
        bench.until(lambda: events, "the export to be idle")
        assert events == ["idle"] and export.connections == []
        export.close()
        bench.exports.remove(export)
        assert bench.host.durable_content("a.raw")[:1000] == b"last words" * 100
        assert bench.host.disk.files["a.raw"].locks is not None and "a.raw" not in str(bench.graph.nodes)
        assert other.good(other.read(0, 64 * KIB)).data == contents["b"]


def test_export_without_clients_is_idle_at_once() -> None:
    with Bench() as bench:
        bench.disk(4096)
        (export,) = bench.exports
        remove(bench, export)
        assert export.connections == []
        export.close()
        bench.exports.clear()
        bench.disk(4096, name="again")
        bench.client("again")


def test_export_is_idle_each_time_the_last_client_leaves() -> None:
    with Bench() as bench:
        bench.disk(4096)
        (export,) = bench.exports
        events: list[str] = []
        export.on_idle = lambda: events.append("idle")
        for turn in range(3):
            first, second = bench.client("disk"), bench.client("disk")
            first.disconnect()
            bench.until(lambda: len(export.connections) == 1, "the first to leave")
            assert len(events) == turn
            second.close()
            bench.until(lambda: not export.connections, "the second to leave")
            assert len(events) == turn + 1


def test_export_removed_during_a_handshake_that_chose_it(seed: int) -> None:
    with Bench(seed) as bench:
        bench.disk(4096)
        (export,) = bench.exports
        peers = [bench.peer() for _ in range(5)]
        for peer in peers:
            peer.watch()
        for _ in range(seed):
            bench.context.poll(False)
        export.disconnect()
        for peer in peers:
            peer.negotiate("disk")
        bench.until(lambda: all(peer.ended or peer.error for peer in peers), "all to be sent away")
        bench.until(lambda: not export.connections, "nobody to be left")


def test_unflushable_export_closes_all_the_same() -> None:
    with Bench() as bench:
        bench.disk(4096)
        client = bench.client("disk")
        client.good(client.write(0, b"lost"))
        client.close()
        bench.until(lambda: not bench.server.connections, "the end")
        bench.host.fault(path="disk.raw", errno=errno.EIO)
        bench.exports[0].close()
        bench.exports.clear()


def test_server_that_stops(seed: int) -> None:
    """No new clients; those in the handshake, in the backlog and in transmission are sent away."""
    with Bench(seed, connections_max=3) as bench:
        bench.disk(64 * KIB, cached="never")
        busy, idle, greeted = bench.client("disk"), bench.client("disk"), bench.peer()
        waiting = bench.peer()
        bench.until(lambda: greeted.raw, "the greeting")
        bench.host.fault(path="disk.raw", op=READ, hold=True)
        fault = bench.host.faults.rules[0]
        busy.read(0, 4096)
        transmission = bench.transmission(busy)
        bench.until(lambda: transmission.in_flight, "a request in flight")
        bench.server.stop()
        assert bench.server.address is None
        for peer in (busy, idle, greeted, waiting):
            peer.wait_end()
        assert len(bench.server.connections) == 1  # it waits for its request
        with pytest.raises(OSError):
            bench.host.connect(UNIX)
        bench.host.at(1_000_000, fault.remove)
        wait_while(None, lambda: bench.server.connections, what="the last client")
        bench.server.stop()  # again, to no effect
        bench.server.listen(UNIX)
        again = bench.client("disk")
        again.good(again.read(0, 1))


def test_server_and_context_close_without_a_turn_in_between(seed: int) -> None:
    """Nothing of ours waits to run in the context when the last connection is gone."""
    with Bench(seed) as bench:
        bench.disk(64 * KIB, cached="always")
        bench.host.network.buffer_bytes = MIB
        for _ in range(3):
            client = bench.client("disk")
            for _ in range(500):
                client.read(0, 50_000)
            for _ in range(bench.random.randrange(10)):
                bench.context.poll(False)
        bench.server.stop()
        bench.until(lambda: not bench.server.connections, "connections to go")
        lost = [half for half in bench.context._queue if half.scheduled]
        assert not lost


# -- another thread ---------------------------------------------------------------------------------------------


class Thread:
    """An iothread without a thread: whenever time passes, its context is polled in its name."""

    def __init__(self, bench: Bench) -> None:
        self.host = bench.host
        with self.host.as_thread(OTHER_THREAD):
            self.context = AioContext(self.host, "io0", is_main=False)
        self.running = True
        bench.has_threads = True
        self.host.at(PUMP_NS, self._pump)

    def _pump(self) -> None:
        if self.running:
            with self.host.as_thread(OTHER_THREAD):
                self.context.poll(False)
            self.host.at(PUMP_NS, self._pump)

    def stop(self) -> None:
        self.running = False
        with self.host.as_thread(OTHER_THREAD):
            for _ in range(10):
                self.context.poll(False)
            self.context.close()


def in_thread(bench: Bench, **disk_options: object) -> tuple[Thread, bytearray]:
    """An export that is served in another context."""
    content = bench.disk(MIB, **disk_options)  # type: ignore[arg-type]
    thread = Thread(bench)
    node = bench.graph.find(bench.exports[0].node_name)
    bench.graph.move(node, thread.context)
    assert bench.exports[0].context is thread.context
    return thread, content


def end(bench: Bench, thread: Thread) -> None:
    """Close what lives in the other context while it still runs."""
    bench.server.stop()
    wait_while(None, lambda: bench.server.connections, what="clients to go")
    bench.transmissions.clear()
    bench.exports.pop().close()
    thread.stop()


def test_export_in_another_thread(seed: int) -> None:
    """The handshake happens in the main thread, everything else in the other; every access is checked by the
    simulated host, which wants one thread per engine and per poller."""
    with Bench(seed) as bench:
        thread, content = in_thread(bench)
        bench.host.network.buffer_bytes = bench.random.choice((30, 700, 100_000))
        clients = [bench.client("disk"), bench.client("disk", structured_replies=False)]
        for number in range(40):
            client = clients[number % 2]
            start = number * 10_000
            assert client.good(client.read(start, 700)).data == content[start : start + 700]
            client.good(client.write(start, bytes(300)))
        clients[0].good(clients[0].flush())
        for client in clients:
            connection = bench.connection(client)
            assert connection.context is thread.context
            assert connection.socket.fileno() not in bench.context._poller._masks  # type: ignore[attr-defined]
            assert connection.socket.fileno() in thread.context._poller._masks  # type: ignore[attr-defined]
            check_idle(bench.transmission(client))
        clients[0].disconnect()
        clients[0].wait_end()
        bench.until(lambda: len(bench.server.connections) == 1, "one to be forgotten")
        end(bench, thread)


def test_limit_of_connections_with_clients_in_another_thread(seed: int) -> None:
    with Bench(seed, connections_max=1) as bench:
        thread, content = in_thread(bench)
        for _ in range(3):
            client = bench.client("disk")
            assert client.good(client.read(0, 512)).data == content[:512]
            client.disconnect()
        end(bench, thread)


def test_export_in_another_thread_is_removed(seed: int) -> None:
    with Bench(seed) as bench:
        thread, _ = in_thread(bench, cached="never")
        clients: list[Peer] = [bench.client("disk") for _ in range(3)]
        for client in clients:
            client.read(0, 4096)
            client.write(0, bytes(4096))
        for _ in range(seed):
            bench.context.poll(False)
        choosing = bench.peer()
        choosing.watch()
        (export,) = bench.exports
        events = remove(bench, export)
        wait_while(None, lambda: not events, what="the export to be idle")
        for client in clients:
            client.wait_end()
        end(bench, thread)


@pytest.mark.parametrize("polls", range(12))
def test_server_stops_while_a_client_moves_to_another_thread(polls: int) -> None:
    """Wherever the client is at that moment, it is closed in the thread that it belongs to."""
    with Bench(polls, odds=Odds.calm()) as bench:
        thread, _ = in_thread(bench)
        peer = bench.peer()
        peer.send(b"\0\0\0\3" + b"IHAVEOPT" + (7).to_bytes(4, "big") + (10).to_bytes(4, "big"))
        peer.send((4).to_bytes(4, "big") + b"disk" + bytes(2))
        closing: list[bool] = []
        for _ in range(polls):
            bench.context.poll(False)
        for connection in bench.server.connections:
            close = connection.close

            def noted(close: object = close, connection: object = connection) -> None:
                closing.append(connection.context.is_home)  # type: ignore[attr-defined]
                close()  # type: ignore[operator]

            connection.close = noted  # type: ignore[method-assign]
        end(bench, thread)
        assert all(closing)


def test_server_stops_at_the_moment_when_a_client_chooses_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order to close reaches the main thread when the client belongs to the other already."""
    with Bench() as bench:
        thread, _ = in_thread(bench)
        (export,) = bench.exports
        attach = export.attach

        def stopping(connection: Connection) -> None:
            bench.server.stop()
            attach(connection)

        monkeypatch.setattr(export, "attach", stopping)
        closing: list[int] = []
        close = Connection.close
        monkeypatch.setattr(Connection, "close", lambda self: (closing.append(bench.host.thread_id()), close(self))[1])
        peer = bench.peer()
        peer.negotiate("disk")
        peer.wait_end()
        assert closing == [OTHER_THREAD]
        end(bench, thread)


def test_drain_from_the_main_thread_replaces_file_ranges_in_the_other(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(seed, odds=Odds.calm()) as bench:
        thread, content = in_thread(bench, cached="always")
        bench.host.network.buffer_bytes = 5000
        client = bench.client("disk")
        client.pause()
        cookie = client.read(3, 300_000)
        output = bench.connection(client).output

        def ranges() -> int:
            return sum(isinstance(piece, _FileRange) for piece, _ in output._pieces)

        bench.until(ranges, "a range of the file to wait")
        where: list[int] = []
        keep = output.keep_file_bytes

        def noted(read: Callable[[File, int, int], memoryview]) -> None:
            where.append(bench.host.thread_id())
            keep(read)

        monkeypatch.setattr(output, "keep_file_bytes", noted)
        with bench.graph.drained(bench.graph.find(bench.exports[0].node_name)):
            assert not ranges()
            assert where == [OTHER_THREAD]
            bench.host.disk.files["disk.raw"].write(0, bytes(MIB), True)
        client.resume()
        assert client.good(cookie).data[5000:] == content[5003:300_003]  # the socket shares what it has taken
        end(bench, thread)


def test_clients_move_with_the_node(seed: int) -> None:
    """To and fro under load: every request is answered once and rightly; clients come, go and are slow meanwhile."""
    with Bench(seed) as bench:
        content = bench.disk(MIB)
        thread = Thread(bench)
        export = bench.exports[0]
        node = bench.graph.find(export.node_name)
        clients = [bench.client("disk") for _ in range(3)]
        asked: dict[tuple[int, int], int] = {}
        for turn in range(6):
            for number, client in enumerate(clients):
                for _ in range(bench.random.randrange(12)):
                    offset = bench.random.randrange(MIB - 4096)
                    asked[number, client.read(offset, 4096)] = offset
                if bench.random.random() < 0.3:
                    client.pause()
            for _ in range(bench.random.randrange(4)):
                bench.context.poll(False)
            context = thread.context if turn % 2 == 0 else bench.context
            bench.graph.move(node, context)
            assert node.context is export.context is context
            assert all(connection.context is context for connection in export.connections)
            if turn == 2:
                gone = clients.pop()
                gone.close()
                asked = {(number, cookie): offset for (number, cookie), offset in asked.items() if number < 2}
            if turn == 3:
                clients.append(bench.client("disk"))
        for client in clients:
            client.resume()
        for (number, cookie), offset in asked.items():
            assert clients[number].good(cookie).data == content[offset : offset + 4096]
        end(bench, thread)


def test_a_client_that_chooses_the_export_while_it_moves(seed: int) -> None:
    with Bench(seed) as bench:
        content = bench.disk(MIB)
        thread = Thread(bench)
        export = bench.exports[0]
        node = bench.graph.find(export.node_name)
        first = bench.client("disk")
        second = bench.peer()
        second.begin("disk")
        for _ in range(bench.random.randrange(30)):
            bench.context.poll(False)
        bench.graph.move(node, thread.context)
        cookie = first.read(0, 512)
        assert first.good(cookie).data == content[:512]
        bench.until(lambda: second.client is not None, "the second to be through")
        assert second.good(second.read(512, 512)).data == content[512:1024]
        assert {connection.context for connection in export.connections} == {thread.context}
        end(bench, thread)


def test_an_export_that_is_to_stay_stays(seed: int) -> None:
    with Bench(seed) as bench:
        content = bench.random.randbytes(MIB)
        bench.host.add_file("disk.raw", content)
        bench.export("disk", bench.file("disk.raw"), fixed_iothread=True)
        thread = Thread(bench)
        node = bench.graph.find(bench.exports[0].node_name)
        client = bench.client("disk")
        with pytest.raises(BlockError, match="iothread"):
            bench.graph.move(node, thread.context)
        assert client.good(client.read(0, 512)).data == content[:512]
        end(bench, thread)


def test_a_connection_that_is_ended_while_it_moves(seed: int) -> None:
    """Neither its thread nor the main one has it then; it ends all the same, once."""
    with Bench(seed) as bench:
        bench.disk(MIB, cached="never")
        thread = Thread(bench)
        export = bench.exports[0]
        node = bench.graph.find(export.node_name)
        clients = [bench.client("disk") for _ in range(3)]
        for client in clients:
            client.read(0, 4096)
        ending = bench.connection(clients[bench.random.randrange(3)])
        bench.context.schedule_oneshot(ending.close_soon)
        bench.graph.move(node, thread.context)
        bench.until(lambda: ending not in export.connections, "the connection to end")
        bench.graph.move(node, bench.context)
        assert len(export.connections) == 2
        end(bench, thread)


def test_requests_in_flight_are_counted_for_the_curious() -> None:
    with Bench() as bench:
        bench.disk(4096, cached="never")
        fault = bench.host.fault(path="disk.raw", op=WRITE, hold=True)
        client = bench.client("disk")
        client.write(0, bytes(512))
        connection = bench.connection(client)
        bench.until(lambda: connection.in_flight == 1, "a request in flight")
        fault.remove()
        client.wait_all()
        assert connection.in_flight == 0
