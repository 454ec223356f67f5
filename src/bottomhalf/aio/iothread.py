# SPDX-License-Identifier: Apache-2.0
"""IOThread: a thread that does nothing but poll a context of its own.

    thread = IOThread("io0", host)
    thread.context.schedule_oneshot(work)
    thread.stop()

Under the GIL a second thread does not make anything faster; it keeps one thing's waiting from another's.
"""

from __future__ import annotations

from bottomhalf.aio.context import POLL_MAX_NS, AioContext
from bottomhalf.host.protocol import Host


class IOThread:
    """A started thread with an AioContext. Made and stopped by the main thread."""

    def __init__(self, name: str, host: Host, poll_max_ns: int = POLL_MAX_NS) -> None:
        self.name = name
        self._host = host
        self._poll_max_ns = poll_max_ns
        self._running = True
        self._started = host.event()
        self._failure: BaseException | None = None
        waiter = host.poller()
        waiter.register(self._started.fileno(), 1)
        self._thread = host.start_thread(self._work, name)
        while not waiter.wait(-1):
            pass
        waiter.close()
        self._started.close()
        if self._failure is not None:
            raise self._failure

    context: AioContext

    def _work(self) -> None:
        try:
            self.context = AioContext(self._host, self.name, is_main=False)
            self.context.poll_max_ns = self._poll_max_ns
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._started.set()
        while self._running:
            self.context.poll(True)
        self.context.close()

    def stop(self) -> None:
        """End the loop after the callbacks that are running, and wait for the thread. Idempotent."""
        if self._running:
            self._running = False
            self.context.notify()
            self._thread.join()
