# SPDX-License-Identifier: Apache-2.0
"""Passwords of a LUKS header that are added or taken away while it is in use, as QEMU's options say it.

``old-secret`` takes away every slot that it opens, ``keyslot`` the one of that number. Neither takes away the last one,
without which nobody gets at the data, unless that is forced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bottomhalf.block.errors import BlockError
from bottomhalf.drivers.luks import keys
from bottomhalf.drivers.luks.create import co_amend_keys, co_erase
from bottomhalf.drivers.luks.header import SLOTS
from bottomhalf.drivers.luks.node import co_load

if TYPE_CHECKING:
    from bottomhalf.block import Node
    from bottomhalf.qapi.block_create import QCryptoBlockAmendOptionsLUKS


async def co_amend(
    node: Node,
    options: QCryptoBlockAmendOptionsLUKS,
    new: bytes | None,
    old: bytes | None,
    opening: bytes | None,
    *,
    opened_with: bytes | None,
    force: bool,
    base: int = 0,
    detached: bool = False,
) -> None:
    """Change the header at byte ``base`` of a node. ``new``, ``old`` and ``opening`` are the passwords that the options
    name, ``opened_with`` the one with which the volume was opened. In the node's context. BlockError, OSError."""
    slot = options.keyslot
    if options.state == "active":
        if new is None:
            raise BlockError("'new-secret' is required to activate a keyslot")
        if old is not None:
            raise BlockError("'old-secret' must not be given when activating keyslots")
        _check_slot(slot)
        await co_amend_keys(
            node,
            opening or opened_with or b"",
            new_password=new,
            slot=slot,
            iter_time=options.iter_time or keys.ITERATION_TIME_MS,
            base=base,
            detached=detached,
            force=force,
        )
        return
    if new is not None:
        raise BlockError("'new-secret' must not be given when erasing keyslots")
    if options.iter_time is not None:
        raise BlockError("'iter-time' must not be given when erasing keyslots")
    header, materials = await co_load(node, base=base, detached=detached)
    if old is not None:
        if slot is not None:
            _check_slot(slot)
        matching = [
            n
            for n in (range(SLOTS) if slot is None else [slot])
            if materials[n] is not None
            and await node.context.thread_pool.call(keys.open_slot, header, header.slots[n], materials[n], old)
        ]
        if not matching:
            raise BlockError(
                "No keyslots match given (old) password for erase operation"
                if slot is None
                else f"Given keyslot {slot} doesn't contain the given old password for erase operation"
            )
        if len(matching) == sum(each.active for each in header.slots) and not force:
            raise BlockError(
                "All the active keyslots match the (old) password that was given and erasing them will erase all the "
                "data in the image irreversibly - refusing operation"
            )
    elif slot is not None:
        _check_slot(slot)
        matching = [slot]
    else:
        raise BlockError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be "
            "given"
        )
    for each in matching:
        await co_erase(node, each, base=base, detached=detached, force=force)


def _check_slot(slot: int | None) -> None:
    if slot is not None and not 0 <= slot < SLOTS:
        told = slot & 0xFFFFFFFF  # QEMU's number has no sign
        raise BlockError(f"Invalid keyslot {told} specified, must be between 0 and {SLOTS - 1}")
