# SPDX-License-Identifier: Apache-2.0
"""The password that an option names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bottomhalf.block.errors import BlockError
from bottomhalf.qom.values import QomError

if TYPE_CHECKING:
    from bottomhalf.block import Graph


def find_secret(graph: Graph, name: str | None) -> bytes | None:
    """The bytes of a secret object; None without a name. BlockError, which never quotes them."""
    if name is None:
        return None
    if graph.find_secret is None:
        raise BlockError(f"No secret with id '{name}'")
    try:
        return graph.find_secret(name)
    except QomError as error:
        raise BlockError(str(error)) from None
