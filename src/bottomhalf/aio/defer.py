# SPDX-License-Identifier: Apache-2.0
"""Deferred calls: how a batch survives a chain of calls that sees one request at a time.

    with deferred():
        for request in requests:
            engine.add(request)          # each says defer_call(engine.enter, None)
    # engine.enter(None) has run here, once

Inside a section ``defer_call`` remembers a function and its argument unless the same pair is there already; the
end of the outermost section calls them in the order in which they came first. Outside a section it calls at once.
Sections are per thread. The list is taken away before the first call, so a deferred function that opens a section
of its own starts an empty list and nothing runs twice.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from bottomhalf.host.threads import Local


class _Section(Local):
    """The section of one thread; also the context manager, for a class costs least to enter."""

    def __init__(self) -> None:
        self.depth = 0
        self.calls: dict[tuple[Callable[[Any], object], Any], None] = {}

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.depth -= 1
        if self.depth == 0 and self.calls:
            self._flush()

    def _flush(self) -> None:
        """All calls are made even if some raise; the first exception then goes out."""
        calls, self.calls = self.calls, {}
        first: Exception | None = None
        for function, argument in calls:
            try:
                function(argument)
            except Exception as error:
                first = first or error
        if first is not None:
            raise first


_section = _Section()


def deferred() -> _Section:
    """A context manager: calls given to defer_call() inside run once, at the end of the outermost section."""
    return _section


def defer_call(function: Callable[[Any], object], argument: Any) -> None:
    """Call ``function(argument)`` at the end of the section, or now if there is none.

    Both are compared by equality and must be hashable. Callable from any thread; sections are per thread."""
    section = _section
    if section.depth:
        section.calls[(function, argument)] = None
    else:
        function(argument)
