# SPDX-License-Identifier: Apache-2.0
"""QMP, both ends, byte by byte."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.json_reader import loads
from bottomhalf.wire.qmp import (
    NEGOTIATION_COMPLETE,
    NEGOTIATION_EXPECTED,
    NO_ID,
    ClientSession,
    Event,
    Failure,
    Greeting,
    Refusal,
    Request,
    Response,
    ServerSession,
)

VERSION = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "test"}


def server(negotiated: bool = True, **options: Any) -> ServerSession:
    session = ServerSession(VERSION, ["oob"], **options)
    if negotiated:
        session.negotiate([])
    return session


def serve(session: ServerSession, data: bytes) -> bytes:
    """A little monitor: echoes arguments, knows qmp_capabilities."""
    session.receive(data)
    output = b""
    while (item := session.next_request()) is not None:
        if isinstance(item, Refusal):
            output += session.error(item.error, item.id)
        elif item.command == "qmp_capabilities":
            try:
                session.negotiate(item.arguments.get("enable", []))
                output += session.response(None, item.id)
            except Failure as failure:
                output += session.error(failure, item.id)
        else:
            output += session.response(item.arguments, item.id)
        session.finished()
    return output


def refusal(session: ServerSession, data: bytes) -> Refusal:
    session.receive(data)
    item = session.next_request()
    assert isinstance(item, Refusal)
    assert session.next_request() is None
    return item


def test_greeting() -> None:
    assert server().greeting() == (
        b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "test"}, '
        b'"capabilities": ["oob"]}}\r\n'
    )


def test_pretty_form() -> None:
    assert server(pretty=True).response({}, 1) == b'{\n    "return": {\n    },\n    "id": 1\n}\r\n'


def test_response_shapes() -> None:
    session = server()
    assert session.response() == b'{"return": {}}\r\n'
    assert session.response([], 1) == b'{"return": [], "id": 1}\r\n'
    assert session.response({}, None) == b'{"return": {}, "id": null}\r\n'
    failure = Failure("GenericError", "no")
    assert session.error(failure) == b'{"error": {"class": "GenericError", "desc": "no"}}\r\n'
    assert session.error(failure, "x") == b'{"id": "x", "error": {"class": "GenericError", "desc": "no"}}\r\n'


def test_events() -> None:
    session = server(negotiated=False)
    assert session.event("E", {"id": "e"}, 1_500_000_999) == b""
    session.negotiate()
    assert session.event("E", {"id": "e"}, 1_500_000_999) == (
        b'{"timestamp": {"seconds": 1, "microseconds": 500000}, "event": "E", "data": {"id": "e"}}\r\n'
    )
    assert session.event("E", None, -1) == (
        b'{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "E"}\r\n'
    )


def test_requests() -> None:
    session = server()
    session.receive(b'{\'execute\': \'a\'}{"execute": "b", "arguments": {"x": 1}, "id": [2]}')
    first, second = session.next_request(), session.next_request()
    assert isinstance(first, Request)
    assert (first.command, first.arguments, first.id, first.oob) == ("a", {}, NO_ID, False)
    assert isinstance(second, Request)
    assert (second.command, second.arguments, second.id) == ("b", {"x": 1}, [2])
    assert session.next_request() is None


@pytest.mark.parametrize(
    ("data", "desc", "id"),
    [
        (b"null ", "QMP input must be a JSON object", NO_ID),
        (b"[1]", "QMP input must be a JSON object", NO_ID),
        (b"{}", "QMP input lacks member 'execute'", NO_ID),
        (b'{"id": 7}', "QMP input lacks member 'execute'", 7),
        (b"{'execute': true}", "QMP input member 'execute' must be a string", NO_ID),
        (b"{'execute': 'a', 'arguments': []}", "QMP input member 'arguments' must be an object", NO_ID),
        (b"{'execute': 'a', 'extra': true}", "QMP input member 'extra' is unexpected", NO_ID),
        (b"{'exec-oob': 'a', 'id': null}", "QMP input member 'exec-oob' is unexpected", None),
        (b"{]", "JSON parse error, expecting value", NO_ID),
        (b"\xff", "JSON parse error, stray '\ufffd'", NO_ID),
    ],
)
def test_refusals(data: bytes, desc: str, id: Any) -> None:
    item = refusal(server(), data)
    assert (item.error.class_name, item.error.desc, item.id) == ("GenericError", desc, id)


def test_a_refused_id_is_echoed() -> None:
    assert serve(server(), b'{"id": 1}') == (
        b'{"id": 1, "error": {"class": "GenericError", "desc": "QMP input lacks member \'execute\'"}}\r\n'
    )


def test_nothing_but_negotiation_before_negotiation() -> None:
    session = server(negotiated=False)
    item = refusal(session, b"{'execute': 'query-version', 'id': 1}")
    assert (item.error.class_name, item.error.desc) == ("CommandNotFound", NEGOTIATION_EXPECTED)
    assert NEGOTIATION_EXPECTED == "Expecting capabilities negotiation with 'qmp_capabilities'"


def test_negotiation_and_commands_may_arrive_together() -> None:
    output = serve(
        server(negotiated=False),
        b"{'execute': 'early'}{'execute': 'qmp_capabilities', 'id': 1}{'execute': 'a', 'id': 2}{]"
        b"{'execute': 'qmp_capabilities', 'id': 3}",
    )
    lines = [loads(line) for line in output.splitlines()]
    assert [line.get("id") for line in lines] == [None, 1, 2, None, 3]
    assert [line.get("return") for line in lines] == [None, {}, {}, None, None]
    assert lines[4]["error"] == {"class": "CommandNotFound", "desc": NEGOTIATION_COMPLETE}


def test_unknown_capability() -> None:
    session = ServerSession(VERSION)
    with pytest.raises(Failure) as caught:
        session.negotiate(["oob"])
    assert caught.value.desc == "Capability oob not available"
    assert not session.negotiated


def test_out_of_band() -> None:
    session = server(negotiated=False)
    session.negotiate(["oob"])
    session.receive(b"{'execute': 'slow'}")
    (item,) = session.receive(b"{'execute': 'slow'}{'exec-oob': 'a', 'id': 1}{'execute': 'slow'}")
    assert isinstance(item, Request)
    assert item.oob and item.id == 1
    assert session.pending == 3
    (wrong,) = session.receive(b"{'exec-oob': 1}")
    assert isinstance(wrong, Refusal) and "must be a string" in wrong.error.desc
    while session.next_request() is not None:
        pass
    both = refusal(session, b"{'exec-oob': 'a', 'execute': 'b'}")
    assert "clashes with" in both.error.desc


def test_out_of_band_commands_behind_the_negotiation() -> None:
    session = server(negotiated=False)
    assert session.receive(b"{'execute': 'qmp_capabilities'}{'execute': 'a'}{'exec-oob': 'b'}{'execute': 'c'}") == []
    session.next_request()
    (item,) = session.negotiate(["oob"])
    assert isinstance(item, Request) and item.command == "b"
    rest = [session.next_request(), session.next_request()]
    assert [each.command for each in rest if isinstance(each, Request)] == ["a", "c"]


def test_reading_stops_while_the_queue_is_full() -> None:
    session = server()
    assert session.wants_data
    session.receive(b"{'execute': 'a'}")
    assert session.pending == 1
    assert not session.wants_data
    session.next_request()
    assert not session.wants_data
    session.finished()
    assert session.wants_data
    fast = server(negotiated=False)
    fast.negotiate(["oob"])
    fast.receive(b"{'execute': 'a'}" * 7)
    assert fast.wants_data
    fast.receive(b"{'execute': 'a'}")
    assert not fast.wants_data


def test_the_end_of_the_stream_leaves_an_error_for_what_is_incomplete() -> None:
    session = server()
    session.receive(b"{'execute': ")
    session.end_of_stream()
    item = session.next_request()
    assert isinstance(item, Refusal)
    assert item.error.desc == "JSON parse error, premature EOI"


def test_a_deep_id_comes_back() -> None:
    deep = b"[" * 1000 + b"]" * 1000
    assert (
        serve(server(), b"{'execute': 'a', 'id': " + deep + b"}")
        == b'{"return": {}, "id": ' + deep + b"}\r\n"
    )


def test_both_ends_together_with_the_bytes_cut_everywhere() -> None:
    client = ClientSession()
    requests = client.execute("qmp_capabilities") + client.execute("a", {"x": "é"}) + client.execute("b")
    session = server(negotiated=False)
    answers = session.greeting() + serve(session, requests)
    answers += session.event("E", {"id": "e"}, 5_000) + b'{"error": {"class": "GenericError", "desc": "d"}}'
    for cut in range(len(answers)):
        peer = ClientSession()
        for command in ("qmp_capabilities", "a", "b"):
            peer.execute(command)
        items = peer.receive(answers[:cut]) + peer.receive(answers[cut:])
        assert [type(item) for item in items] == [Greeting, Response, Response, Response, Event, Response]
        greeting, _, second, third, event, failed = items
        assert isinstance(greeting, Greeting) and greeting.capabilities == ["oob"]
        assert isinstance(second, Response) and (second.id, second.result()) == (2, {"x": "é"})
        assert isinstance(third, Response) and third.result() == {}
        assert isinstance(event, Event) and (event.name, event.data, event.realtime_ns) == (
            "E",
            {"id": "e"},
            5_000,
        )
        assert isinstance(failed, Response) and failed.id is NO_ID
        with pytest.raises(Failure):
            failed.result()
        assert not peer.outstanding


GREETING = b'{"QMP": {"version": {}, "capabilities": []}}'


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"HTTP/1.1 400\r\n", "not JSON"),
        (b"[]", "value on its own"),
        (b"{}", "greeting missing"),
        (b'{"QMP": 1}', "greeting missing"),
        (GREETING + b'{"id": 1}', "wrong shape"),
        (GREETING + b'{"event": 1, "timestamp": {"seconds": 0, "microseconds": 0}}', "wrong shape"),
        (GREETING + b'{"event": "E"}', "wrong shape"),
        (GREETING + b'{"error": [], "id": 1}', "wrong shape"),
        (GREETING + b'{"return": {}}', "no request of ours"),
        (GREETING + b'{"return": {}, "id": 9}', "no request of ours"),
        (GREETING + b'{"return": {}, "id": [1]}', "no request of ours"),
    ],
)
def test_a_client_tells_what_is_wrong_with_the_server(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        ClientSession().receive(data)


PARTS = [b"{'execute': 'a'}", b"{'execute': 'qmp_capabilities'}", b"{'execute': 'a', 'id': 3}"]
PARTS += [b"{", b"}", b"'id'", b":", b",", b"1", b"[", b"\xff", b"\n"]


@given(st.lists(st.sampled_from(PARTS)))
def test_every_input_is_answered_in_lines_of_json(parts: list[bytes]) -> None:
    output = serve(server(negotiated=False), b"".join(parts))
    for line in output.splitlines():
        answer = loads(line)
        assert ("return" in answer) != ("error" in answer)


@given(st.binary())
def test_a_client_raises_nothing_but_protocol_errors(data: bytes) -> None:
    client = ClientSession()
    client.execute("a")
    try:
        client.receive(GREETING + data)
    except ProtocolError:
        pass
