# SPDX-License-Identifier: Apache-2.0
"""Who answers while a command waits: every cell of the table in docs/qapi-and-qmp.md, without real time.

A command for people, or one of QMP, sits in a nested poll of the main context for four seconds.
"""

from __future__ import annotations

from bottomhalf.qapi.char import parse_chardev
from tests.monitor.qmp_bench import QmpBench

SLEEP_NS = 4_000_000_000
ANSWER_NS_MAX = 50_000_000  # from a question to what answers at once, on the simulated clock
SLEEP = 'qemu-io disk "sleep 4000"'
EXPLAIN = {"exec-oob": "x-explain", "id": "why"}


class Seen:
    """What had come from whom when half of the wait was over."""

    def __init__(self) -> None:
        self.at_half: dict[str, object] = {}


def test_while_a_person_waits(seed: int) -> None:
    """QMP greets and answers out of band; in-band QMP and the second person wait; the disk is served."""
    with QmpBench(seed) as bench:
        for name in ("a", "b"):
            bench.monitor(f"/run/{name}.sock")
        fast = bench.client("/run/a.sock", negotiate=False)
        assert "QMP" in fast.answer()
        fast.call("qmp_capabilities", {"enable": ["oob"]})
        bench.serve(fast, "disk")
        nbd = bench.nbd_client("disk")
        person, second = bench.hmp("/run/h1.sock"), bench.hmp("/run/h2.sock")
        began_ns = bench.host.monotonic_ns()
        half: dict[str, object] = {}
        early: list[object] = []
        cookies: list[int] = []
        late = []

        def others_speak() -> None:
            second.type("info version\n")
            fast.ask("query-version", id="in-band")
            fast.send(EXPLAIN)
            late.append(bench.client("/run/b.sock", negotiate=False))
            late[0].ask("qmp_capabilities", id="negotiation")
            cookies.extend(nbd.read(offset, 4096) for offset in range(0, 65536, 4096))

        def look_early() -> None:
            early.append(["QMP" in message for message in late[0].messages])
            early.append([message.get("id") for message in fast.messages])

        def look() -> None:
            half["person"] = bytes(person.screen)
            half["second"] = bytes(second.screen)
            half["fast"] = [message.get("id") for message in fast.messages]
            half["late"] = [next(iter(message)) for message in late[0].messages]
            half["disk"] = all(cookie in nbd.done for cookie in cookies)

        bench.host.at(SLEEP_NS // 4, others_speak)
        bench.host.at(SLEEP_NS // 4 + ANSWER_NS_MAX, look_early)
        bench.host.at(SLEEP_NS // 2, look)
        person.type(SLEEP + "\n")
        assert person.prompt() == SLEEP + "\n"
        assert bench.host.monotonic_ns() - began_ns >= SLEEP_NS
        assert early == [[True], ["why"]]
        assert half == {
            "person": (SLEEP + "\r\n").encode(),
            "second": b"",  # not even an echo
            "fast": ["why"],
            "late": ["QMP"],
            "disk": True,
        }
        why = fast.answer()["return"]
        assert "main waits for the end of a sleep of 4000 ms that a monitor asked for" in why
        assert fast.answer()["id"] == "in-band"
        assert "QMP" in late[0].answer() and late[0].answer() == {"return": {}, "id": "negotiation"}
        assert second.prompt().startswith("info version\n10.0.2")
        nbd.wait_all()
        nbd.disconnect()


def test_while_qmp_waits(seed: int) -> None:
    """The reverse: the same command through human-monitor-command."""
    with QmpBench(seed) as bench:
        for name in ("a", "b"):
            bench.monitor(f"/run/{name}.sock")
        slow, fast = bench.client("/run/a.sock"), bench.client("/run/b.sock", negotiate=False)
        fast.answer()
        fast.call("qmp_capabilities", {"enable": ["oob"]})
        slow.call("blockdev-add", {"driver": "null-co", "node-name": "disk"})
        person = bench.hmp()
        half: list[object] = []

        def others_speak() -> None:
            person.type("info version\n")
            fast.ask("query-version", id="in-band")
            fast.send(EXPLAIN)

        bench.host.at(SLEEP_NS // 4, others_speak)
        bench.host.at(SLEEP_NS // 2, lambda: half.extend((bytes(person.screen), [m["id"] for m in fast.messages])))
        assert slow.call("human-monitor-command", {"command-line": SLEEP}) == ""
        assert half == [b"", ["why"]]
        assert person.prompt().startswith("info version\n")
        assert [fast.answer()["id"], fast.answer()["id"]] == ["why", "in-band"]


def test_qmp_behind_a_mux_is_as_deaf_as_a_person(seed: int) -> None:
    """Nobody else's thread can have the device: no out-of-band execution is offered, and no greeting comes."""
    from bottomhalf.host.protocol import UnixAddress
    from bottomhalf.monitor.qmp import QmpMonitor
    from bottomhalf.tools.bh_storage_daemon import mux_over
    from tests.monitor.qmp_bench import QmpClient

    with QmpBench(seed) as bench:
        options = parse_chardev("socket,id=base,path=/run/m.sock,server=on,wait=off")
        bench.storage.add_chardev("base", options.backend)
        QmpMonitor(bench.storage, bench.storage.add_chardev("mux", mux_over("base")))
        bench.monitor()
        bench.client().call("blockdev-add", {"driver": "null-co", "node-name": "disk"})
        person = bench.hmp()
        late: list[QmpClient] = []
        seen: list[int] = []

        def connect() -> None:
            late.append(QmpClient(bench, bench.host.connect(UnixAddress("/run/m.sock"))))
            bench.clients.append(late[0])

        bench.host.at(SLEEP_NS // 4, connect)
        bench.host.at(SLEEP_NS // 2, lambda: seen.append(len(late[0].raw)))
        person.ask(SLEEP)
        assert seen == [0]
        assert late[0].answer()["QMP"]["capabilities"] == []
        late[0].call("qmp_capabilities")
        late[0].call("query-version")


def test_eight_commands_wait_and_the_ninth_is_not_read(seed: int) -> None:
    """The queue's limit, and T113: who leaves while it is full leaves a monitor that reads."""
    with QmpBench(seed) as bench:
        monitor = bench.monitor()
        client = bench.client(negotiate=False)
        client.answer()
        client.call("qmp_capabilities", {"enable": ["oob"]})
        client.call("blockdev-add", {"driver": "null-co", "node-name": "disk"})
        person = bench.hmp()
        half: list[object] = []

        def flood() -> None:
            for number in range(30):
                client.ask("query-version", id=number)

        def look() -> None:
            assert monitor.session is not None
            half.append(monitor.session.wants_data)
            half.append(len(client.messages))
            client.close()

        bench.host.at(SLEEP_NS // 4, flood)
        bench.host.at(SLEEP_NS // 2, look)
        person.ask(SLEEP)
        assert half == [False, 0]
        again = bench.client()
        assert again.call("query-version")
