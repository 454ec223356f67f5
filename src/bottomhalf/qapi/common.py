# SPDX-License-Identifier: Apache-2.0
"""Types that several parts of the schema use (qapi/common.json)."""

from __future__ import annotations

from enum import StrEnum


class OnOffAuto(StrEnum):
    """Yes, no, or whatever is right here."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"
