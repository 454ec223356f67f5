# SPDX-License-Identifier: Apache-2.0
"""Image locks between the openers of a simulated file, with QEMU's rules and first words.

An opener holds permissions and shares permissions. Two conflict when one holds what the other does not share.
The openers are the open files of this host and the processes that a test invents.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from bottomhalf.host.protocol import PERM_ALL, ImageInUse

PERMISSION_NAMES: Final = ("consistent read", "write", "write unchanged", "resize")


@dataclass(eq=False)
class Opener:
    """Who holds and shares what of one file."""

    name: str
    pid: int
    is_own: bool
    held: int = 0
    shared: int = PERM_ALL


class LockTable:
    """The openers of one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.openers: list[Opener] = []

    def set(self, opener: Opener, held: int, shared: int) -> None:
        """Change what the opener holds and shares; ``ImageInUse`` with nothing changed on a conflict."""
        others = [other for other in self.openers if other is not opener]
        for n, name in enumerate(PERMISSION_NAMES):
            taken = [other for other in others if held & ~other.shared & 1 << n]
            if taken:
                raise self._refusal(f'Failed to get "{name}" lock', taken)
        for n, name in enumerate(PERMISSION_NAMES):
            taken = [other for other in others if other.held & ~shared & 1 << n]
            if taken:
                raise self._refusal(f'Failed to get shared "{name}" lock', taken)
        opener.held, opener.shared = held, shared
        if opener not in self.openers:
            self.openers.append(opener)

    def take(self, opener: Opener, other: Opener) -> None:
        """Let an opener hold and share what another one of the same program does; nobody is asked."""
        opener.held, opener.shared = other.held, other.shared
        if other in self.openers:
            self.openers.append(opener)

    def remove(self, opener: Opener) -> None:
        self.openers = [other for other in self.openers if other is not opener]

    def drop_own(self) -> None:
        """The program died; its locks went with its descriptors."""
        self.openers = [opener for opener in self.openers if not opener.is_own]

    def _refusal(self, message: str, taken: list[Opener]) -> ImageInUse:
        holders = ", ".join(sorted({f"{other.name} (pid {other.pid})" for other in taken}))
        return ImageInUse(errno.EAGAIN, f"{message}: the image is in use by {holders}", self.path)


class OtherProcessLock:
    """A lock that another process holds until ``release()``."""

    def __init__(self, table: LockTable, held: int, shared: int, name: str, pid: int) -> None:
        self._table = table
        self._opener = Opener(name, pid, is_own=False)
        table.set(self._opener, held, shared)

    def release(self) -> None:
        self._table.remove(self._opener)
