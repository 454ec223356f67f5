# SPDX-License-Identifier: Apache-2.0
"""blkdebug: every rule does what it says, requests wait where they are told to, and limits are kept."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from bottomhalf.aio import wait_while
from bottomhalf.block import BlockError, Graph, Node
from bottomhalf.block.limits import RequestLimits
from bottomhalf.drivers.blkdebug import BlkdebugNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.request import DISCARD, FLUSH, FUA, NO_FALLBACK, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.qapi.errors import OptionError
from tests.block.bench import Bench, discard, flush, read, sim_bench, write, zero
from tests.drivers.helpers import opened, play

SIZE = 65536


def blkdebug(it: Bench, *errors: dict[str, Any], **options: Any) -> BlkdebugNode:
    node = opened(
        it,
        {
            "driver": "blkdebug",
            "discard": "unmap",
            "inject-error": list(errors),
            **{key.replace("_", "-"): value for key, value in options.items()},
            "image": {"driver": "file", "filename": "disk"},
        },
    )
    assert isinstance(node, BlkdebugNode)
    return node


class Seen(Node):
    """Notes what arrives, and stores it."""

    driver = "seen"
    is_protocol = True
    handles_fua = True

    def __init__(self, graph: Graph, can_zero: bool = True) -> None:
        super().__init__(graph, unmap=True)
        self.content = bytearray(b"\xff" * SIZE)
        self.size = SIZE
        self.can_zero = can_zero
        self.seen: list[tuple[int, int, int, int]] = []
        self.calls: list[int] = []

    def open_size(self) -> int:
        return SIZE

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        self.calls.append(len(requests))
        for request in requests:
            begin, end = request.offset, request.offset + request.length
            self.seen.append((request.op, begin, request.length, request.flags))
            request.result = 0
            if request.op == READ:
                request.buffer[:] = self.content[begin:end]
            elif request.op == WRITE:
                self.content[begin:end] = request.buffer
            elif request.op == WRITE_ZEROES:
                self.content[begin:end] = bytes(request.length)
        return []


def test_without_rules_a_batch_passes_in_one_call(seed: int) -> None:
    with sim_bench(seed) as it:
        below = Seen(it.graph)
        user = it.user(BlkdebugNode(it.graph, image=below))
        assert user.submit(*(read(n * 512, 512) for n in range(32))) == []
        assert below.calls == [32]


@pytest.mark.parametrize("immediately", [False, True])
def test_an_error_is_injected(seed: int, immediately: bool) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "always")
        node = blkdebug(it, {"event": "none", "errno": errno.ENOSPC, "iotype": "write", "immediately": immediately})
        user = it.user(node)
        assert user.do(read(0, 512), read(512, 512)) == [0, 0]
        requests = [write(0, b"x"), write(512, b"y")]
        assert bool(user.submit(*requests)) != immediately
        user.wait()
        assert [request.result for request in requests] == [-errno.ENOSPC] * 2
        assert it.host.content("disk") == bytes(SIZE), "what failed did not reach the image"


def test_sector_and_once(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        user = it.user(blkdebug(it, {"event": "none", "sector": 3, "once": True}))
        assert user.do(read(0, 1536), read(2048, 512)) == [0, 0]
        assert user.do(read(1535, 2)) == [-errno.EIO]
        assert user.do(read(1535, 2)) == [0]


def test_events_and_states(seed: int) -> None:
    """The rules of a state hear of an event only in that state; a new state counts from the next event on."""
    with sim_bench(seed, disk=SIZE) as it:
        node = blkdebug(
            it,
            {"event": "read_aio", "state": 2, "once": True},
            set_state=[
                {"event": "write_aio", "state": 1, "new_state": 2},
                {"event": "write_aio", "state": 2, "new_state": 3},
            ],
        )
        user = it.user(RawNode(it.graph, file=node))
        assert node.state == 1
        assert user.do(read(0, 512)) == [0]
        assert user.do(write(0, b"x")) == [0]
        assert node.state == 2
        assert user.do(read(0, 512)) == [-errno.EIO]
        assert user.do(read(0, 512)) == [0]
        assert user.do(write(0, b"x")) == [0]
        assert node.state == 3


@pytest.mark.parametrize(
    ("iotype", "failing"),
    [
        (None, {"read", "write", "zero", "discard", "flush"}),
        ("read", {"read"}),
        ("write", {"write"}),
        ("write-zeroes", {"zero"}),
        ("discard", {"discard"}),
        ("flush", {"flush"}),
        ("block-status", {"status"}),
    ],
)
def test_kinds(iotype: str | None, failing: set[str]) -> None:
    with sim_bench(1, disk=SIZE) as it:
        rule = {"event": "none"} | ({"iotype": iotype} if iotype else {})
        user = it.user(blkdebug(it, rule))
        failed = set()
        for name, request in (
            ("read", read(0, 512)),
            ("write", write(0, b"x")),
            ("zero", zero(0, 512)),
            ("discard", discard(0, 512)),
            ("flush", flush()),
        ):
            if user.do(request) != [0]:
                failed.add(name)
        try:
            it.context.run(user.backend.co_block_status(0, 512))
        except OSError:
            failed.add("status")
        assert failed == failing


def test_the_block_layers_own_events(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        for event, request in (
            ("pwritev", write(0, b"x")),
            ("pwritev_done", write(0, b"x")),
            ("pwritev_zero", zero(0, 512)),
            ("flush_to_os", flush()),
            ("flush_to_disk", flush()),
        ):
            node = blkdebug(it)
            user = it.user(node)
            node.breakpoint(event, "A")
            user.submit(request)
            wait_while(it.context, lambda node=node: not node.is_suspended("A"), what="the breakpoint")
            node.resume("A")
            user.wait()
            assert request.result == 0
            user.backend.close()


def test_read_modify_write_events(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        node = blkdebug(it, align=4096)
        user = it.user(node)
        for event in ("head", "after_head", "tail", "after_tail"):
            node.breakpoint(f"pwritev_rmw_{event}", event)
        request = write(100, b"x" * 8000)
        user.submit(request)
        for event in ("head", "after_head", "tail", "after_tail"):
            wait_while(it.context, lambda event=event: not node.is_suspended(event), what=event)
            assert user.waiting
            node.resume(event)
        user.wait()
        assert it.host.content("disk")[99:8101] == b"\0" + b"x" * 8000 + b"\0"


def test_suspended_requests_and_the_others(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "always")
        node = blkdebug(it)
        user = it.user(RawNode(it.graph, file=node))
        with pytest.raises(BlockError, match="No request is suspended as 'A'"):
            node.resume("A")
        node.breakpoint("write_aio", "A")
        node.breakpoint("write_aio", "B")
        first, second = write(0, b"1"), write(1, b"2")
        assert user.submit(first, second) != []
        assert node.is_suspended("A") and not node.is_suspended("B"), "one after the other"
        wait_while(it.context, lambda: id(second) in user.waiting, what="the second")
        assert id(first) in user.waiting
        node.resume("A")
        wait_while(it.context, lambda: not node.is_suspended("B"), what="the next breakpoint")
        node.remove_breakpoint("B")
        user.wait()
        assert it.host.content("disk")[:2] == b"12"
        with pytest.raises(BlockError, match="There is no breakpoint 'B'"):
            node.remove_breakpoint("B")
        node.breakpoint("write_aio", "C")
        node.remove_breakpoint("C")
        assert user.do(write(0, b"3")) == [0]


def test_a_drain_waits_for_a_suspended_request(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        node = blkdebug(it)
        user = it.user(node)
        node.breakpoint("pwritev", "A")
        user.submit(write(0, b"1"))
        timer = it.context.timer(lambda: node.resume("A"))
        timer.arm_ns(it.context.now_ns() + 10**9)
        with it.graph.drained(node):
            assert not user.waiting
            assert not timer.armed


def test_limits_are_kept(seed: int) -> None:
    chance = random.Random(seed)
    with sim_bench(seed) as it:
        below = Seen(it.graph)
        node = BlkdebugNode(
            it.graph, image=below, align=512, limits=RequestLimits(4096, 1024, 2048, 1024, 3072), unmap=True
        )
        user = it.user(node)
        model = bytearray(below.content)
        play(user, model, chance, 30, longest=20_000)
        assert user.do(discard(100, 20_000)) == [0]
        assert below.content == model, "discards are only noted here"
        for op, offset, length, _ in below.seen:
            assert offset % 512 == length % 512 == 0
            if op in (READ, WRITE):
                assert length <= 4096
            elif op == WRITE_ZEROES:
                assert offset % 1024 == length % 1024 == 0 and length <= 2048
            elif op == DISCARD:
                assert offset % 1024 == length % 1024 == 0 and length <= 3072
        assert sum(length for op, _, length, _ in below.seen if op == DISCARD) == 18 * 1024


def test_a_durable_write_in_pieces_ends_with_a_flush(seed: int) -> None:
    with sim_bench(seed) as it:
        below = Seen(it.graph)
        user = it.user(BlkdebugNode(it.graph, image=below, limits=RequestLimits(max_transfer=1000)))
        assert user.do(write(0, bytes(2500), FUA)) == [0]
        assert [(length, flags) for _, _, length, flags in below.seen] == [(1000, 0), (1000, 0), (500, 0), (0, 0)]


@pytest.mark.parametrize("kind", [WRITE, WRITE_ZEROES])
def test_all_pieces_of_a_durable_write_survive_the_power(seed: int, kind: int) -> None:
    with sim_bench(seed, disk=bytes(16384)) as it:
        limits = RequestLimits(max_transfer=1000, zeroes_alignment=512, max_zeroes=1024)
        user = it.user(BlkdebugNode(it.graph, image=it.file("disk"), limits=limits, unmap=True))
        request = write(100, b"w" * 5000, FUA) if kind == WRITE else zero(100, 5000, FUA)
        assert user.do(request) == [0]
        assert it.host.disk.files["disk"].unsynced_changes() == 0


def test_zeroes_that_do_not_fit(seed: int) -> None:
    with sim_bench(seed) as it:
        below = Seen(it.graph)
        user = it.user(BlkdebugNode(it.graph, image=below, limits=RequestLimits(zeroes_alignment=4096)))
        assert user.do(zero(100, 8192, FUA)) == [0]
        assert below.content[99:8293] == b"\xff" + bytes(8192) + b"\xff"
        assert [(op, offset, length) for op, offset, length, _ in below.seen] == [
            (WRITE, 100, 3996),
            (WRITE_ZEROES, 4096, 4096),
            (WRITE, 8192, 100),
            (FLUSH, 0, 0),
        ]
        assert user.do(zero(0, 100, NO_FALLBACK)) == [-errno.ENOTSUP]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"align": 3}, "Cannot meet constraints with align 3"),
        ({"align": 2**40}, "Cannot meet constraints with align 1099511627776"),
        ({"align": 4096, "max_transfer": 512}, "Cannot meet constraints with max-transfer 512"),
        ({"align": 512, "opt_write_zero": 513}, "Cannot meet constraints with opt-write-zero 513"),
        ({"opt_write_zero": 1024, "max_write_zero": 512}, "Cannot meet constraints with max-write-zero 512"),
        ({"align": 512, "opt_discard": 3}, "Cannot meet constraints with opt-discard 3"),
        ({"opt_discard": 1000, "max_discard": 1500}, "Cannot meet constraints with max-discard 1500"),
        ({"max_discard": -1}, "Value '-1' is out of range for parameter 'max-discard'"),
        ({"config": "rules.conf"}, "config files are not supported"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with sim_bench(1, disk=SIZE) as it:
        with pytest.raises(BlockError, match=text):
            blkdebug(it, **options)
        with pytest.raises(BlockError, match="errno -1 of a blkdebug rule"):
            blkdebug(it, {"event": "none", "errno": -1})
        with pytest.raises(OptionError, match="does not accept value 'foo'"):
            blkdebug(it, {"event": "foo"})
        assert not it.graph.nodes


def test_permissions_taken_and_not_shared(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        file = it.file("disk", "file0")
        node = opened(
            it,
            {
                "driver": "blkdebug",
                "image": "file0",
                "take-child-perms": ["write"],
                "unshare-child-perms": ["write", "resize"],
            },
        )
        assert node.children[0].held & 2 and not node.children[0].shared & 10
        with pytest.raises(BlockError, match="Permission conflict on node 'file0'"):
            it.backend(file)
        it.graph.release(node)
