# SPDX-License-Identifier: Apache-2.0
"""The server's request parser: byte-exact requests, in place, limits, rejects, broken streams."""

from __future__ import annotations

import struct

import pytest

from bottomhalf.host.request import (
    DISCARD,
    FLUSH,
    FUA,
    IN_PROGRESS,
    MAY_UNMAP,
    NO_FALLBACK,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bottomhalf.wire.nbd import constants as c
from bottomhalf.wire.nbd.batch import (
    BLOCK_STATUS,
    CACHE,
    DONT_FRAGMENT,
    EMPTY,
    REQ_ONE,
    Batch,
    NbdRequest,
)
from bottomhalf.wire.nbd.export import READ_ONLY_FLAGS, WRITABLE_FLAGS, ExportInfo, Negotiated
from bottomhalf.wire.nbd.server_transmission import RequestParser
from tests.wire.nbd.nbd_model import request

SIZE = 1 << 20


def parser_for(
    *,
    flags: int = WRITABLE_FLAGS,
    structured: bool = True,
    contexts: dict[int, str] | None = None,
    size: int = SIZE,
    maximum: int = c.MAX_REQUEST,
    alignment: int = 1,
) -> RequestParser:
    export = ExportInfo("x", size, flags=flags, maximum_block_size=maximum)
    told = flags | c.FLAG_SEND_DF if structured else flags
    negotiated = Negotiated(
        export, told, structured, {0: "base:allocation"} if contexts is None else contexts, 1, b""
    )
    return RequestParser(negotiated, alignment=alignment)


def parse(
    parser: RequestParser, data: bytes, max_requests: int = 1000, max_bytes: int = 1 << 30, base: int = 0
) -> tuple[Batch, int, memoryview]:
    """Parse ``data``, which lies between other bytes in its buffer."""
    view = memoryview(bytearray(b"before" + data + b"after" * 20))
    batch = Batch()
    position = parser.parse(view, 6, 6 + len(data), batch, max_requests, max_bytes, base)
    return batch, position - 6, view


def brief(requests: list[Request]) -> list[tuple[int, int, int, int, int]]:
    return [(each.op, each.flags, each.offset, each.length, each.cookie) for each in requests]


def test_a_read_byte_for_byte() -> None:
    data = (
        b"\x25\x60\x95\x13\x00\x00\x00\x00\x12\x34\x56\x78\x9a\xbc\xde\xf0"
        b"\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x02\x00"
    )
    parser = parser_for()
    owner = object()
    parser._owner = owner  # type: ignore[assignment]
    batch, position, _ = parse(parser, data)
    assert position == 28
    (read,) = batch.reads
    assert brief([read]) == [(READ, 0, 0x1000, 0x200, 0x123456789ABCDEF0)]
    assert read.result == IN_PROGRESS and read.owner is owner
    assert (batch.read_bytes, batch.write_bytes, batch.needed, batch.limited) == (512, 0, 0, False)
    assert not batch.disconnect and batch.error is None


@pytest.mark.parametrize("count", [1, 3, 4, 5, 40])
def test_many_reads_in_order(count: int) -> None:
    batch, position, _ = parse(
        parser_for(), b"".join(request(0, i, i * 512, 512 + i) for i in range(count)) + b"\x25\x60"
    )
    assert brief(batch.reads) == [(READ, 0, i * 512, 512 + i, i) for i in range(count)]
    assert position == 28 * count
    assert batch.needed == 28


def test_a_write_is_a_slice_of_the_buffer() -> None:
    data = request(1, 7, 4096, 5, data=b"hello") + request(1, 8, 0, 3, flags=1, data=b"abc")
    batch, position, view = parse(parser_for(), data, base=1 << 32)
    assert position == len(data)
    first, second = batch.writes
    assert brief(batch.writes) == [(WRITE, 0, 4096, 5, 7), (WRITE, FUA, 0, 3, 8)]
    assert bytes(first.buffer) == b"hello" and bytes(second.buffer) == b"abc"
    assert first.address == (1 << 32) + 6 + 28
    view[6 + 28] = ord("j")
    assert bytes(first.buffer) == b"jello"
    assert batch.write_bytes == 8


def test_addresses_are_0_without_a_base() -> None:
    batch, _, _ = parse(parser_for(), request(1, 7, 0, 2, data=b"hi"))
    assert batch.writes[0].address == 0


def test_every_prefix_of_a_write_says_what_it_needs() -> None:
    data = request(1, 7, 4096, 300, data=bytes(300))
    for size in range(len(data)):
        batch, position, _ = parse(parser_for(), data[:size])
        assert position == 0 and not batch.writes and not batch.rejects
        assert batch.needed == (0 if size == 0 else 28 if size < 28 else 328)


def test_the_other_commands() -> None:
    data = b"".join(
        (
            request(3, 1, 0, 0),
            request(4, 2, 512, 1024, flags=1),
            request(5, 3, 0, 4096),
            request(6, 4, 0, SIZE, flags=0),
            request(6, 5, 0, 512, flags=1 | 2 | 16),
            request(7, 6, 0, SIZE, flags=8),
            request(0, 7, 0, 512, flags=4),
            request(0, 8, 0, 512, flags=1),
            request(0, 9, 10, 0),
            request(1, 10, SIZE, 0),
        )
    )
    batch, position, _ = parse(parser_for(), data)
    assert position == len(data)
    assert brief(batch.others) == [
        (FLUSH, 0, 0, 0, 1),
        (DISCARD, FUA, 512, 1024, 2),
        (CACHE, 0, 0, 4096, 3),
        (WRITE_ZEROES, MAY_UNMAP, 0, SIZE, 4),
        (WRITE_ZEROES, FUA | NO_FALLBACK, 0, 512, 5),
        (BLOCK_STATUS, REQ_ONE, 0, SIZE, 6),
        (EMPTY, 0, 10, 0, 9),
        (EMPTY, 0, SIZE, 0, 10),
    ]
    assert brief(batch.reads) == [(READ, DONT_FRAGMENT, 0, 512, 7), (READ, 0, 0, 512, 8)]
    assert batch.read_bytes == 1024 and not batch.rejects
    assert all(each.buffer is None for each in batch.others)
    assert [type(each) is NbdRequest for each in batch.others] == [
        each.op > WRITE_ZEROES for each in batch.others
    ]
    assert "block-status" in repr(batch.others[5])


READ_ONLY = {"flags": READ_ONLY_FLAGS}
PLAIN = {"flags": c.FLAG_HAS_FLAGS}


@pytest.mark.parametrize(
    ("options", "command", "offset", "length", "flags", "words"),
    [
        ({}, 0, SIZE - 511, 512, 0, "past the end"),
        ({}, 0, SIZE, 1, 0, "past the end"),
        ({}, 0, (1 << 64) - 1, 512, 0, "past the end"),
        ({"size": 64 << 20}, 0, 0, c.MAX_REQUEST + 1, 0, "exceed the maximum"),
        ({"maximum": 4096}, 0, 0, 4097, 0, "exceed the maximum of 4096"),
        ({"size": 64 << 20}, 5, 0, c.MAX_REQUEST + 1, 0, "exceed the maximum"),
        ({"alignment": 512}, 0, 1, 512, 0, "aligned"),
        ({"alignment": 512}, 0, 512, 1, 0, "aligned"),
        ({"alignment": 512}, 4, 512, 1, 0, "aligned"),
        ({}, 0, 0, 512, 2, "flags 0x2"),
        ({}, 0, 0, 512, 0x8000, "flags 0x8000"),
        ({"structured": False}, 0, 0, 512, 4, "flags 0x4"),
        (PLAIN, 0, 0, 512, 1, "flags 0x1"),
        (PLAIN, 4, 0, 512, 0, "not offered"),
        (PLAIN, 5, 0, 512, 0, "not offered"),
        (PLAIN, 6, 0, 512, 0, "not offered"),
        (READ_ONLY, 4, 0, 512, 0, "read-only"),
        (READ_ONLY, 6, 0, 512, 0, "read-only"),
        ({}, 4, SIZE - 1, 2, 0, "past the end"),
        ({}, 6, SIZE - 1, 2, 0, "past the end"),
        ({}, 7, SIZE - 1, 2, 0, "past the end"),
        ({}, 7, 0, 0, 0, "zero"),
        ({"contexts": {}}, 7, 0, 512, 0, "no metadata context"),
        ({"structured": False}, 7, 0, 512, 0, "no metadata context"),
        ({}, 3, 0, 0, 2, "flags 0x2"),
        ({}, 8, 0, 0, 0, "unknown command 8"),
        ({}, 0xFFFF, 0, 0, 0, "unknown command 65535"),
    ],
)
def test_rejects(
    options: dict[str, object], command: int, offset: int, length: int, flags: int, words: str
) -> None:
    data = request(command, 99, offset, length, flags) + request(0, 5, 0, 1 << 9)
    batch, position, _ = parse(parser_for(**options), data * 3)  # type: ignore[arg-type]
    assert position == len(data) * 3
    for reject in batch.rejects:
        assert (reject.cookie, reject.error, reject.command) == (99, c.NBD_EINVAL, command)
        assert words in reject.text
    assert len(batch.rejects) == 3 and len(batch.reads) == 3 and batch.read_bytes == 3 * 512
    assert not batch.others and not batch.writes


@pytest.mark.parametrize(
    ("options", "offset", "flags", "words"),
    [
        ({}, SIZE - 99, 0, "past the end"),
        (READ_ONLY, 0, 0, "read-only"),
        ({"maximum": 64}, 0, 0, "exceed"),
        ({}, 0, 2, "flags"),
        (PLAIN, 0, 1, "flags"),
        ({"alignment": 64}, 0, 0, "aligned"),
    ],
)
def test_the_payload_of_a_rejected_write_is_skipped(
    options: dict[str, object], offset: int, flags: int, words: str
) -> None:
    write = request(1, 99, offset, 100, flags, data=request(0, 666, 0, 512) * 3 + bytes(16))
    stream = request(0, 1, 0, 64) + write + request(0, 2, 0, 64)
    for cut in range(len(stream) + 1):
        parser = parser_for(**options)  # type: ignore[arg-type]
        first, position, _ = parse(parser, stream[:cut])
        second, rest, _ = parse(parser, stream[position:])
        assert position + rest == len(stream) == parser.consumed
        assert [each.cookie for each in first.reads + second.reads] == [1, 2]
        (reject,) = first.rejects + second.rejects
        assert reject.cookie == 99 and words in reject.text
        assert not first.writes and not second.writes


def test_a_write_too_large_to_skip_ends_the_stream() -> None:
    for offset in (0, 1 << 63):
        batch, position, _ = parse(
            parser_for(size=1 << 40), request(0, 1, 0, 512) + request(1, 2, offset, c.MAX_REQUEST + 1)
        )
        assert position == 28 and len(batch.reads) == 1
        assert batch.error is not None and "too large" in str(batch.error)
        assert batch.error.offset == 28


def test_the_largest_write_is_awaited() -> None:
    batch, position, _ = parse(parser_for(size=1 << 40), request(1, 2, 0, c.MAX_REQUEST))
    assert position == 0 and batch.needed == 28 + c.MAX_REQUEST


@pytest.mark.parametrize("before", [0, 1, 6])
def test_wrong_magic_ends_the_stream_after_the_good_requests(before: int) -> None:
    parser = parser_for()
    parse(parser, request(0, 1, 0, 512) * 2)
    bad = b"\x25\x60\x95\x14" + request(0, 1, 0, 512)[4:]
    batch, position, _ = parse(parser, request(0, 1, 0, 512) * before + bad)
    assert position == before * 28 and len(batch.reads) == before
    assert batch.error is not None
    assert batch.error.offset == (2 + before) * 28
    assert "0x25609514" in str(batch.error) and "probably a client bug" in str(batch.error)


def test_disconnect_ends_the_parse() -> None:
    batch, position, _ = parse(parser_for(), request(3, 1, 0, 0) + request(2, 2, 0, 0) + b"garbage" * 9)
    assert batch.disconnect and batch.error is None
    assert len(batch.others) == 1 and position == 56


@pytest.mark.parametrize("max_requests", [0, 1, 2, 4, 5, 7, 12])
def test_max_requests(max_requests: int) -> None:
    kinds = [request(0, 0, 0, 512)] * 5 + [request(1, 1, 0, 2, data=b"xy"), request(3, 2, 0, 0)]
    stream = b"".join([*kinds, request(9, 3, 0, 0), request(0, 4, 0, 512)])
    batch, position, _ = parse(parser_for(), stream, max_requests=max_requests)
    taken = len(batch.reads) + len(batch.writes) + len(batch.others) + len(batch.rejects)
    assert taken == min(max_requests, 9)
    assert batch.limited == (max_requests < 9)
    rest, position_2, _ = parse(parser_for(), stream[position:])
    assert position + position_2 == len(stream)
    assert len(rest.reads) + len(batch.reads) == 6


@pytest.mark.parametrize("flags", [0, 4])
@pytest.mark.parametrize("count", [2, 9])
def test_max_bytes_takes_at_least_one(flags: int, count: int) -> None:
    stream = request(0, 0, 0, 1000, flags) * count
    for max_bytes, expected in ((0, 1), (999, 1), (1000, 1), (1999, 1), (2000, 2), (1 << 20, count)):
        batch, position, _ = parse(parser_for(), stream, max_bytes=max_bytes)
        assert len(batch.reads) == expected and batch.read_bytes == expected * 1000
        assert batch.limited == (expected < count)
        assert position == expected * 28


def test_max_bytes_counts_writes() -> None:
    stream = request(1, 0, 0, 100, data=bytes(100)) * 3
    batch, position, _ = parse(parser_for(), stream, max_bytes=250)
    assert len(batch.writes) == 2 and batch.limited and position == 256


def test_the_pool_is_used_and_stale_fields_do_not_show() -> None:
    parser = parser_for()
    first, _, _ = parse(parser, request(1, 1, 0, 2, 1, data=b"xy"))
    (used,) = first.writes
    used.result = 0
    parser.release(first.writes)
    second, _, _ = parse(parser, request(0, 2, 512, 512))
    assert second.reads == [used]
    assert brief(second.reads) == [(READ, 0, 512, 512, 2)] and used.result == IN_PROGRESS
    assert parser.pool == []
    # A run of reads that ends early gives back what it did not use, and nothing twice.
    parser.release(second.reads)
    mixed, _, _ = parse(parser, request(0, 3, 0, 512) * 5 + request(1, 4, 0, 1, data=b"z") * 5)
    everything = mixed.reads + mixed.writes + parser.pool
    assert len(mixed.reads) == len(mixed.writes) == 5
    assert len({id(each) for each in everything}) == len(everything)


def test_a_cleared_batch_leaves_its_lists_to_who_took_them() -> None:
    parser = parser_for()
    batch, _, _ = parse(parser, request(0, 1, 0, 512) + request(3, 1, 0, 0) + request(9, 0, 0, 0))
    reads, others, rejects = batch.reads, batch.others, batch.rejects
    batch.clear()
    assert (len(reads), len(others), len(rejects)) == (1, 1, 1)
    assert not batch.reads and not batch.others and not batch.rejects and batch.read_bytes == 0


def test_the_layout_of_requests_is_the_specification_s() -> None:
    assert c.REQUEST.size == struct.calcsize(">IHHQQI") == 28
    assert c.REQUEST_HEAD >> 32 == 0x25609513
