# SPDX-License-Identifier: Apache-2.0
"""Types that several parts of the schema use (qapi/common.json)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from bottomhalf.qapi.types import Doc, Struct


class OnOffAuto(StrEnum):
    """Yes, no, or whatever is right here."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class BlockDirtyBitmap(Struct):
    """A dirty bitmap of a node."""

    node: Annotated[str, Doc("the node")]
    name: Annotated[str, Doc("the bitmap's name")]
