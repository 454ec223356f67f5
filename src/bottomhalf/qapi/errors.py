# SPDX-License-Identifier: Apache-2.0
"""Errors of options and commands: the user's fault, told in QEMU's words, with our advice kept apart.

Scripts compare QEMU's error texts, and people need more than QEMU tells them. Both get theirs: ``str()`` is
QEMU's sentence and nothing else, ``hint`` what to try, to be printed on a line of its own.

    try:
        options = parse_options(BlockdevOptions, text, implied_key="driver", loads=loads)
    except OptionError as error:
        print(f"{program}: --blockdev {text}: {error}")
        if error.hint:
            print(error.hint)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

__all__ = [
    "OptionError", "HelpRequested", "did_you_mean", "nearest",
    "QmpError", "ERROR_CLASSES",
    "GENERIC_ERROR", "COMMAND_NOT_FOUND", "DEVICE_NOT_ACTIVE", "DEVICE_NOT_FOUND", "KVM_MISSING_CAP",
]  # fmt: skip

# The classes that a client may look at (qapi/error.json). New errors are always GenericError; the others are
# there because clients once came to depend on them.
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


class OptionError(ValueError):
    """An option or an argument that the user gave is wrong.

    ``str()`` is one sentence. ``key`` is the full name of the culprit (``server.path``), empty if none can be
    named. ``hint`` is what to try, a sentence or None.
    """

    def __init__(self, message: str, *, key: str = "", hint: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint

    def to_qmp(self) -> QmpError:
        """The same error as a command's answer."""
        return QmpError(GENERIC_ERROR, str(self))


class HelpRequested(Exception):
    """The user asked for help instead of giving options. ``str()`` is the text to print; exit status is 0."""

    def __init__(self, type: Any, implied_key: str | None = None, tag: str | None = None) -> None:
        super().__init__(type, implied_key, tag)
        self.type = type
        self.implied_key = implied_key
        self.tag = tag  # of which branch, if the user said so (``file,help``)

    def __str__(self) -> str:
        from bottomhalf.qapi.help import render_help

        return render_help(self.type, implied_key=self.implied_key, tag=self.tag)


_COMPARED_LENGTH_MAX: Final = 64  # characters of a word that are compared; comparing is quadratic
_COMPARED_COUNT_MAX: Final = 200


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that a person who wrote ``word`` probably meant, or None if none is near."""
    from difflib import get_close_matches

    candidates = sorted(set(known))[:_COMPARED_COUNT_MAX]
    near = get_close_matches(word[:_COMPARED_LENGTH_MAX], candidates, 1)
    if not near and len(word) > 2:
        near = [name for name in candidates if name.startswith(word)]
    return near[0] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A question that names the nearest of ``known``, or None if none is near."""
    near = nearest(word, known)
    return None if near is None else f"Did you mean '{near}'?"
