# SPDX-License-Identifier: Apache-2.0
"""Overlays made on the spot, changes that are made together, and the older names of exports (qapi/block-core.json,
qapi/transaction.json, qapi/block-export.json).

The kinds of actions are those that exist here: a client finds out from the schema which he may put together.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from bottomhalf.qapi.block import BlockdevSnapshot
from bottomhalf.qapi.block_bitmaps import (
    BlockDirtyBitmapAddWrapper,
    BlockDirtyBitmapMergeWrapper,
    BlockDirtyBitmapWrapper,
)
from bottomhalf.qapi.block_snapshots import BlockdevSnapshotInternalSync
from bottomhalf.qapi.export import BlockExportRemoveMode
from bottomhalf.qapi.types import Command, Doc, Struct, TaggedUnion


class NewImageMode(StrEnum):
    """Where a new image comes from."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


class BlockdevSnapshotSyncArguments(Struct):
    """An image file as a new overlay."""

    device: Annotated[str | None, Doc("a device by its name")] = None
    node_name: Annotated[str | None, Doc("the node that becomes the backing node")] = None
    snapshot_file: Annotated[str, Doc("path of the overlay's file")]
    snapshot_node_name: Annotated[str | None, Doc("name of the overlay's node; needed where node-name is used")] = None
    format: Annotated[str | None, Doc("format of the overlay", default="qcow2")] = None
    mode: Annotated[NewImageMode | None, Doc("make the file or take what is there", default="absolute-paths")] = None


class BlockdevSnapshotSync(Command, name="blockdev-snapshot-sync", boxed=BlockdevSnapshotSyncArguments):
    """Make an image and put it above a node.

    The overlay lives as long as somebody uses it: if nobody used the node, it is closed at once, and the file stays.
    """


class ChangeBackingFile(Command, name="change-backing-file"):
    """Write another name of its backing file into an image. The graph stays as it is."""

    device: Annotated[str, Doc("device or node at the top of the chain")]
    image_node_name: Annotated[str, Doc("node in the chain whose image is changed")]
    backing_file: Annotated[str, Doc("the new name; nobody checks it")]


class NbdServerAddOptions(Struct):
    """An export by its older names."""

    name: Annotated[str | None, Doc("name and id of the export", default="the device's name")] = None
    description: Annotated[str | None, Doc("text that clients may show, up to 4096 bytes")] = None
    device: Annotated[str, Doc("device or node to export")]
    writable: Annotated[bool | None, Doc("clients may write, unless the node is read-only", default="off")] = None
    bitmap: Annotated[str | None, Doc("bitmap offered as qemu:dirty-bitmap:NAME")] = None


class NbdServerAdd(Command, name="nbd-server-add", boxed=NbdServerAddOptions, features=("deprecated",)):
    """Export a node by NBD; block-export-add does more."""


class NbdServerRemove(Command, name="nbd-server-remove", features=("deprecated",)):
    """Remove an export; the same as block-export-del."""

    name: Annotated[str, Doc("id of the export")]
    mode: Annotated[
        BlockExportRemoveMode | None,
        Doc("safe: fail while clients are connected; hard: disconnect them", default="safe"),
    ] = None


class Abort(Struct):
    """Nothing: the action fails."""


class AbortWrapper(Struct):
    """An action and its arguments."""

    data: Annotated[Abort, Doc("none")]


class BlockdevSnapshotWrapper(Struct):
    """An action and its arguments."""

    data: Annotated[BlockdevSnapshot, Doc("the arguments")]


class BlockdevSnapshotInternalWrapper(Struct):
    """An action and its arguments."""

    data: Annotated[BlockdevSnapshotInternalSync, Doc("the arguments")]


class BlockdevSnapshotSyncWrapper(Struct):
    """An action and its arguments."""

    data: Annotated[BlockdevSnapshotSyncArguments, Doc("the arguments")]


class TransactionActionKind(StrEnum):
    """Kinds of actions."""

    ABORT = "abort"
    BLOCK_DIRTY_BITMAP_ADD = "block-dirty-bitmap-add"
    BLOCK_DIRTY_BITMAP_CLEAR = "block-dirty-bitmap-clear"
    BLOCK_DIRTY_BITMAP_DISABLE = "block-dirty-bitmap-disable"
    BLOCK_DIRTY_BITMAP_ENABLE = "block-dirty-bitmap-enable"
    BLOCK_DIRTY_BITMAP_MERGE = "block-dirty-bitmap-merge"
    BLOCK_DIRTY_BITMAP_REMOVE = "block-dirty-bitmap-remove"
    BLOCKDEV_SNAPSHOT = "blockdev-snapshot"
    BLOCKDEV_SNAPSHOT_INTERNAL_SYNC = "blockdev-snapshot-internal-sync"
    BLOCKDEV_SNAPSHOT_SYNC = "blockdev-snapshot-sync"


class TransactionAction(
    TaggedUnion,
    tag="type",
    branches={
        "abort": AbortWrapper,
        "block-dirty-bitmap-add": BlockDirtyBitmapAddWrapper,
        "block-dirty-bitmap-clear": BlockDirtyBitmapWrapper,
        "block-dirty-bitmap-disable": BlockDirtyBitmapWrapper,
        "block-dirty-bitmap-enable": BlockDirtyBitmapWrapper,
        "block-dirty-bitmap-merge": BlockDirtyBitmapMergeWrapper,
        "block-dirty-bitmap-remove": BlockDirtyBitmapWrapper,
        "blockdev-snapshot": BlockdevSnapshotWrapper,
        "blockdev-snapshot-internal-sync": BlockdevSnapshotInternalWrapper,
        "blockdev-snapshot-sync": BlockdevSnapshotSyncWrapper,
    },
):
    """One of the changes that are made together."""

    type: Annotated[TransactionActionKind, Doc("its kind")]


class ActionCompletionMode(StrEnum):
    """Whether jobs that are begun together also end together."""

    INDIVIDUAL = "individual"
    GROUPED = "grouped"


class TransactionProperties(Struct):
    """Options of all actions."""

    completion_mode: Annotated[
        ActionCompletionMode | None, Doc("how jobs end; no action here is one", default="individual")
    ] = None


class TransactionCommand(Command, name="transaction"):
    """Carry out all actions at one point in time, or none."""

    actions: Annotated[list[TransactionAction], Doc("the actions, in order")]
    properties: Annotated[TransactionProperties | None, Doc("options of all of them")] = None
