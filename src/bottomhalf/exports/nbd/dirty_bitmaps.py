# SPDX-License-Identifier: Apache-2.0
"""The dirty bitmaps that an export shows its clients, as metadata contexts ``qemu:dirty-bitmap:NAME``.

Clients ask again and again and put the answers together, so a bitmap must not be changed under them: it is busy as long
as it is shown, which keeps others from clearing, merging and removing it. It may go on following writes only if the
export lets clients write; of a read-only export one expects that it stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bottomhalf.block import BlockError, Graph, Node
from bottomhalf.block.dirty import NamedBitmap, check_usable, find_bitmap, find_node
from bottomhalf.qapi.common import BlockDirtyBitmap
from bottomhalf.wire.nbd.constants import CONTEXT_DIRTY_BITMAP

BITMAPS_MAX: Final = 1024  # of one export; as many contexts a client can ask for


class ShownBitmaps:
    """Bitmaps by context while an export has them. Main thread."""

    def __init__(
        self, graph: Graph, node: Node, wanted: Sequence[str | BlockDirtyBitmap], *, writable: bool
    ) -> None:
        """Find them and keep others from using them. BlockError, and nothing has changed."""
        if len(wanted) > BITMAPS_MAX:
            raise BlockError(f"an export shows at most {BITMAPS_MAX} bitmaps")
        self.by_context: dict[str, NamedBitmap] = {}
        self._nodes: list[Node] = []
        for each in wanted:
            owner, bitmap = _find(graph, node, each)
            check_usable(bitmap, read_only=True)
            if bitmap.enabled and not writable and owner.active and not owner.read_only:
                raise BlockError(f"Enabled bitmap '{bitmap.name}' incompatible with readonly export")
            context = CONTEXT_DIRTY_BITMAP + bitmap.name
            if self.by_context.setdefault(context, bitmap) is not bitmap:
                raise BlockError(f"Bitmaps of two nodes are called '{bitmap.name}'; clients cannot tell them apart")
            try:
                context.encode()
            except UnicodeEncodeError as error:
                raise BlockError(f"The name of bitmap {bitmap.name!r} cannot be told to clients") from error
            self._nodes.append(owner)
        for bitmap in self.by_context.values():
            bitmap.busy = True
        for owner in self._nodes:
            owner.references += 1

    def release(self, graph: Graph) -> None:
        """The export has no clients and shows them no more."""
        for bitmap in self.by_context.values():
            bitmap.busy = False
        for owner in self._nodes:
            owner.references -= 1
        for owner in self._nodes:
            graph.release(owner)
        self._nodes.clear()


def _find(graph: Graph, node: Node, wanted: str | BlockDirtyBitmap) -> tuple[Node, NamedBitmap]:
    """A bitmap and its node: by name alone it belongs to the exported node or to one that it reads from."""
    if not isinstance(wanted, str):
        return find_node(graph, wanted.node), find_bitmap(graph, wanted.node, wanted.name)
    below: Node | None = node
    while below is not None:
        bitmap = below.bitmaps.get(wanted)
        if bitmap is not None:
            return below, bitmap
        edge = below.child("backing")
        if edge is None and below.is_filter and below.children:
            edge = below.children[0]
        below = None if edge is None else edge.node
    raise BlockError(f"Bitmap '{wanted}' is not found")
