# SPDX-License-Identifier: Apache-2.0
"""A new LUKS header with one password. (``keyslots`` adds others and takes them away.)"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from bottomhalf.block.errors import BlockError
from bottomhalf.drivers.luks import keys
from bottomhalf.drivers.luks.ciphers import check_key, load_cryptography
from bottomhalf.drivers.luks.header import (
    DIGEST_BYTES,
    HASHES,
    MATERIAL_ALIGN,
    SALT_BYTES,
    SECTOR_BYTES,
    SLOTS,
    WORK_MAX,
    Header,
)

if TYPE_CHECKING:
    from bottomhalf.block import Node
    from bottomhalf.qapi.block_create import QCryptoBlockCreateOptionsLUKS

ITERATION_TIME_MS_MAX = 60_000
_ALGORITHMS = {"aes-128": 16, "aes-192": 24, "aes-256": 32}


@dataclass(frozen=True)
class LuksOptions:
    """What a new header shall be like, in QEMU's words. ``iter_time`` in milliseconds."""

    password: bytes = field(repr=False)
    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str | None = None
    hash_alg: str = "sha256"
    iter_time: int = keys.ITERATION_TIME_MS

    @classmethod
    def of(cls, given: QCryptoBlockCreateOptionsLUKS, password: bytes) -> LuksOptions:
        """From the schema's options."""
        names = {each.name for each in fields(cls)} - {"password"}
        chosen: dict[str, Any] = {name: value for name in names if (value := getattr(given, name))}
        words: dict[str, Any] = {name: str(value) for name, value in chosen.items() if name != "iter_time"}
        return replace(cls(password, iter_time=chosen.get("iter_time", keys.ITERATION_TIME_MS)), **words)

    def header(self) -> Header:
        """The header without keys. BlockError for what cannot be."""
        load_cryptography()
        size = _ALGORITHMS.get(self.cipher_alg)
        if size is None:
            raise BlockError(f"cipher-alg is one of {', '.join(_ALGORITHMS)}, not '{self.cipher_alg}'")
        if self.hash_alg not in HASHES:
            raise BlockError(f"hash-alg is one of {', '.join(HASHES)}, not '{self.hash_alg}'")
        if not 0 < self.iter_time <= ITERATION_TIME_MS_MAX:
            raise BlockError(f"iter-time is 1 to {ITERATION_TIME_MS_MAX} milliseconds, not {self.iter_time}")
        ivgen = self.ivgen_alg
        if ivgen == "essiv":
            ivgen = f"essiv:{self.ivgen_hash_alg or 'sha256'}"
        mode = f"{self.cipher_mode}-{ivgen}"
        key_bytes = 2 * size if self.cipher_mode == "xts" else size
        check_key("aes", mode, key_bytes)
        header = Header("aes", mode, self.hash_alg, 0, key_bytes)
        place = MATERIAL_ALIGN
        for slot in header.slots:
            slot.offset = place // SECTOR_BYTES
            place += -(-header.material_bytes // MATERIAL_ALIGN) * MATERIAL_ALIGN
        header.payload = place // SECTOR_BYTES
        return header


async def co_create(
    node: Node, options: LuksOptions, *, base: int = 0, detached: bool = False
) -> tuple[Header, bytes]:
    """Write a new header and its only slot at byte ``base`` of a node; the header and the disk's key. With ``detached``
    the disk is not behind it, but in a file of its own, from the first byte on."""
    host, header = node.context.host, options.header()
    size = header.payload * SECTOR_BYTES
    if detached:
        header.payload = 0
    raw = bytearray(host.random_bytes(16))
    raw[6], raw[8] = raw[6] & 0x0F | 0x40, raw[8] & 0x3F | 0x80  # RFC 9562: version 4
    text = raw.hex()
    header.uuid = f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
    key = host.random_bytes(header.key_bytes)
    header.digest_salt = host.random_bytes(SALT_BYTES)

    def derive() -> bytes:
        digest_time = max(options.iter_time // 8, 1)
        header.digest_iterations = measured(header, DIGEST_BYTES, digest_time, node)
        header.digest = keys.digest_of(header, key)
        iterations = measured(header, header.key_bytes, options.iter_time, node)
        return keys.close_slot(header, header.slots[0], key, options.password, iterations, host.random_bytes)

    material = await node.context.thread_pool.call(derive)
    first = bytearray(size)
    start = header.slots[0].offset * SECTOR_BYTES
    first[start : start + len(material)] = material
    first[: len(header.to_bytes())] = header.to_bytes()
    await node.co_pwrite(base, memoryview(first))
    return header, key


def measured(header: Header, size: int, time_ms: int, node: Node) -> int:
    """Iterations for a time; never so many that all eight slots together would be refused when they are read."""
    blocks = -(-size // HASHES[header.hash])
    most = WORK_MAX // (2 * SLOTS * blocks)
    return min(keys.measure(header.hash, size, time_ms, node.context.host.monotonic_ns), most)
