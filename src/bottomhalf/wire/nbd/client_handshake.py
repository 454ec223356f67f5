# SPDX-License-Identifier: Apache-2.0
"""The client's side of the negotiation: choose an export, or list what a server has.

Servers differ in age: oldstyle ones state their only export and that is all, newstyle ones know
EXPORT_NAME, fixed newstyle ones answer options, and of these each may or may not know GO, structured
replies or contexts. Therefore the client works off a plan of options, takes "unsupported" as an answer to
each of them, and falls back: without GO to EXPORT_NAME, without structured replies to simple ones. Only a
server that refuses the export itself, or wants TLS, ends it: ``NegotiationRefused``. Everything else that a
server sends wrongly is a ``ProtocolError``.

    handshake = ClientHandshake("disk0")
    while handshake.negotiated is None:
        handshake.receive(sock.recv(65536))
        sock.send(handshake.take_output())
    client = Client(handshake.negotiated)

With ``tls=True`` the first option is STARTTLS. When the server has agreed, the state is STARTTLS: have the two ends do
a TLS handshake and call ``tls_started()``. A server that does not agree ends it.

With ``Goal.LIST`` the end is ``handshake.state is ClientState.CLOSED``, and ``handshake.exports`` tells
what there is. What replies contain is read in ``client_options``; the order of things is here.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from bottomhalf.wire.nbd.client_options import (
    ClientExport,
    ClientNegotiated,
    context_option,
    info_option,
    read_context,
    read_info,
    read_listed,
    unexpected,
)
from bottomhalf.wire.nbd.constants import (
    CLIENT_FLAGS,
    CLISERV_MAGIC,
    CONTEXT_BASE_ALLOCATION,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    IHAVEOPT,
    MAX_EXPORT_NAME,
    MAX_REPLIES,
    MAX_REPLY_DATA,
    NBDMAGIC,
    OLDSTYLE_EXPORT,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION_HEADER,
    OPTION_NAMES,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_UNSUP,
    REP_FLAG_ERROR,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    REPLY_NAMES,
    U16,
    U64,
)
from bottomhalf.wire.nbd.errors import NegotiationRefused, ProtocolError


class Goal(Enum):
    """What the connection is for."""

    TRANSMISSION = "use an export"
    LIST = "list the exports, with what INFO tells of each"


class ClientState(Enum):
    """Where a client's handshake stands; the last three are ends.

    MAGIC -> STYLE -> OLDSTYLE -> NEGOTIATED, or STYLE -> FLAGS -> (REPLY_HEADER -> REPLY_DATA)* ->
    NEGOTIATED | EXPORT_REPLY -> NEGOTIATED | CLOSED; REPLY_HEADER -> STARTTLS -> REPLY_HEADER; any of them -> FAILED.
    """

    MAGIC = "first magic"
    STYLE = "second magic"
    OLDSTYLE = "oldstyle export"
    FLAGS = "handshake flags"
    REPLY_HEADER = "option reply"
    REPLY_DATA = "data of an option reply"
    STARTTLS = "TLS handshake"
    EXPORT_REPLY = "reply to NBD_OPT_EXPORT_NAME"
    NEGOTIATED = "negotiated"
    CLOSED = "closed properly"
    FAILED = "failed"


_ENDS = (ClientState.NEGOTIATED, ClientState.CLOSED, ClientState.FAILED)
_STOPS = (*_ENDS, ClientState.STARTTLS)
_FIXED_SIZES = {
    ClientState.MAGIC: U64.size,
    ClientState.STYLE: U64.size,
    ClientState.OLDSTYLE: OLDSTYLE_EXPORT.size,
    ClientState.FLAGS: U16.size,
    ClientState.REPLY_HEADER: OPTION_REPLY.size,
}


class ClientHandshake:
    """One connection's negotiation (section "Handshake"). Used in one thread at a time.

    ``contexts``: exact names to select; those that the server has are in the result.
    ``structured_replies``: False is for testing a server's simple replies.
    """

    def __init__(
        self,
        export: str = "",
        *,
        goal: Goal = Goal.TRANSMISSION,
        structured_replies: bool = True,
        contexts: tuple[str, ...] = (CONTEXT_BASE_ALLOCATION,),
        tls: bool = False,
    ) -> None:
        if len(export.encode()) > MAX_EXPORT_NAME:
            raise ValueError(f"export name is longer than {MAX_EXPORT_NAME} bytes")
        self.state = ClientState.MAGIC
        self.negotiated: ClientNegotiated | None = None
        self.exports: list[ClientExport] = []
        self.error: ProtocolError | NegotiationRefused | None = None
        self._goal = goal
        self._wanted_contexts = contexts
        self._export = ClientExport(export)  # the one that the option under way is about
        self._structured = False
        self._contexts: dict[str, int] = {}
        self._no_zeroes = False
        self._plan: deque[tuple[int, ClientExport]] = deque()
        self._tls = tls
        if tls:
            self._plan.append((OPT_STARTTLS, self._export))
        if structured_replies:
            self._plan.append((OPT_STRUCTURED_REPLY, self._export))
        if goal is Goal.LIST:
            self._plan.append((OPT_LIST, self._export))
        else:
            if structured_replies and contexts:
                self._plan.append((OPT_SET_META_CONTEXT, self._export))
            self._plan.append((OPT_GO, self._export))
        self._option = 0
        self._reply = 0
        self._replies = 0
        self._need = U64.size
        self._input = bytearray()
        self._output = bytearray()
        self._consumed = 0

    def take_output(self) -> bytes:
        """The bytes to send now, also after an error (a proper goodbye); they are forgotten here."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the server sent, any amount of it. Raises ProtocolError or NegotiationRefused (state
        FAILED; again at every later call); ValueError when the handshake is over."""
        if self.error is not None:
            raise self.error
        if self.state in _ENDS:
            raise ValueError(f"the NBD handshake is over: {self.state.value}")
        if self.state is ClientState.STARTTLS:
            raise ValueError("bytes of a TLS handshake are not for the NBD handshake")
        self._input += data
        try:
            while self.state not in _STOPS and len(self._input) >= self._need:
                item = bytes(self._input[: self._need])
                del self._input[: self._need]
                self._step(item)
                self._consumed += len(item)
            self._refuse_plain_bytes()
        except (ProtocolError, NegotiationRefused) as error:
            self._fail(error)
            raise

    def tls_started(self) -> None:
        """The TLS handshake is done; there is output now."""
        assert self.state is ClientState.STARTTLS
        self._next_option()

    def eof(self) -> None:
        """The server closed the connection. ProtocolError if that is not how this may end."""
        if self.state in _ENDS:
            return
        cause = ""
        if self.state is ClientState.EXPORT_REPLY:
            cause = "this server has no better way to say that there is no such export"
        error = ProtocolError(
            "the NBD server closed the connection during the handshake",
            expected=self.state.value,
            offset=self._consumed + len(self._input),
            cause=cause,
        )
        self._fail(error)
        raise error

    def _refuse_plain_bytes(self) -> None:
        """What came before the TLS handshake, and would count as said inside."""
        if self.state is ClientState.STARTTLS and self._input:
            raise unexpected(f"{len(self._input)} plain bytes before the TLS handshake", self._consumed)

    def _fail(self, error: ProtocolError | NegotiationRefused) -> None:
        self.state = ClientState.FAILED
        self.error = error
        self._input.clear()

    def _await(self, state: ClientState, need: int = 0) -> None:
        self.state = state
        self._need = need or _FIXED_SIZES[state]

    def _step(self, item: bytes) -> None:
        state = self.state
        if state is ClientState.REPLY_HEADER:
            self._step_reply_header(item)
        elif state is ClientState.REPLY_DATA:
            self._step_reply(item)
        elif state is ClientState.MAGIC:
            self._magic(item, (NBDMAGIC,), "first magic of an NBD server")
            self._await(ClientState.STYLE)
        elif state is ClientState.STYLE:
            magic = self._magic(item, (IHAVEOPT, CLISERV_MAGIC), "second magic of an NBD server")
            self._await(ClientState.FLAGS if magic == IHAVEOPT else ClientState.OLDSTYLE)
        elif state is ClientState.FLAGS:
            self._step_flags(item)
        elif state is ClientState.OLDSTYLE:
            self._step_oldstyle(item)
        else:
            size, flags = EXPORT_NAME_REPLY.unpack_from(item)
            self._export.set_size(size, flags, self._consumed)
            self._finish(self._export)

    def _magic(self, item: bytes, expected: tuple[int, ...], what: str) -> int:
        (magic,) = U64.unpack(item)
        if magic not in expected:
            raise ProtocolError(
                f"bad {what}",
                expected=" or ".join(f"{number:#018x}" for number in expected),
                got=f"{magic:#018x}",
                offset=self._consumed,
                cause="probably not an NBD server",
            )
        return int(magic)

    def _step_oldstyle(self, item: bytes) -> None:
        if self._tls:
            raise NegotiationRefused("an oldstyle NBD server cannot speak TLS", option=0, reply=0, text="")
        if self._goal is Goal.LIST or self._export.name:
            raise NegotiationRefused(
                "an oldstyle NBD server has one export without a name", option=0, reply=0, text=""
            )
        size, flags = OLDSTYLE_EXPORT.unpack(item)
        self._export.set_size(size, flags & 0xFFFF, self._consumed)
        self._finish(self._export)

    def _step_flags(self, item: bytes) -> None:
        (flags,) = U16.unpack(item)
        fixed = bool(flags & FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        answer = (FLAG_C_FIXED_NEWSTYLE if fixed else 0) | (FLAG_C_NO_ZEROES if self._no_zeroes else 0)
        self._output += CLIENT_FLAGS.pack(answer)
        if fixed:
            self._next_option()
        elif self._tls:
            raise NegotiationRefused("this old NBD server cannot speak TLS", option=0, reply=0, text="")
        elif self._goal is Goal.LIST:
            raise NegotiationRefused("this old NBD server cannot list", option=0, reply=0, text="")
        else:
            self._send_export_name()

    # --- Options ------------------------------------------------------------------------------------------

    def _send_option(self, option: int, data: bytes = b"") -> None:
        self._output += OPTION_HEADER.pack(IHAVEOPT, option, len(data)) + data
        self._option = option
        self._replies = 0

    def _send_export_name(self) -> None:
        self._send_option(OPT_EXPORT_NAME, self._export.name.encode())
        zeroes = 0 if self._no_zeroes else len(EXPORT_NAME_ZEROES)
        self._await(ClientState.EXPORT_REPLY, EXPORT_NAME_REPLY.size + zeroes)

    def _next_option(self) -> None:
        """Send the next option of the plan that makes sense by now; without one, say goodbye."""
        while self._plan:
            option, self._export = self._plan.popleft()
            if option in (OPT_SET_META_CONTEXT, OPT_LIST_META_CONTEXT) and not self._structured:
                continue
            data = b""
            if option in (OPT_GO, OPT_INFO):
                data = info_option(self._export.name)
            elif option == OPT_SET_META_CONTEXT:
                data = context_option(self._export.name, self._wanted_contexts)
            elif option == OPT_LIST_META_CONTEXT:
                data = context_option(self._export.name, ())
            self._send_option(option, data)
            self._await(ClientState.REPLY_HEADER)
            return
        self._send_option(OPT_ABORT)  # its reply is not waited for: some servers just close
        self.state = ClientState.CLOSED

    def _step_reply_header(self, item: bytes) -> None:
        magic, option, self._reply, length = OPTION_REPLY.unpack(item)
        name = OPTION_NAMES[self._option]
        if magic != OPTION_REPLY_MAGIC or option != self._option or length > MAX_REPLY_DATA:
            raise ProtocolError(
                f"bad reply to {name}",
                expected=f"magic {OPTION_REPLY_MAGIC:#x}, option {self._option}, {MAX_REPLY_DATA} bytes",
                got=f"magic {magic:#x}, option {option}, {length} bytes",
                offset=self._consumed,
                cause="probably a server bug",
            )
        self._replies += 1
        if self._replies > MAX_REPLIES:
            raise ProtocolError(f"more than {MAX_REPLIES} replies to {name}", offset=self._consumed)
        if length:
            self._await(ClientState.REPLY_DATA, length)
        else:
            self._step_reply(b"")

    def _step_reply(self, data: bytes) -> None:
        """One whole reply. Most leave the option under way."""
        self.state = ClientState.REPLY_HEADER
        self._need = OPTION_REPLY.size
        reply, option, export = self._reply, self._option, self._export
        if reply & REP_FLAG_ERROR:
            self._step_error(reply, data.decode(errors="replace"))
        elif reply == REP_ACK and not data:
            self._step_acknowledged()
        elif reply == REP_INFO and option in (OPT_GO, OPT_INFO):
            read_info(export, data, self._consumed)
        elif reply == REP_SERVER and option == OPT_LIST:
            self.exports.append(read_listed(data, self._consumed))
        elif reply == REP_META_CONTEXT and option == OPT_LIST_META_CONTEXT:
            export.contexts.append(read_context(data, self._consumed)[1])
        elif reply == REP_META_CONTEXT and option == OPT_SET_META_CONTEXT:
            number, name = read_context(data, self._consumed)
            known = name in self._contexts or number in self._contexts.values()
            if known or name not in self._wanted_contexts:
                raise unexpected(f"context {name!r} with id {number}", self._consumed)
            self._contexts[name] = number
        else:
            what = REPLY_NAMES.get(reply, f"reply {reply}")
            raise unexpected(f"{what} of {len(data)} bytes to {OPTION_NAMES[option]}", self._consumed)

    def _step_acknowledged(self) -> None:
        if self._option == OPT_STARTTLS:
            self.state = ClientState.STARTTLS
            return
        if self._option == OPT_STRUCTURED_REPLY:
            self._structured = True
        elif self._option == OPT_LIST:
            # One after the other as qemu-nbd does: INFO of each, then the contexts of each.
            self._plan.extend((OPT_INFO, export) for export in self.exports)
            self._plan.extend((OPT_LIST_META_CONTEXT, export) for export in self.exports)
        elif self._option in (OPT_GO, OPT_INFO) and self._export.size < 0:
            raise unexpected("NBD_REP_ACK without the NBD_INFO_EXPORT that must precede it", self._consumed)
        if self._option == OPT_GO:
            self._finish(self._export)
        else:
            self._next_option()

    def _step_error(self, reply: int, text: str) -> None:
        option = self._option
        fatal = reply in (REP_ERR_TLS_REQD, REP_ERR_SHUTDOWN) or option in (OPT_LIST, OPT_STARTTLS)
        if option == OPT_GO and reply != REP_ERR_UNSUP:
            fatal = True
        if fatal:
            self._send_option(OPT_ABORT)
            name = REPLY_NAMES.get(reply, f"error {reply:#x}")
            raise NegotiationRefused(
                f"the server answers {OPTION_NAMES[option]} of export {self._export.name!r} with {name}",
                option=option,
                reply=reply,
                text=text,
            )
        if option == OPT_GO:
            self._send_export_name()
            return
        if option == OPT_INFO and reply == REP_ERR_UNSUP:
            self._plan = deque(step for step in self._plan if step[0] != OPT_INFO)
        if option == OPT_SET_META_CONTEXT:
            self._contexts.clear()
        self._next_option()

    def _finish(self, export: ClientExport) -> None:
        self.negotiated = ClientNegotiated(
            export=export,
            structured_replies=self._structured,
            contexts=dict(self._contexts),
            leftover=bytes(self._input),
        )
        self._input.clear()
        self.state = ClientState.NEGOTIATED
