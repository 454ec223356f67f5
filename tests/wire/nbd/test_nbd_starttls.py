# SPDX-License-Identifier: Apache-2.0
"""STARTTLS in the negotiation, both ends: in which order things are said, and what must not be said in public."""

from __future__ import annotations

import pytest

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd import constants as c
from bottomhalf.wire.nbd.client_handshake import ClientHandshake, ClientState, Goal
from bottomhalf.wire.nbd.errors import NegotiationRefused
from bottomhalf.wire.nbd.server_handshake import ServerHandshake, State
from tests.wire.nbd.nbd_model import Table, option, reply
from tests.wire.nbd.test_nbd_server_handshake import DISK, FIXED, GREETING, ROM, go

START = option(c.OPT_STARTTLS)


def server() -> ServerHandshake:
    handshake = ServerHandshake(Table(DISK, ROM), tls=True)
    assert handshake.take_output() == GREETING
    handshake.receive(FIXED)
    return handshake


def client(**options: object) -> ClientHandshake:
    handshake = ClientHandshake("disk", tls=True, **options)  # type: ignore[arg-type]
    handshake.receive(GREETING)
    assert handshake.take_output() == FIXED + START
    return handshake


@pytest.mark.parametrize("cut", [1, 3, 1000])
@pytest.mark.parametrize("goal", [Goal.TRANSMISSION, Goal.LIST])
def test_both_ends(cut: int, goal: Goal) -> None:
    ours, theirs = server(), client(goal=goal)
    data = START
    for _ in range(20):
        for at in range(0, len(data), cut):
            ours.receive(data[at : at + cut])
        if ours.state in (State.NEGOTIATED, State.ABORTED):
            break
        data = ours.take_output()
        secure = ours.state is State.STARTTLS
        for at in range(0, len(data), cut):
            theirs.receive(data[at : at + cut])
        assert (theirs.state is ClientState.STARTTLS) is secure
        if secure:
            assert theirs.take_output() == b""
            ours.tls_started()
            theirs.tls_started()
        data = theirs.take_output()
    if goal is Goal.LIST:
        assert [each.name for each in theirs.exports] == ["disk", "rom"]
    else:
        theirs.receive(ours.take_output())
        assert theirs.negotiated is not None and theirs.negotiated.structured_replies


def test_neither_end_takes_bytes_while_the_other_handshake_runs() -> None:
    ours, theirs = server(), client()
    ours.receive(START)
    theirs.receive(ours.take_output())
    for end in (ours, theirs):
        with pytest.raises(ValueError, match="bytes of a TLS handshake"):
            end.receive(b"\x16")


@pytest.mark.parametrize("more", [b"\x16", go()])
def test_server_refuses_plain_bytes_behind_starttls(more: bytes) -> None:
    handshake = server()
    with pytest.raises(ProtocolError, match="plain bytes between NBD_OPT_STARTTLS and the TLS handshake"):
        handshake.receive(START + more)
    assert handshake.state is State.FAILED


@pytest.mark.parametrize("more", [b"\x16", reply(c.OPT_GO, c.REP_ACK)])
def test_client_refuses_plain_bytes_behind_the_answer(more: bytes) -> None:
    """Whoever is in between could put answers there that seem to have been given inside."""
    handshake = client()
    with pytest.raises(ProtocolError, match="plain bytes before the TLS handshake"):
        handshake.receive(reply(c.OPT_STARTTLS, c.REP_ACK) + more)
    assert handshake.state is ClientState.FAILED


@pytest.mark.parametrize("kind", [c.REP_ERR_POLICY, c.REP_ERR_UNSUP, c.REP_ERR_INVALID, c.REP_ERR_SHUTDOWN])
def test_client_never_goes_on_in_plain_text(kind: int) -> None:
    """Not even if the server (or somebody in its place) says that it knows no TLS."""
    handshake = client()
    with pytest.raises(NegotiationRefused) as caught:
        handshake.receive(reply(c.OPT_STARTTLS, kind, b"no"))
    assert (caught.value.option, caught.value.reply, caught.value.text) == (c.OPT_STARTTLS, kind, "no")
    assert handshake.take_output() == option(c.OPT_ABORT)


@pytest.mark.parametrize(
    "greeting", [b"NBDMAGICIHAVEOPT\x00\x00", b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + bytes(136)]
)
def test_old_servers_cannot(greeting: bytes) -> None:
    handshake = ClientHandshake(tls=True)
    with pytest.raises(NegotiationRefused, match="cannot speak TLS"):
        handshake.receive(greeting)


def test_server_before_and_after() -> None:
    handshake = server()
    for number in (c.OPT_LIST, c.OPT_GO, c.OPT_INFO, c.OPT_STRUCTURED_REPLY, c.OPT_SET_META_CONTEXT, 77):
        handshake.receive(option(number, b"whatever"))
        text = f"Option {number:#x} not permitted before TLS".encode()
        assert handshake.take_output() == reply(number, c.REP_ERR_TLS_REQD, text)
    handshake.receive(option(c.OPT_STARTTLS, b"x"))
    expected = reply(c.OPT_STARTTLS, c.REP_ERR_INVALID, b"option 'starttls' has unexpected length")
    assert handshake.take_output() == expected
    handshake.receive(START)
    assert handshake.take_output() == reply(c.OPT_STARTTLS, c.REP_ACK)
    handshake.tls_started()
    handshake.receive(START)
    assert handshake.take_output() == reply(c.OPT_STARTTLS, c.REP_ERR_INVALID, b"TLS already enabled")
    handshake.receive(go())
    assert handshake.state is State.NEGOTIATED


def test_server_without_credentials() -> None:
    handshake = ServerHandshake(Table(DISK))
    handshake.take_output()
    handshake.receive(FIXED + START)
    assert handshake.take_output() == reply(c.OPT_STARTTLS, c.REP_ERR_POLICY, b"TLS not configured")


def test_export_name_in_public_closes() -> None:
    handshake = server()
    with pytest.raises(ProtocolError, match="chooses an export before it has asked for TLS"):
        handshake.receive(option(c.OPT_EXPORT_NAME, b"disk"))


def test_abort_in_public_is_answered() -> None:
    handshake = server()
    handshake.receive(option(c.OPT_ABORT))
    assert handshake.take_output() == reply(c.OPT_ABORT, c.REP_ACK) and handshake.state is State.ABORTED
