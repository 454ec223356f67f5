# SPDX-License-Identifier: Apache-2.0
"""The driver ``luks``: what is written is stored encrypted, sector by sector.

A list goes on to the file as a list. Reads are decrypted where they lie, in the buffers that they were read into, when
the file is done with them; all that finish together are decrypted together. What a guest writes belongs to the guest,
so it is encrypted into a copy. Requests that are not whole sectors are padded by the block layer's ``Aligner``.

There is nothing to be gained from holes: a hole would read as noise. Zero writes are written, discards ignored.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from bottomhalf.block import Node
from bottomhalf.block.alignment import Aligner
from bottomhalf.block.edge import ROLE_DATA, ROLE_IMAGE, ROLE_METADATA, ROLE_PRIMARY
from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.luks import keys
from bottomhalf.drivers.luks.ciphers import SectorCipher, check_key
from bottomhalf.drivers.luks.crypting import CryptFile
from bottomhalf.drivers.luks.header import HEADER_BYTES, SECTOR_BYTES, Header
from bottomhalf.host.request import DISCARD, FLUSH, NO_FALLBACK, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block import Graph


class Unlocked:
    """An opened header: ``cipher`` is None if nobody gave a password."""

    __slots__ = ("cipher", "header", "slot")

    def __init__(self, header: Header, cipher: SectorCipher | None = None, slot: int | None = None) -> None:
        self.header = header
        self.cipher = cipher
        self.slot = slot


async def co_read(node: Node, offset: int, length: int) -> bytes:
    """Bytes of a node, fewer at its end."""
    data = bytearray(max(min(length, node.size - offset), 0))
    if data:
        await node.co_pread(offset, memoryview(data))
    return bytes(data)


async def co_load(
    node: Node, *, base: int = 0, limit: int | None = None, detached: bool = False
) -> tuple[Header, list[bytes | None]]:
    """The header at byte ``base`` of a node and the materials of its slots, which end before byte ``limit`` counted
    from ``base``. OSError, ImageError."""
    header = Header.parse(await co_read(node, base, HEADER_BYTES))
    header.check(detached=detached)
    check_key(header.cipher, header.mode, header.key_bytes)
    materials: list[bytes | None] = []
    for n, slot in enumerate(header.slots):
        start, size = slot.offset * SECTOR_BYTES, header.material_bytes
        if not slot.active:
            materials.append(None)
            continue
        material = b"" if limit is not None and start + size > limit else await co_read(node, base + start, size)
        if len(material) < size:
            raise ImageError(f"the material of keyslot {n} is not all there")
        materials.append(material)
    return header, materials


async def co_unlock(
    node: Node,
    password: bytes | None,
    *,
    base: int = 0,
    limit: int | None = None,
    detached: bool = False,
) -> Unlocked:
    """Open what is in a node with a password, in a thread. OSError, ImageError, BlockError for a wrong one."""
    header, materials = await co_load(node, base=base, limit=limit, detached=detached)
    if password is None:
        return Unlocked(header)
    slot, key = await node.context.thread_pool.call(keys.unlock, header, materials, password)
    return Unlocked(header, SectorCipher(key, header.cipher, header.mode), slot)


class LuksNode(Node):
    """A LUKS volume in ``file``, with its header there or in ``header_node``."""

    driver = "luks"

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        file: Node,
        unlocked: Unlocked,
        header_node: Node | None = None,
        read_only: bool = False,
        unmap: bool = False,
    ) -> None:
        super().__init__(graph, name, read_only=read_only, unmap=unmap)
        self.header = unlocked.header
        self.slot = unlocked.slot
        self.payload = unlocked.header.payload * SECTOR_BYTES
        if file.size < self.payload:
            raise ImageError(f"the payload begins at byte {self.payload}, the file has {file.size}")
        self._file = self.attach(file, "file", ROLE_IMAGE if header_node is None else ROLE_DATA | ROLE_PRIMARY)
        if header_node is not None:
            self.attach(header_node, "header", ROLE_METADATA)
        self.request_alignment = SECTOR_BYTES
        self.memory_alignment = file.memory_alignment
        self._cipher = unlocked.cipher
        self._crypt = None if unlocked.cipher is None else CryptFile(lambda: self._file.node, unlocked.cipher)
        self._aligner = Aligner(self, self._submit)
        self.size = self.open_size()

    def refresh_limits(self) -> None:
        self.memory_alignment = self._file.node.memory_alignment

    def open_size(self) -> int:
        return max(self._file.node.size - self.payload, 0)

    def written_below(self, end: int) -> list[tuple[Node, int]]:
        return [(self._file.node, end + self.payload)]

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        op = requests[0].op
        if op == FLUSH:
            return self._file.node.submit_batch(requests)
        if self._crypt is None:
            return self.finish(requests, -errno.EIO)
        if op == DISCARD:
            return self.finish(requests, 0)
        return self._aligner.submit(requests)

    def _submit(self, requests: list[Request]) -> list[Request]:
        assert self._crypt is not None
        if requests[0].op == WRITE_ZEROES:
            return [request for request in requests if self.start(request, self._co_zero(request))]
        return self._crypt.submit_batch(requests, self.payload)

    async def _co_zero(self, request: Request) -> None:
        if request.flags & NO_FALLBACK:
            raise OSError(errno.ENOTSUP, "an encrypted disk has no zeroes but written ones", self.name)
        await self.write_zero_bytes(request.offset, request.length, request.flags, self._submit)

    async def co_truncate(self, size: int) -> None:
        if size % SECTOR_BYTES:
            raise OSError(errno.EINVAL, "The new size must be a multiple of 512", self.name)
        await self._file.node.co_truncate(self.payload + size)

    def describe_format(self) -> dict[str, Any]:
        """What may be told of it: no key, no salt."""
        header = self.header
        return {
            "cipher": f"{header.cipher}-{header.mode}",
            "hash": header.hash,
            "uuid": header.uuid,
            "payload-offset": self.payload,
            "slots": [slot.active for slot in header.slots],
        }
