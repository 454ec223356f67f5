# SPDX-License-Identifier: Apache-2.0
"""AioContext: the loop of one thread.

One ``poll`` waits for readiness if there is nothing to do, then runs bottom halves, ready handlers, timers, in
this order. Facts that shape it:

* **Sleeping and waking.** Writing an eventfd costs a microsecond, scheduling a bottom half a twentieth. So a
  scheduler sets ``notified`` and writes only if ``notify_me`` says that the loop sleeps or is about to. The loop
  announces itself (``notify_me``), then looks at ``notified`` once more, sleeps, takes the announcement back,
  clears ``notified``, and only then looks at what there is to do: in any other order a wake-up can be lost.
* **Nesting.** A callback may poll. A poll takes everything that is scheduled into a slice of its own and first
  continues the slices of the polls around it, through the very same iterators: nothing runs twice, and what an
  inner poll waits for cannot hide in an outer batch. Readiness is level-triggered, so when an inner poll has
  dispatched, the outer one drops what is left of its list and sees it again next time.
* **Busy polling.** Waking a sleeping processor takes tens of microseconds. Before it sleeps, a context with
  ``poll_max_ns`` looks for events for a while that adapts itself: it grows while events come soon enough to be
  worth it and falls to nothing when they do not.

A loop tests its condition, never the result of ``poll``: a blocking poll may return for no visible reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine as AbstractCoroutine
from operator import length_hint
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bottomhalf.aio import coroutine as _coroutine
from bottomhalf.aio.bottom_half import BottomHalf
from bottomhalf.aio.coroutine import Coroutine, running
from bottomhalf.aio.errors import AioError, WrongContext
from bottomhalf.aio.timer import Timer, TimerList
from bottomhalf.host.protocol import ERR, HUP, IN, OUT, Host

if TYPE_CHECKING:
    from bottomhalf.aio.io import ContextEngine

Callback: TypeAlias = Callable[[], object]

IDLE_NS: Final = 10_000_000  # an idle bottom half runs at least this often (QEMU: 10 ms)
POLL_FIRST_NS: Final = 4_000  # the first step when busy polling grows (QEMU: 4 us)
POLL_MAX_NS: Final = 32_768  # what a context that serves requests should use (QEMU's iothreads)
LOOK_EVERY: Final = 8  # polls that have bottom halves to run look for readiness every so often


class _Handler:
    """What to call for one descriptor."""

    __slots__ = ("fd", "on_read", "on_write", "poll", "poll_ready")

    def __init__(
        self,
        fd: int,
        on_read: Callback | None,
        on_write: Callback | None,
        poll: Callable[[], bool] | None,
        poll_ready: Callback | None,
    ) -> None:
        self.fd = fd
        self.on_read = on_read
        self.on_write = on_write
        self.poll = poll
        self.poll_ready = poll_ready

    @property
    def mask(self) -> int:
        return (IN if self.on_read else 0) | (OUT if self.on_write else 0)


class AioContext:
    """An event loop with bottom halves, handlers, timers and coroutines. Its home is the thread that makes it.

    ``exception_handler(context, error, where)`` is called for an exception in a callback; with None it goes out
    of ``poll``, and no other callback is lost either way."""

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
        self.notified = False
        self.notify_me = 0
        self._home = host.thread_id()
        self._thread_id = host.thread_id
        self._monotonic_ns = host.monotonic_ns
        self._poller = host.poller()
        self._wait = self._poller.wait
        self._event = host.event()
        self.wake_up = self._event.set
        self._queue: list[BottomHalf] = []
        self._slices: deque[Any] = deque()
        self._handlers: dict[int, _Handler] = {}
        self._pollable: list[_Handler] = []
        self._polled: _Handler | None = None
        self._dispatches = 0
        self._poll_ns = 0
        self._looks = 0
        self._timers = {"realtime": TimerList(self, "realtime")}
        self._scheduled: deque[Coroutine] = deque()
        self._engine: ContextEngine | None = None
        self._shuffle = None if host.name == "linux" else host.shuffle
        self._schedule_bh = self.bottom_half(self._enter_scheduled, name="scheduled coroutines")
        self._poller.register(self._event.fileno(), IN)
        self._event_fd = self._event.fileno()
        if running.context is None:
            running.context = self

    # -- bottom halves ------------------------------------------------------------------------------------------

    def bottom_half(self, callback: Callback, name: str = "") -> BottomHalf:
        """A bottom half that calls ``callback()`` in this context. Callable from any thread."""
        return BottomHalf(self, self._queue.append, callback, name or _name_of(callback))

    def schedule_oneshot(self, callback: Callback) -> None:
        """Call ``callback()`` once in the next poll. Callable from any thread; cannot be taken back."""
        BottomHalf(self, self._queue.append, callback, "").schedule()

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
                if half.deleted:
                    continue
                if half.idle:
                    half.idle = False
                else:
                    progress = True
                try:
                    half.callback()
                except Exception as error:
                    self.failed(error, f"bottom half {half.name or _name_of(half.callback)!r}")
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
        """Call ``on_read()`` while ``fd`` is readable (or hung up), ``on_write()`` while it is writable.

        ``poll()`` is a cheap look, without a system call, whether there is work; while the context polls busily
        it is asked and ``poll_ready()`` does the work. Replaces an earlier handler of the descriptor; without any
        callback removes it. Callable from any thread."""
        old = self._handlers.get(fd)
        if poll is not None and poll_ready is None:
            raise AioError("a poll callback needs a poll_ready callback")
        if on_read is None and on_write is None and poll is None:
            if old is not None:
                del self._handlers[fd]
                self._forget_pollable(old)
                if old.mask:
                    self._poller.unregister(fd)
                self.notify()
            return
        new = _Handler(fd, on_read, on_write, poll, poll_ready)
        if old is None or not old.mask:
            if new.mask:
                self._poller.register(fd, new.mask)
            self._dispatches += 1  # a dispatch that is going on may know this number as another descriptor
        elif not new.mask:
            self._poller.unregister(fd)
        elif new.mask != old.mask:
            self._poller.modify(fd, new.mask)
        if old is not None:
            self._forget_pollable(old)
        self._handlers[fd] = new
        if poll is not None:
            self._pollable.append(new)
        self.notify()

    def _forget_pollable(self, handler: _Handler) -> None:
        if handler.poll is not None and handler in self._pollable:
            self._pollable.remove(handler)

    def _dispatch(self, events: list[tuple[int, int]]) -> bool:
        handlers = self._handlers
        self._dispatches += 1
        mine = self._dispatches
        progress = False
        for fd, mask in events:
            handler = handlers.get(fd)
            if handler is None:
                if fd == self._event_fd:
                    self._event.clear()
                continue
            progress = True
            on_read, on_write = handler.on_read, handler.on_write
            try:
                if on_read is not None:
                    if mask & (IN | HUP | ERR):
                        on_read()
                elif on_write is not None and mask & (HUP | ERR):
                    mask |= OUT
                if on_write is not None and mask & OUT and handlers.get(fd) is handler:
                    on_write()
            except Exception as error:
                self.failed(error, f"handler of descriptor {fd}")
            if self._dispatches != mine:
                break
        return progress

    def _dispatch_polled(self, handler: _Handler) -> None:
        """Serve what busy polling found; not to be polled again by a poll inside it."""
        self._pollable.remove(handler)
        try:
            assert handler.poll_ready is not None
            handler.poll_ready()
        except Exception as error:
            self.failed(error, f"poll handler of descriptor {handler.fd}")
        finally:
            if self._handlers.get(handler.fd) is handler:
                self._pollable.append(handler)

    # -- clocks and timers --------------------------------------------------------------------------------------

    def now_ns(self, clock: str = "realtime") -> int:
        """The clock's time: "realtime" is monotonic (QEMU's name for it), "host" is the wall clock."""
        if clock == "realtime":
            return self._monotonic_ns()
        return self._timer_list(clock).now_ns()

    def timer(self, callback: Callback, clock: str = "realtime", name: str = "") -> Timer:
        """A timer that calls ``callback()`` in this context."""
        return Timer(self._timer_list(clock), callback, name or _name_of(callback))

    def _timer_list(self, clock: str) -> TimerList:
        timers = self._timers.get(clock)
        if timers is None:
            timers = self._timers[clock] = TimerList(self, clock)
        return timers

    # -- coroutines ---------------------------------------------------------------------------------------------

    def enter(self, coroutine: Coroutine | AbstractCoroutine[Any, Any, Any]) -> Coroutine:
        """Start a coroutine, or continue a suspended one, in this context.

        In the home thread it runs now, up to its first suspension; from inside another coroutine, when that one
        suspends; from another thread, in the next poll. An exception in it goes to whoever awaits it, else out
        of this call (or to the exception handler when the loop entered it)."""
        if not isinstance(coroutine, Coroutine):
            coroutine = Coroutine(coroutine, self)
        if self._thread_id() != self._home or coroutine.context is not self:
            self.schedule(coroutine)
        else:
            _coroutine.enter(coroutine)
        return coroutine

    def wake(self, coroutine: Coroutine) -> None:
        """Continue a coroutine in its own context; enter() for one that was started. From any thread."""
        coroutine.context.enter(coroutine)

    def schedule(self, coroutine: Coroutine | AbstractCoroutine[Any, Any, Any]) -> Coroutine:
        """Enter the coroutine in the next poll of this context, first come first served. From any thread."""
        if not isinstance(coroutine, Coroutine):
            coroutine = Coroutine(coroutine, self)
        if coroutine.queued:
            raise AioError(f"{coroutine!r} was scheduled twice, first by {coroutine.queued}")
        coroutine.queued = f"AioContext.schedule in {self.name}"
        coroutine.context = self
        self._scheduled.append(coroutine)
        self._schedule_bh.schedule()
        return coroutine

    def _enter_scheduled(self) -> None:
        scheduled = self._scheduled
        for _ in range(len(scheduled)):
            coroutine = scheduled.popleft()
            coroutine.queued = None
            try:
                _coroutine.enter(coroutine)
            except Exception as error:
                if scheduled:
                    self._schedule_bh.schedule()
                self.failed(error, f"coroutine {coroutine.name}")

    def run(self, body: AbstractCoroutine[Any, Any, Any], what: str = "") -> Any:
        """Run a coroutine from plain code until it ends; what it returns or raises. Home thread only."""
        from bottomhalf.aio.wait import wait_while

        async def guarded() -> tuple[Any, Exception | None]:
            try:
                return await body, None
            except Exception as error:
                return None, error

        coroutine = self.enter(guarded())
        wait_while(self, lambda: not coroutine.done, what or getattr(body, "__qualname__", "a coroutine"))
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
        """Something idle was scheduled: from outside the loop it has to learn that it may not sleep for long."""
        if self._thread_id() != self._home:
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
        if running.coroutine is not None:
            raise WrongContext(
                f"coroutine {running.coroutine.name} polls {self.name}: nothing that it wakes could run; await instead"
            )
        events = self._wait_for_work() if blocking else self._wait(0)
        self.notified = False
        progress = bool(self._queue or self._slices) and self._run_bottom_halves()
        if events and self._dispatch(events):
            progress = True
        if self._polled is not None:
            polled, self._polled = self._polled, None
            self._dispatch_polled(polled)
            progress = True
        for timers in self._timers.values():
            if timers.heap and timers.run():
                progress = True
        return progress

    def _wait_for_work(self) -> list[tuple[int, int]]:
        timeout_ns = self.timeout_ns()
        if timeout_ns == 0:
            self._looks += 1
            return self._wait(0) if self._looks % LOOK_EVERY == 0 or not self._queue else []
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
            events = self._wait(0 if self.notified else timeout_ns)
        finally:
            self.notify_me -= 1
        if started_ns:
            self._adapt(self._monotonic_ns() - started_ns)
        return events

    def timeout_ns(self) -> int:
        """How long a poll may sleep: 0 not at all, -1 without end."""
        for left in self._slices:
            if length_hint(left):
                return 0
        timeout_ns = -1
        for half in self._queue:
            if half.scheduled and not half.deleted:
                if not half.idle:
                    return 0
                timeout_ns = IDLE_NS
        for timers in self._timers.values():
            deadline_ns = timers.deadline_ns() if timers.heap else -1
            if deadline_ns >= 0:
                left_ns = max(deadline_ns - timers.now_ns(), 0)
                timeout_ns = left_ns if timeout_ns < 0 else min(timeout_ns, left_ns)
        return timeout_ns

    def _poll_busily(self, started_ns: int, timeout_ns: int) -> list[tuple[int, int]] | None:
        """Look for events without sleeping for a while; None if none came."""
        limit_ns = self._poll_ns if timeout_ns < 0 else min(self._poll_ns, timeout_ns)
        end_ns = started_ns + limit_ns
        wait, now_ns, pollable = self._wait, self._monotonic_ns, self._pollable
        while True:
            events = wait(0)
            if events:
                return events
            for handler in pollable:
                if handler.poll is not None and handler.poll():
                    self._polled = handler
                    return events
            if self.notified:
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
        """A descriptor that is readable when poll(False) would find a ready handler; for a loop around this one,
        which also has to hold ``notify_me`` up while it sleeps."""
        return self._poller.fileno()

    def failed(self, error: Exception, where: str) -> None:
        """An exception came out of a callback."""
        if self.exception_handler is None:
            raise error
        self.exception_handler(self, error, where)

    def close(self) -> None:
        """Give everything back. AioError if a bottom half is still scheduled: its work would be lost."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        lost = [half for half in self._queue if half.scheduled and not half.deleted]
        if lost:
            raise AioError(f"{self.name} is closed while {lost[0]!r} waits to run")
        self._poller.close()
        self._event.close()
        if running.context is self:
            running.context = None

    def __repr__(self) -> str:
        return f"<AioContext {self.name}>"


def _name_of(callback: Any) -> str:
    return getattr(callback, "__qualname__", None) or repr(callback)
