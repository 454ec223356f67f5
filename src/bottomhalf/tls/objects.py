# SPDX-License-Identifier: Apache-2.0
"""TLS credentials as objects: what ``--object tls-creds-x509,id=tls0,dir=/etc/pki/disk,endpoint=server`` makes.

A directory holds files with names that QEMU, libvirt, nbdkit and libnbd share: ``ca-cert.pem`` (whom to believe),
``server-cert.pem`` and ``server-key.pem``, ``client-cert.pem`` and ``client-key.pem`` (who we are), and if they are
there ``ca-crl.pem`` (who is not to be believed any more) and ``dh-params.pem``; for keys that both ends know
``keys.psk``. They are read once, when the object is made; whoever uses the object keeps it, even if it is deleted.

Differences from QEMU, all on the safe side: a priority that cannot be met and a revocation list that cannot be read are
errors at once and for both ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from bottomhalf.host.protocol import Host
from bottomhalf.qom.object import Property, QomObject, UserCreatable
from bottomhalf.qom.secret import lookup
from bottomhalf.qom.tree import Tree
from bottomhalf.qom.values import QomError, boolean, one_of, string

if TYPE_CHECKING:
    from bottomhalf.tls.contexts import Context, Material
    from bottomhalf.tls.priority import Priority
    from bottomhalf.tls.session import Session

FILE_BYTES_MAX: Final = 1 << 20  # of certificates or keys
KEYS_MAX: Final = 10_000  # of keys.psk
CA_CERT: Final = "ca-cert.pem"
CA_CRL: Final = "ca-crl.pem"
DH_PARAMS: Final = "dh-params.pem"
KEYS: Final = "keys.psk"
_endpoint: Final = one_of("client", "server")


class TlsCreds(QomObject, name="tls-creds", abstract=True):
    """What all kinds have."""

    properties: ClassVar[dict[str, Property]] = {
        "priority": Property.of("string", "priority", string),
        "verify-peer": Property.of("bool", "verify_peer", boolean),
        "dir": Property.of("string", "dir", string),
        "endpoint": Property.of("QCryptoTLSCredsEndpoint", "endpoint", _endpoint),
    }
    names_peers: ClassVar[bool] = False  # a client shows who it is, in a way that lists can judge

    def __init__(self) -> None:
        super().__init__()
        self.priority = ""
        self.verify_peer = True
        self.dir = ""
        self.endpoint = "client"
        self._context: Context | None = None

    def session(self, hostname: str | None = None) -> Session:
        """A new session; a client says which host it wants to reach. TlsError."""
        from bottomhalf.tls.errors import TlsError
        from bottomhalf.tls.session import Session

        assert self._context is not None
        server = self.endpoint == "server"
        if not server and self.needs_hostname and not hostname:
            raise TlsError("No hostname for certificate validation")
        return Session(self._context, server=server, hostname=None if server else hostname)

    @property
    def needs_hostname(self) -> bool:
        """Whether a client has to say whom it wants to reach."""
        return self.names_peers and self.verify_peer

    def complete(self, tree: Tree) -> None:
        from bottomhalf.tls.priority import parse_priority

        try:
            priority = parse_priority(self.priority)
        except ValueError as error:
            raise QomError(f"Unable to set TLS session priority {self.priority}: {error}") from None
        self._context = self._load(tree, self.endpoint == "server", priority)

    def _load(self, tree: Tree, server: bool, priority: Priority) -> Context:
        raise NotImplementedError

    def _path(self, name: str) -> str:
        return f"{self.dir}/{name}"

    def _require_dir(self) -> None:
        if not self.dir:
            raise QomError("Missing 'dir' property value")

    def _read(self, host: Host, name: str, *, required: bool) -> bytes | None:
        """A file of the directory; None if it is not there and need not be."""
        path = self._path(name)
        try:
            file = host.open_file(path, read_only=True, locking="off")
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not required:
                return None
            raise QomError(f"Unable to access credentials {path}: {error.strerror}") from None
        try:
            if file.size() > FILE_BYTES_MAX:
                raise QomError(f"Unable to access credentials {path}: it is larger than {FILE_BYTES_MAX} bytes")
            return file.pread(FILE_BYTES_MAX, 0)
        except OSError as error:
            raise QomError(f"Unable to access credentials {path}: {error.strerror}") from None
        finally:
            file.close()


class TlsCredsX509(TlsCreds, UserCreatable, name="tls-creds-x509"):
    """Certificates."""

    names_peers: ClassVar[bool] = True
    properties: ClassVar[dict[str, Property]] = {
        "passwordid": Property.of("string", "passwordid", string),
        "sanity-check": Property.of("bool", "sanity_check", boolean),
    }

    def __init__(self) -> None:
        super().__init__()
        self.sanity_check = True
        self.passwordid = ""

    def _load(self, tree: Tree, server: bool, priority: Priority) -> Context:
        self._require_dir()
        material = self._material(tree, server)
        from bottomhalf.tls.contexts import Refused, x509_context

        if self.sanity_check:
            self._check(tree, material, server)
        try:
            made = x509_context(
                tree.host, material, server=server, verify_peer=self.verify_peer, priority=priority
            )
        except Refused as error:
            raise QomError(self._why(error.part, error.why)) from None
        if self.sanity_check and material.certificate is not None:
            self._validate(tree.host, material, server)
        return made

    @property
    def _own(self) -> str:
        return f"{self.endpoint}-cert.pem"

    @property
    def _own_key(self) -> str:
        return f"{self.endpoint}-key.pem"

    def _material(self, tree: Tree, server: bool) -> Material:
        from bottomhalf.tls.contexts import Material

        authorities = self._read(tree.host, CA_CERT, required=True)
        revoked = self._read(tree.host, CA_CRL, required=False)
        certificate = self._read(tree.host, self._own, required=server)
        key = self._read(tree.host, self._own_key, required=server)
        dh_params = self._read(tree.host, DH_PARAMS, required=False) if server else None
        if certificate is None or key is None:  # a client that does not say who it is
            certificate = key = None
        password = lookup(tree, self.passwordid) if self.passwordid else None
        assert authorities is not None
        return Material(authorities, certificate, key, password, revoked, dh_params)

    def _why(self, part: str, why: str) -> str:
        """QEMU's sentence about a part of the material."""
        if part == "authorities":
            return f"Unable to import CA certificate list {self._path(CA_CERT)}"
        if part == "revoked":
            return f"Cannot load CRL '{self._path(CA_CRL)}': {why}"
        if part == "dh_params":
            return f"Unable to load DH parameters from {self._path(DH_PARAMS)}: {why}"
        own, key = self._path(self._own), self._path(self._own_key)
        return f"Cannot load certificate '{own}' & key '{key}': {why}"

    def _check(self, tree: Tree, material: Material, server: bool) -> None:
        """What is wrong with certificates that no handshake could succeed with, before one fails."""
        from bottomhalf.tls.contexts import first_certificates
        from bottomhalf.tls.sanity import complaint

        now_s = tree.host.realtime_ns() // 1_000_000_000
        try:
            authorities = first_certificates(material.authorities)
        except ValueError:
            raise QomError(self._why("authorities", "")) from None
        for der in authorities:
            found = complaint(der, self._path(CA_CERT), "CA", now_s)
            if found is not None:
                raise QomError(found)
        if material.certificate is None:
            return
        path, role = self._path(self._own), self.endpoint
        try:
            (own, *_) = first_certificates(material.certificate)
        except ValueError as error:
            raise QomError(f"Unable to import {role} certificate {path}: {error}") from None
        found = complaint(own, path, role, now_s)
        if found is not None:
            raise QomError(found)

    def _validate(self, host: Host, material: Material, server: bool) -> None:
        from bottomhalf.tls.contexts import Refused, validate

        try:
            verdict = validate(host, material, server=server)
        except Refused as error:
            raise QomError(self._why(error.part, error.why)) from None
        if verdict is not None:
            own, ca = self._path(self._own), self._path(CA_CERT)
            raise QomError(f"Our own certificate {own} failed validation against {ca}: {verdict}")


class TlsCredsAnon(TlsCreds, UserCreatable, name="tls-creds-anon"):
    """Nothing that proves anything."""

    def _load(self, tree: Tree, server: bool, priority: Priority) -> Context:
        from bottomhalf.tls.contexts import Refused, anonymous_context

        dh_params = self._read(tree.host, DH_PARAMS, required=False) if server and self.dir else None
        try:
            return anonymous_context(tree.host, server=server, dh_params=dh_params, priority=priority)
        except Refused as error:
            if error.part == "dh_params":
                path = self._path(DH_PARAMS)
                raise QomError(f"Unable to load DH parameters from {path}: {error.why}") from None
            raise QomError(f"Unable to set TLS session priority {self.priority}: {error.why}") from None


class TlsCredsPsk(TlsCreds, UserCreatable, name="tls-creds-psk"):
    """A key that both ends know."""

    properties: ClassVar[dict[str, Property]] = {"username": Property.of("string", "username", string)}

    def __init__(self) -> None:
        super().__init__()
        self.username = ""

    def _load(self, tree: Tree, server: bool, priority: Priority) -> Context:
        from bottomhalf.tls import contexts

        self._require_dir()
        content = self._read(tree.host, KEYS, required=True)
        assert content is not None
        keys = self._parse(content)
        username = self.username or "qemu"
        if server and self.username:
            raise QomError("username should not be set when endpoint=server")
        if not server and username not in keys:
            raise QomError(f"Username {username} not found in PSK file {self._path(KEYS)}")
        if not contexts.HAVE_PSK:
            raise QomError("tls-creds-psk needs Python 3.13 or newer, whose ssl module knows pre-shared keys")
        return contexts.psk_context(keys, server=server, username=username, priority=priority)

    def _parse(self, content: bytes) -> dict[str, bytes]:
        """``USER:HEX`` per line, as psktool writes them. The keys are in no message."""
        keys: dict[str, bytes] = {}
        for number, line in enumerate(content.splitlines(), 1):
            if not line or line.startswith(b"#"):
                continue
            user, colon, key = line.rpartition(b":")
            try:
                if not colon or not key or len(keys) >= KEYS_MAX:
                    raise ValueError
                keys[user.decode()] = bytes.fromhex(key.decode())
            except ValueError:
                raise QomError(f"Line {number} of {self._path(KEYS)} is not USER:HEX-KEY") from None
        return keys
