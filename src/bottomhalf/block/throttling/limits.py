# SPDX-License-Identifier: Apache-2.0
"""What a user may ask for: six rates, each with a burst, and the size from which a request counts as several.

    limits = Limits.from_options({"iops-total": 100, "iops-total-max": 500, "iops-total-max-length": 60})
    limits.check()

Names, meanings and texts are QEMU's. A rate of 0 is no limit. ``max`` is a higher rate that is allowed for
``max-length`` seconds, if it was quiet before; without it a tenth of a second's worth may come at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from bottomhalf.block.errors import BlockError

VALUE_MAX: Final = 10**15  # QEMU's; keeps products and floats exact enough
BURST_LENGTH_MAX: Final = 2**32 - 1  # seconds, as an option

BUCKETS: Final = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")
BPS_TOTAL, BPS_READ, BPS_WRITE, IOPS_TOTAL, IOPS_READ, IOPS_WRITE = range(6)
OPTIONS: Final = (
    *(f"{name}{suffix}" for name in BUCKETS for suffix in ("", "-max", "-max-length")),
    "iops-size",
)


@dataclass(frozen=True)
class BucketLimit:
    """One rate, in bytes or operations per second, its burst rate, and how long that may last in seconds."""

    avg: int = 0
    max: int = 0
    burst_length: int = 1


@dataclass(frozen=True)
class Limits:
    """The limits of a group, in the order of BUCKETS. ``op_size`` is in bytes, 0 counts every request as one."""

    buckets: tuple[BucketLimit, ...] = (BucketLimit(),) * len(BUCKETS)
    op_size: int = 0

    @classmethod
    def from_options(cls, options: Mapping[str, int], base: Limits | None = None) -> Limits:
        """What options say ("iops-total", "iops-size", ...), the others as in ``base``. BlockError for a burst
        length that no option may have; check() tells the rest."""
        base = base or cls()
        buckets = []
        for name, old in zip(BUCKETS, base.buckets, strict=True):
            length = options.get(f"{name}-max-length", old.burst_length)
            if length > BURST_LENGTH_MAX:
                raise BlockError(f"{name}-max-length value must be in the range [0, {BURST_LENGTH_MAX}]")
            buckets.append(BucketLimit(options.get(name, old.avg), options.get(f"{name}-max", old.max), length))
        return cls(tuple(buckets), options.get("iops-size", base.op_size))

    def to_options(self) -> dict[str, int]:
        """Every option with its value."""
        options = {}
        for name, bucket in zip(BUCKETS, self.buckets, strict=True):
            options[name] = bucket.avg
            options[f"{name}-max"] = bucket.max
            options[f"{name}-max-length"] = bucket.burst_length
        options["iops-size"] = self.op_size
        return options

    def with_bucket(self, index: int, bucket: BucketLimit) -> Limits:
        """The same limits but for one."""
        return replace(self, buckets=(*self.buckets[:index], bucket, *self.buckets[index + 1 :]))

    @property
    def enabled(self) -> bool:
        """Whether anything is limited."""
        return any(bucket.avg > 0 for bucket in self.buckets)

    def check(self) -> None:
        """BlockError if the limits contradict each other or are out of range."""
        if self._conflicting():
            raise BlockError("bps/iops/max total values and read/write values cannot be used at the same time")
        if self.op_size and not any(bucket.avg for bucket in self.buckets[IOPS_TOTAL:]):
            raise BlockError("iops size requires an iops value to be set")
        if not 0 <= self.op_size <= VALUE_MAX:
            raise BlockError(f"bps/iops/max values must be within [0, {VALUE_MAX}]")
        for bucket in self.buckets:
            if not 0 <= bucket.avg <= VALUE_MAX or not 0 <= bucket.max <= VALUE_MAX:
                raise BlockError(f"bps/iops/max values must be within [0, {VALUE_MAX}]")
            if not bucket.burst_length:
                raise BlockError("the burst length cannot be 0")
            if bucket.burst_length > 1 and not bucket.max:
                raise BlockError("burst length set without burst rate")
            if bucket.max and not 0 < bucket.burst_length <= VALUE_MAX // bucket.max:
                raise BlockError("burst length too high for this burst rate")
            if bucket.max and not bucket.avg:
                raise BlockError("bps_max/iops_max require corresponding bps/iops values")
            if bucket.max and bucket.max < bucket.avg:
                raise BlockError("bps_max/iops_max cannot be lower than bps/iops")

    def _conflicting(self) -> bool:
        for first in (BPS_TOTAL, IOPS_TOTAL):
            total, read, write = self.buckets[first : first + 3]
            if (total.avg and (read.avg or write.avg)) or (total.max and (read.max or write.max)):
                return True
        return False
