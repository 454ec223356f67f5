# SPDX-License-Identifier: Apache-2.0
"""Replies that share the image's pages with a client that has not read them yet."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest

from bottomhalf.drivers.qcow2.node import Qcow2Node, co_read_header
from bottomhalf.host.protocol import InetAddress, UnixAddress
from tests.drivers.qcow2.bench import make
from tests.exports.nbd_bench import INET, UNIX, Bench, Peer

KIB = 1024
CLUSTER = 64 * KIB
SIZE = 8 << 20
LENGTH = 4 * CLUSTER  # large enough to be sent from the file


def image(bench: Bench) -> Qcow2Node:
    """An export of a qcow2 image in which everything is allocated and in memory, all ones."""
    make(bench.host, "disk.qcow2", size=SIZE)
    bench.host.disk.files["disk.qcow2"].cached = "always"
    file = bench.file("disk.qcow2", unmap=True)
    node = Qcow2Node(bench.graph, "disk", file=file, header=bench.context.run(co_read_header(file)), unmap=True)
    bench.context.run(node.open())
    bench.context.run(node.co_pwrite(0, memoryview(b"\1" * SIZE)))
    bench.context.run(node.co_flush())
    bench.export("disk", node)
    return node


def reuse(bench: Bench, client: Peer) -> None:
    """Discard what another client reads, and write twos wherever there is room."""
    client.good(client.trim(0, LENGTH))
    client.good(client.flush())
    client.good(client.flush())
    for n, at in zip(range(8), cycle(range(4)), strict=False):
        client.good(client.write(at * CLUSTER, b"\2" * CLUSTER))
        client.good(client.trim(at * CLUSTER, CLUSTER))
        if n % 2:
            client.good(client.flush())


def what_a_slow_client_reads(seed: int, address: UnixAddress | InetAddress = UNIX) -> set[int]:
    with Bench(seed, address=address) as bench:
        node = image(bench)
        bench.host.network.buffer_bytes = bench.random.choice((5000, LENGTH // 2, 2 * LENGTH))
        slow, quick = bench.client("disk"), bench.client("disk")
        slow.pause()
        cookie = slow.read(0, LENGTH)
        bench.until(lambda: bench.exports[0].statistics.reads, "the read to be served")
        reuse(bench, quick)
        slow.resume()
        data = slow.good(cookie).data
        if address == UNIX:
            bench.until(lambda: not node.metadata._active, "the place to be given back")
        quick.good(quick.flush())
        return set(data)


def test_a_freed_cluster_waits_for_the_client_that_reads_it(seed: int) -> None:
    """What was there, or the nothing that a discard leaves; not what others keep at that place now."""
    assert what_a_slow_client_reads(seed) <= {0, 1}


def test_without_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qcow2Node, "hold_bytes", lambda self: None)
    seen = set()
    for seed in range(30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bench, "until", _not_for_the_place(Bench.until))
            seen |= what_a_slow_client_reads(seed)
    assert 2 in seen


def _not_for_the_place(until: Any) -> Any:
    def wait(self: Bench, condition: Any, what: str) -> None:
        if what != "the place to be given back":
            until(self, condition, what)

    return wait


def test_over_tcp_nothing_is_lent(seed: int) -> None:
    assert what_a_slow_client_reads(seed, INET) <= {0, 1}


def test_a_connection_that_ends_gives_back_when_its_client_has_read(seed: int) -> None:
    with Bench(seed) as bench:
        node = image(bench)
        bench.host.network.buffer_bytes = 2 * LENGTH
        client = bench.client("disk")
        client.pause()
        client.read(0, LENGTH)
        connection = bench.connection(client)
        bench.until(lambda: bench.exports[0].statistics.reads and not connection.output, "the reply to be sent")
        connection.close()
        assert node.metadata._active, "the client has not read it yet"
        assert not connection.socket.closed  # type: ignore[attr-defined]
        if bench.random.random() < 0.5:
            client.resume()
            client.wait_end()
        else:
            client.close()
        bench.until(lambda: not node.metadata._active, "the place to be given back")
        assert connection.socket.closed  # type: ignore[attr-defined]
