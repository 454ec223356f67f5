# SPDX-License-Identifier: Apache-2.0
"""Drivers under an export that raise, and drivers that complete older requests while they take new ones."""

from __future__ import annotations

import errno

import pytest

from bottomhalf.block import Node
from bottomhalf.exports.nbd import transmission as transmission_module
from bottomhalf.exports.nbd.export import NbdExport
from bottomhalf.host.request import FLUSH, IN_PROGRESS, READ, Request
from tests.exports.nbd_bench import Bench, check_idle

MIB = 1 << 20


class Broken(Node):
    """A driver with a bug."""

    driver = "broken"

    def open_size(self) -> int:
        return 4096

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        raise ZeroDivisionError("a bug in a driver")


def test_a_bug_in_the_block_layer_ends_the_connection_and_is_seen() -> None:
    """Its client shall not wait for ever; others are served."""
    with Bench() as bench:
        content = bench.disk(4096)
        node = Broken(bench.graph)
        node.size = 4096
        export = bench.export("broken", node, writable=False)
        seen: list[str] = []
        bench.context.exception_handler = lambda context, error, where: seen.append(str(error))
        client, other = bench.client("broken"), bench.client("disk")
        client.read(0, 512)
        client.wait_end()
        assert seen == ["a bug in a driver"]
        assert any("a bug in a driver" in line for line in bench.log)
        assert other.good(other.read(0, 4096)).data == content
        bench.until(lambda: not export.connections, "the connection to be forgotten")
        _forget_lost_request(bench, export)


def _forget_lost_request(bench: Bench, export: NbdExport) -> None:
    """Nobody can know what became of it: it stays counted, and its memory belongs to whoever may write there."""
    bench.transmissions.clear()
    export.backend.in_flight = 0


class Sudden(Node):
    """A driver that fails with an OSError where it should have set results."""

    driver = "sudden"

    def open_size(self) -> int:
        return 4096

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if requests[0].op == FLUSH:
            return self.finish(requests, 0)
        raise BlockingIOError(errno.EAGAIN, "not now")


def test_an_os_error_out_of_the_block_layer_is_not_lost() -> None:
    """Even one that looks like an empty socket: the requests cannot be answered, so the connection ends."""
    with Bench() as bench:
        node = Sudden(bench.graph)
        node.size = 4096
        export = bench.export("sudden", node, writable=False)
        client = bench.client("sudden")
        client.read(0, 512)
        client.wait_end()
        assert any("not now" in line for line in bench.log)
        _forget_lost_request(bench, export)


class Waking(Node):
    """Ends an older request whenever it takes a new one, from inside the call, as a lock that is passed on does."""

    driver = "waking"

    def open_size(self) -> int:
        return MIB

    held: list[Request]

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if requests[0].op == FLUSH:
            return self.finish(requests, 0)
        older, self.held = self.held, list(requests)
        if older:
            self.end(older)
        return requests

    def end(self, requests: list[Request]) -> None:
        for each in requests:
            assert each.result == IN_PROGRESS
            if each.op == READ:
                each.buffer[:] = each.offset.to_bytes(8, "big") * (each.length // 8)
            each.result = 0
        owner = requests[0].owner
        assert owner is not None
        owner.complete(requests)


@pytest.mark.parametrize("vanish", [False, True], ids=["stays", "vanishes"])
def test_completions_from_inside_a_submission(seed: int, vanish: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """We are called while we serve: nothing is served twice, forgotten, or closed under our feet."""
    if seed % 2:
        # Often no room, and then something left to serve: progress() does it.
        monkeypatch.setattr(transmission_module, "UNSENT_BYTES_MAX", 2000)
        monkeypatch.setattr(transmission_module, "REQUESTS_IN_FLIGHT_MAX", 6)
    with Bench(seed) as bench:
        bench.host.network.buffer_bytes = bench.random.choice((100, 3000, 100_000))
        node = Waking(bench.graph)
        node.size = MIB
        node.held = []
        export = bench.export("waking", node)
        client = bench.client("waking", structured_replies=seed % 2 == 0)
        transmission = bench.transmission(client)
        asked = {}
        for number in range(300):
            kind = bench.random.randrange(5)
            if kind < 3:
                asked[client.read(number * 512, 512)] = number
            elif kind == 3:
                client.write(number * 512, bytes(100))
            else:
                client.write_zeroes(number * 512, 512)
            client.block_status(0, 512) if seed % 2 == 0 else client.cache(0, 512)
            if bench.random.random() < 0.1:
                bench.context.poll(False)
            if bench.random.random() < 0.02:
                (client.pause if client.reading else client.resume)()
            if vanish and number == 150 + seed:
                client.close()
                break
        client.reading = True
        client.watch()
        while vanish and not transmission._connection.closed:
            bench.context.poll(False)
        older: list[Request] = []
        while client.in_flight and not vanish:
            bench.context.poll(False)
            if node.held and not client.unsent and bench.random.random() < 0.2:
                older, node.held = node.held, []
                node.end(older)
        if vanish:
            if node.held:
                older, node.held = node.held, []
                node.end(older)
            bench.until(lambda: not bench.server.connections, "the connection to be forgotten")
        else:
            for completion in client.wait_all():
                assert completion.error == 0
                if completion.cookie in asked:
                    assert completion.data == (asked[completion.cookie] * 512).to_bytes(8, "big") * 64
            check_idle(transmission)
        assert export.backend.in_flight == 0
        older = []  # their buffers
