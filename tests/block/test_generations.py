# SPDX-License-Identifier: Apache-2.0
"""Flushes that find nothing to do are free, and no other is."""

from __future__ import annotations

import random
from typing import Any

from bottomhalf.host.request import FLUSH, WRITE
from tests.block.bench import Bench, discard, flush, read, sim_bench, write, zero

SIZE = 65536


class Counted:
    """Counts the flushes that reach the engine."""

    def __init__(self, it: Bench) -> None:
        self.count = 0
        engine: Any = it.context.engine
        submit = engine.submit

        def counting(file: Any, requests: list[Any], *rest: Any) -> None:
            self.count += sum(request.op == FLUSH for request in requests)
            submit(file, requests, *rest)

        engine.submit = counting

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


def test_nothing_written_nothing_to_do(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        user = it.user(it.file("disk", unmap=True))
        counted = Counted(it)
        assert user.submit(flush()) == [] and counted.take() == 0
        for request in (write(0, b"x"), zero(0, 512), discard(0, 4096)):
            assert user.do(request) == [0]
            assert user.do(flush()) == [0] and counted.take() == 1
            assert user.submit(flush()) == [] and counted.take() == 0
            assert user.do(read(0, 512)) == [0]
            assert user.submit(flush()) == [] and counted.take() == 0
        it.context.run(user.backend.node.co_truncate(SIZE + 512))
        assert user.do(flush()) == [0] and counted.take() == 1


def test_a_flush_that_failed_is_repeated(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        user = it.user(it.file("disk"))
        counted = Counted(it)
        it.host.fault(path="disk", op=FLUSH, errno=5, times=1)
        assert user.do(write(0, b"x")) == [0]
        assert user.do(flush()) == [-5]
        assert user.do(flush()) == [0]
        assert counted.take() == 2


def test_what_ends_after_a_flush_began_is_not_durable_by_it(seed: int) -> None:
    """What was told durable is, also after a flush that the driver took for unnecessary."""
    chance = random.Random(seed)
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "never")
        user = it.user(it.file("disk", direct=chance.random() < 0.5))
        for number in range(1, 30):
            data = bytes([number]) * 512
            offset = chance.randrange(SIZE // 512) * 512
            request, early = write(offset, data), flush()
            user.submit(request)
            user.submit(early)
            while id(request) in user.waiting or (chance.random() < 0.5 and user.waiting):
                it.context.poll(True)
            late = flush()
            user.do(late)
            assert late.result == 0
            if chance.random() < 0.2:
                assert it.host.survivor("disk")[offset : offset + 512] == data
        assert any(request.op == WRITE for request in user.told)
