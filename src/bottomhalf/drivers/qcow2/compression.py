# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters (chapter "Compressed Clusters Descriptor").

zlib clusters are raw deflate streams with a window of 4 KiB, zstd clusters are frames. Whoever reads them knows how
long the result has to be, so a stream that would give more is stopped there: an image cannot make us unpack gigabytes.

Clause: "Compressed Clusters Descriptor".
Invariant: no more than a cluster comes out, whatever goes in.
Test: tests/drivers/qcow2/test_compressed.py
"""

from __future__ import annotations

import zlib
from typing import Any, Final

from bottomhalf.block.errors import BlockError, ImageError
from bottomhalf.drivers.qcow2.layout import ZSTD

_WINDOW_BITS: Final = -12  # raw deflate, 4 KiB


def compress(data: bytes | memoryview, size: int, kind: int) -> bytes | None:
    """A cluster's bytes made smaller, as it is stored; None if they do not become smaller. ``data`` may be shorter than
    the ``size`` bytes of a cluster: there are zeroes behind it. Any thread."""
    padding = bytes(size - len(data))
    if kind == ZSTD:
        result: bytes = _zstd().ZstdCompressor().compress(bytes(data) + padding)
    else:
        packer = zlib.compressobj(wbits=_WINDOW_BITS)
        result = packer.compress(data) + packer.compress(padding) + packer.flush()
    return result if len(result) < size else None


def decompress(data: bytes | memoryview, size: int, kind: int) -> bytes:
    """The ``size`` bytes of a cluster. ``data`` may go on behind them. ImageError if it gives fewer."""
    if kind == ZSTD:
        return _decompress_zstd(data, size)
    try:
        result = zlib.decompressobj(_WINDOW_BITS).decompress(data, size)
    except zlib.error as error:
        raise ImageError(f"a compressed cluster cannot be unpacked: {error}") from None
    if len(result) < size:
        raise ImageError(f"a compressed cluster has {len(result)} bytes instead of {size}")
    return result


def _decompress_zstd(data: bytes | memoryview, size: int) -> bytes:
    zstd = _zstd()
    try:
        result: bytes = zstd.ZstdDecompressor().stream_reader(bytes(data)).read(size)
    except zstd.ZstdError as error:
        raise ImageError(f"a compressed cluster cannot be unpacked: {error}") from None
    if len(result) < size:
        raise ImageError(f"a compressed cluster has {len(result)} bytes instead of {size}")
    return result


def _zstd() -> Any:
    """A package does it: the standard library of the Pythons that we run on has no zstd."""
    try:
        import zstandard  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise BlockError(
            "this image's clusters are compressed with zstd, for which the package zstandard is needed: "
            "pip install 'bottomhalf[compress]'"
        ) from None
    return zstandard
