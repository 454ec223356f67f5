# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests: an authority, and what it signs, in the files that QEMU, libnbd, nbdkit and we look for.

    authority = Authority("Test CA")
    write(tmp_path, authority, server=authority.issue("localhost", hosts=["localhost"]), client=authority.issue("me"))

Keys are of a curve, since making them takes no time. QEMU wants key encipherment among a key's uses all the same.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)  # before the clock of a simulated host begins


def name_of(*parts: tuple[x509.ObjectIdentifier, str]) -> x509.Name:
    """A distinguished name in this order."""
    return x509.Name([x509.NameAttribute(key, value) for key, value in parts])


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, in PEM."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def key_pem(self, password: bytes | None = None) -> bytes:
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password is not None:
            encryption = serialization.BestAvailableEncryption(password)
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


class Authority:
    """Signs certificates; its own is ``issued``."""

    def __init__(self, name: str = "Test CA") -> None:
        self.issued = self._sign(name_of((NameOID.COMMON_NAME, name)), None, is_ca=True)

    def _sign(
        self,
        subject: x509.Name,
        signer: Issued | None,
        *,
        is_ca: bool | None,
        hosts: tuple[str, ...] = (),
        purposes: tuple[x509.ObjectIdentifier, ...] = (),
        key_usage: tuple[str, ...] = ("digital_signature", "key_encipherment"),
        not_before: datetime = LONG_AGO,
        not_after: datetime = NOW + 365 * DAY,
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = subject if signer is None else signer.certificate.subject
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
        )
        if is_ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        if hosts:
            names: list[x509.GeneralName] = []
            for host in hosts:
                try:
                    names.append(x509.IPAddress(ipaddress.ip_address(host)))
                except ValueError:
                    names.append(x509.DNSName(host))
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if purposes:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=True)
        uses = ("key_cert_sign", "crl_sign") if is_ca else key_usage
        if uses:
            builder = builder.add_extension(_usage(uses), critical=True)
        signing = key if signer is None else signer.key
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        if signer is not None:
            builder = builder.add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False
            )
        return Issued(builder.sign(signing, hashes.SHA256()), key)

    def issue(
        self,
        name: str | x509.Name,
        *,
        hosts: tuple[str, ...] = (),
        server: bool = True,
        client: bool = True,
        key_usage: tuple[str, ...] = ("digital_signature", "key_encipherment"),
        not_before: datetime = LONG_AGO,
        not_after: datetime = NOW + 365 * DAY,
        is_ca: bool | None = False,
    ) -> Issued:
        """A certificate for a host or a person."""
        purposes = ((ExtendedKeyUsageOID.SERVER_AUTH,) if server else ()) + (
            (ExtendedKeyUsageOID.CLIENT_AUTH,) if client else ()
        )
        subject = name_of((NameOID.COMMON_NAME, name)) if isinstance(name, str) else name
        return self._sign(
            subject, self.issued, is_ca=is_ca, hosts=hosts, purposes=purposes, key_usage=key_usage,
            not_before=not_before, not_after=not_after,
        )  # fmt: skip

    def revoke(self, *revoked: Issued) -> bytes:
        """A list of revoked certificates, in PEM."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.issued.certificate.subject)
            .last_update(NOW - DAY)
            .next_update(NOW + 30 * DAY)
        )
        for each in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(each.certificate.serial_number)
                .revocation_date(NOW - DAY)
                .build()
            )
        return builder.sign(self.issued.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _usage(uses: tuple[str, ...]) -> x509.KeyUsage:
    known = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: name in uses for name in known})


def files(
    authority: Authority, *, server: Issued | None = None, client: Issued | None = None, password: bytes | None = None
) -> dict[str, bytes]:
    """The content of a directory of credentials by name."""
    found = {"ca-cert.pem": authority.issued.pem}
    for role, issued in (("server", server), ("client", client)):
        if issued is not None:
            found[f"{role}-cert.pem"] = issued.pem
            found[f"{role}-key.pem"] = issued.key_pem(password)
    return found


def write(directory: Path, authority: Authority, **parts: Issued | bytes | None) -> Path:
    """``files`` on disk; the directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files(authority, **parts).items():  # type: ignore[arg-type]
        (directory / name).write_bytes(content)
    return directory
