# SPDX-License-Identifier: Apache-2.0
"""Images on the simulated host, and a disk that knows what it should contain."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockBackend, Graph
from bottomhalf.drivers.file import FileNode
from bottomhalf.drivers.qcow2.check import CheckResult, co_check
from bottomhalf.drivers.qcow2.create import CreateOptions, create
from bottomhalf.drivers.qcow2.node import Qcow2Node, co_read_header
from bottomhalf.drivers.registry import open_node
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE
from bottomhalf.host.request import COMPRESSED
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json

READ_WRITE = PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE


def make(host: SimHost, path: str, **options: Any) -> None:
    """A new image on the simulated disk, durable."""
    host.create_file(path, 0)
    context = AioContext(host)
    graph = Graph(context)
    file = FileNode(graph, filename=path)
    file.monitor_owned = True
    data = None
    if "data_file" in options:
        host.create_file(options["data_file"], 0)
        data = FileNode(graph, filename=options["data_file"])
        data.monitor_owned = True
    create(file, CreateOptions(**options), data)
    context.run(file.co_flush())
    if data is not None:
        context.run(data.co_flush())
    graph.close()
    context.close()


def check(host: SimHost, path: str, repair: str | None = None) -> CheckResult:
    context = AioContext(host)
    graph = Graph(context)
    file = FileNode(graph, filename=path, read_only=repair is None, locking="off")
    try:
        return context.run(co_check(file, context.run(co_read_header(file)), repair))  # type: ignore[no-any-return]
    finally:
        file.close()
        context.close()


def replace(host: SimHost, path: str, content: bytes | bytearray) -> None:
    """Other bytes for a file that nobody has open."""
    host.disk.files.pop(path, None)
    host.add_file(path, bytes(content))


class Disk:
    """An open image and the bytes that it should have."""

    def __init__(self, host: SimHost, path: str, **options: Any) -> None:
        self.host = host
        self.context = AioContext(host)
        self.graph = Graph(self.context)
        given = {
            "driver": "qcow2",
            "node-name": "disk",
            "discard": "unmap",
            "file": {"driver": "file", "filename": path, "discard": "unmap"},
            **options,
        }
        node = open_node(self.graph, from_json(BlockdevOptions, given))
        assert isinstance(node, Qcow2Node)
        self.node = node
        node.monitor_owned = True
        held = PERM_CONSISTENT_READ if node.read_only else READ_WRITE
        self.backend = BlockBackend(self.graph, held=held, shared=PERM_ALL)
        self.backend.insert(node)

    @property
    def size(self) -> int:
        return self.backend.size

    def run(self, body: Any) -> Any:
        return self.context.run(body)

    def content(self) -> bytes:
        return bytes(self.run(self.backend.co_pread(0, self.size)))

    def close(self) -> None:
        self.backend.close()
        self.graph.close()
        self.context.close()

    def abandon(self) -> None:
        """As if the program had been killed."""
        self.context.thread_pool.close()


@contextmanager
def disk(host: SimHost, path: str, **options: Any) -> Iterator[Disk]:
    opened = Disk(host, path, **options)
    yield opened
    opened.close()


class Model:
    """What every byte may be: as it was at the last flush, or anything that was put there since."""

    def __init__(self, size: int) -> None:
        self.now = bytearray(size)
        self.flushed = bytes(size)
        self.since: list[tuple[int, bytes]] = []

    def put(self, offset: int, data: bytes) -> None:
        self.now[offset : offset + len(data)] = data
        self.since.append((offset, data))

    def flush(self) -> None:
        self.flushed = bytes(self.now)
        self.since = []

    def allows(self, content: bytes) -> bool:
        """Whether a disk may look like this after a power cut."""
        if content == self.flushed or content == self.now:
            return True
        allowed = [{byte} for byte in self.flushed]
        for offset, data in self.since:
            for n, byte in enumerate(data, offset):
                allowed[n].add(byte)
        return all(byte in allowed[n] for n, byte in enumerate(content))


def random_steps(
    seed: int, size: int, count: int, cluster: int, *, squeeze: int = 0
) -> list[tuple[str, int, int, int]]:
    """(what, offset, length, byte) of random operations, of sizes around a cluster's. ``squeeze``: how many of 18 and
    as many more are compressed writes."""
    chance = random.Random(seed)
    steps = []
    for number in range(count):
        what = chance.choices(("write", "zero", "discard", "flush", "squeeze"), (10, 2, 3, 3, squeeze))[0]
        length = min(chance.choice((1, 512, cluster // 2, cluster, 2 * cluster, 5 * cluster)), size)
        offset = chance.randrange(0, size - length + 1)
        if chance.random() < 0.5:
            offset = offset // cluster * cluster
        if what == "squeeze":
            offset = offset // cluster * cluster
            length = -(-length // cluster) * cluster
        steps.append((what, offset, min(length, size - offset), number % 255 + 1))
    return steps


def squeezable(offset: int, length: int, byte: int) -> bytes:
    """Bytes that become smaller, but for every third byte's."""
    if byte % 3:
        return bytes([byte]) * length
    return random.Random(f"{offset} {length} {byte}").randbytes(length)


async def carry_out(disk: Disk, model: Model, step: tuple[str, int, int, int], sure: bool = True) -> None:
    """One step, on the disk and on the model. ``sure``: nothing has failed before, so the model knows every byte."""
    what, offset, length, byte = step
    if what == "write":
        data = bytes([byte]) * length
        await disk.backend.co_pwrite(offset, data)
        model.put(offset, data)
    elif what == "squeeze":
        data = squeezable(offset, length, byte)
        await disk.backend.co_pwrite(offset, data, COMPRESSED)
        model.put(offset, data)
    elif what == "zero":
        await disk.backend.co_write_zeroes(offset, length, (byte & 1) * 2)
        model.put(offset, bytes(length))
    elif what == "discard":
        await disk.backend.co_discard(offset, length)
        left = bytes(await disk.backend.co_pread(offset, length))
        old = model.now[offset : offset + length]
        assert not sure or all(new in (was, 0) for new, was in zip(left, old, strict=True))
        model.put(offset, left)
    else:
        await disk.backend.co_flush()
        model.flush()
