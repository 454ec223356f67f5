# SPDX-License-Identifier: Apache-2.0
"""The persistent dirty bitmaps of image files that nobody has open (what ``qemu-img bitmap`` does).

    bottomhalf.bitmap_add("disk.qcow2", "since-monday")
    ... the image is written to, by whomever knows bitmaps ...
    for bitmap in bottomhalf.bitmaps("disk.qcow2"):
        print(bitmap.name, bitmap.granularity, bitmap.dirty_bytes)
    bottomhalf.bitmap_clear("disk.qcow2", "since-monday")

Errors are BlockError (an ImageError where the image's bytes are at fault) and OSError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import NamedTuple

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockBackend, BlockError, Graph, Node, dirty
from bottomhalf.block.dirty import NamedBitmap
from bottomhalf.drivers.keywords import check_kind
from bottomhalf.drivers.qcow2.node import Qcow2Node
from bottomhalf.host.protocol import PERM_CONSISTENT_READ, PERM_WRITE

__all__ = [
    "BitmapInfo",
    "bitmap_add",
    "bitmap_clear",
    "bitmap_disable",
    "bitmap_enable",
    "bitmap_merge",
    "bitmap_remove",
    "bitmaps",
]


class BitmapInfo(NamedTuple):
    """A bitmap in an image. ``inconsistent``: it was not written back, and can only be removed."""

    name: str
    granularity: int  # bytes
    enabled: bool
    inconsistent: bool
    dirty: list[tuple[int, int]]  # (begin, end) in bytes

    @property
    def dirty_bytes(self) -> int:
        return sum(end - begin for begin, end in self.dirty)


def bitmaps(path: str | PathLike[str], *, follow_names: bool = False) -> list[BitmapInfo]:
    """The bitmaps in an image, in its order, with what is dirty; none for a format that has no such thing.
    ``follow_names``: the data file that the image names may be opened, which images that have one need."""
    with _opened(fspath(path), read_only=True, follow_names=follow_names) as node:
        return [
            BitmapInfo(
                bitmap.name,
                bitmap.granularity,
                bitmap.enabled,
                bitmap.inconsistent,
                list(bitmap.dirty_ranges(0, bitmap.size)),
            )
            for bitmap in node.bitmaps.values()
        ]


def bitmap_add(
    path: str | PathLike[str],
    name: str,
    *,
    granularity: int | None = None,
    enabled: bool = True,
    follow_names: bool = False,
) -> None:
    """Let an image have a bitmap, which is clean. ``granularity`` in bytes, a power of two; None: the image's clusters,
    within 4 KiB and 64 KiB."""
    check_kind("enabled", enabled, bool)
    with _opened(fspath(path), follow_names=follow_names) as node:
        dirty.add_bitmap(node, name, granularity, enabled=enabled, persistent=True)


def bitmap_remove(path: str | PathLike[str], name: str, *, follow_names: bool = False) -> None:
    """Take a bitmap away, an inconsistent one, too."""
    with _opened(fspath(path), follow_names=follow_names) as node:
        bitmap = _find(node, name)
        assert node.bitmap_keeper is not None
        node.context.run(node.bitmap_keeper.co_forget(name), what=f"the end of bitmap '{name}' in {fspath(path)}")
        dirty.drop_bitmap(node, bitmap)


def bitmap_clear(path: str | PathLike[str], name: str, *, follow_names: bool = False) -> None:
    """Let nothing be dirty."""
    with _opened(fspath(path), follow_names=follow_names) as node:
        _usable(node, name).clear()


def bitmap_enable(path: str | PathLike[str], name: str, *, follow_names: bool = False) -> None:
    """Let a bitmap follow what is written from now on."""
    with _opened(fspath(path), follow_names=follow_names) as node:
        dirty.set_enabled(node, _usable(node, name), True)


def bitmap_disable(path: str | PathLike[str], name: str, *, follow_names: bool = False) -> None:
    """Let a bitmap stay as it is."""
    with _opened(fspath(path), follow_names=follow_names) as node:
        dirty.set_enabled(node, _usable(node, name), False)


def bitmap_merge(
    path: str | PathLike[str],
    name: str,
    source: str,
    *,
    source_path: str | PathLike[str] | None = None,
    follow_names: bool = False,
) -> None:
    """What is dirty in the bitmap ``source`` of the same image, or of the one at ``source_path``, is dirty in ``name``,
    too."""
    with _opened(fspath(path), follow_names=follow_names) as node:
        target = _find(node, name)
        if source_path is None:
            dirty.merge_bitmaps(target, [_find(node, source)])
            return
        with _opened(fspath(source_path), read_only=True, follow_names=follow_names) as other:
            dirty.merge_bitmaps(target, [_find(other, source)])


def _find(node: Node, name: str) -> NamedBitmap:
    bitmap = node.bitmaps.get(name)
    if bitmap is None:
        raise BlockError(f"Dirty bitmap '{name}' not found")
    return bitmap


def _usable(node: Node, name: str) -> NamedBitmap:
    bitmap = _find(node, name)
    dirty.check_usable(bitmap)
    return bitmap


@contextmanager
def _opened(path: str, *, read_only: bool = False, follow_names: bool) -> Iterator[Node]:
    """An image without its backing file, which nobody else writes to. Its bitmaps are stored at the end."""
    from bottomhalf.drivers.registry import file_driver, open_node
    from bottomhalf.qapi.block import BlockdevOptions
    from bottomhalf.qapi.visit import from_json
    from bottomhalf.tools.formats import image_format

    context = AioContext(name="image")
    graph = Graph(context)
    held = PERM_CONSISTENT_READ | (0 if read_only else PERM_WRITE)
    backend = BlockBackend(graph, held=held, shared=PERM_CONSISTENT_READ)
    try:
        below = {"driver": file_driver(graph, path), "filename": path}
        format = image_format(context.host, path)
        options = {"driver": format, "read-only": read_only, "file": below}
        if format == "qcow2":
            options["backing"] = None
        node = open_node(graph, from_json(BlockdevOptions, options), follow_names=follow_names)
        node.monitor_owned = True
        backend.insert(node)
        if not read_only and not isinstance(node, Qcow2Node):
            raise BlockError(f"Can't store persistent bitmaps to {path}: Operation not supported")
        yield node
    finally:
        backend.close()
        graph.close()
        context.close()
