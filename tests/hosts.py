# SPDX-License-Identifier: Apache-2.0
"""Hosts for tests that run on each: the real one, and simulated ones of several seeds, which shuffle bottom halves,
readiness, completions and threads.

A package's conftest.py imports what is here; its tests then take ``host``, or ``sim`` for simulated ones only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import SimHost

SEEDS_PER_TEST = 4  # one in so many of --seeds: these tests are many, and few of them leave much to chance


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``host`` is the real one and simulated ones; ``sim`` only simulated ones."""
    one = metafunc.config.getoption("--seed")
    count = -(-metafunc.config.getoption("--seeds") // SEEDS_PER_TEST)
    seeds = [f"sim{seed}" for seed in (range(count) if one is None else [one])]
    if "host" in metafunc.fixturenames:
        metafunc.parametrize("host", ["linux", *seeds], indirect=True)
    if "sim" in metafunc.fixturenames:
        metafunc.parametrize("sim", seeds, indirect=True)


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    name: str = request.param
    if name == "linux":
        yield LinuxHost()
    else:
        made = SimHost(int(name.removeprefix("sim")))
        yield made
        made.end_threads()


@pytest.fixture
def sim(request: pytest.FixtureRequest) -> Iterator[SimHost]:
    made = SimHost(int(request.param.removeprefix("sim")))
    yield made
    made.end_threads()
