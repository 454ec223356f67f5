# SPDX-License-Identifier: Apache-2.0
"""The options of encryption as the library's ``create()`` takes them: ``encrypt_secret`` and its like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.resize import Preallocation, co_resize
from bottomhalf.drivers.keywords import options_of
from bottomhalf.drivers.luks.create import LuksOptions, co_create
from bottomhalf.drivers.luks.header import SECTOR_BYTES
from bottomhalf.qapi.block_create import QCryptoBlockCreateOptionsLUKS
from bottomhalf.qom.values import QomError

if TYPE_CHECKING:
    from bottomhalf.block import Graph, Node

SECRET: Final = "secret"
_PREFIX: Final = "encrypt_"


def take_options(options: dict[str, Any], *, prefix: str = _PREFIX) -> LuksOptions:
    """Take what is about encryption out of ``options``. ``secret`` is the password, str or bytes. ValueError, and
    BlockError for values that there are not."""
    password = take_password(options, prefix=prefix)
    given = {name.removeprefix(prefix): options.pop(name) for name in list(options) if name.startswith(prefix)}
    chosen = options_of(
        QCryptoBlockCreateOptionsLUKS, given, {}, subject="encryption has", without=("key_secret",), prefix=prefix
    )
    return LuksOptions.of(chosen, password)


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


async def co_make(
    file: Node | None, options: LuksOptions, size: int, *, header_node: Node | None = None, preallocation: str = "off"
) -> None:
    """A LUKS volume of ``size`` bytes in a file. What was never written reads as noise. With ``header_node`` the header
    comes there, and there may be no file yet. In the context of the nodes. OSError, BlockError."""
    holder = header_node or file
    assert holder is not None
    begin = 0 if header_node is not None else options.header().payload * SECTOR_BYTES
    if file is not None:  # before the header, which a node that does not grow by itself would have no room for
        mode = Preallocation.FALLOC if preallocation == "metadata" else Preallocation(preallocation)
        if mode != Preallocation.OFF:
            await file.co_truncate(0)
        await co_resize(file, begin + size, mode)
    if header_node is not None:
        await header_node.co_truncate(options.header().payload * SECTOR_BYTES)
    await co_create(holder, options, detached=header_node is not None)
    if file is not None and file is not holder:
        await file.co_flush()
    await holder.co_flush()
