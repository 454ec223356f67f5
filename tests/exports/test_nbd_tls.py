# SPDX-License-Identifier: Apache-2.0
"""The NBD server with TLS on a simulated machine: our client at the other end, unkind sockets in between, and peers
that do what must not work."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from bottomhalf.block import BlockBackend
from bottomhalf.exports.nbd.connection import Connection
from bottomhalf.host.protocol import Address
from bottomhalf.host.sim import Odds
from bottomhalf.tls.handshaking import Handshaking
from bottomhalf.tls.policy import Security
from bottomhalf.tls.stream import TlsStream
from bottomhalf.wire.nbd.client_handshake import ClientState, Goal
from bottomhalf.wire.nbd.constants import (
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_LIST,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    REP_ACK,
    REP_ERR_INVALID,
    REP_ERR_POLICY,
    REP_ERR_TLS_REQD,
)
from bottomhalf.wire.nbd.errors import NegotiationRefused
from tests.exports.nbd_bench import UNIX, Bench, Peer
from tests.exports.test_nbd_handshake import FIXED, info_request, replies
from tests.exports.test_nbd_random import run
from tests.tls.ends import Place
from tests.wire.nbd.nbd_model import option

MIB = 1 << 20


class SecureBench(Bench):
    """A server that has credentials, and the client's beside them."""

    def __init__(
        self,
        seed: int = 0,
        *,
        authz: dict[str, Any] | None = None,
        odds: Odds | None = None,
        address: Address = UNIX,
        **options: Any,
    ) -> None:
        super().__init__(seed, odds=odds, address=address)
        self.server.stop()
        self.place = Place(self.host)
        if authz is not None:
            self.place.tree.create("authz-list", "list", authz)
        security = self.place.server("list" if authz is not None else None, **options)
        self.server.security = security
        self.server.listen(self.address)

    def connection(self, peer: Peer) -> Connection:
        found = [each for each in self.server.connections if getattr(each.socket, "socket", each.socket) is _raw(peer)]
        assert len(found) == 1, found
        return found[0]

    def secure_peer(self, security: Security | None = None) -> SecurePeer:
        peer = SecurePeer(self, self.host.connect(self.address), security or self.place.client())
        self.peers.append(peer)
        peer.watch()
        return peer

    def client(self, export: str = "", **options: Any) -> SecurePeer:
        return self.secure_client(export, **options)

    def secure_client(self, export: str = "disk", **options: Any) -> SecurePeer:
        peer = self.secure_peer()
        peer.negotiate(export, tls=True, **options)
        self.transmission(peer)
        return peer


def _raw(peer: Peer) -> Any:
    socket: Any = peer.socket
    return getattr(socket, "socket", socket).peer


class SecurePeer(Peer):
    """A client that begins TLS when its handshake says so, or when it is told."""

    def __init__(self, bench: SecureBench, socket: Any, security: Security) -> None:
        super().__init__(bench, socket)
        self.plain = socket
        self.security = security
        self.stream: TlsStream | None = None
        self.failure: OSError | None = None

    def watch(self) -> None:
        socket: Any = self.socket
        if not self.plain.closed and (self.stream is None or socket is self.stream):
            self.socket = self.plain
            try:
                super().watch()
            finally:
                self.socket = socket
            if self.stream is not None and self.stream.buffered and self.reading and not self.ended:
                self.bench.context.schedule_oneshot(self._look_again)

    def _look_again(self) -> None:
        if self.stream is not None and self.stream.buffered and self.reading and not self.ended:
            self._on_read()

    def close(self) -> None:
        if not self.plain.closed:
            self.bench.context.set_fd_handler(self.plain.fileno())
            self.plain.close()
        self.ended = True

    def _on_read(self) -> None:
        super()._on_read()
        self.watch()

    def _take(self, data: bytes) -> None:
        super()._take(data)
        if self.handshake is not None and self.handshake.state is ClientState.STARTTLS and self.stream is None:
            self.start_tls()

    def start_tls(self) -> None:
        self.stream = self.security.wrap(self.plain)
        Handshaking(self.bench.context, self.stream, self._secured)

    def _secured(self, error: OSError | None) -> None:
        if error is not None:
            self.failure = error
            self.ended = True
            return
        assert self.stream is not None
        self.socket = self.stream  # type: ignore[assignment]
        if self.handshake is not None:
            self.handshake.tls_started()
            self.send(self.handshake.take_output())
        self.watch()


def answers(peer: Peer) -> list[tuple[int, int, bytes]]:
    """The whole replies so far."""
    try:
        return replies(peer.raw)
    except struct.error:
        return []


def test_reads_and_writes(seed: int) -> None:
    with SecureBench(seed) as bench:
        content = bench.disk(size=3 * MIB)
        client = bench.secure_client()
        assert client.stream is not None and client.stream.session.version.startswith("TLSv1.3")
        for _ in range(20):
            length = bench.random.choice((1, 512, 4096, 65536, 300_000, MIB))
            offset = bench.random.randrange(3 * MIB - length)
            if bench.random.random() < 0.5:
                data = bench.random.randbytes(length)
                content[offset : offset + length] = data
                client.good(client.write(offset, data))
            else:
                assert client.good(client.read(offset, length)).data == content[offset : offset + length]
        assert not bench.log


def test_many_requests_at_once(seed: int) -> None:
    """Batches, replies that wait for a slow client, requests that lie decrypted while there is no room."""
    with SecureBench(seed) as bench:
        content = bench.disk(size=2 * MIB)
        client = bench.secure_client(structured_replies=bool(seed % 2))
        asked = {}
        for _ in range(200):
            length = bench.random.choice((512, 4096, 200_000))
            offset = bench.random.randrange(2 * MIB - length)
            asked[client.read(offset, length)] = (offset, length)
            if bench.random.random() < 0.1:
                client.pause()
                bench.context.poll(False)
                client.resume()
        for completion in client.wait_all():
            offset, length = asked[completion.cookie]
            assert completion.error == 0 and completion.data == content[offset : offset + length]


def test_a_client_that_pauses_gets_everything(seed: int) -> None:
    """More than the sockets hold waits in the server, partly encrypted already."""
    with SecureBench(seed) as bench:
        content = bench.disk(size=2 * MIB, cached="always")
        client = bench.secure_client()
        client.pause()
        cookies = [client.read(0, 2 * MIB) for _ in range(6)]
        bench.settle()
        assert bench.transmission(client).output.unsent_bytes > 0
        client.resume()
        for cookie in cookies:
            assert client.good(cookie).data == content


def test_random_load(seed: int) -> None:
    """What the plain server has to stand (tests/exports/test_nbd_random.py): sockets of 700 bytes, drains, pauses."""
    run(10_000 + seed, SecureBench)


def test_nothing_of_the_file_goes_in_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached files are sent by the kernel, or shown to the socket, only where nobody encrypts."""
    with SecureBench(odds=Odds.calm()) as bench:
        marker = b"the secret of the disk "
        bench.host.add_file("m.raw", marker * 50_000, cached="always")
        bench.export("m", bench.file("m.raw"))
        client = bench.secure_client("m")
        for kind, name in ((TlsStream, "send_file"), (BlockBackend, "map_reads")):
            monkeypatch.setattr(kind, name, lambda *_: pytest.fail("a file's bytes are not for the socket"))
        seen = bytearray()
        receive = client.plain.recv_into

        def spy(buffer: Any) -> int:
            count: int = receive(buffer)
            seen.extend(memoryview(buffer)[:count])
            return count

        client.plain.recv_into = spy
        for length in (23, 4096, 65536, MIB):
            assert client.good(client.read(0, length)).data == (marker * 50_000)[:length]
        assert len(seen) > MIB and marker not in seen


def test_list_over_tls() -> None:
    with SecureBench() as bench:
        bench.disk()
        peer = bench.secure_peer()
        peer.negotiate(goal=Goal.LIST, tls=True)
        assert peer.handshake is not None and [each.name for each in peer.handshake.exports] == ["disk"]


@pytest.mark.parametrize("number", [OPT_LIST, OPT_GO, OPT_STRUCTURED_REPLY, 99])
def test_nothing_is_answered_in_plain_text(number: int) -> None:
    with SecureBench() as bench:
        bench.disk()
        peer = bench.peer()
        peer.send(FIXED + option(number, info_request(b"disk")) + option(OPT_ABORT))
        peer.wait_end()
        assert replies(peer.raw) == [
            (number, REP_ERR_TLS_REQD, f"Option {number:#x} not permitted before TLS".encode()),
            (OPT_ABORT, REP_ACK, b""),
        ]


def test_export_name_in_plain_text_closes_the_connection() -> None:
    with SecureBench() as bench:
        bench.disk()
        peer = bench.peer()
        peer.send(FIXED + option(OPT_EXPORT_NAME, b"disk"))
        peer.wait_end()
        assert replies(peer.raw) == []
        assert "before it has asked for TLS" in bench.log[0]


def test_a_client_without_tls_is_told() -> None:
    with SecureBench() as bench:
        bench.disk()
        peer = bench.peer()
        peer.negotiate("disk")
        assert isinstance(peer.error, NegotiationRefused) and peer.error.reply == REP_ERR_TLS_REQD


def test_a_server_without_tls_refuses() -> None:
    with Bench() as bench:
        bench.disk()
        peer = bench.peer()
        peer.send(FIXED + option(OPT_STARTTLS) + option(OPT_STARTTLS, b"x") + option(OPT_ABORT))
        peer.wait_end()
        assert replies(peer.raw)[:2] == [
            (OPT_STARTTLS, REP_ERR_POLICY, b"TLS not configured"),
            (OPT_STARTTLS, REP_ERR_INVALID, b"option 'starttls' has unexpected length"),
        ]
        other = bench.peer()
        other.negotiate("disk", tls=True)
        assert isinstance(other.error, NegotiationRefused) and other.error.reply == REP_ERR_POLICY


@pytest.mark.parametrize("more", [b"\x16", option(OPT_GO, info_request(b"disk")), b"\x16\x03\x01" + bytes(100)])
def test_plain_bytes_behind_starttls_are_refused(more: bytes) -> None:
    """Whatever comes in one packet with STARTTLS was said in public."""
    with SecureBench() as bench:
        bench.disk()
        peer = bench.peer()
        peer.send(FIXED + option(OPT_STARTTLS) + more)
        peer.wait_end()
        assert "plain bytes between NBD_OPT_STARTTLS and the TLS handshake" in bench.log[0]


def test_plain_bytes_after_the_answer_are_no_handshake() -> None:
    with SecureBench(odds=Odds.calm()) as bench:
        bench.disk()
        peer = bench.peer()
        peer.send(FIXED + option(OPT_STARTTLS))
        bench.until(lambda: answers(peer) == [(OPT_STARTTLS, REP_ACK, b"")], "the answer")
        peer.send(option(OPT_GO, info_request(b"disk")) * 3)
        peer.wait_end()
        assert "TLS handshake failed" in bench.log[0]


def test_starttls_twice(seed: int) -> None:
    with SecureBench(seed) as bench:
        bench.disk()
        peer = bench.secure_peer()
        peer.send(FIXED + option(OPT_STARTTLS))
        bench.until(lambda: answers(peer), "the answer")
        peer.start_tls()
        bench.until(lambda: peer.socket is peer.stream, "the handshake")
        peer.send(option(OPT_STARTTLS) + option(OPT_ABORT))
        bench.until(lambda: len(answers(peer)) == 3, "the answers")
        assert answers(peer)[1:] == [
            (OPT_STARTTLS, REP_ERR_INVALID, b"TLS already enabled"),
            (OPT_ABORT, REP_ACK, b""),
        ]


def test_what_was_said_before_tls_does_not_count() -> None:
    """Structured replies asked for in public are not in force inside (they were refused, too)."""
    with SecureBench() as bench:
        bench.disk(cached="always")
        peer = bench.secure_peer()
        peer.send(FIXED + option(OPT_STRUCTURED_REPLY) + option(OPT_STARTTLS))
        bench.until(lambda: len(answers(peer)) == 2, "the answers")
        peer.start_tls()
        bench.until(lambda: peer.socket is peer.stream, "the handshake")
        peer.send(option(OPT_STRUCTURED_REPLY))
        bench.until(lambda: len(answers(peer)) == 3, "the answer")
        assert answers(peer)[-1] == (OPT_STRUCTURED_REPLY, REP_ACK, b"")


RULES = {"policy": "deny", "rules": [{"match": "CN=fr?d", "format": "glob", "policy": "allow"}]}


def test_lists_are_asked() -> None:
    with SecureBench(authz=RULES) as bench:
        bench.disk(cached="always")
        client = bench.secure_client()
        assert bench.connection(client).identity == "CN=fred"
        client.good(client.read(0, 512))
        bench.place.tree.resolve("/objects/list").set("rules", [])
        client.good(client.read(0, 512))  # who is in stays
        other = bench.secure_peer()
        other.negotiate("disk", tls=True)
        other.wait_end()
        assert other.client is None
        assert bench.log[-1].endswith("TLS x509 authz check for CN=fred is denied")
        bench.place.tree.delete("list")
        third = bench.secure_peer()
        third.negotiate("disk", tls=True)
        third.wait_end()
        assert bench.log[-1].endswith("Cannot find QAuthZ object ID list")


def test_a_client_that_shows_no_certificate() -> None:
    with SecureBench() as bench:
        bench.disk()
        bench.place.add("/nobody")
        peer = bench.secure_peer(bench.place.client(directory="/nobody"))
        peer.negotiate("disk", tls=True)
        peer.wait_end()
        assert peer.client is None
        assert bench.log[-1].endswith("TLS handshake failed: peer did not return a certificate")


def test_anybody_may_come_in_where_nobody_asks() -> None:
    with SecureBench(verify_peer=False) as bench:
        bench.disk()
        bench.place.add("/nobody")
        peer = bench.secure_peer(bench.place.client(directory="/nobody"))
        peer.negotiate("disk", tls=True)
        peer.good(peer.read(0, 512))


def test_anonymous_credentials() -> None:
    with SecureBench(kind="tls-creds-anon", directory="") as bench:
        bench.disk()
        peer = bench.secure_peer(bench.place.client(None, kind="tls-creds-anon", directory=""))
        peer.negotiate("disk", tls=True)
        peer.good(peer.read(0, 512))


def test_silence_in_the_handshake_ends_it() -> None:
    """The limit of the whole negotiation holds for its TLS part as well."""
    with SecureBench(odds=Odds.calm()) as bench:
        bench.disk()
        peer = bench.peer()
        peer.send(FIXED + option(OPT_STARTTLS))
        began_ns = bench.context.now_ns()
        peer.wait_end()
        assert bench.context.now_ns() - began_ns >= 10_000_000_000
        assert bench.log[-1].endswith("no export chosen within the handshake limit")
        assert not bench.server.connections


def test_cut_anywhere(seed: int) -> None:
    """The client vanishes after any number of bytes: the server forgets it and serves the next."""
    with SecureBench(seed) as bench:
        bench.disk(cached="always")
        for _ in range(12):
            peer = bench.secure_peer()
            left = bench.random.randrange(3000)
            send = peer.plain.send

            def cut(data: Any, send: Any = send, peer: SecurePeer = peer) -> int:
                nonlocal left
                if left == 0:
                    peer.close()
                    raise ConnectionResetError
                count: int = send(bytes(data)[:left])
                left -= count
                return count

            peer.plain.send = cut
            peer.begin("disk", tls=True)
            for _ in range(300):
                if peer.ended or peer.client is not None:
                    break
                bench.context.poll(False) or bench.host.world.step()
            peer.close()
        bench.until(lambda: not bench.server.connections, "the server to forget them")
        client = bench.secure_client()
        client.good(client.read(0, 512))


def test_truncation_is_told_and_goodbye_is_not(seed: int) -> None:
    with SecureBench(seed, odds=Odds.calm()) as bench:
        bench.disk()
        client = bench.secure_client()
        client.close()
        bench.until(lambda: not bench.server.connections, "its end")
        assert len(bench.log) == 1 and "without the TLS peer's goodbye" in bench.log[0]
        client = bench.secure_client()
        assert client.stream is not None
        client.stream.shutdown()
        bench.until(lambda: not bench.server.connections, "its end")
        assert len(bench.log) == 1


def test_half_a_write_is_not_carried_out() -> None:
    """The payload is cut off by whoever sits in between: nothing of it reaches the disk."""
    with SecureBench(odds=Odds.calm()) as bench:
        content = bytes(bench.disk())
        client = bench.secure_client()
        packet, _ = client._client.write(0, b"Z" * 40_000)
        client.send(packet[:30_000])
        bench.until(lambda: not client.unsent, "half of it to be sent")
        client.close()
        bench.until(lambda: not bench.server.connections, "its end")
        check = bench.secure_client()
        assert check.good(check.read(0, 40_000)).data == content[:40_000]


def test_garbage_in_the_stream_ends_it(seed: int) -> None:
    with SecureBench(seed) as bench:
        bench.disk(cached="always")
        client = bench.secure_client()
        client.good(client.read(0, 4096))
        client.plain.send(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512))  # a request in plain text
        client.wait_end()
        assert "TLS session failed" in bench.log[-1]
