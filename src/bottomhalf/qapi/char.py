# SPDX-License-Identifier: Apache-2.0
"""Character devices (qapi/char.json): ``--chardev`` and, later, ``chardev-add``.

The command line is older than the schema: ``--chardev`` takes flat options from one list for all backends,
with other defaults (a socket is a client unless ``server=on``, and a server waits for its first client unless
``wait=off``). So there are two classes: ``ChardevOptions`` is the list, ``ChardevBackend`` what the schema
says, and ``parse_chardev`` leads from the text to the second.

    chardev = parse_chardev("socket,id=mon0,path=/tmp/qmp.sock,server=on,wait=off")
    chardev.id                        # "mon0"
    chardev.backend.branch.data       # ChardevSocket(addr=..., server=True, wait=False, ...)
"""

from __future__ import annotations

from typing import Annotated, Any

from bottomhalf.qapi.errors import OptionError, did_you_mean
from bottomhalf.qapi.sockets import SocketAddressLegacy, SocketAddressType
from bottomhalf.qapi.types import Doc, OpenEnum, Struct, TaggedUnion


class ChardevCommon(Struct):
    """Options of every character device."""

    logfile: Annotated[str | None, Doc("file that output is logged to")] = None
    logappend: Annotated[bool | None, Doc("append to logfile instead of starting anew", default="off")] = None


class ChardevSocket(ChardevCommon):
    """A stream socket."""

    addr: Annotated[SocketAddressLegacy, Doc("where to listen or what to connect to")]
    tls_creds: Annotated[str | None, Doc("TLS credentials object")] = None
    tls_authz: Annotated[str | None, Doc("authorisation object that judges TLS clients")] = None
    server: Annotated[bool | None, Doc("listen", default="on; off for --chardev")] = None
    wait: Annotated[
        bool | None, Doc("wait for the first client before going on", default="off; on for --chardev")
    ] = None
    nodelay: Annotated[bool | None, Doc("send small packets at once (TCP_NODELAY)", default="off")] = None
    telnet: Annotated[bool | None, Doc("speak the telnet protocol", default="off")] = None
    tn3270: Annotated[bool | None, Doc("speak the tn3270 protocol", default="off")] = None
    websocket: Annotated[bool | None, Doc("speak the websocket protocol", default="off")] = None
    reconnect: Annotated[
        int | None, Doc("seconds before connecting again, 0 for never", default="0", features=("deprecated",))
    ] = None
    reconnect_ms: Annotated[
        int | None, Doc("milliseconds before connecting again, 0 for never", default="0")
    ] = None


class ChardevStdio(ChardevCommon):
    """Standard input and output."""

    signal: Annotated[bool | None, Doc("^C and its kin are signals, not input", default="on")] = None


class ChardevSocketWrapper(Struct):
    """A stream socket, wrapped."""

    data: Annotated[ChardevSocket, Doc("the options")]


class ChardevStdioWrapper(Struct):
    """Standard input and output, wrapped."""

    data: Annotated[ChardevStdio, Doc("the options")]


class ChardevBackendKind(OpenEnum):
    """Kinds of character devices."""


class ChardevBackend(TaggedUnion, tag="type", tag_values=ChardevBackendKind):
    """A character device."""

    type: Annotated[ChardevBackendKind, Doc("its kind")]


ChardevBackend.register_branch("socket", ChardevSocketWrapper, "A stream socket")
ChardevBackend.register_branch("stdio", ChardevStdioWrapper, "Standard input and output")


class ChardevOptions(Struct):
    """Options of a character device (--chardev)."""

    backend: Annotated[str, Doc("kind of the device")]
    id: Annotated[str, Doc("the device's id")]
    path: Annotated[str | None, Doc("path of a Unix socket")] = None
    host: Annotated[str | None, Doc("host name or address of a TCP socket")] = None
    port: Annotated[str | None, Doc("port of a TCP socket")] = None
    fd: Annotated[str | None, Doc("a socket that is open already")] = None
    to: Annotated[int | None, Doc("listen on the first free port from port to this one")] = None
    ipv4: Annotated[bool | None, Doc("use IPv4")] = None
    ipv6: Annotated[bool | None, Doc("use IPv6")] = None
    abstract: Annotated[bool | None, Doc("path is an abstract name", default="off")] = None
    tight: Annotated[bool | None, Doc("an abstract name is not padded with zero bytes", default="on")] = None
    server: Annotated[bool | None, Doc("listen instead of connecting", default="off")] = None
    wait: Annotated[bool | None, Doc("a server waits for its first client", default="on")] = None
    nodelay: Annotated[bool | None, Doc("send small packets at once", default="off")] = None
    delay: Annotated[bool | None, Doc("the opposite of nodelay", features=("deprecated",))] = None
    telnet: Annotated[bool | None, Doc("speak the telnet protocol", default="off")] = None
    tn3270: Annotated[bool | None, Doc("speak the tn3270 protocol", default="off")] = None
    websocket: Annotated[bool | None, Doc("speak the websocket protocol", default="off")] = None
    reconnect: Annotated[
        int | None, Doc("a client: seconds before connecting again", default="0", features=("deprecated",))
    ] = None
    reconnect_ms: Annotated[
        int | None, Doc("a client: milliseconds before connecting again", default="0")
    ] = None
    tls_creds: Annotated[str | None, Doc("TLS credentials object")] = None
    tls_authz: Annotated[str | None, Doc("authorisation object that judges TLS clients")] = None
    signal: Annotated[bool | None, Doc("stdio: ^C and its kin are signals", default="on")] = None
    mux: Annotated[bool | None, Doc("several users take turns", default="off")] = None
    logfile: Annotated[str | None, Doc("file that output is logged to")] = None
    logappend: Annotated[bool | None, Doc("append to logfile", default="off")] = None


# Options that QEMU's list has for backends that are not here; accepted and without effect, as there.
_FOREIGN_OPTIONS = frozenset(
    ("append", "chardev", "clipboard", "cols", "debug", "height", "input-path", "localaddr", "localport",
     "mouse", "name", "rows", "size", "width")
)  # fmt: skip


class Chardev:
    """A character device to create: its ``id``, the ``backend``, whether it is a ``mux``.

    ``warnings`` are to be printed first.
    """

    __slots__ = ("backend", "id", "mux", "warnings")

    def __init__(self, id: str, backend: ChardevBackend, mux: bool, warnings: list[str]) -> None:
        self.id = id
        self.backend = backend
        self.mux = mux
        self.warnings = warnings


def parse_chardev(text: str) -> Chardev:
    """Read the argument of ``--chardev``. Raises OptionError and HelpRequested."""
    from bottomhalf.qapi.errors import HelpRequested
    from bottomhalf.qapi.qemu_opts import parse_qemu_opts
    from bottomhalf.qapi.types import members
    from bottomhalf.qapi.visit import from_keyval

    opts = parse_qemu_opts(text, implied_key="backend")
    if opts.help:
        raise HelpRequested(ChardevOptions, "backend")
    known = [member.name for member in members(ChardevOptions)]
    for name in opts.values:
        if name not in known and name not in _FOREIGN_OPTIONS:
            raise OptionError(f"Invalid parameter '{name}'", key=name, hint=did_you_mean(name, known))
    values = {name: value for name, value in opts.values.items() if name not in _FOREIGN_OPTIONS}
    id = values.setdefault("id", "")
    backend = values.get("backend")
    if backend is None:
        raise OptionError(f'chardev: "{id or "(null)"}" missing backend', key="backend")
    if not id:
        raise OptionError("chardev: no id specified", key="id", hint="Give it a name: id=NAME.")
    if backend not in ChardevBackendKind.values:
        kinds = list(ChardevBackendKind.values)
        hint = did_you_mean(backend, kinds) or f"There are {', '.join(kinds)}."
        raise OptionError(f"'{backend}' is not a valid char driver name", key="backend", hint=hint)
    options = from_keyval(ChardevOptions, values)
    data = _socket(options) if backend == "socket" else _stdio(options)
    result = ChardevBackend(type=ChardevBackendKind(backend), branch=data)
    return Chardev(id, result, bool(options.mux), opts.warnings)


def _stdio(options: ChardevOptions) -> ChardevStdioWrapper:
    signal = True if options.signal is None else options.signal
    data = ChardevStdio(logfile=options.logfile, logappend=options.logappend, signal=signal)
    return ChardevStdioWrapper(data=data)


def _socket(options: ChardevOptions) -> ChardevSocketWrapper:
    if options.delay is not None and options.nodelay is not None:
        raise OptionError("'delay' and 'nodelay' are mutually exclusive", key="delay")
    if options.reconnect is not None and options.reconnect_ms is not None:
        raise OptionError("'reconnect' and 'reconnect-ms' are mutually exclusive", key="reconnect")
    server = bool(options.server)
    wait = options.wait
    if server and wait is None:
        wait = True
    data = ChardevSocket(
        logfile=options.logfile,
        logappend=options.logappend,
        addr=_address(options),
        tls_creds=options.tls_creds,
        tls_authz=options.tls_authz,
        server=server,
        wait=wait,
        nodelay=not options.delay if options.delay is not None else options.nodelay,
        telnet=options.telnet,
        tn3270=options.tn3270,
        websocket=options.websocket,
        reconnect=options.reconnect,
        reconnect_ms=options.reconnect_ms,
    )
    check_chardev_socket(data)
    return ChardevSocketWrapper(data=data)


def _address(options: ChardevOptions) -> SocketAddressLegacy:
    from bottomhalf.qapi.visit import from_json

    given = [value for value in (options.path, options.host, options.fd) if value is not None]
    if len(given) > 1:
        raise OptionError("None or one of 'path', 'fd' or 'host' option required.", key="path")
    if options.host is not None and options.port is None:
        raise OptionError("chardev: socket: no port given", key="port")
    if not given:
        raise OptionError("chardev: socket: no path, host or fd given", key="path")
    data: dict[str, Any]
    if options.path is not None:
        kind = SocketAddressType.UNIX
        data = {"path": options.path, "abstract": options.abstract, "tight": options.tight}
    elif options.host is not None:
        kind = SocketAddressType.INET
        data = {
            "host": options.host,
            "port": options.port,
            "to": options.to,
            "ipv4": options.ipv4,
            "ipv6": options.ipv6,
        }
    else:
        kind = SocketAddressType.FD
        data = {"str": options.fd}
    given_data = {name: value for name, value in data.items() if value is not None}
    return from_json(SocketAddressLegacy, {"type": kind, "data": given_data})


def check_chardev_socket(options: ChardevSocket) -> None:
    """Options that exclude each other, for the command line and ``chardev-add`` alike. Raises OptionError."""
    server = options.server is not False
    if server and (options.reconnect is not None or options.reconnect_ms is not None):
        raise OptionError(
            "'reconnect' option is incompatible with socket in server listen mode", key="reconnect"
        )
    if not server and options.wait is not None:
        raise OptionError("'wait' option is incompatible with socket in client connect mode", key="wait")
    if not server and options.websocket:
        raise OptionError("Websocket client is not implemented", key="websocket")
