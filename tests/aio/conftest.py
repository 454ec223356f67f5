# SPDX-License-Identifier: Apache-2.0
"""A context on every host: the real one, and simulated ones of several seeds, which shuffle bottom halves,
readiness and completions."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from bottomhalf.aio import AioContext
from bottomhalf.aio.thread import own
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import SimHost

BEHAVIOUR = re.compile(r"/(aio|aio-gsource|basic|locking|thread-pool|nested-aio-poll)\b")
SEEDS_PER_TEST = 4  # one in so many of --seeds: these tests are many, and few of them leave much to chance


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--behaviours: only tests that carry the name of one of QEMU's."""
    if config.getoption("--behaviours"):
        chosen = {item for item in items if BEHAVIOUR.search(_docstring(item))}
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


def _docstring(item: pytest.Item) -> str:
    return getattr(getattr(item, "function", None), "__doc__", None) or ""


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
