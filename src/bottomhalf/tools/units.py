# SPDX-License-Identifier: Apache-2.0
"""Numbers for people."""

from __future__ import annotations

from typing import Final

_BINARY: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def binary_size(count: float) -> str:
    """Bytes as "1.5 GiB"."""
    for unit in _BINARY:
        if count < 1024 or unit == _BINARY[-1]:
            break
        count /= 1024
    digits = f"{count:.0f}" if unit == "B" or count >= 100 else f"{count:.3g}"
    return f"{digits} {unit}"


def rate(count: float) -> str:
    """A count per second as "310k/s"."""
    for unit in ("", "k", "M"):
        if count < 1000 or unit == "M":
            break
        count /= 1000
    return f"{count:.0f}{unit}/s" if count >= 100 or not unit else f"{count:.3g}{unit}/s"


def duration(nanoseconds: float) -> str:
    """A time as "38 us"."""
    for unit in ("ns", "us", "ms"):
        if nanoseconds < 1000:
            return f"{nanoseconds:.3g} {unit}"
        nanoseconds /= 1000
    return f"{nanoseconds:.3g} s"
