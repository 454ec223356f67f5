# SPDX-License-Identifier: Apache-2.0
"""Random operations on an image beside plain bytes, as a state machine of hypothesis, which shortens what fails.

What the operations are and what they do to plain bytes is here. Who carries them out is said by a subclass: the driver
on the simulated host (``test_stateful.py``), the library and QEMU's tools (``tests/peers/test_qcow2_stateful.py``).
"""

from __future__ import annotations

import os
from typing import Any, Final

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

SOAK: Final = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
CLUSTERS: Final = 40
SNAPSHOTS_MOST: Final = 3

SHAPES: Final[list[dict[str, Any]]] = [
    {"cluster_size": 512},
    {"cluster_size": 4096},
    {"cluster_size": 512, "version": 2},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 512, "refcount_bits": 1},
    {"cluster_size": 4096, "refcount_bits": 2},
    {"cluster_size": 512, "refcount_bits": 64, "lazy_refcounts": True},
    {"cluster_size": 4096, "compression_type": "zstd", "preallocation": "metadata"},
    {"cluster_size": 512, "data_file": "data.raw"},
    {"cluster_size": 4096, "data_file": "data.raw", "data_file_raw": True},
    {"cluster_size": 4096, "backing_file": "base.raw", "backing_fmt": "raw"},
    {"cluster_size": 16384, "extended_l2": True, "backing_file": "base.raw", "backing_fmt": "raw"},
    {"cluster_size": 512, "version": 2, "backing_file": "base.raw", "backing_fmt": "raw"},
]

offsets = st.integers(0, 1 << 20)
lengths = st.sampled_from((0.001, 0.3, 0.5, 1, 1.25, 2, 5))  # in clusters
bytes_ = st.integers(1, 255)


def settings(examples: int, steps: int) -> hypothesis.settings:
    """So many in CI, always the same ones; in a soak forty times as many, always others."""
    return hypothesis.settings(
        max_examples=examples * (40 if SOAK else 1),
        stateful_step_count=steps,
        derandomize=not SOAK,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


class Machine(RuleBasedStateMachine):
    """Operations, and what they mean for plain bytes. ``carry_out`` and ``look`` are for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.model = bytearray()
        self.snapshots: dict[str, bytes] = {}
        self.made = 0

    # -- for subclasses

    def make(self, size: int, base: bytes) -> None:
        """A new image of the shape; ``base``: what its backing file has."""
        raise NotImplementedError

    def carry_out(self, what: str, *arguments: Any) -> bool:
        """Do it; whether it was done, or could not be (for counters that are too narrow)."""
        raise NotImplementedError

    def look(self) -> bytes:
        """All of the disk."""
        raise NotImplementedError

    def can_squeeze(self, cluster: int) -> bool:
        """Whether it may be written compressed."""
        return True

    # -- the operations

    @initialize(shape=st.sampled_from(SHAPES), odd=st.booleans())
    def begin(self, shape: dict[str, Any], odd: bool) -> None:
        self.shape = shape
        self.cluster: int = shape["cluster_size"]
        size = CLUSTERS * self.cluster - (512 if odd else 0)
        base = b""
        if "backing_file" in shape:
            base = bytes(n // 512 % 255 + 1 for n in range(30 * self.cluster))
        self.make(size, base)
        self.model = bytearray(base[:size].ljust(size, b"\0"))

    def _range(self, offset: int, length: float) -> tuple[int, int]:
        size = min(max(int(length * self.cluster), 1), len(self.model))
        return offset % (len(self.model) - size + 1), size

    def _clusters(self, offset: int, length: float) -> tuple[int, int]:
        """Whole clusters, or to the disk's end."""
        start = offset // 7 % -(-len(self.model) // self.cluster) * self.cluster
        return start, min(max(int(length), 1) * self.cluster, len(self.model) - start)

    @rule(offset=offsets, length=lengths, byte=bytes_, fua=st.booleans())
    def write(self, offset: int, length: float, byte: int, fua: bool) -> None:
        start, count = self._range(offset, length)
        self.carry_out("write", start, count, byte, fua)
        self.model[start : start + count] = bytes([byte]) * count

    @rule(offset=offsets, length=lengths, byte=bytes_)
    def write_compressed(self, offset: int, length: float, byte: int) -> None:
        start, count = self._clusters(offset, length)
        places = range(start // self.cluster, -(-(start + count) // self.cluster))
        if "data_file" in self.shape or not all(map(self.can_squeeze, places)):
            return
        self.carry_out("squeeze", start, count, byte)
        self.model[start : start + count] = bytes([byte]) * count

    @rule(offset=offsets, length=lengths, unmap=st.booleans())
    def zero(self, offset: int, length: float, unmap: bool) -> None:
        start, count = self._range(offset, length)
        self.carry_out("zero", start, count, unmap)
        self.model[start : start + count] = bytes(count)

    @rule(offset=offsets, length=lengths)
    def discard(self, offset: int, length: float) -> None:
        start, count = self._clusters(offset, length)
        self.carry_out("discard", start, count)
        if self.shape.get("version") != 2 or "backing_file" not in self.shape:
            self.model[start : start + count] = bytes(count)

    @rule()
    def flush(self) -> None:
        self.carry_out("flush")

    @rule()
    def reopen(self) -> None:
        self.carry_out("reopen")

    @precondition(lambda self: "data_file" not in self.shape and len(self.snapshots) < SNAPSHOTS_MOST)
    @rule()
    def snapshot(self) -> None:
        self.made += 1
        if self.carry_out("snapshot", str(self.made)):
            self.snapshots[str(self.made)] = bytes(self.model)

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, SNAPSHOTS_MOST - 1))
    def apply(self, which: int) -> None:
        name = list(self.snapshots)[which % len(self.snapshots)]
        if self.carry_out("apply", name):
            self.model = bytearray(self.snapshots[name])

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, SNAPSHOTS_MOST - 1))
    def forget(self, which: int) -> None:
        name = list(self.snapshots)[which % len(self.snapshots)]
        self.carry_out("forget", name)
        del self.snapshots[name]

    @precondition(lambda self: not (self.shape.get("version") == 2 and self.snapshots))
    @rule(clusters=st.integers(CLUSTERS // 2, 2 * CLUSTERS))
    def resize(self, clusters: int) -> None:
        """To whole clusters: QEMU leaves something behind the end of a disk that ends within one."""
        size = clusters * self.cluster
        self.carry_out("resize", size)
        del self.model[size:]
        self.model += bytes(size - len(self.model))

    @invariant()
    def same(self) -> None:
        if self.model:
            seen = self.look()
            assert len(seen) == len(self.model)
            assert seen == self.model, next(n for n, byte in enumerate(seen) if byte != self.model[n])
