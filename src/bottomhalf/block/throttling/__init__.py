# SPDX-License-Identifier: Apache-2.0
"""Limits on operations and bytes per second: buckets, timers, groups that share them."""

from bottomhalf.block.throttling.group import ThrottleGroup, ThrottleGroups, ThrottleMember, throttle_groups
from bottomhalf.block.throttling.limits import BucketLimit, Limits
from bottomhalf.block.throttling.state import ThrottleState, ThrottleTimers
from bottomhalf.block.throttling.timed_average import TimedAverage

__all__ = [
    "BucketLimit",
    "Limits",
    "ThrottleGroup",
    "ThrottleGroups",
    "ThrottleMember",
    "ThrottleState",
    "ThrottleTimers",
    "TimedAverage",
    "throttle_groups",
]
