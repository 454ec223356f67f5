# SPDX-License-Identifier: Apache-2.0
"""Events that come in floods: the first at once, the newest at the end of each interval, each source by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import pytest

from bottomhalf.monitor import events
from bottomhalf.monitor.events import INTERVAL_NS, LIMITED
from bottomhalf.qapi.types import EVENTS, Doc, EventType
from tests.monitor.qmp_bench import QmpBench, QmpClient

SECOND_NS = 1_000_000_000


class Flood(EventType, name="TEST_FLOOD"):
    """An event of the test's."""

    device: Annotated[str, Doc("where")]
    number: Annotated[int, Doc("which")]


del EVENTS["TEST_FLOOD"]


@pytest.fixture(autouse=True)
def _limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(LIMITED, "TEST_FLOOD", ("device",))
    yield


def seen(client: QmpClient) -> list[tuple[str, int]]:
    return [(each["data"]["device"], each["data"]["number"]) for each in client.events]


def wait_ns(bench: QmpBench, duration_ns: int) -> None:
    over: list[bool] = []
    bench.storage.loop.timer(lambda: over.append(True)).arm_ns(bench.context.now_ns() + duration_ns)
    bench.until(lambda: over, "the time")
    bench.settle()


def test_floods(seed: int) -> None:
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        for number in range(5):
            bench.storage.emit(Flood(device="a", number=number))
            bench.storage.emit(Flood(device="b", number=number))
        bench.settle()
        assert seen(client) == [("a", 0), ("b", 0)]
        wait_ns(bench, INTERVAL_NS + SECOND_NS // 10)
        assert sorted(seen(client)[2:]) == [("a", 4), ("b", 4)]
        bench.storage.emit(Flood(device="a", number=9))
        wait_ns(bench, SECOND_NS // 10)
        assert len(client.events) == 4, "the interval after the one that was kept is not over"
        wait_ns(bench, 3 * INTERVAL_NS)
        assert seen(client)[4:] == [("a", 9)]
        bench.storage.emit(Flood(device="a", number=10))
        bench.settle()
        assert seen(client)[5:] == [("a", 10)]


def test_more_sources_than_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEYS_MAX", 3)
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()
        for number in range(20):
            bench.storage.emit(Flood(device=f"d{number}", number=number))
        bench.settle()
        assert seen(client) == [("d0", 0), ("d1", 1), ("d2", 2), ("d3", 3)]
        wait_ns(bench, INTERVAL_NS + SECOND_NS // 10)
        assert seen(client)[4:] == [("d19", 19)]


def test_kept_while_a_command_waits(seed: int) -> None:
    """The timer is the outer loop's: no nested poll runs it."""
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        client.call("blockdev-add", {"driver": "null-co", "node-name": "n"})
        person = bench.hmp()
        half: list[int] = []
        bench.storage.emit(Flood(device="a", number=0))
        bench.storage.emit(Flood(device="a", number=1))
        bench.host.at(3 * INTERVAL_NS, lambda: half.append(len(client.events)))
        person.ask('qemu-io n "sleep 4000"')
        bench.settle()
        assert half == [1] and seen(client) == [("a", 0), ("a", 1)]


def test_from_another_thread(seed: int) -> None:
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        client.call("object-add", {"qom-type": "iothread", "id": "io"})
        context = bench.storage.iothread_context("io")
        for number in range(10):
            context.schedule_oneshot(lambda number=number: bench.storage.emit(Flood(device="a", number=number)))
        wait_ns(bench, 2 * INTERVAL_NS)
        assert len(client.events) == 2
