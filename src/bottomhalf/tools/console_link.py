# SPDX-License-Identifier: Apache-2.0
"""A connection to a monitor, of either kind, for a program that lives in asyncio.

Facts: a QMP server speaks first, and what it says begins with a brace; a monitor for people greets with a sentence. A
character device serves one client at a time, and a second one is connected and hears nothing. Consequence: the kind is
known when the first byte has come, which may be never. Decision: ``kind`` is a future, and what arrives after it is
sorted: answers to who asked, events and text to the callbacks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.host.protocol import Socket
from bottomhalf.monitor.shell_line import Call
from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.qmp import ClientSession, Event, Greeting, Response

if TYPE_CHECKING:
    from bottomhalf.tls.stream import TlsStream

RECEIVE_BYTES: Final = 65536
HUNG_UP: Final = "the server has hung up"
BLANK: Final = b" \t\r\n"


class Link:
    """One connection. In the thread of the running loop."""

    def __init__(
        self,
        socket: Socket,
        on_event: Callable[[Event], object],
        on_text: Callable[[bytes], object],
        secure: TlsStream | None = None,
    ) -> None:
        """``secure`` is the socket if that is a TLS stream, whose handshake is done."""
        self._loop = asyncio.get_running_loop()
        self._socket = socket
        self._secure = secure
        self._session = ClientSession()
        self._on_event, self._on_text = on_event, on_text
        self._answers: dict[int, asyncio.Future[Response]] = {}
        self._unsent = bytearray()
        self._buffer = bytearray(RECEIVE_BYTES)
        self.on_late: Callable[[Response], object] = lambda response: None  # an answer that nobody waits for any more
        self.greeting: Greeting | None = None
        self.kind: asyncio.Future[str] = self._loop.create_future()  # "qmp" or "hmp"
        self.ended: asyncio.Future[Any] = self._loop.create_future()
        self._loop.add_reader(socket.fileno(), self._readable)
        self._look_at_decrypted()

    def _look_at_decrypted(self) -> None:
        """Bytes may lie in the stream of which the loop does not know."""
        if self._secure is not None and self._secure.buffered:
            self._loop.call_soon(self._readable)

    async def negotiate(self) -> None:
        """Begin a QMP session, with everything that the server offers. Failure, ConnectionError."""
        assert self.greeting is not None
        offered = [name for name in self.greeting.capabilities if name == "oob"]
        await self.execute(Call("qmp_capabilities", {"enable": offered} if offered else {}))

    async def execute(self, call: Call) -> Any:
        """Run a command. Failure if the server refuses, ConnectionError if it hangs up. Who is cancelled leaves the
        command running; its answer goes to ``on_late``."""
        if self.ended.done():
            raise self.ended.result()  # why
        data = self._session.execute(call.command, call.arguments, oob=call.oob)
        answer: asyncio.Future[Response] = self._loop.create_future()
        self._answers[self._session.last_id] = answer
        self.send(data)
        return (await answer).result()

    def send(self, data: bytes) -> None:
        """Send bytes, now or when there is room."""
        self._unsent += data
        self._flush()

    def _flush(self) -> None:
        if self.ended.done():
            return
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(bytes(self._unsent))]
        except BlockingIOError:
            self._loop.add_writer(self._socket.fileno(), self._flush)
            return
        except OSError as error:
            self._end(error)
            return
        self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        if self.ended.done():
            return
        try:
            count = self._socket.recv_into(self._buffer)
            if count == 0:
                raise ConnectionResetError(HUNG_UP)
            self._take(bytes(self._buffer[:count]))
        except BlockingIOError:
            pass
        except (OSError, ProtocolError) as error:
            self._end(error)
        self._look_at_decrypted()

    def _take(self, data: bytes) -> None:
        if self.greeting is None and not self.kind.done():
            first = data.lstrip(BLANK)
            if not first:
                return
            if first[0] != 0x7B:
                self.kind.set_result("hmp")
        if self.kind.done() and self.kind.result() == "hmp":
            self._on_text(data)
            return
        for item in self._session.receive(data):
            if isinstance(item, Greeting):
                self.greeting = item
                self.kind.set_result("qmp")
            elif isinstance(item, Event):
                self._on_event(item)
            else:
                self._answered(item)

    def _answered(self, response: Response) -> None:
        answer = self._answers.pop(response.id, None) if isinstance(response.id, int) else None
        if answer is None:
            raise ProtocolError("QMP server could not read what we sent", got=str(response.error))
        if answer.done():
            self.on_late(response)
        else:
            answer.set_result(response)

    def _end(self, error: Exception) -> None:
        """Nothing more will come: whoever waits is told why."""
        if self.ended.done():
            return
        self.close()
        if isinstance(error, ConnectionError):  # which of them it is depends on who was faster
            error = ConnectionResetError(HUNG_UP)
        self.ended.set_result(error)
        if not self.kind.done():
            self.kind.set_exception(error)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)

    def close(self) -> None:
        """Hang up."""
        if not self.ended.done() and self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            if self._secure is not None:
                self._socket.shutdown()  # with a goodbye
            self._socket.close()
