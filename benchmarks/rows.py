# SPDX-License-Identifier: Apache-2.0
"""The rows of the table: what is measured, beside whom, and what we are out for.

A goal is printed beside the ratio and never asserted: it is a direction, and the machine decides.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import system
from benchmarks.load import Client, Load, choose, run
from benchmarks.servers import Server, running

IDLE_SECONDS: Final = 0.5


@dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    image: Path
    image_for_writes: Path
    cache: Path
    seconds: float
    client: Client | None = None


@dataclass(frozen=True)
class Sample:
    """One run of one server: its values by unit, and what is worth knowing beside them."""

    values: Mapping[str, float]
    cpu_us_per_op: float | None = None
    latency_p50_us: float | None = None
    foreign_cpus: float = 0.0
    client: str = ""
    client_busy: float | None = None  # what part of its time, 1.0: it could not have asked faster


@dataclass(frozen=True)
class Row:
    """One measurement, and its peers with the goal for each."""

    name: str
    peers: Mapping[str, float | None]
    units: tuple[str, ...]
    more_is_better: bool = True
    about: str = ""


@dataclass(frozen=True)
class ServerRow(Row, ABC):
    """One that is measured with a server."""

    ours: str = ""  # the server in our place, if not the usual one

    @abstractmethod
    def measure(self, server: Server, settings: Settings) -> Sample:
        """Run once with one server."""


@dataclass(frozen=True)
class LoadRow(ServerRow):
    """A client loads a fresh server for some seconds."""

    load: Load = field(default_factory=lambda: Load("randread", 4096, 32))
    client: Client = "fio"
    direct: bool = False
    qcow2: bool = False  # all clusters allocated
    allocating: bool = False  # none

    def measure(self, server: Server, settings: Settings) -> Sample:
        """Return operations per second, or bytes for sequential loads."""
        client, program = choose(settings.client or self.client, settings.cache)
        writes = self.load.op == "randwrite"
        image = settings.image_for_writes if writes else settings.image
        if self.qcow2:
            image = system.empty_qcow2(image) if self.allocating else system.as_qcow2(image)
        with running(server, image, direct=self.direct) as up:
            if writes and not self.allocating:
                system.settle_for_writes(image, keep=self.qcow2)
            else:
                system.settle(image, cached=not self.direct)
            held = None if writes or self.direct else system.Held(image)
            meter = system.Meter(up.pid)
            result = run(client, program, self.load, up.socket, settings.seconds)
            meter.stop()
            if self.allocating:
                image.unlink()
            if held is not None:
                held.release()
        if not result.ops:
            raise RuntimeError(f"{server.name}: {client} completed no request")
        rate = result.ops / result.seconds
        return Sample(
            {"IOPS": rate, "MB/s": rate * self.load.block_size / 1e6},
            cpu_us_per_op=meter.server_seconds / result.ops * 1e6,
            latency_p50_us=result.latency_p50_us,
            foreign_cpus=meter.foreign_cpus,
            client=client,
            client_busy=meter.client_seconds / result.seconds / self.load.connections,
        )


@dataclass(frozen=True)
class StartupRow(ServerRow):
    """From exec to the NBD greeting on the socket."""

    def measure(self, server: Server, settings: Settings) -> Sample:
        """Return milliseconds."""
        with running(server, settings.image) as up:
            return Sample({"ms": up.startup_seconds * 1e3})


@dataclass(frozen=True)
class MemoryRow(ServerRow):
    """What the daemon with one export weighs when nobody is connected."""

    def measure(self, server: Server, settings: Settings) -> Sample:
        """Return resident and proportional set size in MiB."""
        with running(server, settings.image) as up:
            time.sleep(IDLE_SECONDS)
            rss, pss = system.memory_mib(up.pid)
            return Sample({"MiB RSS": rss, "MiB PSS": pss})


_IOPS: Final = ("IOPS",)
_BYTES: Final = ("MB/s",)
_QSD: Final = "qemu-storage-daemon"

_FILTERS: Final = tuple(
    LoadRow(
        f"filter-{name}",
        {"null-co": 0.85},
        _IOPS,
        about=f"{what} above a disk that does nothing, beside that disk; 4 KiB reads, 32 in flight",
        ours=f"null-co+{name}",
        load=Load("randread", 4096, 32),
        client="nbdload",
    )
    for name, what in (
        ("throttle", "throttle, no limit reached,"),
        ("blkdebug", "blkdebug without rules"),
        ("cor", "copy-on-read with nothing to copy"),
    )
)

_QCOW2_LOADS: Final[tuple[tuple[str, float | None, tuple[str, ...], Load, Client, bool, str], ...]] = (
    ("randread-4k-qd32", 2.0, _IOPS, Load("randread", 4096, 32), "fio", False, "random 4 KiB reads, 32 in flight"),
    ("randread-4k-batches", None, _IOPS, Load("randread", 4096, 32), "nbdload", False, "the same, client in batches"),
    ("randread-4k-odirect", 2.5, _IOPS, Load("randread", 4096, 32), "fio", True, "the first past the page cache"),
    ("randwrite-4k-qd32", 2.5, _IOPS, Load("randwrite", 4096, 32), "fio", False, "random 4 KiB writes"),
    ("seqread-256k-qd8", 4.0, _BYTES, Load("seqread", 1 << 18, 8), "nbdload", False, "sequential 256 KiB reads"),
)
_QCOW2: Final = tuple(
    LoadRow(
        f"qcow2-{name}",
        {"qemu-nbd+qcow2": goal},
        units,
        about=f"an allocated qcow2 image: {about}",
        ours="bottomhalf+qcow2",
        load=load,
        client=client,
        direct=direct,
        qcow2=True,
    )
    for name, goal, units, load, client, direct, about in _QCOW2_LOADS
)
_ALLOCATING: Final = LoadRow(
    "qcow2-allocate-4k-qd32",
    {"qemu-nbd+qcow2": 1.0},
    _IOPS,
    about="an empty qcow2 image of 64 GiB: random 4 KiB writes, nearly each of which allocates a cluster",
    ours="bottomhalf+qcow2",
    load=Load("randwrite", 4096, 32),
    qcow2=True,
    allocating=True,
)

ROWS: Final[tuple[ServerRow, ...]] = (
    LoadRow(
        "randread-4k-qd32",
        {"qemu-nbd": 2.0, "nbdkit": 1.4, _QSD: None},
        _IOPS,
        about="random 4 KiB reads, 32 in flight",
        load=Load("randread", 4096, 32),
    ),
    LoadRow(
        "randread-4k-qd128-2clients",
        {"qemu-nbd": 4.0, "nbdkit": None},
        _IOPS,
        about="random 4 KiB reads, two batching clients with 128 in flight each",
        load=Load("randread", 4096, 128, connections=2),
        client="nbdload",
    ),
    LoadRow(
        "randwrite-4k-qd32",
        {"qemu-nbd": 2.5, "nbdkit": None},
        _IOPS,
        about="random 4 KiB writes, 32 in flight",
        load=Load("randwrite", 4096, 32),
    ),
    LoadRow(
        "seqread-256k-qd8",
        {"qemu-nbd": 4.0, "nbdkit": None},
        _BYTES,
        about="sequential 256 KiB reads, 8 in flight",
        load=Load("seqread", 256 * 1024, 8),
        client="nbdload",
    ),
    LoadRow(
        "seqread-1m-qd4",
        {"qemu-nbd": 4.0, "nbdkit": None},
        _BYTES,
        about="sequential 1 MiB reads, 4 in flight",
        load=Load("seqread", 1024 * 1024, 4),
        client="nbdload",
    ),
    LoadRow(
        "randread-4k-odirect-qd32",
        {"qemu-nbd": 2.0, _QSD: None},
        _IOPS,
        about="random 4 KiB reads past the page cache, 32 in flight",
        load=Load("randread", 4096, 32),
        direct=True,
    ),
    LoadRow(
        "randread-4k-qd1",
        {"qemu-nbd": 1.0, "nbdkit": None},
        _IOPS,
        about="random 4 KiB reads, one at a time: latency",
        load=Load("randread", 4096, 1),
    ),
    LoadRow(
        "throttle-randread-4k-qd32",
        {"qsd+throttle": 1.5},
        _IOPS,
        about="random 4 KiB reads through throttle, raw and file, 32 in flight",
        ours="bottomhalf+throttle",
        load=Load("randread", 4096, 32),
    ),
    LoadRow(
        "throttle-randwrite-4k-qd32",
        {"qsd+throttle": 1.5},
        _IOPS,
        about="random 4 KiB writes through throttle, raw and file, 32 in flight",
        ours="bottomhalf+throttle",
        load=Load("randwrite", 4096, 32),
    ),
    *_FILTERS,
    *_QCOW2,
    _ALLOCATING,
    StartupRow(
        "startup",
        {_QSD: None, "qemu-nbd": None},
        ("ms",),
        more_is_better=False,
        about="from exec to the NBD greeting on the socket",
    ),
    MemoryRow(
        "idle-memory",
        {_QSD: None},
        ("MiB RSS", "MiB PSS"),
        more_is_better=False,
        about="the idle daemon with one export",
    ),
)
