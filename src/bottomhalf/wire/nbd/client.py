# SPDX-License-Identifier: Apache-2.0
"""The client's transmission phase: requests to bytes, bytes to completions.

Replies come in any order and, with structured replies, in pieces that may interleave; a server may lie
about each of them. Therefore every request under way is remembered by its cookie, data is copied once from
the received bytes to where the caller wants it, and every piece is checked against what was asked: a reply
that does not fit is a ``ProtocolError`` that says "probably a server bug", and never a short or mixed-up
read.

    client = Client(handshake.negotiated)
    packet, cookie = client.read(0, 4096)
    sock.send(packet)
    for done in client.receive(sock.recv(1 << 20)):
        ...  # done.cookie, done.error, done.data

Give ``negotiated.leftover`` to the first ``receive``. What a reply's pieces must look like together is in
``client_replies``; the framing of the stream and the building of requests are here.
"""

from __future__ import annotations

from collections.abc import Callable

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd.client_options import ClientNegotiated
from bottomhalf.wire.nbd.client_replies import Completion, Pending, server_bug
from bottomhalf.wire.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    COMMAND_NAMES,
    FLAG_READ_ONLY,
    FLAG_SEND_CACHE,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    REPLY_FLAG_DONE,
    REPLY_TYPE_FLAG_ERROR,
    REPLY_TYPE_OFFSET_DATA,
    REQUEST,
    REQUEST_HEAD,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    SIMPLE_REPLY_SIZE,
    STRUCTURED_REPLY_MAGIC,
    STRUCTURED_REPLY_SIZE,
    U32,
    U64,
)

Bytes = bytes | bytearray | memoryview

_COMMAND_NEEDS = {
    CMD_FLUSH: FLAG_SEND_FLUSH,
    CMD_TRIM: FLAG_SEND_TRIM,
    CMD_CACHE: FLAG_SEND_CACHE,
    CMD_WRITE_ZEROES: FLAG_SEND_WRITE_ZEROES,
}
_FLAG_NEEDS = {
    CMD_FLAG_FUA: FLAG_SEND_FUA,
    CMD_FLAG_DF: FLAG_SEND_DF,
    CMD_FLAG_FAST_ZERO: FLAG_SEND_FAST_ZERO,
}
_CHANGING = (CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES)
_LIMITED = (CMD_READ, CMD_WRITE, CMD_CACHE)


class Client:
    """One connection in the transmission phase. Used in one thread at a time.

    Every request method returns the bytes to send and the request's cookie. With ``strict`` it raises
    ValueError for what the server has not offered or would reject; without, it sends what it is told (to
    test servers).
    """

    def __init__(self, negotiated: ClientNegotiated, *, strict: bool = True) -> None:
        self.negotiated = negotiated
        self.error: ProtocolError | None = None
        self._strict = strict
        self._structured = negotiated.structured_replies
        self._context_ids = frozenset(negotiated.contexts.values())
        self._pending: dict[int, Pending] = {}
        self._next_cookie = 1
        self._disconnected = False
        # The framing: either ``_target`` is the room that data still has to fill, or ``_need`` bytes are
        # collected for ``_stage``.
        self._target: memoryview | None = None
        self._need = SIMPLE_REPLY_SIZE
        self._stage: Callable[[Bytes], None] = self._reply_begin
        self._held = bytearray()
        self._current: Pending | None = None
        self._chunk_flags = 0
        self._chunk_type = 0
        self._chunk_length = 0
        self._chunk_done = False
        self._consumed = 0
        self._completions: list[Completion] = []

    @property
    def in_flight(self) -> int:
        """Requests sent and not completed."""
        return len(self._pending)

    # --- Requests -----------------------------------------------------------------------------------------

    def read(
        self, offset: int, length: int, *, into: memoryview | None = None, dont_fragment: bool = False
    ) -> tuple[bytes, int]:
        """NBD_CMD_READ. ``into``: where the data goes (``length`` bytes, format "B"), else the completion
        brings a new bytearray. With an error part of it may have been written."""
        if into is not None and len(into) != length:
            raise ValueError(f"buffer of {len(into)} bytes for a read of {length}")
        return self._request(CMD_READ, CMD_FLAG_DF if dont_fragment else 0, offset, length, into)

    def write(self, offset: int, data: Bytes, *, fua: bool = False) -> tuple[bytes, int]:
        """NBD_CMD_WRITE, header and data in one. ``write_header`` avoids the copy."""
        header, cookie = self.write_header(offset, len(data), fua=fua)
        return b"".join((header, data)), cookie

    def write_header(self, offset: int, length: int, *, fua: bool = False) -> tuple[bytes, int]:
        """NBD_CMD_WRITE without its data: the caller sends ``length`` bytes right behind it."""
        return self._request(CMD_WRITE, CMD_FLAG_FUA if fua else 0, offset, length)

    def flush(self) -> tuple[bytes, int]:
        """NBD_CMD_FLUSH: what was answered before this is sent is durable when it completes."""
        return self._request(CMD_FLUSH, 0, 0, 0)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> tuple[bytes, int]:
        """NBD_CMD_TRIM: the content of the range is no longer needed."""
        return self._request(CMD_TRIM, CMD_FLAG_FUA if fua else 0, offset, length)

    def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> tuple[bytes, int]:
        """NBD_CMD_WRITE_ZEROES. ``no_hole``: keep it allocated; ``fast``: fail with ENOTSUP rather than be
        slow."""
        flags = CMD_FLAG_FUA if fua else 0
        flags |= CMD_FLAG_NO_HOLE if no_hole else 0
        flags |= CMD_FLAG_FAST_ZERO if fast else 0
        return self._request(CMD_WRITE_ZEROES, flags, offset, length)

    def cache(self, offset: int, length: int) -> tuple[bytes, int]:
        """NBD_CMD_CACHE: the range will be read soon."""
        return self._request(CMD_CACHE, 0, offset, length)

    def block_status(self, offset: int, length: int, *, one: bool = False) -> tuple[bytes, int]:
        """NBD_CMD_BLOCK_STATUS: the completion's ``extents`` has a list for every negotiated context id.
        ``one``: only the first extent of each."""
        return self._request(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE if one else 0, offset, length)

    def disconnect(self) -> bytes:
        """NBD_CMD_DISC, to be sent when nothing is in flight. It has no reply; nothing may be sent after
        it."""
        if self._strict and self._pending:
            raise ValueError(f"disconnect with {len(self._pending)} requests in flight")
        self._disconnected = True
        return REQUEST.pack(REQUEST_HEAD | CMD_DISC, 0, 0, 0)

    def _request(
        self, command: int, flags: int, offset: int, length: int, into: memoryview | None = None
    ) -> tuple[bytes, int]:
        if self._disconnected:
            raise ValueError("request after disconnect")
        if self._strict:
            self._check(command, flags, offset, length)
        cookie = self._next_cookie
        self._next_cookie = cookie + 1 & 0xFFFFFFFFFFFFFFFF
        packet = REQUEST.pack(REQUEST_HEAD | flags << 16 | command, cookie, offset, length)
        self._pending[cookie] = Pending(cookie, command, flags, offset, length, into)
        return packet, cookie

    def _check(self, command: int, flags: int, offset: int, length: int) -> None:
        """What the specification forbids a client to send."""
        export = self.negotiated.export
        name = COMMAND_NAMES[command]
        offered = export.flags
        if command in _CHANGING and offered & FLAG_READ_ONLY:
            raise ValueError(f"{name}: the export is read-only")
        needs = _COMMAND_NEEDS.get(command, 0)
        if needs and not offered & needs:
            raise ValueError(f"{name}: the server does not offer it")
        for flag, needed in _FLAG_NEEDS.items():
            if flags & flag and not offered & needed:
                raise ValueError(f"{name}: the server does not offer flag {flag:#x}")
        if command == CMD_BLOCK_STATUS and not self._context_ids:
            raise ValueError(f"{name}: no metadata context was negotiated")
        if command == CMD_FLUSH:
            return
        if offset < 0 or length <= 0 or offset + length > export.size:
            raise ValueError(f"{name}: {length} bytes at {offset} are not within {export.size} bytes")
        if length > (self.negotiated.longest_request if command in _LIMITED else 0xFFFFFFFF):
            raise ValueError(f"{name}: {length} bytes are more than the server takes")
        if (offset | length) & (max(export.minimum_block_size, 1) - 1):
            raise ValueError(f"{name}: not aligned to {export.minimum_block_size} bytes")

    # --- Replies ------------------------------------------------------------------------------------------

    def receive(self, data: Bytes) -> list[Completion]:
        """Take what the server sent, any amount of it; return the requests that it completes, in the order
        of their completion. Raises ProtocolError when the server broke the protocol, again at every later
        call; what was completed before is then in ``take_completions``."""
        if self.error is not None:
            raise self.error
        view = memoryview(data)
        position, end = 0, len(view)
        try:
            while True:
                if self._target is not None:
                    taken = min(len(self._target), end - position)
                    self._target[:taken] = view[position : position + taken]
                    self._target = self._target[taken:]
                    position += taken
                    self._consumed += taken
                    if len(self._target):
                        break
                    self._target = None
                    self._end_chunk()
                elif not self._held and end - position >= self._need:
                    item = view[position : position + self._need]
                    position += self._need
                    self._stage(item)
                    self._consumed += len(item)
                else:
                    taken = min(self._need - len(self._held), end - position)
                    self._held += view[position : position + taken]
                    position += taken
                    if len(self._held) < self._need:
                        break
                    held = bytes(self._held)
                    self._held.clear()
                    self._stage(held)
                    self._consumed += len(held)
        except ProtocolError as error:
            self.error = error
            raise
        return self.take_completions()

    def take_completions(self) -> list[Completion]:
        """Requests that completed and were not handed out, because an error came after them."""
        completions = self._completions
        self._completions = []
        return completions

    def eof(self) -> None:
        """The server closed the connection: ProtocolError if a reply is incomplete or owed."""
        if not self._pending and not self._held:
            return
        begun = sum(pending.begun for pending in self._pending.values())
        self.error = ProtocolError(
            "the NBD server closed the connection",
            expected=f"replies to {len(self._pending)} requests, {begun} of them begun",
            offset=self._consumed + len(self._held),
        )
        raise self.error

    def _await(self, need: int, stage: Callable[[Bytes], None]) -> None:
        self._need = need
        self._stage = stage

    def _find(self, cookie: int) -> Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise server_bug(f"no request has cookie {cookie:#x}", self._consumed)
        return pending

    def _reply_begin(self, item: Bytes) -> None:
        """The 16 bytes that a simple reply is, and that a structured one has at least."""
        magic, word, cookie = SIMPLE_REPLY.unpack(item)
        if magic == STRUCTURED_REPLY_MAGIC and self._structured:
            self._current = self._find(cookie)
            self._chunk_flags, self._chunk_type = word >> 16, word & 0xFFFF
            self._await(STRUCTURED_REPLY_SIZE - SIMPLE_REPLY_SIZE, self._chunk_begin)
            return
        if magic != SIMPLE_REPLY_MAGIC:
            expected = f"{SIMPLE_REPLY_MAGIC:#x}"
            if self._structured:
                expected += f" or {STRUCTURED_REPLY_MAGIC:#x}"
            raise server_bug("bad magic of an NBD reply", self._consumed, expected, f"{magic:#x}")
        pending = self._find(cookie)
        if self._structured and (pending.command == CMD_READ or pending.begun):
            text = f"simple reply to {COMMAND_NAMES[pending.command]}"
            raise server_bug(text, self._consumed, "a structured one, as negotiated")
        if word:
            pending.fail(word, "", None)
        elif pending.command == CMD_READ and pending.length:
            self._current = pending
            self._chunk_done = True
            self._await_data(pending.place(pending.offset, pending.length, self._consumed))
            return
        elif pending.command == CMD_BLOCK_STATUS:
            raise server_bug("simple reply of success to NBD_CMD_BLOCK_STATUS", self._consumed)
        self._complete(pending)

    def _chunk_begin(self, item: Bytes) -> None:
        """The chunk's length: what it may be depends on its type."""
        pending = self._current
        assert pending is not None
        (self._chunk_length,) = U32.unpack(item)
        self._chunk_done = bool(self._chunk_flags & REPLY_FLAG_DONE)
        pending.begin_chunk(self._chunk_type, self._chunk_length, self._chunk_done, self._consumed)
        if self._chunk_type == REPLY_TYPE_OFFSET_DATA:
            self._await(U64.size, self._chunk_data)
        elif self._chunk_length:
            self._await(self._chunk_length, self._chunk_payload)
        else:
            self._end_chunk()

    def _chunk_data(self, item: Bytes) -> None:
        pending = self._current
        assert pending is not None
        (offset,) = U64.unpack(item)
        self._await_data(pending.place(offset, self._chunk_length - U64.size, self._consumed))

    def _await_data(self, target: memoryview) -> None:
        self._target = target

    def _chunk_payload(self, item: Bytes) -> None:
        pending = self._current
        assert pending is not None
        if self._chunk_type & REPLY_TYPE_FLAG_ERROR:
            pending.error_chunk(self._chunk_type, item, self._consumed)
        else:
            pending.content_chunk(self._chunk_type, item, self._context_ids, self._consumed)
        self._end_chunk()

    def _end_chunk(self) -> None:
        pending = self._current
        assert pending is not None
        if self._chunk_done:
            self._complete(pending)
        else:
            self._await(SIMPLE_REPLY_SIZE, self._reply_begin)

    def _complete(self, pending: Pending) -> None:
        pending.check_complete(self._context_ids, self._consumed)
        del self._pending[pending.cookie]
        self._current = None
        self._completions.append(pending.completion())
        self._await(SIMPLE_REPLY_SIZE, self._reply_begin)
