# SPDX-License-Identifier: Apache-2.0
"""Run a part of CPython's own tests of asyncio, with the stock loop or with ours, and print how each test ended.

    python -m tests.aio.asyncio_suite ours test_streams

The tests are the interpreter's (``test.test_asyncio``); nothing of them is here. They make loops in three ways: by
asyncio.new_event_loop(), by asyncio.SelectorEventLoop(), and by runners. All three end in the class that is put in
the place of the stock one here. Tests that make loops for each selector of the standard library get ours in the place
of the epoll one; those of the other selectors are not about us."""

from __future__ import annotations

import asyncio
import asyncio.unix_events
import importlib
import json
import selectors
import sys
import unittest
from typing import Any

from bottomhalf.aio.asyncio_loop import AioEventLoop

made = 0
Stock: Any = asyncio.SelectorEventLoop
OURS_INSTEAD = (type(None), selectors.EpollSelector)


class Ours(AioEventLoop):
    """Counts, so that a run in which nobody asked for a loop is not taken for one that passed."""

    def __new__(cls, selector: Any = None) -> Any:
        return super().__new__(cls) if isinstance(selector, OURS_INSTEAD) else Stock(selector)

    def __init__(self, selector: Any = None) -> None:
        global made
        made += 1
        if selector is not None:
            selector.close()
        super().__init__()


def install() -> None:
    """Every new loop is ours."""
    asyncio.SelectorEventLoop = Ours  # type: ignore[misc]
    asyncio.unix_events.SelectorEventLoop = Ours  # type: ignore[attr-defined]
    if hasattr(asyncio, "EventLoop"):
        asyncio.EventLoop = Ours  # type: ignore[misc]
    for name in ("_UnixDefaultEventLoopPolicy", "_DefaultEventLoopPolicy"):
        policy = getattr(asyncio.unix_events, name, None)
        if policy is not None:
            policy._loop_factory = Ours


class Result(unittest.TestResult):
    """Remembers how each test ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, str] = {}

    def _end(self, test: Any, how: str) -> None:
        name = test.id()
        if self.ends.get(name) not in ("failed", "error"):
            self.ends[name] = how

    def addSuccess(self, test: Any) -> None:
        self._end(test, "passed")

    def addSkip(self, test: Any, reason: str) -> None:
        self._end(test, "skipped")

    def addFailure(self, test: Any, err: Any) -> None:
        self._end(test, "failed")
        print(self._exc_info_to_string(err, test), file=sys.stderr)  # type: ignore[attr-defined]

    def addError(self, test: Any, err: Any) -> None:
        self._end(test, "error")
        print(self._exc_info_to_string(err, test), file=sys.stderr)  # type: ignore[attr-defined]

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self._end(test, "passed")

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._end(test, "failed")
            print(self._exc_info_to_string(err, test), file=sys.stderr)  # type: ignore[attr-defined]


def main(loop: str, parts: list[str]) -> None:
    if loop == "ours":
        install()
    for part in parts:
        module = importlib.import_module(f"test.test_asyncio.{part}")
        result = Result()
        unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
        print(json.dumps({"part": part, "loops": made, "ends": result.ends}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
