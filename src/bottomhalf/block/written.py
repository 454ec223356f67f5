# SPDX-License-Identifier: Apache-2.0
"""How far a node has ever been written: the end of the highest write, which ``query-blockstats`` tells.

Management programs watch it to enlarge a thin disk in time. Every node needs to know it of itself, and every write
concerns all nodes that it comes by, so counting where it comes by would cost every layer a look at every request. But
a number that only grows need be looked at only when it grows, and those who let requests in compare their ends with
a limit anyway: a backend with the size of the disk, qcow2 with that of its file. They compare with the highest end so
far instead, if that is less, and only who gets beyond it takes the longer way. So random writes pay nothing, and a
first pass over a disk an addition or two per list.

Where writes come in:

* backends keep their number, ``noted``, for themselves and pass it on when somebody asks or before the graph below them
  changes, because then it is others whom the next writes concern;
* qcow2 does the same look in its own list of plain writes, and notes at once;
* a coroutine that submits to a node itself (``co_submit`` and its like) notes at once: it is slow already.

``Node.written_below()`` says how far a write goes into which children: filters pass it on as it is. Formats decide
themselves what they write, which is seen where they do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf.host.request import WRITE, WRITE_ZEROES

if TYPE_CHECKING:
    from bottomhalf.block.edge import Edge
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node

CHANGES_BYTES: Final = (False, True, False, False, True)  # by op; a discard is no write
assert CHANGES_BYTES[WRITE] and CHANGES_BYTES[WRITE_ZEROES] and sum(CHANGES_BYTES) == 2


def _rounded(node: Node, end: int) -> int:
    """What the driver writes for a write up to ``end``: whole units."""
    alignment = node.request_alignment
    return -(-end // alignment) * alignment


def note(node: Node, end: int) -> None:
    """Somebody writes to a node up to byte ``end``. Home thread of the node's context, or in a drained section."""
    if end <= node.noted:
        return
    node.noted = end
    if node.request_alignment > 1:
        end = _rounded(node, end)
    if end > node.written_end:
        node.written_end = end
    if node.children:
        for child, child_end in node.written_below(end):
            note(child, child_end)


def fits_in(node: Node, end: int) -> bool:
    """Whether a write up to byte ``end`` lies within the node; then it is noted."""
    if end > node.size:
        return False
    note(node, end)
    return True


def settle_above(edge: Edge) -> None:
    """The edge is about to lead elsewhere, or to be there at all: what backends above it have kept for themselves is
    for the nodes as they are linked now. Nothing is in flight at these."""
    found, open_ends = {edge.parent}, [edge.parent]
    while open_ends:
        parent = open_ends.pop()
        parent.settle_written()
        for above in getattr(parent, "parents", ()):
            if above.parent not in found:
                found.add(above.parent)
                open_ends.append(above.parent)


def written_ends(graph: Graph) -> dict[Node, int]:
    """The highest end of all nodes that were written to. Main thread, at any time: others may go on writing."""
    ends = {node: node.written_end for node in graph.nodes.values()}

    for backend in graph.backends:
        if backend.root is None or not backend.noted:
            continue
        seen: dict[Node, int] = {}
        open_ends = [(backend.root.node, backend.noted)]
        while open_ends:
            node, end = open_ends.pop()
            end = _rounded(node, end)
            if end > seen.get(node, 0):
                seen[node] = end
                open_ends += node.written_below(end)
        for node, end in seen.items():
            ends[node] = max(ends.get(node, 0), end)
    return ends
