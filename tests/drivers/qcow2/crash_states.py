# SPDX-License-Identifier: Apache-2.0
"""All states of an image that a power cut may leave while operations run, opened one by one.

``Explorer`` runs a sequence of operations on the simulated disk. Before anything becomes durable, after each operation
and at the end it enumerates what a power cut would leave (``SimHost.survivors``) and opens that: check finds leaks at
most, what was flushed is there, snapshots are what they were, and the image can be written. States with equal bytes are
opened once; whether they may be is asked each time, for that depends on what was promised by then.

    explorer = Explorer(GEOMETRIES["small"], OPERATIONS, PREPARATIONS)
    explorer.run(("allocate", "discard"))
    print(len(explorer.states))
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bottomhalf.block import BlockBackend, ImageError
from bottomhalf.drivers.qcow2 import layout
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.snapshots import Snapshot
from bottomhalf.drivers.qcow2.snapshotting import Snapshots
from bottomhalf.host.sim import Odds, SimHost
from bottomhalf.host.sim.survivors import CrashState
from tests.drivers.qcow2.bench import Disk, check, make

IMAGE: Final = "disk.qcow2"
DATA: Final = "data.raw"
BACKING: Final = "backing.raw"
CHUNK: Final = 512
MARK: Final = b"!"  # what is written to each state that was opened


class Ledger:
    """What a disk may be after a power cut: as it was at the last flush, or anything that was put there since; byte by
    byte. And its size, and its snapshots.

    Everything behind the end of the disk is zeroes."""

    def __init__(self, content: bytes, known: dict[str, bytes]) -> None:
        self.size = len(content)
        room = 2 * self.size + (64 << 10)
        self.sizes = {self.size}
        self.now = bytearray(content.ljust(room, b"\0"))
        self.flushed = bytearray(self.now)
        self.since: list[tuple[int, bytes]] = []
        self.snapshots = known  # that may be there
        self.sure = set(known)  # that have to be
        self.deleted: set[str] = set()
        self.is_lost = False  # a flush has failed: what was written before may be lost although the next one succeeds

    def may_put(self, offset: int, data: bytes) -> None:
        """It is on its way."""
        self.since.append((offset, bytes(data)))

    def put(self, offset: int, data: bytes) -> None:
        """It is there."""
        self.now[offset : offset + len(data)] = data
        self.since.append((offset, bytes(data)))

    def put_for_good(self, offset: int, data: bytes) -> None:
        """It is there, and durable by itself."""
        end = offset + len(data)
        self.now[offset:end] = self.flushed[offset:end] = data
        older, self.since = self.since, []
        for start, other in older:
            head, tail = other[: max(offset - start, 0)], other[max(end - start, 0) :]
            self.since += [(where, part) for where, part in ((start, head), (max(start, end), tail)) if part]

    def flush(self) -> None:
        self.flushed[:] = self.now
        self.since = []
        self.sizes = {self.size}
        for id in self.deleted:
            self.snapshots.pop(id, None)
        self.deleted.clear()
        self.sure = set(self.snapshots)

    def complaint(self, found: Found) -> str:
        """What is wrong with a disk that was found like this; empty: nothing."""
        if found.size not in self.sizes:
            return f"the disk has {found.size} bytes, not {self.sizes}"
        if missing := self.sure - found.snapshots.keys():
            return f"snapshots {missing} are lost"
        for id, packed in found.snapshots.items():
            if id not in self.snapshots:
                return f"snapshot {id} was deleted"
            if zlib.decompress(packed) != self.snapshots[id]:
                return f"snapshot {id} has other content"
        content = b"" if self.is_lost else found.content
        for start in range(0, len(content), CHUNK):
            part = content[start : start + CHUNK]
            if part != self.flushed[start : start + len(part)] and (wrong := self._wrong_byte(start, part)) >= 0:
                return f"byte {start + wrong:#x} of the disk is {part[wrong]:#x}, which it never was since the flush"
        return ""

    def _wrong_byte(self, start: int, part: bytes) -> int:
        """The first byte that cannot be, -1 for none. Nearly always one write explains all of the part."""
        base = self.flushed[start : start + len(part)]
        for offset, data in self.since:
            if offset < start + len(part) and offset + len(data) > start:
                one = bytearray(base)
                first, stop = max(offset - start, 0), min(offset + len(data) - start, len(part))
                one[first:stop] = data[start + first - offset : start + stop - offset]
                if one == part:
                    return -1
        allowed = [{byte} for byte in self.flushed[start : start + len(part)]]
        for offset, data in self.since:
            for n in range(max(start, offset), min(start + len(part), offset + len(data))):
                allowed[n - start].add(data[n - offset])
        return next((n for n, byte in enumerate(part) if byte not in allowed[n]), -1)


@dataclass(frozen=True)
class Found:
    """What a state is when it is opened."""

    size: int
    packed: bytes  # there are tens of thousands
    snapshots: dict[str, bytes]  # packed, too

    @property
    def content(self) -> bytes:
        return zlib.decompress(self.packed)


@dataclass(frozen=True)
class Geometry:
    """An image to begin with. ``options`` are the node's; ``prepare`` names operations that are done before."""

    create: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    prepare: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()  # operations that cannot be here
    backing: bytes = b""


class Explorer:
    """Runs operations on images of one geometry. ``states``: digests of all that were opened."""

    def __init__(
        self,
        geometry: Geometry,
        operations: Mapping[str, Callable[[Explorer], None]],
        preparations: Mapping[str, Callable[[Explorer], None]],
        *,
        reorder: int = 3,
    ) -> None:
        self.geometry = geometry
        self.operations = operations
        self._preparations = preparations
        self.reorder = reorder
        self.states: set[bytes] = set()
        self.counts: Counter[str] = Counter()
        self._found: dict[bytes, Found] = {}
        self.host = SimHost(0)
        self._noted: list[CrashState] = []
        self.disk: Disk
        self.ledger: Ledger
        self.step = 0
        self.current = ""
        self._sequence = ""
        self.last_image = b""  # after the sequence
        self.files, self.ledger_at_start = self._prepare()

    # -- running ------------------------------------------------------------------------------------------------

    def _prepare(self) -> tuple[dict[str, bytes], tuple[bytes, dict[str, bytes]]]:
        geometry = self.geometry
        host = SimHost(0, odds=Odds.calm())
        if geometry.backing:
            host.add_file(BACKING, geometry.backing)
        make(host, IMAGE, **geometry.create)
        self.disk = Disk(host, IMAGE, **self._options())
        content = self.disk.content()
        self.ledger = Ledger(content, {})
        for name in geometry.prepare:
            self.step += 1
            {**self.operations, **self._preparations}[name](self)
        self.disk.run(self.disk.backend.co_flush())
        self.ledger.flush()
        self.disk.close()
        files = {path: host.content(path) for path in host.disk.files}
        # As short as QEMU makes it, so that a growing disk needs another one.
        entries = -(-self.ledger.size >> self.disk.node.mapping.l1_shift)
        files[IMAGE] = files[IMAGE][:36] + entries.to_bytes(4, "big") + files[IMAGE][40:]
        return files, (bytes(self.ledger.now[: self.ledger.size]), dict(self.ledger.snapshots))

    def _options(self) -> dict[str, Any]:
        given = dict(self.geometry.options)
        if self.geometry.backing:
            given["backing"] = {"driver": "file", "filename": BACKING, "read-only": True}
        return given

    def begin(self, seed: int = 0) -> None:
        """Open the image on a new host; from now on all moments are noted at which something becomes durable."""
        self._sequence = f"seed {seed}"
        self.host = host = SimHost(seed)
        for path, content in self.files.items():
            host.add_file(path, content)
        content, known = self.ledger_at_start
        self.ledger = Ledger(content, dict(known))
        self.disk = Disk(host, IMAGE, **self._options())
        self.step = 0
        self._noted = []
        host.before_durable = self._note

    def run(self, names: Sequence[str], seed: int = 0) -> None:
        """The operations, then a flush, with all states on the way; then a clean end. AssertionError."""
        self.begin(seed)
        self._sequence = f"{' '.join(names)} (seed {seed})"
        for self.step, self.current in enumerate([*names, "flush"], 1):
            self.operations[self.current](self)
            self.look()
        self.end()
        self.counts["sequences"] += 1

    def end(self) -> None:
        """The image is closed as it should be, and clean."""
        self.host.before_durable = None
        assert self.disk.content() == self.ledger.now[: self.ledger.size]
        self.disk.close()
        found = check(self.host, IMAGE)
        assert not found.corruptions and not found.leaks, found.findings
        self.last_image = self.host.content(IMAGE)

    def guess(self, is_lost: bool) -> None:
        """An operation has failed: it was done, in part, or not at all. What the disk shows is what there is now, and
        with ``is_lost`` (a flush failed) not what it will show."""
        self.ledger.is_lost = is_lost
        self.look()
        ledger, content = self.ledger, self.disk.content()
        ledger.size = len(content)
        ledger.sizes.add(ledger.size)
        ledger.put(0, content.ljust(len(ledger.now), b"\0"))
        known = {each.id for each in self.disk.run(self.disk.node.snapshots.read())}
        ledger.deleted = ledger.snapshots.keys() - known
        ledger.sure &= known

    # -- for operations -----------------------------------------------------------------------------------------

    @property
    def cluster(self) -> int:
        return self.disk.node.mapping.cluster_size

    @property
    def growth(self) -> int:
        """Bytes by which the disk becomes larger or smaller: it takes an L1 entry more, but where tables are large."""
        return min(1 << self.disk.node.mapping.l1_shift, 64 << 10)

    def do(self, body: Callable[[BlockBackend], Any]) -> None:
        """Run one call of the disk's user to its end, and open the states of all moments on the way. What it may have
        done is in the ledger before; what it has done is noted afterwards."""
        self.disk.run(body(self.disk.backend))
        self.look()

    def run_on_snapshots(self, body: Callable[[Snapshots], Any]) -> None:
        self.disk.run(body(self.disk.node.snapshots))
        self.look()

    async def with_snapshot(self, known: Snapshots, id: str, body: Callable[[Snapshot], Any]) -> None:
        await body(next(each for each in await known.read() if each.id == id))

    # -- looking ------------------------------------------------------------------------------------------------

    def _note(self) -> None:
        """Something is about to become durable, perhaps in the midst of a coroutine: open it later."""
        for state in self._survivors():
            if state.digest in self._found:
                state.files = {}  # its bytes are not needed again
            self._noted.append(state)

    def _survivors(self) -> Iterator[CrashState]:
        paths = [path for path in (IMAGE, DATA) if path in self.host.disk.files]
        return self.host.survivors(*paths, reorder=self.reorder)

    def look(self) -> None:
        """Open all that a power cut now would leave, or would have left at one of the moments that were noted."""
        if self.host.before_durable is None:
            return  # it is being prepared
        noted, self._noted = self._noted, []
        for state in itertools.chain(noted, self._survivors()):
            self.counts["seen"] += 1
            found = self._found.get(state.digest)
            if found is None:
                try:
                    found = self._found[state.digest] = self._open(state.files)
                except (AssertionError, OSError, ImageError) as error:
                    raise AssertionError(f"{type(error).__name__}: {error}\n{self._where(state)}") from error
                self.states.add(state.digest)
            complaint = self.ledger.complaint(found)
            assert not complaint, f"{complaint}\n{self._where(state)}"

    def _where(self, state: CrashState) -> str:
        where = f"in operation {self.step} ({self.current}) of {self._sequence}"
        return f"{where}; what the disk made of the writes:\n{state}"

    def _open(self, files: dict[str, bytes]) -> Found:
        """Open what is left, and write to it. AssertionError for what must not be."""
        host = SimHost(0, odds=Odds.calm())
        for path, content in files.items():
            host.add_file(path, content, cached="always")
        if self.geometry.backing:
            host.add_file(BACKING, self.geometry.backing, cached="always")
        dirty = Header.parse(files[IMAGE]).incompatible & layout.DIRTY
        result = check(host, IMAGE)
        assert not result.check_errors, result.findings
        if dirty:  # counters are late: that is what it says
            assert all("refcount=" in text for text in result.findings), result.findings
            check(host, IMAGE, "all")
            result = check(host, IMAGE)
            assert not result.leaks, result.findings
        assert not result.corruptions, result.findings
        disk = self._disk_of(host)
        content, size = disk.content(), disk.size
        listed = disk.run(disk.node.snapshots.read())
        known = {each.id: zlib.compress(self._content_of(files[IMAGE], each), 1) for each in listed}
        again = bytearray(content)
        for offset in (0, size // 2 // CHUNK * CHUNK, size - 1):
            disk.run(disk.backend.co_pwrite(offset, MARK))
            again[offset : offset + len(MARK)] = MARK
        assert disk.content() == again, "what was written is not there, or something else is"
        disk.close()
        result = check(host, IMAGE)
        assert not result.corruptions and not result.check_errors, result.findings
        return Found(size, zlib.compress(content, 1), known)

    def _disk_of(self, host: SimHost, **options: Any) -> Disk:
        """A state that is opened. It unpacks where it stands: a thread for that takes longer than all the rest."""

        async def call(function: Callable[..., Any], *given: Any) -> Any:
            return function(*given)

        disk = Disk(host, IMAGE, **self._options(), **options)
        disk.context.thread_pool.call = call  # type: ignore[method-assign]
        return disk

    def _content_of(self, image: bytes, snapshot: Snapshot) -> bytes:
        """What a snapshot has: that of the disk whose L1 table is the snapshot's."""
        view = bytearray(image)
        struct.pack_into(">Q", view, 24, snapshot.disk_bytes)
        struct.pack_into(">IQ", view, 36, snapshot.l1_size, snapshot.l1_offset)
        host = SimHost(0, odds=Odds.calm())
        host.add_file(IMAGE, bytes(view), cached="always")
        if self.geometry.backing:
            host.add_file(BACKING, self.geometry.backing, cached="always")
        disk = self._disk_of(host, **{"read-only": True})
        try:
            return disk.content()
        finally:
            disk.close()


# Digests of the states that were opened, by geometry, for whoever prints their number.
EXPLORED: Final[dict[str, set[bytes]]] = {}
