# SPDX-License-Identifier: Apache-2.0
"""Opening and closing block nodes (qapi/block-core.json): ``BlockdevOptions`` and its branches.

A node's options are common ones plus those of its driver. There is no end of drivers, ours and those of our
users, so the table of branches is a registry that a driver adds to when it is imported:

    class MyOptions(Struct):
        \"\"\"A driver of my own.\"\"\"

        file: Annotated[BlockdevRef, Doc("node to sit on")]

    BlockdevOptions.register_branch("mine", MyOptions)

The branches in this file are those whose drivers the package cannot do without.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeAlias

from bottomhalf.qapi.common import OnOffAuto
from bottomhalf.qapi.types import Alternate, Command, Doc, OpenEnum, Struct, TaggedUnion, Uint64


class BlockdevDriver(OpenEnum):
    """Block drivers: protocols, formats and filters."""


class BlockdevDiscardOptions(StrEnum):
    """What a node does with discard requests."""

    IGNORE = "ignore"
    UNMAP = "unmap"


class BlockdevDetectZeroesOptions(StrEnum):
    """What a node does with writes of zero bytes."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class BlockdevAioOptions(StrEnum):
    """How requests to a file are done."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class BlockdevCacheOptions(Struct):
    """How a node uses the caches below it."""

    direct: Annotated[bool | None, Doc("bypass the host's page cache (O_DIRECT)", default="off")] = None
    no_flush: Annotated[bool | None, Doc("ignore flush requests", default="off")] = None


class BlockdevOptions(TaggedUnion, tag="driver", tag_values=BlockdevDriver):
    """Options of a block node."""

    driver: Annotated[BlockdevDriver, Doc("the node's driver")]
    node_name: Annotated[str | None, Doc("the node's name; needed for a root node")] = None
    discard: Annotated[BlockdevDiscardOptions | None, Doc("discard requests", default="ignore")] = None
    cache: Annotated[BlockdevCacheOptions | None, Doc("use of caches")] = None
    active: Annotated[bool | None, Doc("the node may be used at once", default="on")] = None
    read_only: Annotated[bool | None, Doc("refuse writes", default="off")] = None
    auto_read_only: Annotated[
        bool | None, Doc("become read-only if writing is not possible or not needed", default="off")
    ] = None
    force_share: Annotated[bool | None, Doc("let others write meanwhile (read-only only)", default="off")] = (
        None
    )
    detect_zeroes: Annotated[
        BlockdevDetectZeroesOptions | None, Doc("turn writes of zero bytes into zero writes", default="off")
    ] = None


BlockdevRef: TypeAlias = Annotated[BlockdevOptions | str, Alternate("BlockdevRef")]
"""A child node: the name of an existing one, or options for a new one."""


class BlockdevOptionsFile(Struct):
    """A regular file or a block device of the host."""

    filename: Annotated[str, Doc("path")]
    pr_manager: Annotated[str | None, Doc("object that does persistent reservations")] = None
    locking: Annotated[OnOffAuto | None, Doc("lock the file against other programs", default="auto")] = None
    aio: Annotated[BlockdevAioOptions | None, Doc("how requests are done", default="threads")] = None
    aio_max_batch: Annotated[int | None, Doc("most requests submitted at once; 0 chooses", default="0")] = (
        None
    )
    drop_cache: Annotated[bool | None, Doc("drop the page cache when migrating", default="on")] = None
    x_check_cache_dropped: Annotated[
        bool | None, Doc("check that the cache was dropped", default="off", features=("unstable",))
    ] = None


class BlockdevOptionsGenericFormat(Struct):
    """A format or filter on top of one node."""

    file: Annotated[BlockdevRef, Doc("node that holds the data")]


class BlockdevOptionsRaw(BlockdevOptionsGenericFormat):
    """The bytes of another node as they are, or a part of them."""

    offset: Annotated[int | None, Doc("first byte", default="0")] = None
    size: Annotated[int | None, Doc("bytes", default="up to the end")] = None


class BlockdevOptionsNull(Struct):
    """A disk that forgets writes and answers at once."""

    size: Annotated[int | None, Doc("bytes", default="1 GiB")] = None
    latency_ns: Annotated[Uint64 | None, Doc("nanoseconds before a request completes", default="0")] = None
    read_zeroes: Annotated[bool | None, Doc("reads fill the buffer with zero bytes", default="off")] = None


BlockdevOptions.register_branch("file", BlockdevOptionsFile)
BlockdevOptions.register_branch("raw", BlockdevOptionsRaw)
BlockdevOptions.register_branch("null-co", BlockdevOptionsNull)
BlockdevOptions.register_branch("null-aio", BlockdevOptionsNull)


class BlockdevAdd(Command, name="blockdev-add", boxed=BlockdevOptions):
    """Create a block node.

    Its options must name it. Children given as options are created with it.
    """


class BlockdevDel(Command, name="blockdev-del"):
    """Remove a block node that nobody uses.

    Only nodes made by blockdev-add or --blockdev can be removed. Children that it brought along go with it.
    """

    node_name: Annotated[str, Doc("the node")]


class BlockResize(Command, name="block_resize"):
    """Change the size of a node.

    Bytes beyond the new size are lost; new ones read as zeroes.
    """

    device: Annotated[str | None, Doc("the device that has the node; there are none here")] = None
    node_name: Annotated[str | None, Doc("the node")] = None
    size: Annotated[int, Doc("bytes")]
