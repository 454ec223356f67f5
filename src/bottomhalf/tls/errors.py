# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between two ends of a TLS session, as one kind of OSError: whoever serves a socket handles it as
any other loss of the connection."""

from __future__ import annotations

import errno


class TlsError(OSError):
    """The session cannot begin, or cannot go on. The text is for the log and for the user."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EPROTO, text)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Truncated(TlsError):
    """The peer's bytes ended without its goodbye: somebody may have cut the rest off."""


class NotAdmitted(TlsError):
    """The peer is who it says, and may not come in."""
