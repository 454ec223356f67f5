# SPDX-License-Identifier: Apache-2.0
"""Everything that can be done to an image, as a table: a new operation is one line.

Each begins with one image of its shape, whose every byte is durable, and which has a bit of everything: clusters of
data, compressed ones, zero clusters, discarded ones, holes, a snapshot that shares most of it, an L2 table that does
not exist yet. (Shapes that cannot have snapshots or compressed clusters have less.)
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from bottomhalf.block.reopen import reopen
from bottomhalf.block.resize import Preallocation, co_resize
from bottomhalf.drivers.qcow2.amend import AmendOptions, co_amend, co_rebase
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.snapshots import Snapshot
from bottomhalf.host.request import COMPRESSED, FUA, MAY_UNMAP
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.drivers.qcow2.bench import Disk, check, make

IMAGE: Final = "disk.qcow2"
BASE: Final = "base.raw"
CLUSTERS: Final = 120

Shape = tuple[tuple[str, Any], ...]


def shape(**options: Any) -> Shape:
    """How an image is made; ``backed``: above a raw file that is longer. Hashable."""
    return tuple(sorted(options.items()))


PLAIN: Final = shape()
LAZY: Final = shape(lazy_refcounts=True)
BACKED: Final = shape(backed=True)
OUTSIDE: Final = shape(data_file="data.raw")
RAW: Final = shape(data_file="data.raw", data_file_raw=True)
VERSION_2: Final = shape(version=2)
NARROW: Final = shape(refcount_bits=1)
LONG_RUN_SHAPES: Final = (
    *(PLAIN, LAZY, BACKED, OUTSIDE, RAW, VERSION_2, NARROW),
    shape(refcount_bits=64),
    shape(cluster_size=4096),
    shape(cluster_size=16384, extended_l2=True),
    shape(cluster_size=16384, extended_l2=True, backed=True),
    shape(version=2, backed=True),
)


@dataclass(frozen=True)
class Made:
    """An image, and what it contains."""

    files: dict[str, bytes]
    content: bytes
    snapshots: dict[str, tuple[Snapshot, bytes]]
    options: dict[str, Any]


@cache
def made(of: Shape) -> Made:
    options = {"cluster_size": 512, **dict(of)}
    backed = options.pop("backed", False)
    cluster = options["cluster_size"]
    size = options["size"] = CLUSTERS * cluster
    host = SimHost(0)
    if backed:
        host.add_file(BASE, random.Random("base").randbytes(size + 20 * cluster))
    make(host, IMAGE, **options)
    opened = Disk(host, IMAGE, **backing(backed))
    backend, snapshots = opened.backend, {}

    def write(at: int, count: int, flags: int = 0) -> None:
        data = b"".join(bytes([n % 250 + 1]) * cluster for n in range(at, at + count))
        opened.run(backend.co_pwrite(at * cluster, data, flags))

    write(0, 20)
    write(23, 19)
    if opened.node.can_compress:
        write(20, 3, COMPRESSED)
    if not opened.node.header.external and options.get("refcount_bits") != 1:
        kept = opened.run(opened.node.snapshots.create("old", date_ns=0))
        snapshots[kept.id] = kept, opened.content()
    write(36, 2)
    opened.run(backend.co_write_zeroes(28 * cluster, 4 * cluster))
    opened.run(backend.co_discard(40 * cluster, 2 * cluster))
    content = opened.content()
    opened.close()
    return Made({path: host.content(path) for path in host.disk.files}, content, snapshots, options)


def backing(backed: bool) -> dict[str, Any]:
    if not backed:
        return {}
    return {"backing": {"driver": "raw", "read-only": True, "file": {"driver": "file", "filename": BASE}}}


class Scene:
    """An image of some shape on a host of its own, and what is known of it."""

    def __init__(self, seed: int, of: Shape) -> None:
        self.shape = dict(of)
        self.made = made(of)
        self.host = SimHost(seed)
        for path, data in self.made.files.items():
            self.host.add_file(path, data)
        self.cluster: int = self.made.options["cluster_size"]
        self.flushed = self.made.content
        self.live = self.flushed
        self.known = dict(self.made.snapshots)
        self.disk: Disk | None = None

    def open(self, **options: Any) -> Disk:
        self.disk = Disk(self.host, IMAGE, **backing(self.shape.get("backed", False)), **options)
        return self.disk

    @property
    def opened(self) -> Disk:
        assert self.disk is not None
        return self.disk

    def run(self, body: Any) -> Any:
        return self.opened.run(body)

    @property
    def old(self) -> Snapshot:
        """The snapshot that it has."""
        return next(iter(self.made.snapshots.values()))[0]


# -- how it begins ----------------------------------------------------------------------------------------------------


def opens(scene: Scene) -> None:
    """Nothing but L1 and the refcount table is in memory."""
    scene.open()


def dirty(scene: Scene) -> None:
    """Much has been written and not flushed, in places that were allocated and in new ones."""
    opened, cluster = scene.open(), scene.cluster
    live = bytearray(scene.live)
    for at, length in ((3 * cluster, cluster), (50 * cluster + 7, 2 * cluster), (90 * cluster, cluster)):
        opened.run(opened.backend.co_pwrite(at, b"D" * length))
        live[at : at + length] = b"D" * length
    opened.run(opened.backend.co_write_zeroes(10 * cluster, cluster))
    live[10 * cluster : 11 * cluster] = bytes(cluster)
    scene.live = bytes(live)


def closed(scene: Scene) -> None:
    """Nobody has it open."""


def leaking(scene: Scene) -> None:
    """A counter is too high."""
    damaged(scene, ((6, 9),))


def damaged(scene: Scene, counts: tuple[tuple[int, int], ...] = ((6, 9), (8, 0))) -> None:
    """A counter too high, and one that is too low."""
    data = bytearray(scene.host.content(IMAGE))
    header = Header.parse(bytes(data[: 1 << 16]))
    block = int.from_bytes(data[header.refcount_table_offset :][:8], "big")
    for cluster, count in counts:
        data[block + 2 * cluster : block + 2 * cluster + 2] = count.to_bytes(2, "big")
    del scene.host.disk.files[IMAGE]
    scene.host.add_file(IMAGE, bytes(data))


# -- what is done -----------------------------------------------------------------------------------------------------

After = Callable[[Scene, bytes], bytes]


def unchanged(scene: Scene, live: bytes) -> bytes:
    return live


@dataclass(frozen=True)
class Operation:
    """``act`` does it, and may raise; ``after`` is what the disk then contains. ``alive``: it can be used afterwards
    and done again; ``usable``: before it is done again, too. ``flags``: a power cut in the midst of it may leave flags
    that do not fit counts (see ``snapshotting``)."""

    name: str
    act: Callable[[Scene], Any]
    after: After = unchanged
    shape: Shape = PLAIN
    before: Callable[[Scene], None] = opens
    alive: bool = True
    usable: bool = True
    flags: bool = False
    repairs: bool = False
    makes: bool = False  # there is no image before
    everywhere: bool = True  # in the long run with all shapes

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Range:
    """Offset and length in clusters, and bytes more."""

    at: int
    count: int
    plus: int = 0
    more: int = field(default=0, kw_only=True)

    def of(self, scene: Scene) -> tuple[int, int]:
        return self.at * scene.cluster + self.plus, self.count * scene.cluster + self.more


def put(live: bytes, at: int, data: bytes) -> bytes:
    return live[:at] + data + live[at + len(data) :]


def writes(name: str, where: Range, flags: int = 0, *, noise: bool = False, **more: Any) -> Operation:
    def data(scene: Scene) -> tuple[int, bytes]:
        at, length = where.of(scene)
        return at, random.Random(7).randbytes(length) if noise else b"N" * length

    def act(scene: Scene) -> None:
        at, what = data(scene)
        scene.run(scene.opened.backend.co_pwrite(at, what, flags))

    return Operation(name, act, lambda scene, live: put(live, *data(scene)), **more)


def zeroes(name: str, where: Range, flags: int = 0, **more: Any) -> Operation:
    def act(scene: Scene) -> None:
        scene.run(scene.opened.backend.co_write_zeroes(*where.of(scene), flags))

    def after(scene: Scene, live: bytes) -> bytes:
        at, length = where.of(scene)
        return put(live, at, bytes(length))

    return Operation(name, act, after, **more)


def discards(name: str, where: Range, **more: Any) -> Operation:
    def act(scene: Scene) -> None:
        scene.run(scene.opened.backend.co_discard(*where.of(scene)))

    def after(scene: Scene, live: bytes) -> bytes:
        at, length = where.of(scene)
        if scene.shape.get("version") == 2 and scene.shape.get("backed"):
            return live
        return put(live, at, bytes(length))

    return Operation(name, act, after, **more)


def reads(name: str, where: Range, **more: Any) -> Operation:
    def act(scene: Scene) -> None:
        at, length = where.of(scene)
        assert scene.run(scene.opened.backend.co_pread(at, length)) == scene.live[at : at + length]

    return Operation(name, act, **more)


def does(name: str, body: Callable[[Disk, Scene], Any], **more: Any) -> Operation:
    """A coroutine of the open disk."""
    return Operation(name, lambda scene: scene.run(body(scene.opened, scene)), **more)


def resizes(name: str, clusters: int, mode: str = "off", *, minus: int = 0, **more: Any) -> Operation:
    def size(scene: Scene) -> int:
        return clusters * scene.cluster - minus

    def after(scene: Scene, live: bytes) -> bytes:
        return live[: size(scene)].ljust(size(scene), b"\0")

    return does(name, lambda disk, scene: co_resize(disk.node, size(scene), Preallocation(mode)), after=after, **more)


def amends(name: str, of: Shape = PLAIN, **wanted: Any) -> Operation:
    def after(scene: Scene, live: bytes) -> bytes:
        return live.ljust(wanted.get("size", len(live)), b"\0")

    return does(
        f"amend {name}",
        lambda disk, scene: co_amend(disk.node, AmendOptions(**wanted)),
        after=after,
        shape=of,
        everywhere=False,
    )


def creates(name: str, **options: Any) -> Operation:
    options = {"size": 100 * 512, "cluster_size": 512, **options}

    def act(scene: Scene) -> None:
        for path in (IMAGE, "data.raw"):
            scene.host.disk.files.pop(path, None)
        make(scene.host, IMAGE, **options)

    return Operation(
        f"create {name}",
        act,
        lambda scene, live: bytes(options["size"]),
        shape=OUTSIDE if "data_file" in options else PLAIN,
        before=closed,
        alive=False,
        makes=True,
        everywhere=False,
    )


def read_only(scene: Scene) -> None:
    scene.open(**{"read-only": True})


def reopens(scene: Scene, **options: Any) -> None:
    disk = scene.opened
    given = {"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": disk.node.file.name, **options}
    disk.context.poll(False)
    reopen(disk.graph, {disk.node: from_json(BlockdevOptions, given)})


def checks(scene: Scene, repair: str | None = None) -> None:
    """A check says in its result what it could not read; its users tell theirs."""
    found = check(scene.host, IMAGE, repair)
    if found.failure or found.check_errors:
        raise OSError(None, found.failure or str(found.findings))


async def checks_itself(disk: Disk, scene: Scene) -> None:
    found = await disk.node.co_check()
    if found.failure or found.check_errors:
        raise OSError(None, found.failure or str(found.findings))


async def inactivate(disk: Disk) -> None:
    await disk.node.co_inactivate()
    await disk.node.co_activate()


async def snapshot(disk: Disk, scene: Scene, state: bytes = b"") -> None:
    if state:
        await disk.node.co_save_vmstate(0, memoryview(state))
    made = await disk.node.snapshots.create("new", date_ns=0, vm_state_bytes=len(state))
    scene.known[made.id] = made, scene.live


async def delete(disk: Disk, scene: Scene) -> None:
    if any(each.id == scene.old.id for each in await disk.node.snapshots.read()):  # a failed one may be done
        await disk.node.snapshots.delete(scene.old)
    scene.known.pop(scene.old.id, None)


def applied(scene: Scene, live: bytes) -> bytes:
    return scene.made.snapshots[scene.old.id][1]


OPERATIONS: Final = [
    writes("write into a hole", Range(50, 3)),
    writes("write where there is no L2 table", Range(80, 2, 30)),
    writes("write a part of a new cluster", Range(50, 0, 100, more=200)),
    writes("write over data", Range(4, 2)),
    writes("write over data, FUA", Range(4, 2), FUA),
    writes("write into a hole, FUA", Range(50, 2), FUA),
    writes("write into a zero cluster", Range(28, 1, 7)),
    writes("write into a compressed cluster", Range(21, 1, 10)),
    writes("write over everything", Range(15, 30, 100)),
    writes("write after much was written", Range(4, 60), before=dirty),
    writes("write compressed into a hole", Range(50, 9), COMPRESSED, shape=shape(refcount_bits=8), everywhere=False),
    writes("write compressed over data", Range(2, 3), COMPRESSED, shape=shape(refcount_bits=8), everywhere=False),
    writes("write compressed over the same", Range(20, 3), COMPRESSED, shape=shape(refcount_bits=8), everywhere=False),
    writes("write compressed what is not", Range(50, 3), COMPRESSED, noise=True, everywhere=False),
    writes("write above a backing file", Range(50, 1, 100), shape=BACKED),
    writes("write to a data file", Range(50, 2, 100), shape=OUTSIDE),
    writes("write over data in a data file, FUA", Range(4, 2), FUA, shape=OUTSIDE),
    zeroes("zero data", Range(4, 3)),
    zeroes("zero data and give it back", Range(4, 3), MAY_UNMAP),
    zeroes("zero data, FUA", Range(4, 3), FUA),
    zeroes("zero parts of clusters", Range(4, 3, 100)),
    zeroes("zero above a backing file", Range(50, 2, 100), shape=BACKED),
    zeroes("zero a raw data file", Range(4, 3), shape=RAW),
    discards("discard data", Range(4, 3)),
    discards("discard above a backing file", Range(50, 3), shape=BACKED),
    discards("discard compressed clusters", Range(20, 5)),
    discards("discard in a raw data file", Range(4, 3), shape=RAW),
    reads("read data", Range(4, 2)),
    reads("read compressed clusters", Range(20, 3)),
    reads("read a backing file", Range(44, 20), shape=BACKED),
    reads("read everything", Range(0, CLUSTERS), shape=BACKED),
    reads("read a data file", Range(2, 60), shape=OUTSIDE),
    does("flush", lambda disk, scene: disk.backend.co_flush(), before=dirty),
    does("flush, lazy", lambda disk, scene: disk.backend.co_flush(), before=dirty, shape=LAZY),
    does("flush a data file", lambda disk, scene: disk.backend.co_flush(), before=dirty, shape=OUTSIDE),
    Operation("open", opens, before=closed, alive=False),
    Operation("open read-only", read_only, before=closed, alive=False),
    Operation("close", lambda scene: scene.opened.close(), before=dirty, alive=False),
    Operation("close, lazy", lambda scene: scene.opened.close(), before=dirty, shape=LAZY, alive=False),
    Operation("close a data file", lambda scene: scene.opened.close(), before=dirty, shape=OUTSIDE, alive=False),
    Operation("reopen", lambda scene: reopens(scene, **{"l2-cache-size": 1024}), before=dirty, everywhere=False),
    Operation("reopen read-only", lambda scene: reopens(scene, **{"lazy-refcounts": True}), before=dirty,
              everywhere=False),
    does("inactivate and activate", lambda disk, scene: inactivate(disk), before=dirty, usable=False),
    does("make a snapshot", snapshot, before=dirty, flags=True, everywhere=False),
    does("make a snapshot of a machine", lambda disk, scene: snapshot(disk, scene, b"machine" * 200), flags=True,
         everywhere=False),
    does("apply a snapshot", lambda disk, scene: disk.node.snapshots.apply(scene.old), after=applied, before=dirty,
         everywhere=False),
    does("delete a snapshot", delete, before=dirty, flags=True, everywhere=False),
    does("save a machine's state", lambda disk, scene: disk.node.co_save_vmstate(0, memoryview(b"machine" * 300)),
         everywhere=False),
    resizes("make it larger", 150),
    resizes("make it larger than L1", 64 * 64 + 10, everywhere=False),
    resizes("make it smaller", 60, minus=512, shape=shape(cluster_size=1024)),
    resizes("make it much smaller", 2, shape=PLAIN),
    resizes("make it larger above a backing file", 150, shape=BACKED),
    resizes("make it larger, metadata", 150, "metadata", everywhere=False),
    resizes("make it larger, falloc", 150, "falloc", everywhere=False),
    resizes("make it larger, full", 150, "full", everywhere=False),
    resizes("make a data file larger", 150, shape=OUTSIDE),
    resizes("make a raw data file larger", 150, shape=RAW),
    resizes("make a raw data file smaller", 50, shape=RAW),
    amends("to version 3", VERSION_2, compat="1.1"),
    amends("to version 2", compat="0.10"),
    amends("to wider counters", refcount_bits=64),
    amends("to narrower counters", shape(refcount_bits=64), refcount_bits=8),
    amends("to lazy refcounts", lazy_refcounts=True),
    amends("away from lazy refcounts", LAZY, lazy_refcounts=False),
    amends("the size", size=150 * 512),
    amends("the name of the data file", OUTSIDE, data_file="data.raw"),
    amends("away from a raw data file", RAW, data_file_raw=False),
    amends("everything", VERSION_2, compat="1.1", refcount_bits=8, lazy_refcounts=True, size=150 * 512),
    does("rebase", lambda disk, scene: co_rebase(disk.node, None, None), everywhere=False),
    creates("an image"),
    creates("with version 2", version=2),
    creates("with extended L2 entries", extended_l2=True, cluster_size=16384),
    creates("preallocated, metadata", preallocation="metadata"),
    creates("preallocated, falloc", preallocation="falloc"),
    creates("preallocated, full", preallocation="full"),
    creates("with a data file", data_file="data.raw"),
    creates("with a raw data file", data_file="data.raw", data_file_raw=True),
    Operation("check", checks, before=closed, alive=False),
    does("check while it is used", checks_itself, before=dirty),
    Operation("repair leaks", lambda scene: checks(scene, "leaks"), before=leaking, alive=False,
              repairs=True, everywhere=False),
    Operation("repair all", lambda scene: checks(scene, "all"), before=damaged, alive=False, repairs=True,
              everywhere=False),
]
