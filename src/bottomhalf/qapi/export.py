# SPDX-License-Identifier: Apache-2.0
"""Exports and the NBD server (qapi/block-export.json).

The kinds of exports are a registry, as the drivers are: ``BlockExportOptions.register_branch("fuse", ...)``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeAlias

from bottomhalf.qapi.common import BlockDirtyBitmap
from bottomhalf.qapi.sockets import SocketAddress, SocketAddressLegacy
from bottomhalf.qapi.types import Alternate, Command, Doc, EventType, OpenEnum, Struct, TaggedUnion, Uint32


class NbdServerOptionsBase(Struct):
    """Options of the NBD server besides its address."""

    handshake_max_seconds: Annotated[
        Uint32, Doc("seconds that a client has to finish the handshake, 0 for no limit")
    ] = 10
    tls_creds: Annotated[str | None, Doc("TLS credentials object; clients must use TLS")] = None
    tls_authz: Annotated[str | None, Doc("authorisation object that judges TLS clients")] = None
    max_connections: Annotated[Uint32, Doc("clients at the same time, 0 for no limit")] = 100


class NbdServerOptions(NbdServerOptionsBase):
    """Options of the NBD server (--nbd-server)."""

    addr: Annotated[SocketAddress, Doc("where to listen")]


class NbdServerOptionsLegacy(NbdServerOptionsBase):
    """Options of the NBD server (nbd-server-start)."""

    addr: Annotated[SocketAddressLegacy, Doc("where to listen")]

    def flatten(self) -> NbdServerOptions:
        """The same options with the address in the newer spelling."""
        return NbdServerOptions(**{**self.__dict__, "addr": self.addr.flatten()})


BlockDirtyBitmapOrStr: TypeAlias = Annotated[str | BlockDirtyBitmap, Alternate("BlockDirtyBitmapOrStr")]
"""A dirty bitmap: its name if the node is clear from the context, or node and name."""


class BlockExportType(OpenEnum):
    """Kinds of exports."""


class BlockExportRemoveMode(StrEnum):
    """How an export is removed."""

    SAFE = "safe"
    HARD = "hard"


class BlockExportOptions(TaggedUnion, tag="type", tag_values=BlockExportType):
    """Options of an export."""

    type: Annotated[BlockExportType, Doc("kind of the export")]
    id: Annotated[str, Doc("the export's id, unique among exports")]
    fixed_iothread: Annotated[bool, Doc("fail if the node cannot move to the iothread")] = False
    iothread: Annotated[str | None, Doc("iothread that serves it", default="the node's own")] = None
    node_name: Annotated[str, Doc("the node to export")]
    writable: Annotated[bool, Doc("clients may write")] = False
    writethrough: Annotated[bool, Doc("writes complete when they are durable")] = False
    allow_inactive: Annotated[bool, Doc("the node may be inactive")] = False


class BlockExportOptionsNbd(Struct):
    """An export of the NBD server."""

    name: Annotated[str | None, Doc("name that clients ask for", default="the node's name")] = None
    description: Annotated[str | None, Doc("text that clients may show, up to 4096 bytes")] = None
    bitmaps: Annotated[
        list[BlockDirtyBitmapOrStr] | None, Doc("bitmaps offered as qemu:dirty-bitmap:NAME")
    ] = None
    allocation_depth: Annotated[bool, Doc("offer qemu:allocation-depth")] = False


BlockExportOptions.register_branch("nbd", BlockExportOptionsNbd)


class BlockExportInfo(Struct):
    """An export that exists."""

    id: Annotated[str, Doc("its id")]
    type: Annotated[BlockExportType, Doc("its kind")]
    node_name: Annotated[str, Doc("the node that it exports")]
    shutting_down: Annotated[bool, Doc("it is being removed")]


class BlockExportAdd(Command, name="block-export-add", boxed=BlockExportOptions):
    """Export a node."""


class BlockExportDel(Command, name="block-export-del"):
    """Remove an export.

    The answer comes at once; BLOCK_EXPORT_DELETED tells when it is really gone.
    """

    id: Annotated[str, Doc("the export")]
    mode: Annotated[
        BlockExportRemoveMode, Doc("safe: fail while clients are connected; hard: disconnect them")
    ] = BlockExportRemoveMode.SAFE


class QueryBlockExports(Command, name="query-block-exports", returns=list[BlockExportInfo]):
    """List all exports."""


class NbdServerStart(Command, name="nbd-server-start", boxed=NbdServerOptionsLegacy):
    """Start the NBD server.

    There is one at most. It offers the exports of type nbd.
    """


class NbdServerStop(Command, name="nbd-server-stop"):
    """Stop the NBD server.

    Its clients are disconnected and its exports removed.
    """


class BlockExportDeleted(EventType, name="BLOCK_EXPORT_DELETED"):
    """An export is gone and its id may be used again."""

    id: Annotated[str, Doc("the export")]
