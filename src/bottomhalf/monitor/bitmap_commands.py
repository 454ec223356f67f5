# SPDX-License-Identifier: Apache-2.0
"""QMP commands about dirty bitmaps, alone and in transactions.

Each is an action: it changes something and returns how to undo that and how to finish it, as ``overlay_commands`` has
it. Alone it is done in a drained section of its node, in a transaction everything is drained; so what was written
before the command is marked, and what is written after it is marked in what the command has left.

A persistent bitmap that is removed leaves the image at once, also in a transaction, for that can fail; if it is to stay
after all, the image has it again when it is closed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bottomhalf.block import BlockError, ImageError, Node
from bottomhalf.block.dirty import (
    NamedBitmap,
    add_bitmap,
    check_usable,
    drop_bitmap,
    find_bitmap,
    find_node,
    merge_bitmaps,
    set_enabled,
)
from bottomhalf.block.work import carry_out
from bottomhalf.qapi.block_bitmaps import (
    BlockDirtyBitmapAddArguments,
    BlockDirtyBitmapMergeArguments,
    BlockDirtyBitmapSha256,
)
from bottomhalf.qapi.common import BlockDirtyBitmap

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage

Steps: TypeAlias = tuple[Callable[[], object], Callable[[], object]]  # undo, finish


def _nothing() -> None:
    pass


# -- actions --------------------------------------------------------------------------------------------------------


def _found(storage: Storage, arguments: BlockDirtyBitmap) -> tuple[Node, NamedBitmap]:
    bitmap = find_bitmap(storage.graph, arguments.node, arguments.name)
    return find_node(storage.graph, arguments.node), bitmap


def _add(storage: Storage, arguments: BlockDirtyBitmapAddArguments) -> Steps:
    if not arguments.name:
        raise BlockError("Bitmap name cannot be empty")
    node = storage.graph.find(arguments.node, device=arguments.node)
    bitmap = add_bitmap(
        node,
        arguments.name,
        arguments.granularity,
        enabled=not arguments.disabled,
        persistent=bool(arguments.persistent),
    )
    return partial(drop_bitmap, node, bitmap), _nothing


def _remove(storage: Storage, arguments: BlockDirtyBitmap) -> Steps:
    node, bitmap = _found(storage, arguments)
    check_usable(bitmap, inconsistent=True)
    if bitmap.persistent and node.bitmap_keeper is not None:
        body = node.bitmap_keeper.co_forget(bitmap.name)
        try:
            carry_out(storage.graph, node, body, f"the end of bitmap '{bitmap.name}'")
        except (OSError, ImageError) as error:
            why = getattr(error, "strerror", None) or error
            raise BlockError(f"Failed to remove persistent bitmap '{bitmap.name}': {why}") from error
    bitmap.busy = True  # it can be neither used nor named anew until this is final

    def undo() -> None:
        bitmap.busy = False

    return undo, partial(drop_bitmap, node, bitmap)


def _clear(storage: Storage, arguments: BlockDirtyBitmap) -> Steps:
    _, bitmap = _found(storage, arguments)
    check_usable(bitmap)
    before = bitmap.clear()
    return partial(bitmap.exchange, before), _nothing


def _enable(storage: Storage, arguments: BlockDirtyBitmap, enabled: bool = True) -> Steps:
    node, bitmap = _found(storage, arguments)
    check_usable(bitmap, read_only=True)
    before = bitmap.enabled
    set_enabled(node, bitmap, enabled)
    return partial(set_enabled, node, bitmap, before), _nothing


def _disable(storage: Storage, arguments: BlockDirtyBitmap) -> Steps:
    return _enable(storage, arguments, False)


def _merge(storage: Storage, arguments: BlockDirtyBitmapMergeArguments) -> Steps:
    graph = storage.graph
    target = find_bitmap(graph, arguments.node, arguments.target)
    sources = [
        find_bitmap(graph, arguments.node, each) if isinstance(each, str) else find_bitmap(graph, each.node, each.name)
        for each in arguments.bitmaps
    ]
    before = target.copy_of_bits()
    merge_bitmaps(target, sources)
    return partial(target.exchange, before), _nothing


ACTIONS: Final[dict[str, Callable[[Storage, Any], Steps]]] = {
    "block-dirty-bitmap-add": _add,
    "block-dirty-bitmap-clear": _clear,
    "block-dirty-bitmap-disable": _disable,
    "block-dirty-bitmap-enable": _enable,
    "block-dirty-bitmap-merge": _merge,
    "block-dirty-bitmap-remove": _remove,
}


# -- commands -------------------------------------------------------------------------------------------------------


def _alone(action: Callable[[Storage, Any], Steps], storage: Storage, arguments: Any) -> None:
    graph = storage.graph
    node = graph.nodes.get(arguments.node)
    if node is None:
        action(storage, arguments)  # which has the right words for that
        return
    with graph.holding(node), graph.drained(node):
        _, finish = action(storage, arguments)
        finish()


def x_debug_block_dirty_bitmap_sha256(storage: Storage, arguments: BlockDirtyBitmap) -> BlockDirtyBitmapSha256:
    """x-debug-block-dirty-bitmap-sha256."""
    return BlockDirtyBitmapSha256(sha256=_found(storage, arguments)[1].checksum())


def _command(action: Callable[[Storage, Any], Steps]) -> Callable[[Storage, Any], Any]:
    return lambda storage, arguments: _alone(action, storage, arguments)


HANDLERS: Final[dict[str, Callable[[Storage, Any], Any]]] = {
    **{name: _command(action) for name, action in ACTIONS.items()},
    "x-debug-block-dirty-bitmap-sha256": x_debug_block_dirty_bitmap_sha256,
}
