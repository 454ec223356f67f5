# SPDX-License-Identifier: Apache-2.0
"""Both ends of a TLS session for tests: credentials on a simulated disk, sessions with only memory in between."""

from __future__ import annotations

from functools import cache
from typing import Any

from bottomhalf.host.sim import Odds, SimHost
from bottomhalf.qom.tree import Tree
from bottomhalf.tls.objects import TlsCreds
from bottomhalf.tls.policy import Security, client_security, server_security
from bottomhalf.tls.session import Session
from tests.peers.certificates import NOW, Authority, Issued, files

HOSTS = ("localhost", "127.0.0.1", "::1")


@cache
def authority(name: str = "Test CA") -> Authority:
    return Authority(name)


@cache
def server_certificate() -> Issued:
    return authority().issue("localhost", hosts=HOSTS)


@cache
def client_certificate() -> Issued:
    return authority().issue("fred")


class Place:
    """A host with credentials on its disk, and the objects made of them."""

    def __init__(self, host: SimHost | None = None, tree: Tree | None = None) -> None:
        self.host = host or SimHost(0, odds=Odds.calm())
        self.tree = tree or Tree(self.host)
        # OpenSSL looks at the real clock; certificates are judged by both.
        self.host.jump_realtime(int(NOW.timestamp()) * 1_000_000_000 - self.host.realtime_ns())
        self.add("/good", server=server_certificate(), client=client_certificate())

    def add(self, directory: str, by: Authority | None = None, **issued: Any) -> None:
        """A directory of credentials; of the usual authority if not told otherwise."""
        for name, content in files(by or authority(), **issued).items():
            self.host.add_file(f"{directory}/{name}", content)

    def credentials(self, name: str, endpoint: str, directory: str = "/good", **values: Any) -> TlsCreds:
        values = {key.replace("_", "-"): value for key, value in values.items()}
        kind = values.pop("kind", "tls-creds-x509")
        if directory:
            values["dir"] = directory
        made = self.tree.create(kind, name, {"endpoint": endpoint, **values})
        assert isinstance(made, TlsCreds)
        return made

    def server(self, authz: str | None = None, **values: Any) -> Security:
        name = f"s{len(self.tree.user_objects(TlsCreds))}"
        self.credentials(name, "server", **values)
        return server_security(self.tree, name, authz)

    def client(self, hostname: str | None = "localhost", **values: Any) -> Security:
        name = f"c{len(self.tree.user_objects(TlsCreds))}"
        self.credentials(name, "client", **values)
        return client_security(self.tree, name, hostname)


def sessions(place: Place | None = None, **values: Any) -> tuple[Session, Session]:
    """A client's and a server's, before the handshake."""
    place = place or Place()
    client, server = place.client(**values), place.server(**values)
    return client.credentials.session(client.hostname), server.credentials.session()


def shake_hands(client: Session, server: Session, cut: int = 1 << 20) -> None:
    """Bring both ends through the handshake, the bytes in pieces of ``cut``. TlsError."""
    for _ in range(32):
        done = client.handshake() and server.handshake()
        moved = False
        for sender, receiver in ((client, server), (server, client)):
            sender.handshake()
            data = sender.take_output()
            moved = moved or bool(data)
            for at in range(0, len(data), cut):
                receiver.receive(data[at : at + cut])
                receiver.handshake()
        if done and not moved:
            return
    raise AssertionError("the handshake does not end")
