# SPDX-License-Identifier: Apache-2.0
"""What stands beside a backend: the way of one user into it, and its counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bottomhalf.host.request import Request

if TYPE_CHECKING:
    from bottomhalf.block.backend import BlockBackend


@dataclass(frozen=True)
class BackendStatistics:
    """Counts since the backend was made, of requests that were admitted (indexed by op), and what is under way."""

    operations: tuple[int, ...]
    bytes: tuple[int, ...]
    failed: int
    in_flight: int
    parked: int


class Queue:
    """One user's way into a backend: who submits here is told here. Home thread of the backend's context."""

    __slots__ = ("_on_complete", "backend")

    def __init__(self, backend: BlockBackend, on_complete: Callable[[list[Request]], object]) -> None:
        self.backend = backend
        self._on_complete = on_complete

    def submit(self, requests: list[Request]) -> list[Request]:
        """Start requests of one op whose ``owner`` is this queue. Returns those that are not done yet;
        ``on_complete`` gets them later. The others have their ``result``."""
        return self.backend.submit(requests)

    def complete(self, requests: list[Request]) -> None:
        backend = self.backend
        try:
            self._on_complete(requests)
        finally:
            backend.request_ended(len(requests))
