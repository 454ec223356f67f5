# SPDX-License-Identifier: Apache-2.0
"""The request: one read, write, flush, discard or zero write on its way through every floor.

Python pays per call and per allocation, not per byte. Therefore a request is one object with slots that the
edge (an NBD connection, the library's face) takes from a pool, that every layer mutates in place on its way
down, and that the host's engine finishes. It lives on the lowest floor because the engine is the last one to
touch it; the block layer adds no class of its own.

    request = Request()
    request.op, request.offset, request.length = READ, 4096, 512
    request.buffer = arena.view[0:512]

Rules of a request:

* a batch (``list[Request]``) holds requests of one ``op``, so that a layer decides once per batch;
* ``offset`` and ``length`` are in bytes, ``offset`` relative to the node that is being asked: a layer that maps
  adds in place, an origin that needs its own offset later keeps it elsewhere (``cookie``, ``context``);
* ``result`` is ``IN_PROGRESS`` until it is 0 (success) or a negative errno, and is set exactly once;
* while a request is in progress its buffer belongs to the layers below.
"""

from __future__ import annotations

import errno
from typing import Any, Final, Protocol

READ: Final = 0
WRITE: Final = 1
FLUSH: Final = 2
DISCARD: Final = 3
WRITE_ZEROES: Final = 4
# Errands of an engine, one at a time. The block layer has functions for them; no layer passes them on as requests.
COPY_RANGE: Final = 5  # ``buffer`` is (File, offset): where the bytes come from
TRUNCATE: Final = 6  # ``offset`` is the new size, ``buffer`` "off", "falloc" or "full": what a new part is made of
BLOCK_STATUS: Final = 7  # ``buffer`` is a list; it gets what File.block_status() answers

OP_NAMES: Final = (
    *("read", "write", "flush", "discard", "write-zeroes"),
    *("copy-range", "truncate", "block-status"),
)

# Flags of a request (QEMU's BDRV_REQ_*).
FUA: Final = 1  # durable before it completes
MAY_UNMAP: Final = 2  # WRITE_ZEROES may deallocate
NO_FALLBACK: Final = 4  # WRITE_ZEROES: fail with ENOTSUP rather than write zero bytes slowly
COMPRESSED: Final = 8  # WRITE: store it compressed, if the image can

IN_PROGRESS: Final = 1  # value of Request.result before completion; results are <= 0


class Owner(Protocol):
    """Who is told when requests that did not finish at once are done."""

    def complete(self, requests: list[Request]) -> None:
        """Take finished requests (``result`` set). Called in the owner's home thread, never from inside the
        call that submitted them. Must not wait before it has handled all of the list."""


class Request:
    """One unit of I/O. Pooled and reused; see the module's rules."""

    __slots__ = (
        "address",
        "buffer",
        "context",
        "cookie",
        "done",
        "flags",
        "length",
        "offset",
        "op",
        "owner",
        "result",
        "slot",
        "start",
    )

    op: int
    flags: int
    offset: int
    length: int
    buffer: Any  # memoryview of exactly ``length`` bytes for READ and WRITE, else None; but see the errands above
    address: int  # memory address of buffer's first byte, 0 if not known
    result: int
    done: int  # bytes already transferred; the engine's own, 0 outside
    slot: Any  # the engine's or the host's own
    owner: Owner | None
    cookie: int  # the origin's own: what identifies the request to the peer
    start: int  # the origin's own: where in the arena the reply begins
    context: Any  # the origin's own

    def __init__(
        self, op: int = READ, offset: int = 0, length: int = 0, buffer: Any = None, flags: int = 0
    ) -> None:
        self.op = op
        self.flags = flags
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.address = 0
        self.result = IN_PROGRESS
        self.done = 0
        self.slot = None
        self.owner = None
        self.cookie = 0
        self.start = 0
        self.context = None

    def __repr__(self) -> str:
        state = "in progress" if self.result == IN_PROGRESS else f"result {self.result}"
        return f"<Request {OP_NAMES[self.op]} {self.length}@{self.offset} {state}>"


def prepare_each(engine: Any, file: Any, requests: list[Request]) -> list[Request]:
    """Have an engine prepare requests one by one; those that it has no memory for, with their result set: the others of
    a batch are innocent."""
    refused = []
    for request in requests:
        try:
            engine.prepare(file, request)
        except OSError as error:
            request.result = -(error.errno or errno.EIO)
            refused.append(request)
    return refused


def deliver(requests: list[Request]) -> None:
    """Hand finished requests to their owners: one call per owner, in order of first appearance."""
    first = requests[0].owner
    for request in requests:
        if request.owner is not first:
            break
    else:
        if first is not None:
            first.complete(requests)
        return
    groups: dict[int, list[Request]] = {}
    for request in requests:
        groups.setdefault(id(request.owner), []).append(request)
    for group in groups.values():
        owner = group[0].owner
        if owner is not None:
            owner.complete(group)
