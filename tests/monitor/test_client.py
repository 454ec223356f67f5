# SPDX-License-Identifier: Apache-2.0
"""Our QMP client against our monitors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bottomhalf.aio import Coroutine, TimedOut, gather, sleep_ns
from bottomhalf.host.protocol import UnixAddress
from bottomhalf.host.sim import Odds
from bottomhalf.monitor.client import QmpClient
from bottomhalf.monitor.qmp import QmpMonitor
from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.qmp import Event, Failure
from tests.monitor.qmp_bench import NBD, QmpBench

ADDRESS = UnixAddress("/run/qmp.sock")
SECOND_NS = 1_000_000_000


def talk(bench: QmpBench, body: Callable[[QmpClient], Any], **options: bool) -> Any:
    """Run ``body(client)`` with a client that is connected."""

    failures: list[Exception] = []

    async def run() -> Any:
        try:
            client = await QmpClient.connect(bench.context, ADDRESS, **options)
            try:
                return await body(client)
            finally:
                client.close()
        except Exception as error:  # nobody awaits it: it would be reported as a defect of the program
            failures.append(error)

    running: Coroutine = bench.context.enter(run())
    bench.until(lambda: running.done, "the end of the conversation")
    if failures:
        raise failures[0]
    return running.result()


async def serve_null(client: QmpClient) -> None:
    await client.execute("blockdev-add", {"driver": "null-co", "node-name": "n"})
    await client.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": NBD.path}}})
    await client.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "n"})


def test_until_an_event(seed: int) -> None:
    async def body(client: QmpClient) -> Event:
        assert client.greeting is not None and client.greeting.capabilities == ["oob"]
        await serve_null(client)
        gone = "BLOCK_EXPORT_DELETED"
        event = await client.execute("block-export-del", {"id": "e"}, until=gone, timeout_ns=SECOND_NS)
        assert isinstance(event, Event)
        return event

    with QmpBench(seed, odds=Odds(short_recv=0.9, short_send=0.9)) as bench:
        bench.monitor()
        assert talk(bench, body).data == {"id": "e"}


def test_many_at_a_time(seed: int) -> None:
    async def body(client: QmpClient) -> list[Any]:
        async def refused() -> str:
            with pytest.raises(Failure) as caught:
                await client.execute("blockdev-del", {"node-name": "no"})
            return caught.value.desc

        names = [client.execute("query-version"), refused(), client.execute("x-explain", oob=True)]
        return await gather(*names)

    with QmpBench(seed) as bench:
        bench.monitor()
        version, refusal, explained = talk(bench, body, oob=True)
        assert version["qemu"]["major"] == 10
        assert refusal == "Failed to find node with node-name='no'"
        assert isinstance(explained, str)


def test_timeouts_and_events_that_nobody_waits_for(seed: int) -> None:
    async def body(client: QmpClient) -> None:
        with pytest.raises(TimedOut):
            await client.execute("query-version", until="NEVER", timeout_ns=SECOND_NS)
        with pytest.raises(TimedOut):
            await client.next_event(SECOND_NS)
        await serve_null(client)
        await client.execute("block-export-del", {"id": "e"})
        assert (await client.next_event(SECOND_NS)).name == "BLOCK_EXPORT_DELETED"
        event = await client.execute("nbd-server-stop", until=lambda each: each.name == "x", timeout_ns=SECOND_NS)
        raise AssertionError(event)

    with QmpBench(seed) as bench:
        bench.monitor()
        with pytest.raises(TimedOut):
            talk(bench, body)


def test_the_server_hangs_up() -> None:
    async def body(client: QmpClient) -> None:
        with pytest.raises(ConnectionError):
            await client.execute("quit", until="NEVER")
        with pytest.raises(ConnectionError):
            await client.execute("query-version")

    with QmpBench() as bench:
        listener = bench.host.listen(ADDRESS)

        async def peer() -> None:
            while True:
                try:
                    socket = listener.accept()
                    break
                except BlockingIOError:
                    await sleep_ns(1000)
            socket._outbound_put(b'{"QMP": {"version": {}, "capabilities": []}}')
            await sleep_ns(SECOND_NS)
            socket._outbound_put(b'{"return": {}, "id": 1}')
            await sleep_ns(SECOND_NS)
            socket.close()
            listener.close()

        bench.context.enter(peer())
        talk(bench, body)


def test_somebody_else_is_there() -> None:
    async def body(client: QmpClient) -> None:
        raise AssertionError

    with QmpBench() as bench:
        listener = bench.host.listen(ADDRESS)
        bench.host.at(1000, lambda: listener.accept()._outbound_put(b"HTTP/1.1 400 Bad Request\r\n"))
        with pytest.raises(ProtocolError, match="not JSON"):
            talk(bench, body)
        listener.close()


def test_over_tls(seed: int) -> None:
    """The same conversation behind TLS, and a server that is not the one that was meant."""
    from tests.monitor.test_chardev_tls import WHERE, TlsBench

    with TlsBench(seed) as bench:
        QmpMonitor(bench.storage, bench.server())

        def ask(hostname: str) -> list[Any]:
            said: list[Any] = []

            async def run() -> None:
                security = bench.storage.client_security("c", hostname)
                try:
                    client = await QmpClient.connect(bench.context, WHERE, oob=True, security=security)
                    await serve_null(client)
                    said.append(await client.execute("query-qmp-schema"))
                    said.append(await client.execute("x-explain", oob=True))
                    client.close()
                except OSError as error:
                    said.append(str(error))

            running: Coroutine = bench.context.enter(run())
            bench.until(lambda: running.done, "the end of the conversation")
            return said

        assert ask("example.com") == ["Certificate does not match the hostname example.com"]
        bench.settle()  # the server hears of it in its own thread
        assert len(bench.log) == 1 and "TLS handshake failed" in bench.log.pop()
        schema, text = ask("localhost")
        assert len(schema) > 100 and isinstance(text, str)
        bench.settle()
        assert not bench.storage.chardevs["server"].connected
