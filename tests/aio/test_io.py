# SPDX-License-Identifier: Apache-2.0
"""Completions of file I/O: none is lost when an owner waits, in a nested poll, for another one.

In 2014 QEMU's mirror job hung: the handler had taken two completions out of the kernel into a list on its stack,
the first owner waited for the second in a nested poll, and nothing was left anywhere that could have woken it.
``NaiveReaper`` is that handler; it stays here to prove that these tests would find it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from bottomhalf.aio import AioContext, AioError, WrongContext, current, defer_call, deferred, suspend, wait_while
from bottomhalf.aio.io import SUBMIT_AT, SUBMIT_AT_IDLE, ContextEngine
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import File, Host
from bottomhalf.host.request import FLUSH, IN_PROGRESS, READ, WRITE, Request
from bottomhalf.host.sim import Deadlock, Odds, SimHost
from tests.aio.helpers import drain, until

SIZE = 1 << 16


class Owner:
    """Is told once; what happens then is the test's."""

    def __init__(self, name: str, order: list[str], then: Callable[[], object] | None = None) -> None:
        self.name = name
        self.order = order
        self.then = then
        self.told = 0
        self.requests: list[Request] = []

    @property
    def done(self) -> bool:
        return self.name in self.order

    def complete(self, requests: list[Request]) -> None:
        assert all(request.result != IN_PROGRESS for request in requests)
        self.told += 1
        self.requests += requests
        if self.then is not None:
            self.then()
        self.order.append(self.name)


class Disk:
    """A file, and requests to it."""

    def __init__(self, context: AioContext, path: str) -> None:
        self.context = context
        host = context.host
        if isinstance(host, SimHost):
            host.add_file(path, SIZE)
        else:
            with open(path, "wb") as created:
                created.truncate(SIZE)
        self.file: File = host.open_file(path)
        self.engine = context.engine

    def write(self, owner: Owner | None, block: int = 0) -> Request:
        request = Request(WRITE, block * 512, 512, memoryview(bytes([block % 256]) * 512))
        request.owner = owner
        return request

    def submit(self, *owners: Owner) -> None:
        self.engine.submit(self.file, [self.write(owner, n) for n, owner in enumerate(owners)])

    def wait_for(self, owner: Owner) -> Callable[[], object]:
        """A callback that waits for another owner, unless that one waits further down on the stack."""
        return lambda: owner.told or wait_while(self.context, lambda: not owner.done, what=owner.name)


def make_disk(context: AioContext, directory: object) -> Disk:
    return Disk(context, f"{directory}/disk")


@pytest.fixture
def disk(context: AioContext, tmp_path: object) -> Iterator[Disk]:
    made = make_disk(context, tmp_path)
    yield made
    made.file.close()


@pytest.fixture(params=["auto", "threads"])
def any_disk(context: AioContext, tmp_path: object, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A disk behind each engine that the host has."""
    context._engines["auto"] = ContextEngine(context, context.host.engine(request.param))
    made = make_disk(context, tmp_path)
    yield made
    made.file.close()


class NaiveReaper(ContextEngine):
    """The handler of 2014: what it has reaped is known to its stack alone."""

    def _complete(self) -> None:
        for request in self._engine.reap():
            if request.owner is not None:
                request.owner.complete([request])


def together(host: SimHost) -> SimHost:
    """Requests that are submitted together complete together, which is what it takes."""
    host.odds.coalesce = 1
    host.odds.at_once = 0
    return host


def naive(context: AioContext) -> None:
    context._engines["auto"] = NaiveReaper(context, context.host.engine())


@pytest.mark.parametrize("reaper", ["naive", "ours"])
def test_first_waits_for_second(sim: SimHost, tmp_path: object, reaper: str) -> None:
    """The deadlock itself. Whoever of the two is told first waits for the other."""
    context = AioContext(together(sim))
    if reaper == "naive":
        naive(context)
    disk = make_disk(context, tmp_path)
    order: list[str] = []
    a, b = Owner("A", order), Owner("B", order)
    a.then, b.then = disk.wait_for(b), disk.wait_for(a)
    disk.submit(a, b)
    if reaper == "naive":
        with pytest.raises(Deadlock, match=r"main waits for [AB] "):
            until(context, lambda: order)
        return
    until(context, lambda: len(order) == 2)
    assert (a.told, b.told) == (1, 1)
    assert disk.engine.in_flight == 0 and not disk.engine.completions.scheduled
    assert context.poll(False) is False
    context.close()


@pytest.mark.parametrize("reaper", ["naive", "ours"])
def test_the_mirror_job_of_2014(sim: SimHost, tmp_path: object, reaper: str) -> None:
    """The same as people met it. A job reads A and B, plain code waits for the job, and what is called when the first
    has completed waits for the other, which was fetched in the same batch. With the completions on the stack of the
    handler that is a hang, told with the chain of waits; with the bottom half that goes on with the rest both complete,
    and the job."""
    context = AioContext(together(sim))
    if reaper == "naive":
        naive(context)
    disk = make_disk(context, tmp_path)
    order: list[str] = []
    a, b = Owner("request A", order), Owner("request B", order)

    async def mirror() -> None:
        me = current()

        def told(other: Owner) -> None:
            disk.wait_for(other)()
            context.schedule_oneshot(lambda: len(order) == 2 and not me.done and context.wake(me))

        a.then, b.then = partial(told, b), partial(told, a)
        disk.submit(a, b)
        await suspend("its requests A and B")
        order.append("job")

    if reaper == "naive":
        with pytest.raises(Deadlock) as failure:
            context.run(mirror(), "the end of the mirror job")
        told = str(failure.value)
        assert "main waits for the end of the mirror job" in told and "mirror waits for its requests A and B" in told
        assert re.search("main waits for request [AB]", told) and f"seed {sim.seed}" in told
        return
    context.run(mirror(), "the end of the mirror job")
    assert order[2:] == ["job"] and {*order[:2]} == {"request A", "request B"}
    assert (a.told, b.told) == (1, 1) and disk.engine.in_flight == 0
    drain(context)
    context.close()


def test_first_waits_for_the_third(any_disk: Disk) -> None:
    """A waits for C, with B in between; on every engine."""
    order: list[str] = []
    c = Owner("C", order)
    b = Owner("B", order)
    a = Owner("A", order, any_disk.wait_for(c))
    any_disk.submit(a, b, c)
    until(any_disk.context, lambda: len(order) == 3)
    assert sorted(order) == ["A", "B", "C"] and order.index("C") < order.index("A")
    assert [owner.told for owner in (a, b, c)] == [1, 1, 1]
    assert any_disk.engine.in_flight == 0
    drain(any_disk.context)


def test_chain(any_disk: Disk) -> None:
    """T72: each waits for the next, up to thirty deep."""
    order: list[str] = []
    owners = [Owner(str(n), order) for n in range(30)]
    for n, owner in enumerate(owners[:-1]):
        owner.then = any_disk.wait_for(owners[n + 1])
    any_disk.submit(*owners)
    until(any_disk.context, lambda: len(order) == 30)
    assert all(owner.told == 1 for owner in owners)
    drain(any_disk.context)
    assert not any_disk.engine.completions.scheduled


def test_submits_and_waits(any_disk: Disk) -> None:
    """A's owner submits D and waits for it: the section around the walk must not hold D back."""
    order: list[str] = []
    d = Owner("D", order)

    def submit_and_wait() -> None:
        any_disk.submit(d)
        any_disk.wait_for(d)()

    a, b = Owner("A", order, submit_and_wait), Owner("B", order)
    any_disk.submit(a, b)
    until(any_disk.context, lambda: len(order) == 3)
    assert order.index("D") < order.index("A")
    drain(any_disk.context)


def test_waits_inside_a_section(any_disk: Disk) -> None:
    """Whoever opens a section, submits, and waits inside it."""
    order: list[str] = []
    a = Owner("A", order)
    with deferred():
        any_disk.submit(a)
        any_disk.wait_for(a)()
    assert order == ["A"]


def test_second_batch_of_the_outer_walk(sim: SimHost, tmp_path: object) -> None:
    """An inner walk empties the list and takes the bottom half back; then the outer walk reaps a second batch,
    whose first owner waits for its second. (QEMU's own cure does not arm the bottom half again there.)"""
    context = AioContext(together(sim))
    disk = make_disk(context, tmp_path)
    order: list[str] = []
    c, d = Owner("C", order), Owner("D", order)
    c.then, d.then = disk.wait_for(d), disk.wait_for(c)
    a, b = Owner("A", order), Owner("B", order)

    def after(other: Owner) -> None:
        """Wait for the other one; afterwards C and D are ready before this walk looks again."""
        if not other.told:
            disk.wait_for(other)()
            disk.submit(c, d)
            disk.engine._enter(None)
            sim.advance(100_000_000)

    a.then, b.then = lambda: after(b), lambda: after(a)
    disk.submit(a, b)
    until(context, lambda: len(order) == 4)
    drain(context)
    assert sorted(order) == ["A", "B", "C", "D"] and all(owner.told == 1 for owner in (a, b, c, d))
    context.close()


def test_two_engines(context: AioContext, tmp_path: object) -> None:
    """A of one engine waits for B of the other, and the other way round."""
    disks = [Disk(context, f"{tmp_path}/disk{n}") for n in range(2)]
    disks[1].engine = ContextEngine(context, context.host.engine("threads"))
    order: list[str] = []
    b = Owner("B", order)
    a = Owner("A", order, disks[0].wait_for(b))
    c = Owner("C", order, disks[0].wait_for(a))
    disks[0].submit(a)
    disks[1].submit(c, b)
    until(context, lambda: len(order) == 3)
    assert sorted(order) == ["A", "B", "C"] and all(owner.told == 1 for owner in (a, b, c))
    drain(context)
    disks[1].engine.close()
    for disk in disks:
        disk.file.close()


def test_found_by_busy_polling(sim: SimHost, tmp_path: object) -> None:
    """The same when poll_ready, not the descriptor, starts the walk."""
    context = AioContext(together(sim))
    context.poll_max_ns = context._poll_ns = 10_000_000
    disk = make_disk(context, tmp_path)
    order: list[str] = []
    a, b = Owner("A", order), Owner("B", order)
    a.then, b.then = disk.wait_for(b), disk.wait_for(a)
    for _ in range(5):
        order.clear()
        a.told = b.told = 0
        disk.submit(a, b)
        until(context, lambda: len(order) == 2)
        assert (a.told, b.told) == (1, 1)
    context.close()


def test_waits_for_what_is_not_complete_yet(any_disk: Disk) -> None:
    """The nested poll has to sleep and is woken by the descriptor."""
    order: list[str] = []
    host = any_disk.context.host
    b = Owner("B", order)
    held = host.fault(op=FLUSH, hold=True) if isinstance(host, SimHost) else None
    flush = Request(FLUSH)
    flush.owner = b
    any_disk.engine.submit(any_disk.file, [flush])
    if held is not None and isinstance(host, SimHost):
        host.at(50_000_000, held.remove)
    a = Owner("A", order, any_disk.wait_for(b))
    any_disk.submit(a)
    until(any_disk.context, lambda: len(order) == 2)
    if held is not None:
        assert order == ["B", "A"]


@pytest.mark.parametrize("handled", [False, True])
def test_exceptions_of_owners(any_disk: Disk, handled: bool) -> None:
    """The other owners are told nevertheless, each once."""
    context = any_disk.context
    told: list[str] = []
    if handled:
        context.exception_handler = lambda _context, error, _where: told.append(str(error))
    order: list[str] = []

    def fail() -> None:
        raise ValueError("owner")

    owners = [Owner(str(n), order, fail if n % 2 else None) for n in range(6)]
    any_disk.submit(*owners)
    raised = 0
    while not all(owner.told for owner in owners):
        try:
            context.poll(True)
        except ValueError:
            raised += 1
    drain(context)
    assert [owner.told for owner in owners] == [1] * 6
    assert (len(told), raised) == ((3, 0) if handled else (0, 3))
    assert any_disk.engine.in_flight == 0


def test_owners_are_not_told_inside_submit(any_disk: Disk) -> None:
    """T73: however quick the engine is."""
    order: list[str] = []
    for n in range(20):
        owner = Owner(str(n), order)
        any_disk.submit(owner)
        assert not owner.told
    until(any_disk.context, lambda: len(order) == 20)
    many = [Owner(str(n), order) for n in range(20, 20 + 2 * SUBMIT_AT)]
    with deferred():
        any_disk.submit(*many)
        assert not any(owner.told for owner in many)
    until(any_disk.context, lambda: len(order) == 20 + len(many))


def test_one_call_per_owner(sim: SimHost, tmp_path: object) -> None:
    """What completes together for one owner is told together."""
    context = AioContext(together(sim))
    sim.latency.ranges_ns[WRITE] = (1000, 1000)
    disk = make_disk(context, tmp_path)
    order: list[str] = []
    owner = Owner("A", order)
    disk.engine.submit(disk.file, [disk.write(owner, n) for n in range(SUBMIT_AT_IDLE)])
    assert disk.engine.in_flight == SUBMIT_AT_IDLE
    until(context, lambda: owner.told)
    assert owner.told == 1 and len(owner.requests) == SUBMIT_AT_IDLE and disk.engine.in_flight == 0
    assert not context.statistics().bottom_halves_queued, "nobody else waits, so there is nothing to go on with"
    nobody = disk.write(None)
    disk.engine.submit(disk.file, [nobody])
    until(context, lambda: nobody.result == 0)
    context.close()


def test_deferred_sections_batch(sim: SimHost, tmp_path: object) -> None:
    """One entry into the kernel for a section; at SUBMIT_AT prepared requests without waiting for its end."""
    sim.odds.at_once = 0
    context = AioContext(sim)
    disk = make_disk(context, tmp_path)
    enters: list[int] = []
    engine = disk.engine._engine
    enter = engine.enter
    engine.enter = lambda: (enters.append(disk.engine.in_flight), enter())
    order: list[str] = []
    with deferred():
        for n in range(SUBMIT_AT + 10):
            disk.submit(Owner(str(n), order))
    assert enters == [SUBMIT_AT, SUBMIT_AT + 10]
    until(context, lambda: len(order) == SUBMIT_AT + 10)
    engine.enter = enter  # type: ignore[method-assign]
    context.close()


@pytest.mark.parametrize("stale", [0, SUBMIT_AT_IDLE, SUBMIT_AT - 1])
def test_an_idle_device_begins_sooner(sim: SimHost, tmp_path: object, stale: int) -> None:
    """With the first few of a batch; also if what was prepared before has gone without us, and is done."""
    sim.odds.at_once = 0
    context = AioContext(sim)
    disk = make_disk(context, tmp_path)
    enters: list[int] = []
    engine = disk.engine._engine
    enter = engine.enter
    engine.enter = lambda: (enters.append(disk.engine.in_flight), enter())
    disk.engine._prepared = stale
    order: list[str] = []
    disk.engine.submit(disk.file, [disk.write(Owner(str(n), order), 2 * n) for n in range(40)])
    assert enters == [SUBMIT_AT_IDLE, SUBMIT_AT_IDLE + SUBMIT_AT, 40]
    until(context, lambda: len(order) == 40)
    enters.clear()
    disk.engine._prepared = 0
    disk.submit(*(Owner(str(n), order) for n in range(40)))  # neighbours, which the kernel joins
    assert enters == [SUBMIT_AT, 2 * SUBMIT_AT, 40]
    until(context, lambda: len(order) == 80)
    engine.enter = enter  # type: ignore[method-assign]
    context.close()


@pytest.mark.parametrize("stale", range(SUBMIT_AT))
@pytest.mark.parametrize("first", [1, 5, SUBMIT_AT_IDLE - 1])
def test_whatever_has_gone_before_all_start(sim: SimHost, tmp_path: object, stale: int, first: int) -> None:
    """A batch that does not fill a part, on a count that is too high already, and then others; no part is empty, or
    larger than it may be."""
    context = AioContext(sim)
    disk = make_disk(context, tmp_path)
    order: list[str] = []
    parts: list[int] = []
    prepare = disk.engine._prepare
    disk.engine._prepare = lambda file, part: (parts.append(len(part)), prepare(file, part))[1]
    with deferred():
        disk.engine._prepared = stale
        for numbers in (range(first), range(first, first + 3), range(first + 3, 40)):
            disk.engine.submit(disk.file, [disk.write(Owner(str(n), order), 2 * n) for n in numbers])
    until(context, lambda: len(order) == 40)
    assert all(0 < part <= SUBMIT_AT for part in parts)
    context.close()


def test_coroutines(any_disk: Disk) -> None:
    context, file = any_disk.context, any_disk.file

    async def body() -> bytes:
        request = Request(WRITE, 1000, 3, memoryview(b"abc"))
        await any_disk.engine.co_submit(file, request)
        assert request.result == 0
        await any_disk.engine.co_submit(file, Request(FLUSH))
        read = Request(READ, 999, 5, memoryview(bytearray(5)))
        await any_disk.engine.co_submit(file, read)
        return bytes(read.buffer)

    assert context.run(body()) == b"\0abc\0"

    async def many() -> int:
        started = [context.enter(body()) for _ in range(50)]
        return sum([len(await one) for one in started])

    assert context.run(many()) == 250


def test_exceptions_of_coroutines(any_disk: Disk) -> None:
    """One of those whose requests complete together fails: the others go on."""
    context = any_disk.context
    done: list[int] = []

    async def body(n: int) -> None:
        await any_disk.engine.co_submit(any_disk.file, any_disk.write(None, n))
        done.append(n)
        if n == 3:
            raise ValueError(n)

    for n in range(8):
        context.enter(body(n))
    with pytest.raises(ValueError, match="3"):
        until(context, lambda: False)
    until(context, lambda: len(done) == 8)
    drain(context)
    assert sorted(done) == list(range(8))


def test_woken_by_something_else(disk: Disk) -> None:
    """T59: a coroutine that waits for a request finds out that it was not the request that woke it."""
    if isinstance(disk.context.host, SimHost):
        disk.context.host.odds.at_once = 0

    async def body() -> None:
        await disk.engine.co_submit(disk.file, disk.write(None))

    coroutine = disk.context.enter(body())
    with pytest.raises(AssertionError, match="something else"):
        disk.context.enter(coroutine)
    with pytest.raises(AioError, match="it has ended"):
        until(disk.context, lambda: False)  # the completion finds nobody


def test_engine_of_another_context(sim: SimHost, tmp_path: object) -> None:
    """T81: requests complete in the context that submits them, so a coroutine of another one may not."""
    here = AioContext(sim)
    disk = make_disk(here, tmp_path)
    there = AioContext(sim, "there")

    async def body() -> None:
        await disk.engine.co_submit(disk.file, disk.write(None))

    with pytest.raises(WrongContext, match="of there uses the engine of main"):
        there.enter(body())
    here.close()
    there.close()


def test_close_waits(host: Host, tmp_path: object) -> None:
    """What is in flight ends before the engine does; its owners are not told any more."""
    context = AioContext(host)
    disk = make_disk(context, tmp_path)
    order: list[str] = []
    requests = [disk.write(Owner("A", order), n) for n in range(20)]
    disk.engine.submit(disk.file, requests)
    context.close()
    assert all(request.result == 0 for request in requests) and order == []
    disk.file.close()


def test_errors_reach_their_owner(sim: SimHost, tmp_path: object) -> None:
    """T77: an error is delivered to the request that it belongs to, and to no other."""
    context = AioContext(SimHost(sim.seed, odds=Odds()))
    host = context.host
    assert isinstance(host, SimHost)
    disk = make_disk(context, tmp_path)
    host.fault(path=disk.file.path, op=WRITE, errno=errno.EIO, start=512 * 3, end=512 * 4)
    order: list[str] = []
    owners = [Owner(str(n), order) for n in range(8)]
    disk.submit(*owners)
    until(context, lambda: len(order) == 8)
    assert [owner.requests[0].result for owner in owners] == [-errno.EIO if n == 3 else 0 for n in range(8)]
    context.close()


@pytest.mark.needs("io_uring")
def test_kernel_takes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """T74: EAGAIN with nothing in flight. In QEMU nothing submits again; ours tries in the next poll."""
    from bottomhalf.host.linux import ring
    from bottomhalf.host.linux.ring_engine import RingEngine

    context = AioContext(LinuxHost())
    assert isinstance(context.engine._engine, RingEngine)
    disk = make_disk(context, tmp_path)
    refusals = [errno.EAGAIN, errno.EBUSY, errno.EAGAIN]
    enter = ring.io_uring_enter
    monkeypatch.setattr(
        ring, "io_uring_enter", lambda *arguments: -refusals.pop() if refusals else enter(*arguments)
    )
    order: list[str] = []
    owners = [Owner(str(n), order) for n in range(3)]
    disk.submit(*owners)
    until(context, lambda: len(order) == 3)
    assert not refusals and all(owner.requests[0].result == 0 for owner in owners)
    context.close()
    disk.file.close()


def test_deferred_calls_of_owners(disk: Disk) -> None:
    """Owners are told inside one section: what they defer happens once."""
    sent: list[int] = []
    order: list[str] = []
    owners = [Owner(str(n), order, lambda: defer_call(sent.append, 1)) for n in range(5)]
    disk.submit(*owners)
    until(disk.context, lambda: len(order) == 5)
    assert 1 <= len(sent) <= 5


def test_suspends_in_between(disk: Disk) -> None:
    """An owner that is a coroutine may suspend for something else as soon as it was told."""
    context = disk.context
    steps: list[str] = []

    async def body() -> None:
        await disk.engine.co_submit(disk.file, disk.write(None))
        steps.append("written")
        await suspend("the test")
        steps.append("woken")

    coroutine = context.enter(body())
    until(context, lambda: steps)
    context.wake(coroutine)
    assert steps == ["written", "woken"]
