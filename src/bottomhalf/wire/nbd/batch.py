# SPDX-License-Identifier: Apache-2.0
"""What the server's parser hands on: a batch of requests, and the operations that only NBD knows.

The layers below want lists of one operation each, the connection wants to know why the parser stopped, and
both want it without an object per answer. Therefore one reusable record carries the lists and the reasons;
requests are the host's ``Request``, and what the host has no operation for is a subclass with a number
beyond its range.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from bottomhalf.host.request import Request
from bottomhalf.wire.errors import ProtocolError

# Operations that only NBD knows; the host's are 0..4. Requests with these never go below the export.
CACHE: Final = 16  # prefetch
BLOCK_STATUS: Final = 17
EMPTY: Final = 18  # a read, write, trim, ... of no bytes: to be answered with success
_NBD_OP_NAMES: Final = {CACHE: "cache", BLOCK_STATUS: "block-status", EMPTY: "empty"}

# Flags that only NBD knows, above the host's.
DONT_FRAGMENT: Final = 1 << 16  # READ: the reply must be one chunk
REQ_ONE: Final = 1 << 17  # BLOCK_STATUS: one extent per context


class NbdRequest(Request):
    """A request with an operation that the host does not have: CACHE, BLOCK_STATUS, EMPTY. Not pooled.

    ``context`` is the command as the client sent it (``CMD_...``)."""

    __slots__ = ()

    def __repr__(self) -> str:
        name = _NBD_OP_NAMES.get(self.op, str(self.op))
        return f"<NbdRequest {name} {self.length}@{self.offset}>"


class Reject(NamedTuple):
    """A request to answer with an error at once: never reaches the export."""

    cookie: int
    error: int  # NBD_E...
    text: str  # for people, at most MAX_STRING bytes
    command: int  # CMD_..., or a number that we do not know


class Batch:
    """What one ``parse`` found. Reusable: ``clear`` before the next one.

    ``reads`` and ``writes`` hold one op each; ``others`` is mixed (FLUSH, DISCARD, WRITE_ZEROES as
    ``Request``, the rest as ``NbdRequest``). Of READs ``buffer``, ``address`` and ``start`` are stale until
    the caller (or ``replies.place_reads``) sets them.
    """

    __slots__ = (
        "disconnect",
        "error",
        "limited",
        "needed",
        "others",
        "read_bytes",
        "reads",
        "rejects",
        "write_bytes",
        "writes",
    )

    reads: list[Request]
    writes: list[Request]
    others: list[Request]
    rejects: list[Reject]
    read_bytes: int  # sum of the lengths of reads
    write_bytes: int  # sum of the lengths of writes
    disconnect: bool  # the client said DISC: answer what is in flight, then close
    error: ProtocolError | None  # the stream is broken: answer what came before, then close
    limited: bool  # max_requests or max_bytes ended this parse; call again when there is room
    needed: int  # > 0: bytes from the returned position on that the next request takes; it is incomplete

    def __init__(self) -> None:
        self.reads = []
        self.writes = []
        self.others = []
        self.rejects = []
        self.clear()

    def clear(self) -> None:
        """Forget everything. Lists with something in them become new ones: whoever took them keeps them."""
        if self.reads:
            self.reads = []
        if self.writes:
            self.writes = []
        if self.others:
            self.others = []
        if self.rejects:
            self.rejects = []
        self.read_bytes = 0
        self.write_bytes = 0
        self.disconnect = False
        self.error = None
        self.limited = False
        self.needed = 0
