# SPDX-License-Identifier: Apache-2.0
"""The same seed gives the same run; another seed another."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from bottomhalf.host.protocol import IN, OUT, UnixAddress
from bottomhalf.host.request import FLUSH, IN_PROGRESS, READ, WRITE, Request
from bottomhalf.host.sim import SimHost


def run(seed: int) -> tuple[list[tuple[Any, ...]], bytes, bytes]:
    """A little program: a disk, a connection, and everything that waits."""
    host = SimHost(seed, trace=True)
    host.add_file("a.raw", bytes(range(256)) * 256)
    host.network.delay_ns = (0, 50_000)
    host.network.buffer_bytes = 700
    file, engine, poller = host.open_file("a.raw"), host.engine(), host.poller()
    listener = host.listen(UnixAddress("/run/nbd.sock"))
    near = host.connect(UnixAddress("/run/nbd.sock"))
    far = listener.accept()
    poller.register(engine.fileno(), IN)
    poller.register(near.fileno(), OUT)
    poller.register(far.fileno(), IN)
    requests = [Request(READ, n * 4096, 4096, bytearray(4096)) for n in range(8)]
    requests += [Request(WRITE, n * 1000, 1000, host.random_bytes(1000)) for n in range(8)]
    host.shuffle(requests)
    slow = file.read_inline([request for request in requests if request.op == READ])
    slow += file.write_inline([request for request in requests if request.op == WRITE])
    for request in [*slow, Request(FLUSH)]:
        engine.prepare(file, request)
    engine.enter()
    to_send, received, buffer = b"hello " * 500, bytearray(), bytearray(1000)
    while engine.in_flight or len(received) < 3000:
        if engine.pending:
            engine.reap()
        for fd, _ in poller.wait(10**9):
            if fd == engine.fileno():
                engine.reap()
            elif fd == near.fileno():
                to_send = to_send[near.send(to_send) :]
                if not to_send:
                    poller.modify(fd, 0)
            else:
                received += buffer[: far.recv_into(buffer)]
    assert all(request.result != IN_PROGRESS for request in requests)
    assert bytes(received) == b"hello " * 500
    return host.trace, host.content("a.raw"), host.survivor("a.raw")


def test_same_seed_same_run() -> None:
    assert run(5) == run(5)


def test_other_seed_other_run() -> None:
    assert len({str(run(seed)[0]) for seed in range(8)}) == 8


def test_same_seed_same_run_in_another_process() -> None:
    """Nothing depends on addresses or on the hash seed of the process."""
    code = "from tests.host.sim.test_determinism import run; print(run(5))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": str(hash_seed)},
        ).stdout
        for hash_seed in (1, 2)
    }
    assert runs == {f"{run(5)}\n".encode()}


def test_trace_is_off_unless_asked_for() -> None:
    host = SimHost()
    host.poller().wait(10)
    assert host.trace == []
