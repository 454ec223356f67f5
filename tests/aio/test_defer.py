# SPDX-License-Identifier: Apache-2.0
"""Deferred calls: once, in order, at the end of the outermost section, whatever happens in it."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from bottomhalf.aio import AioContext, AioError, defer_call, deferred, suspend


class Calls(list[str]):
    def note(self, what: str) -> None:
        self.append(what)


def test_outside_at_once() -> None:
    calls = Calls()
    defer_call(calls.note, "now")
    assert calls == ["now"]


def test_once_and_in_order() -> None:
    calls = Calls()
    note = calls.note
    with deferred():
        for what in ("b", "a", "b", "c", "a"):
            defer_call(note, what)
            defer_call(calls.append, what)
        with deferred():
            defer_call(note, "inner")
        assert calls == []
    assert calls == ["b", "b", "a", "a", "c", "c", "inner"]
    defer_call(note, "after")
    assert calls[-1] == "after"


def test_sections_in_deferred_calls() -> None:
    """T70: in QEMU a section inside a deferred function runs the whole list again from its start. Ours is a new
    list; outside of a section the call is made at once."""
    calls = Calls()

    def submit(name: str) -> None:
        calls.append(f"submit {name}")
        with deferred():
            defer_call(calls.note, f"of {name}")
            calls.append(f"complete {name}")
        defer_call(calls.note, f"at once {name}")

    with deferred():
        defer_call(submit, "A")
        defer_call(submit, "B")
    assert calls == [f"{what} {name}" for name in "AB" for what in ("submit", "complete", "of", "at once")]


def test_exception_in_the_section() -> None:
    """The calls are made nevertheless."""
    calls = Calls()
    with pytest.raises(KeyError), deferred():
        defer_call(calls.note, "made")
        raise KeyError
    assert calls == ["made"]
    defer_call(calls.note, "now")
    assert calls == ["made", "now"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_exception_in_a_call(kind: type[BaseException]) -> None:
    """All calls are made; the first exception goes out."""
    calls = Calls()

    def fail(what: str) -> None:
        calls.append(what)
        raise kind(what)

    with pytest.raises(kind, match="first"), deferred():
        defer_call(fail, "first")
        defer_call(calls.note, "second")
        defer_call(fail, "third")
    assert calls == ["first", "second", "third"]


def test_per_thread() -> None:
    calls = Calls()
    with deferred():
        defer_call(calls.note, "mine")
        thread = threading.Thread(target=defer_call, args=(calls.note, "other thread's"))
        thread.start()
        thread.join()
        assert calls == ["other thread's"]
    assert calls == ["other thread's", "mine"]


def test_coroutine_must_not_suspend_inside(context: AioContext) -> None:
    """T54: the section would stay open for everybody else of the thread, and nothing would be submitted."""
    calls = Calls()

    async def body() -> None:
        with deferred():
            defer_call(calls.note, "made")
            await suspend("a completion")

    with pytest.raises(AioError, match="a completion inside a deferred section"):
        context.enter(body())
    assert calls == ["made"]
    defer_call(calls.note, "now")
    assert calls == ["made", "now"]


def test_coroutine_entered_inside_may_suspend(context: AioContext) -> None:
    """A section around the one who enters is not the coroutine's."""
    calls = Calls()

    async def body() -> None:
        with deferred():
            defer_call(calls.note, "held back")
        await suspend("whatever")
        calls.append("woken")

    with deferred():
        coroutine = context.enter(body())
        assert calls == []
    assert calls == ["held back"]
    context.wake(coroutine)
    assert calls == ["held back", "woken"]


def test_bottom_half_in_a_section(context: AioContext) -> None:
    """Nested polls suspend the section; see test_context for what they do with its calls."""
    calls = Calls()
    context.schedule_oneshot(partial(defer_call, calls.note, "from a bottom half"))
    with deferred(), deferred():
        context.poll(True)
        assert calls == ["from a bottom half"]
        defer_call(calls.note, "held back again")
        assert len(calls) == 1
    assert len(calls) == 2
