# SPDX-License-Identifier: Apache-2.0
"""The server's side of the negotiation: fixed newstyle, from the greeting to the transmission phase.

A client opens with flags and then haggles: option after option, each answered, until one of them
(EXPORT_NAME or GO) ends the haggling. Its bytes arrive in pieces of any size and may lie about every
length. Therefore this is a state machine over a buffer: nothing is acted upon before it is complete,
everything has a limit, an option too long to keep is drained and refused, and after every prefix of a
conversation the state is one of the table below.

    handshake = ServerHandshake(exports)
    sock.send(handshake.take_output())                 # the greeting
    while handshake.state is not State.NEGOTIATED:
        try:
            handshake.receive(sock.recv(65536))
        finally:
            sock.send(handshake.take_output())
        if handshake.state is State.ABORTED:
            return                                     # close
    negotiated = handshake.negotiated

With ``tls=True`` nothing but STARTTLS is answered in plain text. After it the state is STARTTLS: send the output, have
the two ends do a TLS handshake, call ``tls_started()`` and go on with what comes decrypted. Bytes that a client sends
behind STARTTLS without waiting for the answer are an error: whoever is between the two ends may have put them there,
and they would count as said inside (the attack on STARTTLS of CVE-2011-0411).

What each option means is in ``server_options``. Extended headers are not offered: they are refused with ERR_UNSUP,
which tells a client to go on without.
"""

from __future__ import annotations

from enum import Enum

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd.constants import (
    CLIENT_FLAGS,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    GREETING,
    IHAVEOPT,
    MAX_EXPORT_NAME,
    MAX_OPTION_DATA,
    MAX_OPTION_LENGTH,
    MAX_OPTIONS,
    MAX_PENDING_OUTPUT,
    NBDMAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPTION_HEADER,
    OPTION_NAMES,
    REP_ERR_INVALID,
    REP_ERR_POLICY,
    REP_ERR_TLS_REQD,
    REP_ERR_TOO_BIG,
)
from bottomhalf.wire.nbd.export import ExportInfo, Exports, Negotiated
from bottomhalf.wire.nbd.server_options import OptionHandlers


class State(Enum):
    """Where a handshake stands. From the upper four more input is wanted; the lower three are ends.

    CLIENT_FLAGS -> OPTION_HEADER -> OPTION_DATA -> OPTION_HEADER ... -> NEGOTIATED | ABORTED;
    OPTION_HEADER -> DRAINING -> OPTION_HEADER; OPTION_DATA -> STARTTLS -> OPTION_HEADER; any of them -> FAILED.
    """

    CLIENT_FLAGS = "client flags"
    OPTION_HEADER = "option header"
    OPTION_DATA = "option data"
    DRAINING = "draining an option that is too long"
    STARTTLS = "TLS handshake"
    NEGOTIATED = "negotiated"
    ABORTED = "aborted by the client"
    FAILED = "failed"


_ENDS = (State.NEGOTIATED, State.ABORTED, State.FAILED)


class ServerHandshake:
    """One connection's negotiation (section "Fixed newstyle negotiation"). Used in one thread at a time.

    ``state`` says what is awaited or how it ended; ``negotiated`` is set in state NEGOTIATED; ``error`` in
    state FAILED. Bytes to send are collected until ``take_output``, also in the end states: send them
    before closing.
    """

    def __init__(self, exports: Exports, *, tls: bool = False) -> None:
        self.state = State.CLIENT_FLAGS
        self._tls = tls
        self._secure = False  # the TLS handshake is done
        self.negotiated: Negotiated | None = None
        self.error: ProtocolError | None = None
        self._options = OptionHandlers(exports)
        self._input = bytearray()
        self._consumed = 0  # bytes of the conversation taken out of _input; where errors are reported
        self._options_seen = 0
        self._option = 0
        self._length = 0
        self._drain = 0
        self._fixed = False
        self._options.output += GREETING.pack(NBDMAGIC, IHAVEOPT, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)

    def take_output(self) -> bytes:
        """The bytes to send now; they are forgotten here."""
        output = bytes(self._options.output)
        self._options.output.clear()
        return output

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent, any amount of it.

        After NEGOTIATED further bytes belong to the transmission phase: giving them here is a ValueError,
        and so it is after ABORTED. Raises ProtocolError when the client broke the protocol (state FAILED),
        and again at every later call.
        """
        if self.error is not None:
            raise self.error
        if self.state in _ENDS:
            raise ValueError(f"the NBD handshake is over: {self.state.value}")
        if self.state is State.STARTTLS:
            raise ValueError("bytes of a TLS handshake are not for the NBD handshake")
        self._input += data
        try:
            while self.state not in _ENDS and self._step():
                pass
            self._refuse_plain_bytes()
        except ProtocolError as error:
            self.state = State.FAILED
            self.error = error
            self._input.clear()
            raise

    def _refuse_plain_bytes(self) -> None:
        if self.state is State.STARTTLS and self._input:
            raise ProtocolError(
                "plain bytes between NBD_OPT_STARTTLS and the TLS handshake",
                got=f"{len(self._input)} bytes",
                offset=self._consumed,
                cause="a client that does not wait for the answer, or an attack",
            )

    def tls_started(self) -> None:
        """The TLS handshake is done, and what comes now is private. Nothing was settled before it."""
        assert self.state is State.STARTTLS
        self._secure = True
        self.state = State.OPTION_HEADER

    def _step(self) -> bool:
        """Act on one complete item of the input; False if it is not complete yet."""
        if self.state is State.STARTTLS:
            return False
        if self.state is State.CLIENT_FLAGS:
            return self._step_client_flags()
        if self.state is State.OPTION_HEADER:
            return self._step_option_header()
        if self.state is State.OPTION_DATA:
            return self._step_option_data()
        return self._step_drain()

    def _take(self, count: int) -> bytes:
        taken = bytes(self._input[:count])
        del self._input[:count]
        self._consumed += count
        return taken

    def _step_client_flags(self) -> bool:
        if len(self._input) < CLIENT_FLAGS.size:
            return False
        (flags,) = CLIENT_FLAGS.unpack(self._take(CLIENT_FLAGS.size))
        if flags & ~(FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES):
            # "the server MUST drop the TCP connection if the client sets an unknown flag"
            raise ProtocolError(
                "unknown client flags in the NBD handshake",
                expected=f"none but {FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES:#x}",
                got=f"{flags:#x}",
                offset=0,
                cause="probably not an NBD client",
            )
        self._fixed = bool(flags & FLAG_C_FIXED_NEWSTYLE)
        self._options.no_zeroes = bool(flags & FLAG_C_NO_ZEROES)
        self.state = State.OPTION_HEADER
        return True

    def _step_option_header(self) -> bool:
        if len(self._input) < OPTION_HEADER.size:
            return False
        if len(self._options.output) > MAX_PENDING_OUTPUT:
            raise ProtocolError(
                "the client sends options without reading the replies",
                expected="no option before the final reply to the one before",
                offset=self._consumed,
            )
        begin = self._consumed
        magic, option, length = OPTION_HEADER.unpack(self._take(OPTION_HEADER.size))
        name = OPTION_NAMES.get(option, f"option {option}")
        if magic != IHAVEOPT:
            raise ProtocolError(
                "bad magic of an NBD option",
                expected=f"{IHAVEOPT:#018x}",
                got=f"{magic:#018x}",
                offset=begin,
                cause="probably not an NBD client",
            )
        self._options_seen += 1
        if self._options_seen > MAX_OPTIONS:
            raise ProtocolError(f"more than {MAX_OPTIONS} options in one handshake", offset=begin)
        if not self._fixed and option != OPT_EXPORT_NAME:
            raise ProtocolError(
                f"{name} from a client without fixed newstyle", expected="NBD_OPT_EXPORT_NAME", offset=begin
            )
        # EXPORT_NAME has no error reply: whatever is wrong with it closes the connection.
        limit = MAX_EXPORT_NAME if option == OPT_EXPORT_NAME else MAX_OPTION_LENGTH
        if length > limit:
            raise ProtocolError(
                f"{name} is too long",
                expected=f"at most {limit} bytes",
                got=f"{length} bytes",
                offset=begin,
            )
        self._option = option
        self._length = length
        if length > MAX_OPTION_DATA:
            if option == OPT_SET_META_CONTEXT:
                self._options.forget_contexts()
            self._drain = length
            self.state = State.DRAINING
        else:
            self.state = State.OPTION_DATA
        return True

    def _step_drain(self) -> bool:
        gone = min(self._drain, len(self._input))
        del self._input[:gone]
        self._consumed += gone
        self._drain -= gone
        if self._drain:
            return False
        text = f"{self._length} bytes of option data are too many"
        self._options.refuse(self._option, REP_ERR_TOO_BIG, text)
        self.state = State.OPTION_HEADER
        return True

    def _step_option_data(self) -> bool:
        if len(self._input) < self._length:
            return False
        begin = self._consumed
        data = self._take(self._length)
        chosen: ExportInfo | None = None
        if self._option == OPT_STARTTLS:
            self._start_tls()
            return True
        if self._option == OPT_ABORT:
            self._options.acknowledge(OPT_ABORT)
            self._input.clear()
            self.state = State.ABORTED
            return False
        if self._tls and not self._secure:
            return self._not_before_tls(begin)
        if self._option == OPT_EXPORT_NAME:
            chosen = self._options.export_name(data, begin)
        elif self._option == OPT_GO:
            chosen = self._options.info_or_go(OPT_GO, data)
        else:
            self._options.handle(self._option, data)
        if chosen is None:
            self.state = State.OPTION_HEADER
            return True
        self.negotiated = self._options.conclude(chosen, bytes(self._input))
        self._input.clear()
        self.state = State.NEGOTIATED
        return False

    def _start_tls(self) -> None:
        """NBD_OPT_STARTTLS, which has no data."""
        self.state = State.OPTION_HEADER
        if self._length:
            self._options.refuse(OPT_STARTTLS, REP_ERR_INVALID, "option 'starttls' has unexpected length")
        elif not self._tls:
            self._options.refuse(OPT_STARTTLS, REP_ERR_POLICY, "TLS not configured")
        elif self._secure:
            self._options.refuse(OPT_STARTTLS, REP_ERR_INVALID, "TLS already enabled")
        else:
            self._options.acknowledge(OPT_STARTTLS)
            self.state = State.STARTTLS

    def _not_before_tls(self, begin: int) -> bool:
        if self._option == OPT_EXPORT_NAME:
            raise ProtocolError(
                "the client chooses an export before it has asked for TLS",
                expected="NBD_OPT_STARTTLS",
                offset=begin,
                cause="a client that was not told to use TLS",
            )
        self._options.refuse(self._option, REP_ERR_TLS_REQD, f"Option {self._option:#x} not permitted before TLS")
        self.state = State.OPTION_HEADER
        return True
