# SPDX-License-Identifier: Apache-2.0
"""Simulated sockets: bytes in order whatever the cuts, and every way in which a connection ends."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.host.protocol import ERR, HUP, IN, OUT, Address, InetAddress, UnixAddress
from bottomhalf.host.request import READ
from bottomhalf.host.sim import ACCEPT, CONNECT, Odds, SimHost
from bottomhalf.host.sim.sockets import SimSocket

UNIX = UnixAddress("/run/nbd.sock")
INET = InetAddress("localhost", 10809)


def make(address: Address = UNIX, odds: Odds | None = None) -> tuple[SimHost, SimSocket, SimSocket]:
    host = SimHost(odds=odds or Odds.calm())
    listener = host.listen(address)
    near = host.connect(address)
    return host, near, listener.accept()


def ready(host: SimHost, socket: SimSocket, mask: int = IN | OUT) -> int:
    poller = host.poller()
    poller.register(socket.fileno(), mask)
    found = poller.wait(0)
    poller.close()
    return found[0][1] if found else 0


@given(
    st.binary(max_size=3000),
    st.integers(0, 1 << 16),
    st.integers(1, 300),
    st.integers(0, 1000),
    st.sampled_from(["send", "send_more", "sendmsg"]),
)
def test_bytes_come_out_as_they_went_in(
    data: bytes, seed: int, capacity: int, delay_ns: int, how: str
) -> None:
    host = SimHost(seed, odds=Odds(short_send=0.5, short_recv=0.5))
    host.network.buffer_bytes, host.network.delay_ns = capacity, (0, delay_ns)
    near, far = host.socket_pair()
    poller = host.poller()
    poller.register(near.fileno(), OUT)
    poller.register(far.fileno(), IN)
    left, received, buffer, ended = memoryview(data), bytearray(), bytearray(100), False
    while not ended:
        for fd, _ in poller.wait(-1):
            if fd == far.fileno():
                count = far.recv_into(buffer)
                received += buffer[:count]
                ended = count == 0
            elif left:
                if how == "sendmsg":
                    sent = near.sendmsg([left[:7], left[7:7], left[7:]])
                else:
                    sent = getattr(near, how)(left)
                assert 1 <= sent <= capacity
                left = left[sent:]
            else:
                poller.unregister(near.fileno())
                near.close()
    assert received == data


def test_listening_and_connecting() -> None:
    host = SimHost()
    with pytest.raises(FileNotFoundError):
        host.connect(UNIX)
    with pytest.raises(ConnectionRefusedError):
        host.connect(INET)
    for address in (UNIX, INET):
        listener = host.listen(address)
        with pytest.raises(OSError) as caught:
            host.listen(address)
        assert caught.value.errno == errno.EADDRINUSE
        poller = host.poller()
        poller.register(listener.fileno(), IN)
        with pytest.raises(BlockingIOError):
            listener.accept()
        near = host.connect(address)
        near.send(b"early")  # before accept
        assert poller.wait(0) == [(listener.fileno(), IN)]
        far = listener.accept()
        assert b"early".startswith(far.take())
        assert poller.wait(0) == []
        listener.close()
        near.send(b"the connection stays")
        with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
            host.connect(address)
        host.listen(address)


def test_addresses() -> None:
    host = SimHost()
    first = host.listen(InetAddress("127.0.0.1", 0))
    second = host.listen(InetAddress("127.0.0.1", 0))
    assert isinstance(first.address, InetAddress) and isinstance(second.address, InetAddress)
    assert 0 != first.address.port != second.address.port != 0
    with pytest.raises(OSError):
        host.listen(InetAddress("0.0.0.0", first.address.port))
    anywhere = host.listen(InetAddress("", 10809))
    near = host.connect(InetAddress("127.0.0.1", 10809))
    assert near.peer_name() == "127.0.0.1:10809"
    assert anywhere.accept().peer_name().startswith("127.0.0.1:")
    host.listen(UNIX)
    assert host.connect(UNIX).peer_name() == "this process (pid 1000, uid 0)"
    host.add_file("/a/file", 1)
    with pytest.raises(OSError) as caught:
        host.listen(UnixAddress("/a/file"))
    assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(ConnectionRefusedError):
        host.connect(UnixAddress("/a/file"))


def test_full_backlog() -> None:
    host = SimHost()
    host.listen(UNIX)
    with pytest.raises(BlockingIOError):
        for _ in range(1000):
            host.connect(UNIX)


def test_listener_closed_with_connections_waiting() -> None:
    host = SimHost()
    listener = host.listen(UNIX)
    near = host.connect(UNIX)
    listener.close()
    with pytest.raises(ConnectionResetError):
        near.recv_into(bytearray(1))


def test_faults_of_the_network() -> None:
    host = SimHost()
    host.fault(path=str(INET), op=CONNECT, errno=errno.ETIMEDOUT, delay_ns=10**9, times=1)
    host.fault(op=ACCEPT, errno=errno.EMFILE, times=1)
    listener = host.listen(INET)
    before_ns = host.monotonic_ns()
    with pytest.raises(TimeoutError):
        host.connect(INET)
    assert host.monotonic_ns() == before_ns + 10**9
    host.connect(INET)
    with pytest.raises(OSError):
        listener.accept()
    assert listener.accept().fileno() > 0


def test_nothing_to_read_and_no_room() -> None:
    host, near, far = make()
    with pytest.raises(BlockingIOError):
        near.recv_into(bytearray(10))
    assert near.recv_into(bytearray(0)) == 0
    assert ready(host, near) == OUT
    sent = near.send(bytes(10**6))
    assert 0 < sent < 10**6
    assert ready(host, near) == 0
    with pytest.raises(BlockingIOError):
        near.send(b"x")
    assert near.send(b"") == 0
    assert far.recv_into(bytearray(10)) == 10
    assert ready(host, near) == OUT
    assert near.send(bytes(100)) == 10


def test_closed_by_the_peer_after_all_was_read() -> None:
    for address in (UNIX, INET):
        host, near, far = make(address)
        far.send(b"last words")
        far.close()
        assert ready(host, near) == (IN | OUT | HUP if address == UNIX else IN | OUT)
        assert near.recv_into(bytearray(100)) == 10
        assert near.recv_into(bytearray(100)) == 0
        assert near.recv_into(bytearray(100)) == 0


def test_sending_to_a_closed_unix_peer() -> None:
    _, near, far = make(UNIX)
    far.close()
    with pytest.raises(BrokenPipeError):
        near.send(b"x")


def test_sending_to_a_closed_tcp_peer() -> None:
    host, near, far = make(INET)
    far.close()
    assert near.send(b"it does not know yet") == 20
    assert ready(host, near) == IN | OUT | ERR | HUP
    with pytest.raises(ConnectionResetError):
        near.send(b"x")
    with pytest.raises(BrokenPipeError):
        near.send(b"x")
    assert near.recv_into(bytearray(10)) == 0


def test_peer_closed_without_reading() -> None:
    for address in (UNIX, INET):
        _, near, far = make(address)
        far.send(b"answer")
        near.send(b"never read")
        far.close()
        assert near.recv_into(bytearray(100)) == 6
        with pytest.raises(ConnectionResetError):
            near.recv_into(bytearray(100))
        assert near.recv_into(bytearray(100)) == 0


def test_shutdown_ends_both_directions() -> None:
    for address in (UNIX, INET):
        host, near, far = make(address)
        near.send(b"bye")
        near.shutdown()
        near.shutdown()
        assert far.take() == b"bye"
        assert far.recv_into(bytearray(10)) == 0
        assert near.recv_into(bytearray(10)) == 0
        with pytest.raises(BrokenPipeError):
            near.send(b"x")
        assert ready(host, near) & HUP


def test_cut() -> None:
    host, near, far = make(INET)
    near.send(b"arrived")
    host.network.delay_ns = (1000, 1000)
    host.cut(near)
    assert ready(host, far) & (ERR | HUP)
    assert far.recv_into(bytearray(100)) == 7
    for end in (near, far):
        with pytest.raises(ConnectionResetError):
            end.recv_into(bytearray(100))
        with pytest.raises(BrokenPipeError):
            end.send(b"x")


def test_bytes_on_the_way_are_lost_with_the_connection() -> None:
    host = SimHost(odds=Odds.calm())
    host.network.delay_ns = (1000, 1000)
    near, far = host.socket_pair()
    near.send(b"first")
    host.advance(500)
    near.send(b"second")
    host.advance(500)
    host.cut(near)
    host.advance(10_000)
    assert far.take() == b"first"


def test_delivery_takes_time() -> None:
    host = SimHost()
    host.network.delay_ns = (1000, 5000)
    near, far = host.socket_pair()
    poller, start_ns = host.poller(), host.monotonic_ns()
    poller.register(far.fileno(), IN)
    near.send(b"x")
    assert poller.wait(0) == []
    assert poller.wait(-1) == [(far.fileno(), IN)]
    assert 1000 <= host.monotonic_ns() - start_ns <= 5000


def test_send_file() -> None:
    host, near, far = make()
    host.add_file("a", bytes(range(100)), cached="explicit")
    file = host.open_file("a")
    before_ns = host.monotonic_ns()
    assert near.send_file(file, 90, 20) == 10
    assert host.monotonic_ns() > before_ns  # it waited for the disk
    before_ns = host.monotonic_ns()
    assert near.send_file(file, 0, 5) == 5
    assert host.monotonic_ns() == before_ns
    assert near.send_file(file, 100, 20) == 0
    assert far.take() == bytes(range(90, 100)) + bytes(range(5))
    host.fault(path="a", op=READ, errno=errno.EIO)
    with pytest.raises(OSError) as caught:
        near.send_file(file, 0, 5)
    assert caught.value.errno == errno.EIO


def test_stdio() -> None:
    host = SimHost()
    stdio, terminal = host.stdio(), host.terminal()
    assert host.stdio() is stdio
    terminal.send(b"{}\n")
    buffer = bytearray(10)
    received = b""
    while len(received) < 3:
        received += bytes(buffer[: stdio.recv_into(buffer)])
    assert received == b"{}\n"
    assert stdio.peer_name() == "stdio"


def test_closed_socket() -> None:
    _, near, _ = make()
    near.close()
    near.close()
    assert near.fileno() == -1
    for call in (lambda: near.send(b"x"), lambda: near.recv_into(bytearray(1)), near.shutdown):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_sendmsg_limit() -> None:
    _, near, _ = make()
    with pytest.raises(OSError) as caught:
        near.sendmsg([b"x"] * 1025)
    assert caught.value.errno == errno.EMSGSIZE
