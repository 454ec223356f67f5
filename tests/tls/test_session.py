# SPDX-License-Identifier: Apache-2.0
"""Sessions without sockets: both ends, cut at every place, and peers that break off, lie, or say nothing sensible."""

from __future__ import annotations

import random

import pytest

from bottomhalf.tls.errors import TlsError, Truncated
from bottomhalf.tls.session import HANDSHAKE_BYTES_MAX, UNASKED_BYTES_MAX, Session
from tests.peers.certificates import DAY, NOW
from tests.tls.ends import HOSTS, Place, authority, server_certificate, sessions, shake_hands

_place = Place()
_client, _server = _place.client(), _place.server()


def again() -> tuple[Session, Session]:
    """Both ends anew, of the same credentials."""
    return _client.credentials.session("localhost"), _server.credentials.session()


def read_all(session: Session) -> bytes:
    data, buffer = b"", memoryview(bytearray(1000))
    while count := session.read_into(buffer):
        data += buffer[:count]
    return data


def wire(sender: Session, receiver: Session) -> None:
    receiver.receive(sender.take_output())


def both(**values: object) -> tuple[Session, Session]:
    client, server = sessions(**values) if values else again()  # type: ignore[arg-type]
    shake_hands(client, server)
    return client, server


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 7, 100, 1 << 20])
@pytest.mark.parametrize("priority", ["", "NORMAL:-VERS-TLS1.3"])
def test_handshake_in_pieces(cut: int, priority: str) -> None:
    client, server = sessions(priority=priority)
    shake_hands(client, server, cut)
    assert client.established and server.established
    assert client.version == server.version and client.version.startswith("TLSv1.2" if priority else "TLSv1.3")


def test_bytes_in_both_directions_cut_at_every_place() -> None:
    client, server = both()
    chance = random.Random(1)
    for sender, receiver in ((client, server), (server, client)):
        data = chance.randbytes(300)
        sender.write(data)
        packet = sender.take_output()
        got = b""
        for at in range(len(packet)):
            receiver.receive(packet[at : at + 1])
            got += read_all(receiver)
        assert got == data


def test_large_data_leaves_nothing_behind() -> None:
    """Whoever reads until None has everything that came, whatever the size of his buffer."""
    client, server = both()
    data = random.Random(2).randbytes(100_000)
    client.write(data)
    wire(client, server)
    assert read_all(server) == data
    assert server.read_into(memoryview(bytearray(1))) is None


def test_goodbye_is_an_end_and_silence_is_not() -> None:
    client, server = both()
    client.write(b"last words")
    client.say_goodbye()
    wire(client, server)
    server.receive_eof()
    assert read_all(server) == b"last words"
    assert server.ended and server.read_into(memoryview(bytearray(8))) == 0

    client, server = both()
    client.write(b"last words")
    wire(client, server)
    server.receive_eof()
    buffer = memoryview(bytearray(64))
    assert server.read_into(buffer) == 10
    with pytest.raises(Truncated, match="without the TLS peer's goodbye"):
        server.read_into(buffer)


def test_every_truncation_is_noticed() -> None:
    """A stream that was cut anywhere before its last byte never looks complete."""
    place = Place()
    for priority in ("", "NORMAL:-VERS-TLS1.3"):
        ours, theirs = place.client(priority=priority), place.server(priority=priority)
        whole, cut = 1, 0
        while cut < whole:
            client, server = ours.credentials.session("localhost"), theirs.credentials.session()
            shake_hands(client, server)
            client.write(b"transfer 100 to bob")
            client.write(b" and 5 to alice")
            client.say_goodbye()
            packet = client.take_output()
            server.receive(packet[:cut])
            server.receive_eof()
            with pytest.raises(TlsError):
                read_all(server)
            whole, cut = len(packet), cut + 1


def test_a_changed_byte_is_noticed() -> None:
    for at in range(0, 60, 3):
        client, server = both()
        client.write(b"transfer 100 to bob, please now")
        packet = bytearray(client.take_output())
        packet[at % len(packet)] ^= 1
        server.receive(bytes(packet))
        try:
            got = read_all(server)
        except TlsError:
            continue
        assert got == b"", at  # a longer record, of which the rest is awaited


@pytest.mark.parametrize("who", ["client", "server"])
def test_handshake_cut_at_each_byte(who: str) -> None:
    """The peer vanishes after each byte of its part: an error in words, never a session."""
    for cut in range(10_000):
        client, server = again()
        me, peer = (client, server) if who == "server" else (server, client)
        left = cut
        for _ in range(4):
            for sender, receiver in ((client, server), (server, client)):
                sender.handshake()
                data = sender.take_output()
                if sender is peer:
                    data = data[:left]
                    left -= len(data)
                receiver.receive(data)
        if me.handshake():
            assert cut > 500
            return  # its part was whole
        me.receive_eof()
        with pytest.raises(TlsError, match="the peer has closed the connection"):
            me.handshake()
        assert not me.established
    raise AssertionError("the handshake is never whole")



@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        bytes(100),
        b"\x16\x03\x01\xff\xff" + bytes(70000),
        b"NBDMAGIC" * 9,
        b"\x80\x2e\x01\x00\x02" + bytes(60),
        b"\x15\x03\x03\x00\x02\x02\x28",
    ],
    ids=["http", "zeroes", "oversized record", "nbd", "sslv2", "alert"],
)
def test_garbage_instead_of_a_handshake(garbage: bytes) -> None:
    for session in again():
        session.handshake()
        session.take_output()
        session.receive(garbage)
        with pytest.raises(TlsError, match="TLS handshake failed"):
            session.handshake()
        with pytest.raises(TlsError):  # and again
            session.handshake()


def test_random_bytes_never_make_a_session(seed: int) -> None:
    chance = random.Random(seed)
    for session in again():
        session.handshake()
        begin = chance.choice((b"\x16\x03\x03", b"\x16\x03\x01", b""))
        session.receive(begin + chance.randbytes(chance.randrange(600)))
        try:
            assert not session.handshake()
        except TlsError:
            pass


def test_changed_hello_never_makes_a_session(seed: int) -> None:
    """One byte of the first flight changed: no session, or one that both ends see alike."""
    chance = random.Random(seed)
    client, server = again()
    client.handshake()
    hello = bytearray(client.take_output())
    hello[chance.randrange(len(hello))] ^= 1 << chance.randrange(8)
    try:
        server.receive(bytes(hello))
        server.handshake()
        client.receive(server.take_output())
        client.handshake()
        server.receive(client.take_output())
        assert not (client.established and server.handshake())
    except TlsError:
        pass


def test_handshake_that_never_ends() -> None:
    """Endless records of a handshake: the limit of bytes."""
    _, server = again()
    record = b"\x16\x03\x01\x40\x00" + b"\x01\x00\xff\xff" + bytes(0x4000 - 4)
    with pytest.raises(TlsError):
        for _ in range(HANDSHAKE_BYTES_MAX // len(record) + 2):
            server.receive(record)
            server.handshake()


def test_fragments_without_end_meet_the_limit() -> None:
    """The limit counts what came, also what OpenSSL has not looked at yet."""
    _, server = again()
    with pytest.raises(TlsError, match="more than 262144 bytes"):
        for _ in range(HANDSHAKE_BYTES_MAX + 1):
            server.receive(b"\x16" * 64)


def test_answers_that_nobody_reads_have_a_limit() -> None:
    """A peer can ask for new keys (TLS 1.3) as often as it likes; what we owe it is bounded."""
    client, server = both()
    client.write(b"x")
    packet = client.take_output()
    server.receive(packet[:7])
    assert server.read_into(memoryview(bytearray(9))) is None
    server._outgoing.write(bytes(UNASKED_BYTES_MAX + 1))
    server.receive(packet[7:9])
    with pytest.raises(TlsError, match="asks for new keys again and again"):
        server.read_into(memoryview(bytearray(9)))


def test_wrong_authority_expired_and_wrong_name() -> None:
    place = Place()
    other = authority("Other CA")
    place.add("/other", by=other, server=other.issue("localhost", hosts=HOSTS), client=other.issue("mallory"))
    place.add("/late", server=authority().issue("localhost", hosts=HOSTS, not_after=NOW - DAY))
    place.add("/early", server=authority().issue("localhost", hosts=HOSTS, not_before=NOW + DAY))
    place.add("/wrong", server=authority().issue("elsewhere", hosts=("elsewhere",)))
    place.add("/purpose", server=authority().issue("localhost", hosts=HOSTS, server=False))
    expected = {
        "/other": "The certificate hasn't got a known issuer",
        "/late": "The certificate has expired",
        "/early": "The certificate is not yet activated",
        "/wrong": "Certificate does not match the hostname localhost",
        "/purpose": "The certificate is not for this purpose",
    }
    for directory, text in expected.items():
        client = place.client()
        server = place.server(directory=directory, sanity_check=False)
        with pytest.raises(TlsError) as caught:
            shake_hands(client.credentials.session("localhost"), server.credentials.session())
        assert str(caught.value) == text


def test_clients_that_the_server_does_not_know() -> None:
    place = Place()
    mallory = authority("Other CA").issue("mallory")
    place.add("/nobody")
    place.add("/mallory", client=mallory)
    server = place.server()
    for directory, text in (
        ("/nobody", "peer did not return a certificate"),
        ("/mallory", "The certificate hasn't got a known issuer"),
    ):
        client = place.client(directory=directory, sanity_check=False)
        with pytest.raises(TlsError, match=text):
            shake_hands(client.credentials.session("localhost"), server.credentials.session())


def test_revoked() -> None:
    place = Place()
    issued, fine = authority().issue("gone"), authority().issue("fine")
    place.add("/crl", server=server_certificate())
    place.host.add_file("/crl/ca-crl.pem", authority().revoke(issued))
    place.add("/gone", client=issued)
    place.add("/fine", client=fine)
    server = place.server(directory="/crl")
    shake_hands(place.client(directory="/fine").credentials.session("localhost"), server.credentials.session())
    with pytest.raises(TlsError, match="The certificate has been revoked"):
        shake_hands(place.client(directory="/gone").credentials.session("localhost"), server.credentials.session())


@pytest.mark.parametrize("hostname", [*HOSTS, "LOCALHOST"])
def test_names_that_match(hostname: str) -> None:
    place = Place()
    client = place.client(hostname)
    shake_hands(client.credentials.session(hostname), place.server().credentials.session())


@pytest.mark.parametrize("hostname", ["127.0.0.2", "example.com", "localhost.example.com", "*"])
def test_names_that_do_not(hostname: str) -> None:
    place = Place()
    with pytest.raises(TlsError, match="does not match the hostname"):
        shake_hands(place.client(hostname).credentials.session(hostname), place.server().credentials.session())


@pytest.mark.parametrize("hostname", [".", ".example.com", "a\0b", "x" * 300, "\udcff", ""])
def test_names_that_are_none(hostname: str) -> None:
    place = Place()
    with pytest.raises(TlsError):
        shake_hands(place.client(hostname).credentials.session(hostname), place.server().credentials.session())


def test_a_client_needs_a_name_only_where_it_looks() -> None:
    place = Place()
    with pytest.raises(TlsError, match="No hostname for certificate validation"):
        place.client().credentials.session(None)
    shake_hands(place.client(verify_peer=False).credentials.session(None), place.server().credentials.session())


def test_versions_that_have_nothing_in_common() -> None:
    place = Place()
    client = place.client(priority="NORMAL:-VERS-ALL:+VERS-TLS1.2")
    server = place.server(priority="NORMAL:-VERS-ALL:+VERS-TLS1.3")
    with pytest.raises(TlsError, match="TLS handshake failed"):
        shake_hands(client.credentials.session("localhost"), server.credentials.session())


def test_anonymous() -> None:
    place = Place()
    client = place.client(None, kind="tls-creds-anon", directory="")
    server = place.server(kind="tls-creds-anon", directory="")
    ends = client.credentials.session(None), server.credentials.session()
    shake_hands(*ends)
    assert ends[0].version.startswith("TLSv1.2 ADH-")
    assert ends[1].peer_certificate is None
    # Certificates and no certificates do not meet.
    with pytest.raises(TlsError, match="TLS handshake failed"):
        shake_hands(place.client().credentials.session("localhost"), server.credentials.session())
    with pytest.raises(TlsError, match="TLS handshake failed"):
        shake_hands(client.credentials.session(None), place.server().credentials.session())
