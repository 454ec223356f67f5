# SPDX-License-Identifier: Apache-2.0
"""What devices and nodes have done (qapi/block-core.json): ``query-blockstats``.

Operations, bytes and times are counted by devices with a name, which a storage daemon has not got: its clients are
exports. Of a node there is the end of the highest write, and what its driver counts. The other members are there and 0,
as with QEMU's daemon.
"""

from __future__ import annotations

from typing import Annotated

from bottomhalf.qapi.block import BlockdevDriver
from bottomhalf.qapi.types import Command, Doc, Struct, TaggedUnion, Uint64


class BlockDeviceTimedStats(Struct):
    """Statistics of an interval."""

    interval_length: Annotated[int, Doc("seconds", name="interval_length")]
    min_rd_latency_ns: Annotated[int, Doc("shortest read", name="min_rd_latency_ns")]
    max_rd_latency_ns: Annotated[int, Doc("longest read", name="max_rd_latency_ns")]
    avg_rd_latency_ns: Annotated[int, Doc("mean of reads", name="avg_rd_latency_ns")]
    min_wr_latency_ns: Annotated[int, Doc("shortest write", name="min_wr_latency_ns")]
    max_wr_latency_ns: Annotated[int, Doc("longest write", name="max_wr_latency_ns")]
    avg_wr_latency_ns: Annotated[int, Doc("mean of writes", name="avg_wr_latency_ns")]
    min_zone_append_latency_ns: Annotated[int, Doc("shortest zone append", name="min_zone_append_latency_ns")]
    max_zone_append_latency_ns: Annotated[int, Doc("longest zone append", name="max_zone_append_latency_ns")]
    avg_zone_append_latency_ns: Annotated[int, Doc("mean of zone appends", name="avg_zone_append_latency_ns")]
    min_flush_latency_ns: Annotated[int, Doc("shortest flush", name="min_flush_latency_ns")]
    max_flush_latency_ns: Annotated[int, Doc("longest flush", name="max_flush_latency_ns")]
    avg_flush_latency_ns: Annotated[int, Doc("mean of flushes", name="avg_flush_latency_ns")]
    avg_rd_queue_depth: Annotated[float, Doc("mean number of reads", name="avg_rd_queue_depth")]
    avg_wr_queue_depth: Annotated[float, Doc("mean number of writes", name="avg_wr_queue_depth")]
    avg_zone_append_queue_depth: Annotated[
        float, Doc("mean number of zone appends", name="avg_zone_append_queue_depth")
    ]


class BlockLatencyHistogramInfo(Struct):
    """How long requests took."""

    boundaries: Annotated[list[Uint64], Doc("nanoseconds where one bin ends and the next begins")]
    bins: Annotated[list[Uint64], Doc("requests in each bin; one bin more than boundaries")]


class BlockDeviceStats(Struct):
    """Numbers of one device or node."""

    rd_bytes: Annotated[int, Doc("bytes read", name="rd_bytes")]
    wr_bytes: Annotated[int, Doc("bytes written", name="wr_bytes")]
    zone_append_bytes: Annotated[int, Doc("bytes appended to zones", name="zone_append_bytes")]
    unmap_bytes: Annotated[int, Doc("bytes discarded", name="unmap_bytes")]
    rd_operations: Annotated[int, Doc("reads", name="rd_operations")]
    wr_operations: Annotated[int, Doc("writes", name="wr_operations")]
    zone_append_operations: Annotated[int, Doc("zone appends", name="zone_append_operations")]
    flush_operations: Annotated[int, Doc("flushes", name="flush_operations")]
    unmap_operations: Annotated[int, Doc("discards", name="unmap_operations")]
    rd_total_time_ns: Annotated[int, Doc("time of reads", name="rd_total_time_ns")]
    wr_total_time_ns: Annotated[int, Doc("time of writes", name="wr_total_time_ns")]
    zone_append_total_time_ns: Annotated[int, Doc("time of zone appends", name="zone_append_total_time_ns")]
    flush_total_time_ns: Annotated[int, Doc("time of flushes", name="flush_total_time_ns")]
    unmap_total_time_ns: Annotated[int, Doc("time of discards", name="unmap_total_time_ns")]
    wr_highest_offset: Annotated[int, Doc("end of the highest write", name="wr_highest_offset")]
    rd_merged: Annotated[int, Doc("reads that were joined to others", name="rd_merged")]
    wr_merged: Annotated[int, Doc("writes that were joined to others", name="wr_merged")]
    zone_append_merged: Annotated[int, Doc("zone appends that were", name="zone_append_merged")]
    unmap_merged: Annotated[int, Doc("discards that were", name="unmap_merged")]
    idle_time_ns: Annotated[int | None, Doc("since the last request", name="idle_time_ns")] = None
    failed_rd_operations: Annotated[int, Doc("reads that failed", name="failed_rd_operations")]
    failed_wr_operations: Annotated[int, Doc("writes that failed", name="failed_wr_operations")]
    failed_zone_append_operations: Annotated[
        int, Doc("zone appends that failed", name="failed_zone_append_operations")
    ]
    failed_flush_operations: Annotated[int, Doc("flushes that failed", name="failed_flush_operations")]
    failed_unmap_operations: Annotated[int, Doc("discards that failed", name="failed_unmap_operations")]
    invalid_rd_operations: Annotated[int, Doc("reads that could not be", name="invalid_rd_operations")]
    invalid_wr_operations: Annotated[int, Doc("writes that could not be", name="invalid_wr_operations")]
    invalid_zone_append_operations: Annotated[
        int, Doc("zone appends that could not be", name="invalid_zone_append_operations")
    ]
    invalid_flush_operations: Annotated[int, Doc("flushes that could not be", name="invalid_flush_operations")]
    invalid_unmap_operations: Annotated[int, Doc("discards that could not be", name="invalid_unmap_operations")]
    account_invalid: Annotated[bool, Doc("invalid requests end the idle time", name="account_invalid")]
    account_failed: Annotated[bool, Doc("failed requests count in times", name="account_failed")]
    timed_stats: Annotated[list[BlockDeviceTimedStats], Doc("statistics of intervals", name="timed_stats")]
    rd_latency_histogram: Annotated[
        BlockLatencyHistogramInfo | None, Doc("how long reads took", name="rd_latency_histogram")
    ] = None
    wr_latency_histogram: Annotated[
        BlockLatencyHistogramInfo | None, Doc("how long writes took", name="wr_latency_histogram")
    ] = None
    zone_append_latency_histogram: Annotated[
        BlockLatencyHistogramInfo | None, Doc("how long zone appends took", name="zone_append_latency_histogram")
    ] = None
    flush_latency_histogram: Annotated[
        BlockLatencyHistogramInfo | None, Doc("how long flushes took", name="flush_latency_histogram")
    ] = None


class BlockStatsSpecificFile(Struct):
    """What the driver of a file counts."""

    discard_nb_ok: Annotated[Uint64, Doc("discards that were carried out")]
    discard_nb_failed: Annotated[Uint64, Doc("discards that failed")]
    discard_bytes_ok: Annotated[Uint64, Doc("bytes that were discarded")]


class BlockStatsSpecific(
    TaggedUnion, tag="driver", branches={"file": BlockStatsSpecificFile, "host_device": BlockStatsSpecificFile}
):
    """What only this driver counts."""

    driver: Annotated[BlockdevDriver, Doc("driver")]


class BlockStats(Struct):
    """A device or a node."""

    device: Annotated[str | None, Doc("the device's name")] = None
    qdev: Annotated[str | None, Doc("the device model that uses it")] = None
    node_name: Annotated[str | None, Doc("the node's name")] = None
    stats: Annotated[BlockDeviceStats, Doc("the numbers")]
    driver_specific: Annotated[BlockStatsSpecific | None, Doc("what only this driver counts")] = None
    parent: Annotated[BlockStats | None, Doc("the node below, which holds the data")] = None
    backing: Annotated[BlockStats | None, Doc("the backing node")] = None


class QueryBlockstats(Command, name="query-blockstats", returns=list[BlockStats]):
    """Tell how far nodes have been written and what their drivers count."""

    query_nodes: Annotated[
        bool | None, Doc("of all nodes, not of the devices with a name, of which there are none", default="off")
    ] = None
