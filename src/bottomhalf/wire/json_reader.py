# SPDX-License-Identifier: Apache-2.0
"""JSON as QEMU reads it: a stream of values, cut anywhere, with QEMU's error texts.

QMP has no framing: values follow each other on a byte stream with or without white space between them, and
a client that lost its place sends a byte that no UTF-8 text contains (0xff) to bring the reader back to a
known state. Error texts reach users and scripts as they are. ``json`` of the standard library can do none of
this: it wants the whole text at once, knows nothing of single quotes, recurses, and words its errors its own
way.

Therefore this is a reader of its own. It takes bytes as they come, finds tokens with regular expressions, and
builds values with a stack instead of recursion, so that neither the cut of the bytes nor the nesting matters.

    stream = JsonStream()
    stream.feed(b'{"execute": "qu')      # []
    stream.feed(b'it"} [1')              # [{"execute": "quit"}]
    stream.feed(b'\\xff')                 # [JsonError("JSON parse error, stray ...")]

What is accepted beyond RFC 8259: strings in single quotes, ``\\'`` in strings. What is refused: repeated
keys, Unicode non-characters, lone surrogates. Integers are exact from -2**63 to 2**64-1 and become floats
beyond.

After a lexical error everything is skipped up to the next structural character or control character (other
than tab); these are the likeliest places where a good value begins again.
"""

from __future__ import annotations

import re
from typing import Any, Final

# Per value, the limits that QEMU sets (qobject/json-streamer.c).
TOKEN_BYTES_MAX: Final = 64 << 20
TOKEN_COUNT_MAX: Final = 2 << 20
NESTING_MAX: Final = 1 << 10

STRAY_BYTES_MAX: Final = 256  # of an unreadable token that an error quotes; ours, so that errors stay short

_SPACE: Final = re.compile(rb"[ \t\r\n]+")
_WORD: Final = re.compile(rb"[a-z]+")
_NUMBER: Final = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?\Z")
# Every beginning of a number, so that a number that the bytes cut in two is not taken for two.
_NUMBER_BEGUN: Final = re.compile(
    rb"-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE][-+]?[0-9]*)?)?|[eE][-+]?[0-9]*)?)?"
)
_STRING_STOP: Final = {
    0x22: re.compile(rb'["\\\x00-\x1f\xfe\xff]'),
    0x27: re.compile(rb"['\\\x00-\x1f\xfe\xff]"),
}
_RESUME: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]")
_ESCAPE: Final = re.compile(r"\\(?:u(.{0,4})|(.))", re.DOTALL)
_HEX4: Final = re.compile(r"[0-9a-fA-F]{4}\Z")
_NON_CHARACTER: Final = re.compile(
    "[\ufdd0-\ufdef" + "".join(chr(p << 16 | 0xFFFE) + chr(p << 16 | 0xFFFF) for p in range(17)) + "]"
)
_SIMPLE_ESCAPES: Final = {
    '"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t",
}  # fmt: skip
_LITERALS: Final[dict[bytes, Any]] = {b"true": True, b"false": False, b"null": None}

# What may come next inside the innermost container. The names are those of the error that follows otherwise.
_VALUE, _VALUE_OR_END, _KEY, _KEY_OR_END, _COLON, _LIST_SEPARATOR, _DICT_SEPARATOR = range(7)
_EXPECTED: Final = (
    "expecting value",
    "expecting value",
    "expecting value",
    "expecting value",
    "missing : in object pair",
    "expected separator in list",
    "expected separator in dict",
)


class JsonError(ValueError):
    """Text that is not JSON, or more of it than the limits allow. ``str()`` is QEMU's text.

    Returned among the values by ``JsonStream``, raised by ``loads``.
    """


class JsonStream:
    """Splits a byte stream into JSON values. Never raises for what the bytes say."""

    _error: JsonError | None  # the first of the current value; reported when its brackets close
    _expect: int | None

    def __init__(
        self,
        *,
        token_bytes_max: int = TOKEN_BYTES_MAX,
        token_count_max: int = TOKEN_COUNT_MAX,
        nesting_max: int = NESTING_MAX,
    ) -> None:
        self._token_bytes_max = token_bytes_max
        self._token_count_max = token_count_max
        self._nesting_max = nesting_max
        self._buffer = bytearray()  # begins with the token that is not complete yet
        self._scanned = 0  # bytes of an incomplete string known not to end it
        self._recovering = False
        self._finishing = False
        self._results: list[Any] = []
        self._reset_value()

    def feed(self, data: bytes | bytearray | memoryview) -> list[Any]:
        """Take bytes; return the values they complete, in order, with a ``JsonError`` for what is no value.

        A number or a bare word counts as complete when the byte after it has come.
        """
        self._buffer += data
        buffer = self._buffer
        length = len(buffer)
        position = 0
        while position < length:
            byte = buffer[position]
            if self._recovering:
                found = _RESUME.search(buffer, position)
                if found is None:
                    position = length
                    break
                position = found.start()
                self._recovering = False
            elif byte in b" \t\r\n":
                found = _SPACE.match(buffer, position)
                assert found is not None
                position = found.end()
            elif byte in b"{}[]:,":
                position += 1
                self._structure(byte)
            else:
                end = self._scan(buffer, position, byte)
                if end < 0:
                    break
                position = end
        del buffer[:position]
        if len(buffer) > self._token_bytes_max:
            self._fail(JsonError("JSON token size limit exceeded"), recover=True)
            buffer.clear()
            self._scanned = 0
        results, self._results = self._results, []
        return results

    def finish(self) -> list[Any]:
        """Say that no more bytes come: return what that completes or leaves broken. Ready to start anew."""
        self._finishing = True
        results = self.feed(b"\n")  # ends a number or a word; inside a string it is the error that is due
        if self._expect is not None:
            results.append(self._error or JsonError("JSON parse error, premature EOI"))
        self._reset_value()
        self._recovering = self._finishing = False
        return results

    # Tokens. ``_scan`` and its kin return the position after the token, or -1 if the bytes end inside it.

    def _scan(self, buffer: bytearray, position: int, byte: int) -> int:
        if byte in _STRING_STOP:
            return self._scan_string(buffer, position, byte)
        if byte == 0x2D or 0x30 <= byte <= 0x39:
            return self._scan_number(buffer, position)
        found = _WORD.match(buffer, position)
        if found is None:
            return self._stray(buffer, position, position + 1)
        end = found.end()
        if end == len(buffer):
            return -1
        if self._count_token(end - position):
            word = bytes(buffer[position:end])
            if self._error is not None or not self._value_allowed():
                self._unexpected()
            elif word in _LITERALS:
                self._deliver(_LITERALS[word])
            else:
                self._syntax(f"invalid keyword '{word.decode()[:STRAY_BYTES_MAX]}'")
            self._settle()
        return end

    def _scan_number(self, buffer: bytearray, position: int) -> int:
        found = _NUMBER_BEGUN.match(buffer, position)
        assert found is not None
        end = found.end()
        if end == len(buffer):
            return -1
        text = bytes(buffer[position:end])
        is_digit = 0x30 <= buffer[end] <= 0x39  # only possible after a leading zero
        if is_digit or _NUMBER.match(text) is None:
            return self._stray(buffer, position, end + 1)
        if self._count_token(len(text)):
            if self._error is not None or not self._value_allowed():
                self._unexpected()
            else:
                self._deliver(_number(text))
            self._settle()
        return end

    def _scan_string(self, buffer: bytearray, position: int, quote: int) -> int:
        stop = _STRING_STOP[quote]
        scan = position + max(self._scanned, 1)
        while True:
            found = stop.search(buffer, scan)
            if found is None:
                self._scanned = len(buffer) - position
                return -1
            scan = found.end()
            byte = buffer[scan - 1]
            if byte == quote:
                break
            if byte == 0x5C:
                if scan == len(buffer):
                    self._scanned = scan - 1 - position
                    return -1
                byte = buffer[scan]
                scan += 1
                if 0x20 <= byte <= 0xFD:
                    continue
            self._scanned = 0
            return self._stray(buffer, position, scan)
        self._scanned = 0
        if self._count_token(scan - position):
            if self._error is not None or not self._value_allowed():
                self._unexpected()
            else:
                try:
                    self._deliver(_decode(bytes(buffer[position + 1 : scan - 1])), is_string=True)
                except JsonError as error:
                    self._error = error
            self._settle()
        return scan

    def _stray(self, buffer: bytearray, position: int, end: int) -> int:
        if self._finishing and end == len(buffer):
            shown = end - 1  # without the newline that finish() added
        else:
            shown = end
        text = bytes(buffer[position : min(shown, position + STRAY_BYTES_MAX)]).decode(errors="replace")
        self._fail(JsonError(f"JSON parse error, stray '{text}'"), recover=True)
        return end

    # Values. ``_expect`` is the state of the innermost container, None while no value has begun.

    def _reset_value(self) -> None:
        self._braces = 0
        self._brackets = 0
        self._token_count = 0
        self._token_bytes = 0
        self._error = None
        self._expect = None
        self._result: Any = None
        self._stack: list[tuple[Any, int, Any]] = []  # outer containers: (container, state, pending key)
        self._container: Any = None
        self._key: Any = None

    def _fail(self, error: JsonError, recover: bool = False) -> None:
        self._results.append(error)
        self._reset_value()
        self._recovering = recover

    def _count_token(self, size: int) -> bool:
        """Check the limits; False if the value has just been given up."""
        if self._token_bytes + size + 1 > self._token_bytes_max:
            self._fail(JsonError("JSON token size limit exceeded"))
        elif self._token_count + 1 > self._token_count_max:
            self._fail(JsonError("JSON token count limit exceeded"))
        elif self._braces + self._brackets > self._nesting_max:
            self._fail(JsonError("JSON nesting depth limit exceeded"))
        else:
            self._token_bytes += size + 1
            self._token_count += 1
            return True
        return False

    def _settle(self) -> None:
        """After a token: hand out the value, or its error, if the brackets say that it ends here."""
        braces, brackets = self._braces, self._brackets
        if (braces > 0 or brackets > 0) and braces >= 0 and brackets >= 0:
            return
        self._results.append(self._result if self._error is None else self._error)
        self._reset_value()

    def _value_allowed(self) -> bool:
        """True also where a key must come: what came is read as a value first and then refused as a key."""
        expect = self._expect
        return expect is None or expect <= _KEY_OR_END

    def _unexpected(self) -> None:
        self._syntax(_EXPECTED[self._expect or 0])

    def _syntax(self, message: str) -> None:
        if self._error is None:
            self._error = JsonError(f"JSON parse error, {message}")

    def _deliver(self, value: Any, is_string: bool = False) -> None:
        """Put a complete value where it belongs."""
        expect = self._expect
        if expect is None:
            self._result = value
        elif expect in (_VALUE, _VALUE_OR_END):
            container = self._container
            if isinstance(container, list):
                container.append(value)
                self._expect = _LIST_SEPARATOR
            elif self._key in container:
                self._syntax("duplicate key")
            else:
                container[self._key] = value
                self._expect = _DICT_SEPARATOR
        elif is_string:
            self._key = value
            self._expect = _COLON
        else:
            self._syntax("key is not a string in object")

    def _structure(self, byte: int) -> None:
        if byte == 0x7B:
            self._braces += 1
        elif byte == 0x7D:
            self._braces -= 1
        elif byte == 0x5B:
            self._brackets += 1
        elif byte == 0x5D:
            self._brackets -= 1
        if not self._count_token(1):
            return
        expect = self._expect
        if self._error is not None:
            pass
        elif byte == 0x7B or byte == 0x5B:
            if self._value_allowed():
                self._stack.append((self._container, -1 if expect is None else expect, self._key))
                self._container, self._expect = ({}, _KEY_OR_END) if byte == 0x7B else ([], _VALUE_OR_END)
            else:
                self._unexpected()
        elif (byte == 0x7D and expect in (_KEY_OR_END, _DICT_SEPARATOR)) or (
            byte == 0x5D and expect in (_VALUE_OR_END, _LIST_SEPARATOR)
        ):
            value = self._container
            self._container, outer, self._key = self._stack.pop()
            self._expect = None if outer < 0 else outer
            self._deliver(value)
        elif (byte == 0x3A and expect == _COLON) or (byte == 0x2C and expect == _LIST_SEPARATOR):
            self._expect = _VALUE
        elif byte == 0x2C and expect == _DICT_SEPARATOR:
            self._expect = _KEY
        else:
            self._unexpected()
        self._settle()


def _number(text: bytes) -> int | float:
    if b"." in text or b"e" in text or b"E" in text:
        return float(text)
    if len(text) <= 20:
        value = int(text)
        if -(1 << 63) <= value < 1 << 64:
            return value
    return float(text)


def _decode(raw: bytes) -> str:
    """The string between the quotes. Raises JsonError."""
    if b"\xc0\x80" in raw:  # modified UTF-8 spells NUL so
        raw = raw.replace(b"\xc0\x80", b"\0")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise JsonError("JSON parse error, invalid UTF-8 sequence in string") from None
    if not text.isascii() and _NON_CHARACTER.search(text):
        raise JsonError("JSON parse error, invalid UTF-8 sequence in string")
    return _unescape(text) if "\\" in text else text


def _unescape(text: str) -> str:
    parts: list[str] = []
    position = 0
    while (found := _ESCAPE.search(text, position)) is not None:
        parts.append(text[position : found.start()])
        position = found.end()
        digits, simple = found.groups()
        if digits is None:
            if simple not in _SIMPLE_ESCAPES:
                raise JsonError("JSON parse error, invalid escape sequence in string")
            parts.append(_SIMPLE_ESCAPES[simple])
            continue
        code = int(digits, 16) if _HEX4.match(digits) else -1
        if 0xD800 <= code <= 0xDBFF and text.startswith("\\u", position):
            trailing = text[position + 2 : position + 6]
            low = int(trailing, 16) if _HEX4.match(trailing) else -1
            if 0xDC00 <= low <= 0xDFFF:
                code = 0x10000 + ((code & 0x3FF) << 10) + (low & 0x3FF)
                position += 6
        if code < 0 or 0xD800 <= code <= 0xDFFF or _NON_CHARACTER.match(chr(code)):
            escape = text[found.start() : position]
            raise JsonError(f"JSON parse error, {escape} is not a valid Unicode character")
        parts.append(chr(code))
    parts.append(text[position:])
    return "".join(parts)


def loads(text: str | bytes) -> Any:
    """The one JSON value in ``text``. Raises JsonError."""
    stream = JsonStream()
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    values = stream.feed(data) + stream.finish()
    if not values:
        raise JsonError("Expecting a JSON value")
    if isinstance(values[0], JsonError):
        raise values[0]
    if len(values) > 1:
        raise JsonError("Expecting at most one JSON value")
    return values[0]
