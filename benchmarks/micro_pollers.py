# SPDX-License-Identifier: Apache-2.0
"""How many nanoseconds each monitor takes to tell which descriptors are ready, all in the same run.

    PYTHONPATH=src python3 benchmarks/micro_pollers.py [words of a row]

The rounds of all kinds alternate, so that a noisy machine disturbs them alike; the medians are printed, and beside
them the ratio to epoll, which is what two machines have in common. A kind that is refused here is left out.
"""

from __future__ import annotations

import os
import platform
import resource
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.linux.poller import POLLER_KINDS
from bottomhalf.host.protocol import IN, Poller

COUNT = 200
ROUNDS = 31
DESCRIPTORS_MAX = 1000
SHAPES = ((1, 0), (1, 1), (32, 0), (32, 1), (32, 32), (1000, 0), (1000, 1), (1000, 32))  # registered, ready

Operation = Callable[[], object]


def waiting(poller: Poller, ready: int) -> Operation:
    """wait(0) on descriptors of which the same few are always ready."""

    def wait() -> None:
        call, seen = poller.wait, 0
        for _ in range(COUNT):
            seen = len(call(0))
        assert seen == ready or (seen > 0 and ready > 20)  # a ring may tell the rest the next time

    return wait


def serving(poller: Poller, fds: list[int]) -> Operation:
    """One of the descriptors becomes ready, is told, and is read empty: what a loop does all day."""

    def serve() -> None:
        wait, write, read = poller.wait, os.eventfd_write, os.eventfd_read
        for turn in range(COUNT):
            write(fds[turn % len(fds)], 1)
            for fd, _ in wait(-1):
                read(fd)

    return serve


def changing(poller: Poller, fd: int) -> Operation:
    """unregister() and register(), with a wait between them, so that the kernel really has it."""

    def change() -> None:
        for _ in range(COUNT):
            poller.unregister(fd)
            poller.register(fd, IN)
            poller.wait(0)

    return change


class PingPong:
    """Two threads, each with a poller of its own, and a byte that goes to and fro between two sockets. All on one
    processor: on two it is chance whether one of them has fallen asleep, which costs ten times the rest."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.near, self.far = socket.socketpair()
        self.poller = LinuxHost().poller(kind)
        self.poller.register(self.near.fileno(), IN)
        self.processors = {min(os.sched_getaffinity(0))}
        self.thread = threading.Thread(target=self.answer)
        self.thread.start()

    def answer(self) -> None:
        os.sched_setaffinity(0, self.processors)
        poller = LinuxHost().poller(self.kind)
        poller.register(self.far.fileno(), IN)
        while True:
            if poller.wait(-1):
                data = self.far.recv(1)
                if not data:
                    break
                self.far.send(data)
        poller.close()

    def serve(self) -> None:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.processors)
        for _ in range(COUNT):
            self.near.send(b"x")
            while not self.poller.wait(-1):
                pass
            self.near.recv(1)
        os.sched_setaffinity(0, before)

    def close(self) -> None:
        self.near.shutdown(socket.SHUT_WR)
        self.thread.join()
        self.poller.close()
        self.near.close()
        self.far.close()


def medians_ns(operations: list[Operation]) -> list[float]:
    """Nanoseconds for one of the COUNT operations that each call does."""
    taken: list[list[float]] = [[] for _ in operations]
    for _ in range(ROUNDS):
        for operation, times in zip(operations, taken, strict=True):
            begin = time.perf_counter_ns()
            operation()
            times.append((time.perf_counter_ns() - begin) / COUNT)
    return [statistics.median(times) for times in taken]


def row(name: str, operations: list[Operation]) -> None:
    figures = medians_ns(operations)
    ratios = "".join(f" {figure / figures[0]:>10.2f}" for figure in figures[1:])
    print(f"{name:38}" + "".join(f" {figure:>9.0f}" for figure in figures) + ratios)


def available() -> list[str]:
    kinds = []
    for kind in POLLER_KINDS:
        try:
            LinuxHost().poller(kind).close()
        except OSError as refused:
            print(f"{kind}: {refused}")
        else:
            kinds.append(kind)
    return kinds


class Crowd:
    """A poller of one kind with descriptors of its own, for a descriptor wakes everybody who watches it."""

    def __init__(self, kind: str, registered: int, ready: int) -> None:
        self.ready = ready
        self.fds = [os.eventfd(n < ready, os.EFD_NONBLOCK) for n in range(registered)]
        self.poller = LinuxHost().poller(kind)
        for fd in self.fds:
            self.poller.register(fd, IN)

    def close(self) -> None:
        self.poller.close()
        for fd in self.fds:
            os.close(fd)


def main() -> None:
    def compare(name: str, make: Callable[[str], Any], operation: Callable[[Any], Operation]) -> None:
        if all(word in name for word in sys.argv[1:]):
            made = [make(kind) for kind in kinds]
            row(name, [operation(one) for one in made])
            for one in made:
                one.close()

    kinds = available()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * DESCRIPTORS_MAX)), hard))
    print(f"CPython {platform.python_version()}, ns per operation, medians of {ROUNDS} rounds of {COUNT}")
    heads = "".join(f" {f'/{kinds[0]}':>10}" for _ in kinds[1:])
    print(f"{'':38}" + "".join(f" {kind:>9}" for kind in kinds) + heads)
    for registered, ready in SHAPES:
        compare(
            f"wait(0), {registered} registered, {ready} ready",
            partial(Crowd, registered=registered, ready=ready),
            lambda crowd: waiting(crowd.poller, crowd.ready),
        )
    for registered in (1, 32, DESCRIPTORS_MAX):
        compare(
            f"event, wait(-1), read, {registered} registered",
            partial(Crowd, registered=registered, ready=0),
            lambda crowd: serving(crowd.poller, crowd.fds),
        )
    compare(
        "unregister, register, wait(0)",
        partial(Crowd, registered=1, ready=0),
        lambda crowd: changing(crowd.poller, crowd.fds[0]),
    )
    compare("ping-pong of two threads", PingPong, lambda pair: pair.serve)


if __name__ == "__main__":
    main()
