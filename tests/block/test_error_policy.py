# SPDX-License-Identifier: Apache-2.0
"""rerror and werror: reported, ignored, or kept until somebody has made room."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from bottomhalf.aio import wait_while
from bottomhalf.block.error_policy import ErrorAction, ErrorPolicy, IoError, IoStatus, OnError, PolicyQueue
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.request import READ, WRITE, Request
from tests.block.bench import Bench, flush, read, sim_bench, write
from tests.drivers.helpers import Ram

SIZE = 65536


@pytest.mark.parametrize(
    ("policy", "op", "number", "action"),
    [
        (OnError.REPORT, WRITE, errno.ENOSPC, ErrorAction.REPORT),
        (OnError.IGNORE, WRITE, errno.EIO, ErrorAction.IGNORE),
        (OnError.STOP, WRITE, errno.EIO, ErrorAction.STOP),
        (OnError.ENOSPC, WRITE, errno.EIO, ErrorAction.REPORT),
        (OnError.ENOSPC, WRITE, errno.ENOSPC, ErrorAction.STOP),
        (OnError.AUTO, WRITE, errno.ENOSPC, ErrorAction.STOP),
        (OnError.AUTO, READ, errno.ENOSPC, ErrorAction.REPORT),
        (OnError.AUTO, READ, errno.EIO, ErrorAction.REPORT),
    ],
)
def test_actions(policy: OnError, op: int, number: int, action: ErrorAction) -> None:
    kind = {"rerror": policy} if op == READ else {"werror": policy}
    assert ErrorPolicy(**kind).action(op, number) == action


class Guest:
    def __init__(self, it: Bench, rerror: OnError = OnError.AUTO, werror: OnError = OnError.AUTO) -> None:
        self.ram = Ram(it.graph, bytes(SIZE + 512), "ram")
        self.backend = it.backend(RawNode(it.graph, "raw", file=self.ram, offset=512))
        self.told: list[Request] = []
        self.errors: list[IoError] = []
        self.queue = PolicyQueue(
            self.backend, ErrorPolicy(rerror, werror), self.told.extend, on_error=self.errors.append
        )
        self.it = it

    def submit(self, *requests: Request) -> None:
        for request in requests:
            request.owner = self.queue
        pending = self.queue.submit(list(requests))
        waiting = {id(request) for request in pending}
        self.told += [request for request in requests if id(request) not in waiting]

    def settle(self) -> None:
        wait_while(self.it.context, lambda: self.backend.in_flight, what="the disk")


def test_report_and_ignore(seed: int) -> None:
    with sim_bench(seed) as it:
        guest = Guest(it, OnError.IGNORE, OnError.REPORT)
        guest.ram.fail |= {"read": errno.EIO, "write": errno.EIO}
        first, second = read(0, 512), write(0, b"x")
        guest.submit(first)
        guest.submit(second)
        guest.settle()
        assert (first.result, second.result) == (0, -errno.EIO)
        assert {(e.operation, e.action, e.nospace) for e in guest.errors} == {
            ("read", ErrorAction.IGNORE, False),
            ("write", ErrorAction.REPORT, False),
        }
        assert guest.errors[0].node_name == "raw" and guest.errors[0].reason == "Input/output error"
        assert guest.queue.status == IoStatus.OK


def test_stopped_for_space_and_tried_again(seed: int) -> None:
    chance = random.Random(seed)
    with sim_bench(seed) as it:
        guest = Guest(it)
        guest.ram.fail["write"] = errno.ENOSPC
        requests = [write(n * 512, bytes([n]) * 512) for n in range(1, 20)]
        cut = chance.randrange(1, 19)
        guest.submit(*requests[:cut])
        guest.settle()
        assert guest.queue.status == IoStatus.NOSPACE and not guest.told
        guest.submit(*requests[cut:])
        guest.submit(read(0, 512))
        assert guest.queue.kept == 20 and guest.backend.in_flight == 0, "nothing new is started"
        with it.graph.drained(guest.ram):
            pass
        guest.queue.resume()  # too early
        guest.settle()
        assert guest.queue.stopped and len(guest.told) <= 1
        del guest.ram.fail["write"]
        while guest.queue.stopped:
            guest.queue.resume()
            guest.settle()
        assert {id(request) for request in guest.told} >= {id(request) for request in requests}
        assert all(request.result == 0 for request in guest.told)
        assert guest.ram.content[1024:] == b"".join(bytes([n]) * 512 for n in range(1, 20)) + bytes(SIZE - 20 * 512)


def test_what_fails_again_stays_first(seed: int) -> None:
    with sim_bench(seed) as it:
        guest = Guest(it, werror=OnError.STOP)
        first, second = write(0, b"1"), flush()
        guest.ram.fail["write"] = errno.EIO
        guest.ram.delay_ns = 0
        guest.submit(first)
        guest.submit(second)
        guest.queue.resume()
        assert guest.queue.kept == 2
        guest.queue.give_up()
        assert guest.told == [first, second]


def test_what_fails_late_keeps_its_place(seed: int) -> None:
    """Of two on their way the later one fails first; in between something new comes."""
    with sim_bench(seed) as it:
        guest = Guest(it, rerror=OnError.STOP, werror=OnError.STOP)
        guest.ram.fail |= {"write": errno.EIO, "read": errno.EIO}
        guest.ram.delay_ns = 128 * 10**9
        late, early, new = write(0, b"1"), read(0, 1), flush()
        guest.submit(late)
        guest.ram.delay_ns = 0
        guest.submit(early)
        guest.submit(new)
        guest.settle()
        guest.queue.give_up()
        assert guest.told == [late, early, new]


def test_the_disk_goes_away(seed: int) -> None:
    with sim_bench(seed) as it:
        guest = Guest(it, werror=OnError.STOP)
        guest.ram.fail["write"] = errno.EIO
        requests: list[Any] = [write(0, b"x"), write(1, b"y")]
        guest.submit(requests[0])
        guest.settle()
        guest.submit(requests[1])
        assert guest.queue.status == IoStatus.FAILED
        guest.queue.give_up()
        assert guest.told == requests
        assert [request.result for request in requests] == [-errno.EIO, -errno.ENOMEDIUM]
