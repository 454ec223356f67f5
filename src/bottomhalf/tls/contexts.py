# SPDX-License-Identifier: Apache-2.0
"""From what a directory of credentials holds to what OpenSSL wants: its contexts.

Facts: OpenSSL takes certificates of authorities from memory, but its own certificate, keys, revocation lists and
Diffie-Hellman parameters only from files that it opens itself. What we have was read through the host. Decision: the
host lends a path to bytes in memory (``Host.lend_path``); no path that anybody gave us reaches OpenSSL.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from bottomhalf.host.protocol import Host
from bottomhalf.tls.errors import TlsError
from bottomhalf.tls.priority import Priority
from bottomhalf.tls.session import Session

Context: TypeAlias = ssl.SSLContext

LEGS_MAX: Final = 16  # messages of a handshake with ourselves
# The group ffdhe2048 of RFC 7919, for anonymous Diffie-Hellman: the client takes what the server says.
FFDHE2048: Final = b"""\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
ANONYMOUS: Final = "ADH+AESGCM:ADH+AES:@SECLEVEL=0"
PSK: Final = "ECDHE-PSK:DHE-PSK:PSK:!eNULL:!SHA1"
VERSIONS: Final = {"TLS1.2": ssl.TLSVersion.TLSv1_2, "TLS1.3": ssl.TLSVersion.TLSv1_3}
HAVE_PSK: Final = hasattr(ssl.SSLContext, "set_psk_server_callback")


@dataclass(frozen=True, repr=False)
class Material:
    """What the files of x509 credentials hold; None for those that are not there."""

    authorities: bytes
    certificate: bytes | None
    key: bytes | None
    password: bytes | None
    revoked: bytes | None
    dh_params: bytes | None


class Refused(ValueError):
    """OpenSSL does not take a part of the material: which one, and why."""

    def __init__(self, part: str, why: str) -> None:
        super().__init__(f"{part}: {why}")
        self.part = part
        self.why = why


def _bare(*, server: bool, priority: Priority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = VERSIONS[priority.versions[0]]
    context.maximum_version = VERSIONS[priority.versions[-1]]
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    if priority.level != 2 or priority.ciphers:
        context.set_ciphers(f"{priority.ciphers or 'DEFAULT'}:@SECLEVEL={priority.level}")
    if server:
        context.num_tickets = 0  # a session is as long as its connection
    return context


def x509_context(
    host: Host, material: Material, *, server: bool, verify_peer: bool, priority: Priority
) -> ssl.SSLContext:
    """For certificates. Refused."""
    context = _bare(server=server, priority=priority)
    if material.certificate is not None and material.key is not None:
        _load_own(host, context, material.certificate, material.key, material.password)
    _load("authorities", lambda: context.load_verify_locations(cadata=_text(material.authorities)))
    # Whoever is named in the file is trusted, whether or not it has signed itself.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if material.revoked is not None:
        with host.lend_path(material.revoked) as path:
            _load("revoked", lambda: context.load_verify_locations(cafile=path))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    if server and material.dh_params is not None:
        with host.lend_path(material.dh_params) as path:
            _load("dh_params", lambda: context.load_dh_params(path))
    if verify_peer:
        context.verify_mode = ssl.CERT_REQUIRED
        context.check_hostname = not server
    return context


def _load_own(host: Host, context: ssl.SSLContext, certificate: bytes, key: bytes, password: bytes | None) -> None:
    asked = False

    def tell() -> bytes:
        nonlocal asked
        asked = True
        return password or b""  # without it OpenSSL would ask the terminal

    with host.lend_path(certificate) as certificate_path, host.lend_path(key) as key_path:
        try:
            context.load_cert_chain(certificate_path, key_path, password=tell)
        except (ssl.SSLError, ValueError, OSError) as error:
            reason = getattr(error, "reason", None) or str(error)
            if asked:
                raise Refused("key", "Decryption has failed.") from None
            if reason == "KEY_VALUES_MISMATCH":
                raise Refused("key", "The certificate and the given key do not match.") from None
            raise Refused("key", reason.lower().replace("_", " ")) from None


def _load(part: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except (ssl.SSLError, ValueError, OSError) as error:
        raise Refused(part, (getattr(error, "reason", None) or str(error)).lower().replace("_", " ")) from None


def _text(pem: bytes) -> str:
    try:
        return pem.decode("ascii")
    except UnicodeDecodeError:
        return pem.decode("latin-1").encode("ascii", "replace").decode("ascii")  # comments between certificates


def first_certificates(pem: bytes) -> list[bytes]:
    """The certificates of a file, in DER. ValueError."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    found, text = [], _text(pem)
    while begin in text:
        _, _, text = text.partition(begin)
        body, mark, text = text.partition(end)
        if not mark:
            raise ValueError("a certificate without an end")
        found.append(ssl.PEM_cert_to_DER_cert(f"{begin}\n{body.strip()}\n{end}\n"))
    if not found:
        raise ValueError("no certificate in it")
    return found


def validate(host: Host, material: Material, *, server: bool) -> str | None:
    """Have the other end judge our own certificate, in memory. What it says; None if it is content.

    A client needs a server to talk to: one that shows the same certificate, which nobody looks at."""
    strict = x509_context(host, material, server=not server, verify_peer=True, priority=Priority())
    strict.check_hostname = False
    ours = x509_context(host, material, server=server, verify_peer=False, priority=Priority())
    ends = [Session(ours, server=server), Session(strict, server=not server)]
    for _ in range(LEGS_MAX):
        for me, other in (ends, ends[::-1]):
            try:
                me.handshake()
            except TlsError as error:
                return error.text if me is ends[1] else None
            other.receive(me.take_output())
        if all(each.established for each in ends):
            return None
    return "the handshake does not end"


def anonymous_context(host: Host, *, server: bool, dh_params: bytes | None, priority: Priority) -> ssl.SSLContext:
    """For nobody in particular: encrypted, but whoever sits in between can be either end. TLS 1.2, for 1.3 has nothing
    like it. Refused."""
    if "TLS1.2" not in priority.versions:
        raise Refused("priority", "anonymous credentials need TLS 1.2")
    context = _bare(server=server, priority=Priority(versions=("TLS1.2",)))
    context.set_ciphers(ANONYMOUS)
    if server:
        with host.lend_path(FFDHE2048 if dh_params is None else dh_params) as path:
            _load("dh_params", lambda: context.load_dh_params(path))
    return context


def psk_context(keys: dict[str, bytes], *, server: bool, username: str, priority: Priority) -> ssl.SSLContext:
    """For a key that both ends have. Needs Python 3.13 (``HAVE_PSK``)."""
    context = _bare(server=server, priority=priority)
    context.set_ciphers(PSK)
    if server:
        context.set_psk_server_callback(lambda identity: keys.get(identity or "", b""))  # type: ignore[attr-defined]
    else:
        context.set_psk_client_callback(lambda hint: (username, keys[username]))  # type: ignore[attr-defined]
    return context
