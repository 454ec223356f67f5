# SPDX-License-Identifier: Apache-2.0
"""Busy polling: handlers that are asked, when their peers need not ring, and for how long it is worth while.

A virtqueue stands for all of them: its peer puts work in and rings a bell, unless it was told that we look."""

from __future__ import annotations

from functools import partial

import pytest

from bottomhalf.aio import AioContext, AioError, IOThread
from bottomhalf.aio.context import POLL_FIRST_NS, POLL_MAX_NS
from bottomhalf.aio.handlers import ASKED_IN_VAIN_NS_MAX
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.sim import Odds, SimHost
from tests.aio.helpers import drain

SECOND_NS = 1_000_000_000


class VirtQueue:
    """Work, a bell, and whether the peer has to ring it."""

    def __init__(self, context: AioContext, host: SimHost) -> None:
        self.bell = host.event()
        self.work = 0
        self.served = 0
        self.polling = False
        self.begins = self.ends = self.asked = 0
        self.context = context
        self.attach()

    def attach(self) -> None:
        self.context.set_fd_handler(
            self.bell.fileno(),
            on_read=self.rung,
            poll=self.look,
            poll_ready=self.serve,
            poll_begin=self.begin,
            poll_end=self.end,
        )

    def detach(self) -> None:
        self.context.set_fd_handler(self.bell.fileno())

    def begin(self) -> None:
        assert not self.polling
        self.polling = True
        self.begins += 1

    def end(self) -> None:
        assert self.polling
        self.polling = False
        self.ends += 1

    def look(self) -> bool:
        self.asked += 1
        return self.work > 0

    def serve(self) -> None:
        self.served += self.work
        self.work = 0

    def rung(self) -> None:
        self.bell.clear()
        self.serve()

    def put(self) -> None:
        """The peer's side."""
        self.work += 1
        if not self.polling:
            self.bell.set()


@pytest.fixture
def calm(sim: SimHost) -> SimHost:
    made = SimHost(sim.seed, odds=Odds.calm())
    made.tick_ns = 100
    return made


def polling_context(host: SimHost, max_ns: int = 100_000) -> AioContext:
    context = AioContext(host)
    context.set_poll_params(max_ns)
    return context


def serve_one(context: AioContext, queue: VirtQueue, host: SimHost, delay_ns: int) -> None:
    wanted = queue.served + 1
    host.at(delay_ns, queue.put)
    while queue.served < wanted:
        context.poll(True)


def test_begin_and_end(calm: SimHost) -> None:
    """T23: the peer is told to ring again before the thread sleeps, and only then."""
    context = polling_context(calm)
    queue = VirtQueue(context, calm)
    serve_one(context, queue, calm, 3_000)  # rung; now it is worth while
    assert queue.asked == 0 and queue.begins == 0
    serve_one(context, queue, calm, 1_000)
    assert queue.begins == 1 and queue.asked > 0 and queue.ends == 0, "it was found by looking"
    serve_one(context, queue, calm, SECOND_NS)
    assert queue.begins == queue.ends == 1 and not queue.polling, "the peer had to ring"
    queue.detach()
    context.close()


def test_the_last_moment(calm: SimHost) -> None:
    """T21: work that comes while the peer is told to ring again is found, for each is asked once more after that."""
    context = polling_context(calm)
    queue = VirtQueue(context, calm)
    serve_one(context, queue, calm, 3_000)

    def end_late() -> None:
        queue.work += 1  # the peer looked at the flag just before it was cleared: it does not ring
        VirtQueue.end(queue)

    queue.end = end_late  # type: ignore[method-assign]
    queue.attach()
    served = queue.served
    while queue.served == served:
        context.poll(True)  # would sleep for ever: a Deadlock
    queue.detach()
    context.close()


def test_the_last_moment_of_two(calm: SimHost) -> None:
    """T21: both had work that their peers did not ring for; neither is forgotten over the other."""
    context = polling_context(calm)
    queues = [VirtQueue(context, calm), VirtQueue(context, calm)]
    for queue in queues:
        serve_one(context, queue, calm, 3_000)

    def end_late(queue: VirtQueue) -> None:
        queue.work += 1
        VirtQueue.end(queue)

    for queue in queues:
        queue.end = partial(end_late, queue)  # type: ignore[method-assign]
        queue.attach()
    served = [queue.served for queue in queues]
    while any(queue.served == before for queue, before in zip(queues, served, strict=True)):
        context.poll(True)
    for queue in queues:
        queue.detach()
    context.close()


def test_removed_while_polling(calm: SimHost) -> None:
    """T22: removed between begin and end, it is ended, so that its peer rings; put back, what came is served."""
    context = polling_context(calm)
    queue = VirtQueue(context, calm)
    serve_one(context, queue, calm, 3_000)
    serve_one(context, queue, calm, 1_000)
    assert queue.polling
    queue.detach()
    assert not queue.polling and queue.begins == queue.ends
    queue.put()
    drain(context)
    served = queue.served
    queue.attach()
    drain(context)
    assert queue.served == served + 1
    queue.detach()
    context.close()


def test_replaced_keeps_what_was_learnt(calm: SimHost) -> None:
    """T26: in QEMU an update forgets the begin and end callbacks and the time. Here they come with each update, and
    the time stays."""
    context = polling_context(calm)
    queue = VirtQueue(context, calm)
    serve_one(context, queue, calm, 3_000)
    poll_ns = context.statistics().poll_ns
    assert poll_ns == POLL_FIRST_NS
    queue.attach()
    assert context.statistics().poll_ns == poll_ns
    serve_one(context, queue, calm, 1_000)
    assert queue.begins == 1
    queue.detach()
    context.close()


def test_handlers_without_poll_do_not_switch_it_off(calm: SimHost) -> None:
    """T25: in QEMU one handler that cannot be asked switches busy polling off for all. Here descriptors are looked at
    in the same turn."""
    context = polling_context(calm)
    queue = VirtQueue(context, calm)
    plain = calm.event()
    seen: list[int] = []
    context.set_fd_handler(plain.fileno(), lambda: (seen.append(1), plain.clear()))
    serve_one(context, queue, calm, 3_000)
    asked = queue.asked
    calm.at(1_000, plain.set)
    while not seen:
        context.poll(True)
    assert queue.asked > asked
    for fd in (plain.fileno(), queue.bell.fileno()):
        context.set_fd_handler(fd)
    context.close()


def test_each_handler_has_its_own_time(calm: SimHost) -> None:
    context = polling_context(calm, POLL_MAX_NS)
    quick, slow = VirtQueue(context, calm), VirtQueue(context, calm)
    for _ in range(6):
        serve_one(context, quick, calm, 2_000)
    by_fd = context._handlers._by_fd
    assert by_fd[quick.bell.fileno()].poll_ns >= POLL_FIRST_NS
    assert by_fd[slow.bell.fileno()].poll_ns == 0
    serve_one(context, slow, calm, SECOND_NS)
    assert by_fd[slow.bell.fileno()].poll_ns == 0 and by_fd[quick.bell.fileno()].poll_ns >= POLL_FIRST_NS
    for queue in (quick, slow):
        queue.detach()
    context.close()


def test_a_busy_loop_serves_both_in_one_turn(calm: SimHost) -> None:
    """A descriptor that is ready at the first look, and one that only says so when it is asked."""
    context = AioContext(calm)
    context.set_poll_params(100_000)
    queue = VirtQueue(context, calm)
    bell, rung = calm.event(), []
    context.set_fd_handler(bell.fileno(), lambda: (rung.append(1), bell.clear()))
    queue.work = 3
    bell.set()
    context.poll(True)
    assert queue.served == 3 and rung == [1]
    queue.detach()
    context.set_fd_handler(bell.fileno())
    context.close()


def test_found_and_rung_is_served_once(calm: SimHost) -> None:
    context = AioContext(calm)
    context.set_poll_params(100_000)
    bell, calls = calm.event(), []
    context.set_fd_handler(
        bell.fileno(),
        on_read=lambda: (calls.append("rung"), bell.clear()),
        poll=lambda: True,
        poll_ready=lambda: calls.append("found"),
    )
    bell.set()
    context.poll(True)
    assert calls == ["rung"]
    context.set_fd_handler(bell.fileno())
    context.close()


def test_time_grows_and_shrinks(calm: SimHost) -> None:
    """The steps of QEMU: 4000, twice as much each time, at most the maximum; one late event and it is 0."""
    context = polling_context(calm, POLL_MAX_NS)
    steps = []
    for blocked_ns in (100, 5_000, 9_000, 17_000, POLL_MAX_NS - 1, POLL_MAX_NS, POLL_MAX_NS + 1):
        steps.append(context.adapted_ns(steps[-1] if steps else 0, blocked_ns))
    assert steps == [4_000, 8_000, 16_000, 32_000, POLL_MAX_NS, POLL_MAX_NS, 0]
    context.set_poll_params(POLL_MAX_NS, grow=4, shrink=2)
    assert context.adapted_ns(1_000, 2_000) == 4_000
    assert context.adapted_ns(32_000, SECOND_NS) == 16_000
    context.close()


def test_gone_quiet(calm: SimHost) -> None:
    """One that had no work for seven seconds is not asked any more, until its bell rings."""
    context = polling_context(calm)
    quiet, busy = VirtQueue(context, calm), VirtQueue(context, calm)
    for queue in (quiet, busy):
        serve_one(context, queue, calm, 3_000)
    serve_one(context, busy, calm, 1_000)
    assert quiet.polling and context.statistics().handlers_asked == 2
    calm.advance(ASKED_IN_VAIN_NS_MAX + 1)
    serve_one(context, busy, calm, 1_000)
    assert not quiet.polling and context.statistics().handlers_asked == 1
    asked = quiet.asked
    serve_one(context, busy, calm, 1_000)
    assert quiet.asked == asked
    serve_one(context, quiet, calm, 2_000)
    assert context.statistics().handlers_asked == 2
    for queue in (quiet, busy):
        queue.detach()
    context.close()


def test_work_of_the_one_that_leaves(calm: SimHost) -> None:
    """It had work just then, and its peer, who did not ring, is not told again: it is served."""
    context = polling_context(calm)
    queue = VirtQueue(context, calm)
    serve_one(context, queue, calm, 3_000)
    serve_one(context, queue, calm, 1_000)
    handler = context._handlers._by_fd[queue.bell.fileno()]
    handler.found_ns = 1
    queue.work += 1
    served = queue.served
    while queue.served == served:
        context.poll(True)
    queue.detach()
    context.close()


def test_a_poll_that_does_not_block_ends_it(calm: SimHost) -> None:
    """Whoever polls without blocking sleeps elsewhere, and there nobody looks."""
    context = polling_context(calm)
    queue = VirtQueue(context, calm)
    serve_one(context, queue, calm, 3_000)
    serve_one(context, queue, calm, 1_000)
    assert queue.polling
    context.poll(False)
    assert not queue.polling
    queue.detach()
    context.close()


def test_never_without_leave(calm: SimHost) -> None:
    """T32: with a maximum of 0 nobody is ever asked."""
    context = polling_context(calm, 0)
    queue = VirtQueue(context, calm)
    for _ in range(5):
        serve_one(context, queue, calm, 1_000)
    assert queue.asked == queue.begins == 0
    queue.detach()
    context.close()


def test_callbacks_come_together(calm: SimHost) -> None:
    context = AioContext(calm)
    fd = calm.event().fileno()
    for arguments in ({"poll": bool}, {"poll_ready": bool, "on_read": bool}):
        with pytest.raises(AioError, match="need each other"):
            context.set_fd_handler(fd, **arguments)
    with pytest.raises(AioError, match="poll_begin and poll_end"):
        context.set_fd_handler(fd, bool, poll_begin=bool)
    context.close()


@pytest.mark.parametrize(("max_ns", "grow", "shrink"), [(-1, 0, 0), (2**63, 0, 0), (0, -1, 0), (0, 0, -2)])
def test_parameters_are_checked(calm: SimHost, max_ns: int, grow: int, shrink: int) -> None:
    context = AioContext(calm)
    with pytest.raises(AioError, match=r"poll-(max-ns|grow|shrink) of main"):
        context.set_poll_params(max_ns, grow, shrink)
    context.close()


def test_parameters_of_a_running_thread() -> None:
    """Changed while it sleeps, without a word to its queues."""
    thread = IOThread("io0", LinuxHost(), poll_max_ns=0)
    thread.set_poll_params(50_000, 3, 2)
    context = thread.context
    assert (context.poll_max_ns, context.poll_grow, context.poll_shrink) == (50_000, 3, 2)
    with pytest.raises(AioError):
        thread.set_poll_params(-1)
    assert thread.statistics().name == "io0" and thread.statistics().poll_max_ns == 50_000
    thread.stop()
    with pytest.raises(AioError, match="poll-grow"):
        IOThread("io1", LinuxHost(), poll_grow=-1)
