# SPDX-License-Identifier: Apache-2.0
"""Every host that there is, in one shape, so that one test holds all of them to the protocol."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bottomhalf.host.protocol import IN, Engine, Event, File, Host, Poller, Socket, UnixAddress
from bottomhalf.host.request import Request
from bottomhalf.host.sim import Odds, SimHost
from tests.host.contract.workload import InlineFirst

HOSTS = (
    *("sim", "sim-calm", "linux", "linux-threads", "linux-inline", "linux-aio"),
    *("linux-poll", "linux-uring", "linux-uring-old"),
)
WAIT_NS = 10_000_000_000  # longer than anything here takes; a wait never lasts so long


def forget_new_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An io_uring as before Linux 5.19: completions are posted at any time, and nothing tells of those to come."""
    from bottomhalf.host.linux import ring

    for flag in ("SINGLE_ISSUER", "DEFER_TASKRUN", "TASKRUN_FLAG"):
        monkeypatch.setattr(ring, f"_SETUP_{flag}", 0)


class Place:
    """A host with somewhere to put files, and small helpers that work on all of them."""

    def __init__(self, name: str, directory: Path) -> None:
        self.host: Host
        self._directory = directory
        self._sim: SimHost | None = None
        self.poller_kind = "poll" if name == "linux-poll" else "io_uring" if "uring" in name else "auto"
        self.engine_kind = {"linux-threads": "threads", "linux-aio": "linux-aio"}.get(name, "auto")
        self._inline = name == "linux-inline"
        self._opened: list[Engine | Event | File | Poller | Socket] = []
        if name.startswith("sim"):
            self.host = self._sim = SimHost(odds=Odds.calm() if name == "sim-calm" else None)
        else:
            self.host = importlib.import_module("bottomhalf.host.linux").LinuxHost()

    def path(self, name: str) -> str:
        return str(self._directory / name)

    def file(self, name: str, content: int | bytes = 0) -> str:
        """The path of a new file: its bytes, or its size as a hole."""
        path = self.path(name)
        if self._sim is not None:
            self._sim.add_file(path, content)
        else:
            with open(path, "wb") as created:
                created.truncate(content if isinstance(content, int) else 0)
                created.write(content if isinstance(content, bytes) else b"")
        return path

    def open(self, path: str, **options: bool | str) -> File:
        return self._keep(self.host.open_file(path, **options))  # type: ignore[arg-type]

    def engine(self) -> Engine:
        engine = self.host.engine(self.engine_kind)
        return self._keep(InlineFirst(engine) if self._inline else engine)

    def poller(self) -> Poller:
        return self._keep(self.host.poller(self.poller_kind))

    def event(self) -> Event:
        return self._keep(self.host.event())

    def sockets(self) -> tuple[Socket, Socket]:
        """Two connected ends."""
        address = UnixAddress(self.path("socket"))
        listener = self.host.listen(address)
        try:
            near = self._keep(self.host.connect(address))
            self.until_ready(listener.fileno())
            return near, self._keep(listener.accept())
        finally:
            listener.close()

    def until_ready(self, fd: int, mask: int = IN) -> int:
        """Wait for one descriptor; its mask."""
        poller = self.host.poller(self.poller_kind)
        try:
            poller.register(fd, mask)
            ready = poller.wait(WAIT_NS)
            assert ready, "nothing came"
            return ready[0][1]
        finally:
            poller.close()

    def complete(self, engine: Engine) -> list[Request]:
        """Reap until nothing is in flight."""
        done: list[Request] = []
        while engine.in_flight:
            if not engine.pending:  # what finished inside enter() shows there and perhaps nowhere else
                self.until_ready(engine.fileno())
            done += engine.reap()
        return done

    def close(self) -> None:
        for opened in reversed(self._opened):
            opened.close()

    def _keep(self, opened):  # type: ignore[no-untyped-def]
        self._opened.append(opened)
        return opened


@pytest.fixture(params=HOSTS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    if request.param == "linux-uring-old":
        forget_new_kernels(monkeypatch)
    made = Place(request.param, tmp_path)
    yield made
    made.close()
