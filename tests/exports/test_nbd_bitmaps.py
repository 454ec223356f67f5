# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps as metadata contexts: what a client is told, beside what it has written."""

from __future__ import annotations

import pytest

from bottomhalf.block import BlockError
from bottomhalf.block.dirty import add_bitmap, check_usable
from bottomhalf.exports.nbd.metadata import EXTENTS_PER_REPLY_MAX, dirty_extents
from bottomhalf.host.request import Request
from bottomhalf.qapi.common import BlockDirtyBitmap
from bottomhalf.wire.nbd.constants import CONTEXT_BASE_ALLOCATION, CONTEXT_DIRTY_BITMAP, STATE_DIRTY
from tests.exports.nbd_bench import Bench

SIZE = 1 << 20
PIECE = 4096


def test_a_client_sees_what_it_has_written(seed: int) -> None:
    with Bench(seed) as bench:
        bench.host.add_file("disk.raw", SIZE)
        node = bench.file("disk.raw", unmap=True)
        live = add_bitmap(node, "live", PIECE)
        rests = add_bitmap(node, "rests", PIECE, enabled=False)
        rests.set(0, SIZE)
        export = bench.export("disk", node, bitmaps=["live", "rests", "live"])
        contexts = (CONTEXT_BASE_ALLOCATION, f"{CONTEXT_DIRTY_BITMAP}live", f"{CONTEXT_DIRTY_BITMAP}rests")
        assert export.info.contexts == contexts
        client = bench.client("disk", contexts=contexts)
        written: set[int] = set()
        for _ in range(30):
            offset = bench.random.randrange(SIZE - 10_000)
            length = bench.random.choice((1, PIECE, 10_000))
            what = bench.random.choice((client.write, client.write_zeroes, client.trim))
            client.good(what(offset, bytes(length) if what == client.write else length))
            written.update(range(offset // PIECE, (offset + length - 1) // PIECE + 1))
            offset = bench.random.randrange(SIZE - 1)
            length = bench.random.randrange(1, SIZE - offset + 1)
            found = client.good(client.block_status(offset, length)).extents
            assert [sum(count for count, _ in extents) for extents in found.values()] == [length] * 3
            assert found[3] == [(length, STATE_DIRTY)]
            at = offset
            for count, flags in found[2]:
                touched = range(at // PIECE, (at + count - 1) // PIECE + 1)
                assert {piece in written for piece in touched} == {flags == STATE_DIRTY}
                at += count
            assert all(a[1] != b[1] for a, b in zip(found[2], found[2][1:], strict=False))
            (one,) = client.good(client.block_status(offset, length, one=True)).extents[2]
            assert one == found[2][0]
        assert live.dirty_bytes == len(written) * PIECE


def test_only_the_chosen_context(seed: int) -> None:
    with Bench(seed) as bench:
        bench.host.add_file("disk.raw", SIZE)
        node = bench.file("disk.raw")
        add_bitmap(node, "b", PIECE).set(PIECE, 1)
        bench.export("disk", node, bitmaps=["b"])
        client = bench.client("disk", contexts=(f"{CONTEXT_DIRTY_BITMAP}b",))
        (extents,) = client.good(client.block_status(0, SIZE)).extents.values()
        assert extents == [(PIECE, 0), (PIECE, STATE_DIRTY), (SIZE - 2 * PIECE, 0)]


def test_answers_are_bounded() -> None:
    with Bench(1) as bench:
        bench.host.add_file("disk.raw", SIZE * 10)
        node = bench.file("disk.raw")
        bitmap = add_bitmap(node, "b", 512)
        for offset in range(0, SIZE * 10, 1024):
            bitmap.set(offset, 1)
        bench.export("disk", node, bitmaps=["b"])
        client = bench.client("disk", contexts=(f"{CONTEXT_DIRTY_BITMAP}b",))
        (extents,) = client.good(client.block_status(0, SIZE * 10)).extents.values()
        assert len(extents) == EXTENTS_PER_REPLY_MAX


def test_a_bitmap_of_a_smaller_disk() -> None:
    with Bench(1) as bench:
        bench.host.add_file("disk.raw", 1000)
        bitmap = add_bitmap(bench.file("disk.raw"), "b", 512)
        assert dirty_extents(bitmap, 0, 5000, 9) == [(5000, 0)]
        bitmap.set(999, 1)
        assert dirty_extents(bitmap, 0, 5000, 9) == [(512, 0), (488, STATE_DIRTY), (4000, 0)]
        assert dirty_extents(bitmap, 0, 5000, 2) == [(512, 0), (488, STATE_DIRTY)]
        assert dirty_extents(bitmap, 2000, 100, 1) == [(100, 0)]
        bitmap.mark([Request(1, 0, 1)])
        assert dirty_extents(bitmap, 0, 100, 1) == [(100, STATE_DIRTY)]


def test_it_is_busy_as_long_as_it_is_shown() -> None:
    with Bench(1) as bench:
        bench.host.add_file("disk.raw", SIZE)
        bench.host.add_file("other.raw", SIZE)
        node, other = bench.file("disk.raw"), bench.file("other.raw")
        node.references = other.references = 1  # ours
        bitmap, second = add_bitmap(node, "b"), add_bitmap(other, "b", enabled=False)
        by_name = BlockDirtyBitmap(node=other.name, name="b")
        for wanted, text in (
            ([by_name, "b"], "Bitmaps of two nodes are called 'b'"),
            (["nope"], "Bitmap 'nope' is not found"),
            ([BlockDirtyBitmap(node="nope", name="b")], "Node 'nope' not found"),
            (["b"] * 2000, "at most 1024 bitmaps"),
        ):
            with pytest.raises(BlockError, match=text):
                bench.export("disk", node, bitmaps=wanted)
            check_usable(bitmap)
            check_usable(second)
        with pytest.raises(BlockError, match="Enabled bitmap 'b' incompatible with readonly export"):
            bench.export("disk", node, bitmaps=["b"], writable=False)
        export = bench.export("disk", node, bitmaps=[by_name])
        with pytest.raises(BlockError, match="in use by another operation"):
            check_usable(second)
        assert other.references == 2
        bench.server.drop(export)
        bench.exports.remove(export)
        export.disconnect()
        export.close()
        check_usable(second)
        assert other.references == 1
        node.references = other.references = 0
