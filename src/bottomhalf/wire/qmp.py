# SPDX-License-Identifier: Apache-2.0
"""QMP, both ends: bytes in, requests out, bytes out. No socket, no clock, no knowledge of any command.

A monitor greets, the client negotiates capabilities with ``qmp_capabilities``, then requests and responses
follow, and events come in between at any time (docs/interop/qmp-spec.rst). Clients pipeline: the bytes that
negotiate and the first real command may arrive together. Whether a command is allowed is therefore only
known when its turn comes, not when its bytes arrive. So the server's end is asked for one request at a time,
and errors that need no command (bad JSON, a member too many) wait in the same queue for the same reason:
responses must keep the order of the requests.

    session = ServerSession({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""})
    output = session.greeting()
    for item in session.receive(data):     # out-of-band commands: answer them now, whatever else is going on
        ...
    while (item := session.next_request()) is not None:
        if isinstance(item, Refusal):
            output += session.error(item.error, item.id)
        else:
            output += session.response(run(item.command, item.arguments), item.id)
        session.finished()

When ``qmp_capabilities`` is among them, ``run`` calls ``session.negotiate``, which returns the out-of-band commands
that came behind it and were not known as such. Every line ends with CR LF. Member order is that of QEMU's hash table,
see ``json_writer``. A session has no lock: whose threads share one, brings his own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.json_reader import JsonError, JsonStream
from bottomhalf.wire.json_writer import dumps, qdict_order

__all__ = [
    "ServerSession", "Request", "Refusal", "NO_ID",
    "ClientSession", "Greeting", "Response", "Event",
    "ErrorLike", "Failure", "JsonStream", "JsonError", "qdict_order",
]  # fmt: skip

# Requests that may wait before a server stops reading from the client (monitor/qmp.c).
QUEUE_LENGTH_MAX: Final = 1
QUEUE_LENGTH_MAX_OOB: Final = 8

GENERIC_ERROR: Final = "GenericError"
COMMAND_NOT_FOUND: Final = "CommandNotFound"
_STRANGER: Final = "probably not a QMP server"

NEGOTIATION_EXPECTED: Final = "Expecting capabilities negotiation with 'qmp_capabilities'"
NEGOTIATION_COMPLETE: Final = "Capabilities negotiation is already complete, command ignored"


class _NoId:
    def __repr__(self) -> str:
        return "NO_ID"


NO_ID: Final = _NoId()
"""The request had no id (null would be one)."""


class ErrorLike(Protocol):
    """What an error response is made of: the shape of ``Failure`` and of ``qapi.errors.QmpError``."""

    class_name: str
    desc: str


class Failure(Exception):
    """An error that this protocol core makes itself, or that a server answered to a client's request."""

    def __init__(self, class_name: str, desc: str) -> None:
        super().__init__(desc)
        self.class_name = class_name
        self.desc = desc

    def __repr__(self) -> str:
        return f"Failure({self.class_name!r}, {self.desc!r})"


class Request:
    """A command to run. ``arguments`` is the client's object, unchecked; ``id`` any JSON value or NO_ID."""

    __slots__ = ("arguments", "command", "id", "oob")

    def __init__(self, command: str, arguments: dict[str, Any], id: Any = NO_ID, oob: bool = False) -> None:
        self.command = command
        self.arguments = arguments
        self.id = id
        self.oob = oob

    def __repr__(self) -> str:
        return f"Request({self.command!r}, {self.arguments!r}, id={self.id!r}, oob={self.oob})"


class Refusal:
    """What the client sent cannot be run; answer ``error`` with ``id`` when its turn comes."""

    __slots__ = ("error", "id")

    def __init__(self, error: Failure, id: Any = NO_ID) -> None:
        self.error = error
        self.id = id

    def __repr__(self) -> str:
        return f"Refusal({self.error!r}, id={self.id!r})"


class ServerSession:
    """The monitor's end of one connection.

    ``version`` is the VersionInfo object of the greeting; ``capabilities`` are those on offer (``"oob"``);
    ``pretty`` indents what is sent.
    """

    def __init__(
        self, version: Mapping[str, Any], capabilities: Sequence[str] = (), *, pretty: bool = False
    ) -> None:
        self._version = dict(version)
        self._offered = list(capabilities)
        self._pretty = pretty
        self._stream = JsonStream()
        self._queue: deque[Any] = deque()
        self._running = False  # a command that next_request() gave
        self.enabled: frozenset[str] = frozenset()
        self.negotiated = False

    @property
    def pending(self) -> int:
        """Requests and refusals that wait for ``next_request``."""
        return len(self._queue)

    @property
    def wants_data(self) -> bool:
        """Whether the monitor should go on reading: False while as many requests wait as QEMU lets wait. Without
        out-of-band execution the one that is running counts, for nothing that could be read would be urgent."""
        if "oob" in self.enabled:
            return len(self._queue) < QUEUE_LENGTH_MAX_OOB
        return len(self._queue) + self._running < QUEUE_LENGTH_MAX

    def greeting(self) -> bytes:
        """The first line of the connection."""
        return self._line({"QMP": {"version": self._version, "capabilities": self._offered}})

    def receive(self, data: bytes | bytearray | memoryview) -> list[Request | Refusal]:
        """Take bytes from the client. What they hold waits for ``next_request``, but for what is to be answered at
        once, out of band."""
        values = self._stream.feed(data)
        if "oob" not in self.enabled:
            self._queue.extend(values)
            return []
        self._queue.extend(value for value in values if not _is_out_of_band(value))
        return [self._judge(value) for value in values if _is_out_of_band(value)]

    def end_of_stream(self) -> None:
        """The client has closed its side; what it left incomplete becomes a refusal."""
        self._queue.extend(self._stream.finish())

    def next_request(self) -> Request | Refusal | None:
        """The next thing to answer, judged by the state of the negotiation now; None if none waits."""
        if not self._queue:
            return None
        self._running = True
        return self._judge(self._queue.popleft())

    def finished(self) -> None:
        """What ``next_request`` gave is answered."""
        self._running = False

    def _judge(self, value: Any) -> Request | Refusal:
        if isinstance(value, JsonError):
            return Refusal(Failure(GENERIC_ERROR, str(value)))
        id = value.get("id", NO_ID) if isinstance(value, dict) else NO_ID
        try:
            request = self._check(value, id)
            if not self.negotiated and request.command != "qmp_capabilities":
                raise Failure(COMMAND_NOT_FOUND, NEGOTIATION_EXPECTED)
        except Failure as error:
            return Refusal(error, id)
        return request

    def _check(self, value: Any, id: Any) -> Request:
        if not isinstance(value, dict):
            raise Failure(GENERIC_ERROR, "QMP input must be a JSON object")
        executes: str | None = None
        for name in qdict_order(value):
            member = value[name]
            if name == "execute" or (name == "exec-oob" and "oob" in self.enabled):
                if not isinstance(member, str):
                    raise Failure(GENERIC_ERROR, f"QMP input member '{name}' must be a string")
                if executes is not None:
                    raise Failure(GENERIC_ERROR, f"QMP input member '{name}' clashes with '{executes}'")
                executes = name
            elif name == "arguments":
                if not isinstance(member, dict):
                    raise Failure(GENERIC_ERROR, "QMP input member 'arguments' must be an object")
            elif name != "id":
                raise Failure(GENERIC_ERROR, f"QMP input member '{name}' is unexpected")
        if executes is None:
            raise Failure(GENERIC_ERROR, "QMP input lacks member 'execute'")
        return Request(value[executes], value.get("arguments", {}), id, executes == "exec-oob")

    def negotiate(self, enable: Sequence[str] = ()) -> list[Request | Refusal]:
        """Run ``qmp_capabilities``: enter command mode with the capabilities ``enable``. What waits already and is to
        be answered out of band now that it may be. Raises Failure."""
        if self.negotiated:
            raise Failure(COMMAND_NOT_FOUND, NEGOTIATION_COMPLETE)
        unavailable = [name for name in enable if name not in self._offered]
        if unavailable:
            raise Failure(GENERIC_ERROR, f"Capability {', '.join(unavailable)} not available")
        self.enabled = frozenset(enable)
        self.negotiated = True
        if "oob" not in self.enabled:
            return []
        waiting = list(self._queue)
        self._queue = deque(value for value in waiting if not _is_out_of_band(value))
        return [self._judge(value) for value in waiting if _is_out_of_band(value)]

    def response(self, value: Any = None, id: Any = NO_ID) -> bytes:
        """A success. ``value`` None stands for a command that returns nothing and is sent as ``{}``."""
        message = {"return": {} if value is None else value}
        if id is not NO_ID:
            message["id"] = id
        return self._line(message)

    def error(self, error: ErrorLike, id: Any = NO_ID) -> bytes:
        """A failure."""
        message: dict[str, Any] = {"error": {"class": error.class_name, "desc": error.desc}}
        if id is not NO_ID:
            message["id"] = id
        return self._line(message)

    def event(self, name: str, data: Mapping[str, Any] | None, realtime_ns: int) -> bytes:
        """An event at the wall clock time ``realtime_ns`` (nanoseconds; negative if the clock failed).

        ``data`` None is for events without any. No bytes before the client has negotiated.
        """
        if not self.negotiated:
            return b""
        if realtime_ns < 0:
            timestamp = {"seconds": -1, "microseconds": -1}
        else:
            timestamp = {"seconds": realtime_ns // 10**9, "microseconds": realtime_ns % 10**9 // 1000}
        message: dict[str, Any] = {"event": name}
        if data is not None:
            message["data"] = dict(data)
        message["timestamp"] = timestamp
        return self._line(message)

    def _line(self, message: dict[str, Any]) -> bytes:
        return dumps(message, pretty=self._pretty).encode("ascii") + b"\r\n"


def _is_out_of_band(value: Any) -> bool:
    return isinstance(value, dict) and "exec-oob" in value and "execute" not in value


class Greeting:
    """What a server says first."""

    __slots__ = ("capabilities", "version")

    def __init__(self, version: dict[str, Any], capabilities: list[str]) -> None:
        self.version = version
        self.capabilities = capabilities


class Response:
    """A command's result: ``value``, or ``error`` if that is not None.

    ``id`` is NO_ID if the server could not tell which request it answers (it was not readable).
    """

    __slots__ = ("error", "id", "value")

    def __init__(self, id: Any, value: Any, error: Failure | None) -> None:
        self.id = id
        self.value = value
        self.error = error

    def result(self) -> Any:
        """The value. Raises the Failure that the server answered."""
        if self.error is not None:
            raise self.error
        return self.value


class Event:
    """Something that happened. ``realtime_ns`` is the server's wall clock, microseconds exact."""

    __slots__ = ("data", "name", "realtime_ns")

    def __init__(self, name: str, data: dict[str, Any], realtime_ns: int) -> None:
        self.name = name
        self.data = data
        self.realtime_ns = realtime_ns


class ClientSession:
    """The client's end of one connection::

    client.receive(data)                  # [Greeting]
    send(client.execute("qmp_capabilities"))
    send(client.execute("block-export-del", {"id": "e0"}))
    client.receive(data)                  # [Response, Event, ...]
    """

    def __init__(self) -> None:
        self._stream = JsonStream()
        self._greeted = False
        self._last_id = 0
        self.outstanding: dict[int, str] = {}  # id -> command, for requests without a response

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, oob: bool = False
    ) -> bytes:
        """Bytes of a request. Its number, ``last_id``, comes back in the response."""
        self._last_id += 1
        message: dict[str, Any] = {"exec-oob" if oob else "execute": command}
        if arguments:
            message["arguments"] = dict(arguments)
        message["id"] = self._last_id
        self.outstanding[self._last_id] = command
        return dumps(message).encode("ascii") + b"\r\n"

    @property
    def last_id(self) -> int:
        """The id of the latest request."""
        return self._last_id

    def receive(self, data: bytes | bytearray | memoryview) -> list[Greeting | Response | Event]:
        """Take bytes from the server. Raises ProtocolError for what no QMP server sends."""
        return [self._sort(value) for value in self._stream.feed(data)]

    def _sort(self, value: Any) -> Greeting | Response | Event:
        if isinstance(value, JsonError):
            raise ProtocolError("QMP server sent what is not JSON", got=str(value), cause=_STRANGER)
        if not isinstance(value, dict):
            raise ProtocolError("QMP server sent a value on its own", expected="an object", got=_short(value))
        if not self._greeted:
            return self._greeting(value)
        try:
            if "event" in value:
                stamp = value["timestamp"]
                realtime_ns = stamp["seconds"] * 10**9 + stamp["microseconds"] * 1000
                if not isinstance(value["event"], str) or not isinstance(realtime_ns, int):
                    raise TypeError
                return Event(value["event"], dict(value.get("data", {})), realtime_ns)
            error = None
            if "error" in value:
                class_name, desc = value["error"]["class"], value["error"]["desc"]
                error = Failure(str(class_name), str(desc))
            elif "return" not in value:
                raise KeyError
        except (KeyError, TypeError, ValueError):
            raise ProtocolError(
                "QMP message has the wrong shape", expected="a response or an event", got=_short(value)
            ) from None
        id = value.get("id", NO_ID)
        if id is NO_ID and error is not None:
            return Response(NO_ID, None, error)
        if not isinstance(id, int) or self.outstanding.pop(id, None) is None:
            raise ProtocolError(
                "QMP response to no request of ours", got=f"id {id!r}", cause="probably a server bug"
            )
        return Response(id, value.get("return"), error)

    def _greeting(self, value: dict[str, Any]) -> Greeting:
        try:
            inner = value["QMP"]
            greeting = Greeting(dict(inner["version"]), list(inner["capabilities"]))
        except (KeyError, TypeError, ValueError):
            raise ProtocolError(
                "QMP greeting missing", expected='{"QMP": ...}', got=_short(value), cause=_STRANGER
            ) from None
        self._greeted = True
        return greeting


def _short(value: Any) -> str:
    text = dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
