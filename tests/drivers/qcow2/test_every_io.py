# SPDX-License-Identifier: Apache-2.0
"""Every I/O of every operation fails in turn, once and for ever, with EIO, with ENOSPC, after it has moved a part.

What was flushed stays, also if the power goes then; the tables are whole (clusters may be leaked); the error reaches
the caller; when the disk is well again what failed can be done again, and no byte is another than the old or the new
one. A transfer that is short, and goes on, is no error to anybody.

The operations are a table (``operations``), and so are the faults."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest

from bottomhalf.block import BlockError, ImageError
from bottomhalf.drivers.file import FileNode
from bottomhalf.drivers.qcow2 import layout
from bottomhalf.drivers.qcow2.counters import Counters
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.metadata import Metadata
from bottomhalf.drivers.qcow2.node import Qcow2Node
from bottomhalf.host.request import DISCARD, READ, WRITE
from bottomhalf.host.sim import SimHost
from bottomhalf.host.sim.engine import SimEngine
from bottomhalf.host.sim.faults import Fault
from tests.drivers.qcow2.bench import Disk, check
from tests.drivers.qcow2.operations import IMAGE, LONG_RUN_SHAPES, OPERATIONS, Operation, Scene, Shape, backing, made

POSITIONS_MAX: Final = 2000
FREEING: Final = ("apply a snapshot", "delete a snapshot", "make it smaller", "make it much smaller")


@dataclass(frozen=True)
class Kind:
    """What goes wrong: with the requests of one op (None: of all), at which bytes, how often."""

    op: int | None
    number: int
    short: int | None
    times: int | None

    def __str__(self) -> str:
        what = "any" if self.op is None else {READ: "reads", WRITE: "writes"}[self.op]
        how = errno.errorcode.get(self.number, "goes on")
        return f"{what}-{'' if self.short is None else 'short, '}{how}-{'once' if self.times else 'for ever'}"


KINDS: Final = [
    Kind(None, errno.EIO, None, 1),
    Kind(None, errno.EIO, None, None),
    Kind(None, errno.ENOSPC, None, 1),
    Kind(None, errno.ENOSPC, None, None),
    Kind(WRITE, 0, 200, 1),
    Kind(WRITE, errno.ENOSPC, 200, 1),
    Kind(READ, 0, 200, 1),
    Kind(READ, errno.EIO, 200, 1),
]
LONG_RUN_KINDS: Final = [
    *KINDS,
    *(Kind(op, number, short, times) for op in (READ, WRITE) for number in (0, errno.EIO, errno.ENOSPC)
      for short in (1, 512) for times in (1, None)),
]  # fmt: skip


def sweep(operation: Operation, kind: Kind, of: Shape | None = None, survivors: int = 1) -> int:
    """Let each I/O go wrong in turn, until none is left. How many did."""
    for position in range(POSITIONS_MAX):
        try:
            if not one(operation, kind, position, of or operation.shape, survivors):
                return position
        except BaseException as error:
            error.add_note(f"{operation}, {kind}, I/O {position}")
            raise
    raise AssertionError("there is no end of I/O")


def one(operation: Operation, kind: Kind, position: int, of: Shape, survivors: int) -> bool:
    """Let one I/O go wrong; whether there was one."""
    scene = Scene(position, of)
    operation.before(scene)
    after = operation.after(scene, scene.live)
    fault = scene.host.fault(op=kind.op, errno=kind.number, short=kind.short, after=position, times=kind.times)
    told = None
    try:
        operation.act(scene)
    except (OSError, BlockError, ImageError) as error:
        told = error
    if told is not None or not operation.repairs:  # a repair looks again, and may find all well the next time
        _hear(kind, fault, told)
    allowed, deep = [scene.flushed, scene.live, after], survivors > 1 or position % 2 == 0
    if not operation.makes or told is None:
        for _ in range(survivors):
            _see(operation, scene, {path: scene.host.survivor(path) for path in scene.host.disk.files}, allowed, deep)
    fault.remove()
    if operation.alive:
        _go_on(operation, scene, after, told is not None, not deep)
    elif told is None or operation.makes:
        if told is not None:
            operation.act(scene)  # over what is left of the first attempt
        _see(operation, scene, {path: scene.host.content(path) for path in scene.host.disk.files}, [after], deep)
    return fault.hits > 0


def _hear(kind: Kind, fault: Fault, told: Exception | None) -> None:
    """Whoever asked hears of it, and of that which it was."""
    if told is None:
        silent = not kind.number or all(op == DISCARD for op in fault.struck)  # which is a hint
        assert silent, f"nobody was told of {kind} of {fault.struck}"
        return
    assert fault.hits and kind.number, f"nothing failed, and yet: {told!r}"
    numbers, texts = [], []
    error: BaseException | None = told
    while error is not None:
        numbers.append(getattr(error, "errno", None))
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    assert kind.number in numbers or os.strerror(kind.number) in " ".join(texts), f"told {texts}, it was {kind}"


def _see(
    operation: Operation, scene: Scene, files: dict[str, bytes], allowed: list[bytes], deep: bool
) -> None:
    """What somebody finds who opens these files; ``deep``: and looks at all snapshots."""
    host = SimHost(scene.host.seed)
    for path, data in files.items():
        host.add_file(path, data)
    if operation.repairs:
        check(host, IMAGE, "all")
    found = check(host, IMAGE)
    if operation.flags and found.corruptions:
        assert sum("COPIED" in each for each in found.findings) >= found.corruptions, found.findings
        check(host, IMAGE, "all")
        found = check(host, IMAGE)
    if Header.parse(host.content(IMAGE)).incompatible & layout.DIRTY:
        check(host, IMAGE, "all")  # which is what that says
        found = check(host, IMAGE)
    assert not found.corruptions and not found.check_errors, found.findings[:5]
    opened = Disk(host, IMAGE, **backing(bool(scene.shape.get("backed"))))
    _compare(opened.content(), allowed)
    snapshots = opened.run(opened.node.snapshots.read()) if not operation.makes else []
    for each in snapshots if deep else []:
        opened.run(opened.node.snapshots.apply(each))
        expected = scene.known[each.id][1] if each.id in scene.known else scene.live
        assert opened.content() == expected, f"snapshot {each.id}"
    if operation.name != "delete a snapshot":
        assert {*scene.made.snapshots} <= {each.id for each in snapshots} or operation.makes
    opened.close()
    if deep:
        found = check(host, IMAGE)
        assert not found.corruptions and not found.check_errors, found.findings[:5]


def _compare(content: bytes, allowed: list[bytes]) -> None:
    """One of the sizes, and each byte one of those; what is cut off may be zeroes already."""
    if content in allowed:
        return
    assert len(content) in {len(each) for each in allowed}, len(content)
    shortest = min(len(each) for each in allowed)
    for at, byte in enumerate(content):
        good = any(at < len(each) and each[at] == byte for each in allowed)
        assert good or (at >= shortest and byte == 0), f"byte {at} is {byte}"


def _go_on(operation: Operation, scene: Scene, after: bytes, again: bool, deep: bool) -> None:
    """The disk is well again, and in use."""
    opened = scene.opened
    if again:
        if operation.usable:
            _compare(opened.content(), [scene.live, after])
        operation.act(scene)
    assert opened.content() == after
    opened.close()
    files = {path: scene.host.content(path) for path in scene.host.disk.files}
    _see(operation, scene, files, [after], deep)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_every_io(operation: Operation) -> None:
    counts = [sweep(operation, kind) for kind in KINDS]
    assert min(counts[:4]) >= 1, counts
    print(f"{sum(counts)} faults")


@pytest.mark.parametrize("operation", [each for each in OPERATIONS if each.name in FREEING], ids=str)
def test_every_io_while_many_clusters_are_freed(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit after every other cluster, as if a disk had many."""
    monkeypatch.setattr(Counters, "freed_max", 2)
    assert min(sweep(operation, kind) for kind in KINDS[:4]) >= 1


@pytest.mark.soak
@pytest.mark.hang_seconds(600)
@pytest.mark.parametrize("of", LONG_RUN_SHAPES, ids=str)
def test_every_io_of_every_shape(of: Shape) -> None:
    faults = 0
    for operation in OPERATIONS:
        if (operation.everywhere and _can(operation, of)) or operation.shape == of:
            faults += sum(sweep(operation, kind, of, survivors=3) for kind in LONG_RUN_KINDS)
    print(f"{faults} faults")
    assert faults > 3000


def _can(operation: Operation, of: Shape) -> bool:
    """Whether images of that shape have the operation."""
    scene = Scene(0, of)
    try:
        operation.before(scene)
        operation.act(scene)
    except (OSError, BlockError):
        return False
    return True


# -- it would find ----------------------------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]
MISTAKES: dict[str, tuple[Patch, str]] = {}


def mistake(operation: str) -> Callable[[Patch], Patch]:
    """One that shows in that operation."""

    def add(plant: Patch) -> Patch:
        MISTAKES[plant.__name__] = plant, operation
        return plant

    return add


def _swallowing(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Errors of that method end there."""
    original = getattr(owner, name)

    async def quiet(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return await original(self, *arguments, **options)
        except OSError:
            return None

    patch.setattr(owner, name, quiet)


@mistake("write into a hole")
def writes_that_fail_are_not_noticed(patch: pytest.MonkeyPatch) -> None:
    _swallowing(patch, Metadata, "write")


@mistake("write over data, FUA")
def flushes_that_fail_are_not_noticed(patch: pytest.MonkeyPatch) -> None:
    _swallowing(patch, FileNode, "co_flush")


@mistake("flush")
def a_failed_commit_is_not_told(patch: pytest.MonkeyPatch) -> None:
    _swallowing(patch, Qcow2Node, "_co_commit")


@mistake("flush")
def a_failed_commit_is_not_done_again(patch: pytest.MonkeyPatch) -> None:
    """What was to be written is forgotten when it has failed: the caller hears, and the next flush says that all is
    well."""
    original = Metadata.commit

    async def commit(self: Metadata, *, counters: bool = False) -> None:
        try:
            await original(self, counters=counters)
        except OSError:
            for table in self.l2.values():
                table.dirty.clear()
            raise

    patch.setattr(Metadata, "commit", commit)


@mistake("make it larger above a backing file")
def a_size_is_published_before_its_entries(patch: pytest.MonkeyPatch) -> None:
    """So it was: a power cut in between let the backing file's content come to light."""
    original = Metadata.commit

    async def commit(self: Metadata, *, counters: bool = False) -> None:
        if counters or self._header_dirty:  # which a commit writes before the entries
            await original(self, counters=counters)

    patch.setattr(Metadata, "commit", commit)


@mistake("write over data")
def a_short_write_is_taken_for_a_whole_one(patch: pytest.MonkeyPatch) -> None:
    """The engine does not go on with the rest."""

    def transfer(job: Any, start: int, end: int, fault_errno: int) -> int:
        return original(job, start, end, fault_errno) if start == 0 else 0

    original = SimEngine._transfer
    patch.setattr(SimEngine, "_transfer", staticmethod(transfer))


@pytest.mark.parametrize("name", MISTAKES)
def test_it_would_find(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, shows_in = MISTAKES[name]
    operation = next(each for each in OPERATIONS if each.name == shows_in)
    made(operation.shape)  # by a driver that is whole
    plant(monkeypatch)
    for kind in KINDS:
        try:
            sweep(operation, kind)
        except (AssertionError, OSError, ImageError):
            return
    raise AssertionError("it was not found")
