# SPDX-License-Identifier: Apache-2.0
"""A QMP client for coroutines of the event core.

    client = await QmpClient.connect(context, UnixAddress("/tmp/qmp.sock"), oob=True)
    nodes = await client.execute("query-named-block-nodes")
    gone = await client.execute(
        "block-export-del", {"id": "e0"}, until="BLOCK_EXPORT_DELETED", timeout_ns=5 * 10**9
    )
    print(await client.execute("x-explain", oob=True))
    client.close()

With ``security`` (``Storage.client_security``, or ``tls.policy``) the same over TLS.

Many commands only start something, and an event tells of its end. It may come before the answer does, so whoever waits
for it has to listen before he asks: ``until`` does. Events that nobody waits for are kept, up to a bound, for
``next_event``. Any number of coroutines may use one client at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio import AioContext, Coroutine, Waitable, cancel_after, current, suspend
from bottomhalf.host.protocol import Address, Socket
from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.qmp import ClientSession, Event, Greeting, Response

if TYPE_CHECKING:
    from bottomhalf.tls.policy import Security
    from bottomhalf.tls.stream import TlsStream

EVENTS_MAX: Final = 4096  # kept for next_event(); the oldest go
RECEIVE_BYTES: Final = 65536

Until = str | Callable[[Event], bool]


class _Wish(Waitable):
    """Something that a coroutine waits for and the server will say."""

    def __init__(self, what: str, accepts: Callable[[Any], bool] | None = None) -> None:
        self._what = what
        self.accepts = accepts
        self.said: Any = None
        self.waiter: Coroutine | None = None

    @property
    def what(self) -> str:
        return self._what

    def take_back(self, waiter: Coroutine) -> bool:
        if self.waiter is None:
            return False
        self.waiter = None
        return True

    def fulfil(self, said: Any) -> None:
        if self.said is None:
            self.said = said
            waiter, self.waiter = self.waiter, None
            if waiter is not None:
                waiter.context.wake(waiter)

    async def come(self) -> Any:
        """What was said; raised if it is an exception."""
        if self.said is None:
            self.waiter = current()
            await suspend(self)
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


class QmpClient:
    """One connection. Home thread of its context."""

    def __init__(self, context: AioContext, socket: Socket, secure: TlsStream | None = None) -> None:
        """``secure`` is the socket if that is a TLS stream, whose handshake is done."""
        self.context = context
        self._secure = secure
        self.greeting: Greeting | None = None
        self._socket: Socket | None = socket
        self._session = ClientSession()
        self._unsent = bytearray()
        self._answers: dict[int, _Wish] = {}
        self._listeners: list[_Wish] = []
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._greeted = _Wish("the greeting of a QMP server")
        self._buffer = bytearray(RECEIVE_BYTES)
        self._end: Exception | None = None
        self._watch()

    @classmethod
    async def connect(
        cls, context: AioContext, address: Address, *, oob: bool = False, security: Security | None = None
    ) -> QmpClient:
        """Connect and negotiate, over TLS with ``security``. OSError (TlsError among them); ProtocolError if nobody
        there speaks QMP; Failure if the server refuses, as one does that is asked for ``oob`` and cannot."""
        socket = context.host.connect(address)
        if security is None:
            client = cls(context, socket)
        else:
            stream = await _secured(context, socket, security)
            client = cls(context, stream, stream)
        try:
            client.greeting = await client._greeted.come()
            await client.execute("qmp_capabilities", {"enable": ["oob"]} if oob else None)
        except BaseException:
            client.close()
            raise
        return client

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        until: Until | None = None,
        timeout_ns: int = 0,
    ) -> Any:
        """Run a command and return its value, or, with ``until``, the event that ends what it began: one of that name,
        or the first for which ``until(event)`` is true. Failure if the server refuses, TimedOut after ``timeout_ns``
        (0: never), ConnectionError if it hangs up."""
        body = self._execute(command, arguments, oob, until)
        return await (cancel_after(body, timeout_ns) if timeout_ns else body)

    async def _execute(
        self, command: str, arguments: Mapping[str, Any] | None, oob: bool, until: Until | None
    ) -> Any:
        if self._end is not None:
            raise self._end
        ending = None
        if until is not None:
            ending = _Wish(f"the event that ends {command}", _accepts(until))
            self._listeners.append(ending)
        try:
            data = self._session.execute(command, arguments, oob=oob)
            answer = self._answers[self._session.last_id] = _Wish(f"the answer to {command}")
            self._unsent += data
            self._flush()
            response: Response = await answer.come()
            value = response.result()
            return value if ending is None else await ending.come()
        finally:
            if ending in self._listeners:
                self._listeners.remove(ending)

    async def next_event(self, timeout_ns: int = 0) -> Event:
        """The oldest event that nobody has waited for. TimedOut, ConnectionError."""
        if self._events:
            return self._events.popleft()
        if self._end is not None:
            raise self._end
        wish = _Wish("an event", lambda event: True)
        self._listeners.append(wish)
        try:
            found: Event = await (cancel_after(wish.come(), timeout_ns) if timeout_ns else wish.come())
            return found
        finally:
            if wish in self._listeners:
                self._listeners.remove(wish)

    # -- bytes --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        if self._socket is not None:
            self.context.set_fd_handler(self._socket.fileno(), self._readable, self._flush if self._unsent else None)
            if self._secure is not None and self._secure.buffered:
                self.context.schedule_oneshot(self._read_decrypted)

    def _read_decrypted(self) -> None:
        """Bytes lie in the stream of which the poller does not know."""
        if self._socket is not None and self._secure is not None and self._secure.buffered:
            self._readable()

    def _flush(self) -> None:
        if self._socket is None:
            return
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(bytes(self._unsent))]
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(error)
            return
        self._watch()

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            count = self._socket.recv_into(self._buffer)
            if count == 0:
                raise ConnectionResetError("the QMP server has hung up")
            for item in self._session.receive(memoryview(self._buffer)[:count]):
                self._take(item)
        except BlockingIOError:
            pass
        except (OSError, ProtocolError) as error:
            self._fail(error)
        if self._secure is not None and self._secure.buffered:
            self.context.schedule_oneshot(self._read_decrypted)

    def _take(self, item: Greeting | Response | Event) -> None:
        if isinstance(item, Greeting):
            self._greeted.fulfil(item)
        elif isinstance(item, Event):
            listener = next((each for each in self._listeners if each.accepts is not None and each.accepts(item)), None)
            if listener is None:
                self._events.append(item)
            else:
                self._listeners.remove(listener)
                listener.fulfil(item)
        else:
            answer = self._answers.pop(item.id, None) if isinstance(item.id, int) else None
            if answer is not None:
                answer.fulfil(item)
            elif item.error is not None:
                raise ProtocolError("QMP server could not read what we sent", got=item.error.desc)

    def _fail(self, error: Exception) -> None:
        """Nothing more will come: whoever waits is told why."""
        self._end = self._end or error
        self.close()
        waiting = [self._greeted, *self._answers.values(), *self._listeners]
        self._answers.clear()
        self._listeners.clear()
        for wish in waiting:
            wish.fulfil(error)

    def close(self) -> None:
        """Hang up."""
        socket, self._socket = self._socket, None
        if socket is not None:
            self._end = self._end or ConnectionAbortedError("the QMP client was closed")
            self.context.set_fd_handler(socket.fileno())
            if self._secure is not None:
                socket.shutdown()  # with a goodbye
            socket.close()


def _accepts(until: Until) -> Callable[[Any], bool]:
    if isinstance(until, str):
        return lambda event: bool(event.name == until)
    return until


async def _secured(context: AioContext, socket: Socket, security: Security) -> TlsStream:
    """The socket behind TLS, after the handshake. OSError; then it is closed."""
    from bottomhalf.tls.handshaking import Handshaking

    try:
        stream = security.wrap(socket)
    except OSError:
        socket.close()
        raise
    wish = _Wish("a TLS handshake with a QMP server")
    handshaking = Handshaking(context, stream, lambda error: wish.fulfil(stream if error is None else error))
    try:
        await wish.come()
    except BaseException:
        handshaking.close()
        raise
    return stream
