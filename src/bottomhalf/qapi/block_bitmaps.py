# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps of nodes (qapi/block-core.json): ``block-dirty-bitmap-add`` and its sisters."""

from __future__ import annotations

from typing import Annotated

from bottomhalf.qapi.common import BlockDirtyBitmap
from bottomhalf.qapi.export import BlockDirtyBitmapOrStr
from bottomhalf.qapi.types import Command, Doc, Struct, Uint32


class BlockDirtyBitmapAddArguments(Struct):
    """A bitmap that is to be made."""

    node: Annotated[str, Doc("the node whose writes it follows")]
    name: Annotated[str, Doc("its name, which no other bitmap of the node has")]
    granularity: Annotated[
        Uint32 | None, Doc("bytes per bit, a power of two", default="the image's clusters, 4 KiB to 64 KiB")
    ] = None
    persistent: Annotated[bool | None, Doc("the image keeps it", default="off")] = None
    disabled: Annotated[bool | None, Doc("it does not follow writes at first", default="off")] = None


class BlockDirtyBitmapAdd(Command, name="block-dirty-bitmap-add", boxed=BlockDirtyBitmapAddArguments):
    """Make a bitmap, which is clean."""


class BlockDirtyBitmapRemove(Command, name="block-dirty-bitmap-remove", boxed=BlockDirtyBitmap):
    """Take a bitmap away, also from the image that keeps it. Inconsistent ones, too."""


class BlockDirtyBitmapClear(Command, name="block-dirty-bitmap-clear", boxed=BlockDirtyBitmap):
    """Let nothing be dirty."""


class BlockDirtyBitmapEnable(Command, name="block-dirty-bitmap-enable", boxed=BlockDirtyBitmap):
    """Let a bitmap follow writes."""


class BlockDirtyBitmapDisable(Command, name="block-dirty-bitmap-disable", boxed=BlockDirtyBitmap):
    """Let a bitmap stay as it is."""


class BlockDirtyBitmapMergeArguments(Struct):
    """Bitmaps that are to be added to another."""

    node: Annotated[str, Doc("the target's node, and that of bitmaps by name alone")]
    target: Annotated[str, Doc("the bitmap that changes")]
    bitmaps: Annotated[list[BlockDirtyBitmapOrStr], Doc("the others, of disks of the same size")]


class BlockDirtyBitmapMerge(Command, name="block-dirty-bitmap-merge", boxed=BlockDirtyBitmapMergeArguments):
    """What is dirty in one of the others is dirty in the target, too. All of them or none."""


class BlockDirtyBitmapSha256(Struct):
    """A checksum of a bitmap."""

    sha256: Annotated[str, Doc("hexadecimal, of its bits in words of 64")]


class XDebugBlockDirtyBitmapSha256(
    Command,
    name="x-debug-block-dirty-bitmap-sha256",
    boxed=BlockDirtyBitmap,
    returns=BlockDirtyBitmapSha256,
    features=("unstable",),
):
    """Compare bitmaps: a checksum of one."""


class BlockDirtyBitmapWrapper(Struct):
    """An action and its arguments."""

    data: Annotated[BlockDirtyBitmap, Doc("the arguments")]


class BlockDirtyBitmapAddWrapper(Struct):
    """An action and its arguments."""

    data: Annotated[BlockDirtyBitmapAddArguments, Doc("the arguments")]


class BlockDirtyBitmapMergeWrapper(Struct):
    """An action and its arguments."""

    data: Annotated[BlockDirtyBitmapMergeArguments, Doc("the arguments")]
