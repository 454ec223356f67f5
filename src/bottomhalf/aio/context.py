# SPDX-License-Identifier: Apache-2.0
"""AioContext: the loop of one thread.

One ``poll`` waits for readiness if there is nothing to do, then runs bottom halves, ready handlers, timers, in
this order. Facts that shape it:

* **Sleeping and waking.** Writing an eventfd costs a microsecond, scheduling a bottom half a tenth. So a
  scheduler puts it into the list and writes only if ``notify_me`` says that the loop sleeps or is about to. The loop
  announces itself (``notify_me``), then looks at the lists once more, sleeps, takes the announcement back, and only
  then looks at what there is to do: in any other order a wake-up can be lost. Who finds the announcement takes it
  down and writes; those behind him need not. ``notified`` stands for what is in no list.
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
from operator import length_hint
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bottomhalf.aio.bottom_half import BottomHalf, ReentrancyGuard
from bottomhalf.aio.clock import CLOCKS, Clocks, clocks_of
from bottomhalf.aio.coroutine import Coroutine
from bottomhalf.aio.entering import Entering
from bottomhalf.aio.errors import AioError, WrongContext
from bottomhalf.aio.explain import explain
from bottomhalf.aio.handlers import Handler, Handlers
from bottomhalf.aio.statistics import ContextStatistics
from bottomhalf.aio.thread import own
from bottomhalf.aio.timer import Timer, TimerList
from bottomhalf.host.protocol import IN, Host
from bottomhalf.host.threads import Lock

if TYPE_CHECKING:
    from bottomhalf.aio.instrument import Instrument
    from bottomhalf.aio.io import ContextEngine
    from bottomhalf.aio.thread_pool import ThreadPool

Callback: TypeAlias = Callable[[], object]

IDLE_NS: Final = 10_000_000  # an idle bottom half runs at least this often (QEMU: 10 ms)
POLL_FIRST_NS: Final = 4_000  # the first step when busy polling grows (QEMU: 4 us)
POLL_MAX_NS: Final = 32_768  # what a context that serves requests should use (QEMU's iothreads)
POLL_PARAM_MAX: Final = 2**63 - 1  # what QEMU's options take
_making_timers: Final = Lock()

LOOK_EVERY: Final = 8  # polls that have bottom halves to run look for readiness every so often


class AioContext(Entering):
    """An event loop with bottom halves, handlers, timers and coroutines. Its home is the thread that makes it.

    ``poller`` names the monitor of descriptors (epoll, poll, io_uring; auto for what is fastest here).
    ``exception_handler(context, error, where)`` is called for an exception in a callback; with None it goes out
    of ``poll``, and no other callback is lost either way."""

    # Slots, because an object with more than thirty attributes in a dictionary is slower to look at.
    __slots__ = (
        "__weakref__",
        "_at_home",
        "_engines",
        "_event",
        "_failures",
        "_halves_run",
        "_handlers",
        "_idle_coroutines",
        "_instruments",
        "_looks",
        "_monotonic_ns",
        "_poll_ns",
        "_poller",
        "_polls",
        "_queue",
        "_scheduled",
        "_scheduled_slices",
        "_shuffle",
        "_slices",
        "_state",
        "_thread_pool",
        "_timer_lists",
        "_timers",
        "_wait",
        "append_half",
        "append_scheduled",
        "clocks",
        "closed",
        "embedded",
        "ended_coroutines",
        "engine_kind",
        "exception_handler",
        "host",
        "idle_halves",
        "is_main",
        "name",
        "notified",
        "notify_me",
        "poll_grow",
        "poll_max_ns",
        "poll_shrink",
    )

    def __init__(
        self, host: Host | None = None, name: str = "main", *, is_main: bool = True, poller: str = "auto"
    ) -> None:
        if host is None:
            from bottomhalf.host.linux import LinuxHost

            host = LinuxHost()
        self.host: Host = host
        self.name = name
        self.is_main = is_main
        self.closed = False
        self.exception_handler: Callable[[AioContext, Exception, str], object] | None = None
        self.poll_max_ns = 0
        self.poll_grow = 2
        self.poll_shrink = 0
        self.notified = False  # something happened since the loop last looked, beside what stands in the lists
        self.notify_me = False  # somebody sleeps, or is about to, and has to be woken by the event
        self.embedded = False  # an outer loop sleeps for this context
        self._at_home = host.thread_check()
        self._state = own.state
        self._monotonic_ns = host.monotonic_ns
        self._poller = host.poller(poller)
        self._wait = self._poller.wait
        self._event = host.event()
        self._poller.register(self._event.fileno(), IN)
        self._handlers = Handlers(self, self._poller, self._event)
        # Bottom halves, and scheduled coroutines: the list that others append to, and the batches being run.
        self._queue: list[BottomHalf] = []
        self.append_half = self._queue.append
        self._slices: deque[Any] = deque()
        self.idle_halves: deque[BottomHalf] = deque()
        self._scheduled: list[Coroutine] = []
        self.append_scheduled = self._scheduled.append
        self._scheduled_slices: deque[Any] = deque()
        self._idle_coroutines: list[Coroutine] = []  # ready to be used again
        self.ended_coroutines: list[Coroutine] = []  # that may be, once nobody holds them
        self._poll_ns = 0  # how long it is worth while to poll busily for descriptors
        self._looks = 0
        self._polls = 0
        self._halves_run = 0
        self.clocks: Clocks = clocks_of(host)
        self._timer_lists: dict[str, TimerList] = {}
        self._timers: tuple[TimerList, ...] = ()
        self._failures: deque[Exception] = deque()
        self._engines: dict[str, ContextEngine] = {}  # by kind
        self.engine_kind = "auto"
        self._thread_pool: ThreadPool | None = None
        self._shuffle = None if host.name == "linux" else host.shuffle
        self._instruments: tuple[Instrument, ...] = ()
        if host.explain is None:
            host.explain = explain
        self._state.add_context(self)

    # -- bottom halves ------------------------------------------------------------------------------------------

    def bottom_half(self, callback: Callback, name: str = "", guard: ReentrancyGuard | None = None) -> BottomHalf:
        """A bottom half that calls ``callback()`` in this context. Callable from any thread.

        Halves with the same ``guard`` tell when they run inside each other."""
        return BottomHalf(self, callback if guard is None else guard.around(callback), name)

    def schedule_oneshot(self, callback: Callback) -> None:
        """Call ``callback()`` once in the next poll. Callable from any thread; cannot be taken back."""
        half = BottomHalf(self, callback, "")
        half.queued = True
        self.append_half(half)
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
            self._halves_run += count
        progress = False
        while slices:
            batch_left = slices[0]
            for half in batch_left:
                half.queued = False
                if half.cancelled:
                    continue
                progress = True
                callback = half.callback
                try:
                    callback()
                except Exception as error:
                    self.failed(error, f"bottom half {half.name!r}")
            if slices and slices[0] is batch_left:
                slices.popleft()
        return progress

    def _run_idle_halves(self) -> None:
        """Those that an ordinary schedule() has overtaken are left to it."""
        halves = self.idle_halves
        for _ in range(len(halves)):
            if not halves:
                break  # a poll inside one of them has run the rest
            half = halves.popleft()
            if half.idle:
                half.idle = False
                if not half.scheduled:
                    try:
                        half.callback()
                    except Exception as error:
                        self.failed(error, f"bottom half {half.name!r}")

    # -- handlers -----------------------------------------------------------------------------------------------

    def set_fd_handler(
        self,
        fd: int,
        on_read: Callback | None = None,
        on_write: Callback | None = None,
        poll: Callable[[], bool] | None = None,
        poll_ready: Callback | None = None,
        poll_begin: Callback | None = None,
        poll_end: Callback | None = None,
    ) -> None:
        """Call ``on_read()`` while ``fd`` is readable (or hung up), ``on_write()`` while it is writable, both
        after an error.

        ``poll()`` is a cheap look, without a system call, whether there is work; while the context polls busily
        (never with ``poll_max_ns`` 0) it is asked and ``poll_ready()`` does the work. ``poll_begin()`` and
        ``poll_end()``, always in pairs, are called around such times: in between the descriptor need not fire.
        Replaces an earlier handler of the descriptor; without any callback removes it, which has to happen before
        the descriptor is closed. Callable from any thread."""
        handler = Handler(fd, on_read, on_write, poll, poll_ready, poll_begin, poll_end)
        self._handlers.set(fd, handler if handler.mask or poll is not None else None)
        self.notify()

    # -- clocks and timers --------------------------------------------------------------------------------------

    def now_ns(self, clock: str = "realtime") -> int:
        """The clock's time: "realtime" is monotonic (QEMU's name for it), "host" is the wall clock, "virtual" and
        "virtual_rt" stand while a machine is stopped."""
        if clock == "realtime":
            return self._monotonic_ns()
        return self.clocks[clock].now_ns()

    def timer(self, callback: Callback, clock: str = "realtime", name: str = "") -> Timer:
        """A timer that calls ``callback()`` in this context. Callable from any thread."""
        timers = self._timer_lists.get(clock)
        if timers is None:
            with _making_timers:
                timers = self._timer_lists.setdefault(clock, TimerList(self, self.clocks[clock]))
                self._timers = tuple(self._timer_lists[name] for name in CLOCKS if name in self._timer_lists)
        return Timer(timers, callback, name)

    # -- waking -------------------------------------------------------------------------------------------------

    def wake_up(self) -> None:
        """Somebody has found ``notify_me``: end the sleep."""
        self.notify_me = False  # those who come before the sleeper is up need not write as well
        self._event.set()

    def take_event(self) -> None:
        """The event was ready: what it stood for is in the lists. An outer loop that sleeps again needs another."""
        self._event.clear()
        if self.embedded:
            self.notify_me = True
            if self._queue or self._scheduled or self.notified:
                self.wake_up()

    def notify(self) -> None:
        """Make the loop look again at what there is to do. From any thread and from signal handlers."""
        self.notified = True
        if self.notify_me:
            self.wake_up()

    # -- polling ------------------------------------------------------------------------------------------------

    @property
    def is_home(self) -> bool:
        """Whether this is the context's own thread."""
        return self._at_home()

    def adopt(self) -> None:
        """Make the calling thread the context's home. AioError while another thread polls it, or sleeps in it; what
        belongs to threads, as requests to worker threads do, must not be outstanding."""
        if self.notify_me or self.embedded or self._slices or self._scheduled_slices:
            raise AioError(f"{self.name} is being polled and cannot get another home")
        self._state.remove_context(self)
        self._at_home = self.host.thread_check()
        self._state = own.state
        self._state.add_context(self)

    def poll(self, blocking: bool) -> bool:
        """One iteration; whether there was progress (notifications and idle bottom halves are none).

        Home thread only, never inside a coroutine. A blocking poll returns after something happened, which may
        be only a notification."""
        at_home = self._at_home
        if not at_home():
            raise WrongContext(f"{self.name} is polled by a thread that is not its home")
        state = self._state
        if state.coroutine is not None:
            raise WrongContext(
                f"coroutine {state.coroutine.name} polls {self.name}: nothing that it wakes could run; "
                "await instead"
            )
        if state.depth:
            return self._poll_in_section(blocking)
        handlers = self._handlers
        self._polls += 1
        if blocking:
            events = self._wait_for_work()
        else:
            if handlers.started:
                handlers.stop()
            wait = self._wait
            events = wait(0)
        self.notified = False
        progress = False
        if self.idle_halves:
            self._run_idle_halves()
        if self._queue or self._slices:
            progress = self._run_bottom_halves()
        if self._scheduled or self._scheduled_slices:
            progress = True
            self._run_scheduled()
        if events and handlers.dispatch(events):
            progress = True
        if handlers.found and handlers.serve_found():
            progress = True
        for timers in self._timers:
            if (timers.heap or timers.inbox or timers.due) and timers.run():
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
        queue, scheduled = self._queue, self._scheduled
        if self.poll_max_ns and not (queue or scheduled):
            # A busy loop finds something at the first look, and need not work out how long it might look.
            events = self._wait(0)
            if events:
                if self._handlers.noticed(events, 1) and not self._poll_ns:
                    self._poll_ns = self.adapted_ns(0, 1)
                self._handlers.ask()  # what it finds is served in the same turn
                return events
        timeout_ns = 0 if queue or scheduled else self.timeout_ns()
        if timeout_ns == 0:
            # Something that never ends has to leave the descriptors their turn, though not every time.
            self._looks += 1
            return self._wait(0) if self._looks % LOOK_EVERY == 0 or not (queue or scheduled) else []
        handlers, wait = self._handlers, self._wait
        started_ns = 0
        if self.poll_max_ns:
            started_ns = self._monotonic_ns()
            limit_ns = min(max(self._poll_ns, handlers.poll_ns_max()), self.poll_max_ns)
            if limit_ns:
                found = self._poll_busily(started_ns, limit_ns if timeout_ns < 0 else min(limit_ns, timeout_ns))
                if found is not None:
                    if found:
                        handlers.noticed(found, 0)
                    return found
                if timeout_ns > 0:
                    timeout_ns = max(timeout_ns - (self._monotonic_ns() - started_ns), 0)
        if handlers.started:
            handlers.stop()
            if handlers.found:
                timeout_ns = 0
        self.notify_me = True
        try:
            # What was scheduled from elsewhere before the announcement may not have woken anybody.
            if self.notified or queue or scheduled:
                timeout_ns = 0
            elif self.idle_halves and not 0 <= timeout_ns <= IDLE_NS:
                timeout_ns = IDLE_NS  # a signal handler has scheduled something idle
            events = wait(timeout_ns)
        finally:
            self.notify_me = self.embedded
        if started_ns:
            blocked_ns = self._monotonic_ns() - started_ns
            if handlers.noticed(events, blocked_ns) or (not events and blocked_ns > self.poll_max_ns):
                self._poll_ns = self.adapted_ns(self._poll_ns, blocked_ns)
        return events

    def timeout_ns(self) -> int:
        """How long a poll may sleep: 0 not at all, -1 without end."""
        if self._queue or self._scheduled or self._failures or self._handlers.found:
            return 0
        if self._slices or self._scheduled_slices:
            for left in (*self._slices, *self._scheduled_slices):
                if length_hint(left):
                    return 0
        timeout_ns = IDLE_NS if self.idle_halves else -1
        for timers in self._timers:
            deadline_ns = timers.deadline_ns() if timers.heap or timers.inbox or timers.due else -1
            if deadline_ns >= 0:
                left_ns = max(deadline_ns - timers.now_ns(), 0)
                timeout_ns = left_ns if timeout_ns < 0 else min(timeout_ns, left_ns)
        return timeout_ns

    # -- busy polling -------------------------------------------------------------------------------------------

    def set_poll_params(self, max_ns: int, grow: int = 0, shrink: int = 0) -> None:
        """Poll busily for up to ``max_ns`` (0: not at all) before sleeping. The time grows by the factor ``grow`` (0:
        two) and shrinks by ``shrink`` (0: to nothing at once). What was learnt is forgotten. From any thread, at any
        time. AioError for what makes no sense."""
        for name, value in (("max-ns", max_ns), ("grow", grow), ("shrink", shrink)):
            if not 0 <= value <= POLL_PARAM_MAX:
                raise AioError(f"poll-{name} of {self.name} is {value}, not between 0 and {POLL_PARAM_MAX}")
        self.poll_max_ns, self.poll_grow, self.poll_shrink = max_ns, grow, shrink
        self._poll_ns = 0
        self._handlers.forget_times()
        self.notify()

    def _poll_busily(self, started_ns: int, limit_ns: int) -> list[tuple[int, int]] | None:
        """Look for events without sleeping for a while; None if none came."""
        end_ns = started_ns + limit_ns
        handlers = self._handlers
        wait, ask, now_ns = self._wait, handlers.ask, self._monotonic_ns
        queue, scheduled = self._queue, self._scheduled
        if handlers.asked:
            handlers.start(started_ns)
        while True:
            events = wait(0)
            if ask() or events or self.notified or queue or scheduled:  # both at once, if both are there
                return events
            if now_ns() >= end_ns:
                return None

    def adapted_ns(self, poll_ns: int, blocked_ns: int) -> int:
        """How long to poll busily next time, after ``poll_ns`` and a wait of ``blocked_ns`` altogether."""
        if blocked_ns <= poll_ns or blocked_ns == self.poll_max_ns:
            return poll_ns
        if blocked_ns > self.poll_max_ns:
            return poll_ns // self.poll_shrink if self.poll_shrink else 0
        return min(poll_ns * (self.poll_grow or 2) or POLL_FIRST_NS, self.poll_max_ns)

    # -- engine, thread pool, embedding, end --------------------------------------------------------------------

    @property
    def engine(self) -> ContextEngine:
        """The context's file I/O engine, made at first use: of the kind that ``engine_kind`` names (see
        host.protocol.Host.engine). OSError if that is not to be had here."""
        return self.engine_of("auto")

    def engine_of(self, kind: str) -> ContextEngine:
        """The context's engine of a kind, for files that insist on one: "io_uring", "linux-aio", "threads", or "auto"
        for ``engine``. Made at first use. OSError if that kind is not to be had here. Home thread, or drained."""
        if kind == "auto":
            kind = self.engine_kind
        found = self._engines.get(kind)
        if found is None:
            from bottomhalf.aio.io import ContextEngine

            found = self._engines[kind] = ContextEngine(self, self.host.engine(kind))
        return found

    @property
    def thread_pool(self) -> ThreadPool:
        """The context's worker threads, made at first use."""
        if self._thread_pool is None:
            from bottomhalf.aio.thread_pool import ThreadPool

            self._thread_pool = ThreadPool(self)
        return self._thread_pool

    def fileno(self) -> int:
        """A descriptor that is readable when poll(False) would find a ready handler; for a loop around this one.

        That loop calls embed() before it sleeps, then asks timeout_ns() how long it may, and calls release() before it
        polls this context, or does so no more."""
        return self._poller.fileno()

    def embed(self) -> None:
        """An outer loop is about to sleep for this context: whoever schedules from now on wakes it. Home thread."""
        self.embedded = self.notify_me = True

    def release(self) -> None:
        """The outer loop is awake. Home thread."""
        self.embedded = self.notify_me = False

    def statistics(self) -> ContextStatistics:
        """What it is doing, in figures. From any thread."""
        engines, pool = dict(self._engines), self._thread_pool
        engine = engines.pop(self.engine_kind, None)
        return ContextStatistics(
            name=self.name,
            poller=self._poller.name,
            sleeping=self.notify_me or self.embedded,
            polls=self._polls,
            bottom_halves_run=self._halves_run,
            bottom_halves_queued=len(self._queue) + sum(length_hint(left) for left in tuple(self._slices)),
            idle_bottom_halves=len(self.idle_halves),
            coroutines_queued=len(self._scheduled) + sum(length_hint(left) for left in tuple(self._scheduled_slices)),
            coroutines_kept=len(self._idle_coroutines),
            handlers=len(self._handlers),
            handlers_asked=len(self._handlers.asked),
            timers={timers.clock.name: timers.armed for timers in self._timers},
            poll_ns=min(max(self._poll_ns, self._handlers.poll_ns_max()), self.poll_max_ns),
            poll_max_ns=self.poll_max_ns,
            engine=engine.statistics() if engine is not None else None,
            engines=tuple(each.statistics() for each in engines.values()),
            thread_pool=pool.statistics() if pool is not None else None,
        )

    def add_instrument(self, instrument: Instrument) -> None:
        """Have an observer told what the context does. Home thread only, best not inside a callback."""
        from bottomhalf.aio import instrument as instruments

        instruments.add(self, instrument)

    def remove_instrument(self, instrument: Instrument) -> None:
        """Take an observer away; nothing happens if it is not there. Home thread only."""
        from bottomhalf.aio import instrument as instruments

        instruments.remove(self, instrument)

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
        """Give everything back. AioError if a bottom half is still scheduled, or a worker thread busy: their work would
        be lost. An exception that no poll has let out yet goes out of here at the end."""
        own = [engine.completions for engine in self._engines.values()]
        if self._thread_pool is not None:
            own.append(self._thread_pool.completions)
        for half in (*self._queue, *self.idle_halves):
            if half.scheduled and half not in own:
                raise AioError(f"{self.name} is closed while {half!r} waits to run")
        if self._thread_pool is not None:
            self._thread_pool.close()
            self._thread_pool = None
        while self._engines:
            self._engines.popitem()[1].close()
        self.closed = True
        self._idle_coroutines.clear()
        self.ended_coroutines.clear()
        self._handlers.clear()
        self._poller.close()
        self._event.close()
        self._state.remove_context(self)
        if self._failures:
            raise self._failures.popleft()

    def __repr__(self) -> str:
        return f"<AioContext {self.name}>"
