# SPDX-License-Identifier: Apache-2.0
"""Microseconds per wait of the three monitors of descriptors, in one process, rounds alternating.

    PYTHONPATH=src python3 -m benchmarks.micro_pollers

This is what ``poller="auto"`` was decided by.
"""

from __future__ import annotations

import os
import platform
import resource
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Final

from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import IN, Poller

KINDS: Final = ("epoll", "poll", "io_uring")
ROUNDS: Final = 15
COUNT: Final = 300


def watching(poller: Poller, watched: int, ready: int) -> list[int]:
    """Register so many descriptors, of which some are ready for ever."""
    fds = [os.eventfd(int(n < ready), os.EFD_NONBLOCK) for n in range(watched)]
    for fd in fds:
        poller.register(fd, IN)
    return fds


def waits(poller: Poller, watched: int, ready: int) -> float:
    """Microseconds for a wait that finds ``ready`` of ``watched``."""
    fds = watching(poller, watched, ready)
    wait = poller.wait
    wait(0)
    begin = time.perf_counter()
    for _ in range(COUNT):
        wait(0)
    taken = time.perf_counter() - begin
    for fd in fds:
        poller.unregister(fd)
        os.close(fd)
    poller.wait(0)
    return taken / COUNT * 1e6


def changes(poller: Poller) -> float:
    """Microseconds to register, wait and unregister one descriptor."""
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    begin = time.perf_counter()
    for _ in range(COUNT):
        poller.register(fd, IN)
        poller.wait(0)
        poller.unregister(fd)
    taken = time.perf_counter() - begin
    poller.wait(0)
    os.close(fd)
    return taken / COUNT * 1e6


def ping_pong(poller: Poller) -> float:
    """Microseconds for a byte to another thread, which blocks in recv, and back."""
    here, there = socket.socketpair()

    def answer() -> None:
        while data := there.recv(1):
            there.send(data)

    thread = threading.Thread(target=answer)
    thread.start()
    poller.register(here.fileno(), IN)
    begin = time.perf_counter()
    for _ in range(COUNT):
        here.send(b"x")
        while not poller.wait(-1):
            pass
        here.recv(1)
    taken = time.perf_counter() - begin
    poller.unregister(here.fileno())
    here.close()
    thread.join()
    there.close()
    poller.wait(0)
    return taken / COUNT * 1e6


ROWS: Final[dict[str, Callable[[Poller], float]]] = {
    "1 watched, none ready": lambda poller: waits(poller, 1, 0),
    "1 watched, 1 ready": lambda poller: waits(poller, 1, 1),
    "32 watched, 1 ready": lambda poller: waits(poller, 32, 1),
    "32 watched, 32 ready": lambda poller: waits(poller, 32, 32),
    "1000 watched, 1 ready": lambda poller: waits(poller, 1000, 1),
    "1000 watched, 32 ready": lambda poller: waits(poller, 1000, 32),
    "register, wait, unregister": changes,
    "ping-pong with a thread": ping_pong,
}


def main() -> None:
    """Measure, and print a table."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    host = LinuxHost()
    pollers: dict[str, Poller] = {}
    for kind in KINDS:
        try:
            pollers[kind] = host.poller(kind)
        except OSError as refused:
            print(f"{kind}: {refused}")
    print(f"CPython {platform.python_version()}, us per operation, medians of {ROUNDS} rounds of {COUNT}")
    print(f"{'':28}" + "".join(f"{kind:>10}" for kind in pollers))
    for name, measure in ROWS.items():
        taken: dict[str, list[float]] = {kind: [] for kind in pollers}
        for _ in range(ROUNDS):
            for kind, poller in pollers.items():
                taken[kind].append(measure(poller))
        print(f"{name:28}" + "".join(f"{statistics.median(values):>10.2f}" for values in taken.values()))
    for poller in pollers.values():
        poller.close()


if __name__ == "__main__":
    main()
