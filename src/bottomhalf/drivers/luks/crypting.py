# SPDX-License-Identifier: Apache-2.0
"""A door in front of a file behind which everything is encrypted: lists in, lists out.

    crypt = CryptFile(lambda: edge.node, cipher)
    pending = crypt.submit_batch(requests)      # offsets of the file; the vectors count from byte ``base``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.drivers.luks.ciphers import SECTOR_BYTES, SectorCipher
from bottomhalf.host.request import READ, WRITE, Request, deliver

if TYPE_CHECKING:
    from bottomhalf.block import Node

_SHIFT: Final = SECTOR_BYTES.bit_length() - 1


class CryptFile:
    """Reads and writes of whole sectors. What is neither goes on as it is. ``by_guest``: the vectors do not follow
    from the file's offsets, and so whoever has this does not submit anything to it, but encrypts and decrypts."""

    __slots__ = ("_cipher", "_node", "by_guest")

    def __init__(self, node: Callable[[], Node], cipher: SectorCipher, *, by_guest: bool = False) -> None:
        self._node = node
        self._cipher = cipher
        self.by_guest = by_guest

    @property
    def node(self) -> Node:
        """The file."""
        return self._node()

    @property
    def name(self) -> str:
        return self._node().name

    @property
    def size(self) -> int:
        return self._node().size

    def describe(self) -> str:
        return self._node().describe()

    def decrypt(self, pieces: list[tuple[int, memoryview]]) -> None:
        """Decrypt in place what was stored at these bytes."""
        self._cipher.decrypt([(offset >> _SHIFT, view) for offset, view in pieces])

    def encrypted(self, offset: int, data: Any) -> memoryview:
        """A copy of data as it is to be stored at byte ``offset``."""
        copy = memoryview(bytearray(data))
        self._cipher.encrypt([(offset >> _SHIFT, copy)])
        return copy

    def submit_batch(self, requests: list[Request], base: int = 0) -> list[Request]:
        """Take requests of one op whose offsets are ``base`` bytes less than those of the file."""
        op = requests[0].op
        if op == READ:
            return self._read(requests, base)
        if op == WRITE:
            return self._write(requests, base)
        for request in requests:
            request.offset += base
        return self._node().submit_batch(requests)

    def _read(self, requests: list[Request], base: int) -> list[Request]:
        # Layers below map offsets in place and owners are ours to lend: both are noted before they go down.
        passage = _Reads(self._cipher)
        notes = passage.notes
        for request in requests:
            notes[id(request)] = request.offset >> _SHIFT, request.owner
            request.offset += base
            request.owner = passage
        pending = self._node().submit_batch(requests)
        if len(pending) < len(requests):
            waiting = {id(request) for request in pending}
            passage.settle([request for request in requests if id(request) not in waiting])
        return pending

    def _write(self, requests: list[Request], base: int) -> list[Request]:
        passage = _Writes()
        notes = passage.notes
        pieces = []
        for request in requests:
            copy = memoryview(bytearray(request.buffer))
            pieces.append((request.offset >> _SHIFT, copy))
            notes[id(request)] = request.buffer, request.address, request.owner
            request.buffer, request.address = copy, 0
            request.offset += base
            request.owner = passage
        self._cipher.encrypt(pieces)
        pending = self._node().submit_batch(requests)
        if len(pending) < len(requests):
            waiting = {id(request) for request in pending}
            passage.settle([request for request in requests if id(request) not in waiting])
        return pending


class _Reads:
    """The owner of reads that are on their way: decrypts, then tells the real one."""

    __slots__ = ("_cipher", "notes")

    def __init__(self, cipher: SectorCipher) -> None:
        self._cipher = cipher
        self.notes: dict[int, tuple[int, Any]] = {}

    def settle(self, requests: list[Request]) -> None:
        pieces = []
        for request in requests:
            sector, request.owner = self.notes.pop(id(request))
            if request.result == 0:
                pieces.append((sector, request.buffer))
        if pieces:
            self._cipher.decrypt(pieces)

    def complete(self, requests: list[Request]) -> None:
        self.settle(requests)
        deliver(requests)


class _Writes:
    """The owner of writes that are on their way: gives the guest's buffers back, then tells the real one."""

    __slots__ = ("notes",)

    def __init__(self) -> None:
        self.notes: dict[int, tuple[Any, int, Any]] = {}

    def settle(self, requests: list[Request]) -> None:
        for request in requests:
            request.buffer, request.address, request.owner = self.notes.pop(id(request))

    def complete(self, requests: list[Request]) -> None:
        self.settle(requests)
        deliver(requests)
