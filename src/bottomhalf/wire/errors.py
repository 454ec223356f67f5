# SPDX-License-Identifier: Apache-2.0
"""Errors that every wire protocol shares.

Whatever a peer sends is outside our control, and when it breaks the protocol there is nothing to repair: the
stream has lost its framing or the peer its right to be believed. Therefore one exception type says so, and it
carries what a person needs to find the culprit: what was expected, what came, and where in the stream.
"""

from __future__ import annotations


class ProtocolError(Exception):
    """The peer's bytes break the protocol; the connection must be closed.

    ``message`` is one sentence. ``expected`` and ``got`` are short texts (empty if they say nothing more than
    the message), ``offset`` counts the bytes of this protocol phase that came before the offending ones
    (-1: not known), ``cause`` is the likely culprit ("probably a server bug").
    """

    def __init__(
        self, message: str, *, expected: str = "", got: str = "", offset: int = -1, cause: str = ""
    ) -> None:
        self.message = message
        self.expected = expected
        self.got = got
        self.offset = offset
        self.cause = cause
        parts = [message]
        if expected:
            parts.append(f"expected {expected}")
        if got:
            parts.append(f"got {got}")
        if offset >= 0:
            parts.append(f"at byte {offset} of the stream")
        text = ", ".join(parts)
        super().__init__(f"{text} ({cause})" if cause else text)
