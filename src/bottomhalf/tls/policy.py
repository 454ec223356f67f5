# SPDX-License-Identifier: Apache-2.0
"""What a listening socket, or one that connects, needs to know to speak TLS: which credentials, and who may come in.

    security = server_security(tree, "tls0", "auth0")
    stream = security.wrap(socket)
    Handshaking(context, stream, lambda error: ...)
    security.admit(stream)  # after the handshake

The authorisation object is looked up by name when a client comes, as QEMU does it, so that it may be made later and
replaced; who cannot be asked for because the object is not there does not come in.

QEMU ignores ``tls-authz`` where clients do not show certificates. Here such a combination is an error: whoever writes a
list believes that it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from bottomhalf.host.protocol import Socket
from bottomhalf.qom.authz import Authz
from bottomhalf.qom.object import QomObject
from bottomhalf.qom.tree import OBJECTS, Tree
from bottomhalf.qom.values import QomError
from bottomhalf.tls.der import BadCertificate, read_certificate
from bottomhalf.tls.errors import NotAdmitted
from bottomhalf.tls.objects import TlsCreds
from bottomhalf.tls.stream import TlsStream


@dataclass(frozen=True)
class Security:
    """See the module. From any thread."""

    credentials: TlsCreds
    tree: Tree
    authz_id: str | None = None
    hostname: str | None = None

    def wrap(self, socket: Socket) -> TlsStream:
        """A stream whose handshake has not begun. TlsError."""
        return TlsStream(socket, self.credentials.session(self.hostname))

    def admit(self, stream: TlsStream) -> str:
        """The name of the peer after the handshake, "" if it has shown none. NotAdmitted."""
        try:
            name = self._name(stream)
        except BadCertificate as error:  # OpenSSL has read it, and nobody else need, unless a list is asked
            if self.authz_id is not None:
                raise NotAdmitted(f"The peer's certificate cannot be read: {error}") from None
            name = ""
        if self.authz_id is None:
            return name
        authz = self.tree.user_object(self.authz_id, QomObject)
        if authz is None:
            raise NotAdmitted(f"Cannot find QAuthZ object ID {self.authz_id}")
        if not isinstance(authz, Authz):
            raise NotAdmitted(f"Object '{self.authz_id}' is not a QAuthZ subclass")
        if not name or not authz.is_allowed(name):
            raise NotAdmitted(f"TLS x509 authz check for {name} is denied")
        return name

    def _name(self, stream: TlsStream) -> str:
        der = stream.session.peer_certificate
        if der is None or not self.credentials.verify_peer:
            return ""
        return read_certificate(der).subject


def _credentials(tree: Tree, creds_id: str, endpoint: str) -> TlsCreds:
    found = tree.container(OBJECTS).children.get(creds_id)
    if found is None:
        raise QomError(f"No TLS credentials with id '{creds_id}'")
    if not isinstance(found, TlsCreds):
        raise QomError(f"Object with id '{creds_id}' is not TLS credentials")
    if found.endpoint != endpoint:
        raise QomError(f"Expected TLS credentials for a {endpoint} endpoint")
    return found


def server_security(tree: Tree, creds_id: str, authz_id: str | None = None) -> Security:
    """QomError says why not."""
    credentials = _credentials(tree, creds_id, "server")
    if authz_id is not None and not (credentials.names_peers and credentials.verify_peer):
        raise QomError(
            f"'tls-authz' needs credentials that clients prove their names with: "
            f"'{creds_id}' is {credentials.type_name}"
            + (" with verify-peer=off" if credentials.names_peers else "")
        )
    return Security(credentials, tree, authz_id)


def client_security(tree: Tree, creds_id: str, hostname: str | None) -> Security:
    """``hostname`` is the one that the server's certificate must have. QomError."""
    return Security(_credentials(tree, creds_id, "client"), tree, hostname=hostname)
