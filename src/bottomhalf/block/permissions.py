# SPDX-License-Identifier: Apache-2.0
"""Permissions: what the parents of a node need from it and what they let each other do.

Each edge has two masks: ``held`` (what the parent needs of the child) and ``shared`` (what it allows the child's
other parents). Two edges into one node conflict when either needs what the other does not share. A node asks its
own children for what follows from the sum of its parents' needs; the leaf turns the sum into locks on the file.

A change is tried first: new masks are computed top down and checked; only when every node and every lock agreed
do they hold, otherwise everything is as before. (QEMU: bdrv_list_refresh_perms.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import BlockError
from bottomhalf.host.protocol import (
    PERM_ALL,
    PERM_CONSISTENT_READ,
    PERM_RESIZE,
    PERM_WRITE,
    PERM_WRITE_UNCHANGED,
)

if TYPE_CHECKING:
    from bottomhalf.block.node import Edge, Node

NAMES: Final = (
    (PERM_CONSISTENT_READ, "consistent read"),
    (PERM_WRITE, "write"),
    (PERM_WRITE_UNCHANGED, "write unchanged"),
    (PERM_RESIZE, "resize"),
)
WRITING: Final = PERM_WRITE | PERM_WRITE_UNCHANGED


def names(mask: int) -> str:
    """The permissions of a mask in words, as QEMU prints them."""
    return ", ".join(name for bit, name in NAMES if mask & bit)


def cumulative(node: Node) -> tuple[int, int]:
    """(held, shared) of all parents of a node together."""
    held, shared = 0, PERM_ALL
    for edge in node.parents:
        held |= edge.held
        shared &= edge.shared
    return held, shared


def refresh(node: Node) -> None:
    """Make the permissions below ``node`` follow from its parents. BlockError or ImageInUse (and nothing has
    changed) if that is not possible."""
    undo: list[tuple[Edge, int, int]] = []
    applied: list[Node] = []
    try:
        _refresh(node, undo, applied)
    except BaseException:
        for edge, held, shared in reversed(undo):
            edge.held, edge.shared = held, shared
        for changed in reversed(applied):
            changed.apply_permissions(*cumulative(changed))
        raise


def _refresh(node: Node, undo: list[tuple[Edge, int, int]], applied: list[Node]) -> None:
    _check_parents(node)
    held, shared = cumulative(node)
    if held & WRITING and node.read_only:
        raise BlockError("Block node is read-only")
    node.apply_permissions(held, shared)
    applied.append(node)
    for edge in node.children:
        undo.append((edge, edge.held, edge.shared))
        edge.held, edge.shared = node.child_permissions(edge, held, shared)
        _refresh(edge.node, undo, applied)


def _check_parents(node: Node) -> None:
    for first in node.parents:
        for second in node.parents:
            missing = first.held & ~second.shared
            if first is not second and missing:
                raise BlockError(
                    f"Permission conflict on node '{node.name}': permissions '{names(missing)}' are both required "
                    f"by {first.user} (uses node '{node.name}' as '{first.name}' child) and unshared by "
                    f"{second.user} (uses node '{node.name}' as '{second.name}' child)."
                )
