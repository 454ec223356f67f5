# SPDX-License-Identifier: Apache-2.0
"""One end of a TLS session without a socket: bytes of the wire in, bytes of the wire out.

    session = Session(context, server=True)
    session.receive(data)               # what the socket brought
    if session.handshake():             # True once both ends agree
        count = session.read_into(buffer)
        session.write(b"answer")
    socket.send(session.take_output())

Facts: OpenSSL decrypts a record as a whole and may hold the rest of it when we have asked for less; a TCP connection
that ends says nothing about whether the peer meant it, only a close_notify does; a peer can keep a handshake going for
ever with small messages. Consequences: whoever waits for the socket must have read until there is nothing
(``read_into`` answers None), an end without close_notify is ``Truncated``, and a handshake has a limit of bytes.
Decision: OpenSSL through ``ssl.SSLObject`` and memory, for then the same code runs on simulated sockets and can be cut
at every byte. This is the one module, beside ``contexts``, that imports ``ssl``; nobody imports it before a session is
wanted.

A session belongs to one thread at a time.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

from bottomhalf.tls.errors import TlsError, Truncated

HANDSHAKE_BYTES_MAX: Final = 256 << 10  # from the peer; OpenSSL takes certificates of 100 KiB altogether
UNASKED_BYTES_MAX: Final = 64 << 10  # of answers to a peer that asks for new keys and never reads
MESSAGES: Final = {  # of X509_verify_cert(3), in the words of QEMU's users
    10: "The certificate has expired",
    9: "The certificate is not yet activated",
    2: "The certificate hasn't got a known issuer",
    18: "The certificate hasn't got a known issuer",
    19: "The certificate hasn't got a known issuer",
    20: "The certificate hasn't got a known issuer",
    21: "The certificate hasn't got a known issuer",
    23: "The certificate has been revoked",
    26: "The certificate is not for this purpose",
}
MISMATCH: Final = (62, 64)  # of a name, of an address


class Session:
    """See the module."""

    def __init__(self, context: ssl.SSLContext, *, server: bool, hostname: str | None = None) -> None:
        """``hostname`` is the one that the server's certificate must have. TlsError if it cannot be one."""
        self.established = False
        self.ended = False  # the peer has said goodbye
        self._hostname = hostname
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._handshake_bytes = 0
        self._failure: TlsError | None = None  # told again at every call: OpenSSL may think that it can go on
        try:
            self._object = context.wrap_bio(
                self._incoming, self._outgoing, server_side=server, server_hostname=hostname or None
            )
        except (ValueError, TypeError, ssl.SSLError) as error:
            raise TlsError(f"'{hostname}' is not the name of a host: {error}") from None

    # -- the wire -----------------------------------------------------------------------------------------------

    def receive(self, data: Any) -> None:
        """Take bytes of the wire. TlsError if a handshake is longer than any can be."""
        if not self.established:
            self._handshake_bytes += len(data)
            if self._handshake_bytes > HANDSHAKE_BYTES_MAX:
                raise self._fail(TlsError(f"TLS handshake failed: more than {HANDSHAKE_BYTES_MAX} bytes"))
        self._incoming.write(data)

    def receive_eof(self) -> None:
        """Nothing more comes over the wire."""
        self._incoming.write_eof()

    def take_output(self) -> bytes:
        """What is to be sent; it is forgotten here. Also after a failure: the peer is told of it."""
        return self._outgoing.read() if self._outgoing.pending else b""

    # -- the session --------------------------------------------------------------------------------------------

    def handshake(self) -> bool:
        """Go on with the handshake; whether it is done. TlsError."""
        if self._failure is not None:
            raise self._failure
        if self.established:
            return True
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLCertVerificationError as error:
            raise self._fail(TlsError(self._not_verified(error))) from None
        except ssl.SSLError as error:
            raise self._fail(TlsError(f"TLS handshake failed: {_reason(error)}")) from None
        self.established = True
        return True

    def _not_verified(self, error: ssl.SSLCertVerificationError) -> str:
        if error.verify_code in MISMATCH:
            return f"Certificate does not match the hostname {self._hostname}"
        return MESSAGES.get(error.verify_code, f"The certificate is not trusted: {error.verify_message}")

    def read_into(self, buffer: memoryview) -> int | None:
        """Decrypted bytes, as many as there are and fit; 0 when the peer has said goodbye, None when more of the wire
        is needed. TlsError, Truncated."""
        if self.ended:
            return 0
        if self._failure is not None:
            raise self._failure
        if not self._incoming.pending and not self._object.pending() and not self._incoming.eof:
            return None
        try:
            count = self._object.read(len(buffer), buffer)
        except ssl.SSLWantReadError:
            if self._outgoing.pending > UNASKED_BYTES_MAX:
                text = "the TLS peer asks for new keys again and again and does not read ours"
                raise self._fail(TlsError(text)) from None
            return None
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLEOFError) or error.reason == "UNEXPECTED_EOF_WHILE_READING":
                text = "the connection ended without the TLS peer's goodbye (close_notify)"
                raise self._fail(Truncated(text)) from None
            raise self._fail(TlsError(f"TLS session failed: {_reason(error)}")) from None
        if not count:
            self.ended = True
        return int(count)

    def write(self, data: Any) -> None:
        """Encrypt bytes. TlsError."""
        if self._failure is not None:
            raise self._failure
        try:
            self._object.write(data)
        except ssl.SSLError as error:
            raise self._fail(TlsError(f"TLS session failed: {_reason(error)}")) from None

    def _fail(self, failure: TlsError) -> TlsError:
        self._failure = failure
        return failure

    def say_goodbye(self) -> None:
        """Have a close_notify among the output, if the session is in a state to have one."""
        if self._failure is not None or not self.established:
            return
        try:
            self._object.unwrap()
        except (ssl.SSLError, ValueError, OSError):
            pass  # usually that the peer has not said it yet, which nobody waits for

    # -- the peer -----------------------------------------------------------------------------------------------

    @property
    def peer_certificate(self) -> bytes | None:
        """In DER; None if the peer has shown none."""
        return self._object.getpeercert(binary_form=True)

    @property
    def version(self) -> str:
        """"TLSv1.3" and the like, and which cipher."""
        cipher = self._object.cipher()
        return f"{self._object.version()} {cipher[0] if cipher else 'without a cipher'}"


def _reason(error: ssl.SSLError) -> str:
    """OpenSSL's words without its numbers."""
    if isinstance(error, ssl.SSLEOFError) or error.reason == "UNEXPECTED_EOF_WHILE_READING":
        return "the peer has closed the connection"
    return error.reason.lower().replace("_", " ") if error.reason else error.strerror or str(error)
