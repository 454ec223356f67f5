# SPDX-License-Identifier: Apache-2.0
"""One request under way at the client, and the rules that the pieces of its reply must keep.

A structured reply is a puzzle: chunks of data and holes in any order, errors before or after them, one list
of extents per context, and an end mark. The specification allows a client to hang up on invalid ones, and a
client that does not check hands out buffers with stale bytes in them. Therefore each piece is checked when
it comes (inside the request, not seen before) and the whole when it ends (nothing missing). Sections
"Structured reply types" and "Request types".
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_FLAG_DF,
    CMD_FLAG_REQ_ONE,
    CMD_READ,
    COMMAND_NAMES,
    ERROR_PAYLOAD,
    EXTENT,
    MAX_BLOCK_STATUS_EXTENTS,
    MAX_CHUNKS,
    MAX_ERROR_CHUNK,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_FLAG_ERROR,
    REPLY_TYPE_NAMES,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    U32,
    U64,
    nbd_to_errno,
)

Bytes = bytes | bytearray | memoryview


def server_bug(message: str, offset: int, expected: str = "", got: str = "") -> ProtocolError:
    """The error for a reply that no server may send."""
    return ProtocolError(message, expected=expected, got=got, offset=offset, cause="probably a server bug")


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. ``error`` is the wire's (0: success), ``text`` the server's words for it,
    ``error_offset`` where it happened if the server said so. ``data`` is set for reads that succeeded,
    ``extents`` (context id to pairs of length in bytes and status) for block status."""

    cookie: int
    command: int
    offset: int
    length: int
    error: int
    text: str
    error_offset: int | None
    data: bytearray | memoryview | None
    extents: dict[int, list[tuple[int, int]]]

    @property
    def errno(self) -> int:
        """``error`` as this host's errno, positive; 0 for success."""
        return nbd_to_errno(self.error)


class _Coverage:
    """Which bytes of a read have come: disjoint ranges in order, neighbours joined."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, start: int, end: int) -> bool:
        """Add a range; False if it overlaps what is there (nothing is changed then)."""
        starts, ends = self.starts, self.ends
        index = bisect_right(starts, start)
        if (index and ends[index - 1] > start) or (index < len(starts) and starts[index] < end):
            return False
        joins_left = index > 0 and ends[index - 1] == start
        joins_right = index < len(starts) and starts[index] == end
        if joins_left and joins_right:
            ends[index - 1] = ends[index]
            del starts[index], ends[index]
        elif joins_left:
            ends[index - 1] = end
        elif joins_right:
            starts[index] = start
        else:
            starts.insert(index, start)
            ends.insert(index, end)
        return True

    def is_whole(self, start: int, end: int) -> bool:
        return start == end or (self.starts == [start] and self.ends == [end])


class Pending:
    """A request that was sent. ``begun``: a part of its reply has come. Methods raise ProtocolError."""

    __slots__ = (
        "_chunks",
        "_contents",
        "_coverage",
        "_data",
        "_error",
        "_error_offset",
        "_error_offsets",
        "_extents",
        "_flags",
        "_text",
        "_view",
        "begun",
        "command",
        "cookie",
        "length",
        "offset",
    )

    def __init__(
        self, cookie: int, command: int, flags: int, offset: int, length: int, into: memoryview | None
    ) -> None:
        self.cookie = cookie
        self.command = command
        self.offset = offset
        self.length = length
        self.begun = False
        self._flags = flags
        self._data: bytearray | memoryview | None = into
        self._view: memoryview | None = None
        self._coverage = _Coverage()
        self._chunks = 0
        self._contents = 0
        self._error = 0
        self._text = ""
        self._error_offset: int | None = None
        self._error_offsets: list[int] = []
        self._extents: dict[int, list[tuple[int, int]]] = {}

    def begin_chunk(self, kind: int, length: int, done: bool, position: int) -> None:
        """Check a chunk's header against the request. ``position``: in the stream, for errors."""
        self.begun = True
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise server_bug(f"more than {MAX_CHUNKS} chunks in one reply", position)
        name = REPLY_TYPE_NAMES.get(kind, f"chunk type {kind}")
        if kind & REPLY_TYPE_FLAG_ERROR:
            shortest = ERROR_PAYLOAD.size + (U64.size if kind == REPLY_TYPE_ERROR_OFFSET else 0)
            good = shortest <= length <= MAX_ERROR_CHUNK
        elif kind == REPLY_TYPE_NONE:
            good = length == 0
            if not done:
                raise server_bug(f"{name} without the flag DONE", position)
        elif kind == REPLY_TYPE_OFFSET_DATA and self.command == CMD_READ:
            good = U64.size < length <= U64.size + self.length
        elif kind == REPLY_TYPE_OFFSET_HOLE and self.command == CMD_READ:
            good = length == U64.size + U32.size
        elif kind == REPLY_TYPE_BLOCK_STATUS and self.command == CMD_BLOCK_STATUS:
            extents, rest = divmod(length - U32.size, EXTENT.size)
            good = rest == 0 and 1 <= extents <= MAX_BLOCK_STATUS_EXTENTS
        else:
            raise server_bug(f"{name} in the reply to {COMMAND_NAMES[self.command]}", position)
        if not good:
            raise server_bug(f"{name} with a payload of {length} bytes", position)

    def place(self, offset: int, length: int, position: int) -> memoryview:
        """Where ``length`` bytes of content at the export's ``offset`` belong in the read's buffer."""
        start = offset - self.offset
        end = start + length
        what = f"{length} bytes at {offset}"
        if start < 0 or end > self.length or length == 0:
            asked = f"something within {self.length} bytes at {self.offset}"
            raise server_bug("chunk outside of the read", position, asked, what)
        if not self._coverage.add(start, end):
            raise server_bug("chunk overlaps one that came before", position, got=what)
        if bisect_left(self._error_offsets, offset) != bisect_left(self._error_offsets, offset + length):
            raise server_bug("chunk covers an error that was reported before", position, got=what)
        self._contents += 1
        if self._contents > 1 and self._flags & CMD_FLAG_DF:
            raise server_bug("reply in pieces although DF forbids it", position, got=what)
        if self._view is None:
            if self._data is None:
                self._data = bytearray(self.length)
            self._view = memoryview(self._data)
        return self._view[start:end]

    def content_chunk(self, kind: int, item: Bytes, context_ids: frozenset[int], position: int) -> None:
        """The payload of a hole or of a block status chunk; ``begin_chunk`` has let no other type pass."""
        if kind == REPLY_TYPE_OFFSET_HOLE:
            (offset,), (length,) = U64.unpack_from(item), U32.unpack_from(item, U64.size)
            target = self.place(offset, length, position)
            target[:] = bytes(length)
            return
        (context_id,) = U32.unpack_from(item)
        if context_id not in context_ids or context_id in self._extents:
            problem = "twice" if context_id in self._extents else "not negotiated"
            raise server_bug(f"block status of context {context_id}: {problem}", position)
        extents = list(EXTENT.iter_unpack(memoryview(item)[U32.size :]))
        # The last extent may reach beyond the request, unless only one was asked for.
        one = bool(self._flags & CMD_FLAG_REQ_ONE)
        before_last = sum(length for length, _ in extents[:-1])
        too_far = before_last + extents[-1][0] > self.length if one else before_last >= self.length
        if too_far or (one and len(extents) > 1) or not all(length for length, _ in extents):
            asked = f"{'one extent' if one else 'extents'} for {self.length} bytes"
            got = f"{len(extents)} extents, the last one from byte {before_last} on"
            raise server_bug(f"impossible block status of context {context_id}", position, asked, got)
        self._extents[context_id] = extents

    def error_chunk(self, kind: int, item: Bytes, position: int) -> None:
        """The payload of any error chunk, also of a type that we do not know."""
        error, text_length = ERROR_PAYLOAD.unpack_from(item)
        after = ERROR_PAYLOAD.size + text_length
        tail = U64.size if kind == REPLY_TYPE_ERROR_OFFSET else 0
        if error == 0 or after + tail > len(item):
            got = f"error {error}, text of {text_length} bytes in a chunk of {len(item)}"
            raise server_bug("impossible error chunk", position, got=got)
        text = bytes(item[ERROR_PAYLOAD.size : after]).decode(errors="replace")
        offset: int | None = None
        if tail:
            (offset,) = U64.unpack_from(item, after)
            if not self.offset <= offset < self.offset + max(self.length, 1):
                raise server_bug("error offset outside of the request", position, got=str(offset))
            insort(self._error_offsets, offset)
        self.fail(error, text, offset)

    def fail(self, error: int, text: str, offset: int | None) -> None:
        """The server reports an error; the first one is kept."""
        if not self._error:
            self._error = error
            self._text = text
            self._error_offset = offset

    def check_complete(self, context_ids: frozenset[int], position: int) -> None:
        """The reply ends here: is anything missing that success promises?"""
        if self._error:
            return
        if self.command == CMD_READ and not self._coverage.is_whole(0, self.length):
            came = sum(self._coverage.ends) - sum(self._coverage.starts)
            raise server_bug(
                "read without an error ends early", position, f"{self.length} bytes", f"{came} bytes"
            )
        if self.command == CMD_BLOCK_STATUS and self._extents.keys() != context_ids:
            missing = sorted(context_ids - self._extents.keys())
            raise server_bug(f"block status without the contexts {missing}", position)

    def completion(self) -> Completion:
        """The result, once ``check_complete`` has passed."""
        good = not self._error
        data = self._data
        if good and self.command == CMD_READ and data is None:
            data = bytearray()
        self._view = None
        return Completion(
            cookie=self.cookie,
            command=self.command,
            offset=self.offset,
            length=self.length,
            error=self._error,
            text=self._text,
            error_offset=self._error_offset,
            data=data if good and self.command == CMD_READ else None,
            extents=self._extents if good else {},
        )
