# SPDX-License-Identifier: Apache-2.0
"""Reading certificates: names, dates and uses as they were written; anything else is refused, never a crash."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.tls.der import (
    CLIENT_PURPOSE,
    DIGITAL_SIGNATURE,
    KEY_CERT_SIGN,
    KEY_ENCIPHERMENT,
    SERVER_PURPOSE,
    BadCertificate,
    read_certificate,
)
from bottomhalf.tls.errors import NotAdmitted
from bottomhalf.tls.stream import TlsStream
from tests.peers.certificates import name_of
from tests.tls.ends import Place, authority, client_certificate, server_certificate, shake_hands


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([(NameOID.COMMON_NAME, "fred")], "CN=fred"),
        (
            [
                (NameOID.COUNTRY_NAME, "GB"),
                (NameOID.STATE_OR_PROVINCE_NAME, "London"),
                (NameOID.LOCALITY_NAME, "London"),
                (NameOID.ORGANIZATION_NAME, "Example, Ltd."),
                (NameOID.ORGANIZATIONAL_UNIT_NAME, 'R+D "labs"'),
                (NameOID.COMMON_NAME, "host.example.com"),
            ],
            'C=GB,ST=London,L=London,O=Example\\, Ltd.,OU=R\\+D \\"labs\\",CN=host.example.com',
        ),
        ([(NameOID.COMMON_NAME, " x ")], "CN=\\ x\\ "),
        ([(NameOID.COMMON_NAME, "#1;2<3>\\")], "CN=\\#1\\;2\\<3\\>\\\\"),
        ([(NameOID.COMMON_NAME, "Zoë \U0001f600")], "CN=Zoë \U0001f600"),
        ([(NameOID.COMMON_NAME, "a\0b")], "CN=a\\00b"),
        ([(NameOID.DOMAIN_COMPONENT, "example"), (NameOID.USER_ID, "u")], "DC=example,UID=u"),
        ([(x509.ObjectIdentifier("1.2.3.4"), "x")], "1.2.3.4=#0C0178"),
        ([(x509.ObjectIdentifier("1.2.3.4"), "x" * 200)], "1.2.3.4=#0C81C8" + "78" * 200),
        ([(x509.ObjectIdentifier("1.2.3.4"), "x" * 300)], "1.2.3.4=#0C82012C" + "78" * 300),
        ([], ""),
    ],
)
def test_names(parts: list[tuple[x509.ObjectIdentifier, str]], text: str) -> None:
    assert read_certificate(authority().issue(name_of(*parts)).der).subject == text


def test_several_attributes_in_one_part() -> None:
    relative = x509.RelativeDistinguishedName(
        [x509.NameAttribute(NameOID.COMMON_NAME, "x"), x509.NameAttribute(NameOID.USER_ID, "y")]
    )
    found = read_certificate(authority().issue(x509.Name([relative])).der).subject
    assert sorted(found.split("+")) == ["CN=x", "UID=y"]


@pytest.mark.parametrize(
    "moment",
    [datetime(*each, tzinfo=UTC) for each in (  # type: ignore[misc]
        (1970, 1, 1), (1999, 12, 31, 23, 59, 59), (2000, 2, 29, 12), (2024, 2, 29), (2038, 1, 19, 3, 14, 8),
        (2049, 12, 31, 23, 59, 59), (2050, 1, 1), (2100, 3, 1), (2400, 2, 29), (9999, 12, 31, 23, 59, 59))],
)  # fmt: skip
def test_dates(moment: datetime) -> None:
    late = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    certificate = read_certificate(authority().issue("x", not_before=moment, not_after=late).der)
    assert certificate.not_before == int(moment.timestamp())
    assert certificate.not_after == int(late.timestamp())


def test_uses() -> None:
    ca = read_certificate(authority().issued.der)
    assert ca.is_ca is True and ca.key_usage is not None and KEY_CERT_SIGN in ca.key_usage and ca.purposes is None
    server = read_certificate(authority().issue("x", client=False).der)
    assert server.is_ca is False and server.purposes == {SERVER_PURPOSE}
    assert server.key_usage == {DIGITAL_SIGNATURE, KEY_ENCIPHERMENT}
    assert read_certificate(client_certificate().der).purposes == {SERVER_PURPOSE, CLIENT_PURPOSE}
    bare = read_certificate(authority().issue("x", key_usage=(), server=False, client=False, is_ca=None).der)
    assert (bare.is_ca, bare.key_usage, bare.purposes) == (None, None, None)


@pytest.mark.parametrize("count", [8192, 70_000])
def test_names_have_a_limit(count: int) -> None:
    for key in (NameOID.ORGANIZATION_NAME, x509.ObjectIdentifier("1.2.3.4")):
        with pytest.raises(BadCertificate, match="name of"):
            read_certificate(authority().issue(name_of((key, "x" * count))).der)


def test_a_name_that_cannot_be_read_matters_to_lists_only() -> None:
    """OpenSSL believes the certificate; whoever asks no list comes in all the same."""
    place = Place()
    place.add("/odd", client=authority().issue(name_of((NameOID.ORGANIZATION_NAME, "x" * 9000))))
    client, server = place.client(directory="/odd", sanity_check=False), place.server()
    far = client.credentials.session("localhost"), server.credentials.session()
    shake_hands(*far)
    stream = TlsStream(None, far[1])  # type: ignore[arg-type]
    assert server.admit(stream) == ""
    with pytest.raises(NotAdmitted, match="The peer's certificate cannot be read"):
        replace(server, authz_id="s0").admit(stream)


def test_every_prefix_is_refused() -> None:
    der = server_certificate().der
    for cut in range(len(der)):
        with pytest.raises(BadCertificate):
            read_certificate(der[:cut])


def test_changed_certificates_are_read_or_refused(seed: int) -> None:
    chance = random.Random(seed)
    der = server_certificate().der
    for _ in range(200):
        changed = bytearray(der)
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(changed))] = chance.choice((0, 0x7F, 0x80, 0x84, 0xFF, chance.randrange(256)))
        try:
            read_certificate(bytes(changed))
        except BadCertificate:
            pass


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(BadCertificate):
        read_certificate(data)
