# SPDX-License-Identifier: Apache-2.0
"""bottomhalf: QEMU's asynchronous core as Python software.

    import bottomhalf

    with bottomhalf.open("disk.raw") as disk:
        disk.pwrite(b"hello", 4096)
        print(disk.pread(5, 4096))

See ``bottomhalf.aio`` for the event core and ``bottomhalf.block`` for the block layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "AsyncDisk",
    "BitmapInfo",
    "Disk",
    "ImageInfo",
    "__version__",
    "amend",
    "bitmap_add",
    "bitmap_clear",
    "bitmap_disable",
    "bitmap_enable",
    "bitmap_merge",
    "bitmap_remove",
    "bitmaps",
    "check",
    "create",
    "info",
    "open",
    "rebase",
    "resize",
    "snapshot_apply",
    "snapshot_create",
    "snapshot_delete",
    "snapshots",
]

if TYPE_CHECKING:
    from bottomhalf.image_bitmaps import (
        BitmapInfo,
        bitmap_add,
        bitmap_clear,
        bitmap_disable,
        bitmap_enable,
        bitmap_merge,
        bitmap_remove,
        bitmaps,
    )
    from bottomhalf.images import (
        ImageInfo,
        amend,
        check,
        create,
        info,
        rebase,
        resize,
        snapshot_apply,
        snapshot_create,
        snapshot_delete,
        snapshots,
    )
    from bottomhalf.library import AsyncDisk, Disk, open


def __getattr__(name: str) -> Any:
    """Load the library's face when it is first used: tools that do not need it start sooner."""
    if name in ("Disk", "AsyncDisk", "open"):
        from bottomhalf import library

        return getattr(library, name)
    if name.lower().startswith("bitmap") and name in __all__:
        from bottomhalf import image_bitmaps

        return getattr(image_bitmaps, name)
    if name in __all__:
        from bottomhalf import images

        return getattr(images, name)
    raise AttributeError(f"module 'bottomhalf' has no attribute {name!r}")
