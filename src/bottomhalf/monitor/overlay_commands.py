# SPDX-License-Identifier: Apache-2.0
"""QMP commands that put overlays above nodes, alone and in transactions, and rename backing files.

Facts: an action of a transaction is a command that can be taken back, and the point in time of all of them is the same.
Consequence: nothing may be written between the first action and the last, nor before a failure has undone what came
before it. Decision: an action returns how to undo and how to finish it, everything is drained from the first to the
last, and a command alone is a transaction of one. A file that was made stays, as with QEMU: undoing never deletes what
may be somebody's data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bottomhalf.block import BlockError, Edge, Node
from bottomhalf.block.permissions import cumulative
from bottomhalf.block.work import carry_out
from bottomhalf.drivers.qcow2.node import Qcow2Node
from bottomhalf.host.protocol import PERM_CONSISTENT_READ
from bottomhalf.monitor import bitmap_commands
from bottomhalf.monitor.snapshot_commands import blockdev_snapshot_delete_internal_sync, blockdev_snapshot_internal_sync
from bottomhalf.qapi.block import BlockdevOptions, BlockdevSnapshot
from bottomhalf.qapi.block_snapshots import BlockdevSnapshotDeleteInternalSync, BlockdevSnapshotInternalSync
from bottomhalf.qapi.block_transaction import (
    Abort,
    ActionCompletionMode,
    BlockdevSnapshotSyncArguments,
    ChangeBackingFile,
    NewImageMode,
    TransactionAction,
    TransactionCommand,
)
from bottomhalf.qapi.types import Struct
from bottomhalf.qapi.visit import from_json

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage

Undo: TypeAlias = Callable[[], object]
Finish: TypeAlias = Callable[[], object]

FORMAT_DEFAULT: Final = "qcow2"


def _nothing() -> None:
    pass


# -- actions --------------------------------------------------------------------------------------------------------


def _put_above(storage: Storage, overlay: Node, node: Node) -> tuple[Undo, Finish]:
    """Let whoever uses the node use the overlay."""
    graph = storage.graph
    if cumulative(overlay)[0] & PERM_CONSISTENT_READ:
        raise BlockError("The overlay is already in use")
    if overlay.child("backing") is not None:
        raise BlockError("The overlay already has a backing image")
    if not overlay.supports_backing:
        raise BlockError("The overlay does not support backing images")
    users: list[Edge] = list(node.parents)
    graph.append(overlay, node)
    return lambda: graph.undo_append(overlay, node, users), lambda: _make_read_only(storage, node)


def _make_read_only(storage: Storage, node: Node) -> None:
    """Nobody writes to a backing node; its file shall be locked accordingly. One that does not let itself be reopened
    stays as it is: it is not written to either way."""
    from bottomhalf.drivers.registry import reopen_nodes

    if node.closed or node.read_only or node.options is None:
        return
    branch, backing = node.options.branch, node.child("backing")
    if backing is not None:  # by now perhaps another one than when the node was opened
        branch = type(branch)(**{**branch.__dict__, "backing": backing.node.name})
    changes = {"read_only": True, "node_name": node.name, "branch": branch}
    options = BlockdevOptions(**{**node.options.__dict__, **changes})
    try:
        reopen_nodes(storage.graph, [options])
    except (BlockError, OSError) as error:
        storage.log(f"{node.describe()} stays writable: {error}")


def _snapshot(storage: Storage, arguments: BlockdevSnapshot) -> tuple[Undo, Finish]:
    graph = storage.graph
    node = graph.find(arguments.node, device=arguments.node)
    graph.check_not_backing(node)
    overlay = graph.find(arguments.overlay, device=arguments.overlay)
    graph.flush(node)
    return _put_above(storage, overlay, node)


def _snapshot_sync(storage: Storage, arguments: BlockdevSnapshotSyncArguments) -> tuple[Undo, Finish]:
    graph = storage.graph
    node = graph.find(arguments.node_name or "", device=arguments.device or "")
    name = arguments.snapshot_node_name
    if name is None:
        raise BlockError("New overlay node-name missing")
    if name in graph.nodes:
        raise BlockError("New overlay node-name already in use")
    graph.check_not_backing(node)
    format = arguments.format or FORMAT_DEFAULT
    graph.flush(node)
    if arguments.mode != NewImageMode.EXISTING:
        _make_image(storage, arguments.snapshot_file, format, node)
    overlay = _open_overlay(storage, arguments.snapshot_file, format, name, node)
    try:
        undo, finish = _put_above(storage, overlay, node)
    except BaseException:
        graph.release(overlay)
        raise

    def undo_all() -> None:
        undo()
        graph.release(overlay)

    def finish_all() -> None:
        finish()
        graph.release(overlay)  # its users keep it

    overlay.references += 1  # until then

    def without_reference(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            overlay.references -= 1
            step()

        return run

    return without_reference(undo_all), without_reference(finish_all)


def _make_image(storage: Storage, path: str, format: str, node: Node) -> None:
    """A new, empty image on top of a node."""
    from bottomhalf.drivers.describe import file_name
    from bottomhalf.drivers.qcow2.create import CreateOptions, create
    from bottomhalf.drivers.registry import file_driver, open_node

    graph = storage.graph
    if format != "qcow2":
        known = format in BlockdevOptions.branches
        raise BlockError(
            f"Backing file not supported for file format '{format}'" if known else f"Unknown file format '{format}'"
        )
    driver = file_driver(graph, path)
    if driver == "file":
        try:
            storage.host.create_file(path, 0)
        except OSError as error:
            raise BlockError(f"Could not create '{path}': {error.strerror}") from error
    options = from_json(BlockdevOptions, {"driver": driver, "filename": path, "discard": "unmap"})
    file = open_node(graph, options)
    with graph.holding(file):
        file.monitor_owned = True
        try:
            create(file, CreateOptions(node.size, backing_file=file_name(node), backing_fmt=node.driver))
            graph.flush(file)
        finally:
            file.monitor_owned = False
    graph.release(file)


def _open_overlay(storage: Storage, path: str, format: str, name: str, node: Node) -> Node:
    from bottomhalf.drivers.registry import file_driver, open_node

    if format not in BlockdevOptions.branches:
        raise BlockError(f"Unknown driver '{format}'")
    options: dict[str, Any] = {
        "driver": format,
        "node-name": name,
        "file": {"driver": file_driver(storage.graph, path), "filename": path},
        "read-only": node.read_only,
    }
    if format == "qcow2":
        options["backing"] = None
    return open_node(storage.graph, from_json(BlockdevOptions, options), follow_names=False)


def _snapshot_internal(storage: Storage, arguments: BlockdevSnapshotInternalSync) -> tuple[Undo, Finish]:
    blockdev_snapshot_internal_sync(storage, arguments)
    made = BlockdevSnapshotDeleteInternalSync(device=arguments.device, name=arguments.name)

    def undo() -> None:
        try:
            blockdev_snapshot_delete_internal_sync(storage, made)
        except (BlockError, OSError) as error:
            storage.log(f"the snapshot '{arguments.name}' of '{arguments.device}' stays: {error}")

    return undo, _nothing


def _abort(storage: Storage, arguments: Abort) -> tuple[Undo, Finish]:
    raise BlockError("Transaction aborted using Abort action")


_ACTIONS: Final[dict[str, Callable[[Storage, Any], tuple[Undo, Finish]]]] = {
    "abort": _abort,
    **bitmap_commands.ACTIONS,
    "blockdev-snapshot": _snapshot,
    "blockdev-snapshot-internal-sync": _snapshot_internal,
    "blockdev-snapshot-sync": _snapshot_sync,
}


def _carry_out_all(storage: Storage, actions: list[tuple[str, Any]]) -> None:
    done: list[tuple[Undo, Finish]] = []
    with storage.graph.drained_all():
        try:
            for kind, arguments in actions:
                done.append(_ACTIONS[kind](storage, arguments))
        except BaseException:
            for undo, _ in reversed(done):
                undo()
            raise
        for _, finish in done:
            finish()


# -- commands -------------------------------------------------------------------------------------------------------


def blockdev_snapshot(storage: Storage, arguments: BlockdevSnapshot) -> None:
    """blockdev-snapshot."""
    _carry_out_all(storage, [("blockdev-snapshot", arguments)])


def blockdev_snapshot_sync(storage: Storage, arguments: BlockdevSnapshotSyncArguments) -> None:
    """blockdev-snapshot-sync."""
    _carry_out_all(storage, [("blockdev-snapshot-sync", arguments)])


def transaction(storage: Storage, arguments: TransactionCommand) -> None:
    """transaction."""
    mode = None if arguments.properties is None else arguments.properties.completion_mode
    if mode == ActionCompletionMode.GROUPED:
        for action in arguments.actions:
            raise BlockError(
                f"Action '{action.type}' does not support transaction property completion-mode = grouped"
            )
    _carry_out_all(storage, [(str(action.type), _data(action)) for action in arguments.actions])


def _data(action: TransactionAction) -> Struct:
    wrapper: Any = action.branch  # each kind has one with a member of that name
    assert isinstance(wrapper.data, Struct)
    return wrapper.data


def change_backing_file(storage: Storage, arguments: ChangeBackingFile) -> None:
    """change-backing-file."""
    from bottomhalf.drivers.qcow2.amend import co_rebase

    graph, device = storage.graph, arguments.device
    top = graph.find(device, device=device)
    if any(isinstance(edge.parent, Node) for edge in top.parents):
        raise BlockError("Need a root block node")
    image = graph.find(arguments.image_node_name)
    backing = image.child("backing")
    if backing is None or not isinstance(image, Qcow2Node):
        raise BlockError("not allowing backing file change on an image without a backing file")
    if image is not top and image not in _chain(top):
        raise BlockError(f"'{device}' and image file are not in the same chain")
    format = image.header.backing_format
    with graph.holding(image), graph.drained(image, subtree=True):
        body = co_rebase(image, arguments.backing_file, format)
        try:
            carry_out(graph, image, body, f"another backing file of {image.describe()}")
        except (BlockError, OSError) as error:
            why = getattr(error, "strerror", None) or error
            raise BlockError(f"Could not change backing file to '{arguments.backing_file}': {why}") from error


def _chain(node: Node) -> list[Node]:
    found = []
    below: Node | None = node
    while below is not None:
        edge = below.child("backing") or (below.child("file") if below.is_filter or below.driver == "raw" else None)
        below = None if edge is None else edge.node
        if below is not None:
            found.append(below)
    return found


HANDLERS: Final[dict[str, Callable[[Storage, Any], Any]]] = {
    "blockdev-snapshot": blockdev_snapshot,
    "blockdev-snapshot-sync": blockdev_snapshot_sync,
    "change-backing-file": change_backing_file,
    "transaction": transaction,
}
