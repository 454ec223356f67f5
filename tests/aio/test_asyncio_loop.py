# SPDX-License-Identifier: Apache-2.0
"""An asyncio loop made of a context, and await in both directions. On the real host, for asyncio knows no other."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import signal
import socket
import threading
from collections.abc import Coroutine as AbstractCoroutine
from typing import Any

import pytest

from bottomhalf.aio import AioContext, AioError, WasCancelled, WrongContext, current, give_way, sleep_ns, suspend
from bottomhalf.aio.asyncio_bridge import Embedded, from_asyncio, run_in_aio
from bottomhalf.aio.asyncio_loop import AioEventLoop, ContextSelector
from bottomhalf.host.linux import LinuxHost


def run(body: AbstractCoroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=AioEventLoop) as runner:
        return runner.run(body)


def context_of_loop() -> AioContext:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, AioEventLoop)
    return loop.context


def test_all_is_served_in_one_thread() -> None:
    """Bottom halves, timers, descriptors and coroutines of the context beside asyncio's tasks, timers and sockets."""

    async def main() -> list[str]:
        context = context_of_loop()
        seen: list[str] = []
        event = context.host.event()
        context.set_fd_handler(event.fileno(), lambda: (seen.append("descriptor"), event.clear()))
        event.set()
        context.bottom_half(lambda: seen.append("bottom half")).schedule()
        context.timer(lambda: seen.append("timer")).arm_ns(context.now_ns() + 100_000)

        async def aio() -> None:
            await sleep_ns(1_000)
            seen.append("coroutine")

        context.enter(aio())
        one, two = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=one)
        two.send(b"socket")
        seen.append((await reader.readexactly(6)).decode())
        while len(seen) < 5:
            await asyncio.sleep(0.0001)
        two.close()
        writer.close()
        await writer.wait_closed()
        context.set_fd_handler(event.fileno())
        event.close()
        return sorted(seen)

    assert run(main()) == ["bottom half", "coroutine", "descriptor", "socket", "timer"]


@pytest.mark.parametrize("outer", ["asyncio", "context"])
def test_both_ways(outer: str) -> None:
    """A task awaits a coroutine that awaits a task that awaits a coroutine."""

    async def main(context: AioContext) -> str:
        async def innermost() -> str:
            await sleep_ns(1_000)
            return "innermost"

        async def task() -> str:
            await asyncio.sleep(0.001)
            return str(await run_in_aio(context, innermost())) + ", task"

        async def coroutine() -> str:
            await give_way()
            return str(await from_asyncio(task())) + ", coroutine"

        return str(await run_in_aio(context, coroutine())) + ", main"

    async def embedded() -> str:
        context = AioContext(LinuxHost())
        with Embedded(context):
            result = await main(context)
        context.close()
        return result

    async def loop() -> str:
        return await main(context_of_loop())

    result = asyncio.run(embedded()) if outer == "asyncio" else run(loop())
    assert result == "innermost, task, coroutine, main"


def test_exceptions_in_both_directions() -> None:
    async def main() -> None:
        async def fails() -> None:
            await asyncio.sleep(0)
            raise KeyError("asyncio's")

        async def coroutine() -> None:
            with pytest.raises(KeyError, match="asyncio's"):
                await from_asyncio(fails())
            raise ValueError("ours")

        with pytest.raises(ValueError, match="ours"):
            await run_in_aio(context_of_loop(), coroutine())

    run(main())


def test_cancelled_by_asyncio() -> None:
    """The task is cancelled: the coroutine is asked to end, and ends where it can."""

    async def main() -> None:
        ended: list[str] = []

        async def coroutine() -> None:
            try:
                await sleep_ns(10**12)
            finally:
                ended.append("cleaned up")

        task = asyncio.ensure_future(run_in_aio(context_of_loop(), coroutine()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["cleaned up"]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(run_in_aio(context_of_loop(), coroutine()), 0.001)
        assert len(ended) == 2

    run(main())


def test_a_write_goes_on() -> None:
    """What cannot be taken back ends by itself later, and its result is dropped."""

    async def main() -> None:
        started = []

        async def write() -> str:
            started.append(current())
            await suspend("a write")
            return "written"

        task = asyncio.ensure_future(run_in_aio(context_of_loop(), write()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not started[0].done
        started[0].context.wake(started[0])
        assert started[0].result() is None

    run(main())


def test_cancelled_by_us() -> None:
    """The coroutine is cancelled: so is asyncio's task. The other way round it is an ordinary error here."""

    async def main() -> None:
        context = context_of_loop()
        ended = asyncio.Event()

        async def task() -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                ended.set()

        async def coroutine() -> None:
            await from_asyncio(task())

        entered = context.enter(coroutine())
        await asyncio.sleep(0)
        assert "asyncio's" in str(entered.waiting_for)
        entered.cancel()
        assert entered.done
        await ended.wait()

        future = asyncio.get_running_loop().create_future()

        async def waiter() -> str:
            try:
                await from_asyncio(future)
            except WasCancelled as error:
                return str(error)
            return "nothing"

        waiting = context.enter(waiter())
        future.cancel()
        while not waiting.done:
            await asyncio.sleep(0)
        assert "was cancelled" in waiting.result()

        async def cancels_itself() -> None:
            current().cancel()
            await sleep_ns(1)

        with pytest.raises(WasCancelled):
            await run_in_aio(context, cancels_itself())

    run(main())


def test_already_done() -> None:
    """A future that has its result; a callback that wakes one who has gone."""

    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        future.set_result(7)

        async def coroutine() -> object:
            return await from_asyncio(future)

        assert await run_in_aio(context_of_loop(), coroutine()) == 7

    run(main())


def test_nested_waits_are_refused() -> None:
    """While plain code waits in a nested poll, asyncio's callbacks do not run: whoever needs one is told."""

    async def main() -> None:
        context = context_of_loop()
        told: list[str] = []

        async def driver() -> None:
            await from_asyncio(asyncio.sleep(0))

        def command() -> None:
            try:
                context.run(driver(), "a read")
            except WrongContext as error:
                told.append(str(error))

        context.schedule_oneshot(command)
        while not told:
            await asyncio.sleep(0)
        assert "that is for the asyncio loop to deliver" in told[0]

        waiting = context.enter(driver())
        context.schedule_oneshot(lambda: told.append(_refused(context, waiting)))
        while not waiting.done:
            await asyncio.sleep(0)
        assert "that is for the asyncio loop to deliver" in told[1]

    run(main())


def _refused(context: AioContext, waiting: Any) -> str:
    from bottomhalf.aio import wait_while

    with pytest.raises(WrongContext) as failure:
        wait_while(context, lambda: not waiting.done, "a read", on=waiting)
    return str(failure.value)


def test_without_a_loop() -> None:
    """An error that says what to do, on either side."""
    context = AioContext(LinuxHost())

    async def driver() -> None:
        await from_asyncio(asyncio.sleep(0))

    with pytest.raises(WrongContext, match="Embedded, or run asyncio on it with"):
        context.run(driver())

    async def main() -> None:
        await run_in_aio(context, driver())

    with pytest.raises(WrongContext, match="does not serve main"):
        asyncio.run(main())
    context.close()


def test_a_context_that_is_there_already() -> None:
    """It is served, and not closed; its own exception handler stays."""
    context = AioContext(LinuxHost(), "mine")
    told: list[str] = []
    context.exception_handler = lambda _, error, where: told.append(str(error))

    async def main() -> int:
        context.schedule_oneshot(lambda: 1 // 0)
        await asyncio.sleep(0.001)
        return 5

    with asyncio.Runner(loop_factory=functools.partial(AioEventLoop, context)) as runner:
        assert runner.run(main()) == 5
    assert told == ["integer division or modulo by zero"]
    assert context.exception_handler is not None and context.poll(False) is False
    context.close()


def test_exceptions_of_the_context_reach_the_loops_handler() -> None:
    async def main() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
        context_of_loop().bottom_half(lambda: 1 // 0, name="careless").schedule()
        while not told:
            await asyncio.sleep(0)
        assert "bottom half 'careless'" in told[0]["message"]
        assert isinstance(told[0]["exception"], ZeroDivisionError)

    run(main())


def test_from_other_threads() -> None:
    """call_soon_threadsafe, executors, and a bottom half scheduled from a thread while the loop sleeps."""

    async def main() -> None:
        loop, context = asyncio.get_running_loop(), context_of_loop()
        assert await loop.run_in_executor(None, lambda: 5) == 5
        future = loop.create_future()
        half = context.bottom_half(lambda: future.set_result("scheduled"))
        thread = threading.Thread(target=half.schedule)
        thread.start()
        assert await future == "scheduled"
        thread.join()

    run(main())


def test_run_in_another_thread_than_made() -> None:
    loop = AioEventLoop()
    results: list[int] = []

    async def main() -> None:
        await run_in_aio(loop.context, sleep_ns(1000))
        results.append(1)

    def body() -> None:
        loop.run_until_complete(main())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert results == [1]
    loop.close()


def test_a_context_in_use_gets_no_other_home() -> None:
    context = AioContext(LinuxHost())
    context.embed()
    with pytest.raises(AioError, match="being polled"):
        context.adopt()
    context.release()
    context.close()


def test_interrupt() -> None:
    """Ctrl-C cancels the main task, as asyncio.run() has it."""

    async def main() -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        await asyncio.sleep(1000)

    # A program that was started in the background ignores the signal, and asyncio leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(main())
    finally:
        signal.signal(signal.SIGINT, before)


def test_signal_handlers_and_subprocesses() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        got = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, got.set)
        os.kill(os.getpid(), signal.SIGUSR1)
        await got.wait()
        loop.remove_signal_handler(signal.SIGUSR1)
        process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
        assert (await process.communicate(b"through a pipe"))[0] == b"through a pipe"

    run(main())


def test_context_variables() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")

    async def main() -> None:
        variable.set("main's")

        async def task() -> str:
            return variable.get()

        async def coroutine() -> str:
            return str(await from_asyncio(task()))

        assert await run_in_aio(context_of_loop(), coroutine()) == "main's"

    run(main())


def test_timers_are_not_early() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        for delay in (0.0, 1e-9, 1e-4, 0.003):
            start = loop.time()
            await asyncio.sleep(delay)
            assert loop.time() - start >= delay

    run(main())


def test_selector() -> None:
    """What the standard library's selectors promise."""
    context = AioContext(LinuxHost())
    selector = ContextSelector(context)
    one, two = socket.socketpair()
    key = selector.register(one, 1, "data")
    assert selector.get_key(one) == selector.get_map()[one.fileno()] == key and len(selector.get_map()) == 1
    assert list(selector.get_map()) == [one.fileno()]
    with pytest.raises(KeyError, match="already registered"):
        selector.register(one, 1)
    with pytest.raises(ValueError, match="Invalid events"):
        selector.register(two, 4)
    with pytest.raises(ValueError, match="Invalid events"):
        selector.modify(one, 0)
    with pytest.raises(ValueError, match="Invalid file object"):
        selector.register(object(), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Invalid file descriptor"):
        selector.register(-1, 1)
    with pytest.raises(KeyError, match="not registered"):
        selector.unregister(two)
    assert selector.select(0) == []
    two.send(b"x")
    assert selector.select(None) == [(key, 1)]
    both = selector.modify(one, 3, "other")
    found = selector.select(5)
    assert sorted(mask for _, mask in found) == [1, 2] and {key for key, _ in found} == {both}
    one.close()  # before it is unregistered, as careless programs do
    assert selector.unregister(one) == both
    with pytest.raises(ValueError, match="Invalid file descriptor"):
        selector.get_key(one)
    selector.close()
    two.close()
    context.close()
