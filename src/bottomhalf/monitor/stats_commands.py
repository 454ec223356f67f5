# SPDX-License-Identifier: Apache-2.0
"""``query-blockstats``: how far nodes have been written, and what their drivers count."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block import Node
from bottomhalf.block.edge import ROLE_COW, ROLE_DATA, ROLE_FILTERED, ROLE_PRIMARY
from bottomhalf.block.written import written_ends
from bottomhalf.drivers.describe import in_order_of_opening
from bottomhalf.drivers.file import FileNode
from bottomhalf.qapi.block import BlockdevDriver
from bottomhalf.qapi.block_stats import (
    BlockDeviceStats,
    BlockStats,
    BlockStatsSpecific,
    BlockStatsSpecificFile,
    QueryBlockstats,
)
from bottomhalf.qapi.types import BOOL, INT, members

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage


def query_blockstats(storage: Storage, arguments: QueryBlockstats) -> list[BlockStats]:
    """query-blockstats. Devices have a name, and there are none: see query_block."""
    if not arguments.query_nodes:
        return []
    ends = written_ends(storage.graph)
    return [_stats(node, ends) for node in in_order_of_opening(storage.graph)]


def _stats(node: Node, ends: dict[Node, int]) -> BlockStats:
    below = _holder(node)
    return BlockStats(
        node_name=node.name,
        stats=_numbers(ends.get(node, 0)),
        driver_specific=_specific(node),
        parent=None if below is None else _stats(below, ends),
    )


def _holder(node: Node) -> Node | None:
    """The child that has the node's data: the one that counts, unless only tables are there."""
    roles = [(edge.role or ROLE_DATA | ROLE_PRIMARY, edge.node) for edge in node.children if edge.name != "backing"]
    holders = [(role, child) for role, child in roles if role & (ROLE_DATA | ROLE_FILTERED) and not role & ROLE_COW]
    holders.sort(key=lambda found: not found[0] & ROLE_PRIMARY)
    return holders[0][1] if holders else None


def _numbers(written_end: int) -> BlockDeviceStats:
    """Nothing but the highest write is counted of a node."""
    nothing: dict[Any, Any] = {INT: 0, BOOL: False}
    given: dict[str, Any] = {
        member.attribute: nothing.get(member.type, [])
        for member in members(BlockDeviceStats)
        if not member.optional
    }
    return BlockDeviceStats(**{**given, "wr_highest_offset": written_end})


def _specific(node: Node) -> BlockStatsSpecific | None:
    if not isinstance(node, FileNode):
        return None
    counts = node.discards
    return BlockStatsSpecific(
        driver=BlockdevDriver(node.driver),
        branch=BlockStatsSpecificFile(
            discard_nb_ok=counts.ok, discard_nb_failed=counts.failed, discard_bytes_ok=counts.bytes_ok
        ),
    )


HANDLERS: Final[dict[str, Callable[[Storage, Any], Any]]] = {"query-blockstats": query_blockstats}
