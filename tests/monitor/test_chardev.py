# SPDX-License-Identifier: Apache-2.0
"""Character devices: who is connected when, what is kept for whom, what is refused."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bottomhalf.chardev.base import Line
from bottomhalf.chardev.socket import SocketClientChardev, SocketServerChardev
from bottomhalf.host.protocol import InetAddress, UnixAddress
from bottomhalf.host.sim import Odds
from bottomhalf.qapi.char import parse_chardev
from bottomhalf.qapi.errors import OptionError
from tests.monitor.qmp_bench import QmpBench

PATH = UnixAddress("/run/c.sock")


class Recorder:
    """A front end that notes what it is told."""

    has_user = True

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def opened(self, line: Line) -> None:
        self.line = line
        self.seen.append("opened")

    def received(self, data: memoryview) -> None:
        self.seen.append(bytes(data))

    def closed(self) -> None:
        self.seen.append("closed")

    @property
    def text(self) -> bytes:
        return b"".join(item for item in self.seen if isinstance(item, bytes))


def server(bench: QmpBench, more: str = "") -> SocketServerChardev:
    options = parse_chardev(f"socket,id=c,path={PATH.path},server=on,wait=off{more}")
    chardev = bench.storage.add_chardev(options.id, options.backend)
    assert isinstance(chardev, SocketServerChardev)
    return chardev


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("socket,id=x,path=/s,reconnect-ms=-5", "'reconnect' is not between 0 and 4294967296 milliseconds"),
        ("socket,id=x,path=/s,server=on,websocket=on", "Parameter 'websocket' is not supported yet"),
        ("null,id=x,logappend=on", "'logappend' needs 'logfile'"),
        ("file,id=x,path=/out,input-path=/nope", "Could not open '/nope': No such file or directory"),
        ("file,id=x", "chardev: file: no filename given"),
        ("pipe,id=x,path=/nope", "Could not open '/nope': No such file or directory"),
        ("ringbuf,id=x,size=1000", "size of ringbuf chardev must be power of two"),
        ("mux,id=x,chardev=nope", "mux: base chardev nope not found"),
        ("socket,id=x,path=/s,tls-creds=t", "'tls_creds' option is incompatible with 'unix' address type"),
        ("socket,id=x,host=h,port=1,server=on,tls-creds=t", "No TLS credentials with id 't'"),
        ("socket,id=x,host=h,port=1,tls-creds=t", "No TLS credentials with id 't'"),
        ("socket,id=x,host=h,port=1,tls-creds=t,tls-authz=a", "'tls_authz' option is for sockets that listen"),
        ("socket,id=x,host=h,port=1,server=on,tls-authz=t", "'tls_authz' option requires 'tls_creds' option"),
        ("socket,id=x,path=/s", "Failed to connect to '/s': No such file or directory"),
        ("socket,id=x,host=h,port=1", "Failed to connect to 'h:1': Connection refused"),
        ("socket,id=x,path=/disk,server=on", "Failed to bind socket to /disk: Address already in use"),
        ("socket,id=x,host=127.0.0.1,port=5,server=on", "Failed to find an available port: Address already in use"),
        ("socket,id=c,path=/s,server=on", "attempt to add duplicate property 'c' to object (type 'container')"),
        ("socket,id=x,fd=5", "Socket address type 'fd' is not supported yet"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with QmpBench() as bench:
        bench.host.add_file("/disk")
        server(bench)
        taken = bench.host.listen(InetAddress("127.0.0.1", 5))
        with pytest.raises(OptionError) as caught:
            options = parse_chardev(text)
            bench.storage.add_chardev(options.id, options.backend)
        assert str(caught.value) == message
        assert list(bench.storage.chardevs) == ["c"]
        taken.close()


def test_stdio_belongs_to_one() -> None:
    with QmpBench() as bench:
        first, second = parse_chardev("stdio,id=a"), parse_chardev("stdio,id=b")
        bench.storage.add_chardev("a", first.backend)
        with pytest.raises(OptionError, match="cannot use stdio by multiple character devices"):
            bench.storage.add_chardev("b", second.backend)


def test_comes_and_goes(seed: int) -> None:
    with QmpBench(seed) as bench:
        chardev, recorder = server(bench), Recorder()
        chardev.attach(recorder)
        assert not chardev.connected
        for text in (b"one", b"two"):
            peer = bench.host.connect(PATH)
            bench.until(lambda: chardev.connected, "the peer")
            for number in text:
                assert peer.send(bytes([number])) == 1
            bench.until(lambda text=text: recorder.text.endswith(text), "its words")  # type: ignore[misc]
            peer.close()
            bench.until(lambda: not chardev.connected, "its end")
        assert recorder.text == b"onetwo"
        assert [item for item in recorder.seen if isinstance(item, str)] == ["opened", "closed"] * 2


def test_second_client_waits() -> None:
    with QmpBench() as bench:
        chardev, recorder = server(bench), Recorder()
        chardev.attach(recorder)
        first, second = bench.host.connect(PATH), bench.host.connect(PATH)
        second.send(b"2")
        bench.settle()
        first.send(b"1")
        bench.until(lambda: recorder.text == b"1", "the first one's words")
        first.close()
        bench.until(lambda: recorder.text == b"12", "the second one's")
        second.close()


def test_peer_before_the_front_end() -> None:
    """What the peer says waits until somebody listens."""
    with QmpBench() as bench:
        chardev, recorder = server(bench), Recorder()
        peer = bench.host.connect(PATH)
        peer.send(b"hello")
        bench.settle()
        assert chardev.connected
        chardev.attach(recorder)
        assert recorder.seen == ["opened"]
        bench.until(lambda: recorder.text == b"hello", "the words")
        peer.close()


def test_write_order_and_backlog(seed: int) -> None:
    """Whatever the socket takes at a time, the bytes arrive once and in order."""
    with QmpBench(seed, odds=Odds(short_send=0.9)) as bench:
        bench.host.network.buffer_bytes = 1000
        chardev, recorder = server(bench), Recorder()
        chardev.attach(recorder)
        peer = bench.host.connect(PATH)
        bench.until(lambda: chardev.connected, "the peer")
        expected = b"".join(b"%05d" % number for number in range(2000))
        for number in range(2000):
            chardev.write(b"%05d" % number)
        got = bytearray()

        def take() -> bool:
            got.extend(peer.take())
            return len(got) == len(expected)

        assert chardev.unsent_bytes > 5000
        bench.until(take, "all bytes")
        assert bytes(got) == expected and chardev.unsent_bytes == 0
        peer.close()


def test_write_to_nobody() -> None:
    with QmpBench() as bench:
        chardev = server(bench)
        chardev.write(b"x")
        assert chardev.unsent_bytes == 0
        peer = bench.host.connect(PATH)
        bench.until(lambda: chardev.connected, "the peer")
        assert peer.take() == b""
        peer.close()


def test_set_reading() -> None:
    with QmpBench() as bench:
        chardev, recorder = server(bench), Recorder()
        chardev.attach(recorder)
        peer = bench.host.connect(PATH)
        bench.until(lambda: chardev.connected, "the peer")
        chardev.set_reading(False)
        peer.send(b"x")
        bench.settle()
        assert recorder.text == b""
        chardev.set_reading(True)
        bench.until(lambda: recorder.text == b"x", "the byte")
        peer.close()


def test_out_of_descriptors() -> None:
    """The client waits, the loop does not spin, and all goes on when there are some again."""
    with QmpBench() as bench:
        chardev, recorder = server(bench), Recorder()
        chardev.attach(recorder)
        from bottomhalf.host.sim.faults import ACCEPT

        bench.host.fault(path=str(PATH), op=ACCEPT, errno=errno.EMFILE, times=3)
        before_ns = bench.context.now_ns()
        peer = bench.host.connect(PATH)
        bench.until(lambda: chardev.connected, "the peer")
        assert bench.context.now_ns() - before_ns >= 300_000_000
        peer.close()


def test_client_chardev() -> None:
    """server=off connects, and stays alone when the server goes."""
    with QmpBench() as bench:
        listener = bench.host.listen(PATH)
        options = parse_chardev(f"socket,id=c,path={PATH.path}")
        chardev, recorder = bench.storage.add_chardev("c", options.backend), Recorder()
        assert isinstance(chardev, SocketClientChardev) and chardev.connected
        chardev.attach(recorder)
        peer = listener.accept()
        chardev.write(b"hello")
        bench.settle()
        assert peer.take() == b"hello"
        peer.close()
        bench.until(lambda: not chardev.connected, "the end")
        assert recorder.seen == ["opened", "closed"]
        listener.close()


def test_describe() -> None:
    with QmpBench() as bench:
        assert server(bench).describe() == "disconnected:unix:/run/c.sock,server=on"
        options = parse_chardev("socket,id=t,host=127.0.0.1,port=77,server=on,wait=off")
        chardev = bench.storage.add_chardev("t", options.backend)
        assert isinstance(chardev, SocketServerChardev)
        assert chardev.describe() == "disconnected:tcp:127.0.0.1:77,server=on"


def test_close_with_a_silent_peer() -> None:
    with QmpBench() as bench:
        chardev, recorder = server(bench), Recorder()
        chardev.attach(recorder)
        peer = bench.host.connect(PATH)
        bench.until(lambda: chardev.connected, "the peer")
        chardev.write(b"last words")
        bench.end()
        assert peer.take() == b"last words"
        assert recorder.seen == ["opened"]  # a front end that ends the device is not told so
