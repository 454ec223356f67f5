# SPDX-License-Identifier: Apache-2.0
"""IOThread: a thread that does nothing but poll a context of its own.

    thread = IOThread("io0", host)
    thread.context.schedule_oneshot(work)
    thread.stop()

Under the GIL a second thread does not make anything faster; it keeps one thing's waiting from another's. An
exception that goes out of its poll finds nobody to go to. Ending the thread would strand all that it serves, so it
goes on, and ``stop()`` raises the first one; who wants to know earlier sets ``context.exception_handler``.

How long it polls busily before it sleeps, and how many worker threads it may have, can be changed while it runs.
"""

from __future__ import annotations

from typing import Final

from bottomhalf.aio.context import POLL_MAX_NS, AioContext
from bottomhalf.aio.errors import AioError, WrongContext
from bottomhalf.aio.statistics import ContextStatistics
from bottomhalf.host.protocol import IN, Host

LAST_POLLS_MAX: Final = 1000  # for what was scheduled before the stop, and what that schedules


class IOThread:
    """A started thread with an AioContext. Made and stopped by the main thread."""

    context: AioContext

    def __init__(
        self, name: str, host: Host, poll_max_ns: int = POLL_MAX_NS, poll_grow: int = 0, poll_shrink: int = 0
    ) -> None:
        self.name = name
        self._host = host
        self._poll_params = (poll_max_ns, poll_grow, poll_shrink)
        self._running = True
        self._stopping = host.lock()  # held until stop() has no more use for the context
        self._started = host.event()
        self._failure: BaseException | None = None
        waiter = host.poller()
        waiter.register(self._started.fileno(), IN)
        self._thread = host.start_thread(self._work, name)
        while not waiter.wait(-1):
            pass
        waiter.close()
        self._started.close()
        self._raise_failure()

    def _work(self) -> None:
        try:
            self.context = AioContext(self._host, self.name, is_main=False)
            try:
                self.context.set_poll_params(*self._poll_params)
            except AioError:
                self.context.close()
                raise
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._started.set()
        while self._running:
            self._poll(True)
        with self._stopping:
            pass
        for _ in range(LAST_POLLS_MAX):
            if not self._poll(False):
                break
        try:
            self.context.close()
        except Exception as error:
            self._failure = self._failure or error

    def _poll(self, blocking: bool) -> bool:
        try:
            return self.context.poll(blocking)
        except Exception as error:
            self._failure = self._failure or error
            return True

    def set_poll_params(self, max_ns: int, grow: int = 0, shrink: int = 0) -> None:
        """AioContext.set_poll_params(), from any thread, at any time."""
        self.context.set_poll_params(max_ns, grow, shrink)

    def statistics(self) -> ContextStatistics:
        """Of its context. From any thread."""
        return self.context.statistics()

    def stop(self) -> None:
        """End the loop after what is scheduled now, and wait for the thread. Idempotent. Raises the first
        exception that a callback let out, if there was one."""
        if self.context.is_home:
            raise WrongContext(f"iothread {self.name} would wait for its own end")
        if self._running:
            with self._stopping:
                self._running = False
                self.context.notify()
            self._thread.join()
            self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
