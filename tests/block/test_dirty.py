# SPDX-License-Identifier: Apache-2.0
"""Named bitmaps: what is marked by whatever a node is asked to write, beside a set of pieces."""

from __future__ import annotations

import errno
import random
from hashlib import sha256

import pytest

from bottomhalf.block import BlockError, Node, dirty
from bottomhalf.block.bitmap import DirtyBitmap
from bottomhalf.block.dirty import NamedBitmap, add_bitmap, check_usable, drop_bitmap, merge_bitmaps, set_enabled
from bottomhalf.block.watching import detect_zeroes, set_write_threshold, watch_bitmaps, watch_of
from bottomhalf.drivers.null import NullCoNode
from bottomhalf.drivers.raw import RawNode
from tests.block.bench import discard, read, sim_bench, write, zero
from tests.drivers.helpers import Ram

SIZE = 300_000


class Pieces:
    """A bitmap and the set of pieces that it should have."""

    def __init__(self, node: Node, name: str, granularity: int) -> None:
        self.bitmap = add_bitmap(node, name, granularity)
        self.granularity = granularity
        self.dirty: set[int] = set()

    def touch(self, offset: int, length: int) -> None:
        if length and self.bitmap.enabled:
            self.dirty.update(range(offset // self.granularity, (offset + length - 1) // self.granularity + 1))

    def resize(self, size: int) -> None:
        self.dirty = {piece for piece in self.dirty if piece * self.granularity < size}

    def see(self) -> None:
        found: set[int] = set()
        for begin, end in self.bitmap.dirty_ranges(0, self.bitmap.size):
            found.update(range(begin // self.granularity, -(-end // self.granularity)))
        assert found == self.dirty
        assert self.bitmap.dirty_bytes == len(found) * self.granularity
        assert self.bitmap.checksum() == checksum(self.dirty, -(-self.bitmap.size // self.granularity))


def checksum(dirty_bits: set[int], count: int) -> str:
    words = bytearray(max(-(-count // 64), 1) * 8)
    for bit in dirty_bits:
        words[bit // 8] |= 1 << bit % 8
    return sha256(words).hexdigest()


@pytest.mark.parametrize("kind", ["ram", "raw"])
def test_random_changes_beside_a_set(seed: int, kind: str) -> None:
    """Lists and coroutines, discards, resizes, bitmaps that come, go and rest."""
    chance = random.Random(seed)
    with sim_bench(seed, disk=SIZE) as it:
        node = Ram(it.graph, bytes(SIZE)) if kind == "ram" else RawNode(it.graph, file=it.file("disk"), unmap=True)
        own = type(node)
        if chance.random() < 0.3:
            detect_zeroes(node)
        user = it.user(node, held=15)
        known: dict[str, Pieces] = {}
        for number in range(60):
            what = chance.choice(("list", "coroutine", "discard", "resize", "add", "drop", "enable", "read", "clear"))
            offset = chance.randrange(node.size)
            length = min(chance.choice((0, 1, 512, 5000, 70_000)), node.size - offset)
            if what == "list":
                ranges = [(offset, length), (0, 1), (node.size - 1, 1)]
                assert user.do(*[write(at, b"x" * count) for at, count in ranges]) == [0] * 3
                assert user.do(zero(offset, length)) == [0]
                for pieces in known.values():
                    for at, count in ranges:
                        pieces.touch(at, count)
            elif what == "coroutine":
                if chance.random() < 0.5:
                    it.context.run(node.co_pwrite(offset, memoryview(b"y" * length)))
                else:
                    it.context.run(node.co_write_zeroes(offset, length))
            elif what == "discard":
                assert user.do(discard(offset, length)) == [0]
            elif what == "read":
                assert user.do(read(offset, length)) == [0]
            elif what == "resize":
                size = chance.randrange(1, SIZE * 2)
                it.context.run(node.co_truncate(size))
                assert node.size == size
                for pieces in known.values():
                    pieces.resize(size)
            elif what == "add" and len(known) < 4:
                name = f"b{number}"
                known[name] = Pieces(node, name, chance.choice((512, 1024, 65536)))
            elif known:
                name = chance.choice(list(known))
                pieces = known[name]
                if what == "drop":
                    drop_bitmap(node, pieces.bitmap)
                    del known[name]
                elif what == "enable":
                    set_enabled(node, pieces.bitmap, not pieces.bitmap.enabled)
                elif what == "clear":
                    pieces.bitmap.clear()
                    pieces.dirty.clear()
            for pieces in known.values():
                if what in ("coroutine", "discard"):
                    pieces.touch(offset, length)
                pieces.see()
        for pieces in known.values():
            drop_bitmap(node, pieces.bitmap)
        assert watch_of(node) is None or watch_of(node).zeroes  # type: ignore[union-attr]
        detect_zeroes(node, False)
        assert type(node) is own


def test_merging_beside_sets(seed: int) -> None:
    """Also of other granularities and other nodes; and translation to eight bits a byte."""
    chance = random.Random(seed)
    size = chance.randrange(1, 2_000_000)
    with sim_bench(seed) as it:
        nodes = [NullCoNode(it.graph, size=size) for _ in range(2)]
        made: list[Pieces] = []
        for n in range(4):
            pieces = Pieces(nodes[n % 2], f"b{n}", 1 << chance.randrange(9, 18))
            for _ in range(chance.randrange(6)):
                offset = chance.randrange(size)
                length = min(chance.choice((1, 513, 100_000)), size - offset)
                pieces.bitmap.set(offset, length)
                pieces.touch(offset, length)
            made.append(pieces)
        target, *sources = made
        expected = set(target.dirty)
        for source in sources:
            for piece in source.dirty:
                begin, end = piece * source.granularity, min((piece + 1) * source.granularity, size)
                expected.update(range(begin // target.granularity, -(-end // target.granularity)))
        merge_bitmaps(target.bitmap, [source.bitmap for source in sources])
        target.dirty = expected
        for pieces in made:
            pieces.see()
        bitmap = target.bitmap
        copy = DirtyBitmap(size, target.granularity)
        step = chance.choice((64, 512, 4096))
        for first in range(0, bitmap.bits, step):
            count = min(step, bitmap.bits - first)
            content = bitmap.content(first, count)
            bits = [bit in expected for bit in range(first, first + count)]
            assert content == (-1 if len(set(bits)) > 1 else int(bits[0]))
            if content < 0:
                copy.load(first, bitmap.packed(first, step).ljust(step // 8 + 9, b"\xff")[: step // 8])
            else:
                copy.load_alike(first, step, bool(content))
        assert copy.checksum() == bitmap.checksum()
        for node in nodes:
            it.graph.release(node)


def test_what_they_are_refused() -> None:
    with sim_bench(1) as it:
        node, other = NullCoNode(it.graph, "n", size=1 << 20), NullCoNode(it.graph, "o", size=1 << 21)
        bitmap, wrong = add_bitmap(node, "b"), add_bitmap(other, "w")
        assert bitmap.granularity == 65536 and bitmap.enabled
        with pytest.raises(BlockError, match="Can't store persistent bitmaps to n: Operation not supported"):
            add_bitmap(node, "p", persistent=True)
        with pytest.raises(BlockError, match=r"\(destination size is 1048576, source size is 2097152\)"):
            merge_bitmaps(bitmap, [bitmap, wrong])
        for attribute, text in (
            ("busy", "Bitmap 'b' is currently in use by another operation and cannot be used"),
            ("read_only", "Bitmap 'b' is readonly and cannot be modified"),
            ("inconsistent", "Bitmap 'b' is inconsistent and cannot be used"),
        ):
            setattr(bitmap, attribute, True)
            with pytest.raises(BlockError, match=text):
                check_usable(bitmap)
            if attribute != "busy":
                check_usable(bitmap, **{attribute: True})
            setattr(bitmap, attribute, False)
        with pytest.raises(BlockError, match="too large"):
            add_bitmap(NullCoNode(it.graph, size=1 << 50), "b", 512)


def test_a_sealed_node_is_not_written_to() -> None:
    """As long as the image says that its copy of a bitmap is valid."""
    with sim_bench(1) as it:
        node = Ram(it.graph, bytes(SIZE))
        user = it.user(node)
        bitmap = add_bitmap(node, "b", enabled=False)
        bitmap.read_only = True
        watch_bitmaps(node)
        assert user.do(write(0, b"x")) == [-errno.EPERM]
        assert user.do(zero(0, 1)) == user.do(discard(0, 1)) == [-errno.EPERM]
        for body in (node.co_pwrite(0, memoryview(b"x")), node.co_write_zeroes(0, 1), node.co_discard(0, 1)):
            with pytest.raises(OSError, match="Operation not permitted"):
                it.context.run(body)
        assert user.do(read(0, 1)) == [0]
        bitmap.read_only = False
        watch_bitmaps(node)
        assert user.do(write(0, b"x")) == [0]
        assert bitmap.dirty_bytes == 0, "it does not follow writes"


def test_beside_other_watches() -> None:
    with sim_bench(1) as it:
        node = Ram(it.graph, bytes(SIZE))
        kind = type(node)
        told: list[int] = []
        set_write_threshold(node, 10, lambda amount, threshold: told.append(amount))
        bitmap = add_bitmap(node, "b", 512)
        detect_zeroes(node)
        assert it.user(node).do(write(600, bytes(10))) == [0]
        assert told == [600] and bitmap.dirty_bytes == 512
        drop_bitmap(node, bitmap)
        detect_zeroes(node, False)
        assert type(node) is kind


def test_a_file_grows_under_it() -> None:
    """Who writes behind the end of a file makes it larger, and the bitmap follows."""
    with sim_bench(1, disk=1000) as it:
        file = it.file("disk")
        bitmap = add_bitmap(file, "b", 512)
        it.context.run(file.co_pwrite(5000, memoryview(b"x" * 10)))
        file.refresh_size()
        assert bitmap.size == file.size == 5010
        assert list(bitmap.dirty_ranges(0, 5010)) == [(4608, 5010)]
        it.graph.release(file)


def test_one_that_would_become_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    with sim_bench(1) as it:
        node = Ram(it.graph, bytes(SIZE))
        bitmap = add_bitmap(node, "b", 512)
        monkeypatch.setattr("bottomhalf.block.bitmap.BITS_MAX", 1000)
        it.context.run(node.co_truncate(512 * 1001))
        assert bitmap.inconsistent and not bitmap.enabled
        watch_bitmaps(node)
        assert it.user(node).do(write(0, b"x")) == [0]
        with pytest.raises(BlockError, match="inconsistent"):
            check_usable(bitmap)


def test_default_granularity() -> None:
    class Clustered(NullCoNode):
        cluster = 0

        @property
        def cluster_bytes(self) -> int:
            return self.cluster

    with sim_bench(1) as it:
        node = Clustered(it.graph, size=1 << 20)
        for node.cluster, granularity in ((0, 65536), (512, 4096), (8192, 8192), (1 << 21, 65536)):
            assert dirty.default_granularity(node) == granularity
        assert isinstance(add_bitmap(node, "b"), NamedBitmap)
