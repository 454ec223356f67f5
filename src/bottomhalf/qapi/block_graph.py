# SPDX-License-Identifier: Apache-2.0
"""The graph as it is (qapi/block-core.json): ``query-block`` and ``x-debug-query-block-graph``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from bottomhalf.qapi.block import BlockPermission
from bottomhalf.qapi.block_info import BlockDeviceInfo
from bottomhalf.qapi.types import Command, Doc, Struct, Uint64


class BlockDeviceIoStatus(StrEnum):
    """How a device's requests fare."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class BlockInfo(Struct):
    """A device with a name, and its medium."""

    device: Annotated[str, Doc("its name")]
    qdev: Annotated[str | None, Doc("the device model that uses it")] = None
    type: Annotated[str, Doc("not used any more")]
    removable: Annotated[bool, Doc("its medium can be taken out")]
    locked: Annotated[bool, Doc("the guest has locked its tray")]
    inserted: Annotated[BlockDeviceInfo | None, Doc("the medium")] = None
    tray_open: Annotated[bool | None, Doc("its tray is open", name="tray_open")] = None
    io_status: Annotated[BlockDeviceIoStatus | None, Doc("how its requests fare")] = None


class QueryBlock(Command, name="query-block", returns=list[BlockInfo]):
    """List devices that have a name. Exports have none."""


class BlockdevSetActive(Command, name="blockdev-set-active"):
    """Let others have an image, or take it back."""

    node_name: Annotated[str | None, Doc("the node, with what is below it; all nodes if left out")] = None
    active: Annotated[bool, Doc("whether this program may write it")]


class XDbgBlockGraphNodeType(StrEnum):
    """What stands in the graph."""

    BLOCK_BACKEND = "block-backend"
    BLOCK_JOB = "block-job"
    BLOCK_DRIVER = "block-driver"


class XDbgBlockGraphNode(Struct):
    """A node or a user of nodes."""

    id: Annotated[Uint64, Doc("number in this answer")]
    type: Annotated[XDbgBlockGraphNodeType, Doc("what it is")]
    name: Annotated[str, Doc("node-name, device name or job id")]


class XDbgBlockGraphEdge(Struct):
    """A use of a node."""

    parent: Annotated[Uint64, Doc("who uses it")]
    child: Annotated[Uint64, Doc("the node")]
    name: Annotated[str, Doc("what the node is to its user")]
    perm: Annotated[list[BlockPermission], Doc("what the user needs")]
    shared_perm: Annotated[list[BlockPermission], Doc("what the user lets others do")]


class XDbgBlockGraph(Struct):
    """All of the graph."""

    nodes: Annotated[list[XDbgBlockGraphNode], Doc("nodes and their users")]
    edges: Annotated[list[XDbgBlockGraphEdge], Doc("who uses what")]


class XDebugQueryBlockGraph(
    Command, name="x-debug-query-block-graph", returns=XDbgBlockGraph, features=("unstable",)
):
    """Tell the block graph, with permissions."""
