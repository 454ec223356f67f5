# SPDX-License-Identifier: Apache-2.0
"""Limits of throttle groups (qapi/block-core.json, qapi/qom.json)."""

from __future__ import annotations

from typing import Annotated

from bottomhalf.qapi.types import Doc, Struct


class ThrottleLimits(Struct):
    """Rates in operations or bytes per second, 0 for no limit; a total excludes the other two of its kind.

    A burst is a higher rate that may last for so many seconds."""

    iops_total: Annotated[int | None, Doc("operations per second, reads and writes", default="0")] = None
    iops_total_max: Annotated[int | None, Doc("the same in a burst", default="0")] = None
    iops_total_max_length: Annotated[int | None, Doc("seconds that a burst may last", default="1")] = None
    iops_read: Annotated[int | None, Doc("operations per second, read", default="0")] = None
    iops_read_max: Annotated[int | None, Doc("the same in a burst", default="0")] = None
    iops_read_max_length: Annotated[int | None, Doc("seconds that a burst may last", default="1")] = None
    iops_write: Annotated[int | None, Doc("operations per second, write", default="0")] = None
    iops_write_max: Annotated[int | None, Doc("the same in a burst", default="0")] = None
    iops_write_max_length: Annotated[int | None, Doc("seconds that a burst may last", default="1")] = None
    bps_total: Annotated[int | None, Doc("bytes per second, reads and writes", default="0")] = None
    bps_total_max: Annotated[int | None, Doc("the same in a burst", default="0")] = None
    bps_total_max_length: Annotated[int | None, Doc("seconds that a burst may last", default="1")] = None
    bps_read: Annotated[int | None, Doc("bytes per second, read", default="0")] = None
    bps_read_max: Annotated[int | None, Doc("the same in a burst", default="0")] = None
    bps_read_max_length: Annotated[int | None, Doc("seconds that a burst may last", default="1")] = None
    bps_write: Annotated[int | None, Doc("bytes per second, write", default="0")] = None
    bps_write_max: Annotated[int | None, Doc("the same in a burst", default="0")] = None
    bps_write_max_length: Annotated[int | None, Doc("seconds that a burst may last", default="1")] = None
    iops_size: Annotated[int | None, Doc("larger requests count as several of this many bytes", default="0")] = None


class ThrottleGroupProperties(Struct):
    """Limits that several nodes share."""

    limits: Annotated[ThrottleLimits | None, Doc("the limits")] = None
    x_iops_total: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_iops_total_max: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_iops_total_max_length: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_iops_read: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_iops_read_max: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_iops_read_max_length: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_iops_write: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_iops_write_max: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_iops_write_max_length: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_bps_total: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_bps_total_max: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_bps_total_max_length: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_bps_read: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_bps_read_max: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_bps_read_max_length: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_bps_write: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_bps_write_max: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_bps_write_max_length: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
    x_iops_size: Annotated[int | None, Doc("the same for command lines", features=("unstable",))] = None
