# SPDX-License-Identifier: Apache-2.0
"""What each option of the negotiation means, and the replies to it (section "Option types").

Options are independent but for three things that they leave behind: structured replies, the metadata
contexts that were selected, and for which export. Therefore they are methods of one small object which
holds exactly these. A malformed option costs the client an error reply, never the connection; the exception
is EXPORT_NAME, which has no error reply.

Rules: no framing here (that is ``server_handshake``); every handler ends with exactly one final reply.
"""

from __future__ import annotations

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd.constants import (
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    FLAG_SEND_DF,
    INFO_BLOCK_SIZE,
    INFO_BLOCK_SIZE_LAYOUT,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_EXPORT_LAYOUT,
    INFO_NAME,
    MAX_EXPORT_NAME,
    MAX_INFO_REQUESTS,
    MAX_QUERIES,
    MAX_STRING,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    OPTION_NAMES,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_ERR_BLOCK_SIZE_REQD,
    REP_ERR_INVALID,
    REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    U16,
    U32,
)
from bottomhalf.wire.nbd.export import ExportInfo, Exports, Negotiated


class _Refusal(Exception):
    """An option's error reply, raised by the helpers that read its data."""

    def __init__(self, reply: int, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


class _Fields:
    """Reads the data of an option from front to back; whatever does not fit is a _Refusal."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.raw(size, what), "big")

    def raw(self, size: int, what: str) -> bytes:
        after = self._position + size
        if after > len(self._data):
            left = len(self._data) - self._position
            text = f"option data ends early: {what} needs {size} bytes, {left} are left"
            raise _Refusal(REP_ERR_INVALID, text)
        taken = self._data[self._position : after]
        self._position = after
        return taken

    def name(self) -> str:
        """32 bits, length; export name."""
        length = self.number(4, "length of export name")
        if length > MAX_EXPORT_NAME:
            raise _Refusal(REP_ERR_INVALID, f"export name of {length} bytes is too long")
        try:
            return self.raw(length, "export name").decode()
        except UnicodeDecodeError:
            raise _Refusal(REP_ERR_INVALID, "export name is not UTF-8")

    def end(self) -> None:
        left = len(self._data) - self._position
        if left:
            raise _Refusal(REP_ERR_INVALID, f"{left} unexpected bytes at the end of the option data")


class OptionHandlers:
    """The options of one connection. ``output`` collects the bytes to send."""

    def __init__(self, exports: Exports) -> None:
        self.output = bytearray()
        self.no_zeroes = False
        self._exports = exports
        self._structured = False
        self._contexts: dict[int, str] = {}
        self._contexts_of: str | None = None
        self._alignment = 1

    # --- Replies ------------------------------------------------------------------------------------------

    def acknowledge(self, option: int) -> None:
        """The final reply of success."""
        self._reply(option, REP_ACK, b"")

    def refuse(self, option: int, reply: int, text: str) -> None:
        """The final reply of an error, with words for the user, cut at MAX_STRING bytes."""
        message = text.encode("utf-8", "replace")[:MAX_STRING].decode("utf-8", "ignore").encode()
        self._reply(option, reply, message)

    def _reply(self, option: int, reply: int, data: bytes) -> None:
        self.output += OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data))
        self.output += data

    # --- Options that may end the haggling ----------------------------------------------------------------

    def export_name(self, data: bytes, offset: int) -> ExportInfo:
        """NBD_OPT_EXPORT_NAME. ``offset``: where in the conversation its data begins. An export that is not
        there closes the connection (ProtocolError): "the server MUST terminate the session"."""
        try:
            name = data.decode()
        except UnicodeDecodeError:
            raise ProtocolError("export name is not UTF-8", got=repr(data[:80]), offset=offset)
        export = self._exports.find_export(name)
        if export is None:
            raise ProtocolError(
                "the client asks for an export that is not present",
                got=_quote(name),
                offset=offset,
                cause="NBD_OPT_EXPORT_NAME has no error reply, only closing the connection",
            )
        self.output += EXPORT_NAME_REPLY.pack(export.size, self._flags(export))
        if not self.no_zeroes:
            self.output += EXPORT_NAME_ZEROES
        return export

    def info_or_go(self, option: int, data: bytes) -> ExportInfo | None:
        """NBD_OPT_INFO and NBD_OPT_GO: 32 bits, length of name; name; 16 bits, number of information
        requests; 16 bits x n, information requests. Returns the export if it was acknowledged.

        The block sizes are always told, as QEMU does: to a client that did not ask, in GO, with minimum 1,
        since the block layer copes with whatever it sends."""
        try:
            fields = _Fields(data)
            name = fields.name()
            count = fields.number(2, "number of information requests")
            if count > MAX_INFO_REQUESTS:
                raise _Refusal(REP_ERR_TOO_BIG, f"{count} information requests are too many")
            wanted = {fields.number(2, "information request") for _ in range(count)}
            fields.end()
            export = self._find(name)
        except _Refusal as refusal:
            self.refuse(option, refusal.reply, refusal.text)
            return None
        if INFO_NAME in wanted:
            self._reply(option, REP_INFO, U16.pack(INFO_NAME) + export.name.encode())
        if export.description:
            self._reply(option, REP_INFO, U16.pack(INFO_DESCRIPTION) + export.description.encode())
        asked = INFO_BLOCK_SIZE in wanted
        minimum = export.minimum_block_size if asked or option == OPT_INFO else 1
        preferred = max(export.preferred_block_size, minimum)
        maximum = export.maximum_block_size
        self._reply(
            option, REP_INFO, INFO_BLOCK_SIZE_LAYOUT.pack(INFO_BLOCK_SIZE, minimum, preferred, maximum)
        )
        self._reply(option, REP_INFO, INFO_EXPORT_LAYOUT.pack(INFO_EXPORT, export.size, self._flags(export)))
        if option == OPT_INFO and minimum > 1 and not asked:
            self.refuse(option, REP_ERR_BLOCK_SIZE_REQD, "request NBD_INFO_BLOCK_SIZE to use this export")
            return None
        if option == OPT_GO:
            self._alignment = minimum
        self.acknowledge(option)
        return export

    def conclude(self, export: ExportInfo, leftover: bytes) -> Negotiated:
        """What was settled, now that ``export`` is chosen. Contexts that were selected for another export
        do not count: "the server MUST NOT" assume that they are the same."""
        contexts = self._contexts if self._contexts_of == export.name else {}
        return Negotiated(
            export=export,
            flags=self._flags(export),
            structured_replies=self._structured,
            contexts=dict(contexts),
            alignment=self._alignment,
            leftover=leftover,
        )

    # --- Options that leave the haggling going ------------------------------------------------------------

    def handle(self, option: int, data: bytes) -> None:
        """Any other option. What we do not know or do not offer (EXTENDED_HEADERS) is ERR_UNSUP."""
        try:
            if option == OPT_LIST:
                self._list(data)
            elif option == OPT_INFO:
                self.info_or_go(OPT_INFO, data)
            elif option == OPT_STRUCTURED_REPLY:
                self._structured_reply(data)
            elif option == OPT_LIST_META_CONTEXT:
                self._meta_context(option, data)
            elif option == OPT_SET_META_CONTEXT:
                self.forget_contexts()  # "replaces all previously-set metadata contexts", also if it fails
                self._meta_context(option, data)
            else:
                name = OPTION_NAMES.get(option, f"option {option}")
                self.refuse(option, REP_ERR_UNSUP, f"{name} is not supported")
        except _Refusal as refusal:
            self.refuse(option, refusal.reply, refusal.text)

    def forget_contexts(self) -> None:
        """No metadata context is selected any more."""
        self._contexts = {}
        self._contexts_of = None

    def _list(self, data: bytes) -> None:
        """NBD_OPT_LIST: one REP_SERVER per export: 32 bits, length of name; name; details for people."""
        _Fields(data).end()
        for export in self._exports.list_exports():
            name = export.name.encode()
            self._reply(OPT_LIST, REP_SERVER, U32.pack(len(name)) + name + export.description.encode())
        self.acknowledge(OPT_LIST)

    def _structured_reply(self, data: bytes) -> None:
        _Fields(data).end()
        if self._structured:
            raise _Refusal(REP_ERR_INVALID, "structured replies are negotiated already")
        self._structured = True
        self.acknowledge(OPT_STRUCTURED_REPLY)

    def _meta_context(self, option: int, data: bytes) -> None:
        """NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT: 32 bits, length of export name; name; 32
        bits, number of queries; per query: 32 bits, length; query.

        LIST without a query means all contexts, and a query that ends in ":" all that begin so. SET selects
        the exact names, in the export's order; what does not exist is passed over."""
        if not self._structured:
            raise _Refusal(REP_ERR_INVALID, f"{OPTION_NAMES[option]} needs structured replies first")
        fields = _Fields(data)
        export = self._find(fields.name())
        count = fields.number(4, "number of queries")
        if count > MAX_QUERIES:
            raise _Refusal(REP_ERR_TOO_BIG, f"{count} queries are too many")
        queries = []
        for _ in range(count):
            length = fields.number(4, "length of query")
            query = fields.raw(length, "query")
            if length <= MAX_STRING:  # a longer one is no string, and cannot name anything
                queries.append(query)
        fields.end()
        listing = option == OPT_LIST_META_CONTEXT
        chosen = tuple(
            context
            for context in export.contexts
            if (listing and count == 0) or _matches(context.encode(), queries, listing)
        )
        for context in chosen:
            number = 0 if listing else export.context_id(context)  # in a list "SHOULD be set to zero"
            self._reply(option, REP_META_CONTEXT, U32.pack(number) + context.encode())
        if not listing:
            self._contexts = {export.context_id(context): context for context in chosen}
            self._contexts_of = export.name
        self.acknowledge(option)

    def _find(self, name: str) -> ExportInfo:
        export = self._exports.find_export(name)
        if export is None:
            raise _Refusal(REP_ERR_UNKNOWN, f"export {_quote(name)} is not present")
        return export

    def _flags(self, export: ExportInfo) -> int:
        return export.flags | FLAG_SEND_DF if self._structured else export.flags


def _matches(context: bytes, queries: list[bytes], listing: bool) -> bool:
    """Whether one of the queries asks for the context; a prefix up to a colon counts in a list only."""
    return any(
        context == query or (listing and query.endswith(b":") and context.startswith(query)) for query in queries
    )


def _quote(name: str) -> str:
    """A peer's string for a message: escaped, and no longer than is useful."""
    return repr(name if len(name) <= 80 else name[:80] + "...")
