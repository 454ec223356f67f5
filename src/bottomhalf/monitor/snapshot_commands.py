# SPDX-License-Identifier: Apache-2.0
"""QMP commands about snapshots in images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block import BlockError, Node
from bottomhalf.block.work import carry_out
from bottomhalf.drivers.qcow2.node import Qcow2Node
from bottomhalf.drivers.qcow2.snapshotting import NAME_BYTES_MAX
from bottomhalf.qapi.block_snapshots import (
    BlockdevSnapshotDeleteInternalSync,
    BlockdevSnapshotInternalSync,
    SnapshotInfo,
)

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.snapshots import Snapshot
    from bottomhalf.monitor.storage import Storage


def _root(storage: Storage, device: str) -> Node:
    node = storage.graph.find(device, device=device)
    if any(isinstance(edge.parent, Node) for edge in node.parents):
        raise BlockError("Need a root block node")
    return node


def _keeper(node: Node) -> Qcow2Node | None:
    """Whose snapshots those of the node are: its own, or, if it only passes on, those of what is below it."""
    while not isinstance(node, Qcow2Node):
        if not (node.is_filter or node.driver == "raw") or not node.children:
            return None
        node = node.children[0].node
    return node


def _known(storage: Storage, keeper: Qcow2Node) -> list[Snapshot]:
    try:
        return carry_out(storage.graph, keeper, keeper.snapshots.read(), f"the snapshots of {keeper.describe()}")
    except (OSError, BlockError) as error:
        why = getattr(error, "strerror", None) or error
        raise BlockError(f"Failed to get a snapshot list: {why}") from error


def blockdev_snapshot_internal_sync(storage: Storage, arguments: BlockdevSnapshotInternalSync) -> None:
    """blockdev-snapshot-internal-sync."""
    graph, device, name = storage.graph, arguments.device, arguments.name
    node = _root(storage, device)
    if node.read_only:
        raise BlockError(f"Device '{device}' is read only")
    keeper = _keeper(node)
    if keeper is None:
        raise BlockError(
            f"Block format '{node.driver}' used by device '{device}' does not support internal snapshots"
        )
    if not name:
        raise BlockError("Name is empty")
    if any(each.name == name for each in _known(storage, keeper)):
        raise BlockError(f"Snapshot with name '{name}' already exists on device '{device}'")
    name = name.encode()[:NAME_BYTES_MAX].decode(errors="ignore")  # QEMU cuts it off, too
    now_ns = graph.context.host.realtime_ns()
    with graph.holding(node), graph.drained(node, subtree=True):
        body = keeper.snapshots.create(name, date_ns=now_ns, vm_clock_ns=now_ns)
        try:
            carry_out(graph, keeper, body, f"the snapshot '{name}' of {keeper.describe()}")
        except (OSError, BlockError) as error:
            why = getattr(error, "strerror", None) or error
            raise BlockError(f"Failed to create snapshot '{name}' on device '{device}': {why}") from error


def blockdev_snapshot_delete_internal_sync(
    storage: Storage, arguments: BlockdevSnapshotDeleteInternalSync
) -> SnapshotInfo:
    """blockdev-snapshot-delete-internal-sync."""
    graph, device, id, name = storage.graph, arguments.device, arguments.id, arguments.name
    node = _root(storage, device)
    if id is None and name is None:
        raise BlockError("Name or id must be provided")
    keeper = _keeper(node)
    if keeper is None:
        raise BlockError("Failed to get a snapshot list: Operation not supported")
    for found in _known(storage, keeper):
        if id in (None, found.id) and name in (None, found.name):
            break
    else:
        words = ["null" if word is None else word for word in (id, name)]
        raise BlockError(f"Snapshot with id '{words[0]}' and name '{words[1]}' does not exist on device '{device}'")
    if node.read_only:
        raise BlockError(f"Device '{device}' is read only")
    with graph.holding(node), graph.drained(node, subtree=True):
        try:
            carry_out(graph, keeper, keeper.snapshots.delete(found), f"the end of snapshot '{found.name}'")
        except (OSError, BlockError) as error:
            why = getattr(error, "strerror", None) or error
            raise BlockError(f"Failed to delete snapshot '{found.name}' on device '{device}': {why}") from error
    return info(found)


def info(snapshot: Snapshot) -> SnapshotInfo:
    """A snapshot as QMP tells it."""
    second = 1_000_000_000
    return SnapshotInfo(
        id=snapshot.id,
        name=snapshot.name,
        vm_state_size=snapshot.vm_state_bytes,
        date_sec=snapshot.date_s,
        date_nsec=snapshot.date_ns,
        vm_clock_sec=snapshot.vm_clock_ns // second,
        vm_clock_nsec=snapshot.vm_clock_ns % second,
        icount=snapshot.icount if snapshot.icount != NO_ICOUNT else None,
    )


NO_ICOUNT: Final = (1 << 64) - 1

HANDLERS: Final[dict[str, Callable[[Storage, Any], Any]]] = {
    "blockdev-snapshot-delete-internal-sync": blockdev_snapshot_delete_internal_sync,
    "blockdev-snapshot-internal-sync": blockdev_snapshot_internal_sync,
}
