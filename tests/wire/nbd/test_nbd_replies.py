# SPDX-License-Identifier: Apache-2.0
"""Replies against bytes written by hand from the specification, and the mapping of errors."""

from __future__ import annotations

import errno

import pytest

from bottomhalf.host.request import Request
from bottomhalf.wire.nbd import constants as c
from bottomhalf.wire.nbd import replies

COOKIE = 0x0102030405060708
COOKIE_BYTES = b"\x01\x02\x03\x04\x05\x06\x07\x08"
SIMPLE = b"\x67\x44\x66\x98"
CHUNK = b"\x66\x8e\x33\xef"


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (replies.simple_reply(COOKIE), SIMPLE + b"\0\0\0\0" + COOKIE_BYTES),
        (replies.simple_reply(COOKIE, 22), SIMPLE + b"\0\0\0\x16" + COOKIE_BYTES),
        (replies.none(COOKIE), CHUNK + b"\0\1\0\0" + COOKIE_BYTES + b"\0\0\0\0"),
        (
            replies.offset_data(COOKIE, 0x10000, 512),
            CHUNK + b"\0\1\0\1" + COOKIE_BYTES + b"\0\0\2\x08" + b"\0\0\0\0\0\1\0\0",
        ),
        (
            replies.offset_data(COOKIE, 0, 1, done=False),
            CHUNK + b"\0\0\0\1" + COOKIE_BYTES + b"\0\0\0\x09" + bytes(8),
        ),
        (
            replies.offset_hole(COOKIE, 512, 4096, done=False),
            CHUNK + b"\0\0\0\2" + COOKIE_BYTES + b"\0\0\0\x0c" + b"\0\0\0\0\0\0\2\0" + b"\0\0\x10\0",
        ),
        (
            replies.block_status(COOKIE, 7, [(512, 3), (1024, 0)]),
            CHUNK
            + b"\0\1\0\5"
            + COOKIE_BYTES
            + b"\0\0\0\x14"
            + b"\0\0\0\7"
            + b"\0\0\2\0\0\0\0\3"
            + b"\0\0\4\0\0\0\0\0",
        ),
        (
            replies.error_chunk(COOKIE, 5, "bad"),
            CHUNK + b"\0\1\x80\1" + COOKIE_BYTES + b"\0\0\0\x09" + b"\0\0\0\5" + b"\0\3bad",
        ),
        (
            replies.error_offset_chunk(COOKIE, 28, 512, "full", done=False),
            CHUNK
            + b"\0\0\x80\2"
            + COOKIE_BYTES
            + b"\0\0\0\x12"
            + b"\0\0\0\x1c"
            + b"\0\4full"
            + b"\0\0\0\0\0\0\2\0",
        ),
        (replies.result_reply(COOKIE, 0, False), SIMPLE + b"\0\0\0\0" + COOKIE_BYTES),
        (replies.result_reply(COOKIE, -errno.EDQUOT, False), SIMPLE + b"\0\0\0\x1c" + COOKIE_BYTES),
        (replies.result_reply(COOKIE, 0, True), CHUNK + b"\0\1\0\0" + COOKIE_BYTES + b"\0\0\0\0"),
        (
            replies.result_reply(COOKIE, -errno.EIO, True, "bad"),
            CHUNK + b"\0\1\x80\1" + COOKIE_BYTES + b"\0\0\0\x09" + b"\0\0\0\5" + b"\0\3bad",
        ),
    ],
)
def test_bytes(made: bytes, expected: bytes) -> None:
    assert made == expected


def test_packing_into_an_arena_leaves_the_rest_alone() -> None:
    arena = bytearray(b"." * 300)
    position = replies.pack_simple_reply(arena, 3, COOKIE, 5)
    position = replies.pack_none(arena, position, COOKIE)
    position = replies.pack_offset_hole(arena, position, COOKIE, 0, 1)
    position = replies.pack_error(arena, position, COOKIE, 5, "no")
    position = replies.pack_error_offset(arena, position, COOKIE, 5, 1, "no")
    position = replies.pack_block_status(arena, position, COOKIE, 0, iter([(1, 1)]))
    assert bytes(arena[3:position]) == b"".join(
        (
            replies.simple_reply(COOKIE, 5),
            replies.none(COOKIE),
            replies.offset_hole(COOKIE, 0, 1),
            replies.error_chunk(COOKIE, 5, "no"),
            replies.error_offset_chunk(COOKIE, 5, 1, "no"),
            replies.block_status(COOKIE, 0, [(1, 1)]),
        )
    )
    assert arena[:3] == b"..." and set(arena[position:]) == {ord(".")}


@pytest.mark.parametrize("structured", [False, True])
def test_reads_are_laid_out_side_by_side(structured: bool) -> None:
    reads = [Request(0, offset, length) for offset, length in ((0, 4096), (8192, 1), (5, 512))]
    for cookie, read in enumerate(reads):
        read.cookie = COOKIE + cookie
    header = 28 if structured else 16
    arena = memoryview(bytearray(10 + 3 * header + 4096 + 1 + 512))
    assert replies.place_reads(reads, arena, 10, 1000, structured) == len(arena)
    expected = bytes(10)
    for number, read in enumerate(reads):
        assert read.start == len(expected)
        assert read.address == 1000 + read.start + header
        assert len(read.buffer) == read.length
        read.buffer[:] = bytes([number + 1]) * read.length
        expected += (
            replies.offset_data(read.cookie, read.offset, read.length)
            if structured
            else replies.simple_reply(read.cookie)
        )
        expected += bytes([number + 1]) * read.length
    assert bytes(arena) == expected
    replies.place_reads(reads, arena, 10, 0, structured)
    assert reads[0].address == 0


def test_error_texts_are_cut_between_characters() -> None:
    chunk = replies.error_chunk(1, 5, "x" + "\N{SNOWMAN}" * 2000)
    text = chunk[26:]
    assert len(text) == 1 + 3 * 1365 <= c.MAX_STRING
    assert text.decode()
    assert replies.error_chunk(1, 5, "\udcff")[26:] == b"?"


def test_errors_map_both_ways() -> None:
    pairs = {
        errno.EPERM: 1,
        errno.EIO: 5,
        errno.ENOMEM: 12,
        errno.EINVAL: 22,
        errno.ENOSPC: 28,
        errno.EOVERFLOW: 75,
        errno.ENOTSUP: 95,
        errno.ESHUTDOWN: 108,
    }
    for host, wire in pairs.items():
        assert c.errno_to_nbd(host) == c.errno_to_nbd(-host) == wire
        assert c.nbd_to_errno(wire) == host
        assert c.ERROR_NAMES[wire] == errno.errorcode[host].replace("EOPNOTSUPP", "ENOTSUP")
    assert c.errno_to_nbd(0) == c.nbd_to_errno(0) == 0
    assert c.errno_to_nbd(errno.EFBIG) == c.errno_to_nbd(errno.EDQUOT) == 28
    assert c.errno_to_nbd(errno.EROFS) == 1
    assert c.errno_to_nbd(errno.ESTALE) == 22 and c.nbd_to_errno(9999) == errno.EINVAL
