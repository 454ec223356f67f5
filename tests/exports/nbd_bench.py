# SPDX-License-Identifier: Apache-2.0
"""A whole NBD server with its clients on one simulated machine, in one loop: nothing sleeps, a seed decides.

    with Bench(seed) as bench:
        bench.host.add_file("a.raw", 1 << 20)
        bench.export("a", bench.file("a.raw"))
        client = bench.client("a")
        assert client.wait(client.read(0, 512)).data == bytes(512)

A client's cookies are checked by ``wire.nbd.client``: an answer to what nobody asked, or a second answer, is a
ProtocolError; ``client.wait`` wants the first. When the bench closes, it wants all memory of all connections back.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from types import TracebackType
from typing import Any

from bottomhalf.aio import AioContext
from bottomhalf.block import Graph, Node
from bottomhalf.drivers.file import FileNode
from bottomhalf.exports.nbd.connection import Connection
from bottomhalf.exports.nbd.export import NbdExport
from bottomhalf.exports.nbd.server import NbdServer
from bottomhalf.exports.nbd.transmission import Transmission
from bottomhalf.host.protocol import Address, InetAddress, UnixAddress
from bottomhalf.host.sim import Latency, Odds, SimHost
from bottomhalf.host.sim.arena import SimArena
from bottomhalf.host.sim.sockets import SimSocket
from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd.client import Client
from bottomhalf.wire.nbd.client_handshake import ClientHandshake, ClientState, Goal
from bottomhalf.wire.nbd.client_replies import Completion
from bottomhalf.wire.nbd.errors import NegotiationRefused
from bottomhalf.wire.nbd.export import ExportInfo

UNIX = UnixAddress("/run/nbd.sock")
INET = InetAddress("127.0.0.1", 10809)
POLLS_MAX = 200_000


class CountedHost(SimHost):
    """A SimHost that remembers the memory of its arenas, to see whether somebody still points into it."""

    def __init__(self, seed: int, odds: Odds | None, latency: Latency | None) -> None:
        super().__init__(seed, odds=odds, latency=latency)
        self.memories: list[bytearray] = []

    def arena(self, size: int) -> SimArena:
        arena = super().arena(size)
        memory = arena.view.obj
        assert isinstance(memory, bytearray)
        self.memories.append(memory)
        return arena

    def free_memories(self) -> None:
        """Forget all memory. BufferError if there is a view of any."""
        while self.memories:
            self.memories[-1].clear()
            self.memories.pop()


class Bench:
    """Host, context, graph and server of one test."""

    def __init__(
        self,
        seed: int = 0,
        *,
        odds: Odds | None = None,
        latency: Latency | None = None,
        address: Address = UNIX,
        **server_options: Any,
    ) -> None:
        self.random = random.Random(f"bench/{seed}")
        self.host = CountedHost(seed, odds, latency)
        self.context = AioContext(self.host)
        self.graph = Graph(self.context)
        self.log: list[str] = []
        self.address = address
        self.server = NbdServer(self.context, log=self.log.append, **server_options)
        self.server.listen(address)
        self.exports: list[NbdExport] = []
        self.peers: list[Peer] = []
        self.transmissions: list[Transmission] = []
        self.has_threads = False

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self.context.host is self.host:
            self.host._drop_everything(reboot=True)
            try:
                self.context.close()
            except Exception:
                pass
            _forget_context(self.context)

    def close(self) -> None:
        """Everybody leaves; all memory must be back."""
        self._remember_all()
        self.server.stop()
        self.until(lambda: not self.server.connections, "connections to go")
        while self.transmissions:
            check_given_back(self.transmissions.pop())
        for export in self.exports:
            assert export.connections == []
            export.close()
        for peer in self.peers:
            peer.close()
        for node in list(self.graph.nodes.values()):
            self.graph.release(node)
        assert self.graph.nodes == {}
        self.context.poll(False)
        self.context.close()
        self._check_arenas()

    def _check_arenas(self) -> None:
        """Nobody has a view of any arena; if it looks so, perhaps only of garbage."""
        try:
            self.host.free_memories()
        except BufferError:
            gc.collect()
            self.host.free_memories()

    # -- the server's side ----------------------------------------------------------------------------------------

    def file(self, path: str, **options: Any) -> FileNode:
        return FileNode(self.graph, filename=path, **options)

    def export(self, name: str, node: Node, **options: Any) -> NbdExport:
        """A writable export unless told otherwise."""
        export = NbdExport(self.graph, f"id-{name}", node, name=name, **{"writable": True, **options})
        self.server.add(export)
        self.exports.append(export)
        return export

    def disk(self, size: int = 1 << 20, name: str = "disk", cached: str = "random", **options: Any) -> bytearray:
        """A file with random bytes and an export of it; returns what it contains."""
        content = bytearray(self.random.randbytes(size))
        self.host.add_file(f"{name}.raw", bytes(content), cached=cached)
        self.export(name, self.file(f"{name}.raw", unmap=True, **options))
        return content

    def connection(self, peer: Peer) -> Connection:
        """The server's end of a peer."""
        found = [each for each in self.server.connections if each.socket is peer.socket.peer]
        assert len(found) == 1, found
        return found[0]

    def transmission(self, peer: Peer) -> Transmission:
        transmission = self.connection(peer)._transmission
        assert transmission is not None
        self._remember(transmission)
        return transmission

    def _remember_all(self) -> None:
        for connection in self.server.connections:
            if connection._transmission is not None:
                self._remember(connection._transmission)

    def _remember(self, transmission: Transmission) -> None:
        if transmission not in self.transmissions:
            self.transmissions.append(transmission)

    # -- the clients' side ----------------------------------------------------------------------------------------

    def peer(self, *, start: bool = True) -> Peer:
        """A connected socket that has said nothing."""
        peer = Peer(self, self.host.connect(self.address))
        self.peers.append(peer)
        if start:
            peer.watch()
        return peer

    def client(self, export: str = "", **options: Any) -> Peer:
        """A peer in the transmission phase."""
        peer = self.peer()
        peer.negotiate(export, **options)
        self.transmission(peer)
        return peer

    # -- time -----------------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], object], what: str) -> None:
        for _ in range(POLLS_MAX):
            if condition():
                return
            if not self.has_threads:
                self.context.poll(True)
            elif not self.context.poll(False):
                self.host.world.step()  # asleep it would not see what happens in another thread
        raise AssertionError(f"{POLLS_MAX} polls did not bring {what}")

    def settle(self) -> None:
        """Poll until nothing is ready and nothing more is going to happen."""
        idle = 0
        while idle < 3:
            if self.context.poll(False):
                idle = 0
            elif not self.host.world.step():
                idle += 1


class Peer:
    """One client. What it sends goes out as the socket takes it; what it gets is read unless ``reading`` is off."""

    def __init__(self, bench: Bench, socket: SimSocket) -> None:
        self.bench = bench
        self.socket = socket
        self.client: Client | None = None
        self.handshake: ClientHandshake | None = None
        self.done: dict[int, Completion] = {}
        self.on_done: Callable[[Completion], object] | None = None
        self.raw = bytearray()  # what came outside of handshake and client
        self.ended = False  # the server has closed the connection
        self.reset = False  # not in a friendly way
        self.error: Exception | None = None
        self.reading = True
        self.packet_max = 1 << 20  # bytes of one send
        self._unsent = bytearray()
        self._buffer = bytearray(65536)

    # -- socket ---------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        if self.socket.closed:
            return
        self.bench.context.set_fd_handler(
            self.socket.fileno(),
            self._on_read if self.reading and not self.ended else None,
            self._on_write if self._unsent and not self.ended else None,
        )

    def pause(self) -> None:
        """Read nothing any more."""
        self.reading = False
        self.watch()

    def resume(self) -> None:
        self.reading = True
        self.watch()

    def send(self, data: bytes | bytearray) -> None:
        self._unsent += data
        self.watch()

    @property
    def unsent(self) -> int:
        return len(self._unsent)

    def close(self) -> None:
        """Vanish."""
        if not self.socket.closed:
            self.bench.context.set_fd_handler(self.socket.fileno())
            self.socket.close()
        self.ended = True

    def _on_write(self) -> None:
        try:
            sent = self.socket.send(memoryview(self._unsent)[: self.packet_max].tobytes())
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()
        else:
            del self._unsent[:sent]
        self.watch()

    def _on_read(self) -> None:
        try:
            count = self.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
            self.reset = True
        if count == 0:
            self.ended = True
            self.watch()
            return
        self._take(bytes(self._buffer[:count]))

    def _take(self, data: bytes) -> None:
        if self.client is not None:
            for completion in self.client.receive(data):
                assert completion.cookie not in self.done
                self.done[completion.cookie] = completion
                if self.on_done is not None:
                    self.on_done(completion)
        elif self.handshake is not None and self.handshake.state not in _ENDS:
            try:
                self.handshake.receive(data)
            except (ProtocolError, NegotiationRefused) as error:
                self.error = error
            self.send(self.handshake.take_output())
            if self.handshake.negotiated is not None:
                negotiated = self.handshake.negotiated
                self.client = Client(negotiated, strict=False)
                self._take(negotiated.leftover)
        else:
            self.raw += data

    # -- conversation -----------------------------------------------------------------------------------------------

    def begin(self, export: str = "", **options: Any) -> None:
        """Begin with the handshake."""
        self.handshake = ClientHandshake(export, **options)
        if self.raw:
            early, self.raw = bytes(self.raw), bytearray()
            self._take(early)

    def negotiate(self, export: str = "", **options: Any) -> None:
        """Reach the end of the handshake."""
        self.begin(export, **options)
        state = self.handshake
        assert state is not None
        self.bench.until(
            lambda: self.client or self.ended or self.error or state.state in _ENDS, "the end of the handshake"
        )

    def list_exports(self) -> list[Any]:
        self.negotiate(goal=Goal.LIST)
        assert self.handshake is not None
        return self.handshake.exports

    def ask(self, packet_and_cookie: tuple[bytes, int]) -> int:
        packet, cookie = packet_and_cookie
        self.send(packet)
        return cookie

    def read(self, offset: int, length: int, **options: Any) -> int:
        return self.ask(self._client.read(offset, length, **options))

    def write(self, offset: int, data: bytes, **options: Any) -> int:
        return self.ask(self._client.write(offset, data, **options))

    def flush(self) -> int:
        return self.ask(self._client.flush())

    def trim(self, offset: int, length: int, **options: Any) -> int:
        return self.ask(self._client.trim(offset, length, **options))

    def write_zeroes(self, offset: int, length: int, **options: Any) -> int:
        return self.ask(self._client.write_zeroes(offset, length, **options))

    def cache(self, offset: int, length: int) -> int:
        return self.ask(self._client.cache(offset, length))

    def block_status(self, offset: int, length: int, **options: Any) -> int:
        return self.ask(self._client.block_status(offset, length, **options))

    def disconnect(self) -> None:
        self.send(self._client.disconnect())

    def wait(self, cookie: int) -> Completion:
        """The answer to one request."""
        self.bench.until(lambda: cookie in self.done or self.ended, f"an answer to request {cookie}")
        assert cookie in self.done, f"the server hung up; its log: {self.bench.log}"
        return self.done.pop(cookie)

    def good(self, cookie: int) -> Completion:
        """The answer, which must be success."""
        completion = self.wait(cookie)
        assert completion.error == 0, completion
        return completion

    def wait_all(self) -> list[Completion]:
        """The answers to everything that was asked."""
        self.bench.until(lambda: not self.in_flight or self.ended, "answers to all requests")
        assert not self.in_flight, f"the server hung up; its log: {self.bench.log}"
        completions = list(self.done.values())
        self.done.clear()
        return completions

    def wait_end(self) -> None:
        """The server's closing of the connection."""
        self.bench.until(lambda: self.ended, "the end of the connection")

    @property
    def in_flight(self) -> int:
        return self._client.in_flight

    @property
    def _client(self) -> Client:
        assert self.client is not None, f"not negotiated: {self.error}, log {self.bench.log}"
        return self.client


_ENDS = (ClientState.NEGOTIATED, ClientState.CLOSED, ClientState.FAILED)


class OneExport:
    """For a server handshake without a server."""

    def __init__(self, info: ExportInfo) -> None:
        self.info = info

    def list_exports(self) -> list[ExportInfo]:
        return [self.info]

    def find_export(self, name: str) -> ExportInfo | None:
        return self.info


def check_given_back(transmission: Transmission) -> None:
    """All memory of an ended transmission is back, and nothing counts any more."""
    assert transmission.in_flight == 0
    assert transmission._bytes_in_flight == 0
    assert transmission.output.unsent_bytes == 0
    assert transmission._buffers.used_bytes == 0
    assert transmission._buffers.allocated_bytes == 0


def check_idle(transmission: Transmission) -> None:
    """Nothing is going on: exactly our own references are counted."""
    assert transmission.in_flight == 0
    assert transmission._bytes_in_flight == 0
    assert transmission.output.unsent_bytes == 0
    assert not transmission.output
    assert transmission._input.users == 1
    assert transmission._arena.users == 1
    assert transmission._buffers.used_bytes == transmission._input.size + transmission._arena.size


def _forget_context(context: AioContext) -> None:
    """After a failed test: the next one begins anew."""
    if context._state.context is context:
        context._state.context = None
