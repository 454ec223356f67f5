# SPDX-License-Identifier: Apache-2.0
"""A storage program with its monitors and their clients on one simulated machine: nothing sleeps, a seed decides.

    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        assert client.call("query-version") == {...}
        assert client.fails("blockdev-del", {"node-name": "x"}) == "Failed to find node with node-name='x'"

Clients live in the main context, so that they go on sending and reading while a command of the program waits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import TracebackType
from typing import Any

from bottomhalf.aio.thread import own
from bottomhalf.chardev.socket import SocketServerChardev
from bottomhalf.host.protocol import UnixAddress
from bottomhalf.host.sim import Odds, SimHost
from bottomhalf.host.sim.sockets import SimSocket
from bottomhalf.monitor.hmp import HmpMonitor
from bottomhalf.monitor.qmp import QmpMonitor
from bottomhalf.monitor.storage import Storage
from bottomhalf.qapi.char import parse_chardev
from bottomhalf.wire.json_reader import JsonStream
from tests.exports.nbd_bench import Peer

NBD = UnixAddress("/run/nbd.sock")
TURNS_MAX = 200_000
Json = Any


class QmpBench:
    """Host and storage program of one test."""

    def __init__(self, seed: int = 0, *, odds: Odds | None = None) -> None:
        own.state.context = None
        self.host = SimHost(seed, odds=odds)
        self.log: list[str] = []
        self.storage = Storage(self.host, log=self.log.append)
        self.context = self.storage.loop.main  # of the clients, and what an NBD Peer asks for
        self.clients: list[QmpClient] = []
        self.peers: list[Peer] = []
        self.people: list[HmpClient] = []
        self.ended = False

    def __enter__(self) -> QmpBench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        own.state.context = None

    def close(self) -> None:
        """Everybody leaves; the program ends in order."""
        if self.ended:
            return
        for client in (*self.clients, *self.people):
            client.close()
        for peer in self.peers:
            peer.close()
        self.settle()
        self.storage.close()
        assert not self.log, self.log

    def end(self) -> None:
        """The program ends in order while its clients are there; they take what it said last."""
        self.ended = True
        self.storage.close()
        for client in self.clients:
            client.take_rest()
        assert not self.log, self.log

    def end_log(self) -> None:
        """What the program has said is expected."""
        self.log.clear()

    def monitor(self, path: str = "/run/qmp.sock", *, pretty: bool = False) -> QmpMonitor:
        """A monitor that listens."""
        options = parse_chardev(f"socket,id=m{len(self.storage.chardevs)},path={path},server=on,wait=off")
        chardev = self.storage.add_chardev(options.id, options.backend)
        assert isinstance(chardev, SocketServerChardev)
        return QmpMonitor(self.storage, chardev, pretty=pretty)

    def hmp(self, path: str = "/run/hmp.sock") -> HmpClient:
        """A monitor for people that listens, and a person who sees its prompt."""
        options = parse_chardev(f"socket,id=h{len(self.storage.chardevs)},path={path},server=on,wait=off")
        HmpMonitor(self.storage, self.storage.add_chardev(options.id, options.backend))
        person = HmpClient(self, self.host.connect(UnixAddress(path)))
        self.people.append(person)
        person.prompt()
        return person

    def client(self, path: str = "/run/qmp.sock", *, negotiate: bool = True) -> QmpClient:
        """A client of the monitor there."""
        client = QmpClient(self, self.host.connect(UnixAddress(path)))
        self.clients.append(client)
        if negotiate:
            client.negotiate()
        return client

    def nbd_client(self, export: str) -> Peer:
        """A client of the program's NBD server in the transmission phase."""
        peer = Peer(self, self.host.connect(NBD))  # type: ignore[arg-type]  # what it needs of a bench is here too
        self.peers.append(peer)
        peer.watch()
        peer.negotiate(export)
        return peer

    def serve(self, client: QmpClient, *names: str, size: int = 1 << 20) -> None:
        """Files, and a writable export of each, made through the monitor."""
        client.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": NBD.path}}})
        for name in names:
            self.host.add_file(f"/{name}.raw", size, cached="never")
            client.call("blockdev-add", {"driver": "file", "node-name": name, "filename": f"/{name}.raw"})
            client.call("block-export-add", {"type": "nbd", "id": f"e-{name}", "node-name": name, "writable": True})

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Run the program's loop."""
        for _ in range(TURNS_MAX):
            if condition():
                return
            self.storage.loop.run_once()
        raise AssertionError(f"{TURNS_MAX} turns did not bring {what}; log: {self.log}")

    def settle(self) -> None:
        """Run the program's loop until nothing more happens by itself."""
        stop: list[bool] = []
        self.context.timer(lambda: stop.append(True)).arm_ns(self.context.now_ns() + 1_000_000)
        self.until(lambda: stop, "a millisecond")


class QmpClient:
    """One client. It reads unless ``reading`` is off, and keeps what came in order."""

    def __init__(self, bench: QmpBench, socket: SimSocket) -> None:
        self.bench = bench
        self.socket = socket
        self.raw = bytearray()
        self.messages: list[Json] = []  # answers and the greeting
        self.events: list[Json] = []
        self.order: list[str] = []  # "return", "error" or the event's name, as they came
        self.ended = False
        self._reading = True
        self._stream = JsonStream()
        self._unsent = bytearray()
        self._buffer = bytearray(65536)
        self._watch()

    def _watch(self) -> None:
        if not self.socket.closed:
            self.bench.context.set_fd_handler(
                self.socket.fileno(),
                self._on_read if self._reading and not self.ended else None,
                self._on_write if self._unsent and not self.ended else None,
            )

    def pause(self) -> None:
        self._reading = False
        self._watch()

    def resume(self) -> None:
        self._reading = True
        self._watch()

    def send(self, data: bytes | str | Json) -> None:
        if isinstance(data, str):
            data = data.encode()
        elif not isinstance(data, bytes):
            data = json.dumps(data).encode()
        self._unsent += data
        self._watch()

    def close(self) -> None:
        """Vanish."""
        if not self.socket.closed:
            self.bench.context.set_fd_handler(self.socket.fileno())
            self.socket.close()
        self.ended = True

    def take_rest(self) -> None:
        """What came after the program ended, which polls for nobody any more."""
        self._take(self.socket.take())
        self.ended = True

    def _on_write(self) -> None:
        try:
            sent = self.socket.send(bytes(self._unsent))
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()
        else:
            del self._unsent[:sent]
        self._watch()

    def _on_read(self) -> None:
        try:
            count = self.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count == 0:
            self.ended = True
            self._watch()
            return
        self._take(bytes(self._buffer[:count]))

    def _take(self, data: bytes) -> None:
        self.raw += data
        for message in self._stream.feed(data):
            assert isinstance(message, dict), message
            if "event" in message:
                self.events.append(message)
                self.order.append(message["event"])
            else:
                self.messages.append(message)
                self.order.append(next(name for name in ("QMP", "return", "error") if name in message))

    # -- conversation -----------------------------------------------------------------------------------------------

    def answer(self) -> Json:
        """The next answer."""
        self.bench.until(lambda: self.messages or self.ended, "an answer")
        assert self.messages, "the monitor hung up"
        return self.messages.pop(0)

    def negotiate(self) -> None:
        assert "QMP" in self.answer()
        self.call("qmp_capabilities")

    def ask(self, command: str, arguments: Json = None, id: Json = None) -> None:
        """Send a command and do not wait."""
        message = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        if id is not None:
            message["id"] = id
        self.send(message)

    def call(self, command: str, arguments: Json = None) -> Json:
        """What a command returns."""
        self.ask(command, arguments)
        answer = self.answer()
        assert "return" in answer, answer
        return answer["return"]

    def fails(self, command: str, arguments: Json = None, class_name: str = "GenericError") -> str:
        """The error of a command."""
        self.ask(command, arguments)
        return self.refusal(class_name)

    def refusal(self, class_name: str = "GenericError") -> str:
        """The next answer, which must be an error."""
        answer = self.answer()
        assert answer.get("error", {}).get("class") == class_name, answer
        return str(answer["error"]["desc"])

    def wait_event(self, name: str) -> Json:
        """The data of the next event, which must have that name."""
        self.bench.until(lambda: self.events or self.ended, f"event {name}")
        event = self.events.pop(0)
        assert event["event"] == name
        return event.get("data")


class HmpClient:
    """A person at a monitor: what is on the screen, and a keyboard."""

    PROMPT = b"(qemu) "

    def __init__(self, bench: QmpBench, socket: SimSocket) -> None:
        self.bench = bench
        self.socket = socket
        self.screen = bytearray()
        self.ended = False
        self._buffer = bytearray(65536)
        bench.context.set_fd_handler(socket.fileno(), self._on_read)

    def _on_read(self) -> None:
        try:
            count = self.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count == 0:
            self.close()
        self.screen += self._buffer[:count]

    def close(self) -> None:
        if not self.socket.closed:
            self.bench.context.set_fd_handler(self.socket.fileno())
            self.socket.close()
        self.ended = True

    def type(self, keys: str | bytes) -> None:
        """Press keys and do not wait."""
        self.socket._outbound_put(keys.encode() if isinstance(keys, str) else keys)

    def prompt(self) -> str:
        """What was printed until the prompt came; without the echo's line."""
        self.bench.until(lambda: self.screen.endswith(self.PROMPT) or self.ended, "a prompt")
        text = self.screen.removesuffix(self.PROMPT).decode()
        self.screen.clear()
        return text.replace("\r\n", "\n")

    def ask(self, line: str) -> str:
        """What a command prints."""
        self.type(f"{line}\n")
        echo, _, text = self.prompt().partition("\n")
        assert echo == line, echo
        return text
