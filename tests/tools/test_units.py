# SPDX-License-Identifier: Apache-2.0
"""Numbers for people."""

from __future__ import annotations

import pytest

from bottomhalf.tools.units import binary_size, duration, rate


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (100 * 1024, "100 KiB"),
        (1023 * 1024, "1023 KiB"),
        (1 << 20, "1 MiB"),
        (3 << 30, "3 GiB"),
        (1 << 40, "1 TiB"),
        (1 << 60, "1 EiB"),
        (5000 << 60, "5000 EiB"),
        (1234567, "1.18 MiB"),
    ],
)
def test_binary_size(count: float, text: str) -> None:
    assert binary_size(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0/s"), (7.4, "7/s"), (999, "999/s"), (1000, "1k/s"), (310_000, "310k/s"), (1_250_000, "1.25M/s")],
)
def test_rate(count: float, text: str) -> None:
    assert rate(count) == text


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(0, "0 ns"), (999, "999 ns"), (38_000, "38 us"), (1_500_000, "1.5 ms"), (2e9, "2 s"), (5e12, "5e+03 s")],
)
def test_duration(nanoseconds: float, text: str) -> None:
    assert duration(nanoseconds) == text
