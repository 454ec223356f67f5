# SPDX-License-Identifier: Apache-2.0
"""How tools are told to treat an image, in QEMU's words."""

from __future__ import annotations

from typing import Final

# --cache: (O_DIRECT, flushes are ignored, every write is made durable).
CACHE_MODES: Final = {
    "none": (True, False, False),
    "off": (True, False, False),
    "directsync": (True, False, True),
    "writeback": (False, False, False),
    "unsafe": (False, True, False),
    "writethrough": (False, False, True),
}
AIO_MODES: Final = ("threads", "native", "io_uring")
