# SPDX-License-Identifier: Apache-2.0
"""From the options of the filters to their nodes. Apart from the registry, because a program that serves a file never
needs it, and each filter is imported when the first of its kind is opened."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bottomhalf.block import BlockError, Node
from bottomhalf.host.protocol import PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED
from bottomhalf.qapi.block import BlockPermission, OnCbwError

if TYPE_CHECKING:
    from bottomhalf.drivers.registry import Opening

_PERMISSIONS: Final = {
    BlockPermission.CONSISTENT_READ: PERM_CONSISTENT_READ,
    BlockPermission.WRITE: PERM_WRITE,
    BlockPermission.WRITE_UNCHANGED: PERM_WRITE_UNCHANGED,
    BlockPermission.RESIZE: PERM_RESIZE,
}


def _open_throttle(opening: Opening) -> Node:
    from bottomhalf.block.throttling import throttle_groups
    from bottomhalf.drivers.throttle import ThrottleNode

    group = throttle_groups(opening.graph).find(opening.branch.throttle_group)
    return ThrottleNode(opening.graph, **opening.common, file=opening.child(opening.branch.file), group=group)


def _open_blkdebug(opening: Opening) -> Node:
    from bottomhalf.block.limits import RequestLimits
    from bottomhalf.drivers.blkdebug import BlkdebugNode, ErrorRule, StateRule

    branch = opening.branch
    if branch.config is not None:
        raise BlockError("blkdebug's config files are not supported; give the rules as inject-error and set-state")
    rules: list[ErrorRule | StateRule] = [
        ErrorRule(
            each.event,
            each.state or 0,
            each.iotype,
            errno.EIO if each.errno is None else each.errno,
            -1 if each.sector is None else each.sector,
            bool(each.once),
            bool(each.immediately),
        )
        for each in branch.inject_error or ()
    ]
    rules += [StateRule(each.event, each.new_state, each.state or 0) for each in branch.set_state or ()]
    for name in ("max_transfer", "opt_write_zero", "max_write_zero", "opt_discard", "max_discard"):
        value = getattr(branch, name)
        if value is not None and value < 0:
            raise BlockError(f"Value '{value}' is out of range for parameter '{name.replace('_', '-')}'")
    return BlkdebugNode(
        opening.graph,
        **opening.common,
        image=opening.child(branch.image),
        rules=rules,
        align=branch.align or 0,
        limits=RequestLimits(
            branch.max_transfer or 0,
            branch.opt_write_zero or 0,
            branch.max_write_zero or 0,
            branch.opt_discard or 0,
            branch.max_discard or 0,
        ),
        take=_permissions(branch.take_child_perms),
        unshare=_permissions(branch.unshare_child_perms),
    )


def _permissions(given: list[BlockPermission] | None) -> int:
    return sum(_PERMISSIONS[permission] for permission in set(given or ()))


def _open_blkverify(opening: Opening) -> Node:
    from bottomhalf.drivers.blkverify import BlkverifyNode

    raw = opening.child(opening.branch.raw)
    return BlkverifyNode(opening.graph, **opening.common, raw=raw, test=opening.child(opening.branch.test))


def _open_compress(opening: Opening) -> Node:
    from bottomhalf.drivers.compress import CompressNode

    return CompressNode(opening.graph, **opening.common, file=opening.child(opening.branch.file))


def _open_copy_on_read(opening: Opening) -> Node:
    from bottomhalf.drivers.copy_on_read import CopyOnReadNode

    bottom = None
    if opening.branch.bottom is not None:
        bottom = opening.graph.nodes.get(opening.branch.bottom)
        if bottom is None:
            raise BlockError(f"Bottom node '{opening.branch.bottom}' not found")
    file = opening.child(opening.branch.file)
    return CopyOnReadNode(opening.graph, **opening.common, file=file, bottom=bottom)


def _open_preallocate(opening: Opening) -> Node:
    from bottomhalf.drivers.preallocate import ALIGN_DEFAULT, SIZE_DEFAULT, PreallocateNode

    branch = opening.branch
    return PreallocateNode(
        opening.graph,
        **opening.common,
        file=opening.child(branch.file),
        prealloc_size=SIZE_DEFAULT if branch.prealloc_size is None else branch.prealloc_size,
        prealloc_align=ALIGN_DEFAULT if branch.prealloc_align is None else branch.prealloc_align,
    )


def _open_copy_before_write(opening: Opening) -> Node:
    from bottomhalf.block.dirty import find_bitmap
    from bottomhalf.drivers.copy_before_write import CopyBeforeWriteNode

    branch = opening.branch
    bitmap = find_bitmap(opening.graph, branch.bitmap.node, branch.bitmap.name) if branch.bitmap else None
    return CopyBeforeWriteNode(
        opening.graph,
        **opening.common,
        file=opening.child(branch.file),
        target=opening.child(branch.target),
        bitmap=bitmap,
        break_snapshot=branch.on_cbw_error == OnCbwError.BREAK_SNAPSHOT,
        timeout_ns=(branch.cbw_timeout or 0) * 1_000_000_000,
        min_cluster=branch.min_cluster_size or 0,
    )


def _open_snapshot_access(opening: Opening) -> Node:
    from bottomhalf.drivers.snapshot_access import SnapshotAccessNode

    return SnapshotAccessNode(opening.graph, **opening.common, file=opening.child(opening.branch.file))


OPENERS: Final[dict[str, Callable[[Opening], Node]]] = {
    "blkdebug": _open_blkdebug,
    "blkverify": _open_blkverify,
    "compress": _open_compress,
    "copy-before-write": _open_copy_before_write,
    "copy-on-read": _open_copy_on_read,
    "preallocate": _open_preallocate,
    "snapshot-access": _open_snapshot_access,
    "throttle": _open_throttle,
}
