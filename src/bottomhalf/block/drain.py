# SPDX-License-Identifier: Apache-2.0
"""Drained sections: a time in which nothing is in flight at some nodes and nothing new arrives.

Facts that shape it:

* While a section waits, anything may run: owners learn of the end of their requests, and some of them change the
  graph. Therefore no callback of begin and end may wait. All nodes are quieted first, then there is one wait for all of
  them, which asks anew each time who is above; what a section has to end is what it has begun, not what it finds.
* A node is quieted by quieting its parents, at most once per edge, up to those who send: so children need not be asked,
  for nothing new is sent down to them.
* A coroutine must not poll. It leaves a bottom half in the main context, which does the work, and suspends. The same
  holds for another thread, which may not wait for the main one except so.
* A user must not wait for himself: a request that is in flight may not wait for a section of its own node. Nobody can
  find that out for him, but the wait says which node it is that does not become quiet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from bottomhalf.aio import Coroutine, WrongContext, current, suspend, wait_while
from bottomhalf.aio.coroutine import Waitable, in_coroutine
from bottomhalf.block.changes import below

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node

NAMED_MAX: Final = 4  # nodes that a wait names
T = TypeVar("T")


def in_flight_above(nodes: Iterable[Node]) -> bool:
    """Whether the nodes or any users above them have something in flight."""
    from bottomhalf.block.node import Node

    open_ends = list(nodes)
    seen = set(open_ends)
    while open_ends:
        node = open_ends.pop()
        if node.in_flight > 0:
            return True
        for edge in node.parents:
            parent = edge.parent
            if not isinstance(parent, Node):
                if parent.parent_drained_poll():
                    return True
            elif parent not in seen:
                seen.add(parent)
                open_ends.append(parent)
    return False


def check_plain_main(graph: Graph, what: str) -> None:
    """WrongContext outside the main thread and in coroutines."""
    if in_coroutine():
        raise WrongContext(f"coroutine {current().name} would {what}, which may wait; await graph.co_run(...) instead")
    if not graph.context.is_home:
        raise WrongContext(f"only the main thread may {what}; a coroutine of another one awaits graph.co_run(...)")


class Section:
    """A drained section from begin() to end(). Main thread, outside coroutines."""

    __slots__ = ("_all", "_graph", "_nodes")

    def __init__(self, graph: Graph, nodes: Iterable[Node], *, everything: bool = False) -> None:
        self._graph = graph
        self._nodes = list(dict.fromkeys(nodes))
        self._all = everything

    def begin(self) -> None:
        """Quiet the nodes, then wait until nothing is in flight. If that fails, nothing is drained."""
        graph, nodes = self._graph, self._nodes
        check_plain_main(graph, "drain")
        if self._all:
            graph.drained_all_sections += 1
        self._nodes = []
        try:
            for node in nodes:
                self._nodes.append(node)
                node.quiesce()
            foreign = any(node.context is not graph.context for node in nodes) or self._all
            wait_while(None if foreign else graph.context, self._busy, what=self._what())
        except BaseException:
            self.end()
            raise

    def _busy(self) -> bool:
        if self._all:
            graph = self._graph
            return in_flight_above(graph.nodes.values()) or any(each.parent_drained_poll() for each in graph.backends)
        return in_flight_above(self._nodes)

    def end(self) -> None:
        nodes = self._nodes
        if self._all:
            self._graph.drained_all_sections -= 1
            # Nodes that were made meanwhile were born into the section.
            nodes = list(dict.fromkeys([*nodes, *self._graph.nodes.values()]))
        self._nodes = []
        for node in nodes:
            node.unquiesce()

    def _what(self) -> str:
        if self._all:
            return "requests in flight anywhere"
        names = ", ".join(node.describe() for node in self._nodes[:NAMED_MAX])
        more = len(self._nodes) - NAMED_MAX
        return f"requests in flight at {names}" + (f" and {more} more" if more > 0 else "")


def section(graph: Graph, nodes: Iterable[Node], subtree: bool) -> Section:
    """A section of the nodes, with all below them if ``subtree``; not begun yet."""
    nodes = list(nodes)
    if subtree:
        nodes = [each for node in nodes for each in below(node)]
    return Section(graph, nodes)


@contextmanager
def drained(drain: Section) -> Iterator[None]:
    """Plain code inside a section."""
    drain.begin()
    try:
        yield
    finally:
        drain.end()


class CoDrained:
    """``async with``: a drained section of a coroutine, of any context. The main context's bottom halves begin and end
    it."""

    __slots__ = ("_graph", "_make", "_section")

    def __init__(self, graph: Graph, make: Callable[[], Section]) -> None:
        self._graph = graph
        self._make = make
        self._section: Section | None = None

    async def __aenter__(self) -> None:
        def begin() -> None:
            section = self._make()
            section.begin()
            self._section = section

        await co_run(self._graph, begin, "a drained section")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        section = self._section
        assert section is not None
        if kind is not GeneratorExit:  # then it is thrown away half done, and cannot wait
            await co_run(self._graph, section.end, "the end of a drained section")
        else:
            self._graph.context.schedule_oneshot(section.end)


class _InMain(Waitable):
    """What a coroutine waits for while the main thread does something for it. It cannot be taken back."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    @property
    def what(self) -> str:
        return f"{self._what}, by the main thread"


async def co_run(graph: Graph, callback: Callable[[], T], what: str) -> T:
    """Let the main thread call ``callback()``, which may wait, in a bottom half of the main context; what it returns
    or raises. From a coroutine of any context. That the main thread is waiting itself is no obstacle, unless it waits
    for this very coroutine to do something before."""
    me: Coroutine = current()
    outcome: list[Any] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            outcome.append(callback())
        except Exception as error:
            failure.append(error)
        me.context.wake(me)

    graph.context.schedule_oneshot(run)
    await suspend(_InMain(what))
    if failure:
        raise failure[0]
    result: T = outcome[0]
    return result
