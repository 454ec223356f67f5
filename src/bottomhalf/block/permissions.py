# SPDX-License-Identifier: Apache-2.0
"""Permissions: what the parents of a node need from it and what they let each other do.

Each edge has two masks: ``held`` (what the parent needs of the child) and ``shared`` (what it allows the child's
other parents). Two edges into one node conflict when either needs what the other does not share. A node asks its
own children for what follows from the sum of its parents' needs; the leaf turns the sum into locks on the file.

A change must succeed whole or leave everything as it was, and locks are shared with other programs: what was given
up may not be had again. Therefore a change has two steps. First every node, parents before children, is asked for
the old and the new masks together, which takes locks and gives none up. When all have agreed, each is told the new
masks alone; otherwise the old ones. Neither can be refused, for it only gives up. (QEMU: bdrv_list_refresh_perms.)

A writer without the permission to resize must not make an image longer. An image whose size is not a multiple of
its alignment would become longer with its last block. Therefore it has readers only, and writers who may resize.
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
    from bottomhalf.block.node import Node

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
    """Make the permissions of ``node`` and below follow from its parents. BlockError (and nothing has changed) if
    that is not possible."""
    nodes = _parents_first(node)
    edges = [(edge, edge.held, edge.shared) for each in nodes for edge in each.children]
    asked: list[Node] = []
    try:
        for each in nodes:
            _check_parents(each)
            held, shared = cumulative(each)
            _check_node(each, held)
            old_held, old_shared = each.permissions
            asked.append(each)
            each.apply_permissions(old_held | held, old_shared & shared)
            for edge in each.children:
                edge.held, edge.shared = each.child_permissions(edge, held, shared)
    except BaseException:
        for edge, held, shared in edges:
            edge.held, edge.shared = held, shared
        for each in asked:
            each.apply_permissions(*each.permissions)
        raise
    for each in nodes:
        each.permissions = cumulative(each)
        each.apply_permissions(*each.permissions)


def loosen(node: Node) -> None:
    """refresh() after a parent went away. Others need no more than before; should a node refuse nevertheless, the
    permissions stay stricter than they have to be."""
    try:
        refresh(node)
    except BlockError:
        pass


def _parents_first(node: Node) -> list[Node]:
    """The node and all below, each after those of its parents that are among them."""
    found: set[int] = set()
    children_first: list[Node] = []

    def visit(each: Node) -> None:
        if id(each) not in found:
            found.add(id(each))
            for edge in each.children:
                visit(edge.node)
            children_first.append(each)

    visit(node)
    return children_first[::-1]


def _check_node(node: Node, held: int) -> None:
    if held & WRITING and node.read_only:
        raise BlockError("Block node is read-only")
    if held & PERM_WRITE and not held & PERM_RESIZE and node.is_protocol and node.size % node.request_alignment:
        raise BlockError(
            "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
        )


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
