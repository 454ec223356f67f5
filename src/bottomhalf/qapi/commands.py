# SPDX-License-Identifier: Apache-2.0
"""All of the schema in one place, and what a dispatcher does with it.

Importing this module imports every file that defines commands and events, so that ``COMMANDS`` and ``EVENTS``
are complete.

    handlers = {"block-export-del": lambda args: exports.remove(args.id, args.mode), ...}

    command, arguments = parse_command(request.command, request.arguments, oob=request.oob)
    value = handlers[command.qmp_name](arguments)
    reply = session.response(to_json(value), request.id)
"""

from __future__ import annotations

from typing import Any

from bottomhalf.qapi import (
    block,
    block_bitmaps,
    block_create,
    block_graph,
    block_info,
    block_snapshots,
    block_stats,
    block_transaction,
    char,
    control,
    export,
    introspect,
    jobs,
    objects,
    qom,
    sockets,
)
from bottomhalf.qapi.errors import COMMAND_NOT_FOUND, GENERIC_ERROR, OptionError, QmpError
from bottomhalf.qapi.types import COMMANDS, EVENTS, Command, EventType, Struct
from bottomhalf.qapi.visit import from_json, to_json

__all__ = ["COMMANDS", "EVENTS", "parse_command", "event_data"]

_MODULES = (
    block, block_bitmaps, block_create, block_graph, block_info, block_snapshots, block_stats, block_transaction, char,
    control, export, introspect, jobs, objects, qom, sockets,
)  # fmt: skip


def parse_command(name: str, arguments: dict[str, Any], *, oob: bool = False) -> tuple[type[Command], Struct]:
    """The command called ``name`` and its checked arguments, an instance of ``argument_type()``.

    Raises QmpError as QEMU answers it.
    """
    command = COMMANDS.get(name)
    if command is None:
        raise QmpError(COMMAND_NOT_FOUND, f"The command {name} has not been found")
    if oob and not command.allow_oob:
        raise QmpError(GENERIC_ERROR, f"The command {name} does not support OOB")
    try:
        return command, from_json(command.argument_type(), arguments)
    except OptionError as error:
        raise error.to_qmp() from None


def event_data(event: EventType) -> dict[str, Any] | None:
    """The data of an event as ``ServerSession.event`` wants it: None if its class has no members."""
    return to_json(event) if type(event)._fields else None
