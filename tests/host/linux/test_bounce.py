# SPDX-License-Identifier: Apache-2.0
"""Buffers for requests whose own the device cannot reach: kept for the next, up to a limit."""

from __future__ import annotations

import mmap

from bottomhalf.host.linux.bounce import BUFFER_BYTES_MAX, KEPT_BYTES_MAX, BouncePool


def test_used_again() -> None:
    pool = BouncePool()
    first = pool.take(5000)
    assert first.size >= 5000 and first.address % mmap.PAGESIZE == 0
    pool.give(first)
    assert pool.kept_bytes == first.size
    assert pool.take(8192) is first and pool.kept_bytes == 0
    assert pool.take(8192) is not first
    assert pool.take(1).size == mmap.PAGESIZE


def test_no_more_is_kept_than_the_limit() -> None:
    pool = BouncePool()
    taken = [pool.take(BUFFER_BYTES_MAX) for _ in range(KEPT_BYTES_MAX // BUFFER_BYTES_MAX + 3)]
    for arena in taken:
        pool.give(arena)
    assert pool.kept_bytes == KEPT_BYTES_MAX


def test_large_ones_come_and_go() -> None:
    pool = BouncePool()
    large = pool.take(BUFFER_BYTES_MAX + 1)
    pool.give(large)
    assert pool.kept_bytes == 0 and pool.take(BUFFER_BYTES_MAX + 1) is not large
