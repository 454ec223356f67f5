# SPDX-License-Identifier: Apache-2.0
"""The main thread's loop: two contexts, of which a nested poll serves only one.

The main context runs the block layer, the I/O handler context runs monitors and signals. A wait inside a command
polls the main context, so that disks go on, and leaves the other alone, so that no command starts inside another.

    loop = MainLoop(host)
    loop.run()                 # until loop.quit(), from any thread or callback

The I/O handler context sleeps inside the main context's wait: its poller is one more descriptor there. When that
becomes readable, the main context only notes it and stops looking (a nested poll would otherwise spin on it); the
outer loop then polls the I/O handler context and starts looking again.
"""

from __future__ import annotations

from bottomhalf.aio.context import AioContext
from bottomhalf.host.protocol import Host


class MainLoop:
    """``main`` and ``iohandler`` contexts of the main thread, and the loop around them."""

    def __init__(self, host: Host | None = None) -> None:
        self.main = AioContext(host, "main")
        self.iohandler = AioContext(self.main.host, "iohandler", is_main=False)
        self.iohandler.notify_me += 1  # whoever schedules there wakes the wait that contains it
        self._deadline = self.main.timer(self._note, name="I/O handler timers")
        self._ready = False
        self._quit = False
        self._look()

    def _look(self) -> None:
        self.main.set_fd_handler(self.iohandler.fileno(), self._note)
        self._looking = True

    def _note(self) -> None:
        self._ready = True
        if self._looking:
            self._looking = False
            self.main.set_fd_handler(self.iohandler.fileno())

    def run(self) -> None:
        """Serve both contexts until quit()."""
        while not self._quit:
            self.run_once()

    def run_once(self) -> None:
        """One blocking iteration."""
        timeout_ns = self.iohandler.timeout_ns()
        if timeout_ns == 0:
            self._ready = True
        elif timeout_ns > 0:
            self._deadline.arm_ns(self.main.now_ns() + timeout_ns)
        self.main.poll(not self._ready)
        if self._ready:
            self._ready = False
            self.iohandler.notify_me -= 1  # it is awake
            try:
                self.iohandler.poll(False)
            finally:
                self.iohandler.notify_me += 1
                if not self._looking:
                    self._look()

    @property
    def quitting(self) -> bool:
        """Whether quit() was called. For those who drive run_once() themselves."""
        return self._quit

    def quit(self) -> None:
        """Let run() return after the callbacks that are running. From any thread and from signal handlers."""
        self._quit = True
        self.main.notify()

    def close(self) -> None:
        """Give both contexts back."""
        self._deadline.cancel()
        if self._looking:
            self.main.set_fd_handler(self.iohandler.fileno())
        self.iohandler.close()
        self.main.close()
