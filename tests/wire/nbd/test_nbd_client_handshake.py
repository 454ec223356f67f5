# SPDX-License-Identifier: Apache-2.0
"""The client's negotiation against servers of every age, written by hand, and against servers that lie."""

from __future__ import annotations

import struct

import pytest

from bottomhalf.wire.nbd import constants as c
from bottomhalf.wire.nbd.client_handshake import ClientHandshake, ClientState, Goal
from bottomhalf.wire.nbd.errors import NegotiationRefused, ProtocolError
from tests.wire.nbd.nbd_model import option, reply

NEWSTYLE = b"NBDMAGICIHAVEOPT"
FIXED = NEWSTYLE + b"\x00\x03"
UNSUP = 0x80000001
BASE = b"base:allocation"
INFO_EXPORT = struct.pack(">HQH", 0, 1 << 20, 0x6D)
BLOCK_SIZES = struct.pack(">HIII", 3, 512, 4096, 32 << 20)
GO_DISK = option(7, b"\x00\x00\x00\x04disk" + b"\x00\x02" + b"\x00\x02" + b"\x00\x03")
SET_BASE = option(10, b"\x00\x00\x00\x04disk" + b"\x00\x00\x00\x01" + b"\x00\x00\x00\x0f" + BASE)
ABORT = option(2)


def say(handshake: ClientHandshake, data: bytes) -> bytes:
    handshake.receive(data)
    return handshake.take_output()


def started(**options: object) -> ClientHandshake:
    """A client that has sent its flags and its first option."""
    handshake = ClientHandshake("disk", **options)  # type: ignore[arg-type]
    handshake.receive(FIXED)
    return handshake


def test_all_extensions() -> None:
    handshake = ClientHandshake("disk")
    assert handshake.take_output() == b""
    assert say(handshake, FIXED) == b"\x00\x00\x00\x03" + option(8)
    assert say(handshake, reply(8, 1)) == SET_BASE
    assert say(handshake, reply(10, 4, b"\x00\x00\x00\x09" + BASE) + reply(10, 1)) == GO_DISK
    told = reply(7, 3, b"\x00\x02a disk") + reply(7, 3, BLOCK_SIZES) + reply(7, 3, b"\x00\x63new")
    assert say(handshake, told + reply(7, 3, INFO_EXPORT) + reply(7, 1) + b"left") == b""
    assert handshake.state is ClientState.NEGOTIATED
    negotiated = handshake.negotiated
    assert negotiated is not None
    export = negotiated.export
    assert (export.name, export.description, export.size, export.flags) == ("disk", "a disk", 1 << 20, 0x6D)
    assert (export.minimum_block_size, export.preferred_block_size) == (512, 4096)
    assert negotiated.structured_replies
    assert negotiated.contexts == {"base:allocation": 9}
    assert negotiated.leftover == b"left"
    assert negotiated.longest_request == 32 << 20
    with pytest.raises(ValueError, match="over"):
        handshake.receive(b"")


def test_a_server_without_extensions_gets_export_name() -> None:
    handshake = ClientHandshake("disk")
    handshake.receive(FIXED)
    handshake.take_output()
    assert say(handshake, reply(8, UNSUP, b"what?")) == GO_DISK
    assert say(handshake, reply(7, UNSUP)) == option(1, b"disk")
    assert say(handshake, struct.pack(">QH", 4096, 1) + b"x") == b""
    negotiated = handshake.negotiated
    assert negotiated is not None
    assert negotiated.export.size == 4096 and not negotiated.structured_replies
    assert negotiated.contexts == {} and negotiated.leftover == b"x"


def test_a_server_that_refuses_contexts_is_used_without() -> None:
    handshake = started()
    handshake.receive(reply(8, 1) + reply(10, 0x80000003))
    assert handshake.take_output().endswith(GO_DISK)
    handshake.receive(reply(7, 3, INFO_EXPORT) + reply(7, 1))
    assert handshake.negotiated is not None
    assert handshake.negotiated.structured_replies and handshake.negotiated.contexts == {}


@pytest.mark.parametrize(("flags", "answer"), [(b"\0\0", b"\0\0\0\0"), (b"\0\2", b"\0\0\0\2")])
def test_newstyle_that_is_not_fixed(flags: bytes, answer: bytes) -> None:
    handshake = ClientHandshake("disk")
    assert say(handshake, NEWSTYLE + flags) == answer + option(1, b"disk")
    zeroes = bytes(124) if flags == b"\0\0" else b""
    handshake.receive(struct.pack(">QH", 4096, 1) + zeroes + b"rest")
    assert handshake.negotiated is not None and handshake.negotiated.leftover == b"rest"


def test_oldstyle() -> None:
    greeting = b"NBDMAGIC" + struct.pack(">QQI", 0x00420281861253, 4096, 3) + bytes(124)
    handshake = ClientHandshake()
    assert say(handshake, greeting) == b""
    assert handshake.negotiated is not None
    assert (handshake.negotiated.export.size, handshake.negotiated.export.flags) == (4096, 3)
    with pytest.raises(NegotiationRefused, match="without a name"):
        ClientHandshake("disk").receive(greeting)


def test_simple_replies_on_request() -> None:
    handshake = ClientHandshake("disk", structured_replies=False)
    assert say(handshake, FIXED) == b"\x00\x00\x00\x03" + GO_DISK


def test_list_with_details() -> None:
    handshake = ClientHandshake(goal=Goal.LIST)
    assert say(handshake, FIXED).endswith(option(8))
    assert say(handshake, reply(8, 1)) == option(3)
    listed = reply(3, 2, b"\0\0\0\1a" + b"first") + reply(3, 2, b"\0\0\0\1b")
    assert say(handshake, listed) == b""
    ask = b"\0\2\0\2\0\3"
    assert say(handshake, reply(3, 1)) == option(6, b"\0\0\0\1a" + ask)
    assert say(handshake, reply(6, 3, INFO_EXPORT) + reply(6, 1)) == option(6, b"\0\0\0\1b" + ask)
    assert say(handshake, reply(6, 0x80000002, b"secret")) == option(9, b"\0\0\0\1a\0\0\0\0")
    contexts = reply(9, 4, b"\0\0\0\0" + BASE) + reply(9, 4, b"\0\0\0\0x:y") + reply(9, 1)
    assert say(handshake, contexts) == option(9, b"\0\0\0\1b\0\0\0\0")
    assert say(handshake, reply(9, UNSUP)) == ABORT
    assert handshake.state is ClientState.CLOSED and handshake.negotiated is None
    first, second = handshake.exports
    assert (first.name, first.description, first.size) == ("a", "first", 1 << 20)
    assert first.contexts == ["base:allocation", "x:y"]
    assert (second.name, second.size, second.contexts) == ("b", -1, [])
    handshake.eof()


def test_list_from_a_server_without_info() -> None:
    handshake = ClientHandshake(goal=Goal.LIST)
    handshake.receive(FIXED + reply(8, UNSUP))
    handshake.receive(reply(3, 2, b"\0\0\0\1a") + reply(3, 2, b"\0\0\0\1b") + reply(3, 1))
    handshake.take_output()
    assert say(handshake, reply(6, UNSUP)) == ABORT
    assert [export.name for export in handshake.exports] == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (reply(8, UNSUP) + reply(7, 0x80000006, b"no such export"), c.REP_ERR_UNKNOWN),
        (reply(8, UNSUP) + reply(7, 0x80000002, b"no such export"), c.REP_ERR_POLICY),
        (reply(8, 0x80000005, b"no such export"), c.REP_ERR_TLS_REQD),
        (reply(8, 1) + reply(10, 0x80000007, b"no such export"), c.REP_ERR_SHUTDOWN),
    ],
)
def test_refusals_end_with_an_abort(data: bytes, kind: int) -> None:
    handshake = started()
    with pytest.raises(NegotiationRefused, match="no such export") as caught:
        handshake.receive(data)
    assert caught.value.reply == kind and caught.value.text == "no such export"
    assert handshake.take_output().endswith(ABORT)
    assert handshake.state is ClientState.FAILED
    with pytest.raises(NegotiationRefused):
        handshake.receive(b"")


def test_list_refused() -> None:
    handshake = ClientHandshake(goal=Goal.LIST, structured_replies=False)
    with pytest.raises(NegotiationRefused):
        handshake.receive(FIXED + reply(3, 0x80000002))
    for data in (NEWSTYLE + b"\0\0", b"NBDMAGIC" + struct.pack(">QQI", 0x420281861253, 1, 1) + bytes(124)):
        with pytest.raises(NegotiationRefused):
            ClientHandshake(goal=Goal.LIST).receive(data)


AT_GO = reply(8, UNSUP)
AT_SET = reply(8, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"X" + reply(8, 1)[1:],
        reply(9, 1),
        reply(8, 3, INFO_EXPORT),
        reply(8, 1, b"data"),
        reply(8, 77),
        struct.pack(">QIII", c.OPTION_REPLY_MAGIC, 8, UNSUP, c.MAX_REPLY_DATA + 1),
        AT_GO + reply(7, 1),
        AT_GO + reply(7, 2, b"\0\0\0\0"),
        AT_GO + reply(7, 3, b"\0"),
        AT_GO + reply(7, 3, INFO_EXPORT[:-1]),
        AT_GO + reply(7, 3, BLOCK_SIZES + b"\0"),
        AT_GO + reply(7, 3, struct.pack(">HQH", 0, 1 << 63, 1)),
        AT_GO + reply(7, 3, struct.pack(">HIII", 3, 0, 4096, 1 << 20)),
        AT_GO + reply(7, 3, struct.pack(">HIII", 3, 3, 4096, 1 << 20)),
        AT_GO + reply(7, 3, struct.pack(">HIII", 3, 1 << 17, 1 << 20, 1 << 20)),
        AT_GO + reply(7, 3, struct.pack(">HIII", 3, 512, 256, 1 << 20)),
        AT_GO + reply(7, 3, struct.pack(">HIII", 3, 512, 4097, 1 << 20)),
        AT_GO + reply(7, 3, struct.pack(">HIII", 3, 512, 4096, 511)),
        AT_GO + reply(7, 3, struct.pack(">HIII", 3, 512, 4096, 1025)),
        AT_GO + reply(7, 3, b"\0\2\xff"),
        AT_GO + reply(7, 3, b"\0\1" + b"x" * 4097),
        AT_GO + reply(7, UNSUP) + struct.pack(">QH", 1 << 63, 1),
        AT_SET + reply(10, 4, b"\0\0\0\0"),
        AT_SET + reply(10, 4, b"\0\0"),
        AT_SET + reply(10, 4, b"\0\0\0\0other:context"),
        AT_SET + reply(10, 4, b"\0\0\0\0" + BASE) * 2,
        AT_SET + reply(10, 4, b"\0\0\0\0\xff"),
    ],
)
def test_lies(data: bytes) -> None:
    handshake = started()
    with pytest.raises(ProtocolError):
        handshake.receive(data)
    assert handshake.state is ClientState.FAILED
    with pytest.raises(ProtocolError):
        handshake.receive(b"")


@pytest.mark.parametrize("data", [b"\0\0", b"\0\0\0\2a", b"\0\0\0\1\xff", b"\0\0\0\0" + b"x" * 4097])
def test_lies_in_a_list(data: bytes) -> None:
    handshake = ClientHandshake(goal=Goal.LIST, structured_replies=False)
    with pytest.raises(ProtocolError):
        handshake.receive(FIXED + reply(3, 2, data))


@pytest.mark.parametrize("greeting", [b"NBDMAGIX", b"NBDMAGICIHAVEOPX", b"SSH-2.0-OpenSSH"])
def test_not_an_nbd_server(greeting: bytes) -> None:
    with pytest.raises(ProtocolError, match="probably not an NBD server"):
        ClientHandshake().receive(greeting)


def test_number_of_replies() -> None:
    handshake = ClientHandshake(goal=Goal.LIST, structured_replies=False)
    handshake.receive(FIXED)
    handshake.receive(reply(3, 2, b"\0\0\0\0") * c.MAX_REPLIES)
    with pytest.raises(ProtocolError, match="replies"):
        handshake.receive(reply(3, 2, b"\0\0\0\0"))


def test_export_name_too_long() -> None:
    ClientHandshake("x" * c.MAX_EXPORT_NAME)
    with pytest.raises(ValueError, match="longer"):
        ClientHandshake("x" * (c.MAX_EXPORT_NAME + 1))


def test_eof_says_where() -> None:
    handshake = ClientHandshake("disk")
    handshake.receive(b"NBD")
    with pytest.raises(ProtocolError, match=r"first magic.*byte 3"):
        handshake.eof()
    handshake = ClientHandshake("disk")
    handshake.receive(NEWSTYLE + b"\0\2")
    with pytest.raises(ProtocolError, match="no such export"):
        handshake.eof()
    assert handshake.state is ClientState.FAILED
