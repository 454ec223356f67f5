# SPDX-License-Identifier: Apache-2.0
"""Writes of zero bytes, and writes beyond a threshold, at any node."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bottomhalf.block.watching import detect_zeroes, set_write_threshold, watch_of, write_threshold
from bottomhalf.block.zeroes import is_zero
from bottomhalf.drivers.null import NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.request import COMPRESSED, MAY_UNMAP, WRITE, WRITE_ZEROES
from tests.block.bench import discard, sim_bench, write, zero
from tests.drivers.helpers import Ram, opened, play
from tests.drivers.test_blkdebug import SIZE, Seen


@pytest.mark.parametrize("mode", ["on", "unmap"])
def test_zero_bytes_become_zero_writes(seed: int, mode: str) -> None:
    with sim_bench(seed) as it:
        seen = Seen(it.graph)
        detect_zeroes(seen, unmap=mode == "unmap")
        user = it.user(seen)
        requests = [write(0, bytes(512)), write(512, b"\0" * 511 + b"x"), write(1024, bytes(512)), write(2048, b"")]
        assert user.do(*requests) == [0] * 4
        assert [request.op for request in requests] == [WRITE] * 4, "the owner's requests stay what they are"
        flags = MAY_UNMAP if mode == "unmap" else 0
        assert sorted(seen.seen) == sorted(
            [(WRITE, 512, 512, 0), (WRITE, 2048, 0, 0), (WRITE_ZEROES, 0, 512, flags), (WRITE_ZEROES, 1024, 512, flags)]
        )
        seen.seen.clear()
        assert user.do(write(0, bytes(10), COMPRESSED)) == [0]
        assert seen.seen == [(WRITE, 0, 10, COMPRESSED)]


def test_in_coroutine_form(seed: int) -> None:
    with sim_bench(seed) as it:
        ram = Ram(it.graph, b"x" * SIZE)
        detect_zeroes(ram)
        ram.fail["write"] = 5
        it.context.run(ram.co_pwrite(0, memoryview(bytes(100))))
        assert it.user(ram).do(write(100, bytes(100)), write(200, b"x")) == [0, -5]
        assert ram.content[:201] == bytes(200) + b"x"


def test_a_file_gets_holes(seed: int) -> None:
    """As an option, and beside a model."""
    with sim_bench(seed, disk=SIZE) as it:
        options: dict[str, Any] = {"driver": "file", "filename": "disk", "discard": "unmap", "detect-zeroes": "unmap"}
        node = opened(it, {"driver": "raw", "detect-zeroes": "on", "file": options})
        user = it.user(node)
        assert user.do(write(0, b"x" * SIZE)) == [0]
        model = bytearray(b"x" * SIZE)
        play(user, model, random.Random(seed), 20)
        assert user.do(write(0, bytes(SIZE))) == [0]
        assert it.host.content("disk") == bytes(SIZE)


def test_is_zero(seed: int) -> None:
    chance = random.Random(seed)
    length = chance.choice([1, 2, 3, 512, 65535, 65536, 65537, 200_000])
    data = bytearray(length)
    assert is_zero(memoryview(data))
    data[chance.randrange(length)] = 1
    assert not is_zero(memoryview(data))
    assert not is_zero(memoryview(b""))


def test_not_triggered() -> None:
    """/write-threshold/not-trigger"""
    with sim_bench(1) as it:
        node = NullCoNode(it.graph)
        set_write_threshold(node, 4 << 20)
        assert it.user(node).do(write(1024, bytes(1024)), write((4 << 20) - 10, bytes(10))) == [0, 0]
        assert write_threshold(node) == 4 << 20


@pytest.mark.parametrize("form", ["list", "coroutine", "zeroes"])
def test_triggered(form: str) -> None:
    """/write-threshold/trigger"""
    with sim_bench(1) as it:
        told: list[tuple[int, int]] = []
        node = NullCoNode(it.graph)
        kind = type(node)
        set_write_threshold(node, 4 << 20, lambda amount, threshold: told.append((amount, threshold)))
        offset = (4 << 20) - 1024
        if form == "coroutine":
            it.context.run(node.co_pwrite(offset, memoryview(bytes(2048))))
        else:
            user = it.user(node)
            assert user.do(discard(offset, 2048)) == [0]
            assert not told
            assert user.do(write(offset, bytes(2048)) if form == "list" else zero(offset, 2048)) == [0]
            assert user.do(write(offset, bytes(2048))) == [0]
        assert told == [(1024, 4 << 20)], "once"
        assert write_threshold(node) == 0
        set_write_threshold(node, 0)
        assert type(node) is kind and watch_of(node) is None


def test_both_at_once() -> None:
    with sim_bench(1, disk=SIZE) as it:
        node = RawNode(it.graph, file=it.file("disk"))
        detect_zeroes(node)
        set_write_threshold(node, 100)
        set_write_threshold(node, 0)
        watch = watch_of(node)
        assert watch is not None and watch.zeroes
        assert it.user(node).do(write(0, bytes(1000))) == [0]
