# SPDX-License-Identifier: Apache-2.0
"""Errors of the NBD cores.

Two things end a negotiation without a result, and callers treat them differently: bytes that break the
protocol (``ProtocolError``: drop the connection) and a peer that understood us and said no
(``NegotiationRefused``: the user asked for an export that is not there; try another name). Requests that
fail are not exceptions at all: a failed read is a completion with an error number in it.
"""

from __future__ import annotations

from bottomhalf.wire.errors import ProtocolError

__all__ = ["NegotiationRefused", "ProtocolError"]


class NegotiationRefused(Exception):
    """The server answered an option that we cannot do without with an error reply.

    ``reply`` is the reply type (``REP_ERR_...``), ``option`` the option, ``text`` the server's own words
    (may be empty). The bytes that end the session properly are in ``take_output()`` of the handshake.
    """

    def __init__(self, message: str, *, option: int, reply: int, text: str) -> None:
        self.option = option
        self.reply = reply
        self.text = text
        super().__init__(f"{message}: {text}" if text else message)
