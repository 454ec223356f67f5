# SPDX-License-Identifier: Apache-2.0
"""Whether a buffer is all zero bytes, and making it so.

Comparing memoryviews compares element by element in Python 3.11, thirty times slower than memory. So the two ends are
looked at first, which decides for most data, and then pieces are compared as bytes.
"""

from __future__ import annotations

from typing import Final

_ZEROES: Final = bytes(65536)


def is_zero(buffer: memoryview) -> bool:
    """Whether all bytes are 0. An empty buffer is not: there is nothing to save."""
    length = len(buffer)
    if not length or buffer[0] or buffer[-1] or buffer[length // 2]:
        return False
    for begin in range(0, length, len(_ZEROES)):
        piece = bytes(buffer[begin : begin + len(_ZEROES)])
        if piece != (_ZEROES if len(piece) == len(_ZEROES) else _ZEROES[: len(piece)]):
            return False
    return True


def fill_zeroes(buffer: memoryview) -> None:
    """Zero a buffer of any length."""
    for begin in range(0, len(buffer), len(_ZEROES)):
        count = min(len(_ZEROES), len(buffer) - begin)
        buffer[begin : begin + count] = _ZEROES if count == len(_ZEROES) else _ZEROES[:count]
