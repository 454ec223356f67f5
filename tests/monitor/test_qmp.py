# SPDX-License-Identifier: Apache-2.0
"""QMP sessions: greeting, negotiation, ids, order, errors in QEMU's words, several monitors, rude clients."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from bottomhalf.aio import wait_while
from bottomhalf.chardev import base as chardev_module
from bottomhalf.host.request import READ
from bottomhalf.host.sim import Odds
from bottomhalf.monitor import commands
from bottomhalf.qapi.errors import OptionError
from tests.monitor.qmp_bench import QmpBench

VERSION = {"micro": 2, "minor": 0, "major": 10}


def test_greeting() -> None:
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client(negotiate=False)
        greeting = client.answer()
        assert greeting["QMP"]["version"]["qemu"] == VERSION
        assert greeting["QMP"]["version"]["package"].startswith("bottomhalf-")
        assert greeting["QMP"]["capabilities"] == ["oob"]
        assert client.raw.startswith(b'{"QMP": {"version": {"qemu": ') and client.raw.endswith(b"\r\n")


def test_pretty() -> None:
    with QmpBench() as bench:
        bench.monitor(pretty=True)
        client = bench.client()
        assert client.raw.startswith(b'{\n    "QMP": {\n        "version": {\n')
        client.call("query-version")


def test_negotiation() -> None:
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client(negotiate=False)
        client.answer()
        expected = "Expecting capabilities negotiation with 'qmp_capabilities'"
        assert client.fails("query-version", class_name="CommandNotFound") == expected
        assert client.fails("nonsense", class_name="CommandNotFound") == expected
        assert "does not accept value 'x'" in client.fails("qmp_capabilities", {"enable": ["x"]})
        assert client.fails("query-version", class_name="CommandNotFound") == expected
        assert client.call("qmp_capabilities", {"enable": []}) == {}
        assert client.fails("qmp_capabilities", class_name="CommandNotFound") == (
            "Capabilities negotiation is already complete, command ignored"
        )
        assert client.call("query-version")["qemu"] == VERSION


@pytest.mark.parametrize("id", [1, "x", None, {"a": [1, 2]}, [], 1.5, True])
def test_ids_come_back(id: object) -> None:
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()
        client.send({"execute": "query-version", "id": id})
        answer = client.answer()
        assert answer["id"] == id and "return" in answer
        client.send({"execute": "nonsense", "id": id})
        answer = client.answer()
        assert answer["id"] == id and "error" in answer
        client.send({"id": id})
        assert client.answer()["id"] == id


def test_member_order_is_qemus() -> None:
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()
        del client.raw[:]
        client.send({"id": 1, "execute": "qmp_capabilities"})
        client.answer()
        assert client.raw.startswith(b'{"id": 1, "error": {"class": "CommandNotFound", "desc": ')
        del client.raw[:]
        client.send({"id": 1, "execute": "query-block-exports"})
        client.answer()
        assert client.raw == b'{"return": [], "id": 1}\r\n'


def test_pipelining_keeps_the_order(seed: int) -> None:
    """All at once, negotiation included; good and bad ones; one answer each, in order."""
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client(negotiate=False)
        client.send({"execute": "qmp_capabilities", "id": 0})
        for number in range(1, 50):
            if number % 3:
                client.ask("query-version", id=number)
            else:
                client.ask("nonsense", id=number)
        assert "QMP" in client.answer()
        for number in range(50):
            answer = client.answer()
            assert answer["id"] == number
            assert ("error" in answer) == (number > 0 and number % 3 == 0)


def test_commands_cut_anywhere(seed: int) -> None:
    """Bytes that come one by one are the same commands."""
    with QmpBench(seed, odds=Odds(short_recv=1.0, short_send=1.0)) as bench:
        bench.monitor()
        client = bench.client()
        client.send('{"execute":"query-version","id":1}{"execute" :  "query-version", \'id\': 2}\r\n')
        assert [client.answer()["id"] for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "class_name", "text"),
    [
        ("[1]", "GenericError", "QMP input must be a JSON object"),
        ('"x" ', "GenericError", "QMP input must be a JSON object"),
        ("{}", "GenericError", "QMP input lacks member 'execute'"),
        ('{"execute": 1}', "GenericError", "QMP input member 'execute' must be a string"),
        ('{"execute": "quit", "x": 1}', "GenericError", "QMP input member 'x' is unexpected"),
        ('{"execute": "quit", "arguments": 1}', "GenericError", "QMP input member 'arguments' must be an object"),
        ('{"exec-oob": "quit"}', "GenericError", "QMP input member 'exec-oob' is unexpected"),
        ('{"execute": "quit",}', "GenericError", "JSON parse error, expecting value"),
        ("nonsense ", "GenericError", "JSON parse error, invalid keyword 'nonsense'"),
        ('{"execute": "nonsense"}', "CommandNotFound", "The command nonsense has not been found"),
        ('{"execute": "quit", "arguments": {"x": 1}}', "GenericError", "Parameter 'x' is unexpected"),
        ('{"execute": "blockdev-del"}', "GenericError", "Parameter 'node-name' is missing"),
        (
            '{"execute": "blockdev-del", "arguments": {"node-name": 1}}',
            "GenericError",
            "Invalid parameter type for 'node-name', expected: string",
        ),
    ],
)
def test_bad_input(line: str, class_name: str, text: str) -> None:
    """The monitor answers in QEMU's words and goes on."""
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()
        client.send(line)
        assert client.refusal(class_name) == text
        assert client.call("query-version")["qemu"] == VERSION


def test_reset_byte() -> None:
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()
        client.send(b'{"execute": "quer\xff{"execute": "query-block-exports", "id": 7}')
        answers = [client.answer()]
        while "return" not in answers[-1]:
            answers.append(client.answer())
        assert answers[-1] == {"return": [], "id": 7}


def test_quit_answers_first() -> None:
    """Then everything ends in order, which the clients are told; a command behind it is not run."""
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()
        bench.serve(client, "disk")
        client.ask("quit", id=1)
        client.ask("query-version", id=2)
        bench.storage.run()
        bench.end()
        assert client.order[-2:] == ["return", "BLOCK_EXPORT_DELETED"]
        assert client.messages == [{"return": {}, "id": 1}]


def test_several_monitors_take_turns(seed: int) -> None:
    """A client that floods its monitor does not keep another one's command waiting."""
    with QmpBench(seed) as bench:
        for name in ("a", "b"):
            bench.monitor(f"/run/{name}.sock")
        flood = bench.client("/run/a.sock")
        other = bench.client("/run/b.sock")
        for number in range(200):
            flood.ask("query-version", id=number)
        bench.until(lambda: len(flood.messages) > 3, "the flood")
        before = len(flood.messages)
        other.ask("query-block-exports")
        other.answer()
        assert len(flood.messages) - before < 150
        bench.until(lambda: len(flood.messages) == 200, "all answers")
        assert [message["id"] for message in flood.messages] == list(range(200))


def test_two_monitors_with_full_queues_alternate() -> None:
    with QmpBench(odds=Odds.calm()) as bench:
        served: list[str] = []
        for name in ("a", "b"):
            monitor = bench.monitor(f"/run/{name}.sock")
            original = monitor.take

            def take(original=original, name=name):  # type: ignore[no-untyped-def]
                taken = original()
                if taken is not None:
                    served.append(name)
                return taken

            monitor.take = take  # type: ignore[method-assign]
        clients = [bench.client(f"/run/{name}.sock") for name in ("a", "b")]
        served.clear()
        for client in clients:
            client.send(b'{"execute":"query-block-exports"}' * 10)
        bench.until(lambda: all(len(client.messages) == 10 for client in clients), "all answers")
        both = served[1:-1]  # from when both have something
        assert both.count("a") >= 9 and both.count("b") >= 9
        start = next(index for index in range(1, len(served)) if served[index] != served[index - 1])
        alternating = served[start : start + 12]
        assert all(first != second for first, second in pairwise(alternating)), served


def test_second_client_waits_in_the_backlog() -> None:
    with QmpBench() as bench:
        bench.monitor()
        first = bench.client()
        second = bench.client(negotiate=False)
        first.call("query-version")
        bench.settle()
        assert not second.raw
        first.close()
        second.negotiate()
        second.call("query-version")


def test_session_begins_anew() -> None:
    """What one client negotiated or left unfinished is not the next one's."""
    with QmpBench() as bench:
        bench.monitor()
        first = bench.client()
        first.send('{"execute": "query-ver')
        bench.settle()
        first.close()
        second = bench.client(negotiate=False)
        second.answer()
        assert "Expecting" in second.fails("query-version", class_name="CommandNotFound")


def test_client_vanishes_with_commands_left(seed: int) -> None:
    """Its commands that have not begun are forgotten; others are not disturbed."""
    with QmpBench(seed) as bench:
        bench.monitor("/run/a.sock")
        bench.monitor("/run/b.sock")
        rude, other = bench.client("/run/a.sock"), bench.client("/run/b.sock")
        for number in range(20):
            rude.ask("query-version", id=number)
        bench.until(lambda: rude.messages, "the first answer")
        bench.host.cut(rude.socket)
        for _ in range(5):
            other.call("query-version")
        again = bench.client("/run/a.sock")
        again.call("query-version")


def test_client_vanishes_while_its_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()

        def slow(storage: object, arguments: object) -> None:
            bench.host.cut(client.socket)
            done: list[bool] = []
            bench.context.timer(lambda: done.append(True)).arm_ns(bench.context.now_ns() + 1000)
            wait_while(bench.context, lambda: not done, what="a while")

        monkeypatch.setitem(commands.HANDLERS, "query-version", slow)
        client.ask("query-version")
        client.ask("quit")  # was not begun, so it does not happen
        bench.until(lambda: client.ended, "the end")
        bench.settle()
        assert not bench.storage.loop.quitting
        bench.client().call("query-block-exports")


def test_client_that_never_reads_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for it is bounded, and the next client gets its turn."""
    monkeypatch.setattr(chardev_module, "UNSENT_BYTES_MAX", 100_000)
    with QmpBench() as bench:
        monitor = bench.monitor()
        deaf = bench.client()
        deaf.pause()
        peak = 0
        answer_bytes = 200
        for _ in range(4_000):
            deaf.ask("query-version")
        next_one = bench.client(negotiate=False)

        def look() -> bool:
            nonlocal peak
            peak = max(peak, monitor.chardev.unsent_bytes)
            return bool(next_one.raw)

        bench.until(look, "the turn of the next one")
        assert 0 < peak <= 100_000 + answer_bytes
        deaf.close()
        next_one.negotiate()
        next_one.call("query-version")


def test_back_pressure() -> None:
    """While a command waits for its turn the monitor takes no more bytes than one receive."""
    with QmpBench() as bench:
        monitor = bench.monitor()
        client = bench.client()
        longest = 0
        for _ in range(3000):
            client.ask("query-version")

        def look() -> bool:
            nonlocal longest
            assert monitor.session is not None
            longest = max(longest, monitor.session.pending)
            return len(client.messages) == 3000

        bench.until(look, "all answers")
        assert longest <= chardev_module.RECEIVE_BYTES // len(b'{"execute": "query-version"}') + 1


def test_event_goes_to_all_that_negotiated() -> None:
    with QmpBench() as bench:
        for name in ("a", "b", "c"):
            bench.monitor(f"/run/{name}.sock")
        first, second = bench.client("/run/a.sock"), bench.client("/run/b.sock")
        silent = bench.client("/run/c.sock", negotiate=False)
        silent.answer()
        bench.serve(first, "disk")
        first.call("block-export-del", {"id": "e-disk"})
        for client in (first, second):
            assert client.wait_event("BLOCK_EXPORT_DELETED") == {"id": "e-disk"}
        assert not silent.events
        first.call("nbd-server-stop")


def test_event_has_a_timestamp() -> None:
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()
        bench.serve(client, "disk")
        client.call("nbd-server-stop")
        bench.until(lambda: client.events, "the event")
        stamp = client.events[0]["timestamp"]
        now_ns = bench.host.realtime_ns()
        assert abs(stamp["seconds"] * 10**9 + stamp["microseconds"] * 1000 - now_ns) < 10**10
        assert list(json.loads(client.raw.splitlines()[-2])) == ["timestamp", "event", "data"]


def test_stop_waits_and_no_command_starts_inside(seed: int) -> None:
    """nbd-server-stop with a request in flight: the disk goes on, the other monitors wait."""
    with QmpBench(seed) as bench:
        for name in ("a", "b"):
            bench.monitor(f"/run/{name}.sock")
        first, second = bench.client("/run/a.sock"), bench.client("/run/b.sock")
        bench.serve(first, "disk")
        nbd = bench.nbd_client("disk")
        held = bench.host.fault(path="/disk.raw", op=READ, hold=True)
        nbd.read(0, 4096)
        connection = bench.storage.exports.exports["e-disk"].connections[0]
        bench.until(lambda: connection.in_flight, "the request in the block layer")

        first.ask("nbd-server-stop", id="stop")
        first.ask("query-block-exports", id="after")
        bench.host.at(2_000_000, held.release)
        seen: list[tuple[int, int]] = []

        def second_speaks() -> None:
            second.ask("query-block-exports", id="other")

        def look() -> None:
            seen.append((len(first.messages), len(second.messages)))

        bench.host.at(500_000, second_speaks)
        bench.host.at(1_900_000, look)
        bench.until(lambda: len(first.messages) == 2 and second.messages, "all answers")
        assert seen == [(0, 0)]
        assert first.messages[0] == {"return": {}, "id": "stop"}
        assert first.messages[1]["return"] == [] and second.messages[0]["return"] == []
        assert first.events[0]["data"] == {"id": "e-disk"}


def test_io_goes_on_while_a_command_waits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with QmpBench(seed) as bench:
        bench.monitor("/run/a.sock")
        bench.monitor("/run/b.sock")
        first, second = bench.client("/run/a.sock"), bench.client("/run/b.sock")
        bench.serve(first, "disk")
        nbd = bench.nbd_client("disk")
        inside: list[int] = []

        def waits(storage: object, arguments: object) -> list[object]:
            second.ask("query-block-exports")
            cookies = [nbd.read(offset, 4096) for offset in range(0, 65536, 4096)]
            cookies.append(nbd.write(0, b"x" * 512))
            wait_while(bench.context, lambda: any(cookie not in nbd.done for cookie in cookies), what="16 reads")
            inside.append(len(second.messages))
            return []

        monkeypatch.setitem(commands.HANDLERS, "query-version", waits)
        first.call("query-version")
        assert inside == [0]
        second.answer()
        assert all(completion.error == 0 for completion in nbd.wait_all())
        nbd.disconnect()


def test_a_defect_is_answered_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of ours that breaks leaves neither its client nor the other commands waiting."""
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()

        def broken(storage: object, arguments: object) -> None:
            raise ZeroDivisionError("oh")

        monkeypatch.setitem(commands.HANDLERS, "query-version", broken)
        assert client.fails("query-version") == "internal error: ZeroDivisionError: oh"
        client.call("query-block-exports")
        assert "please report" in bench.log[0] and "ZeroDivisionError" in bench.log[1]
        bench.log.clear()


def test_one_monitor_per_chardev() -> None:
    with QmpBench() as bench:
        monitor = bench.monitor()
        with pytest.raises(OptionError, match="chardev 'm0' is already in use"):
            type(monitor)(bench.storage, monitor.chardev)


def test_ends_with_clients_there(seed: int) -> None:
    """One in a session, one in the backlog, one with an NBD request in flight."""
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        bench.serve(client, "disk")
        waiting = bench.client(negotiate=False)
        nbd = bench.nbd_client("disk")
        nbd.write(0, b"x" * 4096)
        bench.until(lambda: nbd.done, "the write")
        for offset in range(4096, 65536, 4096):
            nbd.write(offset, b"y" * 4096)
        bench.storage.quit()
        bench.storage.run()
        bench.end()
        assert [event["event"] for event in client.events] == ["BLOCK_EXPORT_DELETED"]
        assert not waiting.raw
        assert bench.host.durable_content("/disk.raw")[:4096] == b"x" * 4096
