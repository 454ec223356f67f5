# SPDX-License-Identifier: Apache-2.0
"""Passwords come and go: key slots of a LUKS header are filled and erased (qemu-img amend).

    change = SlotChange("active", new_password=b"battery staple")
    await co_amend(node, b"correct horse", change, base=offset_of_the_header)

Order of what is written: a new slot's material first, then, after a flush, the header that calls it active; a slot
that goes becomes inactive first, then its material is overwritten. A crash in between leaves a header that can be
opened with a password that was valid before or after. Options, what excludes what, and the words are QEMU's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.errors import BlockError, ImageError
from bottomhalf.drivers.luks import keys
from bottomhalf.drivers.luks.create import ITERATION_TIME_MS_MAX, measured
from bottomhalf.drivers.luks.header import SALT_BYTES, SECTOR_BYTES, SLOTS, Header
from bottomhalf.drivers.luks.node import co_load

if TYPE_CHECKING:
    from bottomhalf.block import Node

CREATE_ONLY: Final = frozenset(
    ("cipher_alg", "cipher_mode", "hash_alg", "ivgen_alg", "ivgen_hash_alg")  # not of a header that is there
)
STATES: Final = ("active", "inactive")
_IRREVERSIBLE: Final = "which will erase all the data in the image irreversibly - refusing operation"


@dataclass(frozen=True)
class SlotChange:
    """What is to become of a slot. ``old_password`` names those that go; ``iter_time`` in milliseconds."""

    state: str
    new_password: bytes | None = field(default=None, repr=False)
    old_password: bytes | None = field(default=None, repr=False)
    keyslot: int | None = None
    iter_time: int | None = None

    def check(self) -> None:
        """BlockError for what cannot be, whatever the header says."""
        if self.state not in STATES:
            raise BlockError(f"Parameter 'state' does not accept value '{self.state}'")
        if self.state == "active":
            if self.new_password is None:
                raise BlockError("'new-secret' is required to activate a keyslot")
            if self.old_password is not None:
                raise BlockError("'old-secret' must not be given when activating keyslots")
        elif self.new_password is not None:
            raise BlockError("'new-secret' must not be given when erasing keyslots")
        elif self.iter_time is not None:
            raise BlockError("'iter-time' must not be given when erasing keyslots")
        if self.keyslot is not None and not 0 <= self.keyslot < SLOTS:
            told = self.keyslot & 0xFFFFFFFF  # QEMU's number has no sign
            raise BlockError(f"Invalid keyslot {told} specified, must be between 0 and {SLOTS - 1}")
        if self.iter_time and not 0 < self.iter_time <= ITERATION_TIME_MS_MAX:
            raise BlockError(f"iter-time is 1 to {ITERATION_TIME_MS_MAX} milliseconds, not {self.iter_time}")
        if self.state == "inactive" and self.keyslot is None and self.old_password is None:
            raise BlockError(
                "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must "
                "be given"
            )


def take_change(options: dict[str, Any], *, prefix: str = "") -> SlotChange | None:
    """Take what is about key slots out of the library's options; None if nothing is. ValueError, BlockError."""
    names = {"new_secret": "new_password", "old_secret": "old_password"}
    known = {each.name for each in fields(SlotChange)} - set(names.values()) | set(names)
    given = {name: options.pop(prefix + name) for name in known if prefix + name in options}
    if not given:
        return None
    if "state" not in given:
        raise BlockError("Parameter 'state' is missing")
    made: dict[str, Any] = {}
    for name, value in given.items():
        if name in names and value is not None:
            value = value.encode() if isinstance(value, str) else value
            if not isinstance(value, bytes):
                raise ValueError(f"{prefix}{name} is a password, str or bytes")
        made[names.get(name, name)] = value
    change = SlotChange(**made)
    change.check()
    return change


async def co_amend(
    node: Node,
    password: bytes,
    change: SlotChange,
    *,
    base: int = 0,
    limit: int | None = None,
    detached: bool = False,
    force: bool = False,
) -> list[int]:
    """Carry the change out in the header at byte ``base`` of a node; the slots that changed. ``password`` opens the
    header, to add one. The last slots, without which nobody gets at the data, go only with ``force``. In the node's
    context. BlockError, OSError."""
    change.check()
    header, materials = await co_load(node, base=base, limit=limit, detached=detached)
    if change.state == "active":
        _, key = await node.context.thread_pool.call(keys.unlock, header, materials, password)
        return [await _fill(node, header, key, change, base, limit, force)]
    slots = await _doomed(node, header, materials, change, force)
    for slot in slots:
        header.slots[slot] = replace(header.slots[slot], active=False, iterations=0, salt=bytes(SALT_BYTES))
    await node.co_pwrite(base, memoryview(header.to_bytes()))
    await node.co_flush()
    for slot in slots:
        noise = node.context.host.random_bytes(header.material_bytes)
        await node.co_pwrite(base + header.slots[slot].offset * SECTOR_BYTES, memoryview(noise))
    await node.co_flush()
    return slots


async def _fill(
    node: Node, header: Header, key: bytes, change: SlotChange, base: int, limit: int | None, force: bool
) -> int:
    host, password, slot = node.context.host, change.new_password, change.keyslot
    assert password is not None
    if slot is None:
        slot = next((n for n, each in enumerate(header.slots) if not each.active), None)
        if slot is None:
            raise BlockError("Can't add a keyslot - all keyslots are in use")
    elif header.slots[slot].active and not force:
        raise BlockError(f"Refusing to overwrite active keyslot {slot} - please erase it first")
    target = header.slots[slot]
    if limit is not None and target.offset * SECTOR_BYTES + header.material_bytes > limit:
        raise ImageError(f"the material of keyslot {slot} would lie behind the encryption header")

    def derive() -> bytes:
        iterations = measured(header, header.key_bytes, change.iter_time or keys.ITERATION_TIME_MS, node)
        return keys.close_slot(header, target, key, password, iterations, host.random_bytes)

    material = await node.context.thread_pool.call(derive)
    await node.co_pwrite(base + target.offset * SECTOR_BYTES, memoryview(material))
    await node.co_flush()
    await node.co_pwrite(base, memoryview(header.to_bytes()))
    await node.co_flush()
    return slot


async def _doomed(
    node: Node, header: Header, materials: list[bytes | None], change: SlotChange, force: bool
) -> list[int]:
    """The slots that are to be erased."""
    active = [n for n, slot in enumerate(header.slots) if slot.active]
    slot, password = change.keyslot, change.old_password
    if slot is not None and slot not in active:
        raise BlockError(f"Given keyslot {slot} is already erased (inactive) ")
    slots = active if slot is None else [slot]
    if password is not None:
        slots = await node.context.thread_pool.call(_opened_by, header, materials, slots, password)
        if not slots and slot is not None:
            raise BlockError(f"Given keyslot {slot} doesn't contain the given old password for erase operation")
        if not slots:
            raise BlockError("No keyslots match given (old) password for erase operation")
    if len(slots) == len(active) and not force:
        if slot is None:
            raise BlockError(
                "All the active keyslots match the (old) password that was given and erasing them will erase all the "
                "data in the image irreversibly - refusing operation"
            )
        raise BlockError(f"Attempt to erase the only active keyslot {slot} {_IRREVERSIBLE}")
    return slots


def _opened_by(header: Header, materials: list[bytes | None], slots: list[int], password: bytes) -> list[int]:
    return [n for n in slots if keys.open_slot(header, header.slots[n], materials[n] or b"", password) is not None]
