# SPDX-License-Identifier: Apache-2.0
"""QMP monitors: a protocol session on a character device, commands run one at a time.

Bytes are taken and parsed in the I/O handler context; a command is then run by a bottom half of that same context,
one at a time over all monitors, taking turns. A command that waits polls the main context only, so no second
command can start inside it; it finds the disks served and the other monitors silent, as in QEMU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf import __version__
from bottomhalf.aio import BottomHalf
from bottomhalf.block import BlockError
from bottomhalf.monitor.chardev import Chardev
from bottomhalf.monitor.commands import HANDLERS
from bottomhalf.qapi.commands import event_data, parse_command
from bottomhalf.qapi.control import VersionInfo, VersionTriple
from bottomhalf.qapi.errors import GENERIC_ERROR, OptionError, QmpError
from bottomhalf.qapi.types import EventType
from bottomhalf.qapi.visit import to_json
from bottomhalf.wire.qmp import Failure, Refusal, Request, ServerSession

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage

QEMU_VERSION: Final = (10, 0, 2)  # whose interface this is


def version_info() -> VersionInfo:
    """What query-version and the greeting tell."""
    major, minor, micro = QEMU_VERSION
    return VersionInfo(
        qemu=VersionTriple(major=major, minor=minor, micro=micro), package=f"bottomhalf-{__version__}"
    )


class QmpMonitor:
    """One QMP session after another on a character device. Home thread of the device's context."""

    def __init__(self, storage: Storage, chardev: Chardev, *, pretty: bool = False) -> None:
        self.storage = storage
        self.chardev = chardev
        self._pretty = pretty
        self.session: ServerSession | None = None
        self._dispatch = _dispatcher(storage)
        storage.monitors.append(self)
        chardev.attach(self)

    # -- front end of the character device ----------------------------------------------------------------------

    def opened(self) -> None:
        self.session = ServerSession(to_json(version_info()), pretty=self._pretty)
        self.chardev.write(self.session.greeting())

    def received(self, data: memoryview) -> None:
        assert self.session is not None
        self.session.receive(data)
        self._after_input()

    def closed(self) -> None:
        """What the client still wanted is forgotten."""
        self.session = None

    def _after_input(self) -> None:
        session = self.session
        if session is not None:
            if session.pending:
                self._dispatch.schedule()
            self.chardev.set_reading(session.wants_data)

    # -- commands -----------------------------------------------------------------------------------------------

    def serve_next(self) -> bool:
        """Run one command and answer it; whether there was one."""
        session = self.session
        item = session.next_request() if session is not None else None
        if session is None or item is None:
            return False
        try:
            if isinstance(item, Refusal):
                answer = session.error(item.error, item.id)
            else:
                answer = session.response(self._run(session, item), item.id)
        except (QmpError, Failure) as error:
            answer = session.error(error, item.id)
        except (BlockError, OptionError) as error:
            answer = session.error(QmpError(GENERIC_ERROR, str(error).partition("\n")[0]), item.id)
        except OSError as error:
            answer = session.error(QmpError(GENERIC_ERROR, error.strerror or str(error)), item.id)
        except Exception as error:  # the client shall not wait for an answer, nor the other clients for their turn
            answer = session.error(QmpError(GENERIC_ERROR, f"internal error: {type(error).__name__}: {error}"), item.id)
            self.storage.report_defect(error, f"a command of monitor {self.chardev.id}")
        if self.session is session:
            self.chardev.write(answer)
            self._after_input()
        return True

    def _run(self, session: ServerSession, request: Request) -> object:
        if session.negotiated and request.command == "qmp_capabilities":
            session.negotiate()
        command, arguments = parse_command(request.command, request.arguments, oob=request.oob)
        if command.qmp_name == "qmp_capabilities":
            session.negotiate(getattr(arguments, "enable", None) or ())
            return None
        return to_json(HANDLERS[command.qmp_name](self.storage, arguments))

    def emit(self, event: EventType) -> None:
        """Send an event, if the client has negotiated."""
        session = self.session
        if session is not None:
            now_ns = self.storage.host.realtime_ns()
            self.chardev.write(session.event(type(event).qmp_name, event_data(event), now_ns))

    def close(self) -> None:
        self.session = None


def _dispatcher(storage: Storage) -> BottomHalf:
    """The one bottom half that runs commands, shared by all monitors of a program."""
    if storage.dispatcher is None:

        def dispatch() -> None:
            for monitor in list(storage.monitors):
                if monitor.serve_next():
                    storage.monitors.remove(monitor)  # served last: the others come first next time
                    storage.monitors.append(monitor)
                    assert storage.dispatcher is not None
                    storage.dispatcher.schedule()
                    return

        storage.dispatcher = storage.loop.iohandler.bottom_half(dispatch, name="QMP dispatcher")
    return storage.dispatcher
