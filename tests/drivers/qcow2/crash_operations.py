# SPDX-License-Identifier: Apache-2.0
"""What is done to a disk while its power may go: each operation on the disk and on its ledger.

Clusters 0 to 2 of the guest's are in use after ``fill``, 3 is compressed where that can be, those from 4 on are free,
and the last one is where an L2 table is missing, if the disk has more than one. What an operation writes says by its
bytes which operation of the sequence it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from bottomhalf.aio import gather
from bottomhalf.block import BlockBackend
from bottomhalf.host.request import COMPRESSED, FUA, MAY_UNMAP
from tests.drivers.qcow2.crash_states import Explorer, Ledger

BITS: Final = 0x11  # so much differ the bytes of one operation from the next one's


def _data(explorer: Explorer, length: int) -> bytes:
    return bytes([(0x20 + BITS * explorer.step) & 0xFF]) * length


def _write(offset: int, length: int, flags: int = 0) -> Callable[[Explorer], None]:
    """A write; offset and length in parts of a cluster, 16 to one, from the end if negative."""

    def write(explorer: Explorer) -> None:
        ledger, unit = explorer.ledger, explorer.cluster // 16
        size = length * unit
        start = offset * unit if offset >= 0 else ledger.size + offset * unit
        size = min(size, ledger.size - start)
        if start < 0 or size <= 0:
            return  # the disk is too small by now
        if flags & COMPRESSED:
            size = -(-size // explorer.cluster) * explorer.cluster
        data = _data(explorer, size)
        ledger.may_put(start, data)
        explorer.do(lambda backend: backend.co_pwrite(start, data, flags))
        if flags & FUA:
            ledger.put_for_good(start, data)
        else:
            ledger.put(start, data)

    return write


def _clear(offset: int, length: int, *, discard: bool = False, flags: int = 0) -> Callable[[Explorer], None]:
    """Zeroes or a discard; offset and length in parts of a cluster, 16 to one."""

    def clear(explorer: Explorer) -> None:
        ledger, unit = explorer.ledger, explorer.cluster // 16
        start, size = offset * unit, min(length * unit, ledger.size - offset * unit)
        if size <= 0:
            return
        ledger.may_put(start, bytes(size))
        if discard:
            before = bytes(ledger.now[start : start + size])
            explorer.do(lambda backend: backend.co_discard(start, size))
            left = bytes(explorer.disk.run(explorer.disk.backend.co_pread(start, size)))
            assert all(new in (old, 0) for new, old in zip(left, before, strict=True))
            ledger.put(start, left)
        else:
            explorer.do(lambda backend: backend.co_write_zeroes(start, size, flags))
            ledger.put(start, bytes(size))

    return clear


def _flush(explorer: Explorer) -> None:
    explorer.do(lambda backend: backend.co_flush())
    explorer.ledger.flush()


def _fill(explorer: Explorer) -> None:
    """What a sequence begins with."""
    _write(0, 3 * 16)(explorer)
    if explorer.disk.node.can_compress:
        explorer.step += 1
        _write(3 * 16, 16, COMPRESSED)(explorer)


def _snapshot(explorer: Explorer) -> None:
    ledger = explorer.ledger
    id = str(max([int(each) for each in ledger.snapshots], default=0) + 1)
    ledger.snapshots[id] = bytes(ledger.now[: ledger.size])
    explorer.run_on_snapshots(lambda snapshots: snapshots.create("s", id=id, date_ns=0))
    ledger.sure.add(id)


def _some_snapshot(ledger: Ledger) -> str | None:
    return min((id for id in ledger.snapshots if id not in ledger.deleted), default=None)


def _revert(explorer: Explorer) -> None:
    """To the oldest snapshot."""
    ledger = explorer.ledger
    id = _some_snapshot(ledger)
    if id is not None:
        content = ledger.snapshots[id]
        ledger.sizes.add(len(content))
        ledger.may_put(0, content.ljust(len(ledger.now), b"\0"))
        explorer.run_on_snapshots(lambda snapshots: explorer.with_snapshot(snapshots, id, snapshots.apply))
        ledger.size = len(content)
        ledger.put(0, content.ljust(len(ledger.now), b"\0"))


def _forget(explorer: Explorer) -> None:
    """Delete the oldest snapshot."""
    ledger = explorer.ledger
    id = _some_snapshot(ledger)
    if id is not None:
        ledger.sure.discard(id)
        ledger.deleted.add(id)
        explorer.run_on_snapshots(lambda snapshots: explorer.with_snapshot(snapshots, id, snapshots.delete))


def _resize(change: Callable[[Explorer], int]) -> Callable[[Explorer], None]:
    def resize(explorer: Explorer) -> None:
        ledger, size = explorer.ledger, change(explorer)
        if explorer.disk.node.header.version == 2 and ledger.snapshots.keys() - ledger.deleted:
            return  # that is refused
        ledger.sizes.add(size)
        if size < ledger.size:
            ledger.may_put(size, bytes(ledger.size - size))
        explorer.do(lambda backend: backend.co_truncate(size))
        if size < ledger.size:
            ledger.put(size, bytes(ledger.size - size))
        ledger.size = size

    return resize


def _each_table(explorer: Explorer) -> None:
    """A few bytes below each L2 table: with a small cache, tables are written in between."""
    covered = 1 << explorer.disk.node.mapping.l1_shift
    for start in range(5 * explorer.cluster, explorer.ledger.size, covered):
        data = _data(explorer, 99)
        explorer.ledger.may_put(start, data)
        explorer.do(lambda backend, start=start, data=data: backend.co_pwrite(start, data))
        explorer.ledger.put(start, data)


def _beside(explorer: Explorer) -> None:
    """Writes that allocate and that do not, a discard and a flush, all at once."""
    ledger, cluster = explorer.ledger, explorer.cluster
    if ledger.size < 6 * cluster:
        return  # the disk is too small by now
    data = _data(explorer, cluster)
    for at in (0, 4, 5):
        ledger.may_put(at * cluster, data)
    ledger.may_put(2 * cluster, bytes(cluster // 2))
    before = bytes(ledger.now)

    async def all_of_it(backend: BlockBackend) -> None:
        await gather(
            backend.co_pwrite(0, data),
            backend.co_pwrite(4 * cluster, data),
            backend.co_flush(),
            backend.co_write_zeroes(2 * cluster, cluster // 2, MAY_UNMAP),
            backend.co_pwrite(5 * cluster, data),
        )

    explorer.do(all_of_it)
    ledger.flushed[:] = before  # what was there before the flush began
    ledger.since = []
    for at in (0, 4, 5):
        ledger.put(at * cluster, data)
    ledger.put(2 * cluster, bytes(cluster // 2))
    ledger.sizes = {ledger.size}


def _most(explorer: Explorer) -> None:
    """All clusters from the tenth on are in use, but for the last L2 table's."""
    covered = 1 << explorer.disk.node.mapping.l1_shift
    start = 10 * explorer.cluster
    _write(start * 16 // explorer.cluster, (explorer.ledger.size - covered - start) * 16 // explorer.cluster)(explorer)


Operation = Callable[[Explorer], Any]

PREPARATIONS: Final[dict[str, Operation]] = {"fill": _fill, "most": _most}
OPERATIONS: Final[dict[str, Operation]] = {
    "allocate": _write(4 * 16, 2 * 16),
    "far": _write(-16, 16),  # below an L2 table of its own
    "into": _write(0, 2 * 16),  # what is there is written over
    "part": _write(6 * 16 + 5, 3),
    "touch": _write(16 + 5, 3),  # a part of a cluster that is there, perhaps a snapshot's too
    "cross": _write(2 * 16 + 8, 3 * 16),
    "over": _write(3 * 16 + 3, 2),  # a part of a compressed cluster
    "fua": _write(5 * 16, 16, FUA),
    "fua-into": _write(2, 3, FUA),
    "squeeze": _write(3 * 16, 2 * 16, COMPRESSED),
    "zero": _clear(0, 2 * 16 + 8),
    "unmap": _clear(16, 3 * 16, flags=MAY_UNMAP),
    "discard": _clear(0, 2 * 16, discard=True),
    "each-table": _each_table,
    "beside": _beside,
    "flush": _flush,
    "snapshot": _snapshot,
    "revert": _revert,
    "forget": _forget,
    "grow": _resize(lambda explorer: explorer.ledger.size + explorer.growth),
    "shrink": _resize(lambda explorer: max(explorer.ledger.size - explorer.growth, 5 * explorer.cluster // 1024 * 512)),
}
