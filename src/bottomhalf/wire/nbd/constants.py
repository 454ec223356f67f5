# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol's numbers: magics, options, replies, flags, commands, errors, layouts and limits.

NBD is a byte stream of fixed big-endian headers. The numbers are plain ``int`` because the hot path
compares them; names for messages are in the ``*_NAMES`` tables. Every struct stands beside the layout that
it packs, in the words of the specification ("proto.md" of the NBD project, sections named beside each).
Every limit has a name and its precedent beside it. Nothing else lives here.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import Final

# --- Magics -----------------------------------------------------------------------------------------------

NBDMAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC", first 8 bytes from every server
IHAVEOPT: Final = 0x49484156454F5054  # "IHAVEOPT", second 8 bytes of newstyle, and before every option
CLISERV_MAGIC: Final = 0x00420281861253  # second 8 bytes of oldstyle
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# --- Handshake flags (section "Flag fields") --------------------------------------------------------------

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1
FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_C_NO_ZEROES: Final = 1 << 1

# --- Transmission flags -----------------------------------------------------------------------------------

FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_ROTATIONAL: Final = 1 << 4
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_RESIZE: Final = 1 << 9
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11
FLAG_BLOCK_STAT_PAYLOAD: Final = 1 << 12

# --- Options (section "Option types") ---------------------------------------------------------------------

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_PEEK_EXPORT: Final = 4  # withdrawn
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11

OPTION_NAMES: Final = {
    OPT_EXPORT_NAME: "NBD_OPT_EXPORT_NAME",
    OPT_ABORT: "NBD_OPT_ABORT",
    OPT_LIST: "NBD_OPT_LIST",
    OPT_PEEK_EXPORT: "NBD_OPT_PEEK_EXPORT",
    OPT_STARTTLS: "NBD_OPT_STARTTLS",
    OPT_INFO: "NBD_OPT_INFO",
    OPT_GO: "NBD_OPT_GO",
    OPT_STRUCTURED_REPLY: "NBD_OPT_STRUCTURED_REPLY",
    OPT_LIST_META_CONTEXT: "NBD_OPT_LIST_META_CONTEXT",
    OPT_SET_META_CONTEXT: "NBD_OPT_SET_META_CONTEXT",
    OPT_EXTENDED_HEADERS: "NBD_OPT_EXTENDED_HEADERS",
}

# --- Option replies (section "Option reply types") --------------------------------------------------------

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_FLAG_ERROR: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_FLAG_ERROR + 1
REP_ERR_POLICY: Final = REP_FLAG_ERROR + 2
REP_ERR_INVALID: Final = REP_FLAG_ERROR + 3
REP_ERR_PLATFORM: Final = REP_FLAG_ERROR + 4
REP_ERR_TLS_REQD: Final = REP_FLAG_ERROR + 5
REP_ERR_UNKNOWN: Final = REP_FLAG_ERROR + 6
REP_ERR_SHUTDOWN: Final = REP_FLAG_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_FLAG_ERROR + 8
REP_ERR_TOO_BIG: Final = REP_FLAG_ERROR + 9
REP_ERR_EXT_HEADER_REQD: Final = REP_FLAG_ERROR + 10

REPLY_NAMES: Final = {
    REP_ACK: "NBD_REP_ACK",
    REP_SERVER: "NBD_REP_SERVER",
    REP_INFO: "NBD_REP_INFO",
    REP_META_CONTEXT: "NBD_REP_META_CONTEXT",
    REP_ERR_UNSUP: "NBD_REP_ERR_UNSUP",
    REP_ERR_POLICY: "NBD_REP_ERR_POLICY",
    REP_ERR_INVALID: "NBD_REP_ERR_INVALID",
    REP_ERR_PLATFORM: "NBD_REP_ERR_PLATFORM",
    REP_ERR_TLS_REQD: "NBD_REP_ERR_TLS_REQD",
    REP_ERR_UNKNOWN: "NBD_REP_ERR_UNKNOWN",
    REP_ERR_SHUTDOWN: "NBD_REP_ERR_SHUTDOWN",
    REP_ERR_BLOCK_SIZE_REQD: "NBD_REP_ERR_BLOCK_SIZE_REQD",
    REP_ERR_TOO_BIG: "NBD_REP_ERR_TOO_BIG",
    REP_ERR_EXT_HEADER_REQD: "NBD_REP_ERR_EXT_HEADER_REQD",
}

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

# --- Commands and their flags (section "Request types") ---------------------------------------------------

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

COMMAND_NAMES: Final = {
    CMD_READ: "NBD_CMD_READ",
    CMD_WRITE: "NBD_CMD_WRITE",
    CMD_DISC: "NBD_CMD_DISC",
    CMD_FLUSH: "NBD_CMD_FLUSH",
    CMD_TRIM: "NBD_CMD_TRIM",
    CMD_CACHE: "NBD_CMD_CACHE",
    CMD_WRITE_ZEROES: "NBD_CMD_WRITE_ZEROES",
    CMD_BLOCK_STATUS: "NBD_CMD_BLOCK_STATUS",
}

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4
CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

# --- Structured replies (section "Structured reply types") ------------------------------------------------

REPLY_FLAG_DONE: Final = 1 << 0

REPLY_TYPE_NONE: Final = 0
REPLY_TYPE_OFFSET_DATA: Final = 1
REPLY_TYPE_OFFSET_HOLE: Final = 2
REPLY_TYPE_BLOCK_STATUS: Final = 5
REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
REPLY_TYPE_FLAG_ERROR: Final = 1 << 15
REPLY_TYPE_ERROR: Final = REPLY_TYPE_FLAG_ERROR + 1
REPLY_TYPE_ERROR_OFFSET: Final = REPLY_TYPE_FLAG_ERROR + 2

REPLY_TYPE_NAMES: Final = {
    REPLY_TYPE_NONE: "NBD_REPLY_TYPE_NONE",
    REPLY_TYPE_OFFSET_DATA: "NBD_REPLY_TYPE_OFFSET_DATA",
    REPLY_TYPE_OFFSET_HOLE: "NBD_REPLY_TYPE_OFFSET_HOLE",
    REPLY_TYPE_BLOCK_STATUS: "NBD_REPLY_TYPE_BLOCK_STATUS",
    REPLY_TYPE_BLOCK_STATUS_EXT: "NBD_REPLY_TYPE_BLOCK_STATUS_EXT",
    REPLY_TYPE_ERROR: "NBD_REPLY_TYPE_ERROR",
    REPLY_TYPE_ERROR_OFFSET: "NBD_REPLY_TYPE_ERROR_OFFSET",
}

# --- Metadata contexts ------------------------------------------------------------------------------------

CONTEXT_BASE_ALLOCATION: Final = "base:allocation"
CONTEXT_ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
CONTEXT_DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"  # and the bitmap's name
STATE_HOLE: Final = 1 << 0  # base:allocation
STATE_ZERO: Final = 1 << 1  # base:allocation
STATE_DIRTY: Final = 1 << 0  # qemu:dirty-bitmap:NAME

# --- Error values (section "Error values") ----------------------------------------------------------------
# The wire has its own numbers. They equal Linux's, and only these may be sent.

NBD_SUCCESS: Final = 0
NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108

ERROR_NAMES: Final = {
    NBD_EPERM: "EPERM",
    NBD_EIO: "EIO",
    NBD_ENOMEM: "ENOMEM",
    NBD_EINVAL: "EINVAL",
    NBD_ENOSPC: "ENOSPC",
    NBD_EOVERFLOW: "EOVERFLOW",
    NBD_ENOTSUP: "ENOTSUP",
    NBD_ESHUTDOWN: "ESHUTDOWN",
}

_TO_WIRE: Final = {
    0: NBD_SUCCESS,
    errno.EPERM: NBD_EPERM,
    errno.EROFS: NBD_EPERM,  # "SHOULD return EPERM if ... write or trim request on a read-only export"
    errno.EIO: NBD_EIO,
    errno.ENOMEM: NBD_ENOMEM,
    errno.EINVAL: NBD_EINVAL,
    errno.ENOSPC: NBD_ENOSPC,
    errno.EFBIG: NBD_ENOSPC,  # "SHOULD map the EDQUOT and EFBIG errors to ENOSPC"
    errno.EDQUOT: NBD_ENOSPC,
    errno.EOVERFLOW: NBD_EOVERFLOW,
    errno.ENOTSUP: NBD_ENOTSUP,
    errno.ESHUTDOWN: NBD_ESHUTDOWN,
}

_FROM_WIRE: Final = {
    NBD_SUCCESS: 0,
    NBD_EPERM: errno.EPERM,
    NBD_EIO: errno.EIO,
    NBD_ENOMEM: errno.ENOMEM,
    NBD_EINVAL: errno.EINVAL,
    NBD_ENOSPC: errno.ENOSPC,
    NBD_EOVERFLOW: errno.EOVERFLOW,
    NBD_ENOTSUP: errno.ENOTSUP,
    NBD_ESHUTDOWN: errno.ESHUTDOWN,
}


def errno_to_nbd(number: int) -> int:
    """The wire's error for a host errno, given positive or as a negative result; unknown ones are EINVAL
    (what QEMU's server sends)."""
    return _TO_WIRE.get(abs(number), NBD_EINVAL)


def nbd_to_errno(error: int) -> int:
    """The host's positive errno for the wire's error; unknown ones are EINVAL (section "Error values")."""
    return _FROM_WIRE.get(error, errno.EINVAL)


# --- Limits -----------------------------------------------------------------------------------------------

MAX_STRING: Final = 4096  # section "Conventions": "MUST be no longer than 4096 bytes"
MAX_EXPORT_NAME: Final = MAX_STRING  # export names are strings
MAX_REQUEST: Final = 32 << 20  # QEMU's NBD_MAX_BUFFER_SIZE; also the largest that the specification promises
MAX_OPTION_DATA: Final = 256 << 10  # kept in memory; longer is drained, ERR_TOO_BIG. nbdkit keeps 16 KiB
MAX_OPTION_LENGTH: Final = 32 << 20  # longer closes the connection, as in QEMU
MAX_OPTIONS: Final = 4096  # per handshake; nbdkit allows 32, `qemu-nbd --list` sends two per export
MAX_QUERIES: Final = 1024  # metadata queries of one option; QEMU's bitmaps per export stay far below
MAX_INFO_REQUESTS: Final = 1024  # information requests of one INFO or GO; only four types exist
MAX_PENDING_OUTPUT: Final = 16 << 20  # replies that an option-flooding client leaves unread
MAX_BLOCK_STATUS_EXTENTS: Final = (1 << 20) // 8  # per chunk: 1 MiB of descriptors, as QEMU's server
MAX_CHUNKS: Final = 65536 + 16  # chunks of one reply: 32 MiB in pieces of 512 bytes, and unaligned ends
MAX_ERROR_CHUNK: Final = 6 + MAX_STRING + 64  # an error chunk: text of legal length, and fields still unknown
MAX_REPLY_DATA: Final = 64 << 10  # what our client keeps of one option reply; QEMU's client caps at 32 MiB
MAX_REPLIES: Final = 65536  # what our client takes in answer to one option (LIST of many exports)

# --- Layouts: handshake -----------------------------------------------------------------------------------

# S: 64 bits, NBDMAGIC
# S: 64 bits, IHAVEOPT
# S: 16 bits, handshake flags
GREETING: Final = Struct(">QQH")

# C: 32 bits, client flags
CLIENT_FLAGS: Final = Struct(">I")

# C: 64 bits, IHAVEOPT
# C: 32 bits, option
# C: 32 bits, length of option data (unsigned)
OPTION_HEADER: Final = Struct(">QII")

# S: 64 bits, 0x3e889045565a9 (magic number for replies)
# S: 32 bits, the option as sent by the client to which this is a reply
# S: 32 bits, reply type
# S: 32 bits, length of the reply
OPTION_REPLY: Final = Struct(">QIII")

# Reply to EXPORT_NAME.
# S: 64 bits, size of the export in bytes (unsigned)
# S: 16 bits, transmission flags
# S: 124 bytes, zeroes (reserved) (unless NBD_FLAG_C_NO_ZEROES was negotiated by the client)
EXPORT_NAME_REPLY: Final = Struct(">QH")
EXPORT_NAME_ZEROES: Final = bytes(124)

# Oldstyle, after NBDMAGIC and cliserv_magic.
# S: 64 bits, size of the export in bytes (unsigned)
# S: 32 bits, flags
# S: 124 bytes, zeroes (reserved)
OLDSTYLE_EXPORT: Final = Struct(">QI124x")

# REP_INFO with INFO_EXPORT.
# 16 bits, NBD_INFO_EXPORT; 64 bits, size of the export in bytes; 16 bits, transmission flags
INFO_EXPORT_LAYOUT: Final = Struct(">HQH")

# REP_INFO with INFO_BLOCK_SIZE.
# 16 bits, NBD_INFO_BLOCK_SIZE; 32 bits, minimum block size; 32 bits, preferred; 32 bits, maximum
INFO_BLOCK_SIZE_LAYOUT: Final = Struct(">HIII")

U16: Final = Struct(">H")
U32: Final = Struct(">I")

# --- Layouts: transmission --------------------------------------------------------------------------------

# C: 32 bits, 0x25609513, magic (NBD_REQUEST_MAGIC)   \
# C: 16 bits, command flags                            > one 64-bit head here: one comparison tells the magic,
# C: 16 bits, type                                    /  that no flag is set, and the type
# C: 64 bits, cookie
# C: 64 bits, offset (unsigned)
# C: 32 bits, length (unsigned)
# C: (length bytes of data if the request is of type NBD_CMD_WRITE)
REQUEST: Final = Struct(">QQQI")
REQUEST_SIZE: Final = REQUEST.size
assert REQUEST_SIZE == 28
REQUEST_HEAD: Final = REQUEST_MAGIC << 32  # + flags << 16 + type

# S: 32 bits, 0x67446698, magic (NBD_SIMPLE_REPLY_MAGIC)
# S: 32 bits, error (MAY be zero)
# S: 64 bits, cookie
# S: (length bytes of data if the request is of type NBD_CMD_READ and error is zero)
SIMPLE_REPLY: Final = Struct(">IIQ")
SIMPLE_REPLY_SIZE: Final = SIMPLE_REPLY.size
assert SIMPLE_REPLY_SIZE == 16

# S: 32 bits, 0x668e33ef, magic (NBD_STRUCTURED_REPLY_MAGIC)
# S: 16 bits, flags
# S: 16 bits, type
# S: 64 bits, cookie
# S: 32 bits, length of payload (unsigned)
# S: length bytes of payload data (if length is nonzero)
STRUCTURED_REPLY: Final = Struct(">IHHQI")
STRUCTURED_REPLY_SIZE: Final = STRUCTURED_REPLY.size
assert STRUCTURED_REPLY_SIZE == 20

# OFFSET_DATA: 64 bits, offset (unsigned); length - 8 bytes, data
OFFSET_DATA: Final = Struct(">IHHQIQ")
OFFSET_DATA_SIZE: Final = OFFSET_DATA.size
assert OFFSET_DATA_SIZE == 28

# OFFSET_HOLE: 64 bits, offset (unsigned); 32 bits, hole size (unsigned, MUST be nonzero)
OFFSET_HOLE: Final = Struct(">IHHQIQI")
OFFSET_HOLE_SIZE: Final = OFFSET_HOLE.size
assert OFFSET_HOLE_SIZE == 32

# BLOCK_STATUS: 32 bits, metadata context ID; then descriptors: 32 bits, length; 32 bits, status flags
BLOCK_STATUS: Final = Struct(">IHHQII")
BLOCK_STATUS_SIZE: Final = BLOCK_STATUS.size
assert BLOCK_STATUS_SIZE == 24
EXTENT: Final = Struct(">II")

# ERROR: 32 bits, error (MUST be nonzero); 16 bits, message length; message
ERROR_CHUNK: Final = Struct(">IHHQIIH")
ERROR_CHUNK_SIZE: Final = ERROR_CHUNK.size
assert ERROR_CHUNK_SIZE == 26
ERROR_PAYLOAD: Final = Struct(">IH")

# ERROR_OFFSET: as ERROR, and after the message: 64 bits, offset (unsigned)
U64: Final = Struct(">Q")
