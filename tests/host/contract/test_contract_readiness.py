# SPDX-License-Identifier: Apache-2.0
"""What every host promises about time, pollers, events and sockets."""

from __future__ import annotations

import errno
import signal

import pytest

from bottomhalf.host.protocol import HUP, IN, OUT, InetAddress, UnixAddress
from bottomhalf.host.request import WRITE, Request
from tests.host.contract.conftest import WAIT_NS, Place


def test_clock_and_chance(place: Place) -> None:
    host = place.host
    first_ns = host.monotonic_ns()
    assert place.poller().wait(1_000_000) == []
    assert host.monotonic_ns() >= first_ns + 1_000_000
    assert host.realtime_ns() > 1_600_000_000 * 10**9
    assert len(host.random_bytes(33)) == 33
    assert host.random_bytes(16) != host.random_bytes(16)
    assert host.thread_id() == host.thread_id()
    items = list(range(20))
    host.shuffle(items)
    assert sorted(items) == list(range(20))


def test_event_is_level_triggered(place: Place) -> None:
    event, poller = place.event(), place.poller()
    poller.register(event.fileno(), IN)
    assert poller.wait(0) == []
    event.set()
    event.set()
    for _ in range(3):
        assert poller.wait(WAIT_NS) == [(event.fileno(), IN)]
    assert event.clear() is True
    assert event.clear() is False
    assert poller.wait(0) == []


def test_registering(place: Place) -> None:
    event, poller = place.event(), place.poller()
    poller.register(event.fileno(), IN)
    with pytest.raises(FileExistsError):
        poller.register(event.fileno(), IN)
    event.set()
    poller.modify(event.fileno(), 0)
    assert poller.wait(0) == []
    poller.modify(event.fileno(), IN)
    assert poller.wait(0) == [(event.fileno(), IN)]
    poller.unregister(event.fileno())
    assert poller.wait(0) == []
    with pytest.raises(FileNotFoundError):
        poller.unregister(event.fileno())
    with pytest.raises(FileNotFoundError):
        poller.modify(event.fileno(), IN)


def test_all_that_is_ready_is_told_in_the_end(place: Place) -> None:
    events, poller = [place.event() for _ in range(20)], place.poller()
    for event in events:
        poller.register(event.fileno(), IN)
        event.set()
    by_fd = {event.fileno(): event for event in events}
    while by_fd:
        for fd, mask in poller.wait(WAIT_NS):
            assert mask == IN
            by_fd.pop(fd).clear()
    assert poller.wait(0) == []


def test_closed_descriptor_is_forgotten(place: Place) -> None:
    event, poller = place.host.event(), place.poller()
    poller.register(event.fileno(), IN)
    event.set()
    event.close()
    event.close()
    assert poller.wait(0) == []


def test_poller_in_a_poller(place: Place) -> None:
    inner, outer, event = place.poller(), place.poller(), place.event()
    inner.register(event.fileno(), IN)
    outer.register(inner.fileno(), IN)
    assert outer.wait(0) == []
    event.set()
    assert outer.wait(WAIT_NS) == [(inner.fileno(), IN)]


def test_files_cannot_be_polled(place: Place) -> None:
    file = place.open(place.file("a", 10))
    with pytest.raises(PermissionError):
        place.poller().register(file.fileno(), IN)


def test_signals(place: Place) -> None:
    if place.host.name != "sim":
        return  # raising one is the business of the real host's own tests
    source = place.host.signals([signal.SIGUSR1])
    place.host.raise_signal(signal.SIGUSR1)  # type: ignore[attr-defined]
    place.until_ready(source.fileno())
    assert source.take() == [signal.SIGUSR1]
    assert source.take() == []
    source.close()


def test_bytes_and_the_end_of_the_stream(place: Place) -> None:
    near, far = place.sockets()
    data = place.host.random_bytes(300_000)
    left, received, buffer = memoryview(data), bytearray(), bytearray(50_000)
    poller = place.poller()
    poller.register(near.fileno(), OUT)
    poller.register(far.fileno(), IN)
    ended = False
    while not ended:
        for fd, _ in poller.wait(WAIT_NS):
            if fd == far.fileno():
                count = far.recv_into(buffer)
                received += buffer[:count]
                ended = count == 0
            elif left:
                left = left[near.sendmsg([left[:10], left[10:]]) :]
            else:
                poller.unregister(near.fileno())
                near.close()
    assert received == data
    assert far.recv_into(buffer) == 0


def test_sockets_never_wait(place: Place) -> None:
    near, far = place.sockets()
    with pytest.raises(BlockingIOError):
        far.recv_into(bytearray(10))
    with pytest.raises(BlockingIOError):
        for _ in range(100_000):
            near.send(bytes(1 << 16))
    poller = place.poller()
    poller.register(near.fileno(), OUT)
    assert poller.wait(0) == []
    assert near.peer_name() and far.peer_name()


def test_send_more_is_a_send(place: Place) -> None:
    near, far = place.sockets()
    assert near.send_more(b"a") == 1
    assert near.send(b"b") == 1
    buffer, received = bytearray(10), b""
    while len(received) < 2:
        place.until_ready(far.fileno())
        received += bytes(buffer[: far.recv_into(buffer)])
    assert received == b"ab"


def test_send_file(place: Place) -> None:
    near, far = place.sockets()
    file = place.open(place.file("a", bytes(range(200))), read_only=True)
    sent = 0
    while sent < 150:
        sent += near.send_file(file, 50 + sent, 1000)
    assert sent == 150
    assert near.send_file(file, 200, 10) == 0
    buffer, received = bytearray(1000), b""
    while len(received) < 150:
        received += bytes(buffer[: far.recv_into(buffer)])
    assert received == bytes(range(50, 200))


def test_what_the_other_end_has_not_read(place: Place) -> None:
    """More may be told while something is unread; never less, and nothing when nothing is."""
    near, far = place.sockets()
    file = place.open(place.file("a", bytes(range(200))), read_only=True)
    if near.unread() is None:
        return  # not a Unix socket: nobody can tell
    assert near.unread() == 0
    sent = near.send(b"a" * 100) + near.send_file(file, 0, 100)
    left, buffer = sent, bytearray(30)
    while left:
        assert near.unread() >= left  # type: ignore[operator]
        place.until_ready(far.fileno())
        left -= far.recv_into(buffer)
    assert near.unread() == 0
    near.send(b"b")
    far.close()
    assert near.unread() == 0


def test_a_file_that_is_sent_is_shared(place: Place) -> None:
    """Or copied: the bytes are those of then, or those of now."""
    near, far = place.sockets()
    file = place.open(place.file("a", b"1" * 4096))
    sent = near.send_file(file, 0, 4096)
    request = Request(WRITE, 0, 4096, memoryview(bytearray(b"2" * 4096)))
    engine = place.engine()
    engine.prepare(file, request)
    engine.enter()
    assert place.complete(engine) == [request]
    buffer, received = bytearray(4096), b""
    while len(received) < sent:
        place.until_ready(far.fileno())
        received += bytes(buffer[: far.recv_into(buffer)])
    assert set(received) in ({ord("1")}, {ord("2")})


def test_shutdown_is_seen_by_both(place: Place) -> None:
    near, far = place.sockets()
    near.send(b"x")
    near.shutdown()
    near.shutdown()
    assert place.until_ready(near.fileno()) & HUP
    buffer = bytearray(10)
    assert near.recv_into(buffer) == 0
    assert far.recv_into(buffer) == 1
    assert far.recv_into(buffer) == 0
    with pytest.raises(BrokenPipeError):
        near.send(b"x")
    with pytest.raises(BrokenPipeError):
        far.send(b"x")


def test_peer_that_closes_without_reading_resets(place: Place) -> None:
    near, far = place.sockets()
    near.send(b"x")
    far.send(b"y")
    far.close()
    assert near.recv_into(bytearray(10)) == 1
    with pytest.raises(ConnectionResetError):
        near.recv_into(bytearray(10))
    assert near.recv_into(bytearray(10)) == 0


def test_connecting_to_nobody(place: Place) -> None:
    with pytest.raises(FileNotFoundError):
        place.host.connect(UnixAddress(place.path("nowhere")))
    with pytest.raises(ConnectionRefusedError):
        place.host.connect(UnixAddress(place.file("plain")))
    listener = place.host.listen(InetAddress("127.0.0.1", 0))
    address = listener.address
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        place.host.connect(address)


def test_address_in_use(place: Place) -> None:
    for address in (UnixAddress(place.path("s")), InetAddress("127.0.0.1", 0)):
        listener = place.host.listen(address)
        with pytest.raises(OSError) as caught:
            place.host.listen(listener.address)
        assert caught.value.errno == errno.EADDRINUSE
        listener.close()
        place.host.listen(listener.address).close()


def test_listening_never_removes_what_is_no_socket(place: Place) -> None:
    path = place.file("image", b"precious")
    with pytest.raises(OSError) as caught:
        place.host.listen(UnixAddress(path))
    assert caught.value.errno == errno.EADDRINUSE
    place.open(path).close()


def test_tcp(place: Place) -> None:
    listener = place.host.listen(InetAddress("127.0.0.1", 0))
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert isinstance(listener.address, InetAddress) and listener.address.port
    near = place.host.connect(listener.address)
    place.until_ready(listener.fileno())
    far = listener.accept()
    assert near.peer_name() == str(listener.address)
    far.send(b"x")
    place.until_ready(near.fileno())
    buffer = bytearray(1)
    assert near.recv_into(buffer) == 1 and buffer == b"x"
    for opened in (near, far, listener):
        opened.close()
