# SPDX-License-Identifier: Apache-2.0
"""Addresses, listeners and connections of the simulated host.

Connecting succeeds as soon as somebody listens and has room in his queue, long before accept(2). The file of
a Unix socket outlives its listener when the program dies; a connect then finds the file and nobody behind it.
Both are so here. ``buffer_bytes`` and ``delay_ns`` apply to connections made afterwards.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import Final

from bottomhalf.host.protocol import IN, Address, InetAddress, UnixAddress
from bottomhalf.host.sim.disk import Disk
from bottomhalf.host.sim.faults import ACCEPT, CONNECT, Faults
from bottomhalf.host.sim.files import OWN_NAME, OWN_PID
from bottomhalf.host.sim.sockets import BUFFER_BYTES, SimSocket, Stream
from bottomhalf.host.sim.world import Descriptor, World, failure

BACKLOG: Final = 128
FIRST_PORT: Final = 32_768  # of those that the host chooses

_ANY_HOST: Final = ("", "0.0.0.0", "::")
_LOOPBACK: Final = "127.0.0.1"


class SimListener(Descriptor):
    """A host.protocol.Listener."""

    def __init__(self, world: World, network: Network, address: Address) -> None:
        super().__init__(world)
        self.address = address
        self._network = network
        self._queue: deque[SimSocket] = deque()

    def readiness(self) -> int:
        return IN if self._queue else 0

    def accept(self) -> SimSocket:
        self.check_open()
        if not self._queue:
            raise failure(errno.EAGAIN)
        fault = self._network.faults.strike(str(self.address), ACCEPT)
        if fault is not None and fault.errno:
            raise failure(fault.errno)
        self.world.note("accept", str(self.address))
        return self._queue.popleft()

    def has_room(self) -> bool:
        return len(self._queue) < BACKLOG

    def enqueue(self, accepted: SimSocket) -> None:
        self._queue.append(accepted)

    def close(self) -> None:
        if self.closed:
            return
        for waiting in self._queue:
            waiting.peer.reset()
            waiting.close()
        self._queue.clear()
        self._network.forget(self)
        super().close()


class Network:
    """Who listens where."""

    def __init__(self, world: World, faults: Faults, disk: Disk) -> None:
        self.faults = faults
        self.buffer_bytes = BUFFER_BYTES
        self.delay_ns = (0, 0)  # least and most that bytes take to the other side
        self._world = world
        self._disk = disk
        self._paths: dict[str, SimListener | None] = {}  # None: the file of a listener that is gone
        self._ports: dict[tuple[str, int], SimListener] = {}
        self._next_port = FIRST_PORT

    def pair(self, is_local: bool, first_name: str, second_name: str) -> tuple[SimSocket, SimSocket]:
        """Two connected sockets. The names are what each end calls its peer."""
        world = self._world
        there = Stream(world, self.buffer_bytes, self.delay_ns)
        back = Stream(world, self.buffer_bytes, self.delay_ns)
        first = SimSocket(world, back, there)
        second = SimSocket(world, there, back)
        first.peer, second.peer = second, first
        first.name, second.name = first_name, second_name
        first.is_local = second.is_local = is_local
        return first, second

    def listen(self, address: Address) -> SimListener:
        if isinstance(address, UnixAddress):
            path = address.path
            if path in self._disk.files or path in self._disk.directories or self._paths.get(path):
                raise failure(errno.EADDRINUSE, path)
            listener = self._paths[path] = SimListener(self._world, self, address)
        else:
            port = address.port or self._free_port()
            address = InetAddress(address.host, port)
            if any(port == taken and _overlap(address.host, host) for host, taken in self._ports):
                raise failure(errno.EADDRINUSE, str(address))
            listener = self._ports[address.host, port] = SimListener(self._world, self, address)
        self._world.note("listen", str(address))
        return listener

    def connect(self, address: Address) -> SimSocket:
        fault = self.faults.strike(str(address), CONNECT)
        if fault is not None:
            self._world.block(fault.delay_ns)
            if fault.errno:
                raise failure(fault.errno, str(address))
        listener = self._find(address)
        if not listener.has_room():
            raise failure(errno.EAGAIN, str(address))
        is_local = isinstance(address, UnixAddress)
        own_name = f"{OWN_NAME} (pid {OWN_PID}, uid 0)" if is_local else f"{_LOOPBACK}:{self._free_port()}"
        near, far = self.pair(is_local, own_name if is_local else str(address), own_name)
        listener.enqueue(far)
        self._world.note("connect", str(address))
        return near

    def forget(self, listener: SimListener) -> None:
        """It listens no more; the file of a Unix socket goes with it."""
        address = listener.address
        if isinstance(address, UnixAddress):
            del self._paths[address.path]
        else:
            del self._ports[address.host, address.port]

    def drop_everything(self, reboot: bool) -> None:
        """The program, or the machine, is gone. Socket files stay unless it was the machine (/run is in
        memory)."""
        self._ports.clear()
        self._paths = {} if reboot else dict.fromkeys(self._paths)

    def _find(self, address: Address) -> SimListener:
        if isinstance(address, UnixAddress):
            path = address.path
            if path not in self._paths and path not in self._disk.files:
                raise failure(errno.ENOENT, str(address))
            listener = self._paths.get(path)
        else:
            listeners = (
                found
                for (host, port), found in self._ports.items()
                if port == address.port and _overlap(host, address.host)
            )
            listener = next(listeners, None)
        if listener is None:
            raise failure(errno.ECONNREFUSED, str(address))
        return listener

    def _free_port(self) -> int:
        self._next_port += 1
        return self._next_port - 1


def _overlap(host: str, other: str) -> bool:
    """Whether two hosts of the same port are the same place."""
    host, other = (_LOOPBACK if name == "localhost" else name for name in (host, other))
    return host == other or host in _ANY_HOST or other in _ANY_HOST
