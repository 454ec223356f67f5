# SPDX-License-Identifier: Apache-2.0
"""From the options of the filters to their nodes. Apart from the registry, because a program that serves a file never
needs it, and each filter is imported when the first of its kind is opened."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bottomhalf.block import BlockError, Node
from bottomhalf.host.protocol import PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED
from bottomhalf.qapi.block import BlockPermission

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


OPENERS: Final[dict[str, Callable[[Opening], Node]]] = {
    "blkdebug": _open_blkdebug,
    "throttle": _open_throttle,
}
