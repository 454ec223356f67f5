# SPDX-License-Identifier: Apache-2.0
"""Random loads under random circumstances: what clients read is what they wrote, and every request has one answer.

Each seed draws a machine (sockets, page cache, latencies, alignment), some clients with a region of the disk each
and requests that overlap only where the outcome is defined, drains in between, and compares with a bytearray.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from bottomhalf.drivers.raw import RawNode
from bottomhalf.exports.nbd.output import _FileRange
from bottomhalf.host.sim import Odds
from bottomhalf.wire.nbd.client_replies import Completion
from bottomhalf.wire.nbd.constants import STATE_ZERO
from tests.exports.nbd_bench import INET, UNIX, Bench, Peer, check_idle

SEEDS_PER_TEST = 5  # 20 tests of these are 100 seeds
REGION = 384 << 10
ROUNDS = 40


@dataclass
class Asked:
    """A request on its way, with what its answer has to be."""

    kind: str
    offset: int
    length: int
    expected: bytes = b""
    changes: bool = False


@dataclass
class Load:
    """One client's requests to its region."""

    peer: Peer
    content: bytearray
    start: int
    length: int
    alignment: int
    random: random.Random
    structured: bool
    asked: dict[int, Asked] = field(default_factory=dict)
    answered: int = 0

    def ask(self) -> None:
        chance = self.random
        length = chance.choice((1, 511, 512, 3000, 4096, chance.randint(1, 9000), chance.randint(60 << 10, 150 << 10)))
        offset = self.start + chance.randint(0, self.length - length)
        if chance.random() < 0.5:
            offset -= offset % 512
        kinds = ["read"] * 5 + ["write"] * 4 + ["trim", "zero", "flush", "cache", "status"]
        kind = chance.choice(kinds)
        if kind == "flush":
            self._note(self.peer.flush(), Asked(kind, 0, 0))
            return
        changes = kind in ("write", "trim", "zero")
        for other in self.asked.values():
            overlap = other.offset < offset + length and offset < other.offset + other.length
            if overlap and (changes or other.changes):
                return
        now = bytes(self.content[offset : offset + length])
        fua = chance.random() < 0.1
        if kind == "read":
            cookie = self.peer.read(offset, length, dont_fragment=self.structured and chance.random() < 0.2)
        elif kind == "write":
            now = chance.randbytes(length)
            cookie = self.peer.write(offset, now, fua=fua)
        elif kind == "trim":
            # What is not a multiple of the alignment stays as it is.
            first = -(-offset // self.alignment) * self.alignment
            last = max(first, (offset + length) // self.alignment * self.alignment)
            if first < last:
                now = now[: first - offset] + bytes(last - first) + now[last - offset :]
            cookie = self.peer.trim(offset, length, fua=fua)
        elif kind == "zero":
            now = bytes(length)
            cookie = self.peer.write_zeroes(offset, length, fua=fua, no_hole=chance.random() < 0.5)
        elif kind == "cache":
            cookie = self.peer.cache(offset, length)
        elif self.structured:
            cookie = self.peer.block_status(offset, length, one=chance.random() < 0.3)
        else:
            return
        if changes:
            self.content[offset : offset + length] = now
        self._note(cookie, Asked(kind, offset, length, now, changes))

    def _note(self, cookie: int, asked: Asked) -> None:
        self.asked[cookie] = asked

    def take(self, completion: Completion) -> None:
        asked = self.asked.pop(completion.cookie)
        del self.peer.done[completion.cookie]
        assert completion.error == 0, (asked.kind, completion)
        if asked.kind == "read":
            assert completion.data == asked.expected
        elif asked.kind == "status":
            (extents,) = completion.extents.values()
            position = 0
            for length, flags in extents:
                part = asked.expected[position : position + length]
                assert not flags & STATE_ZERO or part == bytes(len(part))
                position += length
            assert 0 < position <= asked.length
        self.answered += 1


def run(seed: int, bench_type: type[Bench] = Bench) -> None:
    """One machine and its load."""
    chance = random.Random(f"load/{seed}")
    odds = Odds(at_once=chance.choice((0.0, 0.1, 0.5)), empty_wait=chance.choice((0.0, 0.1)))
    with bench_type(seed, odds=odds, address=chance.choice((UNIX, INET))) as bench:
        bench.host.network.buffer_bytes = chance.choice((700, 5000, 40_000, 212_992))
        bench.host.network.delay_ns = chance.choice(((0, 0), (1000, 90_000)))
        direct = chance.random() < 0.4
        clients = chance.randint(1, 3)
        content = bytearray(chance.randbytes(REGION * clients))
        window = chance.choice((0, 0, 4096))
        bench.host.add_file(
            "disk.raw", bytes(window) + content, cached=chance.choice(("always", "never", "random", "random"))
        )
        node = bench.file("disk.raw", direct=direct, unmap=True)
        top = RawNode(bench.graph, file=node, offset=window, unmap=True) if chance.random() < 0.6 or window else node
        bench.export("disk", top)
        loads = []
        for number in range(clients):
            structured = chance.random() < 0.7
            peer = bench.client("disk", structured_replies=structured)
            peer.packet_max = chance.choice((13, 100, 3000, 1 << 20))
            load = Load(peer, content, number * REGION, REGION, node.request_alignment, chance, structured)
            peer.on_done = load.take
            loads.append(load)
        asked = 0
        for _ in range(ROUNDS):
            for load in loads:
                for _ in range(chance.choice((0, 1, 5))):
                    if len(load.asked) < 40:
                        before = len(load.asked)
                        load.ask()
                        asked += len(load.asked) - before
            for _ in range(chance.choice((1, 1, 2, 10))):
                bench.context.poll(chance.random() < 0.5 and any(load.asked and load.peer.reading for load in loads))
            event = chance.random()
            if event < 0.08:
                drained(bench, top)
            elif event < 0.3:
                peer = chance.choice(loads).peer
                (peer.pause if peer.reading else peer.resume)()
            if not any(load.peer.reading for load in loads):
                loads[0].peer.resume()
        for load in loads:
            load.peer.resume()
            assert load.peer.wait_all() == []
            assert not load.asked and load.peer.raw == b""
        assert sum(load.answered for load in loads) == asked
        statistics = bench.exports[0].statistics
        assert statistics.failed == statistics.rejected == 0
        loads[0].peer.on_done = None
        loads[0].peer.good(loads[0].peer.flush())
        assert bench.host.durable_content("disk.raw")[window:] == content
        for load in loads:
            check_idle(bench.transmission(load.peer))
        backend = bench.exports[0].backend.statistics()
        assert backend.in_flight == backend.parked == 0
        assert not bench.log


def drained(bench: Bench, node: object) -> None:
    """A drained section: nothing is in flight, nothing of the file waits to be sent, requests that come wait."""
    with bench.graph.drained(node):  # type: ignore[arg-type]
        for _ in range(3):
            assert bench.context.engine.in_flight == 0
            for connection in bench.server.connections:
                assert not any(isinstance(piece, _FileRange) for piece, _ in connection.output._pieces)
            bench.context.poll(False)


def test_random_load_gets_every_answer_once_and_right(seed: int) -> None:
    for variant in range(SEEDS_PER_TEST):
        run(seed * SEEDS_PER_TEST + variant)
