# SPDX-License-Identifier: Apache-2.0
"""The main thread's loop: three servers, of which a nested poll serves only one.

    loop = MainLoop(host)
    loop.run()                 # until loop.quit(), from any thread or callback

======================  =================================================  =====================
server                  what it serves                                     in a nested poll
======================  =================================================  =====================
``loop.main``           the block layer: requests, jobs, exports           goes on
``loop.iohandler``      monitors, character devices, signals               stands still
the loop itself         its own timers (``loop.timer``, ``loop.sleep_ns``)  stands still
======================  =================================================  =====================

A wait inside a command polls the main context, so that disks go on, and leaves the others alone, so that no command
starts inside another. So a wait must never be for what only they deliver: ``sleep_ns`` finds that out and says so.

The I/O handler context sleeps inside the main context's wait: its poller is one more descriptor there. When that
becomes readable, the main context only notes it and stops looking (a nested poll would otherwise spin on it); the
outer loop then polls the I/O handler context and starts looking again. The loop's own timers run last.
"""

from __future__ import annotations

from collections.abc import Callable

from bottomhalf.aio.context import AioContext
from bottomhalf.aio.coroutine import Coroutine, Waitable, current, suspend
from bottomhalf.aio.timer import Timer, TimerList
from bottomhalf.aio.wait import needs_outer_loop
from bottomhalf.host.protocol import Host


class _OuterTimer(Waitable):
    """A timer of the main loop, to be waited for."""

    __slots__ = ("_timer",)

    outer = "the main loop"

    def __init__(self, timer: Timer) -> None:
        self._timer = timer

    @property
    def what(self) -> str:
        return "a timer of the main loop"

    def take_back(self, waiter: Coroutine) -> bool:
        was_armed = self._timer.armed
        self._timer.cancel()
        return was_armed


class MainLoop:
    """``main`` and ``iohandler`` contexts of the main thread, and the loop around them."""

    def __init__(self, host: Host | None = None) -> None:
        self.main = AioContext(host, "main")
        self.iohandler = AioContext(self.main.host, "iohandler", is_main=False)
        self.iohandler.embed()  # whoever schedules there wakes the wait that contains it
        self._timers: dict[str, TimerList] = {}
        self._deadline = self.main.timer(self._note, name="timers of the main loop")
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

    def timer(self, callback: Callable[[], object], clock: str = "realtime", name: str = "") -> Timer:
        """A timer of the loop itself, which no nested poll runs. Main thread; it may be armed from any."""
        timers = self._timers.get(clock)
        if timers is None:
            timers = self._timers[clock] = TimerList(self.main, self.main.clocks[clock])
        return Timer(timers, callback, name)

    async def sleep_ns(self, duration_ns: int, clock: str = "realtime") -> None:
        """Suspend the coroutine until a timer of the loop itself is due. WrongContext while plain code of the main
        thread is waiting: the timer would not run before that wait ends, which may be for this coroutine."""
        needs_outer_loop(f"the end of a sleep of {duration_ns} ns", "the main loop")
        me = current()
        context = me.context
        timer = self.timer(lambda: context.wake(me), clock, name="sleep in the main loop")
        timer.arm_ns(context.now_ns(clock) + duration_ns)
        try:
            await suspend(_OuterTimer(timer))
        finally:
            timer.cancel()

    def run(self) -> None:
        """Serve all until quit()."""
        while not self._quit:
            self.run_once()

    def run_once(self) -> None:
        """One blocking iteration."""
        self._arrange()
        self.main.poll(not self._ready)
        if self._ready:
            self._ready = False
            self.iohandler.release()
            try:
                self.iohandler.poll(False)
            finally:
                self.iohandler.embed()
                if not self._looking:
                    self._look()
        for timers in tuple(self._timers.values()):
            timers.run()

    def _arrange(self) -> None:
        """Have the main context's wait end when the others have something to do."""
        main = self.main
        timeout_ns = self.iohandler.timeout_ns()
        for timers in self._timers.values():
            deadline_ns = timers.deadline_ns()
            if deadline_ns >= 0:
                left_ns = max(deadline_ns - timers.now_ns(), 0)
                timeout_ns = left_ns if timeout_ns < 0 else min(timeout_ns, left_ns)
        if timeout_ns == 0:
            self._ready = True
        elif timeout_ns > 0:
            self._deadline.arm_ns(main.now_ns() + timeout_ns)

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
