# SPDX-License-Identifier: Apache-2.0
"""Character devices with TLS: both ends ours, monitors behind them, peers that must not come in or never finish."""

from __future__ import annotations

import json
import random
from typing import Any

from bottomhalf.chardev.socket import SocketChardev
from bottomhalf.host.protocol import InetAddress
from bottomhalf.host.sim import Odds
from bottomhalf.monitor.qmp import QmpMonitor
from bottomhalf.qapi.char import parse_chardev
from bottomhalf.tls.errors import TlsError
from bottomhalf.tls.handshaking import Handshaking
from bottomhalf.tls.stream import TlsStream
from tests.monitor.qmp_bench import QmpBench
from tests.monitor.test_chardev import Recorder
from tests.tls.ends import Place

PORT = 4444
WHERE = InetAddress("localhost", PORT)


class TlsBench(QmpBench):
    """A program with credentials."""

    def __init__(self, seed: int = 0, *, odds: Odds | None = None, **options: Any) -> None:
        super().__init__(seed, odds=odds)
        self.place = Place(self.host, self.storage.tree)
        self.place.add("/nobody")
        self.place.credentials("s", "server", **options)
        self.place.credentials("c", "client")
        self.place.credentials("n", "client", "/nobody")

    def device(self, text: str) -> SocketChardev:
        options = parse_chardev(f"socket,host=localhost,port={PORT},{text}")
        chardev = self.storage.add_chardev(options.id, options.backend)
        assert isinstance(chardev, SocketChardev)
        return chardev

    def server(self, more: str = "") -> SocketChardev:
        return self.device(f"id=server,server=on,wait=off,tls-creds=s{more}")

    def person(self, creds: str = "c") -> Talker:
        return Talker(self, creds)


class Talker:
    """A TLS client in the main context that reads whatever comes."""

    def __init__(self, bench: TlsBench, creds: str) -> None:
        self.bench = bench
        security = bench.storage.client_security(creds, "localhost")
        assert security is not None
        self.plain = bench.host.connect(WHERE)
        self.stream: TlsStream = security.wrap(self.plain)
        self.data = bytearray()
        self.error: OSError | None = None
        self.ready = self.ended = False
        self._buffer = bytearray(300)
        Handshaking(bench.context, self.stream, self._secured)

    def _secured(self, error: OSError | None) -> None:
        self.error, self.ready = error, error is None
        if self.ready:
            self.bench.context.set_fd_handler(self.stream.fileno(), self._readable)
            self._readable()

    def _readable(self) -> None:
        while not self.ended:
            try:
                count = self.stream.recv_into(self._buffer)
            except BlockingIOError:
                if self.stream.buffered:
                    continue
                return
            except OSError as error:
                self.error, count = error, 0
            self.data += self._buffer[:count]
            if not count:
                self.close()

    def close(self) -> None:
        self.ended = True
        self.bench.context.set_fd_handler(self.stream.fileno())
        self.stream.close()

    def say(self, data: bytes) -> None:
        while data:
            try:
                data = data[self.stream.send(data) :]
            except BlockingIOError:
                self.bench.storage.loop.run_once()


def test_both_ends(seed: int) -> None:
    with TlsBench(seed) as bench:
        chance = random.Random(seed)
        server, front = bench.server(), Recorder()
        server.attach(front)
        client, back = bench.device("id=client,tls-creds=c"), Recorder()
        client.attach(back)
        assert not client.connected
        bench.until(lambda: client.connected and server.connected, "both to be connected")
        there, here = (chance.randbytes(chance.choice((1, 1000, 300_000))) for _ in range(2))
        client.write(there)
        server.write(here)
        bench.until(lambda: front.text == there and back.text == here, "the words")
        bench.storage.remove_chardev(_free(client))
        bench.until(lambda: not server.connected, "the end")
        assert front.seen[0] == "opened" and front.seen[-1] == "closed"


def _free(chardev: SocketChardev) -> SocketChardev:
    chardev.front_end = None
    return chardev


def test_a_monitor_over_tls(seed: int) -> None:
    with TlsBench(seed) as bench:
        QmpMonitor(bench.storage, bench.server())
        person = bench.person()
        bench.until(lambda: person.data.endswith(b"\r\n"), "the greeting")
        assert "QMP" in json.loads(person.data)
        person.data.clear()
        person.say(b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-chardev"}' * 50)
        bench.until(lambda: person.data.count(b"\n") == 51, "the answers")
        assert json.loads(person.data.splitlines()[-1])["return"][0]["label"] == "server"
        person.close()
        second = bench.person()  # the next one is served
        bench.until(lambda: second.data.endswith(b"\r\n"), "the greeting")
        second.close()


def test_who_must_not_come_in() -> None:
    with TlsBench() as bench:
        bench.place.tree.create("authz-simple", "az", {"identity": "CN=somebody else"})
        server, front = bench.server(",tls-authz=az"), Recorder()
        server.attach(front)
        for creds, text in (
            ("n", "TLS handshake failed: peer did not return a certificate"),
            ("c", "TLS x509 authz check for CN=fred is denied"),
        ):
            person = bench.person(creds)
            bench.until(lambda person=person: person.ended or person.error, "the end")  # type: ignore[misc]
            assert bench.log.pop().endswith(text)
        bench.place.tree.resolve("/objects/az").set("identity", "CN=fred")
        person = bench.person()
        bench.until(lambda: server.connected, "who may")
        person.close()
        assert front.seen[0] == "opened"
        bench.until(lambda: not server.connected, "the end")
        assert front.text == b""


def test_plain_text_and_silence() -> None:
    """A peer that speaks no TLS is sent away at once, one that says nothing after a while; then others are served."""
    with TlsBench(odds=Odds.calm()) as bench:
        server, front = bench.server(), Recorder()
        server.attach(front)
        peer = bench.host.connect(WHERE)
        peer.send(b'{"execute": "qmp_capabilities"}')
        bench.until(lambda: bench.log, "the refusal")
        assert "TLS handshake failed" in bench.log.pop()
        silent = bench.host.connect(WHERE)
        bench.until(lambda: bench.log, "the end of patience")
        assert bench.log.pop().endswith("TLS handshake failed: not done within 10 s")
        person = bench.person()
        bench.until(lambda: server.connected, "the next one")
        for each in (peer, silent):
            each.close()
        person.close()
        bench.until(lambda: not server.connected, "the end")


def test_a_server_that_is_somebody_else() -> None:
    """The client's side: the server's certificate must have the name of the address."""
    with TlsBench() as bench:
        bench.server()
        security = bench.storage.client_security("c", "example.com")
        assert security is not None
        stream = security.wrap(bench.host.connect(WHERE))
        done: list[OSError | None] = []
        Handshaking(bench.context, stream, done.append)
        bench.until(lambda: done and bench.log, "both ends to know")
        assert isinstance(done[0], TlsError) and str(done[0]).endswith("does not match the hostname example.com")
        assert "TLS handshake failed" in bench.log.pop()
        stream.close()


def test_connects_again(seed: int) -> None:
    """A client that reconnects does a handshake each time."""
    with TlsBench(seed) as bench:
        server, front = bench.server(), Recorder()
        server.attach(front)
        client, back = bench.device("id=client,tls-creds=c,reconnect-ms=1000"), Recorder()
        client.attach(back)
        for number in range(1, 4):
            bench.until(lambda number=number: front.seen.count("opened") == number, "it")  # type: ignore[misc]
            bench.until(lambda: client.connected and server.connected, "both")
            server.hang_up()
            bench.until(lambda: not client.connected, "the end")


def test_taken_away_in_the_midst(seed: int) -> None:
    """A device goes, or moves to another context, while a handshake is under way."""
    with TlsBench(seed) as bench:
        chance = random.Random(seed)
        server = bench.server()
        person = bench.person()
        for _ in range(chance.randrange(6)):
            bench.storage.loop.iohandler.poll(False)
            bench.context.poll(False)
        if seed % 2:
            server.move(bench.context)
            front = Recorder()
            server.attach(front)
            bench.until(lambda: person.ready and server.connected, "the handshake")
            person.say(b"hello")
            bench.until(lambda: front.text == b"hello", "the word")
            person.close()
            bench.until(lambda: not server.connected, "the end")
        else:
            bench.storage.remove_chardev(server)
            bench.until(lambda: person.ended or person.error, "the end")

