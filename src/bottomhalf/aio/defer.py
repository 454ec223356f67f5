# SPDX-License-Identifier: Apache-2.0
"""Deferred calls: how a batch survives a chain of calls that sees one request at a time.

    with deferred():
        for request in requests:
            engine.add(request)          # each says defer_call(engine.enter, None)
    # engine.enter(None) has run here, once

Inside a section ``defer_call`` remembers a function and its argument unless the same pair is there already; the
end of the outermost section calls them in the order in which they came first, also when the section ends with an
exception. Outside a section it calls at once. Sections are per thread. The list is taken away before the first
call, so a deferred function that opens a section of its own starts an empty list and nothing runs twice.

Nobody may wait inside a section for what the section holds back. Therefore a nested poll makes the calls that have
been deferred so far and runs outside of any section, and a coroutine that suspends inside one gets an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bottomhalf.aio.thread import ThreadState, own


def deferred() -> ThreadState:
    """A context manager: calls given to defer_call() inside run once, at the end of the outermost section."""
    return own.state


def defer_call(function: Callable[[Any], object], argument: Any) -> None:
    """Call ``function(argument)`` at the end of the section, or now if there is none.

    Both are compared by equality and must be hashable. Callable from any thread; sections are per thread."""
    state = own.state
    if state.depth:
        state.calls[(function, argument)] = None
    else:
        function(argument)
