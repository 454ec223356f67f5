# SPDX-License-Identifier: Apache-2.0
"""The options of encryption as the library's ``create()`` takes them: ``encrypt_secret`` and its like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from bottomhalf.drivers.luks.create import LuksOptions, co_create
from bottomhalf.drivers.luks.header import SECTOR_BYTES
from bottomhalf.qom.values import QomError

if TYPE_CHECKING:
    from bottomhalf.block import Graph, Node

SECRET: Final = "secret"
_PREFIX: Final = "encrypt_"


def take_options(options: dict[str, Any], *, prefix: str = _PREFIX) -> LuksOptions:
    """Take what is about encryption out of ``options``. ``secret`` is the password, str or bytes. ValueError."""
    password = take_password(options, prefix=prefix)
    given = {name.removeprefix(prefix): options.pop(name) for name in list(options) if name.startswith(prefix)}
    known = sorted(set(LuksOptions.__dataclass_fields__) - {"password"})
    for name in given:
        if name not in known:
            raise ValueError(f"encryption has no option {prefix + name!r}, but {', '.join(known)}")
    return LuksOptions(password, **given)


def take_password(options: dict[str, Any], *, prefix: str = _PREFIX) -> bytes:
    """Take the password out of ``options``. ValueError if there is none."""
    password = options.pop(f"{prefix}secret", None)
    if isinstance(password, str):
        password = password.encode()
    if not isinstance(password, bytes):
        raise ValueError(f"an encrypted image needs {prefix}secret, its password")
    return password


def know_password(graph: Graph, password: str | bytes) -> None:
    """Let a graph that has no secret objects know one password, by the name ``SECRET``."""
    known = password.encode() if isinstance(password, str) else password

    def find(name: str) -> bytes:
        if name != SECRET:
            raise QomError(f"No secret with id '{name}'")
        return known

    graph.find_secret = find


async def co_make(file: Node, options: LuksOptions, size: int) -> None:
    """A LUKS volume of ``size`` bytes in an empty file. What was never written reads as noise."""
    header, _ = await co_create(file, options)
    await file.co_truncate(header.payload * SECTOR_BYTES + size)
    await file.co_flush()
