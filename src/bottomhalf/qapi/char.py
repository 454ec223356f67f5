# SPDX-License-Identifier: Apache-2.0
"""Character devices (qapi/char.json): ``--chardev`` and ``chardev-add``.

The command line is older than the schema: ``--chardev`` takes flat options from one list for all backends,
with other defaults (a socket is a client unless ``server=on``, and a server waits for its first client unless
``wait=off``). So there are two classes: ``ChardevOptions`` is the list, ``ChardevBackend`` what the schema
says, and ``parse_chardev`` leads from the text to the second.

    chardev = parse_chardev("socket,id=mon0,path=/tmp/qmp.sock,server=on,wait=off")
    chardev.id                        # "mon0"
    chardev.backend.branch.data       # ChardevSocket(addr=..., server=True, wait=False, ...)
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from bottomhalf.qapi.errors import OptionError, did_you_mean
from bottomhalf.qapi.sockets import SocketAddressLegacy, SocketAddressType
from bottomhalf.qapi.types import Command, Doc, OpenEnum, Struct, TaggedUnion, Uint64


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


class ChardevFile(ChardevCommon):
    """A file that output goes to."""

    input: Annotated[str | None, Doc("file that input comes from", name="in")] = None
    out: Annotated[str, Doc("file that output goes to")]
    append: Annotated[bool | None, Doc("add to the file instead of starting anew", default="off")] = None


class ChardevHostdev(ChardevCommon):
    """A device or a pipe of the host."""

    device: Annotated[str, Doc("its path; for a pipe, PATH.in and PATH.out if they are there")]


class ChardevPty(ChardevCommon):
    """A pseudo-terminal."""

    path: Annotated[str | None, Doc("make a symbolic link to it here")] = None


class ChardevMux(ChardevCommon):
    """Several users of one character device that take turns."""

    chardev: Annotated[str, Doc("the device that they share")]


class ChardevRingbuf(ChardevCommon):
    """Memory that keeps what was written last."""

    size: Annotated[int | None, Doc("bytes, a power of two", default="65536")] = None


class ChardevSocketWrapper(Struct):
    """A stream socket, wrapped."""

    data: Annotated[ChardevSocket, Doc("the options")]


class ChardevStdioWrapper(Struct):
    """Standard input and output, wrapped."""

    data: Annotated[ChardevStdio, Doc("the options")]


class ChardevFileWrapper(Struct):
    """A file, wrapped."""

    data: Annotated[ChardevFile, Doc("the options")]


class ChardevHostdevWrapper(Struct):
    """A pipe, wrapped."""

    data: Annotated[ChardevHostdev, Doc("the options")]


class ChardevPtyWrapper(Struct):
    """A pseudo-terminal, wrapped."""

    data: Annotated[ChardevPty, Doc("the options")]


class ChardevCommonWrapper(Struct):
    """Options of every character device, wrapped."""

    data: Annotated[ChardevCommon, Doc("the options")]


class ChardevMuxWrapper(Struct):
    """A multiplexer, wrapped."""

    data: Annotated[ChardevMux, Doc("the options")]


class ChardevRingbufWrapper(Struct):
    """Memory, wrapped."""

    data: Annotated[ChardevRingbuf, Doc("the options")]


class ChardevBackendKind(OpenEnum):
    """Kinds of character devices."""


class ChardevBackend(TaggedUnion, tag="type", tag_values=ChardevBackendKind):
    """A character device."""

    type: Annotated[ChardevBackendKind, Doc("its kind")]


for _kind, _wrapper, _text in (
    ("file", ChardevFileWrapper, "A file that output goes to"),
    ("pipe", ChardevHostdevWrapper, "A named pipe"),
    ("socket", ChardevSocketWrapper, "A stream socket"),
    ("pty", ChardevPtyWrapper, "A pseudo-terminal"),
    ("null", ChardevCommonWrapper, "Nobody is ever there"),
    ("mux", ChardevMuxWrapper, "Several users of one device that take turns"),
    ("stdio", ChardevStdioWrapper, "Standard input and output"),
    ("ringbuf", ChardevRingbufWrapper, "Memory that keeps what was written last"),
    ("memory", ChardevRingbufWrapper, "The old name of ringbuf"),
):
    ChardevBackend.register_branch(_kind, _wrapper, _text)


class ChardevInfo(Struct):
    """A character device that exists."""

    label: Annotated[str, Doc("its id")]
    filename: Annotated[str, Doc("what it is, with its address")]
    frontend_open: Annotated[bool, Doc("somebody uses it")]


class ChardevBackendInfo(Struct):
    """A kind of character devices."""

    name: Annotated[str, Doc("its name")]


class ChardevReturn(Struct):
    """What a new device tells."""

    pty: Annotated[str | None, Doc("name of the pseudo-terminal")] = None


class DataFormat(StrEnum):
    """How bytes are written in JSON."""

    UTF8 = "utf8"
    BASE64 = "base64"


class QueryChardev(Command, name="query-chardev", returns=list[ChardevInfo]):
    """List the character devices."""


class QueryChardevBackends(Command, name="query-chardev-backends", returns=list[ChardevBackendInfo]):
    """List the kinds of character devices."""


class ChardevAdd(Command, name="chardev-add", returns=ChardevReturn):
    """Create a character device."""

    id: Annotated[str, Doc("its id")]
    backend: Annotated[ChardevBackend, Doc("what it is")]


class ChardevChange(Command, name="chardev-change", returns=ChardevReturn):
    """Replace a character device that nobody uses by another one."""

    id: Annotated[str, Doc("the device")]
    backend: Annotated[ChardevBackend, Doc("what it is to be")]


class ChardevRemove(Command, name="chardev-remove"):
    """Remove a character device that nobody uses."""

    id: Annotated[str, Doc("the device")]


class ChardevSendBreak(Command, name="chardev-send-break"):
    """Have a device tell its user of a break, which monitors ignore."""

    id: Annotated[str, Doc("the device")]


class RingbufWrite(Command, name="ringbuf-write"):
    """Write to a ringbuf device."""

    device: Annotated[str, Doc("the device")]
    data: Annotated[str, Doc("what to write")]
    format: Annotated[DataFormat | None, Doc("how data is written", default="utf8")] = None


class RingbufRead(Command, name="ringbuf-read", returns=str):
    """Take what a ringbuf device has kept.

    Bytes that are no UTF-8 come back replaced unless the format is base64.
    """

    device: Annotated[str, Doc("the device")]
    size: Annotated[int, Doc("most bytes to take")]
    format: Annotated[DataFormat | None, Doc("how the bytes are written", default="utf8")] = None


class ChardevOptions(Struct):
    """Options of a character device (--chardev)."""

    backend: Annotated[str, Doc("kind of the device")]
    id: Annotated[str, Doc("the device's id")]
    path: Annotated[str | None, Doc("path of a Unix socket, a file, a pipe, or a link to a pty")] = None
    input_path: Annotated[str | None, Doc("file: where input comes from")] = None
    append: Annotated[bool | None, Doc("file: add to it instead of starting anew", default="off")] = None
    size: Annotated[Uint64 | None, Doc("ringbuf: bytes, a power of two", default="65536")] = None
    chardev: Annotated[str | None, Doc("mux: the device that is shared")] = None
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
    ("clipboard", "cols", "debug", "height", "localaddr", "localport", "mouse", "name", "rows", "width")
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
    result = ChardevBackend(type=ChardevBackendKind(backend), branch=_branch(backend, options))
    return Chardev(id, result, bool(options.mux), opts.warnings)


def _branch(backend: str, options: ChardevOptions) -> Struct:
    log: dict[str, Any] = {"logfile": options.logfile, "logappend": options.logappend}
    if backend == "socket":
        return _socket(options)
    if backend == "stdio":
        signal = True if options.signal is None else options.signal
        return ChardevStdioWrapper(data=ChardevStdio(signal=signal, **log))
    if backend == "null":
        return ChardevCommonWrapper(data=ChardevCommon(**log))
    if backend in ("ringbuf", "memory"):
        return ChardevRingbufWrapper(data=ChardevRingbuf(size=options.size, **log))
    if backend == "pty":
        return ChardevPtyWrapper(data=ChardevPty(path=options.path, **log))
    if backend == "mux":
        if options.chardev is None:
            raise OptionError("chardev: mux: no chardev given", key="chardev")
        return ChardevMuxWrapper(data=ChardevMux(chardev=options.chardev, **log))
    if options.path is None:
        what = "device" if backend == "pipe" else "filename"
        raise OptionError(f"chardev: {backend}: no {what} given", key="path")
    if backend == "pipe":
        return ChardevHostdevWrapper(data=ChardevHostdev(device=options.path, **log))
    data = ChardevFile(out=options.path, input=options.input_path, append=options.append, **log)
    return ChardevFileWrapper(data=data)


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
    if options.tls_creds is not None and options.addr.type == SocketAddressType.UNIX:
        raise OptionError("'tls_creds' option is incompatible with 'unix' address type", key="tls-creds")
    if options.tls_authz is not None and options.tls_creds is None:
        raise OptionError("'tls_authz' option requires 'tls_creds' option", key="tls-authz")
    if options.tls_authz is not None and not server:
        raise OptionError("'tls_authz' option is for sockets that listen", key="tls-authz")
    if not server and options.websocket:
        raise OptionError("Websocket client is not implemented", key="websocket")
