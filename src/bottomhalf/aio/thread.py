# SPDX-License-Identifier: Apache-2.0
"""What a thread is doing right now: its coroutine, its context, its waits, its deferred section.

Reading a ``threading.local`` costs as much as three attributes of a plain object, and a turn of the loop needs
several such facts. Therefore they lie together in one plain object per thread, which a context remembers for its
home thread; ``own.state`` finds it from anywhere else.

What must live here: the object. What the facts mean is the business of ``coroutine``, ``wait`` and ``defer``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import ref

from bottomhalf.host.threads import Local

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext
    from bottomhalf.aio.coroutine import Coroutine
    from bottomhalf.aio.wait import Wait


class ThreadState:
    """One thread's facts; also the context manager of its deferred sections, for a class costs least to enter."""

    __slots__ = ("calls", "contexts", "coroutine", "depth", "waits", "woken")

    def __init__(self) -> None:
        self.coroutine: Coroutine | None = None  # the one that runs
        self.woken: list[Coroutine] = []  # by that one, to be entered when it suspends
        self.contexts: list[ref[AioContext]] = []  # that were made here and not closed yet
        self.waits: list[Wait] = []  # of plain code, the innermost last
        self.depth = 0  # of nested deferred sections
        self.calls: dict[tuple[Callable[[Any], object], Any], None] = {}

    @property
    def context(self) -> AioContext | None:
        """The context that the thread polls while it waits for something elsewhere: the latest main one, so that
        one that somebody has left behind unclosed does no harm; in an iothread its only one."""
        alive = [context for reference in self.contexts if (context := reference()) is not None]
        return next((context for context in reversed(alive) if context.is_main), alive[-1] if alive else None)

    @context.setter
    def context(self, only: AioContext | None) -> None:
        """For a program that throws another one away as a whole, as tests do."""
        self.contexts = [] if only is None else [ref(only)]

    def add_context(self, context: AioContext) -> None:
        self.contexts = [reference for reference in self.contexts if reference() is not None]
        self.contexts.append(ref(context))

    def remove_context(self, context: AioContext) -> None:
        self.contexts = [reference for reference in self.contexts if reference() is not context]

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.depth -= 1
        if self.depth == 0 and self.calls:
            self.flush()

    def flush(self) -> None:
        """Make all deferred calls, even if some raise; the first exception then goes out."""
        calls, self.calls = self.calls, {}
        first: BaseException | None = None
        for function, argument in calls:
            try:
                function(argument)
            except BaseException as error:
                first = first or error
        if first is not None:
            raise first


class _Own(Local):
    def __init__(self) -> None:
        self.state = ThreadState()


own = _Own()
