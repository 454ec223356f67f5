# SPDX-License-Identifier: Apache-2.0
"""Errors of the block layer that are not I/O errors (those are ``OSError`` with ``errno``)."""

from __future__ import annotations

import os


class BlockError(Exception):
    """The graph cannot be what was asked for: a name, a permission, a driver. The text is for the user."""


class ImageError(BlockError):
    """The bytes of an image are not what its format promises. Says where and what was expected."""


def check(result: int, what: str) -> None:
    """Raise the OSError for a request's negative result."""
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
