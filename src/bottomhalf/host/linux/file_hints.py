# SPDX-License-Identifier: Apache-2.0
"""What a file system may be told about a new file. None of it changes what the file is, and few file systems listen, so
a refusal is nothing (ioctl_iflags(2), ioctl_xfs_fssetxattr(2))."""

from __future__ import annotations

import fcntl
import struct
from typing import Final

_GETFLAGS: Final = 0x80086601
_SETFLAGS: Final = 0x40086602
_NOCOW: Final = 0x00800000
_FSGETXATTR: Final = 0x801C581F
_FSSETXATTR: Final = 0x401C5820
_EXTSIZE: Final = 0x00000800
_XATTR: Final = struct.Struct("=5I8x")  # xflags, extsize, nextents, projid, cowextsize


def give_hints(fd: int, nocow: bool, extent_size_hint_bytes: int) -> None:
    """Tell the file system, as far as it listens."""
    if nocow:
        try:
            flags = bytearray(fcntl.ioctl(fd, _GETFLAGS, bytes(8)))
            flags[:4] = (int.from_bytes(flags[:4], "little") | _NOCOW).to_bytes(4, "little")
            fcntl.ioctl(fd, _SETFLAGS, bytes(flags))
        except OSError:
            pass
    if 0 < extent_size_hint_bytes < 1 << 32:
        try:
            xflags, _, extents, project, cow = _XATTR.unpack(fcntl.ioctl(fd, _FSGETXATTR, bytes(_XATTR.size)))
            packed = _XATTR.pack(xflags | _EXTSIZE, extent_size_hint_bytes, extents, project, cow)
            fcntl.ioctl(fd, _FSSETXATTR, packed)
        except OSError:
            pass
