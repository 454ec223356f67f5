# SPDX-License-Identifier: Apache-2.0
"""What a new image shall be like (qapi/block-core.json, ``BlockdevCreateOptions``): the options of each format.

The library, and the tools, build them from names as users know them from qemu-img; see ``images``. The command that
takes them as they are, ``blockdev-create``, is a job, and comes with those."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from bottomhalf.qapi.block import BlockdevDriver, BlockdevRef
from bottomhalf.qapi.types import Doc, Size, Struct


class PreallocMode(StrEnum):
    """How much of a new image's space is taken at once."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class BlockdevQcow2Version(StrEnum):
    """Version of the format; qemu-img calls them compat 0.10 and 1.1."""

    V2 = "v2"
    V3 = "v3"


class Qcow2CompressionType(StrEnum):
    """How clusters are compressed."""

    ZLIB = "zlib"
    ZSTD = "zstd"


class BlockdevCreateOptionsQcow2(Struct):
    """A new qcow2 image."""

    file: Annotated[BlockdevRef, Doc("node that gets the image")]
    data_file: Annotated[BlockdevRef | None, Doc("node that gets the guest's data", default="the image itself")] = None
    data_file_raw: Annotated[
        bool | None, Doc("the data file is a raw image of the disk, for others to read", default="off")
    ] = None
    extended_l2: Annotated[bool | None, Doc("allocate in parts of a cluster", default="off")] = None
    size: Annotated[Size, Doc("bytes of the disk")]
    version: Annotated[BlockdevQcow2Version | None, Doc("version of the format", default="v3")] = None
    backing_file: Annotated[str | None, Doc("what unallocated clusters read from")] = None
    backing_fmt: Annotated[BlockdevDriver | None, Doc("format of the backing file")] = None
    cluster_size: Annotated[Size | None, Doc("bytes of a cluster", default="65536")] = None
    preallocation: Annotated[PreallocMode | None, Doc("take space at once", default="off")] = None
    lazy_refcounts: Annotated[bool | None, Doc("allow refcounts to be written late", default="off")] = None
    refcount_bits: Annotated[int | None, Doc("width of a reference count", default="16")] = None
    compression_type: Annotated[Qcow2CompressionType | None, Doc("how to compress", default="zlib")] = None
