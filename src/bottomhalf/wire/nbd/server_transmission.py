# SPDX-License-Identifier: Apache-2.0
"""The server's request parser: the hot path from received bytes to lists of requests.

One ``recv`` brings many requests, and Python pays per call. Therefore one call of ``RequestParser.parse``
takes all complete requests of a receive buffer: it works in place (the payload of a write is a slice of the
buffer, nothing is copied), reuses pooled ``Request`` objects, and tries the plain valid read first, of
which one integer comparison tells magic, flags and type. Whatever is wrong with a request becomes an answer
(``Reject``), whatever is wrong with the stream becomes ``Batch.error``: it does not raise, because the good
requests before it are to be served.

    batch = Batch()
    position = parser.parse(view, position, end, batch, max_requests=64, max_bytes=1 << 20)
    backend.submit(batch.reads) ...
    parser.release(batch.reads)                # once they are answered
    if batch.needed > len(view) - position: ...  # make room: this many bytes from position on must fit

What lives here: bytes to requests. Bytes of replies are in ``replies``.
"""

from __future__ import annotations

from itertools import repeat
from typing import Final

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
    Owner,
    Request,
)
from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd.batch import (
    BLOCK_STATUS,
    CACHE,
    DONT_FRAGMENT,
    EMPTY,
    REQ_ONE,
    Batch,
    NbdRequest,
    Reject,
)
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
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    MAX_REQUEST,
    NBD_EINVAL,
    REQUEST,
    REQUEST_HEAD,
    REQUEST_MAGIC,
    REQUEST_SIZE,
)
from bottomhalf.wire.nbd.export import Negotiated

_PLAIN_READ: Final = REQUEST_HEAD | CMD_READ
_PLAIN_WRITE: Final = REQUEST_HEAD | CMD_WRITE
_FUA_WRITE: Final = REQUEST_HEAD | CMD_FLAG_FUA << 16 | CMD_WRITE

# What each command may carry, beside FUA ("valid for all commands, provided NBD_FLAG_SEND_FUA").
_VALID_FLAGS: Final = {
    CMD_READ: CMD_FLAG_DF,
    CMD_WRITE: 0,
    CMD_FLUSH: 0,
    CMD_TRIM: 0,
    CMD_CACHE: 0,
    CMD_WRITE_ZEROES: CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
    CMD_BLOCK_STATUS: CMD_FLAG_REQ_ONE,
}

# What the export must have offered.
_NEEDED_FLAGS: Final = {
    CMD_TRIM: FLAG_SEND_TRIM,
    CMD_WRITE_ZEROES: FLAG_SEND_WRITE_ZEROES,
    CMD_CACHE: FLAG_SEND_CACHE,
}

_RUN_MIN: Final = 4 * REQUEST_SIZE  # below this the general loop is the faster one


class RequestParser:
    """Turns a connection's received bytes into requests (section "Request message").

    One per connection, used in its home thread. ``owner`` is set in every request. ``alignment``: requests
    that are not a multiple of it are rejected; the default 1 takes them all and leaves it to the block
    layer, as QEMU does even with clients that negotiated a minimum block size.
    """

    __slots__ = (
        "_align_mask",
        "_block_status",
        "_flags",
        "_longest",
        "_owner",
        "_size",
        "_skip",
        "_valid_flags",
        "_writable",
        "consumed",
        "pool",
    )

    pool: list[Request]
    consumed: int  # bytes of the transmission phase consumed so far; where an error is reported

    def __init__(
        self,
        negotiated: Negotiated,
        *,
        owner: Owner | None = None,
        alignment: int = 1,
        pool: list[Request] | None = None,
    ) -> None:
        flags = negotiated.flags
        valid = dict(_VALID_FLAGS)
        if not flags & FLAG_SEND_DF:
            valid[CMD_READ] &= ~CMD_FLAG_DF
        if not flags & FLAG_SEND_FAST_ZERO:
            valid[CMD_WRITE_ZEROES] &= ~CMD_FLAG_FAST_ZERO
        if flags & FLAG_SEND_FUA:
            valid = {command: bits | CMD_FLAG_FUA for command, bits in valid.items()}
        self._valid_flags = valid
        self._flags = flags
        self._writable = not flags & FLAG_READ_ONLY
        self._block_status = bool(negotiated.contexts) and negotiated.structured_replies
        self._size = negotiated.export.size
        self._longest = negotiated.export.maximum_block_size
        self._align_mask = alignment - 1
        self._owner = owner
        self._skip = 0
        self.pool = [] if pool is None else pool
        self.consumed = 0

    def release(self, requests: list[Request]) -> None:
        """Take answered requests back into the pool: any of this parser's, but no NbdRequest."""
        self.pool.extend(requests)

    def parse(
        self,
        view: memoryview,
        start: int,
        end: int,
        batch: Batch,
        max_requests: int,
        max_bytes: int,
        base: int = 0,
    ) -> int:
        """Append all complete requests of ``view[start:end]`` to ``batch``; return the position after them.

        ``view``: format "B"; slices of it become buffers of writes, so its bytes must stay until those are
        answered. ``base``: the memory address of view[0] if known, then writes get ``address`` too. At most
        ``max_requests`` are taken (rejects count), and reads and writes of at most ``max_bytes`` in sum,
        except that one request is always taken. The outcome beside the requests is in ``batch``:
        ``needed``, ``limited``, ``disconnect``, ``error``. Never raises for what a peer sent.
        """
        position = start
        if self._skip:
            gone = min(self._skip, end - position)
            self._skip -= gone
            position += gone
            if self._skip:
                self.consumed += gone
                return position
        first = position
        last = end - REQUEST_SIZE
        unpack = REQUEST.unpack_from
        pool = self.pool
        pop = pool.pop
        owner = self._owner
        size = self._size
        longest = self._longest
        mask = self._align_mask
        room = max_bytes
        written = 0
        if end - position >= _RUN_MIN and view[position + 7] == CMD_READ and not mask and not batch.reads:
            room -= self._leading_reads(view, position, end, batch, max_requests, max_bytes)
            position += len(batch.reads) * REQUEST_SIZE
            max_requests -= len(batch.reads)
        take_read = batch.reads.append
        for _ in repeat(None, max_requests):
            if position > last:
                if position < end:
                    batch.needed = REQUEST_SIZE
                break
            head, cookie, offset, length = unpack(view, position)
            if (
                head == _PLAIN_READ
                and 0 < length <= longest
                and offset + length <= size
                and not (offset | length) & mask
            ):
                room -= length
                if room < 0 and position != first:
                    room += length
                    batch.limited = True
                    break
                request = pop() if pool else Request()
                request.op = READ
                request.flags = 0
                request.offset = offset
                request.length = length
                request.cookie = cookie
                request.result = IN_PROGRESS
                request.owner = owner
                take_read(request)
                position += REQUEST_SIZE
            elif (
                (head == _PLAIN_WRITE or (head == _FUA_WRITE and self._flags & FLAG_SEND_FUA))
                and 0 < length <= longest
                and offset + length <= size
                and not (offset | length) & mask
                and self._writable
            ):
                payload = position + REQUEST_SIZE
                after = payload + length
                if after > end:
                    batch.needed = REQUEST_SIZE + length
                    break
                room -= length
                if room < 0 and position != first:
                    room += length
                    batch.limited = True
                    break
                written += length
                request = pop() if pool else Request()
                request.op = WRITE
                request.flags = FUA if head == _FUA_WRITE else 0
                request.offset = offset
                request.length = length
                request.cookie = cookie
                request.buffer = view[payload:after]
                request.address = base + payload if base else 0
                request.result = IN_PROGRESS
                request.owner = owner
                batch.writes.append(request)
                position = after
            else:
                if head & 0xFFFF == CMD_READ and length > room and position != first:
                    batch.limited = True  # a read with flags needs room too; a bad one may as well wait
                    break
                reads_before = len(batch.reads)
                position = self._parse_unusual(head, cookie, offset, length, position, start, end, batch)
                if len(batch.reads) > reads_before:
                    room -= length
                if batch.disconnect or batch.error is not None:
                    break
        else:
            if position <= last:
                batch.limited = True
            elif position < end:
                batch.needed = REQUEST_SIZE
        batch.read_bytes += max_bytes - room - written
        batch.write_bytes += written
        self.consumed += position - start
        return position

    def _leading_reads(
        self, view: memoryview, start: int, end: int, batch: Batch, max_requests: int, max_bytes: int
    ) -> int:
        """The run of plain valid reads at the front, in the form that costs the least per request (0.6 of
        the general loop): iter_unpack beside a slice of the pool, no positions, one list. Returns their
        bytes. Whatever is not plain and valid, or does not fit, is left to the general loop."""
        count = min((end - start) // REQUEST_SIZE, max_requests)
        pool = self.pool
        if len(pool) < count:
            pool.extend([Request() for _ in range(count - len(pool))])
        reads = pool[len(pool) - count :]
        plain = _PLAIN_READ
        longest = self._longest
        size = self._size
        safe = size - longest  # a read that begins at or before here and is not too long cannot pass the end
        owner = self._owner
        room = max_bytes
        fields = REQUEST.iter_unpack(view[start : start + count * REQUEST_SIZE])
        for request, (head, cookie, offset, length) in zip(reads, fields, strict=True):
            if head != plain or not 0 < length <= longest or (offset > safe and offset + length > size):
                break
            room -= length
            if room < 0:
                room += length
                break
            request.op = READ
            request.flags = 0
            request.offset = offset
            request.length = length
            request.cookie = cookie
            request.result = IN_PROGRESS
            request.owner = owner
        else:
            del pool[len(pool) - count :]
            batch.reads = reads
            return max_bytes - room
        del reads[reads.index(request) :]
        del pool[len(pool) - count : len(pool) - count + len(reads)]
        batch.reads = reads
        return max_bytes - room

    def _parse_unusual(
        self,
        head: int,
        cookie: int,
        offset: int,
        length: int,
        position: int,
        start: int,
        end: int,
        batch: Batch,
    ) -> int:
        """Whatever is not a plain valid read or write. Returns the position after it."""
        if head >> 32 != REQUEST_MAGIC:
            batch.error = ProtocolError(
                "bad magic of an NBD request",
                expected=f"{REQUEST_MAGIC:#010x}",
                got=f"{head >> 32:#010x}",
                offset=self.consumed + position - start,
                cause="probably a client bug, or lost framing",
            )
            return position
        command = head & 0xFFFF
        flags = head >> 16 & 0xFFFF
        if command == CMD_DISC:
            batch.disconnect = True
            return position + REQUEST_SIZE
        if command == CMD_WRITE and length > MAX_REQUEST:
            batch.error = ProtocolError(
                "write too large to read its payload away",
                expected=f"at most {MAX_REQUEST} bytes",
                got=f"{length} bytes",
                offset=self.consumed + position - start,
                cause="probably a client bug",
            )
            return position
        complaint = self._complaint(command, flags, offset, length)
        if complaint:
            batch.rejects.append(Reject(cookie, NBD_EINVAL, complaint, command))
            after = position + REQUEST_SIZE
            if command == CMD_WRITE:
                self._skip = max(0, after + length - end)
                after = min(after + length, end)
            return after
        if command == CMD_FLUSH:
            offset = length = 0  # "SHOULD be zero", and mean nothing
        batch_list, request = self._build(command, flags, length, batch)
        request.offset = offset
        request.length = length
        request.cookie = cookie
        request.buffer = None
        request.address = 0
        request.result = IN_PROGRESS
        request.owner = self._owner
        batch_list.append(request)
        return position + REQUEST_SIZE

    def _build(self, command: int, flags: int, length: int, batch: Batch) -> tuple[list[Request], Request]:
        """The object for a valid command, with op and flags, and the list that it belongs to."""
        request: Request
        if command == CMD_FLUSH:
            request = Request(FLUSH)
        elif length == 0 or command in (CMD_CACHE, CMD_BLOCK_STATUS):
            # An empty write is here as well: it has no payload to wait for.
            request = NbdRequest(
                EMPTY if length == 0 else CACHE if command == CMD_CACHE else BLOCK_STATUS,
                flags=REQ_ONE if flags & CMD_FLAG_REQ_ONE else 0,
            )
            request.context = command
        elif command == CMD_READ:
            request = Request(READ, flags=DONT_FRAGMENT if flags & CMD_FLAG_DF else 0)
            return batch.reads, request
        else:
            host_flags = FUA if flags & CMD_FLAG_FUA else 0
            if command == CMD_TRIM:
                request = Request(DISCARD, flags=host_flags)
            else:
                if not flags & CMD_FLAG_NO_HOLE:
                    host_flags |= MAY_UNMAP
                if flags & CMD_FLAG_FAST_ZERO:
                    host_flags |= NO_FALLBACK
                request = Request(WRITE_ZEROES, flags=host_flags)
        return batch.others, request

    def _complaint(self, command: int, flags: int, offset: int, length: int) -> str:
        """What is wrong with a request, in words for the client's user; "" if nothing is.

        All of it is answered with EINVAL, also where the specification would have ENOSPC or EPERM
        ("SHOULD"): QEMU's server does, and clients have learned to read the text.
        """
        valid = self._valid_flags.get(command)
        if valid is None:
            return f"unknown command {command}"
        name = COMMAND_NAMES[command]
        if flags & ~valid:
            return f"{name}: flags {flags & ~valid:#x} are not valid here"
        if command == CMD_FLUSH:
            return ""
        if command in (CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES) and not self._writable:
            return f"{name}: the export is read-only"
        if command in _NEEDED_FLAGS and not self._flags & _NEEDED_FLAGS[command]:
            return f"{name}: not offered by this export"
        if command == CMD_BLOCK_STATUS:
            if not self._block_status:
                return f"{name}: no metadata context was negotiated"
            if length == 0:
                return f"{name}: length is zero"
        if command in (CMD_READ, CMD_WRITE, CMD_CACHE) and length > self._longest:
            return f"{name}: {length} bytes exceed the maximum of {self._longest}"
        if offset + length > self._size:
            return f"{name}: {length} bytes at {offset} go past the end of the export at {self._size}"
        if (offset | length) & self._align_mask:
            return f"{name}: {length} bytes at {offset} are not aligned to {self._align_mask + 1}"
        return ""
