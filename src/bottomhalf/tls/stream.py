# SPDX-License-Identifier: Apache-2.0
"""A TLS session over a socket, with the face of a socket (host.protocol.Socket): what serves one serves the other.

Facts: encrypting is not undone. If the socket takes half of a record, the other half has to follow before anything
else, and the plain bytes in it are gone from the caller's point of view. Loops are level-triggered: they wait for the
socket, and do not know of bytes that lie decrypted in here. Decisions:

* ``send`` says that it has taken bytes when all of their records are out. Bytes whose records are partly out are
  *held*: the caller keeps them, waits until the socket takes more as it always does, comes with them again, and they
  are skipped. So nobody but the caller needs to know that something waits, and his bounds count it.
* ``recv_into`` reads what is decrypted first, and ``buffered`` tells that it has stopped because the buffer was full.
  Whoever has such a stream calls again in that case, without waiting for the socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from bottomhalf.host.protocol import File, Socket
from bottomhalf.tls.errors import TlsError
from bottomhalf.tls.session import Session

RECEIVE_BYTES: Final = 128 << 10  # of the wire at a time: eight full records
ENCRYPT_BYTES_MAX: Final = 256 << 10  # at a time: what may be held
FILE_BYTES_MAX: Final = 64 << 10
LAST_WORDS_MAX: Final = 16  # receives from a peer that takes nothing any more


class TlsStream:
    """See the module. In one thread at a time."""

    def __init__(self, socket: Socket, session: Session) -> None:
        self.socket = socket
        self.session = session
        self.buffered = False  # recv_into() has something although the socket may not
        self._wire = bytearray(RECEIVE_BYTES)
        self._unsent = memoryview(b"")  # of the wire
        self._held = 0  # bytes of the caller's that lie encrypted in ``_unsent``, or have left since he was refused
        self._failure: OSError | None = None

    def fileno(self) -> int:
        return self.socket.fileno()

    def peer_name(self) -> str:
        return self.socket.peer_name()

    def unread(self) -> int | None:
        """What the peer's kernel holds are not the bytes that were sent."""
        return None

    # -- the handshake ------------------------------------------------------------------------------------------

    @property
    def unsent(self) -> bool:
        """Whether something of the wire waits until the socket takes it."""
        return bool(self._unsent)

    def handshake(self) -> bool:
        """Go on with the handshake as far as the socket allows; whether it is done, with our part of it sent. TlsError,
        OSError. In between, wait for the socket to be readable, and writable if ``unsent``."""
        try:
            while not self.session.handshake():
                if not self.push():
                    return False
                try:
                    count = self.socket.recv_into(self._wire)
                except BlockingIOError:
                    return False
                if count:
                    self.session.receive(memoryview(self._wire)[:count])
                else:
                    self.session.receive_eof()
            done = self.push()
            self.buffered = self.buffered or done
            return done
        except OSError:
            try:
                self.push()  # the alert
            except OSError:
                pass
            raise

    def push(self) -> bool:
        """Send what the session has to say; whether the socket has taken all."""
        try:
            while True:
                if not self._unsent:
                    self._unsent = memoryview(self.session.take_output())
                    if not self._unsent:
                        return True
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            return False

    def _why_lost(self, error: ConnectionError) -> OSError:
        """The socket takes nothing any more. A TLS peer that leaves says why, if it can be read still."""
        unheard = memoryview(bytearray(RECEIVE_BYTES))
        try:
            for _ in range(LAST_WORDS_MAX):
                count = self.socket.recv_into(self._wire)
                if not count:
                    break
                self.session.receive(memoryview(self._wire)[:count])
                while self.session.read_into(unheard):
                    pass  # nobody will be answered
        except TlsError as reason:
            return reason
        except OSError:
            pass
        return error

    # -- receiving ----------------------------------------------------------------------------------------------

    def recv_into(self, buffer: Any, /) -> int:
        """Bytes received, 0 when the peer has said goodbye. Truncated if it has just gone, TlsError, OSError."""
        view = memoryview(buffer)
        count = self._decrypt(view)
        if count is None:
            received = self.socket.recv_into(self._wire)
            if received:
                self.session.receive(memoryview(self._wire)[:received])
            else:
                self.session.receive_eof()
            count = self._decrypt(view)
            try:
                self.push()  # an answer to new keys
            except OSError:
                pass  # whoever sends will hear of it; what was received counts
            if count is None:
                raise BlockingIOError
        return count

    def _decrypt(self, view: memoryview) -> int | None:
        """What can be had without the socket; None if that is nothing."""
        self.buffered = False
        if self._failure is not None:
            raise self._failure
        read_into = self.session.read_into
        total, size = 0, len(view)
        while total < size:
            try:
                count = read_into(view[total:])
            except OSError as error:
                self._failure = error
                if not total:
                    raise
                self.buffered = True  # the bytes before it count
                return total
            if count is None:
                return total or None
            if not count:
                self.buffered = bool(total)
                return total
            total += count
        self.buffered = True
        return total

    # -- sending ------------------------------------------------------------------------------------------------

    def send(self, data: Any, /) -> int:
        """How many bytes are out. BlockingIOError if none; come with the same ones again."""
        try:
            return self._send(memoryview(data))
        except ConnectionError as error:
            raise self._why_lost(error) from None

    def _send(self, view: memoryview) -> int:
        length = len(view)
        sent = 0
        if self._unsent and not self.push():
            raise BlockingIOError
        if self._held:
            sent = min(self._held, length)
            self._held -= sent
        while sent < length:
            chunk = view[sent : sent + ENCRYPT_BYTES_MAX]
            self.session.write(chunk)
            if not self.push():
                self._held = len(chunk)
                break
            sent += len(chunk)
        if not sent and length:
            raise BlockingIOError
        return sent

    send_more = send

    def sendmsg(self, buffers: Sequence[Any], /) -> int:
        """Pieces in order. They are put together: a record for each would cost more than the copy."""
        total, at = 0, 0
        while at < len(buffers):
            parts, size = [], 0
            while at < len(buffers) and size < ENCRYPT_BYTES_MAX:
                parts.append(buffers[at])
                size += len(buffers[at])
                at += 1
            try:
                sent = self.send(parts[0] if len(parts) == 1 else b"".join(parts))
            except BlockingIOError:
                if not total:
                    raise
                break
            total += sent
            if sent < size:
                break
        return total

    def send_file(self, file: File, offset: int, count: int) -> int:
        """The file's bytes have to come through this program; it waits for the disk if they are not in memory."""
        data = file.pread(min(count, FILE_BYTES_MAX), offset)
        return self.send(data) if data else 0

    # -- the end ------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Say goodbye, as far as the socket takes it now, and end both directions."""
        self.session.say_goodbye()
        try:
            self.push()
        except OSError:
            pass
        self.socket.shutdown()

    def close(self) -> None:
        self.socket.close()
