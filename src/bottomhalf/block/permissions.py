# SPDX-License-Identifier: Apache-2.0
"""Permissions: what the parents of a node need from it and what they let each other do.

Each edge has two masks: ``held`` (what the parent needs of the child) and ``shared`` (what it allows the child's
other parents). Two edges into one node conflict when either needs what the other does not share. A node asks its
own children for what follows from the sum of its parents' needs; the leaf turns the sum into locks on the file.

A change must succeed whole or leave everything as it was, and locks are shared with other programs: what was given
up may not be had again. Therefore a change has two steps. First every node, parents before children, is asked for
the old and the new masks together, which takes locks and gives none up. When all have agreed, each is told the new
masks alone; otherwise the old ones. Neither can be refused, for it only gives up. (QEMU: bdrv_list_refresh_perms.)
Edges may have changed before: only what the graph looks like in the end has to be free of conflicts.

A writer without the permission to resize must not make an image longer. An image whose size is not a multiple of
its alignment would become longer with its last block. Therefore it has readers only, and writers who may resize.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from bottomhalf.block.edge import ROLE_COW, ROLE_FILTERED, ROLE_METADATA
from bottomhalf.block.errors import BlockError
from bottomhalf.block.transaction import Transaction
from bottomhalf.host.protocol import (
    PERM_ALL,
    PERM_CONSISTENT_READ,
    PERM_RESIZE,
    PERM_WRITE,
    PERM_WRITE_UNCHANGED,
)

if TYPE_CHECKING:
    from bottomhalf.block.edge import Edge
    from bottomhalf.block.node import Node

NAMES: Final = (
    (PERM_CONSISTENT_READ, "consistent read"),
    (PERM_WRITE, "write"),
    (PERM_WRITE_UNCHANGED, "write unchanged"),
    (PERM_RESIZE, "resize"),
)
WRITING: Final = PERM_WRITE | PERM_WRITE_UNCHANGED
CHANGING: Final = WRITING | PERM_RESIZE


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


def refresh(*nodes: Node, transaction: Transaction | None = None) -> None:
    """Make the permissions of the nodes and of all below follow from their parents. BlockError (and nothing has
    changed) if that is not possible. With a transaction the change is final, and locks are given up, when that is."""
    if transaction is None:
        with Transaction() as own:
            _refresh(nodes, own)
    else:
        _refresh(nodes, transaction)


def _refresh(roots: Iterable[Node], transaction: Transaction) -> None:
    nodes = parents_first(roots)
    edges = [(edge, edge.held, edge.shared) for each in nodes for edge in each.children]
    asked: list[Node] = []

    def undo() -> None:
        for edge, held, shared in edges:
            edge.held, edge.shared = held, shared
        for each in asked:
            each.apply_permissions(*each.permissions)

    def settle() -> None:
        for each in nodes:
            each.permissions = cumulative(each)
            each.apply_permissions(*each.permissions)

    transaction.add(commit=settle, abort=undo)
    for each in nodes:
        _check_parents(each)
        held, shared = cumulative(each)
        _check_node(each, held)
        old_held, old_shared = each.permissions
        asked.append(each)
        each.apply_permissions(old_held | held, old_shared & shared)
        for edge in each.children:
            edge.held, edge.shared = each.child_permissions(edge, held, shared)
            if not each.active:
                edge.held &= ~CHANGING
                edge.shared |= PERM_WRITE | PERM_RESIZE
            elif not edge.node.active:
                raise BlockError(f"Inactive '{edge.node.name}' can't be a {edge.name} child of active '{each.name}'")


def loosen(node: Node) -> None:
    """refresh() after a parent went away. Others need no more than before; should a node refuse nevertheless, the
    permissions stay stricter than they have to be."""
    try:
        refresh(node)
    except BlockError:
        pass


# -- what follows from a role ---------------------------------------------------------------------------------------


def for_role(node: Node, edge: Edge, held: int, shared: int) -> tuple[int, int]:
    """What a node needs of and shares at a child of the edge's role, given its parents' sum. Without a role, and for
    what it only filters, that is what its parents need and share."""
    role = edge.role
    if role & ROLE_FILTERED or not role:
        return held, shared
    if role & ROLE_COW:
        return for_backing(held, shared)
    if role & ROLE_METADATA:
        return for_storage(node, held, shared)
    return for_data(held, shared)


def for_backing(held: int, shared: int) -> tuple[int, int]:
    """A backing file is read only. Others may write to it what is there already; more only if those above do not
    mind that what they read changes."""
    shared_there = PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED
    if shared & PERM_WRITE:
        shared_there |= PERM_WRITE | PERM_RESIZE
    return held & PERM_CONSISTENT_READ, shared_there


def for_storage(node: Node, held: int, shared: int) -> tuple[int, int]:
    """A format that keeps its tables in the child reads always, writes and grows unless it is read-only (its tables
    may change although nobody writes), and lets nobody else do either."""
    if not node.read_only:
        held |= PERM_WRITE | PERM_RESIZE
    return held | PERM_CONSISTENT_READ, shared & ~(PERM_WRITE | PERM_RESIZE)


def for_data(held: int, shared: int) -> tuple[int, int]:
    """Data that the parent places itself: a write may make the child longer, and nobody else may change its size."""
    if held & WRITING:
        held |= PERM_WRITE | PERM_RESIZE
    return held, shared & ~PERM_RESIZE


# -- checks ---------------------------------------------------------------------------------------------------------


def parents_first(roots: Iterable[Node]) -> list[Node]:
    """The nodes and all below, each after those of its parents that are among them."""
    found: set[int] = set()
    children_first: list[Node] = []

    def visit(each: Node) -> None:
        if id(each) not in found:
            found.add(id(each))
            for edge in each.children:
                visit(edge.node)
            children_first.append(each)

    for root in roots:
        visit(root)
    return children_first[::-1]


def _check_node(node: Node, held: int) -> None:
    if held & CHANGING and not node.active:
        raise BlockError(f"Permission '{names(held & CHANGING)}' unavailable on inactive node")
    if held & WRITING and node.read_only:
        if node.turning_read_only:
            raise BlockError(f"Read-only block node '{node.name}' cannot support read-write users")
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
