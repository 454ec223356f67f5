# SPDX-License-Identifier: Apache-2.0
"""Socket addresses (qapi/sockets.json).

Two spellings of the same thing exist: newer interfaces are flat (``addr.type=unix,addr.path=/s``), older ones
wrap what depends on the type in ``data``. ``flatten`` turns the old one into the new one, so that code behind
the interface sees one kind only.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from bottomhalf.qapi.types import Doc, Struct, TaggedUnion, Uint16


class SocketAddressType(StrEnum):
    """Kinds of sockets."""

    INET = "inet"
    UNIX = "unix"
    VSOCK = "vsock"
    FD = "fd"


class InetSocketAddressBase(Struct):
    """Host and port."""

    host: Annotated[str, Doc("host name or address")]
    port: Annotated[str, Doc("port number")]


class InetSocketAddress(InetSocketAddressBase):
    """A TCP address."""

    numeric: Annotated[bool | None, Doc("host is an address, not a name to look up", default="off")] = None
    to: Annotated[Uint16 | None, Doc("listen on the first free port from port to this one")] = None
    ipv4: Annotated[bool | None, Doc("use IPv4", default="on unless only ipv6 is on")] = None
    ipv6: Annotated[bool | None, Doc("use IPv6", default="on unless only ipv4 is on")] = None
    keep_alive: Annotated[bool | None, Doc("probe an idle connection (clients only)", default="off")] = None
    mptcp: Annotated[bool | None, Doc("use multi-path TCP", default="off")] = None


class UnixSocketAddress(Struct):
    """A socket in the file system, or one with an abstract name."""

    path: Annotated[str, Doc("path of the socket's file, or the abstract name")]
    abstract: Annotated[bool | None, Doc("path is an abstract name", default="off")] = None
    tight: Annotated[bool | None, Doc("an abstract name is not padded with zero bytes", default="on")] = None


class VsockSocketAddress(Struct):
    """A socket between a virtual machine and its host."""

    cid: Annotated[str, Doc("number of the machine")]
    port: Annotated[str, Doc("port number")]


class FdSocketAddress(Struct):
    """A socket that is open already."""

    fd: Annotated[str, Doc("number of the descriptor, or a name given by getfd", name="str")]


class SocketAddress(
    TaggedUnion,
    tag="type",
    branches={
        "inet": InetSocketAddress,
        "unix": UnixSocketAddress,
        "vsock": VsockSocketAddress,
        "fd": FdSocketAddress,
    },
):
    """Where to listen or what to connect to."""

    type: Annotated[SocketAddressType, Doc("kind of the socket")]
    branch: InetSocketAddress | UnixSocketAddress | VsockSocketAddress | FdSocketAddress


class InetSocketAddressWrapper(Struct):
    """A TCP address, wrapped."""

    data: Annotated[InetSocketAddress, Doc("the address")]


class UnixSocketAddressWrapper(Struct):
    """A Unix socket, wrapped."""

    data: Annotated[UnixSocketAddress, Doc("the address")]


class VsockSocketAddressWrapper(Struct):
    """A vsock address, wrapped."""

    data: Annotated[VsockSocketAddress, Doc("the address")]


class FdSocketAddressWrapper(Struct):
    """An open socket, wrapped."""

    data: Annotated[FdSocketAddress, Doc("the address")]


class SocketAddressLegacy(
    TaggedUnion,
    tag="type",
    branches={
        "inet": InetSocketAddressWrapper,
        "unix": UnixSocketAddressWrapper,
        "vsock": VsockSocketAddressWrapper,
        "fd": FdSocketAddressWrapper,
    },
):
    """Where to listen or what to connect to, in the older spelling."""

    type: Annotated[SocketAddressType, Doc("kind of the socket")]
    branch: (
        InetSocketAddressWrapper
        | UnixSocketAddressWrapper
        | VsockSocketAddressWrapper
        | FdSocketAddressWrapper
    )

    def flatten(self) -> SocketAddress:
        """The same address in the newer spelling."""
        return SocketAddress(type=self.type, branch=self.branch.data)
