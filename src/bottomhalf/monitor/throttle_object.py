# SPDX-License-Identifier: Apache-2.0
"""Throttle groups as objects: ``throttle-group`` makes one, and its limits can be changed while requests wait.

The class stands here because it needs the graph, of which the object tree's floor knows nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from bottomhalf.block import BlockError, Graph
from bottomhalf.block.throttling import Limits, ThrottleGroup, throttle_groups
from bottomhalf.qom import QomError
from bottomhalf.qom.object import Property, QomObject, UserCreatable
from bottomhalf.qom.tree import Tree
from bottomhalf.qom.values import integer, record

NAMES: Final = tuple(Limits().to_options())

_limits = record(dict.fromkeys(NAMES, integer))


def _single(name: str) -> Property:
    """A limit by itself, as command lines may give it; not to be changed later."""

    def get(found: ThrottleGroupObject) -> int:
        return found.limits().to_options()[name]

    def set(found: ThrottleGroupObject, value: Any) -> None:
        if found.group is not None:
            raise QomError("Property cannot be set after initialization")
        if integer(value, f"x-{name}") < 0:
            raise QomError("Property values cannot be negative")
        found.singles[name] = value

    return Property("int", get, set)


class ThrottleGroupObject(QomObject, UserCreatable, name="throttle-group"):
    """Limits that several nodes share."""

    properties: ClassVar[dict[str, Property]] = {
        "limits": Property(
            "ThrottleLimits", lambda found: found.limits().to_options(), lambda found, value: found.change(value)
        ),
        **{f"x-{name}": _single(name) for name in NAMES},
    }

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, int] = {}  # before it is complete
        self.singles: dict[str, int] = {}
        self.group: ThrottleGroup | None = None
        self._graph: Graph | None = None

    def limits(self) -> Limits:
        return Limits() if self.group is None else self.group.limits

    def change(self, value: Any) -> None:
        """Other limits; what is not named stays."""
        given = _limits(value, "limits")
        if self.group is None:
            self.given = given
            return
        try:
            self.group.set_limits(Limits.from_options(given, self.group.limits))
        except BlockError as error:
            raise QomError(str(error)) from error

    def complete(self, tree: Tree) -> None:
        graph = tree.graph
        assert isinstance(graph, Graph)
        try:
            self.group = throttle_groups(graph).create(self.name, Limits.from_options({**self.singles, **self.given}))
        except BlockError as error:
            raise QomError(str(error)) from error
        self._graph = graph

    def can_be_deleted(self) -> bool:
        return self.group is None or not self.group.members

    def finalize(self) -> None:
        if self.group is not None and not self.group.members:
            assert self._graph is not None
            throttle_groups(self._graph).delete(self.name)
