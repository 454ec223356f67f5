# SPDX-License-Identifier: Apache-2.0
"""Minimum, average and maximum of what happened lately.

Two windows, each a third longer than the period, half a window apart. Both take every value; the older one answers,
so what it tells always covers between two thirds and four thirds of a period, whenever it is asked, without a list of
values to keep.

    average = TimedAverage(clock.now_ns, 60 * 10**9)
    average.account(latency_ns)
    average.avg()
"""

from __future__ import annotations

from collections.abc import Callable


class _Window:
    __slots__ = ("count", "expires_ns", "max", "min", "total")

    def __init__(self, expires_ns: int) -> None:
        self.expires_ns = expires_ns
        self.clear()

    def clear(self) -> None:
        self.count = self.total = self.min = self.max = 0


class TimedAverage:
    """Values of roughly the last ``period_ns``. One thread."""

    def __init__(self, now_ns: Callable[[], int], period_ns: int) -> None:
        assert period_ns > 0
        self._now_ns = now_ns
        self._length_ns = period_ns * 4 // 3
        begin_ns = now_ns()
        self._windows = (_Window(begin_ns + self._length_ns // 2), _Window(begin_ns + self._length_ns))

    def account(self, value: int) -> None:
        """A value (not negative) belongs to now."""
        self._older()
        for window in self._windows:
            window.min = value if not window.count else min(window.min, value)
            window.max = max(window.max, value)
            window.total += value
            window.count += 1

    def min(self) -> int:
        """0 if there was nothing, like the others."""
        return self._older().min

    def avg(self) -> int:
        window = self._older()
        return window.total // window.count if window.count else 0

    def max(self) -> int:
        return self._older().max

    def _older(self) -> _Window:
        """Start expired windows anew; the one that expires first, which has seen more."""
        now_ns = self._now_ns()
        first, second = self._windows
        for window in (first, second):
            if window.expires_ns > now_ns:
                continue
            window.clear()
            # In step with the other one, half a window apart, however long nobody has asked.
            behind_ns = now_ns - window.expires_ns
            window.expires_ns += (behind_ns // self._length_ns + 1) * self._length_ns
        return first if first.expires_ns < second.expires_ns else second
