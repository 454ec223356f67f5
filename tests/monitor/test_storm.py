# SPDX-License-Identifier: Apache-2.0
"""Many monitors at once, and bytes of every kind."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from bottomhalf.host.sim import Odds
from bottomhalf.wire.json_reader import loads
from bottomhalf.wire.qmp import Failure, Refusal, ServerSession
from tests.monitor.qmp_bench import QmpBench, QmpClient

MONITORS = 100
COMMANDS = 20
MUTATIONS = 300
MUTATIONS_SOAK = 100_000


@pytest.mark.parametrize("seed", range(3))
def test_a_hundred_monitors(seed: int) -> None:
    """Everybody gets his answers in order, and nobody gets many while another who asked gets few."""
    with QmpBench(seed, odds=Odds.calm()) as bench:
        clients: list[QmpClient] = []
        for number in range(MONITORS):
            bench.monitor(f"/run/{number}.sock")
            clients.append(bench.client(f"/run/{number}.sock"))
        rounds: list[int] = []
        bench.host.shuffle(clients)
        for client in clients:
            client.send(b"".join(b'{"execute": "query-block-exports", "id": %d}' % n for n in range(COMMANDS)))

        def all_answered() -> bool:
            counts = [len(client.messages) for client in clients]
            rounds.append(max(counts) - min(counts))
            return min(counts) == COMMANDS

        bench.until(all_answered, "all answers")
        for client in clients:
            assert [message["id"] for message in client.messages] == list(range(COMMANDS))
        assert max(rounds) <= 4, "somebody starved"


@pytest.mark.parametrize("seed", range(2))
def test_a_hundred_who_do_not_read(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storm from a hundred clients who never read: what is kept for each stays below the bound, those who go on are
    sent away, and somebody else is served all the time."""
    bound = 16 << 10
    monkeypatch.setattr("bottomhalf.chardev.base.UNSENT_BYTES_MAX", bound)
    with QmpBench(seed, odds=Odds.calm()) as bench:
        bench.host.network.buffer_bytes = 4096
        clients = []
        for number in range(MONITORS):
            bench.monitor(f"/run/{number}.sock")
            clients.append(bench.client(f"/run/{number}.sock"))
            clients[-1].pause()
        bench.monitor("/run/polite.sock")
        polite = bench.client("/run/polite.sock")
        for client in clients:
            client.send(b'{"execute": "query-commands"}' * COMMANDS)
        most = 0
        for _ in range(COMMANDS):
            assert polite.call("query-version")
            most = max(most, *(chardev.unsent_bytes for chardev in bench.storage.chardevs.values()))
        bench.settle()
        assert 0 < most <= bound
        connected = sum(chardev.connected for chardev in bench.storage.chardevs.values())
        assert connected == 1, f"{connected - 1} of those who do not read are still there"
        bench.end_log()


def test_memory_of_those_who_do_not_read(seed: int) -> None:
    """A storm of commands from clients that read nothing: what waits for them is bounded by what they may ask."""
    with QmpBench(seed) as bench:
        clients = []
        for number in range(10):
            bench.monitor(f"/run/{number}.sock")
            clients.append(bench.client(f"/run/{number}.sock"))
            clients[-1].pause()
            clients[-1].send(b'{"execute": "query-commands"}' * 20)
        bench.monitor("/run/polite.sock")
        assert bench.client("/run/polite.sock").call("query-version")
        bench.settle()
        unsent = sum(chardev.unsent_bytes for chardev in bench.storage.chardevs.values())
        assert unsent < 10 * 20 * 4096
        for client in clients:
            client.resume()
        bench.until(lambda: all(len(client.messages) == 20 for client in clients), "all answers")


# Bytes


SESSION = (
    b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 1}\r\n'
    b'{"execute": "query-version", "id": {"a": [1, null, "\\u00e4"]}} {"exec-oob": "x-explain", "id": 2}'
    b"{'execute': 'qom-get', 'arguments': {'path': '/', 'property': 'type'}}\xff[1,{}]{\"id\": 3}"
    b'{"execute": "qom-set", "arguments": {"path": "/", "property": "type", "value": 1.5e3}}'
)


def serve(session: ServerSession, pieces: list[bytes]) -> bytes:
    """A little monitor, out-of-band commands included: what it answers."""
    output = b""

    def answer(item: Any) -> bytes:
        if isinstance(item, Refusal):
            return session.error(item.error, item.id)
        if item.command == "qmp_capabilities":
            try:
                urgent = session.negotiate(item.arguments.get("enable", ()))
            except Failure as error:
                return session.error(error, item.id)
            return session.response(None, item.id) + b"".join(map(answer, urgent))
        return session.response({"oob": item.oob, "command": item.command}, item.id)

    for piece in pieces:
        for item in session.receive(piece):
            output += answer(item)
        while (item := session.next_request()) is not None:
            output += answer(item)
            session.finished()
    return output


def new_session() -> ServerSession:
    return ServerSession({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, ["oob"])


def by_id(output: bytes) -> list[str]:
    """Answers, whatever their order: out of band means another one."""
    return sorted(json.dumps(loads(line)) for line in output.splitlines())


def test_every_split() -> None:
    whole = by_id(serve(new_session(), [SESSION]))
    assert len(whole) == 8
    for cut in range(len(SESSION)):
        assert by_id(serve(new_session(), [SESSION[:cut], SESSION[cut:]])) == whole, cut
    assert by_id(serve(new_session(), [bytes([byte]) for byte in SESSION])) == whole


def test_every_prefix() -> None:
    """A client that breaks off anywhere has got the answers to what was complete, and nothing else."""
    whole = by_id(serve(new_session(), [SESSION]))
    for end in range(len(SESSION)):
        part = by_id(serve(new_session(), [SESSION[:end]]))
        assert len(part) <= len(whole)
        for line in part:
            assert line in whole or "JSON parse error" in line, (end, line)


def mutated(chance: random.Random) -> bytes:
    data = bytearray(SESSION)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data))
        kind = chance.randrange(4)
        if kind == 0:
            data[at] = chance.randrange(256)
        elif kind == 1:
            del data[at : at + chance.randint(1, 20)]
        elif kind == 2:
            data[at:at] = bytes(chance.choice(b'{}[]":,0\xff\\') for _ in range(chance.randint(1, 20)))
        else:
            piece = data[at : at + chance.randint(1, 40)]
            data[at:at] = piece * chance.randint(1, 3)
    return bytes(data)


def mutate(count: int) -> None:
    chance = random.Random(20)
    for number in range(count):
        data = mutated(chance)
        cuts = sorted(chance.randrange(len(data) + 1) for _ in range(3))
        pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        output = serve(new_session(), pieces)
        for line in output.splitlines():
            message = loads(line)
            assert ("return" in message) != ("error" in message), (number, data)


def test_mutations() -> None:
    mutate(MUTATIONS)


@pytest.mark.soak
@pytest.mark.hang_seconds(600)
def test_many_mutations() -> None:
    mutate(MUTATIONS_SOAK)


def test_mutations_do_not_harm_a_monitor(seed: int) -> None:
    """The same through a whole program: it answers in JSON, reports no defect, and is well afterwards."""
    with QmpBench(seed) as bench:
        bench.monitor()
        chance = random.Random(seed)
        for _ in range(5):
            client = bench.client(negotiate=False)
            assert "QMP" in client.answer()
            client.send(mutated(chance).replace(b"quit", b"tiuq"))
            bench.settle()
            client.close()
            bench.settle()
        assert bench.client().call("query-version")
