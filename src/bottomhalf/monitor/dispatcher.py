# SPDX-License-Identifier: Apache-2.0
"""Who runs the commands of all QMP monitors: one at a time, the monitors taking turns.

A command is called by a bottom half of the I/O handler context. Whatever it waits for, it polls the main context, so
the disks go on and no second command can start inside it. A command that is a coroutine runs in the main context while
all loops go on, and still no second one starts before it has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from bottomhalf.aio import move_to
from bottomhalf.block import BlockError
from bottomhalf.qapi.errors import GENERIC_ERROR, OptionError, QmpError
from bottomhalf.qom import QomError
from bottomhalf.wire.qmp import ErrorLike, Failure, Refusal, Request, ServerSession

if TYPE_CHECKING:
    from bottomhalf.monitor.qmp import QmpMonitor
    from bottomhalf.monitor.storage import Storage


def as_failure(error: Exception) -> ErrorLike | None:
    """What a client is told of an exception of a command; None if it is a defect of ours."""
    if isinstance(error, (QmpError, QomError, Failure)):
        return error
    if isinstance(error, (BlockError, OptionError)):
        return QmpError(GENERIC_ERROR, str(error).partition("\n")[0])
    if isinstance(error, OSError):
        return QmpError(GENERIC_ERROR, error.strerror or str(error))
    return None


class Dispatcher:
    """Of one program. Main thread, but for wake()."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._half = storage.loop.iohandler.bottom_half(self._dispatch, name="QMP dispatcher")
        self.wake = self._half.schedule  # from any thread: a monitor has something
        self.monitors: list[QmpMonitor] = []
        self.running: str | None = None  # the command that is
        self._closing = False

    def _dispatch(self) -> None:
        if self.running is not None or self._closing:
            return
        for monitor in list(self.monitors):
            taken = monitor.take()
            if taken is None:
                continue
            self.monitors.remove(monitor)  # served last: the others come first next time
            self.monitors.append(monitor)
            self.wake()
            self._serve(monitor, *taken)
            return

    def _serve(self, monitor: QmpMonitor, session: ServerSession, item: Request | Refusal) -> None:
        if isinstance(item, Refusal):
            monitor.finish(session, session.error(item.error, item.id))
            return
        self.running = item.command
        try:
            call = monitor.prepare(session, item)
            handler, arguments = call
            if iscoroutinefunction(handler):
                self._storage.loop.main.enter(self._co_serve(monitor, session, item, handler, arguments))
                return
            value = handler(self._storage, arguments)
            answer = session.response(monitor.to_json(value), item.id)
        except Exception as error:
            answer = self._failed(monitor, session, item, error)
        self._end(monitor, session, answer)

    async def _co_serve(
        self, monitor: QmpMonitor, session: ServerSession, item: Request, handler: Callable[..., Any], arguments: Any
    ) -> None:
        try:
            value = await handler(self._storage, arguments)
            answer = session.response(monitor.to_json(value), item.id)
        except Exception as error:
            answer = self._failed(monitor, session, item, error)
        await move_to(self._storage.loop.main)
        self._end(monitor, session, answer)
        self.wake()

    def _end(self, monitor: QmpMonitor, session: ServerSession, answer: bytes) -> None:
        self.running = None
        monitor.finish(session, answer)

    def _failed(self, monitor: QmpMonitor, session: ServerSession, item: Request, error: Exception) -> bytes:
        told = as_failure(error)
        if told is None:  # the client shall not wait for an answer, nor the other clients for their turn
            told = QmpError(GENERIC_ERROR, f"internal error: {type(error).__name__}: {error}")
            self._storage.report_defect(error, f"a command of monitor {monitor.id}")
        return session.error(told, item.id)

    def stop(self) -> None:
        """Start nothing more, and wait for the command that is running: it may need both contexts."""
        self._closing = True
        loop = self._storage.loop
        while self.running is not None:
            loop.run_once()

    def close(self) -> None:
        """No monitor is left that could wake it."""
        self._half.delete()
