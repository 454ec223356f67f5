# SPDX-License-Identifier: Apache-2.0
"""From a node to what it tells about itself: its name as an image, and ``query-named-block-nodes``.

An image's name is a path (or ``null-co://``) where that says everything about what one would read there, else
``json:`` with the options that matter for the content: driver, children, windows, sizes, but not caches, locks or
latencies. Users compare it as text with QEMU's, so the members stand in the order of QEMU's hash tables.
"""

from __future__ import annotations

from typing import Any, Final

from bottomhalf.block import Graph, Node
from bottomhalf.block.changes import skip_implicit
from bottomhalf.block.watching import write_threshold
from bottomhalf.qapi.block import BlockdevDetectZeroesOptions
from bottomhalf.qapi.block_info import (
    BlockdevCacheInfo,
    BlockDeviceInfo,
    BlockDirtyInfo,
    ImageInfo,
    ImageInfoSpecific,
    ImageInfoSpecificFile,
    ImageInfoSpecificFileWrapper,
    ImageInfoSpecificKind,
)
from bottomhalf.qapi.types import Struct, members
from bottomhalf.wire.json_writer import dumps

# Options of a driver that decide what is read; children are added from the graph.
_CONTENT_OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "file": ("filename",),
    "host_device": ("filename",),
    "raw": ("offset", "size"),
    "null-co": ("size", "read_zeroes"),
    "null-aio": ("size", "read_zeroes"),
    "throttle": ("throttle_group",),
    "blkdebug": (
        *("align", "max_transfer", "opt_write_zero", "max_write_zero", "opt_discard", "max_discard"),
        *("inject_error", "set_state"),
    ),
}

_HOST_FILES: Final = frozenset({"file", "host_device"})
_NAMED_LIKE_THEIR_CHILD: Final = frozenset({"copy-before-write", "snapshot-access"})


def file_name(node: Node) -> str:
    """The name by which the image could be opened again; an implicit filter has its child's."""
    node = skip_implicit(node)
    return _plain_name(node) or f"json:{dumps(content_options(node))}"


def content_options(node: Node) -> dict[str, Any]:
    """The options that decide what is read from the node, children and all, as JSON values."""
    described: dict[str, Any] = {"driver": node.driver, **_given(node)}
    for edge in node.children:
        described[edge.name] = content_options(skip_implicit(edge.node))
    return described


def _given(node: Node) -> dict[str, Any]:
    """The node's own content options, as far as they were given."""
    source = node if node.options is None else node.options.branch
    given = {}
    for attribute in _CONTENT_OPTIONS.get(node.driver, ()):
        value = getattr(source, attribute, None)
        name = attribute.replace("_", "-")
        if isinstance(value, list):
            given.update(_flattened(name, value))
        elif value is not None:
            given[name] = value
    return given


def _flattened(name: str, rules: list[Struct]) -> dict[str, Any]:
    """A list of structs as QEMU's options have them: "inject-error.0.event"."""
    return {
        f"{name}.{number}.{member.name}": value
        for number, rule in enumerate(rules)
        for member in members(type(rule))
        if (value := getattr(rule, member.attribute)) is not None
    }


def _plain_name(node: Node) -> str:
    given = _given(node)
    if node.driver in _HOST_FILES:
        return str(given["filename"])
    if node.driver in ("blkdebug", "blkverify") and not given:
        below = [_plain_name(edge.node) for edge in node.children]
        middle = ":" if node.driver == "blkdebug" else ""  # between them is the config file, which is not there
        return f"{node.driver}:{middle}{':'.join(below)}" if all(below) else ""
    if node.driver in _NAMED_LIKE_THEIR_CHILD:
        return file_name(node.children[0].node)
    if node.driver.startswith("null-"):
        return "" if given else f"{node.driver}://"
    if node.driver == "raw" and not given:
        child = skip_implicit(node.children[0].node)
        return _plain_name(child) if child.is_protocol else ""
    return ""


def in_order_of_opening(graph: Graph) -> list[Node]:
    """All nodes as QEMU lists them: one whose children were given with it comes after its child "file" and before the
    others, for that is when they are opened. (Ours are made when all children are there.)"""
    made = {node: number for number, node in enumerate(graph.nodes.values())}
    listed: dict[Node, None] = {}

    def add(node: Node) -> None:
        own = [edge for edge in node.children if edge.node.inherits_from is node and made[edge.node] < made[node]]
        first = [edge for edge in own if edge.name == "file"]
        for edge in first:
            add(edge.node)
        listed.setdefault(node)
        for edge in own:
            if edge not in first:
                add(edge.node)

    for node in made:
        above = node.inherits_from
        if above is None or made.get(above, -1) < made[node] or all(edge.node is not node for edge in above.children):
            add(node)
    return list(listed)


def describe_node(node: Node) -> BlockDeviceInfo:
    """The node as query-named-block-nodes tells it."""
    name = file_name(node)
    cache = node.options.cache if node.options is not None else None
    return BlockDeviceInfo(
        file=name,
        node_name=node.name,
        ro=node.read_only,
        drv=node.driver,
        backing_file_depth=0,
        active=node.active,
        encrypted=False,
        detect_zeroes=(node.options and node.options.detect_zeroes) or BlockdevDetectZeroesOptions.OFF,
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=_describe_image(node, name),
        cache=BlockdevCacheInfo(
            writeback=True,
            direct=bool(cache and cache.direct),
            no_flush=bool(cache and cache.no_flush),
        ),
        write_threshold=write_threshold(node),
        dirty_bitmaps=_describe_bitmaps(node) or None,
    )


def _describe_bitmaps(node: Node) -> list[BlockDirtyInfo]:
    """The newest first, as QEMU lists them."""
    return [
        BlockDirtyInfo(
            name=bitmap.name,
            count=bitmap.dirty_bytes,
            granularity=bitmap.granularity,
            recording=bitmap.enabled,
            busy=bitmap.busy,
            persistent=bitmap.persistent,
            inconsistent=bitmap.inconsistent or None,
        )
        for bitmap in reversed(node.bitmaps.values())
    ]


def _describe_image(node: Node, name: str) -> ImageInfo:
    specific = None
    if node.driver in _HOST_FILES:
        specific = ImageInfoSpecific(
            type=ImageInfoSpecificKind("file"),
            branch=ImageInfoSpecificFileWrapper(data=ImageInfoSpecificFile()),
        )
    return ImageInfo(
        filename=name,
        format=node.driver,
        virtual_size=node.size,
        actual_size=node.allocated_size(),
        dirty_flag=_dirty_flag(node),
        format_specific=specific,
    )


def _dirty_flag(node: Node) -> bool | None:
    """None where QEMU's driver knows nothing of the image; raw and filters know what their child knows."""
    while node.driver == "raw" or node.is_filter:
        node = node.children[0].node
    return False if node.driver in _HOST_FILES else None
