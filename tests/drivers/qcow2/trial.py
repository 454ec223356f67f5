# SPDX-License-Identifier: Apache-2.0
"""What is done with a hostile image, and what must come of it.

Everything that users do: look, check, read, write, flush, discard, snapshots, sizes, amend, repair. Each of it ends
well or with an ``ImageError`` (a ``BlockError`` where the image is sound and the wish is not), and requests with an
errno that says something. Moreover:

* no file is opened but the image;
* looking, checking and reading write nothing;
* at most so many requests and bytes of the file, so much memory, so much processor time (``Limits``). The first two
  are counted, the third is what the kernel grants, the last a watchdog;
* an image that a check finds whole is a good image: what is written and read is right, and it is whole afterwards;
* a repair says the truth: the next check finds what was left, and where that is nothing the disk's content is as
  before.
"""

from __future__ import annotations

import errno
import random
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockBackend, BlockError, Graph, ImageError
from bottomhalf.drivers.qcow2.amend import AmendOptions, co_amend
from bottomhalf.drivers.qcow2.check import CheckResult, co_check
from bottomhalf.drivers.qcow2.encryption import co_open_cipher
from bottomhalf.drivers.qcow2.findings import FINDINGS_MAX
from bottomhalf.drivers.qcow2.node import Qcow2Node, co_read_header
from bottomhalf.drivers.registry import open_node
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE
from bottomhalf.host.request import COMPRESSED
from bottomhalf.host.sim import SimHost
from bottomhalf.host.sim.store import Store
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.drivers.qcow2.memory import MemoryNode, Overwork
from tests.drivers.qcow2.mutants import SECRET, Image

READ_WRITE: Final = PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE
SENSIBLE: Final = frozenset(
    (
        errno.EIO,
        errno.EBUSY,
        errno.EFBIG,
        errno.ENOMEDIUM,
        errno.EINVAL,
        errno.ENOTSUP,
        errno.ENOSPC,
        errno.EEXIST,
        errno.ENOENT,
    )
)
Opened = tuple[AioContext, BlockBackend, Qcow2Node]
CONTENT_BYTES_MAX: Final = 4 << 20  # a disk that is larger is read in places


@dataclass(frozen=True)
class Limits:
    """Of one image, with everything that is done with it."""

    requests: int = 300_000
    bytes: int = 2 << 30
    memory_bytes: int = 256 << 20
    processor_s: float = 5.0


class TooLong(BaseException):
    """The watchdog: an image has kept the processor busy for too long."""


@contextmanager
def bounded(limits: Limits) -> Iterator[None]:
    """Within this the process gets no more than so much more memory and so much of the processor."""

    def bark(number: int, frame: Any) -> None:
        raise TooLong(f"more than {limits.processor_s} s of the processor")

    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, bark)
    resource.setrlimit(resource.RLIMIT_AS, (now + limits.memory_bytes, before[1]))
    signal.setitimer(signal.ITIMER_PROF, limits.processor_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)


class Trial:
    """One image's day in court."""

    def __init__(self, image: Image, chance: random.Random, limits: Limits, seen: Counter[str]) -> None:
        self.image = image
        self.chance = chance
        self.limits = limits
        self.seen = seen
        self.requests = self.bytes = 0

    def run(self) -> None:
        """AssertionError, or whatever came that must not."""
        try:
            with bounded(self.limits):
                self._run()
        except (Exception, TooLong, Overwork) as error:
            raise AssertionError(f"{'; '.join(self.image.what)}: {type(error).__name__}: {error}") from error

    def _run(self) -> None:
        store = self._store()
        self._try_names(store)
        found = self._check(store, None)
        if found is None:
            self.seen["not an image"] += 1
            return
        assert self._same(store), "a check has written"
        self.seen["whole" if not found.status else "damaged"] += 1
        before = self._look(store)
        assert self._same(store), "reading has written"
        way = self.chance.randrange(3)
        if (way < 2 and found.status) or way == 0:
            self._try_repair(store, found, before)
        else:
            self._try_use(store, found, before)

    # -- the world ----------------------------------------------------------------------------------------------

    def _store(self) -> Store:
        store = Store()
        store.write(0, self.image.data)
        store.resize(self.image.length)
        return store

    def _same(self, store: Store) -> bool:
        if store.size != self.image.length:
            return False
        return store.read(0, len(self.image.data)) == self.image.data

    @contextmanager
    def _world(self, store: Store) -> Iterator[tuple[AioContext, Graph, MemoryNode]]:
        host = SimHost(1, trace=True)
        host.add_file(SECRET, b"secret" * 1000)
        context = AioContext(host)
        graph = Graph(context)
        file = MemoryNode(
            graph,
            "file",
            store,
            requests_max=self.limits.requests - self.requests,
            bytes_max=self.limits.bytes - self.bytes,
        )
        try:
            yield context, graph, file
        finally:
            try:
                graph.close()
            except OSError as error:
                self._sensible(error)
            context.close()
            self.requests += file.requests
            self.bytes += file.bytes
            opened = [entry[2] for entry in host.trace if entry[1] == "open"]
            assert not opened, f"opened {opened}"

    @contextmanager
    def _open(self, store: Store, *, read_only: bool, follow: bool = False, **more: Any) -> Iterator[Opened]:
        with self._world(store) as (context, graph, _):
            options = {"driver": "qcow2", "file": "file", "discard": "unmap", "read-only": read_only, **more}
            node = open_node(graph, from_json(BlockdevOptions, options), follow_names=follow)
            assert isinstance(node, Qcow2Node)
            node.monitor_owned = True
            backend = BlockBackend(graph, held=PERM_CONSISTENT_READ if read_only else READ_WRITE, shared=PERM_ALL)
            try:
                backend.insert(node)
                yield context, backend, node
            finally:
                try:
                    backend.close()
                except (OSError, ImageError) as error:
                    self._sensible(error)

    def _sensible(self, error: Exception) -> None:
        if isinstance(error, OSError):
            assert error.errno in SENSIBLE, f"errno {errno.errorcode.get(error.errno or 0)}: {error}"

    # -- looking ------------------------------------------------------------------------------------------------

    def _try_names(self, store: Store) -> None:
        """Opening an image whose names nobody allowed to be followed."""
        if self.chance.random() < 0.25:
            with suppress(BlockError), self._open(store, read_only=True):
                self.seen["names nothing"] += 1

    def _check(self, store: Store, repair: str | None) -> CheckResult | None:
        """None: there is not even a header."""
        with self._world(store) as (context, _, file):
            try:
                header = context.run(co_read_header(file))
            except ImageError:
                return None
            if header.crypt_method and repair is None:
                with suppress(BlockError):
                    context.run(co_open_cipher(file, header, "luks", b"password"))
            found: CheckResult = context.run(co_check(file, header, repair))
            return found

    def _look(self, store: Store) -> dict[int, bytes] | None:
        """What the disk has, as far as it can be read; None if it cannot be opened."""
        try:
            with self._open(store, read_only=True, backing=None) as (context, backend, node):
                with suppress(ImageError):
                    context.run(node.snapshots.read())
                return self._content(context, backend)
        except BlockError:
            self.seen["not opened"] += 1
            return None

    def _content(self, context: AioContext, backend: BlockBackend) -> dict[int, bytes]:
        size, step = backend.size, 65536
        if size <= CONTENT_BYTES_MAX:
            places = list(range(0, size, step))
        else:
            places = [0, step, size - step, *(random.Random(size).randrange(0, size - step) for _ in range(6))]
        content = {}
        for at in places:
            length = min(step, size - at)
            try:
                content[at] = bytes(context.run(backend.co_pread(at, length)))
                context.run(backend.co_block_status(at, length))
            except OSError as error:
                self._sensible(error)
                self.seen["unreadable"] += 1
        return content

    # -- using --------------------------------------------------------------------------------------------------

    def _try_use(self, store: Store, found: CheckResult, before: dict[int, bytes] | None) -> None:
        good = not found.status and before is not None
        try:
            with self._open(store, read_only=False, backing=None) as (context, backend, node):
                self.seen["used"] += 1
                content = b"".join((before or {}).values())
                good = good and backend.size <= CONTENT_BYTES_MAX and len(content) == backend.size
                model = bytearray(content) if good else None
                clean = self._use(context, backend, node, model)
        except BlockError:
            self.seen["not opened for writing"] += 1
            return
        if found.status or before is None:
            return
        after = self._check(store, None)
        assert after is not None and after.status in (0, 3), (after, "whole before it was used")
        if clean and after.leaks:
            # Counters of what is behind the file's end nobody looks at, until it is longer: then they are leaks.
            longer = self._store()
            longer.resize(max(store.size, longer.size))
            behind = self._check(longer, None)
            assert behind is not None and after.leaks <= behind.leaks, (after, behind, "whole before it was used")

    def _use(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        """A few steps; whether none has failed. ``model``: what the disk has."""
        clean = True
        for _ in range(self.chance.choice((1, 3, 6))):
            step = self.chance.choice(_STEPS)
            try:
                clean = bool(step(self, context, backend, node, model)) and clean
            except (OSError, BlockError) as error:
                self._sensible(error)
                self.seen[f"{step.__name__[1:]} failed"] += 1
                return False
            if model is not None:
                assert len(model) == backend.size
                assert bytes(context.run(backend.co_pread(0, backend.size))) == model, step.__name__
        return clean

    def _place(self, backend: BlockBackend, align: int = 1) -> tuple[int, int]:
        length = min(backend.size, self.chance.choice((1, 512, 5000, 70_000, align)))
        offset = self.chance.randrange(0, min(backend.size - length, 1 << 22) + 1)
        return offset // align * align, length

    def _write(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        offset, length = self._place(backend)
        data = self.chance.randbytes(1) * length
        context.run(backend.co_pwrite(offset, data))
        if model is not None:
            model[offset : offset + length] = data
        return True

    def _squeeze(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        size = node.cluster_bytes
        offset = self._place(backend, size)[0]
        length = min(size, backend.size - offset)
        context.run(backend.co_pwrite(offset, b"s" * length, COMPRESSED))
        if model is not None:
            model[offset : offset + length] = b"s" * length
        return True

    def _zero(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        offset, length = self._place(backend)
        context.run(backend.co_write_zeroes(offset, length, self.chance.choice((0, 2))))
        if model is not None:
            model[offset : offset + length] = bytes(length)
        return True

    def _discard(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        offset, length = self._place(backend)
        context.run(backend.co_discard(offset, length))
        if model is not None:
            left = bytes(context.run(backend.co_pread(offset, length)))
            assert all(new in (0, old) for new, old in zip(left, model[offset : offset + length], strict=True))
            model[offset : offset + length] = left
        return True

    def _flush(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        context.run(backend.co_flush())
        return True

    def _snapshot(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        context.run(node.snapshots.create(f"new{self.chance.random()}", date_ns=1))
        return True

    def _apply(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        known = context.run(node.snapshots.read())
        if model is not None:  # which is no model of a disk that is much larger
            known = [each for each in known if (each.disk_bytes or 0) <= CONTENT_BYTES_MAX]
        if known:
            context.run(node.snapshots.apply(self.chance.choice(known)))
            if model is not None:
                model[:] = context.run(backend.co_pread(0, backend.size))
        return True

    def _delete(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        known = context.run(node.snapshots.read())
        if known:
            context.run(node.snapshots.delete(self.chance.choice(known)))
        return True

    def _resize(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        size = max(backend.size + self.chance.choice((-65536, -512, 512, 65536)), 0) // 512 * 512
        context.run(node.co_truncate(size))
        if model is not None:
            del model[size:]
            kept = len(model)
            model.extend(bytes(size - kept))
            if any(text.startswith("size at") for text in self.image.what):  # there may be something behind the end
                model[kept:] = context.run(backend.co_pread(kept, size - kept))
        return True

    def _amend(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        changes = self.chance.choice(_AMENDS)
        context.run(co_amend(node, AmendOptions(**changes)))
        return True

    def _vmstate(self, context: AioContext, backend: BlockBackend, node: Qcow2Node, model: bytearray | None) -> bool:
        context.run(node.co_load_vmstate(0, memoryview(bytearray(600))))
        context.run(node.co_save_vmstate(0, memoryview(b"v" * 600)))
        return True

    # -- repairing ----------------------------------------------------------------------------------------------

    def _try_repair(self, store: Store, found: CheckResult, before: dict[int, bytes] | None) -> None:
        repair = self.chance.choice(("leaks", "all", "all"))
        repaired = self._check(store, repair)
        assert repaired is not None
        again = self._check(store, None)
        assert again is not None, "the repair has broken the header"
        if repaired.failure:
            self.seen["not repaired"] += 1
            return
        self.seen["repaired" if not repaired.status else "repaired in part"] += 1
        told = (repaired.corruptions, repaired.leaks, repaired.check_errors)
        assert told == (again.corruptions, again.leaks, again.check_errors), (repaired, again)
        if repair == "all":
            assert not repaired.leaks, repaired
        # What lies where tables lie, or will, is not the guest's to keep; and if not all is said, nobody knows.
        findings = repaired.findings if found.failure else found.findings  # a check that gave up has not seen all
        overlaps = any("exceeding the end" in text or "ERROR cluster" in text for text in findings)
        if any(" entry at" in what for what in self.image.what):
            overlaps = True  # an entry that was changed may lead to a table, whose content a repair changes
        if before is None or overlaps or len(findings) == FINDINGS_MAX:
            return
        after = self._look(store)
        assert after is not None, "it could be opened before it was repaired"
        for at in before:
            assert at in after and after[at] == before[at], f"other content at {at:#x}"


_AMENDS: Final[tuple[dict[str, Any], ...]] = (
    *({"refcount_bits": 16}, {"refcount_bits": 64}, {"lazy_refcounts": True}),
    *({"compat": "0.10"}, {"compat": "1.1"}),
)
_STEPS: Final = (
    *(Trial._write,) * 3,
    *(Trial._zero, Trial._discard, Trial._flush, Trial._squeeze, Trial._snapshot, Trial._apply, Trial._delete),
    *(Trial._resize, Trial._amend, Trial._vmstate),
)
