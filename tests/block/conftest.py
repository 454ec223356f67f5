# SPDX-License-Identifier: Apache-2.0
"""Every host for the tests that take ``host`` or ``sim``, and a thread that nothing is left in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bottomhalf.aio.thread import own
from tests.hosts import host, pytest_generate_tests, sim

__all__ = ["host", "pytest_generate_tests", "sim"]


@pytest.fixture(autouse=True)
def _fresh_thread() -> Iterator[None]:
    """What a test leaves open, perhaps on purpose, is not the next one's."""
    own.state.contexts.clear()
    yield
    own.state.contexts.clear()
    own.state.waits.clear()
