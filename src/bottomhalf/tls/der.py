# SPDX-License-Identifier: Apache-2.0
"""What we need to know of a certificate and OpenSSL's Python face does not tell: its owner's distinguished name as it
is written, its dates and what it is for. X.690 (DER) and RFC 5280, section 4.1, as far as that goes.

    Certificate  ::=  SEQUENCE { tbsCertificate, signatureAlgorithm, signatureValue }
    TBSCertificate  ::=  SEQUENCE { [0] version, serialNumber, signature, issuer, validity, subject,
                                    subjectPublicKeyInfo, [1], [2], [3] extensions }

Names are given as text in the way of RFC 4514, but in the certificate's own order, the one in which QEMU compares them
with its lists. Nothing here decides whether a certificate is genuine: OpenSSL does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

SEQUENCE: Final = 0x30
SET: Final = 0x31
OID: Final = 0x06
BOOLEAN: Final = 0x01
UTC_TIME: Final = 0x17
GENERALIZED_TIME: Final = 0x18
BMP_STRING: Final = 0x1E
UNIVERSAL_STRING: Final = 0x1C
TEXTS: Final = {0x0C: "utf-8", 0x13: "ascii", 0x14: "latin-1", 0x16: "ascii", BMP_STRING: "utf-16-be",
                UNIVERSAL_STRING: "utf-32-be"}  # fmt: skip
NAME_BYTES_MAX: Final = 8192  # of a distinguished name as text
PARTS_MAX: Final = 64  # of a distinguished name; extensions

ATTRIBUTES: Final = {  # the names of RFC 4514, section 3, and those that GnuTLS adds
    "2.5.4.3": "CN", "2.5.4.7": "L", "2.5.4.8": "ST", "2.5.4.10": "O", "2.5.4.11": "OU", "2.5.4.6": "C",
    "2.5.4.9": "street", "0.9.2342.19200300.100.1.25": "DC", "0.9.2342.19200300.100.1.1": "UID",
    "2.5.4.4": "surName", "2.5.4.5": "serialNumber", "2.5.4.12": "title", "2.5.4.42": "givenName",
    "2.5.4.43": "initials", "2.5.4.44": "generationQualifier", "2.5.4.46": "dnQualifier",
    "2.5.4.65": "pseudonym", "1.2.840.113549.1.9.1": "EMAIL",
}  # fmt: skip
BASIC_CONSTRAINTS: Final = "2.5.29.19"
KEY_USAGE: Final = "2.5.29.15"
EXTENDED_KEY_USAGE: Final = "2.5.29.37"
ANY_PURPOSE: Final = "2.5.29.37.0"
SERVER_PURPOSE: Final = "1.3.6.1.5.5.7.3.1"
CLIENT_PURPOSE: Final = "1.3.6.1.5.5.7.3.2"
# Bits of KeyUsage, as (index of the bit) from the first on.
DIGITAL_SIGNATURE: Final = 0
KEY_ENCIPHERMENT: Final = 2
KEY_CERT_SIGN: Final = 5


class BadCertificate(ValueError):
    """The bytes are not a certificate."""


@dataclass(frozen=True)
class Certificate:
    """What it says. Times are seconds since 1970."""

    subject: str
    not_before: int
    not_after: int
    is_ca: bool | None  # None: it does not say
    key_usage: frozenset[int] | None
    purposes: frozenset[str] | None


def _item(data: memoryview, position: int) -> tuple[int, memoryview, int]:
    """Tag, content, and the position behind it."""
    if position + 2 > len(data):
        raise BadCertificate("it ends early")
    tag, length = data[position], data[position + 1]
    position += 2
    if tag & 0x1F == 0x1F:
        raise BadCertificate(f"tag {tag:#x}")
    if length & 0x80:
        count = length & 0x7F
        if not 0 < count <= 4 or position + count > len(data):
            raise BadCertificate("a length that is none")
        length = int.from_bytes(data[position : position + count], "big")
        position += count
    if position + length > len(data):
        raise BadCertificate("it ends early")
    return tag, data[position : position + length], position + length


def _items(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    position = 0
    for _ in range(PARTS_MAX):
        if position == len(data):
            return
        tag, content, position = _item(data, position)
        yield tag, content
    raise BadCertificate(f"more than {PARTS_MAX} parts")


def _expect(found: tuple[int, memoryview] | None, tag: int) -> memoryview:
    if found is None or found[0] != tag:
        raise BadCertificate(f"no {tag:#x} where there should be one")
    return found[1]


def read_certificate(der: bytes) -> Certificate:
    """BadCertificate."""
    tag, whole, _ = _item(memoryview(der), 0)
    fields = _items(_expect(next(_items(_expect((tag, whole), SEQUENCE)), None), SEQUENCE))
    field = next(fields, None)
    if field is not None and field[0] == 0xA0:  # the version
        field = next(fields, None)
    next(fields, None)  # signature; ``field`` was the serial number
    next(fields, None)  # issuer
    validity = _items(_expect(next(fields, None), SEQUENCE))
    not_before, not_after = _time(next(validity, None)), _time(next(validity, None))
    subject = _name(_expect(next(fields, None), SEQUENCE))
    is_ca: bool | None = None
    key_usage: frozenset[int] | None = None
    purposes: frozenset[str] | None = None
    for tag, content in fields:
        if tag != 0xA3:
            continue
        for tag, extension in _items(_expect(next(_items(content), None), SEQUENCE)):
            parts = list(_items(_expect((tag, extension), SEQUENCE)))
            if len(parts) < 2:
                raise BadCertificate("an extension without a value")
            name, value = _oid(_expect(parts[0], OID)), parts[-1][1]
            if name == BASIC_CONSTRAINTS:
                first = next(_items(_expect(next(_items(value), None), SEQUENCE)), None)
                is_ca = first is not None and first[0] == BOOLEAN and bytes(first[1]) != b"\0"
            elif name == KEY_USAGE:
                key_usage = _bits(_expect(next(_items(value), None), 0x03))
            elif name == EXTENDED_KEY_USAGE:
                listed = _items(_expect(next(_items(value), None), SEQUENCE))
                purposes = frozenset(_oid(_expect(each, OID)) for each in listed)
    return Certificate(subject, not_before, not_after, is_ca, key_usage, purposes)


def _bits(content: memoryview) -> frozenset[int]:
    data = bytes(content[1:3])
    return frozenset(8 * at + bit for at, byte in enumerate(data) for bit in range(8) if byte & 0x80 >> bit)


def _oid(content: memoryview) -> str:
    numbers, value = [], 0
    for byte in content:
        value = value << 7 | byte & 0x7F
        if value >> 64:
            raise BadCertificate("a number of an object identifier is too large")
        if not byte & 0x80:
            numbers.append(value)
            value = 0
    if not numbers:
        raise BadCertificate("an empty object identifier")
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, (first, numbers[0] - 40 * first, *numbers[1:])))


def _time(field: tuple[int, memoryview] | None) -> int:
    """UTCTime or GeneralizedTime in the forms that RFC 5280 allows, as seconds since 1970."""
    if field is None or field[0] not in (UTC_TIME, GENERALIZED_TIME):
        raise BadCertificate("no time where there should be one")
    text = bytes(field[1]).decode("ascii", "replace")
    if field[0] == UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    if len(text) != 15 or not text[:14].isdecimal() or text[14] != "Z":
        raise BadCertificate(f"a time {text!r}")
    year, month, day = int(text[:4]), int(text[4:6]), int(text[6:8])
    hours, minutes, seconds = int(text[8:10]), int(text[10:12]), int(text[12:14])
    if not 1 <= month <= 12 or not 1 <= day <= 31:
        raise BadCertificate(f"a time {text!r}")
    # Days since 1970-03-01 in the calendar that begins its years in March.
    shifted = year - (month <= 2)
    leap_days = shifted // 4 - shifted // 100 + shifted // 400
    days = 365 * shifted + leap_days + (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return (days - 719468) * 86400 + hours * 3600 + minutes * 60 + seconds


def _name(content: memoryview) -> str:
    """A distinguished name as text."""
    parts = []
    for tag, relative in _items(content):
        together = []
        for pair_tag, pair in _items(_expect((tag, relative), SET)):
            values = list(_items(_expect((pair_tag, pair), SEQUENCE)))
            if len(values) != 2:
                raise BadCertificate("an attribute of a name without a value")
            key = _oid(_expect(values[0], OID))
            together.append(f"{ATTRIBUTES.get(key, key)}={_attribute(key, *values[1])}")
        parts.append("+".join(together))
    text = ",".join(parts)
    if len(text) > NAME_BYTES_MAX:
        raise BadCertificate(f"a name of {len(text)} characters")
    return text


def _attribute(key: str, tag: int, content: memoryview) -> str:
    length = len(content)
    if length > NAME_BYTES_MAX:
        raise BadCertificate(f"an attribute of a name of {length} bytes")
    if tag not in TEXTS or key not in ATTRIBUTES:
        octets = length.to_bytes((length.bit_length() + 7) // 8 or 1, "big")
        header = bytes([tag, length]) if length < 0x80 else bytes([tag, 0x80 | len(octets)]) + octets
        return "#" + (header + bytes(content)).hex().upper()
    try:
        text = bytes(content).decode(TEXTS[tag])
    except UnicodeDecodeError:
        raise BadCertificate("a name that is not text") from None
    return _escape(text)


def _escape(text: str) -> str:
    """RFC 4514, section 2.4."""
    escaped = "".join("\\" + each if each in '"+,;<>\\' else "\\00" if each == "\0" else each for each in text)
    if escaped.startswith((" ", "#")):
        escaped = "\\" + escaped
    if text.endswith(" ") and len(text) > 1:
        escaped = escaped[:-1] + "\\ "
    return escaped
