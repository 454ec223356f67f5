# SPDX-License-Identifier: Apache-2.0
"""Credentials as objects: what is wrong with a directory is told when the object is made, in QEMU's words."""

from __future__ import annotations

import pytest

from bottomhalf.qom.authz import AuthzSimple, matches
from bottomhalf.qom.values import QomError
from bottomhalf.tls import contexts
from bottomhalf.tls.objects import FILE_BYTES_MAX
from bottomhalf.tls.policy import client_security, server_security
from bottomhalf.tls.priority import parse_priority
from tests.peers.certificates import DAY, NOW
from tests.tls.ends import Place, authority, client_certificate, server_certificate, shake_hands

PASSWORD = "correct horse"


@pytest.fixture
def place() -> Place:
    made = Place()
    other, ours = authority("Other CA"), authority()
    issue = ours.issue
    made.add("/late", server=issue("h", not_after=NOW - DAY), client=issue("h", not_after=NOW - DAY))
    made.add("/early", server=issue("h", not_before=NOW + DAY))
    made.add("/is-ca", server=issue("h", is_ca=True))
    made.add("/purpose", server=issue("h", server=False), client=issue("h", client=False))
    made.add("/no-encipherment", server=issue("h", key_usage=("digital_signature",)))
    made.add("/no-signature", server=issue("h", key_usage=("key_encipherment",)))
    made.add("/locked", server=server_certificate(), client=client_certificate(), password=PASSWORD.encode())
    made.add("/stranger", server=other.issue("localhost"), client=other.issue("mallory"))
    made.add("/nobody")
    made.add("/wrong-key", server=server_certificate())
    made.host.disk.files.pop("/wrong-key/server-key.pem")
    made.host.add_file("/wrong-key/server-key.pem", client_certificate().key_pem())
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem", "ca-crl.pem", "dh-params.pem"):
        directory = f"/bad-{name.removesuffix('.pem')}"
        made.add(directory, server=server_certificate())
        made.host.disk.files.pop(f"{directory}/{name}", None)
        made.host.add_file(f"{directory}/{name}", b"garbage")
    made.add("/leaf-ca", server=server_certificate())
    made.host.disk.files.pop("/leaf-ca/ca-cert.pem")
    made.host.add_file("/leaf-ca/ca-cert.pem", server_certificate().pem)
    made.add("/huge", server=server_certificate())
    made.host.disk.files.pop("/huge/server-key.pem")
    made.host.add_file("/huge/server-key.pem", FILE_BYTES_MAX + 1)
    for name, data in (("pw", PASSWORD), ("bad", "hunter2")):
        made.tree.create("secret", name, {"data": data})
    return made


@pytest.mark.parametrize(
    ("endpoint", "directory", "text"),
    [
        ("server", "", "Missing 'dir' property value"),
        ("server", "/nix", "Unable to access credentials /nix/ca-cert.pem: No such file or directory"),
        ("server", "/nobody", "Unable to access credentials /nobody/server-cert.pem: No such file or directory"),
        ("server", "/huge", "Unable to access credentials /huge/server-key.pem: it is larger than 1048576 bytes"),
        ("server", "/late", "The server certificate /late/server-cert.pem has expired"),
        ("client", "/late", "The client certificate /late/client-cert.pem has expired"),
        ("server", "/early", "The server certificate /early/server-cert.pem is not yet active"),
        (
            "server",
            "/is-ca",
            "The certificate /is-ca/server-cert.pem basic constraints show a CA, but we need one for a server",
        ),
        ("server", "/leaf-ca", "The certificate /leaf-ca/ca-cert.pem basic constraints do not show a CA"),
        ("server", "/purpose", "Certificate /purpose/server-cert.pem purpose does not allow use with a TLS server"),
        ("client", "/purpose", "Certificate /purpose/client-cert.pem purpose does not allow use with a TLS client"),
        (
            "server",
            "/no-encipherment",
            "Certificate /no-encipherment/server-cert.pem usage does not permit key encipherment",
        ),
        (
            "server",
            "/no-signature",
            "Certificate /no-signature/server-cert.pem usage does not permit digital signature",
        ),
        (
            "server",
            "/locked",
            "Cannot load certificate '/locked/server-cert.pem' & key '/locked/server-key.pem': Decryption has failed.",
        ),
        (
            "server",
            "/wrong-key",
            "Cannot load certificate '/wrong-key/server-cert.pem' & key '/wrong-key/server-key.pem': "
            "The certificate and the given key do not match.",
        ),
        ("server", "/bad-ca-cert", "Unable to import CA certificate list /bad-ca-cert/ca-cert.pem"),
    ],
)
def test_refused_in_the_words_of_qemu(place: Place, endpoint: str, directory: str, text: str) -> None:
    with pytest.raises(QomError) as caught:
        place.credentials("t", endpoint, directory)
    assert caught.value.desc == text


@pytest.mark.parametrize(
    ("directory", "begin"),
    [
        ("/bad-server-cert", "Unable to import server certificate /bad-server-cert/server-cert.pem: "),
        ("/bad-server-key", "Cannot load certificate '/bad-server-key/server-cert.pem' & key "),
        ("/bad-ca-crl", "Cannot load CRL '/bad-ca-crl/ca-crl.pem': "),
        ("/bad-dh-params", "Unable to load DH parameters from /bad-dh-params/dh-params.pem: "),
        (
            "/stranger",
            "Our own certificate /stranger/server-cert.pem failed validation against /stranger/ca-cert.pem: "
            "The certificate hasn't got a known issuer",
        ),
    ],
)
def test_refused_with_a_reason_of_openssl(place: Place, directory: str, begin: str) -> None:
    with pytest.raises(QomError) as caught:
        place.credentials("t", "server", directory)
    assert caught.value.desc.startswith(begin)
    assert len(caught.value.desc) > len(begin) or directory == "/stranger"


def test_own_client_certificate_that_nobody_will_believe(place: Place) -> None:
    with pytest.raises(QomError, match=r"Our own certificate /stranger/client-cert\.pem failed validation"):
        place.credentials("t", "client", "/stranger")


def test_without_the_sanity_check(place: Place) -> None:
    for directory in ("/late", "/early", "/purpose", "/stranger", "/is-ca"):
        place.credentials(f"t{directory[1:]}", "server", directory, sanity_check=False)


def test_a_password(place: Place) -> None:
    server = place.credentials("s", "server", "/locked", passwordid="pw")
    client = place.credentials("c", "client", "/locked", passwordid="pw")
    shake_hands(client.session("localhost"), server.session())
    for passwordid, text in (("bad", "Decryption has failed."), ("nix", "No secret with id 'nix'")):
        with pytest.raises(QomError, match=text) as caught:
            place.credentials("t", "server", "/locked", passwordid=passwordid)
        assert PASSWORD not in caught.value.desc and "hunter2" not in caught.value.desc
    for each in (server, client):
        shown = repr(each) + repr(vars(each)) + str({name: each.get(name) for name in each.all_properties()})
        assert PASSWORD not in shown and "PRIVATE" not in shown


def test_materials_are_not_shown() -> None:
    material = contexts.Material(b"CA", b"CERT", b"KEY", b"PW", None, None)
    assert "KEY" not in repr(material) and "PW" not in repr(material)


@pytest.mark.parametrize("priority", ["", "NORMAL", "@SYSTEM", "@QEMU,SYSTEM", "SECURE128", "NORMAL:-VERS-TLS1.2"])
def test_priorities(place: Place, priority: str) -> None:
    server = place.credentials("s", "server", priority=priority)
    client = place.credentials("c", "client")
    shake_hands(client.session("localhost"), server.session())


@pytest.mark.parametrize(
    ("priority", "text"),
    [
        ("NOMRAL", "'NOMRAL' is not one of"),
        ("NORMAL:-AES-128-CBC", "OpenSSL has nothing that corresponds to '-AES-128-CBC'"),
        ("NORMAL:-VERS-ALL", "it leaves no version of TLS"),
        ("NORMAL:+VERS-TLS1.0", "asks for a version that is not offered"),
        ("NORMAL:-VERS-TLS9", "asks for a version that is not offered"),
        ("NORMAL:" * 100, "it has more than 64 words"),
        (":", "'' is not one of"),
    ],
)
def test_bad_priorities(place: Place, priority: str, text: str) -> None:
    with pytest.raises(QomError) as caught:
        place.credentials("s", "server", priority=priority)
    assert caught.value.desc.startswith(f"Unable to set TLS session priority {priority}: ")
    assert text in caught.value.desc


def test_what_priorities_mean() -> None:
    assert parse_priority("NORMAL:-VERS-ALL:+VERS-TLS1.3").versions == ("TLS1.3",)
    assert parse_priority("NORMAL:!VERS-TLS1.3:%SERVER_PRECEDENCE:+ANON-DH").versions == ("TLS1.2",)
    assert parse_priority("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2:-VERS-TLS1.0").versions == ("TLS1.2",)
    assert parse_priority("@NIX,SECURE192").level == 4
    assert parse_priority("") == parse_priority("NORMAL")


def test_anonymous_needs_tls_1_2(place: Place) -> None:
    with pytest.raises(QomError, match=r"anonymous credentials need TLS 1\.2"):
        place.credentials("a", "server", "", kind="tls-creds-anon", priority="NORMAL:-VERS-TLS1.2")
    with pytest.raises(QomError, match=r"Unable to load DH parameters from /bad-dh-params/dh-params\.pem"):
        place.credentials("a", "server", "/bad-dh-params", kind="tls-creds-anon")


def test_lists_that_nobody_would_ask_are_refused(place: Place) -> None:
    place.credentials("x", "server", verify_peer=False)
    place.credentials("a", "server", "", kind="tls-creds-anon")
    place.credentials("c", "client")
    for name, text in (
        ("x", "'x' is tls-creds-x509 with verify-peer=off"),
        ("a", "'a' is tls-creds-anon$"),
        ("c", "Expected TLS credentials for a server endpoint"),
        ("nix", "No TLS credentials with id 'nix'"),
        ("pw", "Object with id 'pw' is not TLS credentials"),
    ):
        with pytest.raises(QomError, match=text):
            server_security(place.tree, name, "list")
    with pytest.raises(QomError, match="Expected TLS credentials for a client endpoint"):
        client_security(place.tree, "x", "h")
    assert server_security(place.tree, "x").authz_id is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "Unable to access credentials /psk/keys.psk: No such file or directory"),
        (b"qemu", "Line 1 of /psk/keys.psk is not USER:HEX-KEY"),
        (b"# psktool\nqemu:0g", "Line 2 of /psk/keys.psk is not USER:HEX-KEY"),
        (b"other:00ff", "Username qemu not found in PSK file /psk/keys.psk"),
    ],
)
def test_bad_keys(place: Place, content: bytes | None, text: str) -> None:
    if content is not None:
        place.host.add_file("/psk/keys.psk", content)
    with pytest.raises(QomError) as caught:
        place.credentials("p", "client", "/psk", kind="tls-creds-psk")
    assert text in caught.value.desc


def test_keys_need_a_newer_python_or_work(place: Place) -> None:
    place.host.add_file("/psk/keys.psk", b"# comment\nfred:" + b"ab" * 32 + b"\nqemu:" + b"cd" * 32 + b"\n")
    if not contexts.HAVE_PSK:
        for endpoint in ("client", "server"):
            with pytest.raises(QomError, match=r"tls-creds-psk needs Python 3\.13 or newer") as caught:
                place.credentials("p", endpoint, "/psk", kind="tls-creds-psk")
            assert "cdcd" not in caught.value.desc
        return
    server = place.credentials("s", "server", "/psk", kind="tls-creds-psk")
    for values in ({}, {"username": "fred"}):
        client = place.credentials(f"c{len(values)}", "client", "/psk", kind="tls-creds-psk", **values)
        shake_hands(client.session(), server.session())


@pytest.mark.parametrize(
    ("pattern", "text", "matched"),
    [
        ("CN=*", "CN=x", True),
        ("*", "", True),
        ("", "", True),
        ("", "x", False),
        ("?", "x", True),
        ("?", "", False),
        ("a*b*c", "a--b--b--c", True),
        ("a*b*c", "a--c--b", False),
        ("[ab]", "a", False),
        ("[ab]", "[ab]", True),
        ("[!a]*", "[!a]x", True),
        ("*" * 50 + "b", "a" * 500, False),
        ("a*" * 50 + "b", "a" * 2000, False),
        ("x" * 9000, "x" * 9000, False),
    ],
)
def test_patterns(pattern: str, text: str, matched: bool) -> None:
    assert matches(pattern, text) is matched


def test_one_name(place: Place) -> None:
    simple = place.tree.create("authz-simple", "a", {"identity": "CN=fred"})
    assert isinstance(simple, AuthzSimple)
    assert simple.is_allowed("CN=fred") and not simple.is_allowed("CN=fred,") and not simple.is_allowed("")
    simple.set("identity", "CN=*")
    assert not simple.is_allowed("CN=x")


def test_hosts_are_only_needed_by_clients_that_look(place: Place) -> None:
    assert place.credentials("a", "client").needs_hostname
    assert not place.credentials("b", "client", verify_peer=False).needs_hostname
    assert not place.credentials("d", "client", "", kind="tls-creds-anon").needs_hostname
