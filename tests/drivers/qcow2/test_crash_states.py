# SPDX-License-Identifier: Apache-2.0
"""Crash enumeration: after every operation, and between any two writes of it, every state that a power cut may leave.

Every prefix of the writes since the last flush, reordered within a bound and torn at 512 bytes (see ``sim.survivors``),
is opened: check finds leaks at most, everything flushed is there, the image can be written and is clean then. All
sequences of one operation and of two, and a sample of longer ones; what runs by default is a part of that, ``--soak``
all of it. The number of states, equal ones counted once, is printed at the end of the run.

To repeat one sequence: ``python -m tests.drivers.qcow2.test_crash_states GEOMETRY SEED OPERATION...``."""

from __future__ import annotations

import errno
import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import pytest

from bottomhalf.drivers.qcow2.counters import Counters
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.switching import Switch
from bottomhalf.host.request import FLUSH, WRITE
from tests.drivers.qcow2.bench import check
from tests.drivers.qcow2.crash_operations import OPERATIONS, PREPARATIONS
from tests.drivers.qcow2.crash_states import EXPLORED, IMAGE, Explorer, Geometry

K: Final = 512
SNAPSHOTS: Final = frozenset(("snapshot", "revert", "forget"))
LONGEST: Final = 8  # operations of a sampled sequence

# Each has another size or header, so that states of one are none of another.
GEOMETRIES: Final[dict[str, Geometry]] = {
    "small": Geometry({"cluster_size": K, "size": 80 * K}, prepare=("fill",)),
    "snapshot": Geometry({"cluster_size": K, "size": 76 * K}, prepare=("fill", "snapshot")),
    "one bit": Geometry({"cluster_size": K, "size": 80 * K, "refcount_bits": 1}, prepare=("fill",), without=SNAPSHOTS),
    "block full": Geometry({"cluster_size": K, "size": 127 * K, "refcount_bits": 64}, prepare=("fill", "most")),
    "backing": Geometry({"cluster_size": K, "size": 72 * K}, prepare=("fill",), backing=bytes(range(1, 251)) * 200),
    "lazy": Geometry({"cluster_size": K, "size": 80 * K, "lazy_refcounts": True}, prepare=("fill",)),
    "small cache": Geometry({"cluster_size": K, "size": 260 * K}, {"l2-cache-size": 1024}, prepare=("fill",)),
    "keeps discarded": Geometry({"cluster_size": K, "size": 84 * K}, {"discard-no-unref": True}, prepare=("fill",)),
    "data file": Geometry(
        {"cluster_size": K, "size": 80 * K, "data_file": "data.raw"},
        prepare=("fill",),
        without=SNAPSHOTS | {"squeeze"},
    ),
    "raw data file": Geometry(
        {"cluster_size": K, "size": 80 * K, "data_file": "data.raw", "data_file_raw": True},
        prepare=("fill",),
        without=SNAPSHOTS | {"squeeze"},
    ),
    "version 2": Geometry({"cluster_size": 4096, "size": 20 * 4096, "version": 2}, prepare=("fill",)),
    "extended": Geometry({"cluster_size": 16384, "size": 8 * 16384, "extended_l2": True}, prepare=("fill",)),
}
# The refcount table is full as well, which takes 4,096 clusters: a file of two megabytes in each state.
TABLE_FULL: Final = Geometry(
    {"cluster_size": K, "size": 4036 * K, "refcount_bits": 64},
    {"l2-cache-size": 1 << 20, "refcount-cache-size": 1 << 20},
    prepare=("fill", "most"),
)
GROWING: Final = ("allocate", "far", "touch", "grow", "squeeze")


@dataclass(frozen=True)
class Form:
    """How much of a geometry is explored."""

    samples: int  # sequences of 3 to LONGEST operations
    least: int  # states, or the test fails
    reorder: int = 3


SHORT: Final[dict[str, Form]] = {
    **dict.fromkeys(GEOMETRIES, Form(5, 200)),
    **dict.fromkeys(("one bit", "data file", "raw data file"), Form(5, 120)),
    "version 2": Form(0, 200, reorder=2),
    "extended": Form(0, 250, reorder=2),
}
LONG: Final[dict[str, Form]] = {
    "small": Form(360, 11_000),
    "snapshot": Form(360, 13_000),
    "one bit": Form(360, 10_000),
    "block full": Form(360, 12_000),
    "backing": Form(360, 11_000),
    "lazy": Form(360, 9_500),
    "small cache": Form(360, 12_000),
    "keeps discarded": Form(360, 10_500),
    "data file": Form(350, 7_500),
    "raw data file": Form(350, 6_500),
    "version 2": Form(20, 11_500, reorder=2),
    "extended": Form(0, 5_000, reorder=1),
}


def explorer_of(geometry: Geometry, reorder: int = 3) -> Explorer:
    return Explorer(geometry, OPERATIONS, PREPARATIONS, reorder=reorder)


def operations_of(geometry: Geometry) -> list[str]:
    return [name for name in OPERATIONS if name not in geometry.without]


def sequences_of(operations: Sequence[str], depth: int) -> list[tuple[str, ...]]:
    """All up to a length."""
    return [each for n in range(1, depth + 1) for each in itertools.product(operations, repeat=n)]


def explore(name: str, form: Form, depth: int) -> None:
    """All sequences up to a length, and a sample of longer ones; each on a host with a seed of its own."""
    geometry = GEOMETRIES[name]
    explorer = explorer_of(geometry, form.reorder)
    operations = operations_of(geometry)
    sequences = sequences_of(operations, depth)
    chance = random.Random(name)
    sequences += [tuple(chance.choices(operations, k=chance.randint(3, LONGEST))) for _ in range(form.samples)]
    for seed, sequence in enumerate(sequences):
        explorer.run(sequence, seed)
    EXPLORED.setdefault(name, set()).update(explorer.states)
    assert len(explorer.states) >= form.least


@pytest.mark.parametrize("name", GEOMETRIES)
def test_short_sequences(name: str) -> None:
    explore(name, SHORT[name], 1)


@pytest.mark.soak
@pytest.mark.parametrize("name", GEOMETRIES)
def test_all_pairs_and_longer_sequences(name: str) -> None:
    explore(name, LONG[name], 2)


@pytest.mark.soak
def test_the_refcount_table_grows() -> None:
    """And blocks and L1 with it; and then something more is done."""
    explorer = explorer_of(TABLE_FULL, 2)
    for seed, sequence in enumerate(itertools.product(GROWING, GROWING)):
        explorer.run(sequence, seed)
    explorer.reorder = 1
    explorer.run(("snapshot", "touch"))
    EXPLORED.setdefault("table full", set()).update(explorer.states)
    assert len(explorer.states) > 200
    assert Header.parse(explorer.last_image).refcount_table_clusters > 1


# What may free more clusters than are counted down with one commit.
FREEING: Final = ("forget", "revert", "shrink", "each-table", "zero")


def explore_in_slices(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit after every other cluster, as if a disk had many."""
    monkeypatch.setattr(Counters, "freed_max", 2)
    for name in ("snapshot", "lazy"):
        explorer = explorer_of(GEOMETRIES[name])
        for seed, sequence in enumerate(sequences_of(FREEING, depth)):
            explorer.run(("snapshot", *sequence), seed)
        EXPLORED.setdefault(f"{name}, in slices", set()).update(explorer.states)
        assert len(explorer.states) >= 50


def test_many_clusters_are_freed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    explore_in_slices(1, monkeypatch)


@pytest.mark.soak
def test_many_clusters_are_freed_in_slices_by_two_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    explore_in_slices(2, monkeypatch)


# Not "squeeze": of what a failed flush has lost nothing can be unpacked.
FAILING: Final = ("snapshot", "forget", "revert", "grow", "shrink", "each-table", "zero")


@pytest.mark.parametrize("op", [WRITE, FLUSH])
@pytest.mark.parametrize("geometry, name", [("small", "snapshot"), ("snapshot", "forget")])
def test_a_failure_and_then_a_power_cut(geometry: str, name: str, op: int) -> None:
    """One write or flush of an operation fails; the disk goes on being used, and then the power goes."""
    fail_everywhere(geometry, name, op, 1)


@pytest.mark.parametrize("geometry, name", [("small", "snapshot"), ("snapshot", "forget")])
def test_a_failure_and_then_a_power_cut_is_seen(geometry: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is the header that could not be written, the other of the two states in memory would be the wrong one."""
    original = Switch.turn

    async def the_other_way(self: Switch, *given: Any, forward: bool) -> None:
        await original(self, *given, forward=not forward)

    monkeypatch.setattr(Switch, "turn", the_other_way)
    with pytest.raises(AssertionError, match="has other content"):
        for op in (WRITE, FLUSH):
            fail_everywhere(geometry, name, op, 1)


@pytest.mark.soak
@pytest.mark.parametrize("op", [WRITE, FLUSH])
@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("geometry", ["small", "snapshot", "version 2", "backing"])
def test_failures_and_then_a_power_cut(geometry: str, name: str, op: int) -> None:
    fail_everywhere(geometry, name, op, 2)


def fail_everywhere(geometry: str, name: str, op: int, reorder: int) -> None:
    explorer = explorer_of(GEOMETRIES[geometry], reorder)
    for position in itertools.count():
        explorer.begin(position)
        explorer.step, explorer.current = 1, name
        fault = explorer.host.fault(op=op, errno=errno.EIO, after=position, times=1)
        try:
            OPERATIONS[name](explorer)
            OPERATIONS["flush"](explorer)
        except OSError as error:
            assert error.errno == errno.EIO
            explorer.guess(is_lost=op == FLUSH)
        if not fault.hits:
            break
        for explorer.step, explorer.current in enumerate(("touch", "into", "allocate", "flush"), 2):
            OPERATIONS[explorer.current](explorer)
            explorer.look()
        explorer.disk.close()
        found = check(explorer.host, IMAGE)
        assert not found.corruptions and not found.check_errors, found.findings
    assert position or not explorer.ledger.snapshots, "nothing has failed"
    EXPLORED.setdefault(f"{geometry}, with failures", set()).update(explorer.states)


def test_so_many_states() -> None:
    """What the tests above may not fall below is what was promised."""
    assert sum(form.least for form in SHORT.values()) >= 2_000
    assert sum(form.least for form in LONG.values()) >= 100_000


if __name__ == "__main__":
    explorer = explorer_of(GEOMETRIES[sys.argv[1]])
    explorer.run(sys.argv[3:], int(sys.argv[2]))
    print(f"{len(explorer.states)} states, {dict(explorer.counts)}")
