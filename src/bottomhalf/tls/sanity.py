# SPDX-License-Identifier: Apache-2.0
"""Whether a certificate can do what it is for: its dates and its uses, in QEMU's words. A handshake that fails says
little to whoever set the server up, and says it to the wrong end."""

from __future__ import annotations

from bottomhalf.tls.der import (
    ANY_PURPOSE,
    CLIENT_PURPOSE,
    DIGITAL_SIGNATURE,
    KEY_CERT_SIGN,
    KEY_ENCIPHERMENT,
    SERVER_PURPOSE,
    BadCertificate,
    read_certificate,
)


def complaint(der: bytes, path: str, role: str, now_s: int) -> str | None:
    """What keeps the certificate from being that of a "CA", "server" or "client"; None if nothing does."""
    try:
        certificate = read_certificate(der)
    except BadCertificate as error:
        return f"Unable to import {role} certificate {path}: {error}"
    if certificate.not_after < now_s:
        return f"The {role} certificate {path} has expired"
    if certificate.not_before > now_s:
        return f"The {role} certificate {path} is not yet active"
    if role == "CA" and not certificate.is_ca:
        return f"The certificate {path} basic constraints do not show a CA"
    if role != "CA" and certificate.is_ca:
        return f"The certificate {path} basic constraints show a CA, but we need one for a {role}"
    usage = certificate.key_usage
    if usage is not None:
        if role == "CA":
            if KEY_CERT_SIGN not in usage:
                return f"Certificate {path} usage does not permit certificate signing"
        elif DIGITAL_SIGNATURE not in usage:
            return f"Certificate {path} usage does not permit digital signature"
        elif KEY_ENCIPHERMENT not in usage:
            return f"Certificate {path} usage does not permit key encipherment"
    if role != "CA" and certificate.purposes is not None:
        wanted = SERVER_PURPOSE if role == "server" else CLIENT_PURPOSE
        if not certificate.purposes & {wanted, ANY_PURPOSE}:
            return f"Certificate {path} purpose does not allow use with a TLS {role}"
    return None
