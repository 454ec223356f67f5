# SPDX-License-Identifier: Apache-2.0
"""What the tests of filters share: opening a node from options as QMP has them, and a model of a disk's bytes."""

from __future__ import annotations

import random
from typing import Any

from bottomhalf.block import Node
from bottomhalf.drivers.registry import open_node
from bottomhalf.host.request import DISCARD, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.block.bench import Bench, User, flush, read, write, zero


def opened(it: Bench, options: dict[str, Any]) -> Node:
    """The node that ``blockdev-add`` would make."""
    return open_node(it.graph, from_json(BlockdevOptions, options))


def random_requests(chance: random.Random, size: int, longest: int = 3000) -> list[Request]:
    """A list of one op whose ranges do not overlap, so that their order means nothing."""
    op = chance.choice([READ, READ, WRITE, WRITE, WRITE_ZEROES])
    cuts = sorted(chance.sample(range(size + 1), 2 * chance.randrange(1, 5)))
    made = []
    for begin, end in zip(cuts[::2], cuts[1::2], strict=True):
        length = min(end - begin, chance.randrange(longest))
        if op == READ:
            made.append(read(begin, length))
        elif op == WRITE:
            made.append(write(begin, chance.randbytes(length)))
        else:
            made.append(zero(begin, length))
    return made


def play(user: User, model: bytearray, chance: random.Random, steps: int, longest: int = 3000) -> None:
    """Random requests, batches and single ones; what is read is what the model has, after every step."""
    for _ in range(steps):
        requests = random_requests(chance, len(model), longest)
        expected = []
        for request in requests:
            begin, end = request.offset, request.offset + request.length
            if request.op == WRITE:
                model[begin:end] = request.buffer
            elif request.op != READ:
                assert request.op != DISCARD
                model[begin:end] = bytes(request.length)
            expected.append(bytes(model[begin:end]))
        assert user.do(*requests) == [0] * len(requests)
        if requests[0].op == READ:
            assert [bytes(request.buffer) for request in requests] == expected
        if chance.random() < 0.1:
            assert user.do(flush()) == [0]
    everything = read(0, len(model))
    assert user.do(everything) == [0]
    assert everything.buffer == model
