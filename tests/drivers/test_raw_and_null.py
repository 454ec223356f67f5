# SPDX-License-Identifier: Apache-2.0
"""Drivers raw (windows) and null (time)."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bottomhalf.block import BlockError
from bottomhalf.drivers.null import SIZE_DEFAULT, NullAioNode, NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.protocol import DATA, ZERO
from tests.block.bench import discard, flush, read, sim_bench, write, zero


class TestWindow:
    @pytest.mark.parametrize(
        ("offset", "size", "text"),
        [
            (-512, None, "Value '-512' is out of range for parameter 'offset'"),
            (0, -512, "Value '-512' is out of range for parameter 'size'"),
            (8193, None, "Offset (8193) cannot be greater than size of the containing file (8192)"),
            (0, 100, "Specified size is not multiple of 512"),
            (
                512,
                8192,
                "The sum of offset (512) and size (8192) has to be smaller or equal to the "
                " actual size of the containing file (8192)",
            ),
        ],
    )
    def test_bad_ones(self, offset: int, size: int | None, text: str) -> None:
        with sim_bench(0, disk=8192) as it:
            file = it.file("disk", "file")
            with pytest.raises(BlockError, match=f"^{re.escape(text)}$"):
                RawNode(it.graph, "raw", file=file, offset=offset, size=size)
            assert list(it.graph.nodes) == ["file"] and not file.parents

    @pytest.mark.parametrize(
        ("offset", "size", "expected"),
        [(0, None, 8192), (8192, None, 0), (100, None, 8092), (0, 0, 0), (7680, 512, 512), (13, 512, 512)],
    )
    def test_good_ones(self, offset: int, size: int | None, expected: int) -> None:
        content = bytes(n % 251 for n in range(8192))
        with sim_bench(0, disk=content) as it:
            node = RawNode(it.graph, file=it.file("disk"), offset=offset, size=size)
            assert node.size == expected
            request = read(0, expected)
            assert it.user(node).do(request) == [0]
            assert request.buffer == content[offset : offset + expected]

    def test_read_only_below(self) -> None:
        """Such a window can be opened; who wants to write is refused; with auto-read-only it says so itself."""
        with sim_bench(0, disk=8192) as it:
            file = it.file("disk", read_only=True)
            assert not RawNode(it.graph, file=file).read_only
            assert RawNode(it.graph, file=file, auto_read_only=True).read_only
            assert not RawNode(it.graph, file=it.file("disk"), auto_read_only=True).read_only
            with pytest.raises(BlockError, match=r"^Block node is read-only$"):
                it.backend(RawNode(it.graph, file=file))

    def test_a_flush_is_not_moved(self, seed: int) -> None:
        with sim_bench(seed, disk=8192) as it:
            node = RawNode(it.graph, file=it.file("disk", direct=True), offset=100)
            request = flush()
            assert it.user(node).do(request) == [0]
            assert request.offset == 0


KINDS = [NullCoNode, NullAioNode]


class TestNull:
    @pytest.mark.parametrize("kind", KINDS)
    def test_defaults(self, kind: Any, seed: int) -> None:
        with sim_bench(seed) as it:
            node = kind(it.graph)
            assert node.size == SIZE_DEFAULT == 1 << 30
            request = read(0, 5)
            assert it.user(node).do(request) == [0]
            assert request.buffer == b"\xee" * 5, "a read leaves the buffer alone"
            assert node.block_status(0, 9) == (DATA, 9)

    @pytest.mark.parametrize("kind", KINDS)
    def test_reads_of_zeroes(self, kind: Any, seed: int) -> None:
        with sim_bench(seed) as it:
            for latency_ns in (0, 5):
                node = kind(it.graph, read_zeroes=True, latency_ns=latency_ns)
                request = read(0, 5)
                assert it.user(node).do(request) == [0]
                assert request.buffer == bytes(5)
                assert node.block_status(0, 9) == (ZERO, 9)

    @pytest.mark.parametrize("kind", KINDS)
    def test_bad_options(self, kind: Any) -> None:
        with sim_bench(0) as it:
            for latency_ns in (-1, 1 << 63):
                with pytest.raises(BlockError, match=r"^latency-ns is invalid$"):
                    kind(it.graph, latency_ns=latency_ns)
            with pytest.raises(BlockError, match=r"^Value '-5' is out of range for parameter 'size'$"):
                kind(it.graph, size=-5)
            assert not it.graph.nodes

    @pytest.mark.parametrize("kind", KINDS)
    def test_latency(self, kind: Any, seed: int) -> None:
        """A batch takes as long as one request, two batches overlap."""
        with sim_bench(seed) as it:
            user = it.user(kind(it.graph, latency_ns=7_000_000))
            start_ns = it.host.monotonic_ns()
            for make in (lambda: read(0, 1), lambda: write(0, b"x"), flush, lambda: discard(0, 1), lambda: zero(0, 1)):
                user.submit(make(), make())
            user.wait()
            assert 7_000_000 <= it.host.monotonic_ns() - start_ns < 8_000_000

    def test_null_co_is_done_at_once_and_null_aio_never(self, seed: int) -> None:
        with sim_bench(seed) as it:
            assert it.user(NullCoNode(it.graph)).submit(read(0, 1), read(1, 1)) == []
            user = it.user(NullAioNode(it.graph))
            assert len(user.submit(read(0, 1), read(1, 1))) == 2
            it.context.poll(False)
            assert not user.waiting
