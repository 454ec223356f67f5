# SPDX-License-Identifier: Apache-2.0
"""The options of encryption as the library's ``create()`` takes them: ``encrypt_secret`` and its like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bottomhalf.drivers.luks.create import LuksOptions, co_create
from bottomhalf.drivers.luks.header import SECTOR_BYTES

if TYPE_CHECKING:
    from bottomhalf.block import Node

_PREFIX = "encrypt_"


def take_options(options: dict[str, Any], *, prefix: str = _PREFIX) -> LuksOptions:
    """Take what is about encryption out of ``options``. ``secret`` is the password, str or bytes. ValueError."""
    given = {name.removeprefix(prefix): options.pop(name) for name in list(options) if name.startswith(prefix)}
    password = given.pop("secret", None)
    if isinstance(password, str):
        password = password.encode()
    if not isinstance(password, bytes):
        raise ValueError(f"an encrypted image needs {prefix}secret, its password")
    known = sorted(set(LuksOptions.__dataclass_fields__) - {"password"})
    for name in given:
        if name not in known:
            raise ValueError(f"encryption has no option {prefix + name!r}, but {', '.join(known)}")
    return LuksOptions(password, **given)


async def co_make(file: Node, options: LuksOptions, size: int) -> None:
    """A LUKS volume of ``size`` bytes in an empty file. What was never written reads as noise."""
    header, _ = await co_create(file, options)
    await file.co_truncate(header.payload * SECTOR_BYTES + size)
    await file.co_flush()
