# SPDX-License-Identifier: Apache-2.0
"""The dirty bitmaps of nodes: by name, and following what is written.

    bitmap = add_bitmap(node, "since-monday")     # drained
    ... writes, zero writes, discards, copies: what they touch is dirty from then on ...
    with graph.drained(node):
        before = bitmap.clear()

Who copies what has changed needs a point in time: which writes are behind it, and which before. A write is marked
*before* the driver gets it. So a drained section is such a point, and nothing else is: a bitmap that is cleared while a
write is on its way loses it. All that changes bitmaps here is called in a drained section of the node, which also
makes it safe with nodes of other threads.

A node without bitmaps that record pays nothing, see ``watching``. What the names mean: a bitmap is *enabled* if it
follows writes; *busy* while an export or a job relies on it; *persistent* if the image keeps it; *read-only* while the
image still says that its copy is valid, so neither it nor the node's content may change; *inconsistent* if the image
has it, but somebody did not write it back, so that it is of no use but to be removed. Texts are QEMU's.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from bottomhalf.block.bitmap import GRANULARITY_DEFAULT, GRANULARITY_MIN, DirtyBitmap
from bottomhalf.block.errors import BlockError, ImageError
from bottomhalf.block.watching import watch_bitmaps
from bottomhalf.block.work import carry_out
from bottomhalf.host.request import Request

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node

NAME_BYTES_MAX: Final = 1023  # QEMU's
DEFAULT_MIN: Final = 4096  # where it depends on the image's clusters
GRANULARITY_MAX: Final = 1 << 31  # QEMU's, and that of images


class BitmapKeeper(Protocol):
    """What a driver whose images keep bitmaps gives its nodes. Coroutines run in the node's context, drained or before
    its first request, and raise OSError and ImageError."""

    @property
    def sealed(self) -> bool:
        """Whether co_begin_writing() has something to do before anybody may write."""

    def check_can_store(self, name: str, granularity: int) -> None:
        """BlockError unless the image can keep one more bitmap, of that name and granularity."""

    async def co_begin_writing(self) -> None:
        """The node is open, or becomes writable, and has its permissions. Let the image say that its bitmaps change
        from now on; then they are read-only no more."""

    async def co_store(self) -> None:
        """Write everything into the image; all are read-only then. Writing may begin again."""

    async def co_forget(self, name: str) -> None:
        """Take a bitmap out of the image, if it is there."""


class NamedBitmap(DirtyBitmap):
    """A bitmap of a node. Change it by the functions here, in a drained section."""

    def __init__(
        self,
        size: int,
        granularity: int,
        name: str,
        *,
        enabled: bool = True,
        persistent: bool = False,
        inconsistent: bool = False,
    ) -> None:
        super().__init__(0 if inconsistent else size, granularity, name)
        self.enabled = enabled and not inconsistent
        self.persistent = persistent
        self.inconsistent = inconsistent
        self.busy = False
        self.read_only = False

    @property
    def dirty_bytes(self) -> int:
        """In whole pieces, also where the disk ends within one, as QEMU counts."""
        return self._bits.count(1) << self._shift

    def mark(self, requests: Iterable[Request]) -> None:
        """What the requests touch is dirty. The data plane: home thread."""
        bits, shift = self._bits, self._shift
        for request in requests:
            length = request.length
            if not length:
                continue
            offset = request.offset
            first, last = offset >> shift, offset + length - 1 >> shift
            if last >= len(bits):
                self.follow(offset + length)
                if self.inconsistent:
                    return
                bits = self._bits
            if first == last:
                bits[first] = 1
            else:
                bits[first : last + 1] = b"\1" * (last + 1 - first)

    def follow(self, size: int) -> None:
        """The node has another size now. A bitmap that would become too large for memory is of no use any more."""
        if self.inconsistent or size == self.size:
            return
        try:
            self.truncate(size)
        except BlockError:
            self.truncate(0)
            self.inconsistent = True
            self.enabled = False


def default_granularity(node: Node) -> int:
    """What QEMU takes: the image's clusters, within limits."""
    cluster = node.cluster_bytes
    return max(min(cluster, GRANULARITY_DEFAULT), DEFAULT_MIN) if cluster else GRANULARITY_DEFAULT


def add_bitmap(
    node: Node,
    name: str,
    granularity: int | None = None,
    *,
    enabled: bool = True,
    persistent: bool = False,
) -> NamedBitmap:
    """A new, clean bitmap of a node. BlockError."""
    if not name:
        raise BlockError("Bitmap name cannot be empty")
    if granularity is not None and (granularity < GRANULARITY_MIN or granularity & (granularity - 1)):
        raise BlockError("Granularity must be power of 2 and at least 512")
    granularity = granularity or default_granularity(node)
    if persistent:
        if node.bitmap_keeper is None:
            raise BlockError(f"Can't store persistent bitmaps to {node.name}: Operation not supported")
        node.bitmap_keeper.check_can_store(name, granularity)
    if name in node.bitmaps:
        raise BlockError(f"Bitmap already exists: {name}")
    if len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX:
        raise BlockError(f"Bitmap name too long: {name}")
    if granularity > GRANULARITY_MAX:
        raise BlockError(f"Granularity exceeds maximum ({GRANULARITY_MAX} bytes)")
    bitmap = NamedBitmap(node.size, granularity, name, enabled=enabled, persistent=persistent)
    put_bitmap(node, bitmap)
    return bitmap


def put_bitmap(node: Node, bitmap: NamedBitmap) -> None:
    """Let a node have a bitmap, whose name none of its others has."""
    assert bitmap.name not in node.bitmaps
    node.bitmaps[bitmap.name] = bitmap
    watch_bitmaps(node)


def drop_bitmap(node: Node, bitmap: NamedBitmap) -> None:
    """A node has a bitmap no more. What an image has of it stays there."""
    del node.bitmaps[bitmap.name]
    watch_bitmaps(node)


def set_enabled(node: Node, bitmap: NamedBitmap, enabled: bool) -> None:
    """Let a bitmap follow writes, or not any more."""
    bitmap.enabled = enabled
    watch_bitmaps(node)


def find_node(graph: Graph, node_name: str) -> Node:
    """The node of that name. BlockError in the words that QEMU has for bitmaps."""
    node = graph.nodes.get(node_name)
    if node is None:
        raise BlockError(f"Node '{node_name}' not found")
    return node


def find_bitmap(graph: Graph, node_name: str, name: str) -> NamedBitmap:
    """A named bitmap of a named node. BlockError if there is none."""
    bitmap = find_node(graph, node_name).bitmaps.get(name)
    if bitmap is None:
        raise BlockError(f"Dirty bitmap '{name}' not found")
    return bitmap


def check_usable(bitmap: NamedBitmap, *, read_only: bool = False, inconsistent: bool = False) -> None:
    """BlockError unless the bitmap may be used: not while somebody else does, and one that is read-only or
    inconsistent only by those who allow it."""
    if bitmap.busy:
        raise BlockError(f"Bitmap '{bitmap.name}' is currently in use by another operation and cannot be used")
    if bitmap.read_only and not read_only:
        raise BlockError(f"Bitmap '{bitmap.name}' is readonly and cannot be modified")
    if bitmap.inconsistent and not inconsistent:
        raise BlockError(f"Bitmap '{bitmap.name}' is inconsistent and cannot be used")


def merge_bitmaps(target: NamedBitmap, sources: Sequence[NamedBitmap]) -> None:
    """What is dirty in one of the sources is dirty in the target. BlockError, and it is what it was."""
    check_usable(target)
    for source in sources:
        check_usable(source, read_only=True)
        if source.size != target.size:
            raise BlockError(
                f"Bitmaps are of different sizes (destination size is {target.size}, source size is {source.size}) "
                "and can't be merged"
            )
    for source in sources:
        target.merge(source)


def begin_writing(graph: Graph, node: Node) -> None:
    """The node has its permissions now: if it may be written to, let the image know that its bitmaps change. It is
    sealed until then. Main thread, outside coroutines. BlockError."""
    keeper = node.bitmap_keeper
    if keeper is None or not keeper.sealed or node.read_only or not node.active:
        return
    _carry_out(graph, node, keeper.co_begin_writing(), "marked as in use")


def end_writing(graph: Graph, node: Node) -> None:
    """The node is about to become read-only: let the image have its bitmaps. The same."""
    keeper = node.bitmap_keeper
    if keeper is None or not node.bitmaps or node.read_only or not node.active:
        return
    _carry_out(graph, node, keeper.co_store(), "stored")


def _carry_out(graph: Graph, node: Node, body: Coroutine[Any, Any, None], what: str) -> None:
    try:
        carry_out(graph, node, body, f"the bitmaps of {node.describe()} to be {what}")
    except (OSError, ImageError) as error:
        why = getattr(error, "strerror", None) or error
        raise BlockError(f"The bitmaps of '{node.name}' cannot be {what}: {why}") from error
