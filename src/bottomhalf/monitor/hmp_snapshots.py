# SPDX-License-Identifier: Apache-2.0
"""What people do with snapshots in images: ``info snapshots`` and the two commands that QEMU's monitor has for them.
savevm and loadvm are about machines, of which there are none here."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.work import carry_out
from bottomhalf.drivers.qcow2.node import Qcow2Node
from bottomhalf.monitor.hmp_table import NODE, Arg, Entry, Output
from bottomhalf.monitor.snapshot_commands import (
    NO_ICOUNT,
    blockdev_snapshot_delete_internal_sync,
    blockdev_snapshot_internal_sync,
)
from bottomhalf.qapi.block_snapshots import BlockdevSnapshotDeleteInternalSync, BlockdevSnapshotInternalSync

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.snapshots import Snapshot
    from bottomhalf.monitor.storage import Storage

HEAD: Final = "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
UNITS: Final = "KMGTPE"
_SECOND: Final = 1_000_000_000


def info_snapshots(storage: Storage, given: dict[str, Any], out: Output) -> None:
    """info snapshots: of each image that has some. Dates are UTC."""
    any_there = False
    for node in list(storage.graph.nodes.values()):
        if not isinstance(node, Qcow2Node):
            continue
        found = carry_out(storage.graph, node, node.snapshots.read(), f"the snapshots of {node.describe()}")
        if found:
            any_there = True
            out.line(f"List of snapshots present on node {node.name}:")
            out.line(HEAD)
            for snapshot in found:
                out.line(_row(snapshot))
    if not any_there:
        out.line("There is no snapshot available.")


def _row(snapshot: Snapshot) -> str:
    date = datetime.fromtimestamp(snapshot.date_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    seconds, rest = divmod(snapshot.vm_clock_ns, _SECOND)
    clock = f"{seconds // 3600:04}:{seconds // 60 % 60:02}:{seconds % 60:02}.{rest // 1_000_000:03}"
    icount = "--" if snapshot.icount in (None, NO_ICOUNT) else str(snapshot.icount)
    size = _size(snapshot.vm_state_bytes)
    return f"{snapshot.id:<7} {snapshot.name:<16} {size:>8} {date:>20} {clock:>15} {icount:>10}"


def _size(count: int) -> str:
    unit, value = "", float(count)
    for letter in UNITS:
        if value < 1024:
            break
        unit, value = f"{letter}i", value / 1024
    return f"{value:.3g} {unit}B"


def snapshot_blkdev_internal(storage: Storage, given: dict[str, Any], out: Output) -> None:
    """snapshot_blkdev_internal."""
    blockdev_snapshot_internal_sync(storage, BlockdevSnapshotInternalSync(device=given["device"], name=given["name"]))


def snapshot_delete_blkdev_internal(storage: Storage, given: dict[str, Any], out: Output) -> None:
    """snapshot_delete_blkdev_internal."""
    blockdev_snapshot_delete_internal_sync(
        storage, BlockdevSnapshotDeleteInternalSync(device=given["device"], name=given["name"], id=given["id"])
    )


COMMANDS: Final = [
    Entry(
        "snapshot_blkdev_internal", (Arg("device", NODE), Arg("name")), snapshot_blkdev_internal,
        "make a snapshot in the image of a block node",
    ),
    Entry(
        "snapshot_delete_blkdev_internal", (Arg("device", NODE), Arg("name"), Arg("id", optional=True)),
        snapshot_delete_blkdev_internal, "delete a snapshot in the image of a block node",
    ),
]  # fmt: skip
