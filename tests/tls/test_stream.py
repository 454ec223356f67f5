# SPDX-License-Identifier: Apache-2.0
"""Streams over simulated sockets that take and give what they like: no byte lost, doubled, or left lying."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from bottomhalf.aio import AioContext
from bottomhalf.host.protocol import IN, OUT, InetAddress, UnixAddress
from bottomhalf.host.sim import Odds, SimHost
from bottomhalf.host.sim.sockets import SimSocket
from bottomhalf.tls.errors import NotAdmitted, TlsError, Truncated
from bottomhalf.tls.handshaking import HANDSHAKE_NS_MAX, Handshaking
from bottomhalf.tls.stream import ENCRYPT_BYTES_MAX, TlsStream
from tests.tls.ends import Place

ADDRESS = UnixAddress("/run/t.sock")
TURNS_MAX = 100_000
_place = Place()
_client, _server = _place.client(), _place.server()


class Pair:
    """Two streams on one machine."""

    def __init__(self, seed: int = 0, *, odds: Odds | None = None, secure: bool = True) -> None:
        self.host = SimHost(seed, odds=odds)
        self.random = random.Random(f"pair/{seed}")
        self.context = AioContext(self.host)
        listener = self.host.listen(ADDRESS)
        near = self.host.connect(ADDRESS)
        far = listener.accept()
        assert isinstance(far, SimSocket)
        self.client, self.server = _client.wrap(near), _server.wrap(far)
        self.near, self.far = near, far
        if secure:
            done: list[OSError | None] = []
            for stream in (self.client, self.server):
                Handshaking(self.context, stream, done.append)
            self.until(lambda: len(done) == 2, "the handshake")
            assert done == [None, None]

    def until(self, condition: Callable[[], object], what: str) -> None:
        for _ in range(TURNS_MAX):
            if condition():
                return
            self.context.poll(True)
        raise AssertionError(f"{TURNS_MAX} turns did not bring {what}")


class Receiver:
    """Reads in a level-triggered loop, with a small buffer."""

    def __init__(self, pair: Pair, stream: TlsStream, size: int) -> None:
        self.data = bytearray()
        self.ended: str | None = None
        self._pair, self._stream, self._buffer = pair, stream, bytearray(size)
        pair.context.set_fd_handler(stream.fileno(), self._readable)
        pair.context.schedule_oneshot(self._readable)

    def _readable(self) -> None:
        if self.ended is not None:
            return
        try:
            count = self._stream.recv_into(self._buffer)
        except BlockingIOError:
            return
        except Truncated:
            count, self.ended = 0, "truncated"
        except OSError as error:
            count, self.ended = 0, str(error)
        else:
            if not count:
                self.ended = "goodbye"
        self.data += self._buffer[:count]
        if self.ended is not None:
            self._pair.context.set_fd_handler(self._stream.fileno())
        elif self._stream.buffered:
            self._pair.context.schedule_oneshot(self._readable)


def send_all(pair: Pair, stream: TlsStream, data: bytes, message: bool) -> None:
    """What a careful caller does: come again with what was not taken."""
    at = 0
    while at < len(data):
        rest = memoryview(data)[at:]
        try:
            if message:
                cut = min(len(rest), pair.random.randrange(1, 5000))
                at += stream.sendmsg([rest[:cut], rest[cut:]] if len(rest) > cut else [rest])
            else:
                at += stream.send(rest)
        except BlockingIOError:
            pair.context.poll(False) or pair.host.world.step()
    while not stream.push():
        pair.context.poll(False) or pair.host.world.step()


@pytest.mark.parametrize("message", [False, True])
def test_bytes_arrive_as_they_were_sent(seed: int, message: bool) -> None:
    pair = Pair(seed)
    data = pair.random.randbytes(pair.random.choice((1, 5000, 600_000)))
    receiver = Receiver(pair, pair.server, pair.random.choice((100, 4096, 65536)))
    send_all(pair, pair.client, data, message)
    pair.until(lambda: len(receiver.data) >= len(data), "the bytes")
    assert receiver.data == data
    pair.client.shutdown()
    pair.until(lambda: receiver.ended, "the end")
    assert receiver.ended == "goodbye"


def test_what_is_held_counts_as_unsent() -> None:
    """A socket that is full takes nothing; what is encrypted already is not reported, and not encrypted twice."""
    pair = Pair(odds=Odds.calm())
    data = random.Random(3).randbytes(3 * ENCRYPT_BYTES_MAX)
    sent = 0
    for _ in range(100):
        try:
            sent += pair.client.send(memoryview(data)[sent:])
        except BlockingIOError:
            break
    assert sent < len(data) and pair.client.unsent
    with pytest.raises(BlockingIOError):
        pair.client.send(memoryview(data)[sent:])
    receiver = Receiver(pair, pair.server, 65536)
    send_all(pair, pair.client, data[sent:], False)
    pair.until(lambda: len(receiver.data) >= len(data), "the bytes")
    assert receiver.data == data


def test_a_caller_that_comes_with_less() -> None:
    """Held bytes are skipped in as many steps as the caller likes."""
    pair = Pair(odds=Odds.calm())
    data = random.Random(4).randbytes(2 * ENCRYPT_BYTES_MAX)
    sent = 0
    try:
        while True:
            sent += pair.client.send(memoryview(data)[sent:])
    except BlockingIOError:
        pass
    receiver = Receiver(pair, pair.server, 65536)
    while sent < len(data):
        try:
            sent += pair.client.send(memoryview(data)[sent : sent + 999])
        except BlockingIOError:
            pair.context.poll(False) or pair.host.world.step()
    pair.until(lambda: len(receiver.data) >= len(data), "the bytes")
    assert receiver.data == data


def test_end_without_goodbye() -> None:
    pair = Pair()
    receiver = Receiver(pair, pair.server, 100)
    send_all(pair, pair.client, b"half a sen", False)
    pair.until(lambda: receiver.data, "the bytes")
    pair.near.close()
    pair.until(lambda: receiver.ended, "the end")
    assert (receiver.data, receiver.ended) == (b"half a sen", "truncated")


def test_goodbye_behind_bytes_is_told_without_the_socket() -> None:
    """The goodbye lies decrypted behind the bytes, and the peer keeps the connection: the loop would never call."""
    pair = Pair(odds=Odds.calm())
    pair.client.send(b"bye")
    pair.client.session.say_goodbye()
    pair.client.push()
    pair.until(lambda: pair.far.readiness() & IN, "it")
    buffer = bytearray(100)
    assert pair.server.recv_into(buffer) == 3
    assert pair.server.buffered
    assert pair.server.recv_into(buffer) == 0
    assert pair.far.readiness() & OUT


def test_plain_bytes_in_the_midst() -> None:
    """Somebody else's bytes in the stream: an error, after what was genuine."""
    pair = Pair(odds=Odds.calm())
    pair.client.send(b"genuine")
    pair.near.send(b"and forged, in plain text")
    receiver = Receiver(pair, pair.server, 100)
    pair.until(lambda: receiver.ended, "the end")
    assert receiver.data == b"genuine"
    assert receiver.ended is not None and receiver.ended.startswith("TLS session failed")


def test_a_file_is_sent_through_the_program() -> None:
    pair = Pair(odds=Odds.calm())
    pair.host.add_file("f", b"x" * 100_000 + b"end")
    file = pair.host.open_file("f", read_only=True)
    receiver = Receiver(pair, pair.server, 65536)
    at = 0
    while at < 100_003:
        try:
            at += pair.client.send_file(file, at, 200_000)
        except BlockingIOError:
            pair.context.poll(False) or pair.host.world.step()
    assert pair.client.send_file(file, at, 1) == 0
    pair.until(lambda: len(receiver.data) == at, "the bytes")
    assert receiver.data.endswith(b"xend") and pair.client.unread() is None


def test_handshake_of_a_silent_peer_ends() -> None:
    pair = Pair(secure=False)
    ended: list[OSError | None] = []
    began_ns = pair.context.now_ns()
    Handshaking(pair.context, pair.server, ended.append)
    pair.until(lambda: ended, "the limit")
    assert isinstance(ended[0], TlsError) and str(ended[0]) == "TLS handshake failed: not done within 10 s"
    assert pair.context.now_ns() - began_ns >= HANDSHAKE_NS_MAX


def test_handshake_moves_to_another_context(seed: int) -> None:
    """Left in the midst, and taken up elsewhere."""
    pair = Pair(seed, secure=False)
    other = AioContext(pair.host)
    done: list[OSError | None] = []
    Handshaking(pair.context, pair.client, done.append)
    theirs = Handshaking(pair.context, pair.server, done.append)
    for _ in range(pair.random.randrange(4)):
        pair.context.poll(False)
    theirs.leave()
    theirs.enter(other)
    for _ in range(TURNS_MAX):
        if len(done) == 2:
            break
        pair.context.poll(False) or other.poll(False) or pair.host.world.step()
    assert done == [None, None]


def test_handshake_that_is_given_up_says_nothing() -> None:
    pair = Pair(secure=False)
    done: list[OSError | None] = []
    theirs = Handshaking(pair.context, pair.server, done.append)
    theirs.close()
    pair.context.poll(False)
    assert done == [] and pair.far.closed


def test_why_a_peer_left_is_told_to_who_sends() -> None:
    """TLS 1.3: the client is through before the server has looked at its certificate."""
    host = SimHost(0, odds=Odds.calm())
    place = Place(host)
    place.add("/nobody")
    listener = host.listen(InetAddress("127.0.0.1", 5))
    client = place.client(directory="/nobody")
    near = client.wrap(host.connect(InetAddress("127.0.0.1", 5)))
    far = place.server().wrap(listener.accept())
    assert not near.handshake()
    with pytest.raises(TlsError, match="peer did not return a certificate"):
        for _ in range(4):
            far.handshake()
            near.handshake()
    assert near.handshake()
    far.shutdown()
    far.close()
    with pytest.raises(TlsError, match="certificate required"):
        for _ in range(4):
            near.send(b"hello?")


def test_who_may_come_in() -> None:
    pair = Pair()
    place = _place
    for name, kind, values in (
        ("yes", "authz-simple", {"identity": "CN=fred"}),
        ("no", "authz-simple", {"identity": "CN=fre"}),
        ("list", "authz-list", {"rules": [{"match": "CN=f?e*", "format": "glob", "policy": "allow"}]}),
    ):
        place.tree.create(kind, name, values)
    admitted = {}
    for name in ("yes", "no", "list", "nix", "s1"):
        try:
            admitted[name] = replace(_server, authz_id=name).admit(pair.server)
        except NotAdmitted as error:
            admitted[name] = str(error)
    assert admitted == {
        "yes": "CN=fred",
        "no": "TLS x509 authz check for CN=fred is denied",
        "list": "CN=fred",
        "nix": "Cannot find QAuthZ object ID nix",
        "s1": "Object 's1' is not a QAuthZ subclass",
    }
