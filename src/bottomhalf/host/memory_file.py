# SPDX-License-Identifier: Apache-2.0
"""Bytes that a library wants to open by a name: a file in memory that nobody else can name. For every host, since a
library opens things in this process whatever the host is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lend_path(data: bytes) -> Iterator[str]:
    """A path that leads to ``data`` while the block lasts. OSError."""
    fd = os.memfd_create("bottomhalf", os.MFD_CLOEXEC)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
