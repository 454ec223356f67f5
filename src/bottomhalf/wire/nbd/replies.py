# SPDX-License-Identifier: Apache-2.0
"""The server's replies: headers and chunks, written into an arena or returned as bytes.

The reply of one read is a header and the data behind it, contiguous, so that one ``send`` carries the
replies of a whole batch and the disk's bytes are read straight into their place. Therefore headers are
packed *before* the read is submitted, as if it succeeded (``place_reads``); a read that fails is answered
with an error built later, and its place in the arena is not sent.

    end = place_reads(batch.reads, arena, 0, 0, structured)  # sets start and buffer of each
    backend.submit(batch.reads)
    sock.send(arena[0:end])  # if all of them have result 0

Each chunk has two forms: ``pack_x(arena, position, ...)`` returns the position after it, ``x(...)`` returns
bytes. Section "Transmission" of the specification; layouts are quoted in ``constants``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct
from typing import Any, Final

from bottomhalf.host.request import Request
from bottomhalf.wire.nbd.constants import (
    BLOCK_STATUS,
    BLOCK_STATUS_SIZE,
    ERROR_CHUNK,
    ERROR_CHUNK_SIZE,
    EXTENT,
    MAX_STRING,
    OFFSET_DATA,
    OFFSET_DATA_SIZE,
    OFFSET_HOLE,
    OFFSET_HOLE_SIZE,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    SIMPLE_REPLY_SIZE,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    STRUCTURED_REPLY_SIZE,
    U64,
    errno_to_nbd,
)

# The placing loops pack a constant first half as one number.
_SIMPLE_OK: Final = SIMPLE_REPLY_MAGIC << 32  # magic, error 0
_DATA_DONE: Final = STRUCTURED_REPLY_MAGIC << 32 | REPLY_FLAG_DONE << 16 | REPLY_TYPE_OFFSET_DATA
_SIMPLE_HALVES: Final = Struct(">QQ")
_DATA_HALVES: Final = Struct(">QQIQ")
assert _SIMPLE_HALVES.size == SIMPLE_REPLY_SIZE
assert _DATA_HALVES.size == OFFSET_DATA_SIZE

Packer = Callable[..., int]


def place_reads(
    reads: list[Request], arena: memoryview, position: int, base: int, structured: bool, alignment: int = 1
) -> int:
    """Lay the replies of ``reads`` out in ``arena`` from ``position`` on: header (``structured``: one OFFSET_DATA chunk
    of 28 bytes with flag DONE, else a simple reply of 16 bytes, both success) and room for the data, which begins at a
    multiple of ``alignment`` (a power of two). Sets ``start`` (where the header begins), ``buffer`` and, unless
    ``base`` (the memory address of arena[0]) is 0, ``address``. Returns the position after the last. The arena must
    have room for Batch.read_bytes and, for each read, header and alignment - 1. Call it before the offsets are changed
    by lower layers."""
    header = OFFSET_DATA_SIZE if structured else SIMPLE_REPLY_SIZE
    beyond, keep = header + alignment - 1, -alignment
    simple, chunk = _SIMPLE_HALVES.pack_into, _DATA_HALVES.pack_into
    for request in reads:
        length = request.length
        data = position + beyond & keep
        request.start = start = data - header
        position = data + length
        request.buffer = arena[data:position]
        request.address = base + data if base else 0
        if structured:
            chunk(arena, start, _DATA_DONE, request.cookie, length + 8, request.offset)
        else:
            simple(arena, start, _SIMPLE_OK, request.cookie)
    return position


def place_headers(reads: list[Request], arena: memoryview, positions: Iterable[int], structured: bool) -> None:
    """Only the headers of ``reads``, each at its place, for data that lies elsewhere: 28 bytes each if
    ``structured``, else 16."""
    if structured:
        pack = _DATA_HALVES.pack_into
        for request, position in zip(reads, positions, strict=True):
            pack(arena, position, _DATA_DONE, request.cookie, request.length + 8, request.offset)
    else:
        pack = _SIMPLE_HALVES.pack_into
        for request, position in zip(reads, positions, strict=True):
            pack(arena, position, _SIMPLE_OK, request.cookie)


def pack_simple_reply(arena: Any, position: int, cookie: int, error: int = 0) -> int:
    """A simple reply's header (16 bytes). ``error`` is the wire's (``NBD_E...``), 0 for success."""
    SIMPLE_REPLY.pack_into(arena, position, SIMPLE_REPLY_MAGIC, error, cookie)
    return position + SIMPLE_REPLY_SIZE


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A simple reply's header (16 bytes); data of a successful read follows it."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def pack_none(arena: Any, position: int, cookie: int) -> int:
    """A NONE chunk with DONE (20 bytes): success without content, or the end of a reply in pieces."""
    STRUCTURED_REPLY.pack_into(
        arena, position, STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, 0
    )
    return position + STRUCTURED_REPLY_SIZE


def none(cookie: int) -> bytes:
    """``pack_none`` as bytes."""
    return _as_bytes(STRUCTURED_REPLY_SIZE, pack_none, cookie)


def pack_offset_data(
    arena: Any, position: int, cookie: int, offset: int, length: int, done: bool = True
) -> int:
    """The header of an OFFSET_DATA chunk (28 bytes) for ``length`` > 0 bytes of data, which follow it."""
    OFFSET_DATA.pack_into(
        arena,
        position,
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_OFFSET_DATA,
        cookie,
        length + 8,
        offset,
    )
    return position + OFFSET_DATA_SIZE


def offset_data(cookie: int, offset: int, length: int, done: bool = True) -> bytes:
    """``pack_offset_data`` as bytes; the data follows."""
    return _as_bytes(OFFSET_DATA_SIZE, pack_offset_data, cookie, offset, length, done)


def pack_offset_hole(
    arena: Any, position: int, cookie: int, offset: int, length: int, done: bool = True
) -> int:
    """An OFFSET_HOLE chunk (32 bytes): ``length`` > 0 bytes at ``offset`` read as zeroes."""
    OFFSET_HOLE.pack_into(
        arena,
        position,
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_OFFSET_HOLE,
        cookie,
        12,
        offset,
        length,
    )
    return position + OFFSET_HOLE_SIZE


def offset_hole(cookie: int, offset: int, length: int, done: bool = True) -> bytes:
    """``pack_offset_hole`` as bytes."""
    return _as_bytes(OFFSET_HOLE_SIZE, pack_offset_hole, cookie, offset, length, done)


def pack_block_status(
    arena: Any,
    position: int,
    cookie: int,
    context_id: int,
    extents: Iterable[tuple[int, int]],
    done: bool = True,
) -> int:
    """A BLOCK_STATUS chunk (24 bytes + 8 per extent). ``extents``: pairs of length in bytes and status
    flags, consecutive from the request's offset, at least one, at most MAX_BLOCK_STATUS_EXTENTS."""
    after = position + BLOCK_STATUS_SIZE
    for length, status in extents:
        EXTENT.pack_into(arena, after, length, status)
        after += EXTENT.size
    BLOCK_STATUS.pack_into(
        arena,
        position,
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_BLOCK_STATUS,
        cookie,
        after - position - STRUCTURED_REPLY_SIZE,
        context_id,
    )
    return after


def block_status(cookie: int, context_id: int, extents: list[tuple[int, int]], done: bool = True) -> bytes:
    """``pack_block_status`` as bytes."""
    size = BLOCK_STATUS_SIZE + EXTENT.size * len(extents)
    return _as_bytes(size, pack_block_status, cookie, context_id, extents, done)


def pack_error(arena: Any, position: int, cookie: int, error: int, text: str = "", done: bool = True) -> int:
    """An ERROR chunk (26 bytes + text). ``error`` is the wire's and nonzero; ``text`` is for people and is
    cut at MAX_STRING bytes."""
    message = _message(text)
    ERROR_CHUNK.pack_into(
        arena,
        position,
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_ERROR,
        cookie,
        6 + len(message),
        error,
        len(message),
    )
    after = position + ERROR_CHUNK_SIZE
    arena[after : after + len(message)] = message
    return after + len(message)


def error_chunk(cookie: int, error: int, text: str = "", done: bool = True) -> bytes:
    """``pack_error`` as bytes."""
    return _as_bytes(ERROR_CHUNK_SIZE + len(_message(text)), pack_error, cookie, error, text, done)


def pack_error_offset(
    arena: Any, position: int, cookie: int, error: int, offset: int, text: str = "", done: bool = True
) -> int:
    """An ERROR_OFFSET chunk (34 bytes + text): the error happened at ``offset``, inside the request."""
    message = _message(text)
    ERROR_CHUNK.pack_into(
        arena,
        position,
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_ERROR_OFFSET,
        cookie,
        14 + len(message),
        error,
        len(message),
    )
    after = position + ERROR_CHUNK_SIZE
    arena[after : after + len(message)] = message
    U64.pack_into(arena, after + len(message), offset)
    return after + len(message) + U64.size


def error_offset_chunk(cookie: int, error: int, offset: int, text: str = "", done: bool = True) -> bytes:
    """``pack_error_offset`` as bytes."""
    size = ERROR_CHUNK_SIZE + len(_message(text)) + U64.size
    return _as_bytes(size, pack_error_offset, cookie, error, offset, text, done)


def result_reply(cookie: int, result: int, structured: bool, text: str = "") -> bytes:
    """The answer to any finished request that carries no content: ``result`` is 0 or a negative errno.

    Right for writes, flushes, trims, zero writes, caches, empty and rejected requests, and for reads that
    failed; with ``structured`` an error carries ``text``.
    """
    if not structured:
        return simple_reply(cookie, errno_to_nbd(result))
    return none(cookie) if result == 0 else error_chunk(cookie, errno_to_nbd(result), text)


def _message(text: str) -> bytes:
    """``text`` in UTF-8, cut between characters at MAX_STRING bytes."""
    return text.encode("utf-8", "replace")[:MAX_STRING].decode("utf-8", "ignore").encode()


def _as_bytes(size: int, pack: Packer, *arguments: Any) -> bytes:
    arena = bytearray(size)
    pack(arena, 0, *arguments)
    return bytes(arena)
