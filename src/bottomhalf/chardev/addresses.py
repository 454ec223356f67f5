# SPDX-License-Identifier: Apache-2.0
"""From the schema's socket addresses to the host's."""

from __future__ import annotations

from typing import Final

from bottomhalf.host.protocol import Address, InetAddress, UnixAddress
from bottomhalf.qapi.errors import OptionError
from bottomhalf.qapi.sockets import InetSocketAddress, SocketAddress, UnixSocketAddress

PORT_MAX: Final = 65535
UNIX_PATH_BYTES_MAX: Final = 107  # of sun_path, without the terminating zero


def host_address(address: SocketAddress) -> Address:
    """OptionError for kinds and options that this program does not have."""
    branch = address.branch
    if isinstance(branch, UnixSocketAddress):
        if branch.abstract:
            raise OptionError("Abstract socket names are not supported yet", key="abstract")
        if len(branch.path.encode()) > UNIX_PATH_BYTES_MAX:
            raise OptionError(
                f"UNIX socket path '{branch.path}' is too long",
                key="path",
                hint=f"Path must be less than {UNIX_PATH_BYTES_MAX + 1} bytes",
            )
        return UnixAddress(branch.path)
    if isinstance(branch, InetSocketAddress):
        if not branch.port.isdecimal() or int(branch.port) > PORT_MAX:
            raise OptionError(f"port '{branch.port}' is not a number from 0 to {PORT_MAX}", key="port")
        for name in ("to", "ipv4", "ipv6", "mptcp"):
            if getattr(branch, name):
                raise OptionError(f"Parameter '{name}' is not supported yet", key=name)
        return InetAddress(branch.host, int(branch.port))
    raise OptionError(f"Socket address type '{address.type}' is not supported yet", key="type")


def why_not_connected(address: Address, error: OSError) -> str:
    """QEMU's sentence for it, which scripts know."""
    where = address.path if isinstance(address, UnixAddress) else str(address)
    return f"Failed to connect to '{where}': {error.strerror or error}"
