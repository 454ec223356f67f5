# SPDX-License-Identifier: Apache-2.0
"""What a node tells about itself (qapi/block-core.json): ``query-named-block-nodes``.

Member names are QEMU's, which spells old ones with underscores and new ones with dashes.
"""

from __future__ import annotations

from typing import Annotated

from bottomhalf.qapi.block import BlockdevDetectZeroesOptions
from bottomhalf.qapi.types import Command, Doc, OpenEnum, Size, Struct, TaggedUnion, Uint32


class SnapshotInfo(Struct):
    """A snapshot inside an image."""

    id: Annotated[str, Doc("number that the image gives it")]
    name: Annotated[str, Doc("name that the user gave it")]
    vm_state_size: Annotated[int, Doc("bytes of machine state")]
    date_sec: Annotated[int, Doc("wall clock when it was taken, seconds")]
    date_nsec: Annotated[int, Doc("nanoseconds to add to date-sec")]
    vm_clock_sec: Annotated[int, Doc("machine's clock then, seconds")]
    vm_clock_nsec: Annotated[int, Doc("nanoseconds to add to vm-clock-sec")]
    icount: Annotated[int | None, Doc("instructions executed until then, if they are counted")] = None


class ImageInfoSpecificKind(OpenEnum):
    """Drivers that have more to tell about an image."""


class ImageInfoSpecific(TaggedUnion, tag="type", tag_values=ImageInfoSpecificKind):
    """What only this kind of image has."""

    type: Annotated[ImageInfoSpecificKind, Doc("driver")]


class ImageInfoSpecificFile(Struct):
    """Of a file."""

    extent_size_hint: Annotated[Size | None, Doc("bytes that the file system allocates at once")] = None


class ImageInfoSpecificFileWrapper(Struct):
    """Of a file, wrapped."""

    data: Annotated[ImageInfoSpecificFile, Doc("the information")]


ImageInfoSpecific.register_branch("file", ImageInfoSpecificFileWrapper)


class ImageInfo(Struct):
    """An image and, if asked for, its backing chain."""

    filename: Annotated[str, Doc("file name, or json: with the options")]
    format: Annotated[str, Doc("driver")]
    dirty_flag: Annotated[bool | None, Doc("the image was not closed properly")] = None
    actual_size: Annotated[int | None, Doc("bytes it occupies on the host")] = None
    virtual_size: Annotated[int, Doc("bytes that it presents")]
    cluster_size: Annotated[int | None, Doc("bytes of its allocation unit")] = None
    encrypted: Annotated[bool | None, Doc("it is encrypted")] = None
    compressed: Annotated[bool | None, Doc("it is compressed")] = None
    backing_filename: Annotated[str | None, Doc("backing file as the image names it")] = None
    full_backing_filename: Annotated[str | None, Doc("backing file as it was found")] = None
    backing_filename_format: Annotated[str | None, Doc("driver of the backing file")] = None
    snapshots: Annotated[list[SnapshotInfo] | None, Doc("snapshots inside")] = None
    format_specific: Annotated[ImageInfoSpecific | None, Doc("what only this kind of image has")] = None
    backing_image: Annotated[ImageInfo | None, Doc("the backing image")] = None


class BlockdevCacheInfo(Struct):
    """How a node uses the caches below it."""

    writeback: Annotated[bool, Doc("writes complete before they are durable")]
    direct: Annotated[bool, Doc("the host's page cache is bypassed")]
    no_flush: Annotated[bool, Doc("flush requests are ignored")]


class BlockDirtyInfo(Struct):
    """A dirty bitmap."""

    name: Annotated[str | None, Doc("its name, if it has one")] = None
    count: Annotated[int, Doc("dirty bytes")]
    granularity: Annotated[Uint32, Doc("bytes per bit")]
    recording: Annotated[bool, Doc("writes are recorded")]
    busy: Annotated[bool, Doc("a job or an export is using it")]
    persistent: Annotated[bool, Doc("it is stored in the image")]
    inconsistent: Annotated[bool | None, Doc("it was not stored properly and can only be removed")] = None


def _limit(name: str, text: str) -> Doc:
    return Doc(text, name=name)


class BlockDeviceInfo(Struct):
    """A block node."""

    file: Annotated[str, Doc("file name, or json: with the options")]
    node_name: Annotated[str | None, Doc("its name")] = None
    ro: Annotated[bool, Doc("it is read-only")]
    drv: Annotated[str, Doc("its driver")]
    backing_file: Annotated[str | None, Doc("file name of the backing node", name="backing_file")] = None
    backing_file_depth: Annotated[int, Doc("nodes in the backing chain below", name="backing_file_depth")]
    active: Annotated[bool, Doc("it may be used")]
    encrypted: Annotated[bool, Doc("it is encrypted")]
    detect_zeroes: Annotated[
        BlockdevDetectZeroesOptions, Doc("what it does with writes of zero bytes", name="detect_zeroes")
    ]
    bps: Annotated[int, Doc("limit of bytes per second, 0 for none")]
    bps_rd: Annotated[int, _limit("bps_rd", "the same for reads")]
    bps_wr: Annotated[int, _limit("bps_wr", "the same for writes")]
    iops: Annotated[int, Doc("limit of requests per second, 0 for none")]
    iops_rd: Annotated[int, _limit("iops_rd", "the same for reads")]
    iops_wr: Annotated[int, _limit("iops_wr", "the same for writes")]
    image: Annotated[ImageInfo, Doc("the image")]
    bps_max: Annotated[int | None, _limit("bps_max", "bytes per second in bursts")] = None
    bps_rd_max: Annotated[int | None, _limit("bps_rd_max", "the same for reads")] = None
    bps_wr_max: Annotated[int | None, _limit("bps_wr_max", "the same for writes")] = None
    iops_max: Annotated[int | None, _limit("iops_max", "requests per second in bursts")] = None
    iops_rd_max: Annotated[int | None, _limit("iops_rd_max", "the same for reads")] = None
    iops_wr_max: Annotated[int | None, _limit("iops_wr_max", "the same for writes")] = None
    bps_max_length: Annotated[int | None, _limit("bps_max_length", "longest burst, seconds")] = None
    bps_rd_max_length: Annotated[int | None, _limit("bps_rd_max_length", "the same for reads")] = None
    bps_wr_max_length: Annotated[int | None, _limit("bps_wr_max_length", "the same for writes")] = None
    iops_max_length: Annotated[int | None, _limit("iops_max_length", "longest burst, seconds")] = None
    iops_rd_max_length: Annotated[int | None, _limit("iops_rd_max_length", "the same for reads")] = None
    iops_wr_max_length: Annotated[int | None, _limit("iops_wr_max_length", "the same for writes")] = None
    iops_size: Annotated[int | None, _limit("iops_size", "bytes that count as one request")] = None
    group: Annotated[str | None, Doc("throttle group")] = None
    cache: Annotated[BlockdevCacheInfo, Doc("use of caches")]
    write_threshold: Annotated[int, _limit("write_threshold", "offset that raises an event, 0 for none")]
    dirty_bitmaps: Annotated[list[BlockDirtyInfo] | None, Doc("dirty bitmaps")] = None


class QueryNamedBlockNodes(Command, name="query-named-block-nodes", returns=list[BlockDeviceInfo]):
    """List all block nodes."""

    flat: Annotated[bool | None, Doc("leave backing-image out", default="off")] = None
