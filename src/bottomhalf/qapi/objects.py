# SPDX-License-Identifier: Apache-2.0
"""User-creatable objects (qapi/qom.json): ``--object`` and ``object-add``.

The object types are a registry: ``ObjectOptions.register_branch("throttle-group", ...)``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from bottomhalf.qapi.throttle import ThrottleGroupProperties
from bottomhalf.qapi.types import Command, Doc, OpenEnum, Struct, TaggedUnion


class ObjectType(OpenEnum):
    """Types of objects that a user may create."""


class ObjectOptions(TaggedUnion, tag="qom-type", tag_values=ObjectType):
    """Options of an object."""

    qom_type: Annotated[ObjectType, Doc("the object's type")]
    id: Annotated[str, Doc("the object's id")]


class EventLoopBaseProperties(Struct):
    """Properties of an event loop."""

    aio_max_batch: Annotated[
        int | None, Doc("most requests submitted to the engine at once; 0 chooses", default="0")
    ] = None
    thread_pool_min: Annotated[int | None, Doc("threads kept when idle", default="0")] = None
    thread_pool_max: Annotated[int | None, Doc("threads at most", default="64")] = None


class IothreadProperties(EventLoopBaseProperties):
    """A thread with an event loop of its own."""

    poll_max_ns: Annotated[
        int | None, Doc("nanoseconds to poll before sleeping; 0 does not poll", default="32768")
    ] = None
    poll_grow: Annotated[int | None, Doc("factor by which polling grows; 0 chooses", default="0")] = None
    poll_shrink: Annotated[int | None, Doc("divisor by which polling shrinks; 0 chooses", default="0")] = None


class MainLoopProperties(EventLoopBaseProperties):
    """The event loop of the main thread."""


class QCryptoSecretFormat(StrEnum):
    """How a secret is written."""

    RAW = "raw"
    BASE64 = "base64"


class SecretCommonProperties(Struct):
    """Properties of all kinds of secrets."""

    format: Annotated[QCryptoSecretFormat, Doc("how the secret is written")] = QCryptoSecretFormat.RAW
    keyid: Annotated[str | None, Doc("secret that holds the key that this one is encrypted with")] = None
    iv: Annotated[str | None, Doc("initialization vector of the encryption, in base64")] = None


class SecretProperties(SecretCommonProperties):
    """A password or a key that other options refer to."""

    data: Annotated[str | None, Doc("the secret itself; others can read it in the list of processes")] = None
    file: Annotated[str | None, Doc("file that holds the secret")] = None


class QAuthZListPolicy(StrEnum):
    """Whether somebody may come in."""

    DENY = "deny"
    ALLOW = "allow"


class QAuthZListFormat(StrEnum):
    """How a rule's pattern is compared."""

    EXACT = "exact"
    GLOB = "glob"


class QAuthZListRule(Struct):
    """A rule of an access list."""

    match: Annotated[str, Doc("name of the client, or a pattern of names")]
    policy: Annotated[QAuthZListPolicy, Doc("whether it may come in")]
    format: Annotated[QAuthZListFormat | None, Doc("how match is compared", default="exact")] = None


class AuthZListProperties(Struct):
    """A list of rules that says who may come in."""

    policy: Annotated[QAuthZListPolicy | None, Doc("what holds where no rule matches", default="deny")] = None
    rules: Annotated[list[QAuthZListRule] | None, Doc("the rules; the first that matches decides")] = None


class AuthZSimpleProperties(Struct):
    """One name that may come in."""

    identity: Annotated[str, Doc("name of the client, as it is in its certificate")]


class QCryptoTLSCredsEndpoint(StrEnum):
    """Which end of a TLS connection."""

    CLIENT = "client"
    SERVER = "server"


class TlsCredsProperties(Struct):
    """Properties of all kinds of TLS credentials."""

    verify_peer: Annotated[bool | None, Doc("the other end has to show a certificate", default="on")] = None
    dir: Annotated[str | None, Doc("directory that holds the files of the credentials")] = None
    endpoint: Annotated[QCryptoTLSCredsEndpoint | None, Doc("which end they are for", default="client")] = None
    priority: Annotated[
        str | None, Doc("versions and ciphers, as GnuTLS writes them", default="NORMAL")
    ] = None


class TlsCredsAnonProperties(TlsCredsProperties):
    """TLS credentials that prove nothing: only who listens in is kept out."""


class TlsCredsPskProperties(TlsCredsProperties):
    """TLS credentials that are a key which both ends know."""

    username: Annotated[str | None, Doc("whose key it is (clients)", default="qemu")] = None


class TlsCredsX509Properties(TlsCredsProperties):
    """TLS credentials that are certificates."""

    sanity_check: Annotated[bool | None, Doc("look whether the certificates can work", default="on")] = None
    passwordid: Annotated[str | None, Doc("secret that the key's file is encrypted with")] = None


ObjectOptions.register_branch("authz-list", AuthZListProperties)
ObjectOptions.register_branch("authz-simple", AuthZSimpleProperties)
ObjectOptions.register_branch("iothread", IothreadProperties)
ObjectOptions.register_branch("main-loop", MainLoopProperties)
ObjectOptions.register_branch("secret", SecretProperties)
ObjectOptions.register_branch("throttle-group", ThrottleGroupProperties)
ObjectOptions.register_branch("tls-creds-anon", TlsCredsAnonProperties)
ObjectOptions.register_branch("tls-creds-psk", TlsCredsPskProperties)
ObjectOptions.register_branch("tls-creds-x509", TlsCredsX509Properties)


class ObjectAdd(Command, name="object-add", boxed=ObjectOptions):
    """Create an object."""


class ObjectDel(Command, name="object-del"):
    """Remove an object that nobody uses."""

    id: Annotated[str, Doc("the object")]
