# SPDX-License-Identifier: Apache-2.0
"""A job: a coroutine that users can watch, pause, resume, cancel, complete and finalize by its id.

A smallest one::

    class Count(Job):
        type = JobType.CREATE
        async def run(self) -> None:
            self.progress.total = 10
            while self.progress.current < 10 and not self.is_cancelled:
                self.progress.current += 1
                await self.sleep_ns(1_000_000)

    job = Count(jobs, "count0")
    job.start()

Facts. The body runs in the context of the node that it works on, which may be an iothread and may change; users speak
to it from the main thread, and at any moment. What a job has done to its disks is only to count when it has ended well,
sometimes only together with others.

Consequences. Verbs never do anything to the body: they change what it looks at, and wake it if it sleeps. The body
looks at *pause points*, which are where it holds nothing that others wait for: ``pause_point()``, ``sleep_ns()``,
``wait()``. When the body has ended, a bottom half of the main context takes over, and what follows (``transaction``) is
plain code there: prepare, then commit or abort, then clean.

Pausing is a count, because several may want it: the user (once), and every drained section above its nodes. A
cancelled job does not pause any more. ``busy`` says that the body is between two pause points: a drained section waits
until it is not. A job that has ended is not busy, even while its last steps, which may drain, are going on.

The lock of all jobs protects the counts and flags that both threads change; it is held for a few lines and never while
something is called that could wait.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar

from bottomhalf.aio import AioContext, Coroutine, current, kick, move_to, suspend
from bottomhalf.aio.coroutine import Waitable
from bottomhalf.block.errors import BlockError
from bottomhalf.jobs.states import HAS_ENDED, RUNS, TRANSITIONS, VERBS
from bottomhalf.qapi.jobs import JobInfo, JobStatus, JobType, JobVerb

if TYPE_CHECKING:
    from bottomhalf.jobs.registry import Jobs
    from bottomhalf.jobs.transaction import JobTransaction

CANCELLED = OSError(errno.ECANCELED, "Operation canceled")


class Progress:
    """How far a job is, in units of its own. ``total`` may grow while it runs."""

    __slots__ = ("current", "total")

    def __init__(self) -> None:
        self.current = 0
        self.total = 0

    def set_remaining(self, amount: int) -> None:
        """So much is left to do, as far as is known now."""
        self.total = self.current + amount


class _Resting(Waitable):
    """What the body of a job waits for at a pause point. Only the job itself wakes it, so it cannot be taken back."""

    __slots__ = ("_job", "_why")

    def __init__(self, job: Job, why: str) -> None:
        self._job = job
        self._why = why

    @property
    def what(self) -> str:
        if self._job.paused:
            return f"job '{self._job.name}' to be resumed (paused {self._job.pause_count} times)"
        return self._why


class Job:
    """``job_id`` None: an internal one, which no user sees. Main thread, but for what says otherwise."""

    type: ClassVar[JobType]

    def __init__(
        self,
        jobs: Jobs,
        job_id: str | None,
        *,
        context: AioContext | None = None,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        transaction: JobTransaction | None = None,
    ) -> None:
        """BlockError if the id will not do. The job is there from now on, paused; start() sets it off."""
        from bottomhalf.jobs.transaction import JobTransaction

        jobs.check_id(job_id)
        self.jobs = jobs
        self.id = job_id
        self.context = jobs.main if context is None else context
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.progress = Progress()
        self.status = JobStatus.UNDEFINED
        self.failure: Exception | None = None  # why it did not end well
        self.pause_count = 1  # until it is started
        self.paused = True
        self.user_paused = False
        self.busy = False
        self.cancelled = False  # it is to end, well or not
        self.force_cancelled = False  # it is to end without what it was to achieve
        self.has_left = False  # the body has ended and the main thread has taken over
        self.transaction: JobTransaction = transaction or JobTransaction()
        self._coroutine: Coroutine | None = None
        self._resting = False  # the body is suspended at a pause point
        self._woken = False  # somebody called enter() while it was not
        jobs.add(self)
        self._go(JobStatus.CREATED)
        self.transaction.add(self)

    # -- what a kind of job defines -----------------------------------------------------------------------------

    async def run(self) -> None:
        """The work, in ``context``. Raises OSError or BlockError if it fails."""
        raise NotImplementedError

    def prepare(self) -> None:
        """All jobs of the transaction have done their work: what may still fail is done now. May wait. OSError,
        BlockError."""

    def commit(self) -> None:
        """It has ended well, and so have the others of its transaction. May wait; must not fail."""

    def abort(self) -> None:
        """It has failed, or one of the others has. May wait; must not fail."""

    def clean(self) -> None:
        """After commit() or abort()."""

    def on_complete(self) -> None:
        """The user wants the last step. Must not wait. BlockError if there is none."""
        raise BlockError(f"The active block job '{self.name}' cannot be completed")

    def on_cancel(self, force: bool) -> bool:
        """The user wants it to end; whether that is to be without its result. Must not wait."""
        return True

    def on_pause(self) -> None:
        """The body is about to rest. In its context; must not wait."""

    def on_resume(self) -> None:
        """The body goes on. In its context; must not wait."""

    def on_user_resume(self) -> None:
        """The user has seen to what had stopped it."""

    def on_event(self, status: JobStatus) -> None:
        """It is ready, pending or about to be concluded: for those who have events of their own."""

    # -- for its body, in its context ---------------------------------------------------------------------------

    @property
    def is_cancelled(self) -> bool:
        """Whether to stop at once. From any thread."""
        return self.force_cancelled

    @property
    def should_pause(self) -> bool:
        """Whether somebody wants it to rest. From any thread."""
        return self.pause_count > 0

    async def pause_point(self) -> None:
        """Rest here while anybody wants that. Hold nothing that others could wait for."""
        if self.should_pause and not self.is_cancelled:
            self.on_pause()
            while await self._rest("its turn", pausing=True):
                pass
            self.on_resume()
        await self._follow()

    async def sleep_ns(self, duration_ns: int) -> None:
        """Rest for a time, or until woken; 0 lets others run. A pause point."""
        context = current().context
        timer = context.timer(self.enter, name=f"sleep of job '{self.name}'")
        timer.arm_ns(context.now_ns() + duration_ns)
        try:
            await self._rest("the realtime clock")
        finally:
            timer.cancel()
        await self.pause_point()

    async def wait(self, what: str) -> None:
        """Rest until woken by enter(), or not at all if that came after the last rest. A pause point."""
        await self._rest(what)
        await self.pause_point()

    async def _rest(self, why: str, pausing: bool = False) -> bool:
        """Suspend; only enter() ends it. False if there is no reason to (any more): then it has not."""
        with self.jobs.lock:
            woken, self._woken = self._woken, False
            if self.is_cancelled or self.should_pause is not pausing or (woken and not pausing):
                return False
            here = self.status
            if pausing:
                self._go(JobStatus.STANDBY if here == JobStatus.READY else JobStatus.PAUSED)
                self.paused = True
            self._resting, self.busy = True, False
        kick()  # a drained section may wait for it
        await suspend(_Resting(self, why))
        if pausing:
            with self.jobs.lock:
                self.paused = False
                self._go(here)
        return True

    async def _follow(self) -> None:
        """Its nodes may have moved to another context."""
        while self.context is not current().context:
            await move_to(self.context)

    def enter(self) -> None:
        """Let the body look around: now if it rests, else instead of its next rest. From any thread."""
        with self.jobs.lock:
            if not self._resting:
                self._woken = True
                return
            self._resting, self.busy = False, True
            coroutine = self._coroutine
        assert coroutine is not None
        coroutine.context.wake(coroutine)

    def set_ready(self) -> None:
        """The body has reached the point from where it may be completed."""
        with self.jobs.lock:
            self._go(JobStatus.READY)
        self.on_event(JobStatus.READY)

    # -- its life -----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.id or f"an internal {self.type} job"

    @property
    def has_ended(self) -> bool:
        """Whether its body has, and that is known. From any thread."""
        return self.status in HAS_ENDED

    def start(self) -> None:
        """Set it off."""
        assert self.status == JobStatus.CREATED and self.pause_count > 0
        with self.jobs.lock:
            self.pause_count -= 1
            self.busy, self.paused = True, False
            self._go(JobStatus.RUNNING)
        self._coroutine = Coroutine(self._co_main(), self.context)
        if self.context is self.jobs.main and self.context.is_home:
            self.context.enter(self._coroutine)
        else:
            self.context.schedule(self._coroutine)

    def give_up(self) -> None:
        """It could not be made completely, and is not to be started."""
        assert self.status == JobStatus.CREATED
        self.transaction.remove(self)
        self.move_on(JobStatus.NULL)
        self.jobs.remove(self)

    async def _co_main(self) -> None:
        try:
            await self.pause_point()
            await self.run()
        except Exception as error:
            self.failure = error
        with self.jobs.lock:
            self.has_left = self.busy = True
        self.jobs.main.schedule_oneshot(self._leave)

    def _leave(self) -> None:
        """The body has ended."""
        with self.jobs.lock:
            self.busy = False  # what follows may drain, and must not wait for itself
        kick()
        if self.failure is not None and not isinstance(self.failure, (OSError, BlockError)):
            self.jobs.report_defect(self.failure, f"job '{self.name}'")
        self.transaction.ended(self)

    def _go(self, status: JobStatus) -> None:
        assert status in TRANSITIONS[self.status], f"job {self.name} goes from {self.status} to {status}"
        self.status = status
        if self.id is not None:
            self.jobs.tell(self.id, status)

    def move_on(self, status: JobStatus) -> None:
        """For ``transaction``."""
        with self.jobs.lock:
            self._go(status)

    def settle_result(self) -> None:
        """For ``transaction``: a job that was cancelled has failed, whatever its body says; who has failed aborts."""
        if self.failure is None and self.force_cancelled:
            self.failure = CANCELLED
        if self.failure is not None and self.status != JobStatus.ABORTING:
            self.move_on(JobStatus.ABORTING)

    def conclude(self) -> None:
        """For ``transaction``: all is done. It is forgotten if nobody wants to hear of it."""
        self.move_on(JobStatus.CONCLUDED)
        if self.auto_dismiss or self._coroutine is None:
            self._forget()

    def _forget(self) -> None:
        assert self.status == JobStatus.CONCLUDED
        self.move_on(JobStatus.NULL)
        self.jobs.remove(self)

    # -- pausing ------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """One more wants it to rest at its next pause point. From the main thread."""
        with self.jobs.lock:
            self.pause_count += 1
        if not self.paused:
            self.enter()  # a sleeper is to see it

    def resume(self) -> None:
        """One less wants it to rest."""
        with self.jobs.lock:
            assert self.pause_count > 0
            self.pause_count -= 1
            go_on = not self.pause_count
        if go_on:
            self.enter()

    # -- verbs --------------------------------------------------------------------------------------------------

    def check_verb(self, verb: JobVerb) -> None:
        """BlockError if users may not ask that now."""
        if self.status not in VERBS[verb]:
            raise BlockError(f"Job '{self.name}' in state '{self.status}' cannot accept command verb '{verb}'")

    def user_pause(self) -> None:
        """job-pause. BlockError."""
        self.check_verb(JobVerb.PAUSE)
        if self.user_paused:
            raise BlockError("Job is already paused")
        self.user_paused = True
        self.pause()

    def user_resume(self) -> None:
        """job-resume. BlockError."""
        if not self.user_paused or self.pause_count <= 0:
            raise BlockError("Can't resume a job that was not paused")
        self.check_verb(JobVerb.RESUME)
        self.on_user_resume()
        self.user_paused = False
        self.resume()

    def user_cancel(self, force: bool = True) -> None:
        """job-cancel. BlockError. May wait for the others of its transaction."""
        self.check_verb(JobVerb.CANCEL)
        self.cancel(force)

    def user_complete(self) -> None:
        """job-complete. BlockError."""
        self.check_verb(JobVerb.COMPLETE)
        if self.cancelled:
            raise BlockError(f"The active block job '{self.name}' cannot be completed")
        self.on_complete()

    def user_finalize(self) -> None:
        """job-finalize. BlockError. May wait."""
        self.check_verb(JobVerb.FINALIZE)
        self.transaction.finalize()

    def user_dismiss(self) -> None:
        """job-dismiss. BlockError."""
        self.check_verb(JobVerb.DISMISS)
        self._forget()

    # -- cancelling ---------------------------------------------------------------------------------------------

    def mark_cancelled(self, force: bool) -> bool:
        """It is to end; whether without its result. A job that the user has paused goes on for that."""
        force = self.on_cancel(force)
        if self.user_paused:
            self.on_user_resume()
            self.user_paused = False
            with self.jobs.lock:
                self.pause_count -= 1
        with self.jobs.lock:
            if force or not self.has_left:
                self.cancelled = True
                self.force_cancelled |= force
        return force

    def cancel(self, force: bool) -> None:
        """It is to end. With ``force``, and for most kinds of jobs always, without its result. May wait for the
        others of its transaction."""
        if self.status == JobStatus.CONCLUDED:
            self.user_dismiss()
            return
        force = self.mark_cancelled(force)
        if self.status == JobStatus.CREATED:
            self.transaction.ended(self)
        elif self.status not in RUNS or self.has_left:
            if force and self.has_ended:
                self.transaction.abort(self)
        else:
            self.enter()

    def info(self) -> JobInfo:
        """What query-jobs tells of it."""
        assert self.id is not None
        return JobInfo(
            id=self.id,
            type=self.type,
            status=self.status,
            current_progress=self.progress.current,
            total_progress=self.progress.total,
            error=self.error_text,
        )

    @property
    def error_text(self) -> str | None:
        """Why it failed, None if it has not."""
        failure: Any = self.failure
        if failure is None or not self.has_ended:
            return None
        if isinstance(failure, BlockError):
            return str(failure).partition("\n")[0]
        if isinstance(failure, OSError):
            return failure.strerror or str(failure)
        return f"internal error: {type(failure).__name__}: {failure}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.status}>"
