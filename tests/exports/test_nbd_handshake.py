# SPDX-License-Identifier: Apache-2.0
"""The server's handshake over sockets: choosing, listing, asking, leaving, and doing it wrongly."""

from __future__ import annotations

import struct

import pytest

from bottomhalf.exports.nbd.connection import Connection
from bottomhalf.host.sim import Odds
from bottomhalf.host.sim.sockets import SimSocket
from bottomhalf.wire.nbd.client_handshake import ClientState
from bottomhalf.wire.nbd.constants import (
    FLAG_CAN_MULTI_CONN,
    FLAG_READ_ONLY,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
)
from bottomhalf.wire.nbd.errors import NegotiationRefused
from tests.exports.nbd_bench import INET, UNIX, Bench, Peer
from tests.wire.nbd.nbd_model import option, request

GREETING_BYTES = 18
FIXED = struct.pack(">I", 3)  # fixed newstyle, no zeroes
REPLY_MAGIC = 0x0003E889045565A9
ACK = 1
SERVER = 2
ERR_UNKNOWN = 0x80000006


def info_request(name: bytes) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(">H", 0)


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """(option, reply, data) of what follows the greeting."""
    found = []
    position = GREETING_BYTES
    while position < len(data):
        magic, number, kind, length = struct.unpack_from(">QIII", data, position)
        assert magic == REPLY_MAGIC
        found.append((number, kind, bytes(data[position + 20 : position + 20 + length])))
        position += 20 + length
    return found


def test_go_leads_into_transmission(seed: int) -> None:
    with Bench(seed) as bench:
        content = bench.disk(cached="always")
        client = bench.client("disk")
        assert client.handshake is not None and client.handshake.negotiated is not None
        export = client.handshake.negotiated.export
        assert export.size == 1 << 20
        assert export.flags & FLAG_SEND_FUA and export.flags & FLAG_SEND_TRIM and export.flags & FLAG_CAN_MULTI_CONN
        assert client.handshake.negotiated.contexts == {"base:allocation": 0}
        assert client.good(client.read(1000, 24)).data == content[1000:1024]


def test_export_name_leads_into_transmission_with_simple_replies(seed: int) -> None:
    with Bench(seed) as bench:
        content = bench.disk(cached="always")
        peer = bench.peer()
        peer.send(FIXED + option(OPT_EXPORT_NAME, b"disk") + request(0, 77, 512, 8))
        bench.until(lambda: len(peer.raw) >= GREETING_BYTES + 10 + 16 + 8, "the reply")
        size, flags = struct.unpack_from(">QH", peer.raw, GREETING_BYTES)
        assert size == 1 << 20 and flags & FLAG_SEND_TRIM
        magic, error, cookie = struct.unpack_from(">IIQ", peer.raw, GREETING_BYTES + 10)
        assert (magic, error, cookie) == (0x67446698, 0, 77)
        assert peer.raw[GREETING_BYTES + 26 :] == content[512:520]


def test_export_name_of_no_export_closes_the_connection() -> None:
    with Bench() as bench:
        bench.disk()
        peer = bench.peer()
        peer.send(FIXED + option(OPT_EXPORT_NAME, b"nothing"))
        peer.wait_end()
        assert len(bench.log) == 1 and "nothing" in bench.log[0]


def test_list_names_the_exports_and_describes_them(seed: int) -> None:
    with Bench(seed) as bench:
        bench.disk(name="a")
        bench.host.add_file("b.raw", 512)
        bench.export("b", bench.file("b.raw"), description="the second", writable=False, multi_conn=False)
        exports = bench.peer().list_exports()
        assert [(each.name, each.size, each.description) for each in exports] == [
            ("a", 1 << 20, ""),
            ("b", 512, "the second"),
        ]
        assert exports[1].flags & FLAG_READ_ONLY and not exports[1].flags & FLAG_CAN_MULTI_CONN
        assert exports[0].contexts == ["base:allocation"]


def test_info_leaves_the_client_in_the_handshake() -> None:
    with Bench() as bench:
        bench.disk()
        peer = bench.peer()
        peer.send(FIXED + option(OPT_INFO, info_request(b"disk")) + option(OPT_INFO, info_request(b"nix")))
        bench.settle()
        kinds = [(number, kind) for number, kind, _ in replies(peer.raw)]
        assert kinds[-2:] == [(OPT_INFO, ACK), (OPT_INFO, ERR_UNKNOWN)]
        peer.send(option(OPT_LIST))
        bench.settle()
        assert replies(peer.raw)[-1] == (OPT_LIST, ACK, b"")


def test_abort_is_acknowledged_and_the_connection_ends(seed: int) -> None:
    with Bench(seed) as bench:
        bench.host.network.buffer_bytes = 5  # the acknowledgement takes several sends
        bench.disk()
        peer = bench.peer()
        peer.send(FIXED + option(OPT_ABORT))
        peer.wait_end()
        assert replies(peer.raw) == [(OPT_ABORT, ACK, b"")]
        bench.until(lambda: not bench.server.connections, "the connection to be forgotten")
        assert not bench.log and not peer.reset


@pytest.mark.parametrize("address", [UNIX, INET], ids=str)
def test_handshake_survives_any_cut_and_any_buffer(seed: int, address: object) -> None:
    with Bench(seed, address=address) as bench:  # type: ignore[arg-type]
        bench.host.network.buffer_bytes = 1 + seed % 7
        content = bench.disk(4096)
        peer = bench.peer()
        peer.packet_max = 1 + seed % 3
        peer.negotiate("disk")
        assert peer.good(peer.read(0, 100)).data == content[:100]


def test_requests_sent_before_the_answer_to_go_are_served(seed: int) -> None:
    """All of a conversation at once, to a client that takes a few bytes at a time: nothing is lost in between."""
    with Bench(seed) as bench:
        bench.host.network.buffer_bytes = 11
        content = bench.disk(4096, cached="always")
        peer = bench.peer()
        peer.send(FIXED + option(OPT_LIST) + option(OPT_GO, info_request(b"disk")) + request(0, 5, 9, 100))
        bench.until(lambda: peer.raw.endswith(content[9:109]), "the data")
        head = bytes(peer.raw[:-116])
        assert [(number, kind) for number, kind, _ in replies(head)] == [
            (OPT_LIST, SERVER),
            (OPT_LIST, ACK),
            *[(OPT_GO, 3)] * sum(kind == 3 for _, kind, _ in replies(head)),
            (OPT_GO, ACK),
        ]


def test_default_export_is_the_only_one() -> None:
    with Bench() as bench:
        content = bench.disk()
        client = bench.client("")
        assert client.good(client.read(0, 9)).data == content[:9]


def test_no_default_among_several_exports() -> None:
    with Bench() as bench:
        bench.disk(name="a")
        bench.disk(name="b")
        peer = bench.peer()
        peer.negotiate("")
        assert isinstance(peer.error, NegotiationRefused)


def test_an_export_named_nothing_is_the_default() -> None:
    with Bench() as bench:
        bench.disk(name="a")
        bench.host.add_file("b.raw", b"second" * 100)
        bench.export("", bench.file("b.raw"))
        client = bench.client("")
        assert client.good(client.read(0, 6)).data == b"second"


def test_each_client_gets_the_export_it_named(seed: int) -> None:
    with Bench(seed) as bench:
        contents = {name: bench.disk(8192, name=name) for name in ("a", "b", "c")}
        clients = {name: bench.client(name) for name in ("c", "a", "b")}
        cookies = {name: client.read(100, 4000) for name, client in clients.items()}
        for name, client in clients.items():
            assert client.good(cookies[name]).data == contents[name][100:4100]


def test_unknown_export_is_refused_and_another_can_be_chosen() -> None:
    with Bench() as bench:
        bench.disk()
        peer = bench.peer()
        peer.negotiate("nix")
        assert isinstance(peer.error, NegotiationRefused)
        peer.wait_end()


def test_wrong_client_flags_end_the_connection() -> None:
    with Bench() as bench:
        peer = bench.peer()
        peer.send(b"GET / HTTP/1.1\r\n\r\n")
        peer.wait_end()
        assert len(bench.log) == 1 and "not an NBD client" in bench.log[0]


def test_wrong_option_magic_ends_the_connection() -> None:
    with Bench() as bench:
        peer = bench.peer()
        peer.send(FIXED + b"IHAVENOTHING" + bytes(30))
        peer.wait_end()
        assert len(bench.log) == 1 and "bad magic" in bench.log[0]


def test_option_length_that_lies_ends_the_connection_only_if_absurd(seed: int) -> None:
    with Bench(seed) as bench:
        content = bench.disk(4096)
        absurd = bench.peer()
        absurd.send(FIXED + struct.pack(">QII", 0x49484156454F5054, OPT_LIST, 0xFFFFFFFF))
        long = bench.peer()
        long.send(FIXED + option(OPT_LIST, bytes(300 << 10)) + option(OPT_LIST))
        waiting = bench.peer()
        waiting.send(FIXED + option(OPT_GO, bytes(100))[:-1])  # the last byte never comes
        absurd.wait_end()
        bench.settle()
        assert [kind for _, kind, _ in replies(long.raw)][-1] == ACK
        assert not waiting.ended or bench.log
        client = bench.client("disk")
        assert client.good(client.read(0, 4096)).data == content


def test_name_length_inside_an_option_that_lies_is_refused() -> None:
    with Bench() as bench:
        bench.disk()
        peer = bench.peer()
        peer.send(FIXED + option(OPT_GO, struct.pack(">I", 1000) + b"disk"))
        peer.send(option(OPT_ABORT))
        peer.wait_end()
        kinds = [(number, kind) for number, kind, _ in replies(peer.raw)]
        assert kinds == [(OPT_GO, 0x80000003), (OPT_ABORT, ACK)]


def test_who_does_not_read_answers_may_not_ask_more() -> None:
    """A client that floods us with options and reads nothing: we stop reading, and keep little."""
    with Bench(handshake_seconds_max=0) as bench:
        bench.host.network.buffer_bytes = 10_000
        for number in range(20):
            bench.host.add_file(f"{number}.raw", 512)
            bench.export(f"{number:0200}", bench.file(f"{number}.raw"))
        peer = bench.peer()
        peer.pause()
        peer.send(FIXED + option(OPT_LIST) * 4000)
        for _ in range(2000):
            bench.context.poll(False)
        (connection,) = bench.server.connections
        answer = 20 * (20 + 4 + 200) + 20
        assert connection.output.unsent_bytes <= (65536 // 16 + 1) * answer // 2
        assert peer.unsent  # it was stopped
        before = connection.output.unsent_bytes
        for _ in range(500):
            bench.context.poll(False)
        assert connection.output.unsent_bytes == before
        peer.resume()
        bench.until(lambda: len(peer.raw) == GREETING_BYTES + 4000 * answer, "all answers")


def test_handshake_time_limit_sends_a_silent_client_away() -> None:
    with Bench(handshake_seconds_max=10) as bench:
        content = bench.disk(512)
        silent = bench.peer()
        quick = bench.client("disk")
        slow = bench.peer()
        slow.send(FIXED[:3])
        began_ns = bench.host.monotonic_ns()
        silent.wait_end()
        slow.wait_end()
        assert 9_900_000_000 <= bench.host.monotonic_ns() - began_ns <= 10_100_000_000
        assert len(bench.log) == 2 and all("handshake limit" in line for line in bench.log)
        bench.host.advance(60_000_000_000)
        assert quick.good(quick.read(0, 512)).data == content  # the limit is not for those who have chosen


def test_no_handshake_time_limit_if_not_wanted() -> None:
    with Bench(handshake_seconds_max=0) as bench:
        silent = bench.peer()
        bench.host.advance(3600_000_000_000)
        bench.settle()
        assert not silent.ended


def test_client_that_vanishes_before_the_greeting_is_forgotten(seed: int) -> None:
    """It is gone when we accept it: the greeting fails."""
    with Bench(seed, odds=Odds.calm(), connections_max=1) as bench:
        content = bench.disk(512)
        for _ in range(3):
            bench.peer(start=False).close()
        client = bench.client("disk")
        assert client.good(client.read(0, 512)).data == content
        assert len(bench.server.connections) == 1


@pytest.mark.parametrize("after", range(0, 60, 3))
def test_client_that_vanishes_in_the_handshake_is_forgotten(after: int) -> None:
    with Bench(after) as bench:
        bench.disk(512)
        peer = bench.peer()
        peer.send((FIXED + option(OPT_GO, info_request(b"disk")) + request(0, 1, 0, 512))[:after])
        bench.until(lambda: not peer.unsent and len(peer.raw) >= GREETING_BYTES, "everything to be sent")
        peer.close()
        bench.until(lambda: not bench.server.connections, "the connection to be forgotten")


def test_export_that_goes_between_choice_and_transmission() -> None:
    """What find_export answered is not there any more when the client has to be served."""
    with Bench() as bench:
        bench.disk()
        info = bench.exports[0].info
        bench.server.find_export = lambda name: info  # type: ignore[method-assign]
        bench.server.drop(bench.exports[0])
        peer = bench.peer()
        peer.negotiate("disk")
        peer.wait_end()
        assert not bench.server.connections


def test_a_bug_in_the_handshake_ends_the_connection_and_is_seen() -> None:
    with Bench() as bench:
        bench.disk(512)

        def broken() -> list[object]:
            raise RuntimeError("a bug")

        bench.server.list_exports = broken  # type: ignore[method-assign, assignment]
        seen: list[Exception] = []
        bench.context.exception_handler = lambda context, error, where: seen.append(error)
        peer = bench.peer()
        peer.send(FIXED + option(OPT_LIST))
        peer.wait_end()
        assert [str(error) for error in seen] == ["a bug"]


def test_state_of_the_client_is_closed_after_list() -> None:
    with Bench() as bench:
        bench.disk(512)
        peer = bench.peer()
        peer.list_exports()
        assert peer.handshake is not None and peer.handshake.state is ClientState.CLOSED
        assert isinstance(peer.socket, SimSocket) and isinstance(peer, Peer)
        bench.until(lambda: not bench.server.connections, "the end")
        assert all(isinstance(each, Connection) for each in bench.server.connections)
