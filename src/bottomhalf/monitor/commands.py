# SPDX-License-Identifier: Apache-2.0
"""What each QMP command does, in terms of the program's parts. The schema says what it takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio import explain
from bottomhalf.block import BlockError
from bottomhalf.chardev.addresses import host_address
from bottomhalf.monitor import (
    bitmap_commands,
    block_commands,
    char_commands,
    job_commands,
    node_commands,
    object_commands,
    overlay_commands,
    snapshot_commands,
    stats_commands,
)
from bottomhalf.qapi.block import BlockdevDel, BlockdevOptions, BlockSetWriteThreshold, BlockWriteThreshold
from bottomhalf.qapi.block_info import BlockDeviceInfo
from bottomhalf.qapi.block_transaction import NbdServerAddOptions, NbdServerRemove
from bottomhalf.qapi.commands import COMMANDS
from bottomhalf.qapi.control import CommandInfo, HumanMonitorCommand, VersionInfo
from bottomhalf.qapi.export import (
    BlockExportDel,
    BlockExportInfo,
    BlockExportOptions,
    BlockExportOptionsNbd,
    BlockExportRemoveMode,
    BlockExportType,
    NbdServerOptions,
    NbdServerOptionsLegacy,
)

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage


def query_version(storage: Storage, arguments: Any) -> VersionInfo:
    """query-version."""
    from bottomhalf.monitor.qmp import version_info

    return version_info()


def query_commands(storage: Storage, arguments: Any) -> list[CommandInfo]:
    """query-commands: those that are carried out."""
    return [CommandInfo(name=name) for name in COMMANDS if name in HANDLERS or name == "qmp_capabilities"]


def query_qmp_schema(storage: Storage, arguments: Any) -> list[dict[str, Any]]:
    """query-qmp-schema, of the commands that are carried out."""
    from bottomhalf.qapi.schema import schema

    return schema(masked=True)


def x_explain(storage: Storage, arguments: Any) -> str:
    """x-explain. In whatever thread: it locks nothing and waits for nothing."""
    return explain()


def human_monitor_command(storage: Storage, arguments: HumanMonitorCommand) -> str:
    """human-monitor-command."""
    from bottomhalf.monitor.hmp import run_command_line

    return run_command_line(storage, arguments.command_line)


def query_block_exports(storage: Storage, arguments: Any) -> list[BlockExportInfo]:
    """query-block-exports."""
    return storage.exports.infos()


def query_named_block_nodes(storage: Storage, arguments: Any) -> list[BlockDeviceInfo]:
    """query-named-block-nodes."""
    from bottomhalf.drivers.describe import describe_node, in_order_of_opening

    return [describe_node(node) for node in reversed(in_order_of_opening(storage.graph))]  # newest first, as QEMU does


def blockdev_add(storage: Storage, options: BlockdevOptions) -> None:
    """blockdev-add."""
    storage.add_node(options)


def blockdev_del(storage: Storage, arguments: BlockdevDel) -> None:
    """blockdev-del."""
    storage.graph.delete(arguments.node_name)


def block_set_write_threshold(storage: Storage, arguments: BlockSetWriteThreshold) -> None:
    """block-set-write-threshold: the event comes from the node's own thread."""
    from bottomhalf.block.watching import set_write_threshold

    node = storage.graph.nodes.get(arguments.node_name)
    if node is None:
        raise BlockError(f"Device '{arguments.node_name}' not found")

    def exceeded(amount: int, threshold: int) -> None:
        event = BlockWriteThreshold(node_name=node.name, amount_exceeded=amount, write_threshold=threshold)
        storage.loop.main.schedule_oneshot(lambda: storage.emit(event))

    with storage.graph.drained(node):
        set_write_threshold(node, arguments.write_threshold, exceeded)


def block_export_add(storage: Storage, options: BlockExportOptions) -> None:
    """block-export-add."""
    storage.exports.add(options)


def block_export_del(storage: Storage, arguments: BlockExportDel) -> None:
    """block-export-del: returns at once, the event tells of the end."""
    storage.exports.remove(arguments.id, arguments.mode)


def start_nbd_server(storage: Storage, options: NbdServerOptions) -> None:
    """nbd-server-start and --nbd-server."""
    storage.exports.start_nbd_server(
        host_address(options.addr),
        connections_max=options.max_connections,
        handshake_seconds_max=options.handshake_max_seconds,
        security=storage.server_security(options.tls_creds, options.tls_authz),
    )


def nbd_server_start(storage: Storage, options: NbdServerOptionsLegacy) -> None:
    """nbd-server-start."""
    start_nbd_server(storage, options.flatten())


def nbd_server_stop(storage: Storage, arguments: Any) -> None:
    """nbd-server-stop: waits until the clients are gone."""
    storage.exports.stop_nbd_server()


def nbd_server_add(storage: Storage, arguments: NbdServerAddOptions) -> None:
    """nbd-server-add: name and id are one, and a node that is read-only is exported as such."""
    name = arguments.device if arguments.name is None else arguments.name
    node = storage.graph.find(arguments.device, device=arguments.device)
    storage.exports.add(
        BlockExportOptions(
            type=BlockExportType("nbd"),
            id=name,
            node_name=node.name,
            writable=bool(arguments.writable) and not node.read_only,
            branch=BlockExportOptionsNbd(
                name=name,
                description=arguments.description,
                bitmaps=None if arguments.bitmap is None else [arguments.bitmap],
            ),
        )
    )


def nbd_server_remove(storage: Storage, arguments: NbdServerRemove) -> None:
    """nbd-server-remove."""
    storage.exports.remove(arguments.name, arguments.mode or BlockExportRemoveMode.SAFE)


def quit(storage: Storage, arguments: Any) -> None:
    """quit: the answer is sent before the end."""
    storage.quit()


HANDLERS: Final[dict[str, Callable[[Storage, Any], Any]]] = {
    **object_commands.HANDLERS,
    **char_commands.HANDLERS,
    "query-qmp-schema": query_qmp_schema,
    "x-explain": x_explain,
    "human-monitor-command": human_monitor_command,
    "block_resize": node_commands.block_resize,
    "query-version": query_version,
    "query-commands": query_commands,
    "query-block-exports": query_block_exports,
    "query-named-block-nodes": query_named_block_nodes,
    "blockdev-add": blockdev_add,
    "blockdev-del": blockdev_del,
    "block-set-write-threshold": block_set_write_threshold,
    "block-export-add": block_export_add,
    "block-export-del": block_export_del,
    "nbd-server-start": nbd_server_start,
    "nbd-server-stop": nbd_server_stop,
    "nbd-server-add": nbd_server_add,
    "nbd-server-remove": nbd_server_remove,
    "quit": quit,
    **bitmap_commands.HANDLERS,
    **block_commands.HANDLERS,
    **job_commands.HANDLERS,
    **overlay_commands.HANDLERS,
    **snapshot_commands.HANDLERS,
    **stats_commands.HANDLERS,
}
