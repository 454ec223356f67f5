# SPDX-License-Identifier: Apache-2.0
"""What happens when an image turns out to be damaged while it is in use.

Somebody asked for bytes, and learns EIO; users of the monitor learn it by the event BLOCK_IMAGE_CORRUPTED. If writing
on would destroy more (``overlap.Corruption``), the header says from then on that the image is corrupt, which keeps it
from being opened for writing before it is repaired, and the node answers ENOMEDIUM to whatever is asked of it. What was
not flushed is lost, as in a power cut.

Clause: "Header" (the corrupt bit).
Invariant: an image that is known to be damaged is not written any more, but for that bit.
Test: tests/drivers/qcow2/test_overlap.py
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2.overlap import Corruption
from bottomhalf.host.request import Request

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node

_SUPPRESSED: Final = "further {}corruption events will be suppressed"


class Trouble:
    """What was found wrong with one image."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._told = False

    async def co_found(self, error: ImageError) -> None:
        """The error is on its way to whoever asked; do the rest. Without the tables' lock. OSError: the image cannot be
        marked."""
        node, metadata = self._node, self._node.metadata
        if not isinstance(error, Corruption) or node.read_only:
            if not self._told:
                self._told = True
                self._tell(f"Image is corrupt: {error}; {_SUPPRESSED.format('non-fatal ')}", None, fatal=False)
            return
        if metadata.broken:
            return
        node.submit_batch = self._refuse  # type: ignore[method-assign]
        self._tell(f"Marking image as corrupt: {error}; {_SUPPRESSED.format('')}", error, fatal=True)
        async with metadata.lock:
            try:
                await metadata.mark_corrupt()
            except ImageError as failed:  # a header that fits only as it came
                raise OSError(errno.EIO, str(failed), node.name) from failed

    def _refuse(self, requests: list[Request]) -> list[Request]:
        return self._node.finish(requests, -errno.ENOMEDIUM)

    def _tell(self, text: str, error: Corruption | None, *, fatal: bool) -> None:
        listener = self._node.graph.image_corrupted
        if listener is not None:
            offset, size = (None, None) if error is None else (error.offset, error.size)
            listener(self._node, text, offset, size, fatal)
