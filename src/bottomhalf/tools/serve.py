# SPDX-License-Identifier: Apache-2.0
"""bottomhalf serve IMAGE: the friendly way to put a disk image on a socket.

It finds out what the image is, picks a socket, says what to paste into other programs, shows what is going on
while it does, and ends on Ctrl-C with everything written.
"""

from __future__ import annotations

import errno
import shlex
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from bottomhalf.host.linux import paths
from bottomhalf.tools.getopt import VALUE, Option, UsageError, fail, parse

if TYPE_CHECKING:
    from bottomhalf.exports.nbd.export import NbdExport
    from bottomhalf.exports.nbd.server import NbdServer
    from bottomhalf.host.protocol import Address
    from bottomhalf.monitor.storage import Storage
    from bottomhalf.tls.policy import Security

PROGRAM: Final = "bottomhalf serve"
REFRESH_NS: Final = 500_000_000
PORT_DEFAULT: Final = 10809  # IANA's for NBD
BIND_DEFAULT: Final = "127.0.0.1"

OPTIONS: Final = (
    Option("help", "h"),
    Option("socket", "k", VALUE),
    Option("port", "p", VALUE),
    Option("bind", "b", VALUE),
    Option("name", "x", VALUE),
    Option("format", "f", VALUE),
    Option("backing-files"),
    Option("read-only", "r"),
    Option("direct", "n"),
    Option("tls", takes=VALUE),
    Option("tls-anyone"),
    Option("tls-allow", takes=VALUE),
    Option("qmp", takes=VALUE),
    Option("quiet", "q"),
)

HELP: Final = f"""\
Usage: bottomhalf serve [options] IMAGE
Serve a disk image over NBD until Ctrl-C.

  -k, --socket PATH   listen on a Unix socket (default: one is picked)
  -p, --port PORT     listen on TCP instead ({PORT_DEFAULT} is NBD's port; 0 picks a free one)
  -b, --bind HOST     with --port: address to listen on (default: {BIND_DEFAULT})
  -x, --name NAME     name of the export (default: the image's name)
  -f, --format FMT    format of the image, raw or qcow2 (default: found out); "raw" serves the bytes as they are
      --backing-files open the backing and data files that the image names
  -r, --read-only     refuse writes
  -n, --direct        bypass the page cache (O_DIRECT)
      --tls DIR       clients must use TLS, and show a certificate; DIR has ca-cert.pem, server-cert.pem, server-key.pem
      --tls-anyone    with --tls: clients need no certificate
      --tls-allow DN  with --tls: only clients with this name in their certificate; may be given several times
      --qmp PATH      also take QMP commands on this Unix socket
  -q, --quiet         print only the URI
  -h, --help          display this help and exit

Example:
  bottomhalf serve disk.raw
"""


class Settings:
    """What the command line says. UsageError as soon as something is wrong; help ends the reading."""

    help = False
    socket: str | None = None
    port: int | None = None
    bind: str | None = None
    name: str | None = None
    format: str | None = None
    backing_files = False
    read_only = False
    direct = False
    tls: str | None = None
    tls_anyone = False
    qmp: str | None = None
    quiet = False

    def __init__(self, arguments: list[str]) -> None:
        images = []
        self.tls_allow: list[str] = []
        for name, value, _ in parse(arguments, OPTIONS):
            if name == "":
                images.append(value)
            elif name == "port":
                if not value.isdecimal() or int(value) > 65535:
                    raise UsageError(f"port '{value}' is not a number from 0 to 65535")
                self.port = int(value)
            elif name == "help":
                self.help = True
                return
            elif name == "tls-allow":
                self.tls_allow.append(value)
            elif name in ("backing-files", "read-only", "direct", "quiet", "tls-anyone"):
                setattr(self, name.replace("-", "_"), True)
            else:
                setattr(self, name, value)
        if len(images) != 1:
            raise UsageError("give one image" if images else "no image given")
        if self.socket is not None and self.port is not None:
            raise UsageError("--socket and --port exclude each other")
        if self.bind is not None and self.port is None:
            raise UsageError("--bind goes with --port")
        if self.tls is None and (self.tls_anyone or self.tls_allow):
            raise UsageError("--tls-anyone and --tls-allow go with --tls")
        if self.tls_anyone and self.tls_allow:
            raise UsageError("--tls-anyone and --tls-allow exclude each other")
        self.image = images[0]
        if self.name is None:
            base = paths.absolute(self.image).rpartition("/")[2]
            self.name = base.rpartition(".")[0] or base


def main(arguments: list[str]) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; the exit status."""
    try:
        settings = Settings(arguments)
    except UsageError as error:
        fail(PROGRAM, str(error), error.hint or "Try 'bottomhalf serve --help' for more information.")
    if settings.help:
        print(HELP, end="")
        return 0
    return _serve(settings)


def _serve(settings: Settings) -> int:
    from bottomhalf.block import BlockError
    from bottomhalf.monitor.storage import Storage
    from bottomhalf.qapi.errors import OptionError

    screen = Screen(quiet=settings.quiet)
    storage = Storage(log=screen.log)
    try:
        storage.watch_signals()
        try:
            export, server = _set_up(storage, settings)
        except (BlockError, OptionError) as error:
            fail(PROGRAM, str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(PROGRAM, f"{where}{error.strerror or error}")
        assert server.address is not None
        _introduce(settings, export, uri(server.address, export.name, tls=settings.tls is not None))
        screen.watch(storage, export, server)
        storage.run_forever()
        screen.end()
    finally:
        storage.close()
    if not settings.quiet:
        counts = export.statistics
        print(
            f"served {counts.reads} reads and {counts.writes} writes "
            f"to {server.clients_seen} client{'s' * (server.clients_seen != 1)}; everything is written"
        )
    return 0


def _set_up(storage: Storage, settings: Settings) -> tuple[NbdExport, NbdServer]:
    from bottomhalf.drivers.registry import file_driver
    from bottomhalf.qapi.block import BlockdevOptions
    from bottomhalf.qapi.export import BlockExportOptions
    from bottomhalf.qapi.visit import from_json

    settings.format = _format(storage, settings)
    settings.read_only = settings.read_only or not _may_write(storage, settings.image)
    file = {
        "driver": file_driver(storage.graph, settings.image),
        "filename": settings.image,
        "discard": "unmap",
        "read-only": settings.read_only,
        "cache": {"direct": settings.direct},
    }
    node = storage.add_node(
        from_json(
            BlockdevOptions,
            {
                "driver": settings.format,
                "node-name": "image",
                "discard": "unmap",
                "read-only": settings.read_only,
                "file": file,
            },
        ),
        follow_names=settings.backing_files,
    )
    server = _listen(storage, settings)
    export = storage.exports.add(
        from_json(
            BlockExportOptions,
            {
                "type": "nbd",
                "id": "serve",
                "node-name": "image",
                "name": settings.name,
                "writable": not node.read_only,
            },
        ),
        exclusive=not node.read_only,
    )
    if settings.qmp is not None:
        _take_commands(storage, settings.qmp)
    return export, server


def _may_write(storage: Storage, path: str) -> bool:
    """Whether the image can be opened for writing. Any other trouble is told when it is opened."""
    try:
        storage.host.open_file(path, locking="off").close()
    except PermissionError:
        return False
    except OSError as error:
        return error.errno != errno.EROFS
    return True


def _format(storage: Storage, settings: Settings) -> str:
    """The image's format; what this version cannot read is refused, unless the user says that the bytes are meant."""
    from bottomhalf.block import BlockError
    from bottomhalf.tools.formats import KNOWN, image_format

    if settings.format in KNOWN:
        return settings.format
    if settings.format is not None:
        raise BlockError(f"Unknown format '{settings.format}'; this version serves {' and '.join(KNOWN)}")
    found = image_format(storage.host, settings.image)
    if found not in KNOWN:
        raise BlockError(
            f"'{settings.image}' is a {found} image, which this version cannot read yet\n"
            "To serve its bytes as they are, say --format raw"
        )
    return found


def _listen(storage: Storage, settings: Settings) -> NbdServer:
    from bottomhalf.exports.nbd.server import CONNECTIONS_MAX_DEFAULT, HANDSHAKE_SECONDS_MAX_DEFAULT
    from bottomhalf.host.protocol import InetAddress, UnixAddress

    limits: dict[str, Any] = {
        "connections_max": CONNECTIONS_MAX_DEFAULT,
        "handshake_seconds_max": HANDSHAKE_SECONDS_MAX_DEFAULT,
        "security": _security(storage, settings),
    }
    if settings.port is not None:
        return storage.exports.start_nbd_server(InetAddress(settings.bind or BIND_DEFAULT, settings.port), **limits)
    if settings.socket is not None:
        return storage.exports.start_nbd_server(UnixAddress(paths.absolute(settings.socket)), **limits)
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in settings.name or "")[:40]
    return storage.exports.start_nbd_server(
        UnixAddress(paths.free_socket_path(f"bottomhalf-{stem}")), **limits
    )


def _security(storage: Storage, settings: Settings) -> Security | None:
    """From --tls and its kin to the objects that a storage daemon would be given."""
    if settings.tls is None:
        return None
    from bottomhalf.qapi.objects import ObjectOptions
    from bottomhalf.qapi.visit import from_json

    creds = {
        "qom-type": "tls-creds-x509",
        "id": "tls",
        "dir": paths.absolute(settings.tls),
        "endpoint": "server",
        "verify-peer": not settings.tls_anyone,
    }
    storage.add_object(from_json(ObjectOptions, creds))
    if not settings.tls_allow:
        return storage.server_security("tls", None)
    rules = [{"match": name, "policy": "allow"} for name in settings.tls_allow]
    storage.add_object(from_json(ObjectOptions, {"qom-type": "authz-list", "id": "allowed", "rules": rules}))
    return storage.server_security("tls", "allowed")


def _take_commands(storage: Storage, path: str) -> None:
    from bottomhalf.chardev.socket import SocketServerChardev
    from bottomhalf.host.protocol import UnixAddress
    from bottomhalf.monitor.qmp import QmpMonitor

    chardev = SocketServerChardev("qmp", storage.loop.iohandler, UnixAddress(paths.absolute(path)), wait=False)
    storage.chardevs["qmp"] = chardev
    QmpMonitor(storage, chardev)
    chardev.start()


def uri(address: Address, name: str, *, tls: bool = False) -> str:
    """The NBD URI of an export, as the specification writes it."""
    from bottomhalf.host.protocol import UnixAddress

    scheme = "nbds" if tls else "nbd"
    if isinstance(address, UnixAddress):
        return f"{scheme}+unix:///{quote(name, safe='')}?socket={quote(address.path)}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{scheme}://{host}:{address.port}/{quote(name, safe='')}"


def _introduce(settings: Settings, export: NbdExport, where: str) -> None:
    from bottomhalf.tools.units import binary_size

    if settings.quiet:
        print(where, flush=True)
        return
    kind = "writable" if export.writable else "read-only"
    print(
        f"serving {settings.image} ({settings.format}, {binary_size(export.backend.size)}, {kind})\n"
        f"\n  {where}\n\n{_suggestions(settings, where)}\nCtrl-C ends it.",
        flush=True,
    )


def _suggestions(settings: Settings, where: str) -> str:
    """What to do with the URI."""
    if settings.tls is not None:
        theirs = "ca-cert.pem" + ("" if settings.tls_anyone else ", client-cert.pem, client-key.pem")
        quoted = shlex.quote(where + ("&" if "?" in where else "?") + "tls-certificates=DIR")
        return f"  copy it      nbdcopy {quoted} copy.raw\n               (the client's DIR has {theirs})\n"
    quoted = shlex.quote(where)
    return (
        f"  copy it      nbdcopy {quoted} copy.raw\n"
        f"  look at it   qemu-img info {quoted}\n"
        f"  measure it   fio --name=disk --ioengine=nbd --uri={quoted} --rw=randread --bs=4k --iodepth=32 "
        "--runtime=10 --time_based\n"
    )


class Screen:
    """One line on the terminal that shows what is going on; nothing where there is no terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._live = sys.stdout.isatty() and not quiet
        self._shown = False

    def log(self, line: str) -> None:
        self._clear()
        print(f"bottomhalf: {line}", file=sys.stderr, flush=True)

    def watch(self, storage: Storage, export: NbdExport, server: NbdServer) -> None:
        """Refresh the line twice a second from now on."""
        if not self._live:
            return
        context = storage.loop.iohandler
        before = replace(export.statistics)
        before_ns = context.now_ns()

        def refresh() -> None:
            nonlocal before, before_ns
            now, now_ns = replace(export.statistics), context.now_ns()
            seconds = (now_ns - before_ns) / 1e9
            self._show(_line(export, server, before, now, seconds))
            before, before_ns = now, now_ns
            timer.arm_ns(now_ns + REFRESH_NS)

        timer = context.timer(refresh, name="screen")
        timer.arm_ns(before_ns + REFRESH_NS)

    def _show(self, line: str) -> None:
        columns = paths.terminal_columns(sys.stdout.fileno())
        sys.stdout.write(f"\r\x1b[K{line[: columns - 1]}")
        sys.stdout.flush()
        self._shown = True

    def _clear(self) -> None:
        if self._shown:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()
            self._shown = False

    def end(self) -> None:
        self._clear()


def _line(export: NbdExport, server: NbdServer, before: object, now: object, seconds: float) -> str:
    from bottomhalf.tools.units import binary_size, duration, rate

    def per_second(name: str) -> float:
        difference: float = getattr(now, name) - getattr(before, name)
        return difference / max(seconds, 1e-9)

    answered = per_second("answered")
    clients = len(server.connections)
    in_flight = sum(connection.in_flight for connection in export.connections)
    latency = duration(per_second("latency_ns") / answered) if answered else "-"
    return (
        f"{clients} client{'s' * (clients != 1)}"
        f" | read {binary_size(per_second('read_bytes'))}/s {rate(per_second('reads'))}"
        f" | write {binary_size(per_second('write_bytes'))}/s {rate(per_second('writes'))}"
        f" | {in_flight} in flight | latency {latency}"
    )
