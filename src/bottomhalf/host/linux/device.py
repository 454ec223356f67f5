# SPDX-License-Identifier: Apache-2.0
"""Block devices: what they say of themselves, and what only an ioctl does.

A device has no holes and a size that no call of ours changes. What it can do it tells in two ways: block sizes by
ioctls, limits in the files of its queue, ``/sys/dev/block/MAJOR:MINOR/queue`` (a partition's queue is that of its
disk, one directory up). A container may show no sysfs; then a limit is unknown, and nothing relies on it, for the
kernel cuts what is too large.

Discards and zeroes are ioctls on ranges of whole logical blocks. BLKDISCARD may or may not read as zeroes afterwards.
BLKZEROOUT always does, writing zero bytes if the device knows nothing better. A hole, if one may be made, is asked for
with fallocate(2), which refuses where the device would have to write.

BLKROGET tells of a device that is read-only although its node was opened for writing.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

from bottomhalf.host.linux.syscalls import ioctl
from bottomhalf.host.protocol import DeviceLimits

_BLKROGET: Final = 0x125E
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKPBSZGET: Final = 0x127B
_BLKZEROOUT: Final = 0x127F
_BLKGETSIZE64: Final = 0x80081272

SECTOR_BYTES: Final = 512  # what a device is assumed to have that does not say


def size(fd: int) -> int:
    """BLKGETSIZE64; where that is refused, the end that lseek(2) finds."""
    answer = ctypes.create_string_buffer(8)
    try:
        ioctl(fd, _BLKGETSIZE64, answer)
    except OSError:
        return os.lseek(fd, 0, os.SEEK_END)
    return int(struct.unpack("=Q", answer.raw)[0])


def is_read_only(fd: int) -> bool:
    """BLKROGET."""
    return bool(_number(fd, _BLKROGET, 0))


def limits(fd: int) -> DeviceLimits:
    """See DeviceLimits. Does not fail: what is not known is 0."""
    queue = _queue(os.fstat(fd).st_rdev)
    logical = logical_block(fd)
    return DeviceLimits(
        logical_block=logical,
        physical_block=_number(fd, _BLKPBSZGET, logical),
        max_transfer=_read(queue, "max_sectors_kb") * 1024,
        max_segments=_read(queue, "max_segments"),
        discard_granularity=_read(queue, "discard_granularity"),
        max_discard=_read(queue, "discard_max_bytes"),
        max_write_zeroes=_read(queue, "write_zeroes_max_bytes"),
        optimal_transfer=_read(queue, "optimal_io_size"),
    )


def logical_block(fd: int) -> int:
    """BLKSSZGET."""
    return _number(fd, _BLKSSZGET, SECTOR_BYTES)


def discard(fd: int, offset: int, length: int) -> None:
    """BLKDISCARD. OSError: EINVAL for a range that is not one of whole blocks, EOPNOTSUPP."""
    ioctl(fd, _BLKDISCARD, _range(offset, length))


def zero_out(fd: int, offset: int, length: int) -> None:
    """BLKZEROOUT. OSError: EINVAL for a range that is not one of whole blocks."""
    ioctl(fd, _BLKZEROOUT, _range(offset, length))


def _range(offset: int, length: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("=QQ", offset, length), 16)


def _number(fd: int, request: int, otherwise: int) -> int:
    answer = ctypes.create_string_buffer(8)
    try:
        ioctl(fd, request, answer)
    except OSError:
        return otherwise
    return int(struct.unpack_from("=I", answer)[0])


def _queue(number: int) -> str:
    here = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    own = f"{here}/queue"
    return own if os.path.isdir(own) else f"{here}/../queue"


def _read(queue: str, name: str) -> int:
    try:
        with open(f"{queue}/{name}") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0
