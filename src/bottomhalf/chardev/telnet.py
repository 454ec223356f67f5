# SPDX-License-Identifier: Apache-2.0
"""The telnet protocol (RFC 854), as much of it as a server of plain bytes needs.

We announce that we echo, that nobody needs to be asked to go ahead, and that bytes are eight bits wide both ways; then
every telnet program sends keys as they are typed. What the client answers is taken out of the stream and otherwise
ignored: programs that do not agree work as well, line by line.
"""

from __future__ import annotations

from typing import Final

IAC: Final = 255
_SE, _SB, _WILL, _DONT = 240, 250, 251, 254
GREETING: Final = bytes((IAC, 251, 1, IAC, 251, 3, IAC, 251, 0, IAC, 253, 0))  # WILL ECHO, SGA, BINARY; DO BINARY
_PLAIN, _COMMAND, _OPTION, _SUB, _SUB_COMMAND = range(5)


def escape(data: bytes) -> bytes:
    """Bytes as they travel."""
    return data.replace(b"\xff", b"\xff\xff")


class TelnetDecoder:
    """Takes commands out of a stream, wherever it is cut."""

    def __init__(self) -> None:
        self._state = _PLAIN

    def feed(self, data: bytes) -> bytes:
        """The bytes that are meant."""
        if self._state == _PLAIN and IAC not in data:
            return data
        plain = bytearray()
        state = self._state
        for byte in data:
            if state == _PLAIN:
                if byte == IAC:
                    state = _COMMAND
                else:
                    plain.append(byte)
            elif state == _COMMAND:
                state = _PLAIN
                if byte == IAC:
                    plain.append(IAC)
                elif byte == _SB:
                    state = _SUB
                elif _WILL <= byte <= _DONT:
                    state = _OPTION
            elif state == _OPTION:
                state = _PLAIN
            elif state == _SUB:
                state = _SUB_COMMAND if byte == IAC else _SUB
            else:
                state = _PLAIN if byte == _SE else _SUB
        self._state = state
        return bytes(plain)
