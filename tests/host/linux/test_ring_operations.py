# SPDX-License-Identifier: Apache-2.0
"""What a ring can do beside transfers."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from bottomhalf.host.linux import ring_operations
from bottomhalf.host.linux.ring import Ring
from bottomhalf.host.linux.ring_operations import cancel, poll, refused, splice, timeout

pytestmark = pytest.mark.needs("io_uring")
SECOND = 1_000_000_000


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring(8)
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


def collect(ring: Ring, count: int) -> dict[int, int]:
    return ring_operations._collect(ring, count)


def test_a_copy_through_a_pipe(ring: Ring, pipe: tuple[int, int], tmp_path: Path) -> None:
    """File to pipe to file, in a row, with one entry into the kernel."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(200)) * 40)
    with open(source, "rb") as there, open(target, "w+b") as here:
        splice(ring, 0, there.fileno(), 1000, pipe[1], -1, 4000, link=True)
        splice(ring, 1, pipe[0], -1, here.fileno(), 512, 4000)
        assert collect(ring, 2) == {0: 4000, 1: 4000}
    assert target.read_bytes() == bytes(512) + source.read_bytes()[1000:5000]


def test_what_falls_short_ends_the_row(ring: Ring, pipe: tuple[int, int], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"short")
    with open(source, "rb") as there:
        splice(ring, 0, there.fileno(), 0, pipe[1], -1, 4000, link=True)
        held = timeout(ring, 1, 0)
        assert collect(ring, 2) == {0: 5, 1: -errno.ECANCELED}
    assert held and os.read(pipe[0], 10) == b"short"


def test_an_event_is_over_when_its_completion_is_taken(ring: Ring, pipe: tuple[int, int]) -> None:
    """Also when something else entered the kernel in between: a loop would turn once more for nothing."""
    poll(ring, 0, pipe[0], select.POLLIN)
    ring.enter()
    os.write(pipe[1], b"x")
    event = select.poll()
    event.register(ring.fileno(), select.POLLIN)
    assert event.poll(10_000)
    timeout_later = timeout(ring, 1, 60 * SECOND)
    ring.enter()
    ring.clear_event()
    assert ring.completions()[0] == [0] and timeout_later
    assert not event.poll(0)


def test_time(ring: Ring) -> None:
    held = timeout(ring, 3, 1000)
    assert collect(ring, 1) == {3: -errno.ETIME}
    with pytest.raises(ValueError):
        timeout(ring, 3, -1)
    assert held


def test_a_link_that_takes_too_long(ring: Ring, pipe: tuple[int, int]) -> None:
    poll(ring, 0, pipe[0], select.POLLIN, link=True)
    held = timeout(ring, 1, 1000, of_link=True)
    results = collect(ring, 2)
    assert results == {0: -errno.ECANCELED, 1: -errno.ETIME} and held


def test_readiness_before_the_time_is_over(ring: Ring, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    poll(ring, 0, pipe[0], select.POLLIN, link=True)
    held = timeout(ring, 1, 60 * SECOND, of_link=True)
    assert collect(ring, 2) == {0: select.POLLIN, 1: -errno.ECANCELED} and held


def test_cancelling(ring: Ring, pipe: tuple[int, int]) -> None:
    poll(ring, 0, pipe[0], select.POLLIN)
    ring.enter()
    cancel(ring, 1, 0)
    assert collect(ring, 2) == {0: -errno.ECANCELED, 1: 0}
    cancel(ring, 1, 0)
    assert collect(ring, 1) == {1: -errno.ENOENT}


def test_what_the_kernel_refuses_is_named(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused() == []
    monkeypatch.setattr(ring_operations, "OP_SPLICE", 255)
    monkeypatch.setattr(ring_operations, "OP_ASYNC_CANCEL", 255)
    assert refused() == ["splice", "cancel"]
