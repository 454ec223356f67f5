# SPDX-License-Identifier: Apache-2.0
"""A context on every host: the real one, and simulated ones of several seeds, which shuffle bottom halves,
readiness and completions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bottomhalf.aio import AioContext
from bottomhalf.aio.thread import own
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import SimHost
from tests.hosts import host, pytest_generate_tests, sim

__all__ = ["host", "pytest_generate_tests", "sim"]


@pytest.fixture
def context(host: Host) -> Iterator[AioContext]:
    made = AioContext(host)
    yield made
    made.close()


@pytest.fixture
def sim_context(sim: SimHost) -> Iterator[AioContext]:
    made = AioContext(sim)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _fresh_thread() -> Iterator[None]:
    """What a test leaves open, perhaps on purpose, is not the next one's."""
    own.state.contexts.clear()
    yield
    own.state.contexts.clear()
    assert own.state.depth == 0 and own.state.coroutine is None
