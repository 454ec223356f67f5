# SPDX-License-Identifier: Apache-2.0
"""How commands are run: coroutines among them, one at a time, and the end of the program in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bottomhalf.aio import sleep_ns
from bottomhalf.aio.thread import own
from bottomhalf.monitor import commands
from bottomhalf.qapi.control import XExplain
from tests.monitor.qmp_bench import QmpBench

SECOND_NS = 1_000_000_000


def slow(seen: list[str]) -> Callable[[Any, Any], Any]:
    async def command(storage: Any, arguments: Any) -> list[Any]:
        seen.append("begin")
        await sleep_ns(SECOND_NS)
        seen.append("end")
        return []

    return command


def test_a_coroutine_command_lets_the_loops_run(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """People's monitors answer meanwhile, no other QMP command starts, and the answers keep their order."""
    with QmpBench(seed) as bench:
        bench.monitor("/run/a.sock")
        bench.monitor("/run/b.sock")
        first, second = bench.client("/run/a.sock"), bench.client("/run/b.sock")
        person = bench.hmp()
        seen: list[str] = []
        monkeypatch.setitem(commands.HANDLERS, "query-version", slow(seen))
        first.ask("query-version", id=1)
        first.ask("query-block-exports", id=2)
        bench.until(lambda: seen, "the command to begin")
        second.ask("query-block-exports", id=3)
        assert person.ask("info name") == ""
        bench.settle()
        assert seen == ["begin"] and not first.messages and not second.messages
        assert bench.storage.dispatcher.running == "query-version"
        assert [first.answer()["id"], first.answer()["id"], second.answer()["id"]] == [1, 2, 3]
        assert seen == ["begin", "end"]


def test_a_coroutine_command_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(storage: Any, arguments: Any) -> None:
        await sleep_ns(1000)
        raise ZeroDivisionError("oh")

    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()
        monkeypatch.setitem(commands.HANDLERS, "query-version", broken)
        assert client.fails("query-version") == "internal error: ZeroDivisionError: oh"
        assert client.call("query-block-exports") == []
        assert "please report" in bench.log[0]
        bench.end_log()


def test_the_end_waits_for_a_coroutine_command(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """T115: it may need both contexts; what waits behind it is not begun."""
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        seen: list[str] = []
        monkeypatch.setitem(commands.HANDLERS, "query-version", slow(seen))
        client.ask("query-version", id=1)
        client.ask("query-version", id=2)
        bench.until(lambda: seen, "the command to begin")
        bench.end()
        assert seen == ["begin", "end"]
        assert [message["id"] for message in client.messages] == [1]


def test_who_leaves_during_a_command_does_not_answer_for_the_next(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        seen: list[str] = []
        monkeypatch.setitem(commands.HANDLERS, "query-version", slow(seen))
        client.ask("query-version", id="lost")
        bench.until(lambda: seen, "the command to begin")
        client.close()
        again = bench.client(negotiate=False)
        assert "QMP" in again.answer()
        assert again.call("qmp_capabilities") == {}
        assert seen == ["begin", "end"] and not again.messages


def test_threads_of_commands(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In-band commands run in the main thread, out-of-band ones in the monitors'."""
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client(negotiate=False)
        client.answer()
        client.call("qmp_capabilities", {"enable": ["oob"]})
        where: list[str] = []

        def look(storage: Any, arguments: Any) -> str:
            assert isinstance(arguments, XExplain)
            where.append(own.state.context.name if own.state.context else "")
            return ""

        monkeypatch.setitem(commands.HANDLERS, "x-explain", look)
        client.call("x-explain")
        client.send({"exec-oob": "x-explain", "id": 1})
        assert client.answer() == {"return": "", "id": 1}
        assert where == ["main", "monitors"]


def test_an_urgent_defect_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client(negotiate=False)
        client.answer()
        client.call("qmp_capabilities", {"enable": ["oob"]})

        def broken(storage: Any, arguments: Any) -> None:
            raise ZeroDivisionError("oh")

        monkeypatch.setitem(commands.HANDLERS, "x-explain", broken)
        client.send({"exec-oob": "x-explain"})
        assert client.refusal() == "internal error: ZeroDivisionError: oh"
        bench.end_log()


def test_resizing(seed: int) -> None:
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        bench.serve(client, "disk")
        resize = {"node-name": "disk", "size": 2 << 20}
        assert "resize" in client.fails("block_resize", resize)
        client.call("nbd-server-stop")
        bench.settle()
        client.call("block_resize", resize)
        assert len(bench.host.content("/disk.raw")) == 2 << 20
        assert client.fails("block_resize", {"node-name": "no", "size": 1}) == (
            "Cannot find device='' nor node-name='no'"
        )
        assert client.fails("block_resize", {"node-name": "disk", "size": -1}) == "Parameter 'size' expects a >0 size"
        client.call("blockdev-add", {"driver": "null-co", "node-name": "n"})
        assert client.fails("block_resize", {"node-name": "n", "size": 1}) == (
            "Image format driver does not support resize"
        )
        client.call("blockdev-add", {"driver": "raw", "node-name": "fixed", "file": "disk", "size": 512})
        resize = {"node-name": "fixed", "size": 1024}
        assert client.fails("block_resize", resize) == "Cannot resize fixed-size raw disks"
        assert not bench.storage.graph.backends


def test_an_iothread_that_serves_an_export_stays(seed: int) -> None:
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        client.call("object-add", {"qom-type": "iothread", "id": "io"})
        client.call("blockdev-add", {"driver": "null-co", "node-name": "n"})
        client.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "/run/nbd.sock"}}})
        client.call("block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "iothread": "io"})
        assert client.fails("object-del", {"id": "io"}) == "object 'io' is in use, can not be deleted"
        client.call("qom-set", {"path": "io", "property": "poll-max-ns", "value": 12345})
        assert bench.storage.iothread_context("io").poll_max_ns == 12345
        client.call("nbd-server-stop")
        client.call("object-del", {"id": "io"})
        assert client.call("qom-list", {"path": "/objects"}) == [{"name": "type", "type": "string"}]
