# SPDX-License-Identifier: Apache-2.0
"""Averages over a sliding time."""

from __future__ import annotations

import random

from bottomhalf.block.throttling import TimedAverage

SECOND = 10**9


def test_timed_average() -> None:
    """/timed-average/average"""
    now_ns = 0
    average = TimedAverage(lambda: now_ns, SECOND)

    def tells(*expected: int) -> None:
        assert (average.min(), average.avg(), average.max()) == expected

    tells(0, 0, 0)
    for _ in range(2):
        for _ in range(100):
            for value in (1, 5, 2, 4, 3):
                average.account(value)
            tells(1, 3, 5)
            now_ns += SECOND // 10
        now_ns += 100 * SECOND
        tells(0, 0, 0)


def test_a_timed_average_forgets_within_the_period(seed: int) -> None:
    chance = random.Random(seed)
    now_ns = chance.randrange(10 * SECOND)
    average = TimedAverage(lambda: now_ns, SECOND)
    told: list[tuple[int, int]] = []
    for _ in range(200):
        now_ns += chance.choice([0, 1, chance.randrange(SECOND // 4), chance.randrange(3 * SECOND)])
        told.append((now_ns, chance.randrange(1000)))
        average.account(told[-1][1])
        young = [value for when, value in told if when > now_ns - SECOND * 2 // 3]
        possible = [value for when, value in told if when >= now_ns - SECOND * 4 // 3]
        assert min(possible) <= average.min() <= min(young)
        assert max(young) <= average.max() <= max(possible)
