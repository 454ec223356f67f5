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

from bottomhalf.qapi.common import BlockDirtyBitmap, OnOffAuto
from bottomhalf.qapi.qcow2_checks import Qcow2OverlapChecks
from bottomhalf.qapi.types import (
    Alternate,
    Command,
    Doc,
    EventType,
    Int32,
    Null,
    OpenEnum,
    Size,
    Struct,
    TaggedUnion,
    Uint32,
    Uint64,
)


def _load_driver(name: str) -> None:
    from bottomhalf.qapi.extensions import load_driver

    load_driver(name)


class BlockdevDriver(OpenEnum):
    """Block drivers: protocols, formats and filters."""

    load = _load_driver


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
    """A regular file of the host, or with the driver host_device a block device."""

    filename: Annotated[str, Doc("path")]
    pr_manager: Annotated[str | None, Doc("object that does persistent reservations")] = None
    locking: Annotated[OnOffAuto | None, Doc("lock the file against other programs", default="auto")] = None
    aio: Annotated[BlockdevAioOptions | None, Doc("how requests are done", default="the best that works here")] = None
    aio_max_batch: Annotated[
        int | None, Doc("most requests of this node that start together; 0 chooses", default="0")
    ] = None
    drop_cache: Annotated[bool | None, Doc("drop the page cache when migrating", default="on")] = None
    x_check_cache_dropped: Annotated[
        bool | None, Doc("check that the cache was dropped", default="off", features=("unstable",))
    ] = None


class BlockdevOptionsGenericFormat(Struct):
    """A format or filter on top of one node."""

    file: Annotated[BlockdevRef, Doc("node that holds the data")]


BlockdevRefOrNull: TypeAlias = Annotated[BlockdevOptions | str | Null, Alternate("BlockdevRefOrNull")]
"""The same, or null for no child where the image names one."""


class BlockdevOptionsGenericCOWFormat(BlockdevOptionsGenericFormat):
    """A format whose images may have a backing file."""

    backing: Annotated[
        BlockdevRefOrNull | None, Doc("node that unallocated clusters read from", default="what the image names")
    ] = None


class BlockdevOptionsRaw(BlockdevOptionsGenericFormat):
    """The bytes of another node as they are, or a part of them."""

    offset: Annotated[int | None, Doc("first byte", default="0")] = None
    size: Annotated[int | None, Doc("bytes", default="up to the end")] = None


class BlockdevQcow2EncryptionFormat(OpenEnum):
    """How a qcow2 image is encrypted."""


class QCryptoBlockOptionsQCow(Struct):
    """The broken encryption of old images."""

    key_secret: Annotated[str | None, Doc("secret that holds the password", default="none")] = None


class QCryptoBlockOptionsLUKS(Struct):
    """LUKS inside an image."""

    key_secret: Annotated[str | None, Doc("secret that holds the password", default="none")] = None


class BlockdevQcow2Encryption(TaggedUnion, tag="format", tag_values=BlockdevQcow2EncryptionFormat):
    """The encryption of a qcow2 image."""

    format: Annotated[BlockdevQcow2EncryptionFormat, Doc("kind of encryption")]


BlockdevQcow2Encryption.register_branch("aes", QCryptoBlockOptionsQCow)
BlockdevQcow2Encryption.register_branch("luks", QCryptoBlockOptionsLUKS)


class BlockdevOptionsQcow2(BlockdevOptionsGenericCOWFormat):
    """An image in QEMU's format: allocated as it is written, with backing files and snapshots."""

    lazy_refcounts: Annotated[
        bool | None, Doc("write reference counts late, and mark the image dirty meanwhile", default="as the image says")
    ] = None
    pass_discard_request: Annotated[
        bool | None, Doc("what the guest discards is discarded in the file", default="on if discard=unmap")
    ] = None
    pass_discard_snapshot: Annotated[
        bool | None, Doc("what deleting a snapshot frees is discarded in the file", default="on")
    ] = None
    pass_discard_other: Annotated[
        bool | None, Doc("what is freed otherwise is discarded in the file", default="off")
    ] = None
    discard_no_unref: Annotated[
        bool | None, Doc("what the guest discards keeps its place in the image", default="off")
    ] = None
    overlap_check: Annotated[
        Qcow2OverlapChecks | None, Doc("tables that are protected from writes to them by mistake", default="cached")
    ] = None
    cache_size: Annotated[int | None, Doc("bytes of both caches together")] = None
    l2_cache_size: Annotated[
        int | None, Doc("bytes of L2 tables in memory", default="what the disk needs, 32 MiB at most")
    ] = None
    l2_cache_entry_size: Annotated[
        int | None, Doc("bytes of an L2 table that QEMU reads at a time; here tables are read whole")
    ] = None
    refcount_cache_size: Annotated[
        int | None, Doc("bytes of refcount blocks in memory", default="four clusters")
    ] = None
    cache_clean_interval: Annotated[
        int | None, Doc("seconds after which unused tables leave memory; 0 is never", default="600")
    ] = None
    encrypt: Annotated[BlockdevQcow2Encryption | None, Doc("how it is encrypted, and the key")] = None
    data_file: Annotated[BlockdevRef | None, Doc("node with the guest's data", default="what the image names")] = None


class BlockdevOptionsLUKS(BlockdevOptionsGenericFormat):
    """A disk that is encrypted as a whole."""

    key_secret: Annotated[str | None, Doc("secret that holds the password", default="only the header is read")] = None
    header: Annotated[BlockdevRef | None, Doc("node that holds the LUKS header", default="it is in file")] = None


class BlockdevOptionsNull(Struct):
    """A disk that forgets writes and answers at once."""

    size: Annotated[int | None, Doc("bytes", default="1 GiB")] = None
    latency_ns: Annotated[Uint64 | None, Doc("nanoseconds before a request completes", default="0")] = None
    read_zeroes: Annotated[bool | None, Doc("reads fill the buffer with zero bytes", default="off")] = None


class BlockdevOptionsThrottle(Struct):
    """A filter that shares the limits of a throttle group."""

    throttle_group: Annotated[str, Doc("the group, an object of type throttle-group")]
    file: Annotated[BlockdevRef, Doc("node that holds the data")]


class BlockPermission(StrEnum):
    """What a user of a node may need, or let others do."""

    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


class BlkdebugEvent(StrEnum):
    """Points in the work of a driver or of the block layer that blkdebug hears of."""

    L1_UPDATE = "l1_update"
    L1_GROW_ALLOC_TABLE = "l1_grow_alloc_table"
    L1_GROW_WRITE_TABLE = "l1_grow_write_table"
    L1_GROW_ACTIVATE_TABLE = "l1_grow_activate_table"
    L2_LOAD = "l2_load"
    L2_UPDATE = "l2_update"
    L2_UPDATE_COMPRESSED = "l2_update_compressed"
    L2_ALLOC_COW_READ = "l2_alloc_cow_read"
    L2_ALLOC_WRITE = "l2_alloc_write"
    READ_AIO = "read_aio"
    READ_BACKING_AIO = "read_backing_aio"
    READ_COMPRESSED = "read_compressed"
    WRITE_AIO = "write_aio"
    WRITE_COMPRESSED = "write_compressed"
    VMSTATE_LOAD = "vmstate_load"
    VMSTATE_SAVE = "vmstate_save"
    COW_READ = "cow_read"
    COW_WRITE = "cow_write"
    REFTABLE_LOAD = "reftable_load"
    REFTABLE_GROW = "reftable_grow"
    REFTABLE_UPDATE = "reftable_update"
    REFBLOCK_LOAD = "refblock_load"
    REFBLOCK_UPDATE = "refblock_update"
    REFBLOCK_UPDATE_PART = "refblock_update_part"
    REFBLOCK_ALLOC = "refblock_alloc"
    REFBLOCK_ALLOC_HOOKUP = "refblock_alloc_hookup"
    REFBLOCK_ALLOC_WRITE = "refblock_alloc_write"
    REFBLOCK_ALLOC_WRITE_BLOCKS = "refblock_alloc_write_blocks"
    REFBLOCK_ALLOC_WRITE_TABLE = "refblock_alloc_write_table"
    REFBLOCK_ALLOC_SWITCH_TABLE = "refblock_alloc_switch_table"
    CLUSTER_ALLOC = "cluster_alloc"
    CLUSTER_ALLOC_BYTES = "cluster_alloc_bytes"
    CLUSTER_FREE = "cluster_free"
    FLUSH_TO_OS = "flush_to_os"
    FLUSH_TO_DISK = "flush_to_disk"
    PWRITEV_RMW_HEAD = "pwritev_rmw_head"
    PWRITEV_RMW_AFTER_HEAD = "pwritev_rmw_after_head"
    PWRITEV_RMW_TAIL = "pwritev_rmw_tail"
    PWRITEV_RMW_AFTER_TAIL = "pwritev_rmw_after_tail"
    PWRITEV = "pwritev"
    PWRITEV_ZERO = "pwritev_zero"
    PWRITEV_DONE = "pwritev_done"
    EMPTY_IMAGE_PREPARE = "empty_image_prepare"
    L1_SHRINK_WRITE_TABLE = "l1_shrink_write_table"
    L1_SHRINK_FREE_L2_CLUSTERS = "l1_shrink_free_l2_clusters"
    COR_WRITE = "cor_write"
    CLUSTER_ALLOC_SPACE = "cluster_alloc_space"
    NONE = "none"


class BlkdebugIOType(StrEnum):
    """Kinds of requests that blkdebug tells apart."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write-zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    BLOCK_STATUS = "block-status"


class BlkdebugInjectErrorOptions(Struct):
    """Fail requests after an event."""

    event: Annotated[BlkdebugEvent, Doc("what has to happen first")]
    state: Annotated[int | None, Doc("only in this state; 0 is any", default="0")] = None
    iotype: Annotated[BlkdebugIOType | None, Doc("only these requests", default="all but block-status")] = None
    errno: Annotated[int | None, Doc("error number", default="5 (EIO)")] = None
    sector: Annotated[int | None, Doc("only requests that touch this 512-byte sector", default="any")] = None
    once: Annotated[bool | None, Doc("fail one request only", default="off")] = None
    immediately: Annotated[bool | None, Doc("fail it before the call that submits it returns", default="off")] = None


class BlkdebugSetStateOptions(Struct):
    """Change the state after an event."""

    event: Annotated[BlkdebugEvent, Doc("what has to happen")]
    state: Annotated[int | None, Doc("only in this state; 0 is any", default="0")] = None
    new_state: Annotated[int, Doc("the new state", name="new_state")]


class BlockdevOptionsBlkdebug(Struct):
    """A filter that injects errors, makes requests wait, and imposes limits."""

    image: Annotated[BlockdevRef, Doc("node that holds the data")]
    config: Annotated[str | None, Doc("file with rules; not supported, give them here")] = None
    align: Annotated[Size | None, Doc("alignment of requests in bytes, a power of two")] = None
    max_transfer: Annotated[Int32 | None, Doc("most bytes of a read or write, a multiple of the alignment")] = None
    opt_write_zero: Annotated[Int32 | None, Doc("alignment of zero writes")] = None
    max_write_zero: Annotated[Int32 | None, Doc("most bytes of a zero write")] = None
    opt_discard: Annotated[Int32 | None, Doc("alignment of discards")] = None
    max_discard: Annotated[Int32 | None, Doc("most bytes of a discard")] = None
    inject_error: Annotated[list[BlkdebugInjectErrorOptions] | None, Doc("errors")] = None
    set_state: Annotated[list[BlkdebugSetStateOptions] | None, Doc("changes of state")] = None
    take_child_perms: Annotated[list[BlockPermission] | None, Doc("permissions to take in any case")] = None
    unshare_child_perms: Annotated[list[BlockPermission] | None, Doc("permissions not to share")] = None


class BlockdevOptionsBlkverify(Struct):
    """Two images that are written alike and compared when they are read."""

    test: Annotated[BlockdevRef, Doc("the image that is tested")]
    raw: Annotated[BlockdevRef, Doc("the image that is right")]


class BlockdevOptionsCor(BlockdevOptionsGenericFormat):
    """A filter that stores what is read from a backing image in the image itself."""

    bottom: Annotated[str | None, Doc("the lowest node from which to copy", default="all")] = None


class BlockdevOptionsPreallocate(BlockdevOptionsGenericFormat):
    """A filter that allocates ahead of an image that grows."""

    prealloc_align: Annotated[Size | None, Doc("the allocated end is a multiple of this", default="1 MiB")] = None
    prealloc_size: Annotated[Size | None, Doc("bytes to allocate ahead", default="128 MiB")] = None


class OnCbwError(StrEnum):
    """What a failed copy of old data does."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


class BlockdevOptionsCbw(BlockdevOptionsGenericFormat):
    """A filter that saves what is about to be overwritten to another node."""

    target: Annotated[BlockdevRef, Doc("node that gets the old data")]
    bitmap: Annotated[BlockDirtyBitmap | None, Doc("what belongs to the snapshot", default="everything")] = None
    on_cbw_error: Annotated[OnCbwError | None, Doc("if copying fails", default="break-guest-write")] = None
    cbw_timeout: Annotated[Uint32 | None, Doc("seconds that copying may take; 0 is no limit", default="0")] = None
    min_cluster_size: Annotated[Size | None, Doc("least bytes to copy at a time, a power of two", default="0")] = None


BlockdevOptions.register_branch("file", BlockdevOptionsFile)
BlockdevOptions.register_branch("host_device", BlockdevOptionsFile, "A block device of the host")
BlockdevOptions.register_branch("raw", BlockdevOptionsRaw)
BlockdevOptions.register_branch("qcow2", BlockdevOptionsQcow2)
BlockdevOptions.register_branch("luks", BlockdevOptionsLUKS)
BlockdevOptions.register_branch("null-co", BlockdevOptionsNull)
BlockdevOptions.register_branch("null-aio", BlockdevOptionsNull)
BlockdevOptions.register_branch("blkdebug", BlockdevOptionsBlkdebug)
BlockdevOptions.register_branch("blkverify", BlockdevOptionsBlkverify)
BlockdevOptions.register_branch("compress", BlockdevOptionsGenericFormat, "Has everything stored compressed")
BlockdevOptions.register_branch("copy-before-write", BlockdevOptionsCbw)
BlockdevOptions.register_branch("copy-on-read", BlockdevOptionsCor)
BlockdevOptions.register_branch("preallocate", BlockdevOptionsPreallocate)
BlockdevOptions.register_branch("snapshot-access", BlockdevOptionsGenericFormat, "What copy-before-write saves")
BlockdevOptions.register_branch("throttle", BlockdevOptionsThrottle)


class BlockdevAdd(Command, name="blockdev-add", boxed=BlockdevOptions):
    """Create a block node.

    Its options must name it. Children given as options are created with it.
    """


class BlockdevDel(Command, name="blockdev-del"):
    """Remove a block node that nobody uses.

    Only nodes made by blockdev-add or --blockdev can be removed. Children that it brought along go with it.
    """

    node_name: Annotated[str, Doc("the node")]


class BlockdevReopen(Command, name="blockdev-reopen"):
    """Give block nodes other options while they are in use.

    All of them take their new options, or none. What is not given goes back to its default; what a driver cannot
    change must be given as it was. A child named here takes the place of the one that the node has.
    """

    options: Annotated[list[BlockdevOptions], Doc("the nodes, by node-name, and their new options")]


class BlockdevSnapshot(Command, name="blockdev-snapshot", features=("allow-write-only-overlay",)):
    """Put an overlay above a node: whoever uses the node uses the overlay from then on."""

    node: Annotated[str, Doc("the node that becomes the backing node")]
    overlay: Annotated[str, Doc("the node that is put above it; nobody reads it yet")]


class BlockResize(Command, name="block_resize"):
    """Change the size of an image."""

    device: Annotated[str | None, Doc("a device by its name")] = None
    node_name: Annotated[str | None, Doc("the node")] = None
    size: Annotated[int, Doc("bytes")]


class XBlockdevChange(Command, name="x-blockdev-change", features=("unstable",)):
    """Add a child to a node that can have any number, or take one away."""

    parent: Annotated[str, Doc("the node that is changed")]
    child: Annotated[str | None, Doc("name of the child to remove")] = None
    node: Annotated[str | None, Doc("node to add as a child")] = None


StrOrNull: TypeAlias = Annotated[str | Null, Alternate("StrOrNull")]
"""A string, or null where nothing is meant."""


class XBlockdevSetIothread(Command, name="x-blockdev-set-iothread", features=("unstable",)):
    """Move a node, and all that is connected with it, to an iothread or back to the main thread."""

    node_name: Annotated[str, Doc("the node")]
    iothread: Annotated[StrOrNull, Doc("the iothread; null for the main thread")]
    force: Annotated[bool | None, Doc("move also what an export or a device is using", default="off")] = None


class BlockSetWriteThreshold(Command, name="block-set-write-threshold"):
    """Have an event emitted when somebody writes beyond an offset of a node."""

    node_name: Annotated[str, Doc("the node")]
    write_threshold: Annotated[Uint64, Doc("offset in bytes; 0 forgets it")]


class BlockImageCorrupted(EventType, name="BLOCK_IMAGE_CORRUPTED"):
    """An image turned out to be damaged. If that is fatal, it is of no use any more, and marked as corrupt."""

    device: Annotated[str, Doc("the device; empty if it has no name")]
    node_name: Annotated[str | None, Doc("the node")] = None
    msg: Annotated[str, Doc("what is wrong, for people")]
    offset: Annotated[int | None, Doc("the write that was prevented: first byte in the image file")] = None
    size: Annotated[int | None, Doc("the same: bytes")] = None
    fatal: Annotated[bool, Doc("whether the node answers errors only from now on")]


class BlockWriteThreshold(EventType, name="BLOCK_WRITE_THRESHOLD"):
    """Somebody writes beyond a threshold, which is forgotten now."""

    node_name: Annotated[str, Doc("the node")]
    amount_exceeded: Annotated[Uint64, Doc("bytes by which the write ends beyond it")]
    write_threshold: Annotated[Uint64, Doc("the threshold")]
