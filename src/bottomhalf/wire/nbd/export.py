# SPDX-License-Identifier: Apache-2.0
"""What both ends know of an export: its name, size, flags, block sizes and metadata contexts.

The negotiation core must not know block nodes, only what it tells a client about them. Therefore an export
is a frozen record here, and whoever owns real exports answers two questions with such records.

    class OneExport:
        def list_exports(self): return [INFO]
        def find_export(self, name): return INFO if name in ("", INFO.name) else None
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bottomhalf.wire.nbd.constants import (
    CONTEXT_ALLOCATION_DEPTH,
    CONTEXT_BASE_ALLOCATION,
    FLAG_HAS_FLAGS,
    FLAG_READ_ONLY,
    FLAG_SEND_CACHE,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    MAX_REQUEST,
)

READ_ONLY_FLAGS = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_SEND_CACHE | FLAG_READ_ONLY
WRITABLE_FLAGS = (
    FLAG_HAS_FLAGS
    | FLAG_SEND_FLUSH
    | FLAG_SEND_FUA
    | FLAG_SEND_CACHE
    | FLAG_SEND_TRIM
    | FLAG_SEND_WRITE_ZEROES
    | FLAG_SEND_FAST_ZERO
)


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """One export as the wire describes it. Sizes in bytes.

    ``flags`` are transmission flags without ``FLAG_SEND_DF``, which depends on the negotiation and is added
    by it. ``contexts`` are the names of the metadata contexts that the export can report.
    """

    name: str
    size: int
    flags: int = WRITABLE_FLAGS
    description: str = ""
    minimum_block_size: int = 1
    preferred_block_size: int = 4096
    maximum_block_size: int = MAX_REQUEST
    contexts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.size < 1 << 63:
            raise ValueError(f"export {self.name!r}: size {self.size} is not within 0 .. 2^63 - 1 bytes")
        if not self.flags & FLAG_HAS_FLAGS or self.flags & FLAG_SEND_DF:
            raise ValueError(f"export {self.name!r}: flags need HAS_FLAGS and must leave SEND_DF to us")
        minimum = self.minimum_block_size
        if minimum < 1 or minimum & (minimum - 1) or minimum > 64 << 10:
            raise ValueError(f"export {self.name!r}: minimum block size {minimum} is not 1, 2, 4 .. 65536")
        if not minimum <= self.preferred_block_size:
            raise ValueError(f"export {self.name!r}: preferred block size below the minimum {minimum}")
        if not minimum <= self.maximum_block_size <= MAX_REQUEST:
            raise ValueError(f"export {self.name!r}: maximum block size is not {minimum} .. {MAX_REQUEST}")
        if len(set(self.contexts)) != len(self.contexts):
            raise ValueError(f"export {self.name!r}: a metadata context is listed twice")

    def context_id(self, name: str) -> int:
        """The number that stands for context ``name`` on the wire: QEMU's numbering (0 base:allocation,
        1 qemu:allocation-depth, others from 2), so that traces of both look alike."""
        if name == CONTEXT_BASE_ALLOCATION:
            return 0
        if name == CONTEXT_ALLOCATION_DEPTH:
            return 1
        others = [
            context
            for context in self.contexts
            if context not in (CONTEXT_BASE_ALLOCATION, CONTEXT_ALLOCATION_DEPTH)
        ]
        return 2 + others.index(name)


class Exports(Protocol):
    """Who knows the exports. Called from inside ``ServerHandshake.receive``; must not wait."""

    def list_exports(self) -> list[ExportInfo]:
        """All exports that a client may be told of, in order."""

    def find_export(self, name: str) -> ExportInfo | None:
        """The export of that name; "" asks for the default one; None if there is none."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What a server's negotiation settled on.

    ``flags`` are the transmission flags that the client was told, ``contexts`` maps the wire's context ids
    to names, ``alignment`` is the block size in bytes that the client knows it must keep to (1 if it did
    not ask), ``leftover`` is what of the input belongs to the transmission phase already.
    """

    export: ExportInfo
    flags: int
    structured_replies: bool
    contexts: dict[int, str]
    alignment: int
    leftover: bytes
