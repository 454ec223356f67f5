# SPDX-License-Identifier: Apache-2.0
"""Stream sockets, non-blocking.

The data path calls ``recv_into``, ``send`` and ``sendmsg`` once per batch; they are the C methods of
``socket.socket`` itself, which is why ``LinuxSocket`` is a subclass and not a wrapper.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import sys
import termios
from typing import Any

from bottomhalf.host.protocol import Address, File, InetAddress, UnixAddress

LISTEN_BACKLOG = 4096  # the system caps it; a burst of clients waits instead of being refused
SEND_BUFFER_BYTES = 1 << 20
_SO_SNDBUFFORCE = 32
SOCKET_MODE = 0o600  # of a Unix socket's file: its owner alone, whatever the umask


class LinuxSocket(socket.socket):
    """A connected stream socket (host.protocol.Socket)."""

    def send_more(self, data: Any) -> int:
        return self.send(data, socket.MSG_MORE)

    def send_file(self, file: File, offset: int, count: int) -> int:
        return os.sendfile(self.fileno(), file.fileno(), offset, count)

    def unread(self) -> int | None:
        if self.family != socket.AF_UNIX:
            return None
        return int.from_bytes(fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def peer_name(self) -> str:
        try:
            if self.family != socket.AF_UNIX:
                host, port = self.getpeername()[:2]
                return f"{host}:{port}"
            pid, uid, _ = struct.unpack("3i", self.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return f"{process_name(pid)} (pid {pid}, uid {uid})"
        except OSError:
            return "unknown peer"

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        try:
            super().shutdown(how)
        except OSError:
            pass  # the peer was faster


def process_name(pid: int) -> str:
    """The command name of a process, or "a process that has ended"."""
    try:
        with open(f"/proc/{pid}/comm") as comm:
            return comm.read().strip()
    except OSError:
        return "a process that has ended"


def _adopt(plain: socket.socket) -> LinuxSocket:
    family, fd = plain.family, plain.detach()
    adopted = LinuxSocket(family, socket.SOCK_STREAM, 0, fileno=fd)
    adopted.setblocking(False)
    _enlarge_send_buffer(adopted)
    if family != socket.AF_UNIX:
        adopted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        adopted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return adopted


def _enlarge_send_buffer(adopted: socket.socket) -> None:
    """Room for the replies of a whole batch, so that they leave with one call. What the system's limit allows;
    with CAP_NET_ADMIN beyond it."""
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
        try:
            adopted.setsockopt(socket.SOL_SOCKET, option, SEND_BUFFER_BYTES)
            return
        except OSError:
            continue


class LinuxListener:
    """A listening socket (host.protocol.Listener)."""

    def __init__(self, address: Address) -> None:
        self.address: Address = address
        self._path = ""  # of a Unix socket's file, whatever the working directory will be
        self._path_identity: tuple[int, int] | None = None
        if isinstance(address, UnixAddress):
            self._socket = self._listen_unix(address.path)
        else:
            self._socket = self._listen_inet(address)
        self._socket.setblocking(False)

    def _listen_unix(self, path: str) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(listening.fileno(), SOCKET_MODE)  # before bind: the file is never open to others
            try:
                listening.bind(path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not _is_stale(path):
                    raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
                os.unlink(path)
                listening.bind(path)
            listening.listen(LISTEN_BACKLOG)
        except BaseException:
            listening.close()
            raise
        status = os.stat(path)
        self._path = os.path.abspath(path)
        self._path_identity = (status.st_dev, status.st_ino)
        return listening

    def _listen_inet(self, address: InetAddress) -> socket.socket:
        try:
            found = socket.getaddrinfo(
                address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except socket.gaierror as error:
            raise OSError(errno.EADDRNOTAVAIL, f"address resolution failed: {error.strerror}", str(address))
        family, kind, protocol, _, target = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(target)
            listening.listen(LISTEN_BACKLOG)
        except OSError as error:
            listening.close()
            raise OSError(error.errno, os.strerror(error.errno or 0), str(address)) from None
        self.address = InetAddress(address.host, listening.getsockname()[1])
        return listening

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> LinuxSocket:
        accepted, _ = self._socket.accept()
        return _adopt(accepted)

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        if self._path_identity is not None:
            try:
                status = os.stat(self._path)
                if (status.st_dev, status.st_ino) == self._path_identity:  # not one that replaced ours
                    os.unlink(self._path)
            except OSError:
                pass


def _is_stale(path: str) -> bool:
    """Whether the path is a socket on which nobody listens any more."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False  # connecting to a plain file is refused as well
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.setblocking(False)
        probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    finally:
        probe.close()
    return False


def connect(address: Address) -> LinuxSocket:
    """A connected socket. Waits while the connection is made; OSError with the address on failure."""
    try:
        if isinstance(address, UnixAddress):
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                plain.connect(address.path)
            except OSError:
                plain.close()
                raise
        else:
            plain = socket.create_connection((address.host, address.port))
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(address)) from None
    return _adopt(plain)
