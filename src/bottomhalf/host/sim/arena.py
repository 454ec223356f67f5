# SPDX-License-Identifier: Apache-2.0
"""Memory of the simulated host: a bytearray, which has no address that a request could carry."""

from __future__ import annotations


class SimArena:
    """A host.protocol.Arena; ``address`` is 0, for nothing here is reached by address."""

    def __init__(self, size: int) -> None:
        if size <= 0:
            raise ValueError(f"size is {size}, not more than 0 bytes")
        self.size = size
        self.view = memoryview(bytearray(size))
        self.address = 0

    def close(self) -> None:
        try:
            self.view.release()
        except BufferError:
            pass  # a leftover view only delays it
