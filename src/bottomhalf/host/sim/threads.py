# SPDX-License-Identifier: Apache-2.0
"""Threads of the simulated host: real ones, of which one at a time runs, and the seed says which.

A race shows when one thread is stopped between two steps of another. A real scheduler stops threads where it likes and
never twice the same way. Here a thread gives up its turn only inside calls of the host: always where it has to wait,
and elsewhere (an event set, a look at the clock, ...) as often as ``Odds.switch`` says. Who goes on is drawn from the
seed. So a run with threads is as repeatable as one without, and thousands of them try thousands of interleavings.

    thread = host.start_thread(work, "worker")
    host.preempt()        # tests: a place of their own where others may run
    thread.join()

They are threads of the operating system, for a Python function cannot be suspended otherwise and ``threading.local``
means what it means; each waits for its baton, and whoever gives up his turn hands the baton on. Time moves when
nobody can run. When nothing will ever let anybody run, that is a ``Deadlock``, raised in the main thread, and the
other threads end: nobody is left to wait for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from bottomhalf.host.sim.world import Deadlock, World

MAIN: Final = 1  # the number of the thread that made the host
LOOK_SWITCH: Final = 0.5  # how often a look without waiting that found nothing lets others run


class _Ended(BaseException):
    """Raised in a thread that will never get its turn again."""


class SimThread:
    """A host.protocol.Thread."""

    def __init__(self, threads: Threads, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.ended = False
        self.ready: Callable[[], object] | None = None  # what it waits for, None: it can run
        self.deadline_ns: int | None = None
        self.what = ""
        self.baton = threading.Semaphore(0)
        self.error: BaseException | None = None  # to be raised when it gets its turn
        self.seen_number = number  # host.as_thread() of its own
        self._threads = threads

    def join(self) -> None:
        """Wait until it has ended."""
        self._threads.block(lambda: self.ended, None, f"the end of thread {self.name}")

    def can_run(self, now_ns: int) -> bool:
        if self.ended:
            return False
        if self.ready is None or self.error is not None:
            return True
        return (self.deadline_ns is not None and self.deadline_ns <= now_ns) or bool(self.ready())

    def __repr__(self) -> str:
        state = "has ended" if self.ended else f"waits for {self.what}" if self.ready is not None else "can run"
        return f"thread {self.name} {state}"


class Threads:
    """The threads of one world, and the baton."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._chance = world.chance("threads")
        main = SimThread(self, MAIN, "main")
        self._threads = [main]
        self._current = self._ending_by = main
        self._numbers = MAIN
        self._ending = False  # one thread ends the others
        self.many = False  # more than the main thread: the calls of the host are switching points

    def start(self, target: Callable[[], None], name: str) -> SimThread:
        """A new thread, which runs when it gets its turn."""
        self._numbers += 1
        thread = SimThread(self, self._numbers, name)
        self._threads.append(thread)
        self.many = True

        def run() -> None:
            thread.baton.acquire()
            try:
                self._resume(thread)
                target()
            except _Ended:
                pass
            except BaseException as error:
                told = (type(error), error, error.__traceback__, threading.current_thread())
                threading.excepthook(threading.ExceptHookArgs(told))
            self._end(thread)

        threading.Thread(target=run, name=name, daemon=True).start()
        self._world.note("thread", thread.number, name)
        self.preempt()
        return thread

    def preempt(self) -> None:
        """Perhaps let another thread run. The calls of the host say so when there are several."""
        if self.many and self._may_switch() and self._chance.random() < self._world.odds.switch:
            self._let_others_run()

    def looked_in_vain(self) -> None:
        """The program looks without waiting: perhaps for what another thread does."""
        if self.many and self._may_switch() and self._chance.random() < LOOK_SWITCH:
            self._let_others_run()

    def block(self, ready: Callable[[], object], deadline_ns: int | None, what: str) -> bool:
        """The running thread cannot go on before ``ready()``; whether it was, or the deadline passed before. Deadlock
        if nothing can ever make it so."""
        world, me = self._world, self._current
        assert not world.acting, "what happens by itself does not wait"
        if me.error is not None:
            raise me.error
        me.ready, me.deadline_ns, me.what = ready, deadline_ns, what
        try:
            while True:
                world.run_due()
                if ready():
                    return True
                if deadline_ns is not None and world.now_ns >= deadline_ns:
                    return False
                self._give_turn(me)
        finally:
            me.ready, me.deadline_ns = None, None

    def explain(self) -> str:
        """Every thread, for the message of a deadlock."""
        return ", ".join(map(repr, self._threads)) if self.many else ""

    def end_all(self) -> None:
        """The program is gone, or stuck for ever: every other thread ends where it stands."""
        me = self._ending_by = self._current
        self._ending = True
        for thread in self._threads:
            if thread is not me and not thread.ended:
                thread.error = _Ended()
                self._switch(me, thread)
        self._threads = [me]
        self.many = self._ending = False

    # -- the baton ----------------------------------------------------------------------------------------------

    def _may_switch(self) -> bool:
        return not (self._world.acting or self._ending)

    def _let_others_run(self) -> None:
        others = self._runnable(besides=self._current)
        if others:
            self._switch(self._current, self._chance.choice(others))

    def _runnable(self, besides: SimThread | None) -> list[SimThread]:
        now_ns = self._world.now_ns
        return [thread for thread in self._threads if thread is not besides and thread.can_run(now_ns)]

    def _give_turn(self, me: SimThread) -> None:
        """Let somebody run who can; let time pass until there is one. Back when this thread has its turn again."""
        world = self._world
        while True:
            runnable = self._runnable(besides=me)
            if runnable:
                self._switch(me, self._chance.choice(runnable))
                return
            times = [thread.deadline_ns for thread in self._threads if thread.deadline_ns is not None]
            next_ns = world.next_time_ns()
            times += [next_ns] if next_ns is not None else []
            if not times:
                self._stuck(me)
                return
            world.now_ns = max(world.now_ns, min(times))
            world.run_due()
            if not me.ended and me.can_run(world.now_ns):
                return

    def _stuck(self, me: SimThread) -> None:
        world = self._world
        deadlock = Deadlock(world.explained("nothing can let any thread run, and nothing is going to happen"))
        main = self._threads[0]
        if me is main:
            self.end_all()
            raise deadlock
        main.error = deadlock
        self._switch(me, main)

    def _switch(self, me: SimThread, other: SimThread) -> None:
        """Hand the baton to another thread; back when this one gets it again."""
        me.seen_number = self._world.thread_id
        self._current = other
        self._world.note("switch", other.number)
        other.baton.release()
        if me.ended:
            return
        me.baton.acquire()
        self._resume(me)

    def _resume(self, me: SimThread) -> None:
        self._current = me
        self._world.thread_id = me.seen_number
        if me.error is not None:
            error, me.error = me.error, None
            if isinstance(error, _Ended):
                me.error = error  # and again, should it catch this and go on
            elif me.number == MAIN:
                self.end_all()
            raise error

    def _end(self, thread: SimThread) -> None:
        """It has returned or raised; somebody else goes on."""
        thread.ended = True
        thread.ready = thread.deadline_ns = None
        if thread.error is not None:  # end_all() waits for it
            self._ending_by.baton.release()
            return
        self._threads.remove(thread)
        self._world.note("thread ended", thread.number)
        self.many = len(self._threads) > 1
        self._give_turn(thread)
