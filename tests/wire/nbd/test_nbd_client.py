# SPDX-License-Identifier: Apache-2.0
"""The client's transmission phase: requests byte for byte, replies in pieces, servers that lie."""

from __future__ import annotations

import errno
import struct

import pytest

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd import constants as c
from bottomhalf.wire.nbd import replies
from bottomhalf.wire.nbd.client import Client
from bottomhalf.wire.nbd.client_options import ClientExport, ClientNegotiated
from bottomhalf.wire.nbd.client_replies import Completion
from bottomhalf.wire.nbd.export import READ_ONLY_FLAGS, WRITABLE_FLAGS
from tests.wire.nbd.nbd_model import request

SIZE = 1 << 20
ALL = WRITABLE_FLAGS | c.FLAG_SEND_DF


def client_for(
    *, structured: bool = True, flags: int = ALL, strict: bool = True, minimum: int = 0, maximum: int = 0
) -> Client:
    export = ClientExport("x", size=SIZE, flags=flags, minimum_block_size=minimum, maximum_block_size=maximum)
    contexts = {"base:allocation": 5, "x:y": 6} if structured else {}
    return Client(ClientNegotiated(export, structured, contexts, b""), strict=strict)


def only(completions: list[Completion]) -> Completion:
    (completion,) = completions
    return completion


def test_requests_byte_for_byte() -> None:
    client = client_for()
    assert client.read(4096, 512) == (request(0, 1, 4096, 512), 1)
    assert client.read(0, 1, dont_fragment=True)[0] == request(0, 2, 0, 1, 4)
    assert client.write(7, b"abc") == (request(1, 3, 7, 3, 0, b"abc"), 3)
    assert client.write(7, memoryview(b"abc"), fua=True)[0] == request(1, 4, 7, 3, 1, b"abc")
    assert client.write_header(7, 3)[0] == request(1, 5, 7, 3)
    assert client.flush()[0] == request(3, 6, 0, 0)
    assert client.trim(512, 1024, fua=True)[0] == request(4, 7, 512, 1024, 1)
    assert client.cache(0, 9)[0] == request(5, 8, 0, 9)
    assert client.write_zeroes(0, SIZE)[0] == request(6, 9, 0, SIZE)
    assert client.write_zeroes(0, 1, fua=True, no_hole=True, fast=True)[0] == request(6, 10, 0, 1, 19)
    assert client.block_status(0, 1)[0] == request(7, 11, 0, 1)
    assert client.block_status(0, 1, one=True)[0] == request(7, 12, 0, 1, 8)
    assert client.in_flight == 12
    with pytest.raises(ValueError, match="in flight"):
        client.disconnect()
    client = client_for()
    assert client.disconnect() == request(2, 0, 0, 0)
    with pytest.raises(ValueError, match="after disconnect"):
        client.flush()


@pytest.mark.parametrize(
    ("options", "method", "arguments"),
    [
        ({}, "read", (SIZE, 1)),
        ({}, "read", (-1, 1)),
        ({}, "read", (0, 0)),
        ({}, "write", (SIZE - 1, b"xy")),
        ({"maximum": 4096}, "read", (0, 4097)),
        ({"minimum": 512}, "read", (1, 512)),
        ({"minimum": 512}, "trim", (0, 513)),
        ({"flags": READ_ONLY_FLAGS}, "write", (0, b"x")),
        ({"flags": READ_ONLY_FLAGS}, "trim", (0, 1)),
        ({"flags": READ_ONLY_FLAGS}, "write_zeroes", (0, 1)),
        ({"flags": 1}, "flush", ()),
        ({"flags": 0}, "trim", (0, 1)),
        ({"flags": 1}, "cache", (0, 1)),
        ({"structured": False}, "block_status", (0, 1)),
    ],
)
def test_strictness(options: dict[str, object], method: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(ValueError):
        getattr(client_for(**options), method)(*arguments)  # type: ignore[arg-type]
    if arguments[:1] != (-1,):
        getattr(client_for(**options, strict=False), method)(*arguments)  # type: ignore[arg-type]


def test_strict_flags() -> None:
    client = client_for(flags=1 | c.FLAG_SEND_WRITE_ZEROES)
    for flag in ({"fua": True}, {"fast": True}):
        with pytest.raises(ValueError, match="flag"):
            client.write_zeroes(0, 1, **flag)
    with pytest.raises(ValueError, match="flag"):
        client.read(0, 1, dont_fragment=True)
    client_for(flags=0).read(0, 1)
    with pytest.raises(ValueError, match="buffer"):
        client.read(0, 2, into=memoryview(bytearray(1)))


def test_simple_replies_in_any_order() -> None:
    client = client_for(structured=False)
    client.read(0, 4)
    client.write(0, b"x")
    client.read(4, 2)
    stream = (
        replies.simple_reply(3)
        + b"zz"
        + replies.simple_reply(2, c.NBD_ENOSPC)
        + replies.simple_reply(1)
        + b"abcd"
    )
    third, second, first = client.receive(stream)
    assert (third.cookie, third.data, third.offset, third.length) == (3, b"zz", 4, 2)
    assert (second.cookie, second.error, second.errno, second.data) == (2, 28, errno.ENOSPC, None)
    assert (first.cookie, first.data, first.error, first.errno) == (1, b"abcd", 0, 0)
    assert client.in_flight == 0
    client.eof()


def test_a_failed_simple_read_has_no_data() -> None:
    client = client_for(structured=False)
    client.read(0, 4)
    done = only(client.receive(replies.simple_reply(1, c.NBD_EIO)))
    assert (done.error, done.data) == (c.NBD_EIO, None)


PIECES = (
    replies.offset_data(1, 104, 3, done=False)
    + b"efg"
    + replies.offset_hole(1, 107, 3, done=False)
    + replies.result_reply(2, 0, True)
    + replies.offset_data(1, 100, 4)
    + b"abcd"
)


def test_structured_pieces_cut_everywhere() -> None:
    for cut in range(len(PIECES) + 1):
        client = client_for()
        target = memoryview(bytearray(b"?" * 10))
        client.read(100, 10, into=target)
        client.flush()
        found = client.receive(PIECES[:cut]) + client.receive(PIECES[cut:])
        assert [done.cookie for done in found] == [2, 1]
        assert found[1].data is target and bytes(target) == b"abcdefg\0\0\0"


def test_structured_pieces_byte_by_byte() -> None:
    client = client_for()
    client.read(100, 10)
    client.flush()
    found = [done for number in PIECES for done in client.receive(bytes([number]))]
    assert found[1].data == b"abcdefg\0\0\0"


def test_errors_with_text_and_offset() -> None:
    client = client_for()
    client.read(100, 10)
    stream = replies.offset_data(1, 100, 5, done=False) + b"abcde"
    stream += replies.error_offset_chunk(1, c.NBD_EIO, 105, "bad sector", done=False)
    stream += replies.error_offset_chunk(1, c.NBD_ENOMEM, 108, "worse", done=False)
    done = only(client.receive(stream + replies.none(1)))
    assert (done.error, done.text, done.error_offset) == (c.NBD_EIO, "bad sector", 105)
    assert done.data is None


def test_an_unknown_error_type_fails_the_request_only() -> None:
    client = client_for()
    client.flush()
    payload = struct.pack(">IH", 5, 2) + b"no" + b"what else"
    header = struct.pack(">IHHQI", 0x668E33EF, 1, 0x8077, 1, len(payload))
    done = only(client.receive(header + payload))
    assert (done.error, done.text) == (5, "no")


def test_block_status() -> None:
    client = client_for()
    client.block_status(0, 1000)
    stream = replies.block_status(1, 6, [(1000, 1)], done=False)
    stream += replies.block_status(1, 5, [(500, 3), (5000, 0)])
    assert only(client.receive(stream)).extents == {6: [(1000, 1)], 5: [(500, 3), (5000, 0)]}
    client.block_status(0, 1000)
    done = only(client.receive(replies.error_chunk(2, c.NBD_EINVAL, "no")))
    assert (done.error, done.extents) == (c.NBD_EINVAL, {})
    client.block_status(0, 1000)
    assert only(client.receive(replies.simple_reply(3, c.NBD_EINVAL))).error == c.NBD_EINVAL


def chunk(kind: int, payload: bytes, flags: int = 1, cookie: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


A = replies.offset_data(1, 100, 4, done=False) + b"abcd"
LIES = {
    "read": [
        b"\x67\x44\x66\x99" + bytes(12),
        b"\x66\x8e\x33\xee" + bytes(16),
        replies.simple_reply(1),
        replies.simple_reply(2),
        replies.none(2),
        replies.none(1),
        A + replies.none(1),
        A + A,
        A + replies.offset_hole(1, 103, 2),
        A + replies.simple_reply(1, 5),
        replies.offset_data(1, 99, 4),
        replies.offset_data(1, 108, 3),
        replies.offset_data(1, (1 << 64) - 1, 3),
        replies.offset_hole(1, 100, 11),
        replies.offset_hole(1, 100, 0),
        replies.offset_data(1, 100, 0),
        replies.offset_data(1, 100, 11),
        chunk(1, bytes(7)),
        chunk(2, bytes(11)),
        chunk(2, bytes(13)),
        chunk(0, b"", flags=0),
        chunk(0, b"x"),
        chunk(5, bytes(12)),
        chunk(6, bytes(12)),
        chunk(3, bytes(12)),
        chunk(0x8001, bytes(5)),
        chunk(0x8001, bytes(6)),
        chunk(0x8001, struct.pack(">IH", 5, 1)),
        chunk(0x8077, struct.pack(">IH", 5, 1)),
        chunk(0x8002, struct.pack(">IH", 5, 0)),
        chunk(0x8002, struct.pack(">IHQ", 5, 1, 100)),
        chunk(0x8002, struct.pack(">IHQ", 5, 0, 99)),
        chunk(0x8002, struct.pack(">IHQ", 5, 0, 110)),
        chunk(0x8001, bytes(c.MAX_ERROR_CHUNK + 1))[:20],
        replies.error_offset_chunk(1, 5, 102, done=False) + A,
    ],
    "flush": [chunk(1, bytes(9)), chunk(2, bytes(12)), chunk(5, bytes(12))],
    "block_status": [
        replies.simple_reply(1),
        replies.none(1),
        replies.block_status(1, 5, [(1, 1)]),
        replies.block_status(1, 7, [(1, 1)]),
        replies.block_status(1, 5, [(1, 1)], done=False) * 2,
        replies.block_status(1, 5, []),
        replies.block_status(1, 5, [(0, 0)]),
        replies.block_status(1, 5, [(10, 0), (1, 0)]),
        chunk(5, bytes(13)),
        chunk(5, bytes(3)),
        struct.pack(">IHHQI", 0x668E33EF, 1, 5, 1, 4 + 8 * (c.MAX_BLOCK_STATUS_EXTENTS + 1)),
        chunk(1, bytes(9)),
    ],
}


@pytest.mark.parametrize(("method", "data"), [(method, data) for method in LIES for data in LIES[method]])
def test_lies(method: str, data: bytes) -> None:
    client = client_for()
    getattr(client, method)(*(() if method == "flush" else (100, 10)))
    with pytest.raises(ProtocolError, match="probably a server bug") as caught:
        client.receive(data)
    assert 0 <= caught.value.offset <= len(data)
    with pytest.raises(ProtocolError):
        client.receive(b"")


def test_one_extent_means_one_that_is_not_longer() -> None:
    for extents in ([(1, 0), (1, 0)], [(11, 0)]):
        client = client_for()
        client.block_status(100, 10, one=True)
        with pytest.raises(ProtocolError):
            client.receive(replies.block_status(1, 5, extents, done=False))


def test_df_means_one_piece() -> None:
    client = client_for()
    client.read(100, 10, dont_fragment=True)
    with pytest.raises(ProtocolError, match="DF"):
        client.receive(A + replies.offset_data(1, 104, 6))


def test_structured_chunks_need_negotiation() -> None:
    client = client_for(structured=False)
    client.flush()
    with pytest.raises(ProtocolError, match="magic"):
        client.receive(replies.none(1))


def test_number_of_chunks() -> None:
    client = client_for()
    client.read(0, SIZE)
    some = b"".join(replies.offset_hole(1, 2 * i, 1, done=False) for i in range(c.MAX_CHUNKS))
    assert client.receive(some) == []
    with pytest.raises(ProtocolError, match="chunks in one reply"):
        client.receive(replies.offset_hole(1, 1, 1))


def test_what_completed_before_an_error_is_not_lost() -> None:
    client = client_for()
    client.flush()
    with pytest.raises(ProtocolError):
        client.receive(replies.none(1) + replies.none(1))
    assert [done.cookie for done in client.take_completions()] == [1]


def test_eof_with_a_reply_owed_or_without_its_end() -> None:
    client = client_for()
    client.eof()
    client.read(100, 10)
    client.flush()
    client.receive(A)
    with pytest.raises(ProtocolError, match="2 requests, 1 of them begun"):
        client.eof()


def test_an_empty_read_of_a_client_that_is_not_strict() -> None:
    client = client_for(strict=False)
    client.read(0, 0)
    assert only(client.receive(replies.none(1))).data == b""
    client = client_for(strict=False, structured=False)
    client.read(0, 0)
    assert only(client.receive(replies.simple_reply(1))).data == b""
