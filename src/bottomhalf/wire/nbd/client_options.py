# SPDX-License-Identifier: Apache-2.0
"""What the client writes into options and reads out of replies (sections "Option types", "Option reply
types").

A server's word is not trusted: sizes, block sizes and string lengths are checked where they are read,
because whoever uses them later (a block driver, a mapping of the device) has no way to complain to the
peer. Pure functions over whole messages; the order of messages is in ``client_handshake``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd.constants import (
    INFO_BLOCK_SIZE,
    INFO_BLOCK_SIZE_LAYOUT,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_EXPORT_LAYOUT,
    INFO_NAME,
    MAX_REQUEST,
    MAX_STRING,
    U16,
    U32,
)

MAX_MINIMUM_BLOCK = 64 << 10  # section "Block size constraints": the minimum is "no more than 64KiB"
NO_MAXIMUM = 0xFFFFFFFF  # the maximum of a server that has none


@dataclass(slots=True)
class ClientExport:
    """An export as a server describes it. Sizes in bytes; ``size`` is -1 and the block sizes are 0 as long
    as the server has not told them. ``contexts`` is filled by ``Goal.LIST`` only."""

    name: str
    description: str = ""
    size: int = -1
    flags: int = 0
    minimum_block_size: int = 0
    preferred_block_size: int = 0
    maximum_block_size: int = 0
    contexts: list[str] = field(default_factory=list)

    def set_size(self, size: int, flags: int, offset: int) -> None:
        """Size and transmission flags, as every style of negotiation tells them."""
        if size >= 1 << 63:
            raise unexpected(f"an export of {size} bytes", offset)
        self.size = size
        self.flags = flags


@dataclass(frozen=True, slots=True)
class ClientNegotiated:
    """What a client's negotiation settled on. ``contexts`` maps names to the ids that replies will carry;
    ``leftover`` is what of the input belongs to the transmission phase already."""

    export: ClientExport
    structured_replies: bool
    contexts: dict[str, int]
    leftover: bytes

    @property
    def longest_request(self) -> int:
        """The most bytes that a read or write may have: the server's maximum, at most MAX_REQUEST."""
        maximum = self.export.maximum_block_size
        return min(maximum, MAX_REQUEST) if maximum else MAX_REQUEST


def unexpected(what: str, offset: int) -> ProtocolError:
    """The error for a server that says what it must not."""
    return ProtocolError(
        "unexpected message in the NBD handshake", got=what, offset=offset, cause="probably a server bug"
    )


def info_option(name: str) -> bytes:
    """Data of NBD_OPT_INFO and NBD_OPT_GO: 32 bits, length of name; name; 16 bits, number of information
    requests; 16 bits each. We ask for the description and the block sizes."""
    text = name.encode()
    wanted = (INFO_DESCRIPTION, INFO_BLOCK_SIZE)
    return U32.pack(len(text)) + text + U16.pack(len(wanted)) + b"".join(U16.pack(kind) for kind in wanted)


def context_option(name: str, queries: tuple[str, ...]) -> bytes:
    """Data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT: 32 bits, length of export name; name;
    32 bits, number of queries; per query 32 bits, length; query."""
    texts = [name.encode(), *(query.encode() for query in queries)]
    packed = [U32.pack(len(text)) + text for text in texts]
    return packed[0] + U32.pack(len(queries)) + b"".join(packed[1:])


def read_info(export: ClientExport, data: bytes, offset: int) -> None:
    """One REP_INFO into ``export``; unknown kinds of information are ignored as the specification
    demands."""
    if len(data) < U16.size:
        raise unexpected(f"NBD_REP_INFO of {len(data)} bytes", offset)
    (kind,) = U16.unpack_from(data)
    if kind == INFO_EXPORT:
        if len(data) != INFO_EXPORT_LAYOUT.size:
            raise unexpected(f"NBD_INFO_EXPORT of {len(data)} bytes", offset)
        _, size, flags = INFO_EXPORT_LAYOUT.unpack(data)
        export.set_size(size, flags, offset)
    elif kind == INFO_BLOCK_SIZE:
        if len(data) != INFO_BLOCK_SIZE_LAYOUT.size:
            raise unexpected(f"NBD_INFO_BLOCK_SIZE of {len(data)} bytes", offset)
        _, minimum, preferred, maximum = INFO_BLOCK_SIZE_LAYOUT.unpack(data)
        good_minimum = 0 < minimum <= MAX_MINIMUM_BLOCK and not minimum & (minimum - 1)
        good_preferred = preferred >= minimum and not preferred & (preferred - 1)
        good_maximum = maximum >= minimum and (maximum == NO_MAXIMUM or not maximum % max(minimum, 1))
        if not (good_minimum and good_preferred and good_maximum):
            raise unexpected(f"block sizes {minimum}, {preferred}, {maximum}", offset)
        export.minimum_block_size = minimum
        export.preferred_block_size = preferred
        export.maximum_block_size = maximum
    elif kind == INFO_NAME:
        _text(data[U16.size :], offset)  # the canonical name; we keep the one that the user chose
    elif kind == INFO_DESCRIPTION:
        export.description = _text(data[U16.size :], offset)


def read_listed(data: bytes, offset: int) -> ClientExport:
    """One REP_SERVER: 32 bits, length of name; name; details for people."""
    if len(data) < U32.size:
        raise unexpected(f"NBD_REP_SERVER of {len(data)} bytes", offset)
    (length,) = U32.unpack_from(data)
    if length > len(data) - U32.size:
        raise unexpected(f"NBD_REP_SERVER of {len(data)} bytes with a name of {length}", offset)
    after = U32.size + length
    return ClientExport(_text(data[U32.size : after], offset), _text(data[after:], offset))


def read_context(data: bytes, offset: int) -> tuple[int, str]:
    """One REP_META_CONTEXT: 32 bits, context id; name."""
    if len(data) <= U32.size:
        raise unexpected(f"NBD_REP_META_CONTEXT of {len(data)} bytes", offset)
    return U32.unpack_from(data)[0], _text(data[U32.size :], offset)


def _text(data: bytes, offset: int) -> str:
    if len(data) > MAX_STRING:
        raise unexpected(f"a string of {len(data)} bytes, more than {MAX_STRING}", offset)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise unexpected(f"a string that is not UTF-8: {data[:80]!r}", offset)
