# SPDX-License-Identifier: Apache-2.0
"""Byte streams of the simulated host that are no sockets: files that are written to, named pipes, pseudo-terminals.

A named pipe is made by ``host.streams.add_pipe(path)``, which gives the other end of the stream. What is written
to a file is durable at once, since logs are not what crashes are tested with.
"""

from __future__ import annotations

import errno
from typing import Any, Final

from bottomhalf.host.protocol import HUP, IN
from bottomhalf.host.sim.disk import Disk, Inode
from bottomhalf.host.sim.network import Network
from bottomhalf.host.sim.sockets import SimSocket, Stream
from bottomhalf.host.sim.store import Store
from bottomhalf.host.sim.world import World, failure

MODES: Final = ("truncate", "append", "private", "existing")


class SimOutput(SimSocket):
    """A file that is written to, and perhaps another one that is read."""

    def __init__(self, world: World, inode: Inode | None, source: bytes | None) -> None:
        nothing = Stream(world, 0, (0, 0))
        super().__init__(world, nothing, Stream(world, 1 << 30, (0, 0)))
        self._inode = inode
        if source is not None:
            nothing.arrived += source
            nothing.ended = True

    def _peer_is_gone(self) -> bool:
        return False

    def send(self, data: Any, /) -> int:
        self.check_open()
        if self._inode is not None:
            error = self._inode.write(self._inode.current.size, bytes(data), durable=True)
            if error:
                raise failure(-error, self._inode.path)
        return len(data)

    def shutdown(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            super(SimSocket, self).close()


class SimPty(SimSocket):
    """Our end of a pseudo-terminal (host.protocol.PtyMaster)."""

    is_open = False  # somebody has the other end

    def hung_up(self) -> bool:
        return not self.is_open

    def readiness(self) -> int:
        return super().readiness() if self.is_open else super().readiness() | HUP | IN

    def recv_into(self, buffer: Any, /) -> int:
        if not self.is_open and not self._inbound.arrived:
            raise failure(errno.EIO)
        return super().recv_into(buffer)


class Streams:
    """What can be opened as a stream."""

    def __init__(self, world: World, network: Network, disk: Disk) -> None:
        self._world = world
        self._network = network
        self._disk = disk
        self._pipes: dict[str, SimSocket] = {}
        self.links: dict[str, str] = {}
        self.ptys: dict[str, SimPty] = {}

    def add_pipe(self, path: str) -> SimSocket:
        """Make a named pipe; what others have of it. It carries both directions, as two pipes would."""
        near, far = self._network.pair(True, path, path)
        self._pipes[path] = near
        return far

    def open_terminal(self, name: str) -> SimSocket:
        """Open the other end of a pseudo-terminal, as a person's program does."""
        pty = self.ptys[self.links.get(name, name)]
        pty.is_open = True
        return pty.peer

    def leave_terminal(self, name: str) -> None:
        """Nobody has the other end open any more."""
        self.ptys[self.links.get(name, name)].is_open = False

    def open(self, input_path: str | None, output_path: str | None, mode: str) -> SimSocket:
        assert mode in MODES, mode
        if mode == "existing":
            path = output_path or input_path or ""
            if path not in self._pipes:
                raise failure(errno.ENOENT, path)
            return self._pipes[path]
        inode = None if output_path is None else self._output(output_path, mode)
        source = None
        if input_path is not None:
            found = self._disk.files.get(input_path)
            if found is None:
                raise failure(errno.ENOENT, input_path)
            source = found.current.content()
        return SimOutput(self._world, inode, source)

    def _output(self, path: str, mode: str) -> Inode:
        if path in self._disk.directories:
            raise failure(errno.EISDIR, path)
        inode = self._disk.files.get(path)
        if inode is None:
            inode = self._disk.files[path] = Inode(self._disk, path, Store(0), "")
        elif mode == "truncate":
            inode.become(Store(0))
        return inode

    def open_pty(self) -> SimPty:
        there, back = (Stream(self._world, self._network.buffer_bytes, (0, 0)) for _ in range(2))
        master, other = SimPty(self._world, back, there), SimSocket(self._world, there, back)
        master.peer, other.peer = other, master
        master.name = f"/dev/pts/{len(self.ptys)}"
        self.ptys[master.name] = master
        return master

    def symlink(self, target: str, path: str) -> None:
        if path in self.links or path in self._disk.files:
            raise failure(errno.EEXIST, path)
        self.links[path] = target

    def remove(self, path: str) -> None:
        if self.links.pop(path, None) is None and self._disk.files.pop(path, None) is None:
            raise failure(errno.ENOENT, path)

    def drop_everything(self) -> None:
        self._pipes.clear()
        self.ptys.clear()
