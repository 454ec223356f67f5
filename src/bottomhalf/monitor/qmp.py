# SPDX-License-Identifier: Apache-2.0
"""QMP monitors: a protocol session on a character device.

Greeting, parsing and out-of-band commands live in a thread that all QMP monitors of a program share, so that they go on
while the main thread waits, whatever for. Other commands are queued there and run in the main thread (``dispatcher``),
one at a time. Without out-of-band execution a monitor reads no further while a command of its own runs; with it, until
eight commands wait. A device that no other thread can have (one behind a mux) is served in the I/O handler context, and
there is no out-of-band execution on it.

    main thread                                 monitors' thread
    take() the next request       <- wake() --  received(): parse, queue; run what is out of band
    run it, finish()              -- outbox ->  write the answer, read on

A session belongs to both threads, and a lock guards it. Its bytes are written by the monitors' thread alone, in the
order in which they come; what is meant for a client that has gone meanwhile is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf import __version__
from bottomhalf.chardev.base import Chardev, Line
from bottomhalf.monitor.commands import HANDLERS
from bottomhalf.monitor.dispatcher import as_failure
from bottomhalf.qapi.commands import parse_command
from bottomhalf.qapi.control import VersionInfo, VersionTriple
from bottomhalf.qapi.errors import GENERIC_ERROR, QmpError
from bottomhalf.qapi.visit import to_json
from bottomhalf.wire.qmp import Refusal, Request, ServerSession

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage

QEMU_VERSION: Final = (10, 0, 2)  # whose interface this is
CAPABILITIES: Final = ("oob",)


def version_info() -> VersionInfo:
    """What query-version and the greeting tell."""
    major, minor, micro = QEMU_VERSION
    return VersionInfo(
        qemu=VersionTriple(major=major, minor=minor, micro=micro), package=f"bottomhalf-{__version__}"
    )


class QmpMonitor:
    """One QMP session after another on a character device. Made and closed by the main thread."""

    to_json = staticmethod(to_json)

    def __init__(self, storage: Storage, chardev: Chardev, *, pretty: bool = False) -> None:
        self.storage = storage
        self.id = chardev.id
        self.chardev = chardev
        self.session: ServerSession | None = None
        self._capabilities = CAPABILITIES if chardev.movable else ()
        self._pretty = pretty
        self._line: Line | None = None
        self._lock = storage.host.lock()  # of the session
        self._outbox: deque[tuple[ServerSession, bytes]] = deque()
        self._dispatcher = storage.dispatcher
        self.context = storage.monitor_context() if chardev.movable else chardev.context
        self._half = self.context.bottom_half(self._go_on, name=f"outbox of monitor {chardev.id}")
        chardev.attach(self, self.context)
        self._dispatcher.monitors.append(self)

    # -- front end of the character device, in its context ------------------------------------------------------

    has_user = True

    def opened(self, line: Line) -> None:
        self._line = line
        line.set_echo(True)
        session = ServerSession(to_json(version_info()), self._capabilities, pretty=self._pretty)
        with self._lock:
            self.session = session
        line.write(session.greeting())

    def received(self, data: memoryview) -> None:
        with self._lock:
            session = self.session
            urgent = session.receive(data) if session is not None else []
        if session is not None:
            self._answer_urgent(session, urgent)
            self._after_input(session)

    def closed(self) -> None:
        """What the client still wanted is forgotten."""
        with self._lock:
            self.session = None

    def _after_input(self, session: ServerSession) -> None:
        with self._lock:
            pending, reading = session.pending, session.wants_data
        if pending:
            self._dispatcher.wake()
        if self._line is not None and self.session is session:
            self._line.set_reading(reading)

    def _answer_urgent(self, session: ServerSession, items: list[Request | Refusal]) -> None:
        """Run what is out of band, here and now."""
        for item in items:
            answer = self._run_urgent(session, item)
            if self.session is session and self._line is not None:
                self._line.write(answer)

    def _run_urgent(self, session: ServerSession, item: Request | Refusal) -> bytes:
        if isinstance(item, Refusal):
            return session.error(item.error, item.id)
        try:
            command, arguments = parse_command(item.command, item.arguments, oob=True)
            return session.response(to_json(HANDLERS[command.qmp_name](self.storage, arguments)), item.id)
        except Exception as error:
            told = as_failure(error)
            if told is None:
                told = QmpError(GENERIC_ERROR, f"internal error: {type(error).__name__}: {error}")
                self.storage.report_defect(error, f"an out-of-band command of monitor {self.id}")
            return session.error(told, item.id)

    def _go_on(self) -> None:
        """Say what the main thread has for the client, and read on if it has taken something."""
        while self._outbox:
            session, data = self._outbox.popleft()
            if self.session is session and self._line is not None:
                self._line.write(data)
        current = self.session
        if current is not None:
            self._after_input(current)

    # -- for the dispatcher, in the main thread -----------------------------------------------------------------

    def take(self) -> tuple[ServerSession, Request | Refusal] | None:
        """The next thing to run or refuse, with the session that it came by."""
        with self._lock:
            session = self.session
            item = session.next_request() if session is not None else None
        if session is None or item is None:
            return None
        if session.enabled:
            self._half.schedule()  # there is room in the queue
        return session, item

    def prepare(self, session: ServerSession, request: Request) -> tuple[Callable[[Storage, Any], Any], Any]:
        """The function that carries a request out, and its arguments. QmpError, Failure."""
        if session.negotiated and request.command == "qmp_capabilities":
            session.negotiate()
        command, arguments = parse_command(request.command, request.arguments, oob=request.oob)
        if command.qmp_name == "qmp_capabilities":
            enable = getattr(arguments, "enable", None) or ()
            return lambda storage, _: self._negotiate(session, enable), arguments
        handler = HANDLERS.get(command.qmp_name)
        if handler is None:
            raise QmpError("CommandNotFound", f"The command {request.command} has not been found")
        return handler, arguments

    def _negotiate(self, session: ServerSession, enable: Any) -> None:
        with self._lock:
            urgent = session.negotiate(enable)
        if urgent:
            self.context.schedule_oneshot(lambda: self._answer_urgent(session, urgent))

    def finish(self, session: ServerSession, answer: bytes) -> None:
        """What take() gave is done; ``answer`` is for its client."""
        with self._lock:
            session.finished()
        self._send(session, answer)

    def _send(self, session: ServerSession, data: bytes) -> None:
        self._outbox.append((session, data))
        if self.context.is_home:
            self._go_on()
        else:
            self._half.schedule()

    # -- from any thread ----------------------------------------------------------------------------------------

    def send_event(self, name: str, data: dict[str, Any] | None, realtime_ns: int) -> None:
        """Send an event, if the client has negotiated."""
        session = self.session
        if session is not None:
            line = session.event(name, data, realtime_ns)
            if line:
                self._send(session, line)

    def close(self) -> None:
        """Say what is left to say, then nothing more. Runs in the monitor's context."""
        self._go_on()
        self.closed()
        self._half.delete()
