# SPDX-License-Identifier: Apache-2.0
"""Event loops as objects: ``iothread`` makes one, ``main-loop`` is the handle of the one that is there already.

Their numbers can be changed while they run: what is set reaches the context at once.
"""

from __future__ import annotations

from typing import Any, ClassVar

from bottomhalf.aio import AioContext, IOThread
from bottomhalf.aio.context import POLL_MAX_NS
from bottomhalf.aio.thread_pool import THREADS_LIMIT, THREADS_MAX
from bottomhalf.qom.object import Property, QomObject, UserCreatable
from bottomhalf.qom.tree import Tree
from bottomhalf.qom.values import QomError, not_negative


def _number(name: str) -> Property:
    def get(loop: EventLoopBase) -> int:
        return loop.numbers[name]

    def set(loop: EventLoopBase, value: Any) -> None:
        loop.change(name, not_negative(value, name))

    return Property("int", get, set)


class EventLoopBase(QomObject, name="event-loop-base", abstract=True):
    """What all event loops have."""

    properties: ClassVar[dict[str, Property]] = {
        name: _number(name) for name in ("thread-pool-max", "aio-max-batch", "thread-pool-min")
    }

    def __init__(self) -> None:
        super().__init__()
        self.numbers = {"aio-max-batch": 0, "thread-pool-min": 0, "thread-pool-max": THREADS_MAX}
        self.context: AioContext | None = None  # once it is complete

    def change(self, name: str, value: int) -> None:
        before = self.numbers[name]
        self.numbers[name] = value
        if self.context is None:
            return  # judged when everything is set
        try:
            self.apply()
        except QomError:
            self.numbers[name] = before
            raise

    def apply(self) -> None:
        """Have the context work by the numbers. QomError if they make no sense together."""
        self.check()
        context = self.context
        assert context is not None

        def tell() -> None:
            least, most = self.numbers["thread-pool-min"], self.numbers["thread-pool-max"]
            context.thread_pool.set_limits(min(least, THREADS_LIMIT), min(most, THREADS_LIMIT))

        if context.is_home:
            tell()
        else:
            context.schedule_oneshot(tell)

    def check(self) -> None:
        least, most = self.numbers["thread-pool-min"], self.numbers["thread-pool-max"]
        if most == 0 or least > most:
            raise QomError("bad thread-pool-min/thread-pool-max values")


class Iothread(EventLoopBase, UserCreatable, name="iothread"):
    """A thread with a context of its own."""

    properties: ClassVar[dict[str, Property]] = {
        name: _number(name) for name in ("poll-shrink", "poll-grow", "poll-max-ns")
    }

    def __init__(self) -> None:
        super().__init__()
        self.numbers |= {"poll-max-ns": POLL_MAX_NS, "poll-grow": 0, "poll-shrink": 0}
        self.thread: IOThread | None = None

    def complete(self, tree: Tree) -> None:
        self.check()
        self.thread = IOThread(self.name, tree.host, *self._polling())
        self.context = self.thread.context
        self.context.exception_handler = tree.exception_handler
        if (self.numbers["thread-pool-min"], self.numbers["thread-pool-max"]) != (0, THREADS_MAX):
            super().apply()

    def _polling(self) -> tuple[int, int, int]:
        return self.numbers["poll-max-ns"], self.numbers["poll-grow"], self.numbers["poll-shrink"]

    def change(self, name: str, value: int) -> None:
        super().change(name, value)
        if self.thread is not None and name.startswith("poll-"):
            self.thread.set_poll_params(*self._polling())

    def apply(self) -> None:
        self.check()
        if self.thread is not None and self.context is not None:
            super().apply()

    def finalize(self) -> None:
        if self.thread is not None:
            self.thread.stop()


class MainLoopObject(EventLoopBase, UserCreatable, name="main-loop"):
    """The main context. There is one at most, and it stays."""

    def complete(self, tree: Tree) -> None:
        self.check()
        if len(tree.user_objects(MainLoopObject)) > 1:
            raise QomError("only one main-loop instance allowed")
        assert tree.main is not None
        self.context = tree.main
        if (self.numbers["thread-pool-min"], self.numbers["thread-pool-max"]) != (0, THREADS_MAX):
            self.apply()

    def can_be_deleted(self) -> bool:
        return False


