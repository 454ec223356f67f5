# SPDX-License-Identifier: Apache-2.0
"""Clusters counted in little memory: as Counter counts them."""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.drivers.qcow2.tally import PIECE, Tally

NEAR = st.sampled_from([0, 1, 2, PIECE - 1, PIECE, PIECE + 1, 1 << 40, (1 << 55) - 1])


@given(st.lists(st.lists(NEAR | st.integers(0, (1 << 55) - 1))), NEAR)
def test_like_a_counter(rounds: list[list[int]], other: int) -> None:
    tally, model = Tally(), Counter[int]()
    for clusters in rounds:
        tally.add(clusters)
        model.update(clusters)
        assert all((each in tally) == (each in model) for each in [*model, other, other + 1])
    assert dict(chain.from_iterable(tally.pieces())) == model and Counter(tally) == model
    assert Counter(Tally(model.elements())) == model


def test_two_bytes_each() -> None:
    tracemalloc.start()
    tally = Tally(range(1 << 18))
    assert 77 in tally
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sys.getsizeof(Counter(range(1 << 18))) > 8 << 18
    assert 2 << 18 <= used < 3 << 18
