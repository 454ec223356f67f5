# SPDX-License-Identifier: Apache-2.0
"""One seed, one schedule: several users and an administrator at one image at the same time, on the simulated host.

The seed decides the image, the cache, what everybody does, how long each of them thinks, how long the disk takes for
each request, and which of two requests it finishes first. ``run(seed)`` returns quietly, or raises ``Wrong`` (a read
that cannot be, tables that are not whole, a cluster that nobody uses) or whatever the driver itself noticed.

* Users write whole clusters and parts of them, compressed, zeroes, with FUA and in batches; discard; flush; read. They
  prefer the same few clusters.
* The administrator makes, applies and deletes snapshots, changes the size, changes the runtime options, forgets what is
  cached, and checks. What QEMU does in a drained section is done in one.

What the disk should contain is in ``history``; snapshots contain what the disk did at their moment. In the end, and
after the image was closed and opened again, disk, snapshots and (if it is raw) data file are compared with that, and
the image has neither damage nor leaks.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

from bottomhalf.aio import IOThread, current, gather, move_to, sleep_ns, suspend
from bottomhalf.block.drain import co_run
from bottomhalf.block.reopen import reopen
from bottomhalf.block.resize import Preallocation, co_resize
from bottomhalf.drivers.qcow2.snapshots import Snapshot
from bottomhalf.host.request import COMPRESSED, FLUSH, FUA, IN_PROGRESS, MAY_UNMAP, READ, WRITE, Request
from bottomhalf.host.sim import Latency, Odds, SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.drivers.qcow2.bench import Disk, check, make
from tests.drivers.qcow2.history import History, Wrong

USERS: Final = 4
STEPS: Final = 7  # of each user
TASKS: Final = 6  # of the administrator
THINK_NS_MAX: Final = 400_000
CROWDED_NS_MAX: Final = 30_000
DAWDLE_NS_MAX: Final = 3_000_000
TARGETS: Final = 6  # clusters that everybody likes; three in a crowd

IMAGES: Final[list[dict[str, Any]]] = [
    {"cluster_size": 512, "size": 150 * 512},
    {"cluster_size": 512, "size": 200 * 512 - 0, "refcount_bits": 64},
    {"cluster_size": 512, "size": 130 * 512, "refcount_bits": 8},
    {"cluster_size": 512, "size": 70 * 512, "refcount_bits": 2},
    {"cluster_size": 512, "size": 70 * 512, "refcount_bits": 1},
    {"cluster_size": 512, "size": 100 * 512, "lazy_refcounts": True},
    {"cluster_size": 512, "size": 100 * 512, "backing": True},
    {"cluster_size": 512, "size": 80 * 512, "data_file": "data.raw"},
    {"cluster_size": 512, "size": 80 * 512, "data_file": "data.raw", "data_file_raw": True},
    {"cluster_size": 4096, "size": 19 * 4096 + 1024, "version": 2},
    {"cluster_size": 4096, "size": 19 * 4096 + 1024, "version": 2, "backing": True},
    {"cluster_size": 4096, "size": 25 * 4096 - 512},
    {"cluster_size": 16384, "size": 7 * 16384 + 2048, "extended_l2": True},
    {"cluster_size": 16384, "size": 6 * 16384, "extended_l2": True, "backing": True},
]
COUNTS_TOO_SMALL: Final = "more cannot be counted"


class Schedule:
    """What happens under one seed. ``tally`` counts what was done."""

    def __init__(
        self, seed: int, tally: Counter[str] | None = None, image: dict[str, Any] | None = None
    ) -> None:
        self.seed = seed
        self.tally: Counter[str] = Counter() if tally is None else tally
        self.chance = chance = random.Random(seed)
        self.crowded = chance.random() < 0.4
        self.host = SimHost(seed, **self.disks_character())
        self.image = dict(chance.choice(IMAGES) if image is None else image)
        self.backed = self.image.pop("backing", False)
        self.cluster = self.image["cluster_size"]
        self.cell = min(512, self.cluster // 8)
        size = self.image["size"] // self.cell
        content = [bytes(self.cell)] * size
        if self.backed:  # shorter than the disk, or longer
            length = self.image["size"] + chance.choice((-1, 1)) * 5 * self.cluster
            base = random.Random(f"base {seed}").randbytes(length)
            base = base[: len(base) // self.cell * self.cell]
            self.host.add_file("base.raw", base)
            found = [base[at : at + self.cell] for at in range(0, len(base), self.cell)]
            content = (found + content)[:size] if len(found) < size else found[:size]
            content += [bytes(self.cell)] * (size - len(content))
        make(self.host, "disk.qcow2", **self.image)
        self.external = "data_file" in self.image
        self.raw = self.image.get("data_file_raw", False)
        if self.crowded or chance.random() < 0.4:
            for path in self.host.disk.files:
                self.host.set_cached(path, "never")
        self.history = History(content, size + 100 * self.cluster // self.cell)
        self.sizes = [size]  # all that it had, in cells
        self.kept: dict[str, tuple[Snapshot, list[bytes], bytes | None]] = {}
        self.passes_discards = chance.random() < 0.5
        self.numbers = 0
        self.cut_in_use = False  # made smaller while there were requests on their way
        targets = 3 if self.crowded else TARGETS
        self.targets = [chance.randrange(size * self.cell // self.cluster) for _ in range(targets)]
        self.disk = Disk(self.host, "disk.qcow2", **self.options())
        self.thread: IOThread | None = None

    def disks_character(self) -> dict[str, Any]:
        """In a crowd disks are quick, but for some requests (see dawdle())."""
        if not self.crowded:
            return {}
        latency = Latency()
        latency.ranges_ns.update({READ: (5_000, 20_000), WRITE: (5_000, 20_000), FLUSH: (5_000, 20_000)})
        return {"latency": latency, "odds": Odds(slow=0.0)}

    def dawdle(self, op: int) -> None:
        """Let the disk take its time for the next request of that kind, and many others overtake it: the cluster may be
        discarded, given to somebody else, and written by him meanwhile."""
        if self.crowded and self.chance.random() < 0.5:
            self.host.fault(op=op, delay_ns=self.chance.randrange(DAWDLE_NS_MAX), times=1)

    def options(self) -> dict[str, Any]:
        """Some runtime options; those that decide what a discard does stay."""
        chance = self.chance
        options: dict[str, Any] = {"pass-discard-request": self.passes_discards}
        if chance.random() < 0.6:
            options["l2-cache-size"] = 2 * self.cluster
        if chance.random() < 0.4:
            options["refcount-cache-size"] = 4 * self.cluster
        if self.image.get("version") != 2:
            options["lazy-refcounts"] = chance.random() < 0.3
            options["discard-no-unref"] = chance.random() < 0.2
        if chance.random() < 0.3:
            options["overlap-check"] = "all"
        if chance.random() < 0.3:
            options["pass-discard-other"] = True
        if self.backed:
            base = {"driver": "file", "filename": "base.raw"}
            options["backing"] = {"driver": "raw", "file": base, "read-only": True}
        return options

    # -- what is written ----------------------------------------------------------------------------------------

    def fresh(self, count: int) -> list[bytes]:
        """Values that nobody has written before; every third time such as do not become smaller."""
        self.numbers += 1
        if self.numbers % 3:
            return [self.numbers.to_bytes(2, "big") * (self.cell // 2)] * count
        noise = random.Random(f"{self.seed} {self.numbers}")
        return [noise.randbytes(self.cell) for _ in range(count)]

    def place(self) -> tuple[int, int]:
        """A range in cells."""
        chance, per_cluster, size = self.chance, self.cluster // self.cell, self.history.size
        if chance.random() < 0.7:
            first = chance.choice(self.targets) * per_cluster
        else:
            first = chance.randrange(size)
        first = min(first, size - 1)
        count = chance.choice((1, 2, per_cluster // 2, per_cluster, per_cluster, 2 * per_cluster, 5 * per_cluster))
        if self.crowded and chance.random() < 0.7:
            count = per_cluster
        elif chance.random() < 0.4:
            first += chance.randrange(per_cluster)
        first = min(first, size - 1)
        return first, min(count, size - first)

    def clusters_of(self, first: int, count: int) -> tuple[int, int]:
        """Whole clusters about there, in cells; none: (0, 0)."""
        per_cluster = self.cluster // self.cell
        start = first // per_cluster * per_cluster
        stop = min(start + max(count // per_cluster, 1) * per_cluster, self.history.size // per_cluster * per_cluster)
        return (start, stop - start) if stop > start else (0, 0)

    # -- users --------------------------------------------------------------------------------------------------

    async def use(self) -> None:
        for _ in range(STEPS * 2 if self.crowded else STEPS):
            if self.chance.random() < 0.5:
                await sleep_ns(self.chance.randrange(CROWDED_NS_MAX if self.crowded else THINK_NS_MAX))
            what = self.chance.choices(
                ("write", "squeeze", "zero", "discard", "read", "flush", "batch"),
                (10, 1, 3, 6, 4, 7, 2) if self.crowded else (10, 2, 3, 3, 6, 2, 3),
            )[0]
            await getattr(self, f"do_{what}")(*self.place())
            self.tally[what] += 1

    async def _change(
        self,
        first: int,
        values: list[bytes],
        body: Awaitable[Any],
        *,
        weak: list[bytes] | None = None,
        asked: tuple[int, int] | None = None,
    ) -> None:
        """Do something that leaves these values; and behind them, if it likes, those that are weak. ``asked`` is the
        range, if it is another one."""
        sizes = len(self.sizes) - 1
        changes = [self.history.begin(first, values)]
        if weak:
            changes.append(self.history.begin(first + len(values), weak, weak=True))
        first, count = asked or (first, len(values))
        try:
            await body
        except OSError as error:
            self.check_refusal(error, first, count, sizes)
            for change in changes:
                self.history.fail(change)
        else:
            for change in changes:
                self.history.end(change)

    def check_refusal(self, error: OSError, first: int, count: int, sizes: int) -> None:
        """Only what does not lie in the disk any more may fail."""
        if error.errno != errno.EIO or first + count <= min(self.sizes[sizes:]):
            raise Wrong(f"cells {first} to {first + count}: {error!r}") from error
        self.tally["refused"] += 1

    async def do_write(self, first: int, count: int) -> None:
        values = self.fresh(count)
        flags = FUA if self.chance.random() < 0.15 else 0
        self.dawdle(WRITE)
        await self._change(first, values, self.disk.backend.co_pwrite(first * self.cell, b"".join(values), flags))

    async def do_squeeze(self, first: int, count: int) -> None:
        first, count = self.clusters_of(first, count)
        if not count or self.external:
            return
        values = self.fresh(count)
        body = self.disk.backend.co_pwrite(first * self.cell, b"".join(values), COMPRESSED)
        await self._change(first, values, body)

    async def do_zero(self, first: int, count: int) -> None:
        flags = self.chance.choice((0, MAY_UNMAP, FUA))
        body = self.disk.backend.co_write_zeroes(first * self.cell, count * self.cell, flags)
        await self._change(first, [self.history.zero] * count, body)

    async def do_discard(self, first: int, count: int) -> None:
        """Whole clusters become zeroes; what is less stays, but for the disk's end, of which the disk says itself
        whether it is less."""
        per_cluster = self.cluster // self.cell
        body = self.disk.backend.co_discard(first * self.cell, count * self.cell)
        start = -(-first // per_cluster) * per_cluster
        stop = (first + count) // per_cluster * per_cluster
        done = not (self.backed and self.image.get("version") == 2) and not (self.raw and not self.passes_discards)
        zero, end = self.history.zero, first + count
        if not done:
            start = stop = end
        weak = [zero] * (end - stop) if done and end == self.history.size and start <= stop else None
        await self._change(start, [zero] * max(stop - start, 0), body, weak=weak, asked=(first, count))

    async def do_flush(self, first: int, count: int) -> None:
        await self.disk.backend.co_flush()

    async def do_read(self, first: int, count: int) -> None:
        reading, sizes = self.history.begin_read(first, count), len(self.sizes) - 1
        self.dawdle(READ)
        try:
            data = await self.disk.backend.co_pread(first * self.cell, count * self.cell)
        except OSError as error:
            self.check_refusal(error, first, count, sizes)
            self.history.drop_read(reading)
        else:
            self.history.end_read(reading, data)

    async def do_batch(self, first: int, count: int) -> None:
        """Several writes that travel as one list, side by side or apart; each is done when its owner is told."""
        sizes, parts = len(self.sizes) - 1, []
        at = first
        while at < first + count:
            length = min(self.chance.randrange(1, self.cluster // self.cell + 1), first + count - at)
            parts.append((at, self.fresh(length)))
            at += length + self.chance.choice((0, 0, 3))
        me, left, context = current(), len(parts), current().context

        def told(requests: list[Request]) -> None:
            nonlocal left
            left -= len(requests)
            if not left:
                context.wake(me)

        backend = self.disk.backend
        queue = backend.queue(told)
        requests = []
        for at, values in parts:
            data = bytearray(b"".join(values))
            requests.append(Request(WRITE, at * self.cell, len(data), memoryview(data)))
            requests[-1].owner = queue
        changes = [self.history.begin(at, values) for at, values in parts]
        await move_to(backend.context)
        context = current().context
        pending = queue.submit(requests)
        left -= len(requests) - len(pending)
        if pending:
            await suspend("a batch")
        await move_to(self.disk.context)
        for request, change, (at, values) in zip(requests, changes, parts, strict=True):
            assert request.result != IN_PROGRESS
            if request.result:
                self.check_refusal(OSError(-request.result, "refused"), at, len(values), sizes)
                self.history.fail(change)
            else:
                self.history.end(change)

    # -- the administrator --------------------------------------------------------------------------------------

    async def administer(self) -> None:
        for _ in range(TASKS):
            await sleep_ns(self.chance.randrange(THINK_NS_MAX * 3))
            what = self.chance.choices(
                ("create", "apply", "delete", "resize", "reopen", "forget", "check"), (5, 3, 2, 4, 2, 1, 1)
            )[0]
            if await getattr(self, f"do_{what}")() is not False:
                self.tally[what] += 1

    async def drained(self, body: Callable[[], Awaitable[None]]) -> None:
        """In a drained section, in the node's thread."""
        async with self.disk.graph.co_drained(self.disk.node):
            await self.at_home(body)

    async def at_home(self, body: Callable[[], Awaitable[None]]) -> None:
        await move_to(self.disk.node.context)
        try:
            await body()
        finally:
            await move_to(self.disk.context)

    async def whole(self) -> bytearray:
        """What the disk is, in a drained section."""
        buffer = bytearray(self.disk.node.size)
        await self.disk.node.co_pread(0, memoryview(buffer))
        return buffer

    async def do_create(self) -> bool:
        if self.external:
            return False
        made = False

        async def body() -> None:
            nonlocal made
            node, state = self.disk.node, None
            if self.chance.random() < 0.3:
                state = random.Random(self.numbers).randbytes(self.chance.randrange(1, 3 * self.cluster))
                await node.co_save_vmstate(0, memoryview(state))
            try:
                snapshot = await node.snapshots.create("s", date_ns=0, vm_state_bytes=len(state or b""))
            except OSError as error:
                if error.errno != errno.EINVAL or COUNTS_TOO_SMALL not in str(error):
                    raise
                self.tally["too many"] += 1
                return
            made = True
            self.kept[snapshot.id] = snapshot, self.history.see(0, await self.whole(), "a snapshot"), state

        await self.drained(body)
        return made

    async def do_apply(self) -> bool:
        if not self.kept:
            return False
        snapshot, content, state = self.kept[self.chance.choice(list(self.kept))]
        applied = False

        async def body() -> None:
            nonlocal applied
            node, history = self.disk.node, self.history
            values = content + [history.zero] * (len(history) - len(content))
            change = history.begin(0, values)
            try:
                await node.snapshots.apply(snapshot)
            except OSError as error:
                if error.errno != errno.EINVAL or COUNTS_TOO_SMALL not in str(error):
                    raise
                history.fail(change)
                self.tally["too many"] += 1
                return
            applied = True
            history.end(change)
            history.size = len(content)
            self.sizes.append(history.size)
            self.compare(bytes(await self.whole()), content, "a snapshot that was applied")
            if state is not None:
                found = bytearray(len(state))
                await node.co_load_vmstate(0, memoryview(found))
                if found != state:
                    raise Wrong("the machine's state is another one")

        await self.drained(body)
        return applied

    @staticmethod
    def compare(found: bytes, content: list[bytes], what: str) -> None:
        if found != b"".join(content):
            cell = len(content[0]) if content else 1
            where = [n for n, value in enumerate(content) if found[n * cell : (n + 1) * cell] != value]
            raise Wrong(f"{what}: {len(found)} bytes for {len(content)} cells, others in {where[:10]}")

    async def do_delete(self) -> bool:
        if not self.kept:
            return False
        id = self.chance.choice(list(self.kept))
        snapshot = self.kept.pop(id)[0]
        await self.drained(lambda: self.disk.node.snapshots.delete(snapshot))
        return True

    async def do_resize(self) -> bool:
        chance, history = self.chance, self.history
        step = max(512 // self.cell, 1)
        size = chance.choice((chance.randrange(1, len(history)), history.size + chance.randrange(-30, 30)))
        size = min(max(size // step * step, step), len(history))
        mode = chance.choice(("off", "off", "metadata", "falloc", "full")) if size > history.size else "off"
        if self.backed and not self.image.get("extended_l2"):
            mode = "off"
        resized = False

        async def body() -> None:
            nonlocal resized
            old = history.size
            low, high = min(old, size), len(history)
            change = history.begin(low, [history.zero] * (high - low))
            history.size = low
            self.sizes.append(low)
            try:
                if alone:
                    await co_resize(self.disk.node, size * self.cell, Preallocation(mode))
                else:
                    await self.disk.backend.co_truncate(size * self.cell, Preallocation(mode))
            except OSError as error:
                if error.errno != errno.ENOTSUP or self.image.get("version") != 2:
                    raise
                history.fail(change)
                history.size = old
            else:
                resized = True
                history.end(change)
                history.size = size
            self.sizes.append(history.size)

        alone = chance.random() < 0.5
        self.cut_in_use |= size < history.size and not alone
        await (self.drained(body) if alone else body())
        return resized

    async def do_reopen(self) -> None:
        disk = self.disk
        given = {
            "driver": "qcow2",
            "node-name": "disk",
            "discard": "unmap",
            "file": disk.node.file.name,
            **self.options(),
        }
        if self.external:
            given["data-file"] = disk.node.data.name
        if self.backed:
            assert disk.node.backing is not None
            given["backing"] = disk.node.backing.name
        options = from_json(BlockdevOptions, given)
        if disk.node.metadata.is_marked_dirty:
            self.tally["reopened with counters to be written"] += 1
        await co_run(disk.graph, lambda: reopen(disk.graph, {disk.node: options}), "reopen")

    async def do_forget(self) -> None:
        async def body() -> None:
            self.disk.node.metadata.drop_unused(self.disk.node.metadata.tick + 1)

        await self.at_home(body)

    async def do_check(self) -> None:
        async def body() -> None:
            found = await self.disk.node.co_check()
            if found.corruptions or found.check_errors:
                raise Wrong(f"while it is used: {found.findings[:5]}")

        await self.at_home(body)

    # -- from begin to end --------------------------------------------------------------------------------------

    def play(self) -> None:
        disk = self.disk
        if self.chance.random() < 0.06:
            self.tally["in an iothread"] += 1
            self.thread = IOThread("io0", self.host)
            disk.graph.move(disk.node, self.thread.context)

        async def everybody() -> None:
            await gather(*(self.use() for _ in range(USERS)), self.administer())

        disk.run(everybody())
        content = self.read_all("in the end")
        disk.close()
        if self.thread is not None:
            self.thread.stop()
        self.see_tables()
        if self.raw:
            found = self.host.content("data.raw")
            if self.cut_in_use:  # what arrives late makes the file longer, until the disk grows
                found = found[: len(content) * self.cell]
            self.compare(found, content, "the data file by itself")
        self.see_again(content)
        self.see_tables()

    def read_all(self, what: str) -> list[bytes]:
        """The disk's content, which is one of those that may be."""
        reading = self.history.begin_read(0, self.history.size)
        if self.disk.size != self.history.size * self.cell:
            raise Wrong(f"{what}: the disk has {self.disk.size} bytes, not {self.history.size * self.cell}")
        data = self.disk.content()
        self.history.end_read(reading, data)
        return [data[at : at + self.cell] for at in range(0, len(data), self.cell)]

    def see_tables(self) -> None:
        found = check(self.host, "disk.qcow2")
        if found.corruptions or found.leaks or found.check_errors:
            raise Wrong(f"{found.findings[:5]}")

    def see_again(self, content: list[bytes]) -> None:
        """Opened again: the disk, and each of the snapshots, which then go."""
        disk = self.disk = Disk(self.host, "disk.qcow2", **self.options())
        self.compare(disk.content(), content, "opened again")
        known = disk.run(disk.node.snapshots.read())
        if known != [snapshot for snapshot, _, _ in self.kept.values()]:
            raise Wrong(f"snapshots: {known}")
        for snapshot, kept, _ in self.kept.values():
            with suppress_too_many():
                disk.run(disk.node.snapshots.apply(snapshot))
                self.compare(disk.content(), kept, f"snapshot {snapshot.id} in the end")
        for snapshot, _, _ in self.kept.values():
            disk.run(disk.node.snapshots.delete(snapshot))
        disk.close()

    def abandon(self) -> None:
        """After a failure: threads end where they stand."""
        with suppress(Exception):
            self.host.end_threads()


class suppress_too_many(suppress):  # it is used as contextlib's
    """Counters that are too small for one reference more."""

    def __init__(self) -> None:
        super().__init__(OSError)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return isinstance(error, OSError) and COUNTS_TOO_SMALL in str(error)


def run(seed: int, tally: Counter[str] | None = None, image: dict[str, Any] | None = None) -> None:
    """Play the schedule of a seed, with the image that it chooses or a given one."""
    schedule = Schedule(seed, tally, image)
    try:
        schedule.play()
    except BaseException:
        schedule.abandon()
        raise
