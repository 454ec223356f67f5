# SPDX-License-Identifier: Apache-2.0
"""bh-nbd --list: what another NBD server offers, with TLS if there are credentials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf.tls.errors import TlsError
from bottomhalf.tools.getopt import fail
from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd.client_handshake import ClientHandshake, ClientState, Goal
from bottomhalf.wire.nbd.constants import (
    FLAG_HAS_FLAGS,
    OPT_LIST,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    REP_ERR_POLICY,
    REP_ERR_TLS_REQD,
)
from bottomhalf.wire.nbd.errors import NegotiationRefused

if TYPE_CHECKING:
    from bottomhalf.aio import AioContext
    from bottomhalf.host.protocol import Address, Socket
    from bottomhalf.tls.handshaking import Handshaking
    from bottomhalf.tls.policy import Security
    from bottomhalf.tls.stream import TlsStream
    from bottomhalf.wire.nbd.client_options import ClientExport

RECEIVE_BYTES: Final = 65536
OPTION_WORDS: Final = {OPT_LIST: "list", OPT_STARTTLS: "starttls", OPT_STRUCTURED_REPLY: "structured reply"}
FLAG_NAMES: Final = (  # from bit 1 on
    "readonly", "flush", "fua", "rotational", "trim", "zeroes", "df", "multi", "resize", "cache", "fast-zero",
    "block-status-payload",
)  # fmt: skip


def list_exports(program: str, address: Address, security: Security | None = None) -> int:
    """Print the exports of the server at an address; the exit status."""
    try:
        exports = _ask(address, security)
    except TlsError as error:
        fail(program, str(error))
    except NegotiationRefused as error:
        fail(program, _why_refused(error))
    except OSError as error:
        from bottomhalf.chardev.addresses import why_not_connected

        fail(program, why_not_connected(address, error))
    except ProtocolError as error:
        fail(program, f"{address}: {error}")
    print(f"exports available: {len(exports)}")
    for export in exports:
        _show(export)
    return 0


def _why_refused(error: NegotiationRefused) -> str:
    """QEMU's sentences where it has some."""
    option = f"{error.option} ({OPTION_WORDS[error.option]})" if error.option in OPTION_WORDS else str(error.option)
    if error.reply == REP_ERR_TLS_REQD:
        text = f"TLS negotiation required before option {option}\nDid you forget a valid tls-creds?"
    elif error.reply == REP_ERR_POLICY:
        text = f"Denied by server for option {option}"
    else:
        return str(error)
    return f"{text}\nserver reported: {error.text}" if error.text else text


class _Asking:
    """One connection to a server, from its greeting to our goodbye."""

    def __init__(self, context: AioContext, socket: Socket, security: Security | None) -> None:
        self._context = context
        self._socket = socket
        self._security = security
        self._handshake = ClientHandshake(goal=Goal.LIST, tls=security is not None)
        self._buffer = bytearray(RECEIVE_BYTES)
        self._unsent = b""
        self._securing: Handshaking | None = None
        self._secure: TlsStream | None = None
        self.failure: Exception | None = None
        context.set_fd_handler(socket.fileno(), self._readable)

    @property
    def over(self) -> bool:
        return self.failure is not None or (self._handshake.state is ClientState.CLOSED and not self._unsent)

    @property
    def exports(self) -> list[ClientExport]:
        return self._handshake.exports

    def _readable(self) -> None:
        try:
            count = self._socket.recv_into(self._buffer)
            if count:
                self._handshake.receive(memoryview(self._buffer)[:count])
            else:
                self._handshake.eof()
        except BlockingIOError:
            pass
        except (OSError, ProtocolError, NegotiationRefused) as error:
            self.failure = error
        self._flush()

    def _flush(self) -> None:
        """Say what there is to say, wait for what is to come."""
        self._unsent += self._handshake.take_output()
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self.failure = self.failure or error
        if self.over:
            return
        if self._handshake.state is ClientState.STARTTLS and not self._unsent:
            self._start_tls()
            return
        self._context.set_fd_handler(self._socket.fileno(), self._readable, self._flush if self._unsent else None)
        if self._secure is not None and self._secure.buffered:
            self._context.schedule_oneshot(self._readable)

    def _start_tls(self) -> None:
        from bottomhalf.tls.handshaking import Handshaking

        assert self._security is not None
        self._context.set_fd_handler(self._socket.fileno())
        try:
            stream = self._security.wrap(self._socket)
        except OSError as error:
            self.failure = error
            return
        self._securing = Handshaking(self._context, stream, self._tls_ended)

    def _tls_ended(self, error: OSError | None) -> None:
        assert self._securing is not None
        if error is not None:
            self.failure = error
            return
        self._socket = self._secure = self._securing.stream
        self._securing = None
        self._handshake.tls_started()
        self._flush()

    def close(self) -> None:
        if self._securing is not None:
            self._securing.cancel()
        self._context.set_fd_handler(self._socket.fileno())
        self._socket.shutdown()
        self._socket.close()


def _ask(address: Address, security: Security | None) -> list[ClientExport]:
    from bottomhalf.aio import AioContext, wait_while

    context = AioContext()
    try:
        asking = _Asking(context, context.host.connect(address), security)
        try:
            wait_while(context, lambda: not asking.over, what=f"the exports of {address}")
        finally:
            asking.close()
    finally:
        context.close()
    if asking.failure is not None:
        raise asking.failure
    return list(asking.exports)


def _show(export: ClientExport) -> None:
    print(f" export: '{export.name}'")
    if export.description:
        print(f"  description: {export.description}")
    if export.flags & FLAG_HAS_FLAGS:
        names = [name for bit, name in enumerate(FLAG_NAMES, 1) if export.flags >> bit & 1]
        print(f"  size:  {export.size}")
        print(f"  flags: {export.flags:#x} ( {' '.join(names)} )")
    if export.minimum_block_size:
        print(f"  min block: {export.minimum_block_size}")
        print(f"  opt block: {export.preferred_block_size}")
        print(f"  max block: {export.maximum_block_size}")
    print("  transaction size: 32-bit")
    if export.contexts:
        print(f"  available meta contexts: {len(export.contexts)}")
        for context in export.contexts:
            print(f"   {context}")
