# SPDX-License-Identifier: Apache-2.0
"""AioContext: the loop of one thread.

One ``poll`` waits for readiness if there is nothing to do, then runs bottom halves, ready handlers, timers, in
this order. Facts that shape it:

* **Sleeping and waking.** Writing an eventfd costs a microsecond, scheduling a bottom half a tenth. So a
  scheduler sets ``notified`` and writes only if ``notify_me`` says that the loop sleeps or is about to. The loop
  announces itself (``notify_me``), then looks at ``notified`` once more, sleeps, takes the announcement back,
  clears ``notified``, and only then looks at what there is to do: in any other order a wake-up can be lost.
* **Nesting.** A callback may poll. A poll takes everything that is scheduled into a slice of its own and first
  continues the slices of the polls around it, through the very same iterators: nothing runs twice, and what an
  inner poll waits for cannot hide in an outer batch. Readiness is level-triggered, so when an inner poll has
  dispatched, the outer one drops what is left of its list and sees it again next time. What a deferred section
  around the poll holds back is done first, for the poll may wait for it.
* **Busy polling.** Waking a sleeping processor takes tens of microseconds. Before it sleeps, a context with
  ``poll_max_ns`` looks for events for a while that adapts itself: it grows while events come soon enough to be
  worth it and falls to nothing when they do not.
* **Exceptions.** What a callback raises goes to the ``exception_handler``, or, with none set, out of ``poll``.
  Everything that is not done yet then stays where the next poll finds it.

A loop tests its condition, never the result of ``poll``: a blocking poll may return for no visible reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Coroutine as AbstractCoroutine
from operator import length_hint
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bottomhalf.aio.bottom_half import BottomHalf
from bottomhalf.aio.coroutine import Coroutine, queue_on, run_woken
from bottomhalf.aio.errors import AioError, WrongContext
from bottomhalf.aio.handlers import Handlers
from bottomhalf.aio.thread import own
from bottomhalf.aio.timer import CLOCKS, Timer, TimerList
from bottomhalf.host.protocol import IN, Host

if TYPE_CHECKING:
    from bottomhalf.aio.io import ContextEngine

Callback: TypeAlias = Callable[[], object]

IDLE_NS: Final = 10_000_000  # an idle bottom half runs at least this often (QEMU: 10 ms)
POLL_FIRST_NS: Final = 4_000  # the first step when busy polling grows (QEMU: 4 us)
POLL_MAX_NS: Final = 32_768  # what a context that serves requests should use (QEMU's iothreads)
LOOK_EVERY: Final = 8  # polls that have bottom halves to run look for readiness every so often


class AioContext:
    """An event loop with bottom halves, handlers, timers and coroutines. Its home is the thread that makes it.

    ``exception_handler(context, error, where)`` is called for an exception in a callback; with None it goes out
    of ``poll``, and no other callback is lost either way."""

    # Slots, because an object with more than thirty attributes in a dictionary is slower to look at.
    __slots__ = (
        "__weakref__",
        "_engine",
        "_event",
        "_failures",
        "_handlers",
        "_home",
        "_looks",
        "_monotonic_ns",
        "_poll_ns",
        "_poller",
        "_queue",
        "_schedule_half",
        "_scheduled",
        "_shuffle",
        "_slices",
        "_state",
        "_thread_id",
        "_timers",
        "_wait",
        "append_half",
        "exception_handler",
        "host",
        "is_main",
        "name",
        "notified",
        "notify_me",
        "poll_grow",
        "poll_max_ns",
        "poll_shrink",
        "wake_up",
    )

    def __init__(self, host: Host | None = None, name: str = "main", *, is_main: bool = True) -> None:
        if host is None:
            from bottomhalf.host.linux import LinuxHost

            host = LinuxHost()
        self.host: Host = host
        self.name = name
        self.is_main = is_main
        self.exception_handler: Callable[[AioContext, Exception, str], object] | None = None
        self.poll_max_ns = 0
        self.poll_grow = 2
        self.poll_shrink = 0
        self.notified = False  # something was scheduled since the loop last looked
        self.notify_me = 0  # above 0: somebody sleeps, or is about to, and has to be woken by the event
        self._home = host.thread_id()
        self._state = own.state
        self._thread_id = host.thread_id
        self._monotonic_ns = host.monotonic_ns
        self._poller = host.poller()
        self._wait = self._poller.wait
        self._event = host.event()
        self._poller.register(self._event.fileno(), IN)
        self._handlers = Handlers(self, self._poller, self._event)
        self.wake_up = self._event.set
        self._queue: list[BottomHalf] = []
        self.append_half = self._queue.append
        self._slices: deque[Any] = deque()
        self._poll_ns = 0
        self._looks = 0
        self._timers = tuple(TimerList(self, clock) for clock in CLOCKS)
        self._scheduled: deque[Coroutine] = deque()
        self._failures: deque[Exception] = deque()
        self._engine: ContextEngine | None = None
        self._shuffle = None if host.name == "linux" else host.shuffle
        self._schedule_half = self.bottom_half(self._enter_scheduled, name="scheduled coroutines")
        self._state.add_context(self)

    # -- bottom halves ------------------------------------------------------------------------------------------

    def bottom_half(self, callback: Callback, name: str = "") -> BottomHalf:
        """A bottom half that calls ``callback()`` in this context. Callable from any thread."""
        return BottomHalf(self, callback, name)

    def schedule_oneshot(self, callback: Callback) -> None:
        """Call ``callback()`` once in the next poll. Callable from any thread; cannot be taken back."""
        half = BottomHalf(self, callback, "")
        half.scheduled = half.queued = True
        self.append_half(half)
        self.notified = True
        if self.notify_me:
            self.wake_up()

    def _run_bottom_halves(self) -> bool:
        queue, slices = self._queue, self._slices
        count = len(queue)
        if count:
            batch = queue[:count]
            del queue[:count]
            if self._shuffle is not None:
                self._shuffle(batch)
            slices.append(iter(batch))
        progress = False
        while slices:
            batch_left = slices[0]
            for half in batch_left:
                half.queued = False
                if not half.scheduled:
                    continue
                half.scheduled = False
                if not half.rare:
                    progress = True
                elif half.deleted:
                    continue
                elif half.idle:
                    half.idle = False
                else:
                    progress = True
                try:
                    half.callback()
                except Exception as error:
                    self.failed(error, f"bottom half {half.name!r}")
            if slices and slices[0] is batch_left:
                slices.popleft()
        return progress

    # -- handlers -----------------------------------------------------------------------------------------------

    def set_fd_handler(
        self,
        fd: int,
        on_read: Callback | None = None,
        on_write: Callback | None = None,
        poll: Callable[[], bool] | None = None,
        poll_ready: Callback | None = None,
    ) -> None:
        """Call ``on_read()`` while ``fd`` is readable (or hung up), ``on_write()`` while it is writable, both
        after an error.

        ``poll()`` is a cheap look, without a system call, whether there is work; while the context polls busily
        (never with ``poll_max_ns`` 0) it is asked and ``poll_ready()`` does the work. Replaces an earlier handler
        of the descriptor; without any callback removes it, which has to happen before the descriptor is closed.
        Callable from any thread."""
        self._handlers.set(fd, on_read, on_write, poll, poll_ready)
        self.notify()

    # -- clocks and timers --------------------------------------------------------------------------------------

    def now_ns(self, clock: str = "realtime") -> int:
        """The clock's time: "realtime" is monotonic (QEMU's name for it), "host" is the wall clock."""
        if clock == "realtime":
            return self._monotonic_ns()
        return self._timer_list(clock).now_ns()

    def timer(self, callback: Callback, clock: str = "realtime", name: str = "") -> Timer:
        """A timer that calls ``callback()`` in this context."""
        return Timer(self._timer_list(clock), callback, name)

    def _timer_list(self, clock: str) -> TimerList:
        for timers in self._timers:
            if timers.clock == clock:
                return timers
        raise AioError(f"there is no clock {clock!r}; there are {', '.join(CLOCKS)}")

    # -- coroutines ---------------------------------------------------------------------------------------------

    def enter(self, coroutine: Coroutine | AbstractCoroutine[Any, Any, Any]) -> Coroutine:
        """Start a coroutine, or continue a suspended one, in this context.

        In the home thread it runs now, up to its first suspension; from inside another coroutine, when that one
        suspends; from another thread, in the next poll. An exception in it goes to whoever awaits it, else out
        of this call (or to the exception handler when the loop entered it)."""
        if type(coroutine) is not Coroutine:
            coroutine = Coroutine(coroutine, self)  # type: ignore[arg-type]
        state = self._state
        if coroutine.context is not self or self._thread_id() != self._home:
            self.schedule(coroutine)
        elif state.coroutine is None and coroutine.queued is None:
            error = coroutine.step(state)
            if coroutine.woken is not None:
                run_woken(coroutine, state)
            if error is not None:
                raise error
        else:
            queue_on(coroutine, state.coroutine)
        return coroutine

    def wake(self, coroutine: Coroutine) -> None:
        """Continue a suspended coroutine in its own context, as enter() does. From any thread.

        For those who do not know what they wake: an exception in it that nobody awaits goes to the exception
        handler of its context or out of the context's poll, never out of here."""
        context = coroutine.context
        state = context._state
        if context._thread_id() != context._home:
            context.schedule(coroutine)
        elif state.coroutine is None and coroutine.queued is None:
            error = coroutine.step(state)
            if coroutine.woken is not None:
                run_woken(coroutine, state)
            if error is not None:
                context.report(error, f"coroutine {coroutine.name}")
        else:
            queue_on(coroutine, state.coroutine)

    def schedule(self, coroutine: Coroutine | AbstractCoroutine[Any, Any, Any]) -> Coroutine:
        """Enter the coroutine in the next poll of this context, first come first served. From any thread.

        This is also how a coroutine moves: it schedules itself in another context and suspends."""
        if not isinstance(coroutine, Coroutine):
            coroutine = Coroutine(coroutine, self)
        if coroutine.queued is not None:
            raise AioError(f"{coroutine!r} cannot be scheduled in {self.name}: {coroutine.queued}")
        coroutine.queued = f"it is scheduled in {self.name}"
        if coroutine.context is not self and own.state.coroutine is coroutine:
            # Another thread must not enter it before it has suspended: its old context hands it over then.
            coroutine.context.schedule_oneshot(lambda: self._take(coroutine))
        else:
            self._take(coroutine)
        return coroutine

    def _take(self, coroutine: Coroutine) -> None:
        coroutine.context = self
        self._scheduled.append(coroutine)
        self._schedule_half.schedule()

    def _enter_scheduled(self) -> None:
        scheduled = self._scheduled
        left = len(scheduled)
        while left and scheduled:
            left -= 1
            coroutine = scheduled.popleft()
            coroutine.queued = None
            try:
                self.enter(coroutine)
            except BaseException as error:
                if scheduled:
                    self._schedule_half.schedule()
                if not isinstance(error, Exception):
                    raise
                self.failed(error, f"coroutine {coroutine.name}")

    def run(self, body: AbstractCoroutine[Any, Any, Any], what: str = "") -> Any:
        """Run a coroutine from plain code until it ends; what it returns or raises. Home thread only.

        An exception of another callback that goes out of the poll goes out of here too; the coroutine goes on in
        the next polls."""
        from bottomhalf.aio.wait import wait_while

        what = what or getattr(body, "__qualname__", "a coroutine")
        if not self.is_home or self._state.coroutine is not None:
            body.close()
            where = "another thread" if not self.is_home else f"coroutine {self._state.coroutine!r}"
            raise WrongContext(f"{self.name} is to run {what} to its end, from {where}; enter it and await it")

        async def guarded() -> tuple[Any, Exception | None]:
            try:
                return await body, None
            except Exception as error:
                return None, error

        coroutine = self.enter(guarded())
        wait_while(self, lambda: not coroutine.done, what)
        result, error = coroutine.result()
        if error is not None:
            raise error
        return result

    # -- waking -------------------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Make the loop look again at what there is to do. From any thread and from signal handlers."""
        self.notified = True
        if self.notify_me:
            self.wake_up()

    def notify_idle(self) -> None:
        """Something idle was scheduled: who sleeps has to learn that he may not sleep for long. The loop itself,
        which goes on to compute how long it may sleep, need not be told, or it would not sleep at all."""
        if self.notify_me or self._thread_id() != self._home:
            self.notify()

    # -- polling ------------------------------------------------------------------------------------------------

    @property
    def is_home(self) -> bool:
        """Whether this is the context's own thread."""
        return self._thread_id() == self._home

    def poll(self, blocking: bool) -> bool:
        """One iteration; whether there was progress (notifications and idle bottom halves are none).

        Home thread only, never inside a coroutine. A blocking poll returns after something happened, which may
        be only a notification."""
        if self._thread_id() != self._home:
            raise WrongContext(f"{self.name} is polled by a thread that is not its home")
        state = self._state
        if state.coroutine is not None:
            raise WrongContext(
                f"coroutine {state.coroutine.name} polls {self.name}: nothing that it wakes could run; "
                "await instead"
            )
        if state.depth:
            return self._poll_in_section(blocking)
        events = self._wait_for_work() if blocking else self._wait(0)
        self.notified = False
        progress = False
        if self._queue or self._slices:
            progress = self._run_bottom_halves()
        handlers = self._handlers
        if events and handlers.dispatch(events):
            progress = True
        if handlers.found is not None and handlers.serve_found():
            progress = True
        for timers in self._timers:
            if (timers.heap or timers.inbox) and timers.run():
                progress = True
        if self._failures:
            raise self._failures.popleft()
        return progress

    def _poll_in_section(self, blocking: bool) -> bool:
        state = self._state
        depth, state.depth = state.depth, 0
        try:
            state.flush()
            return self.poll(blocking)
        finally:
            state.depth = depth

    def _wait_for_work(self) -> list[tuple[int, int]]:
        queue = self._queue
        if queue and queue[0].scheduled and not queue[0].rare:
            timeout_ns = 0  # the usual case, without a look at the rest
        else:
            timeout_ns = self.timeout_ns()
        if timeout_ns == 0:
            self._looks += 1
            return self._wait(0) if self._looks % LOOK_EVERY == 0 or not queue else []
        started_ns = 0
        if self.poll_max_ns:
            started_ns = self._monotonic_ns()
            if self._poll_ns:
                found = self._poll_busily(started_ns, timeout_ns)
                if found is not None:
                    return found
                if timeout_ns > 0:
                    timeout_ns = max(timeout_ns - (self._monotonic_ns() - started_ns), 0)
        self.notify_me += 1
        try:
            if self.notified:
                timeout_ns = 0
            elif queue and not 0 <= timeout_ns <= IDLE_NS:
                timeout_ns = IDLE_NS  # a signal handler has scheduled something idle
            events = self._wait(timeout_ns)
        finally:
            self.notify_me -= 1
        if started_ns:
            self._adapt(self._monotonic_ns() - started_ns)
        return events

    def timeout_ns(self) -> int:
        """How long a poll may sleep: 0 not at all, -1 without end."""
        if self._failures or self._handlers.found is not None:
            return 0
        for left in self._slices:
            if length_hint(left):
                return 0
        timeout_ns = -1
        for half in self._queue:
            if half.scheduled and not half.deleted:
                if not half.idle:
                    return 0
                timeout_ns = IDLE_NS
        for timers in self._timers:
            deadline_ns = timers.deadline_ns() if timers.heap or timers.inbox else -1
            if deadline_ns >= 0:
                left_ns = max(deadline_ns - timers.now_ns(), 0)
                timeout_ns = left_ns if timeout_ns < 0 else min(timeout_ns, left_ns)
        return timeout_ns

    def _poll_busily(self, started_ns: int, timeout_ns: int) -> list[tuple[int, int]] | None:
        """Look for events without sleeping for a while; None if none came."""
        limit_ns = min(self._poll_ns, self.poll_max_ns)
        end_ns = started_ns + (limit_ns if timeout_ns < 0 else min(limit_ns, timeout_ns))
        wait, ask, now_ns = self._wait, self._handlers.ask, self._monotonic_ns
        while True:
            events = wait(0)
            if events:
                return events
            if ask() or self.notified:
                return events
            if now_ns() >= end_ns:
                return None

    def _adapt(self, blocked_ns: int) -> None:
        if blocked_ns <= self._poll_ns:
            return
        if blocked_ns > self.poll_max_ns:
            self._poll_ns = self._poll_ns // self.poll_shrink if self.poll_shrink else 0
        elif self._poll_ns < self.poll_max_ns:
            grown_ns = self._poll_ns * (self.poll_grow or 2) or POLL_FIRST_NS
            self._poll_ns = min(grown_ns, self.poll_max_ns)

    # -- engine, embedding, end ---------------------------------------------------------------------------------

    @property
    def engine(self) -> ContextEngine:
        """The context's file I/O engine, made at first use."""
        if self._engine is None:
            from bottomhalf.aio.io import ContextEngine

            self._engine = ContextEngine(self, self.host.engine())
        return self._engine

    def fileno(self) -> int:
        """A descriptor that is readable when poll(False) would find a ready handler; for a loop around this one.

        That loop keeps ``notify_me`` up except while it polls, and after raising it asks timeout_ns() how long
        it may sleep."""
        return self._poller.fileno()

    def failed(self, error: Exception, where: str) -> None:
        """An exception came out of a callback that the loop called."""
        if self.exception_handler is None:
            raise error
        self.exception_handler(self, error, where)

    def report(self, error: Exception, where: str) -> None:
        """The same, for somebody whom the exception must not interrupt: it goes out of the poll when all else is
        done. Home thread only."""
        try:
            self.failed(error, where)
        except Exception as raised:
            self._failures.append(raised)
            self.notify()

    def close(self) -> None:
        """Give everything back. AioError if a bottom half is still scheduled: its work would be lost. An exception
        that no poll has let out yet goes out of here at the end."""
        completions = self._engine.completions if self._engine is not None else None
        for half in self._queue:
            if half.scheduled and not half.deleted and half is not completions:
                raise AioError(f"{self.name} is closed while {half!r} waits to run")
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._handlers.clear()
        self._poller.close()
        self._event.close()
        self._state.remove_context(self)
        if self._failures:
            raise self._failures.popleft()

    def __repr__(self) -> str:
        return f"<AioContext {self.name}>"
