# SPDX-License-Identifier: Apache-2.0
"""The error that a QMP command answers: a class that programs look at, and a sentence for people.

Five classes exist (qapi/error.json). New errors are always GenericError; the others are there because clients
once came to depend on them.
"""

from __future__ import annotations

from typing import Final

GENERIC_ERROR: Final = "GenericError"
COMMAND_NOT_FOUND: Final = "CommandNotFound"
DEVICE_NOT_ACTIVE: Final = "DeviceNotActive"
DEVICE_NOT_FOUND: Final = "DeviceNotFound"
KVM_MISSING_CAP: Final = "KVMMissingCap"

ERROR_CLASSES: Final = (
    GENERIC_ERROR,
    COMMAND_NOT_FOUND,
    DEVICE_NOT_ACTIVE,
    DEVICE_NOT_FOUND,
    KVM_MISSING_CAP,
)


class QmpError(Exception):
    """A command's failure: ``class_name`` is one of ERROR_CLASSES, ``desc`` a sentence without full stop."""

    def __init__(self, class_name: str, desc: str) -> None:
        assert class_name in ERROR_CLASSES, class_name
        super().__init__(desc)
        self.class_name = class_name
        self.desc = desc

    def __repr__(self) -> str:
        return f"QmpError({self.class_name!r}, {self.desc!r})"
