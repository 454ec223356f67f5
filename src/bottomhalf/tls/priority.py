# SPDX-License-Identifier: Apache-2.0
"""Priority strings of GnuTLS, which QEMU's users write, in terms of OpenSSL.

A string is a keyword and modifiers, separated by colons: ``NORMAL:-VERS-ALL:+VERS-TLS1.3``. OpenSSL has other words,
and no counterpart for some. What can be said is said; what cannot is an error, for a wish about security must not be
dropped in silence. (QEMU takes any string here and fails when the first client comes.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WORDS_MAX: Final = 64
VERSIONS: Final = ("TLS1.2", "TLS1.3")  # of those that we speak, oldest first
OLD_VERSIONS: Final = frozenset(("SSL3.0", "TLS1.0", "TLS1.1", "DTLS0.9", "DTLS1.0", "DTLS1.2", "DTLS-ALL"))
# The security level of OpenSSL, and its ciphers of TLS 1.2; "" for its own choice.
STRONG: Final = "ECDH+AESGCM:ECDH+CHACHA20:DHE+AESGCM:DHE+CHACHA20"
KEYWORDS: Final = {
    "NORMAL": (2, ""),
    "PERFORMANCE": (2, ""),
    "PFS": (2, ""),  # all that we offer have forward secrecy
    "SYSTEM": (2, ""),
    "SECURE128": (3, STRONG),
    "SECURE192": (4, "ECDHE+AES256+AESGCM:ECDH+CHACHA20"),
    "SECURE256": (5, "ECDHE+AES256+AESGCM:ECDH+CHACHA20"),
}
# What a kind of credentials brings by itself, and what OpenSSL always does.
WITHOUT_EFFECT: Final = frozenset(
    (
        "+ANON-DH", "+ANON-ECDH", "+PSK", "+DHE-PSK", "+ECDHE-PSK", "%SAFE_RENEGOTIATION", "%SERVER_PRECEDENCE",
        "+COMP-NULL", "-COMP-ALL",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Priority:
    """What a string asks for."""

    level: int = 2
    ciphers: str = ""
    versions: tuple[str, ...] = VERSIONS


def parse_priority(text: str) -> Priority:
    """"" is NORMAL. ValueError says which word is not understood."""
    words = text.split(":") if text else ["NORMAL"]
    if len(words) > WORDS_MAX:
        raise ValueError(f"it has more than {WORDS_MAX} words")
    known: str | None = None
    for name in words[0].lstrip("@").split(","):  # @A,B: the first that the system knows
        known = known or (name if name in KEYWORDS else None)
    if known is None:
        raise ValueError(f"'{words[0]}' is not one of {', '.join(sorted(KEYWORDS))}")
    level, ciphers = KEYWORDS[known]
    versions = set(VERSIONS)
    for word in words[1:]:
        if word in WITHOUT_EFFECT:
            continue
        sign, name = word[:1], word[1:]
        adds = sign == "+"
        if sign not in ("+", "-", "!") or not name.startswith("VERS-"):
            raise ValueError(f"OpenSSL has nothing that corresponds to '{word}'")
        name = name.removeprefix("VERS-").removeprefix("TLS-") if name == "VERS-TLS-ALL" else name[5:]
        if name == "ALL":
            versions = set(VERSIONS) if adds else set()
        elif name in VERSIONS:
            (versions.add if adds else versions.discard)(name)
        elif name not in OLD_VERSIONS or adds:
            raise ValueError(f"'{word}' asks for a version that is not offered")
    if not versions:
        raise ValueError("it leaves no version of TLS")
    return Priority(level, ciphers, tuple(each for each in VERSIONS if each in versions))
