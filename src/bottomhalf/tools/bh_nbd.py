# SPDX-License-Identifier: Apache-2.0
"""bh-nbd: one image over NBD, with the command line of qemu-nbd.

It is the storage daemon's parts with one export: raw bytes of a file, or a window of them. Without --persistent it
ends when the last client has left.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from os import environ, getpid
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.tools.getopt import VALUE, Option, UsageError, fail, parse, program_name
from bottomhalf.tools.modes import AIO_MODES, CACHE_MODES

if TYPE_CHECKING:
    from bottomhalf.block import Node
    from bottomhalf.exports.nbd.export import NbdExport
    from bottomhalf.exports.nbd.server import NbdServer
    from bottomhalf.host.linux.process import PidFile
    from bottomhalf.host.protocol import Address
    from bottomhalf.monitor.storage import Storage
    from bottomhalf.tls.policy import Security

PROGRAM: Final = "bh-nbd"
PORT_DEFAULT: Final = "10809"  # IANA's for NBD
EXPORT_ID: Final = "qemu-nbd-export"

OPTIONS: Final = (
    Option("help", "h"),
    Option("version", "V"),
    Option("port", "p", VALUE),
    Option("bind", "b", VALUE),
    Option("socket", "k", VALUE),
    Option("shared", "e", VALUE),
    Option("persistent", "t"),
    Option("verbose", "v"),
    Option("export-name", "x", VALUE),
    Option("bitmap", "B", VALUE),
    Option("description", "D", VALUE),
    Option("handshake-limit", takes=VALUE),
    Option("offset", "o", VALUE),
    Option("format", "f", VALUE),
    Option("image-opts"),
    Option("read-only", "r"),
    Option("nocache", "n"),
    Option("cache", takes=VALUE),
    Option("aio", takes=VALUE),
    Option("discard", takes=VALUE),
    Option("detect-zeroes", takes=VALUE),
    Option("fork"),
    Option("pid-file", takes=VALUE),
    Option("object", takes=VALUE),
    Option("list", "L"),
    Option("tls-creds", takes=VALUE),
    Option("tls-hostname", takes=VALUE),
    Option("tls-authz", takes=VALUE),
)
# What qemu-nbd has beyond that, so that the answer can say "not yet" instead of "unknown".
LATER: Final = (
    Option("snapshot", "s"),
    Option("load-snapshot", "l", VALUE),
    Option("connect", "c", VALUE),
    Option("disconnect", "d"),
    Option("allocation-depth", "A"),
    Option("selinux-label", takes=VALUE),
    Option("trace", "T", VALUE),
)
DISCARD_MODES: Final = {"ignore": False, "off": False, "unmap": True, "on": True}
DETECT_ZEROES_MODES: Final = ("off", "on", "unmap")
# Options that say something about an image, which --list has none of.
PER_DEVICE: Final = frozenset(
    ("export-name", "description", "offset", "format", "aio", "discard", "nocache", "cache", "fork")
)
INT_MAX: Final = (1 << 31) - 1
UINT_MAX: Final = (1 << 32) - 1
OFFSET_MAX: Final = (1 << 63) - 1

HELP: Final = """\
Usage: {program} [OPTIONS] FILE
  or:  {program} -L [OPTIONS]
Serve a disk image over NBD.

  -h, --help                display this help and exit
  -V, --version             output version information and exit

Connection:
  -p, --port=PORT           port to listen on (default 10809)
  -b, --bind=IFACE          address to bind to (default 0.0.0.0)
  -k, --socket=PATH         path of a Unix socket to listen on instead
  -e, --shared=NUM          clients at the same time (default 1, 0 for no limit)
  -t, --persistent          do not end when the last client leaves
      --handshake-limit=N   seconds that a client has to choose an export (default 10, 0 for no limit)
  -L, --list                list the exports of another server
  -v, --verbose             say what happens

Export:
  -x, --export-name=NAME    name of the export (default "")
  -D, --description=TEXT    text that clients may show
  -B, --bitmap=NAME         offer a dirty bitmap of the image, as qemu:dirty-bitmap:NAME
  -o, --offset=OFFSET       first byte of the image to serve
  -r, --read-only           refuse writes
  -f, --format=FORMAT       format of the image (raw, qcow2)
      --image-opts          FILE is a list of options of a block node
      --cache=MODE          none, writeback, writethrough, directsync or unsafe
  -n, --nocache             the same as --cache=none
      --aio=MODE            threads, native or io_uring; the best one is used
      --discard=MODE        ignore (the default) or unmap
      --detect-zeroes=MODE  off (the default), on or unmap: zero writes for writes of zeroes

Process:
      --fork                go to the background once the server is ready
      --pid-file=PATH       write the process id to a file
      --object TYPE,id=ID   create an object (iothread, secret, tls-creds-x509, authz-list, ...)

Security:
      --tls-creds=ID        object with TLS credentials; clients must use TLS
      --tls-authz=ID        object that says which clients may come in
      --tls-hostname=NAME   with --list: the name that the server's certificate must have

Example:
  {program} -t -f raw -k /tmp/nbd.sock disk.raw
"""


class Settings:
    """What the command line says. UsageError as soon as something is wrong; help and version end the reading."""

    def __init__(self, arguments: list[str]) -> None:
        self.help = self.version = False
        self.given: dict[str, str] = {}
        self.objects: list[str] = []
        self.files: list[str] = []
        self.bitmaps: list[str] = []
        self.shared, self.handshake_limit, self.offset = 1, 10, 0
        self.direct = self.no_flush = self.writethrough = False
        self.discard = False
        for name, value, _ in parse(arguments, OPTIONS + LATER):
            if name in ("help", "version"):
                setattr(self, name, True)
                return
            if name == "":
                self.files.append(value)
            elif name == "object":
                self.objects.append(value)
            elif name == "bitmap":
                self.bitmaps.append(value)
            elif any(option.name == name for option in LATER):
                raise UsageError(f"option '--{name}' is not supported yet", "")
            else:
                self._take(name, value)
        self._check()

    def _take(self, name: str, value: str) -> None:
        if name in ("nocache", "cache"):
            if {"nocache", "cache"} & self.given.keys():
                raise UsageError("-n and --cache can only be specified once", "")
            self._one_of(value or "none", CACHE_MODES, f"Invalid cache mode `{value}'")
            self.direct, self.no_flush, self.writethrough = CACHE_MODES[value or "none"]
        elif name in ("aio", "discard") and name in self.given:
            raise UsageError(f"--{name} can only be specified once", "")
        elif name == "aio":
            self._one_of(value, AIO_MODES, f"Invalid aio mode '{value}'")
        elif name == "discard":
            self._one_of(value, DISCARD_MODES, f"Invalid discard mode `{value}'")
            self.discard = DISCARD_MODES[value]
        elif name == "detect-zeroes":
            what = f"Failed to parse detect_zeroes mode: invalid parameter value: {value}"
            self._one_of(value, DETECT_ZEROES_MODES, what)
        elif name == "shared":
            self.shared = self._number(value, f"Invalid shared device number '{value}'", INT_MAX)
        elif name == "handshake-limit":
            self.handshake_limit = self._number(value, f"Invalid handshake limit '{value}'", UINT_MAX)
        elif name == "offset":
            self.offset = self._number(value, f"Invalid offset '{value}'", OFFSET_MAX)
        self.given[name] = value

    @staticmethod
    def _number(text: str, complaint: str, maximum: int) -> int:
        """What strtol(3) reads with base 0: decimal, 0x hexadecimal, 0 octal."""
        digits = text.strip().removeprefix("+").lower()
        base = 16 if digits.startswith("0x") else 8 if digits.startswith("0") else 10
        try:
            value = int(digits, base) if "_" not in digits and digits.isalnum() else -1
        except ValueError:
            value = -1
        if not 0 <= value <= maximum:
            raise UsageError(complaint, "")
        return value

    @staticmethod
    def _one_of(value: str, known: Collection[str], complaint: str) -> None:
        if value not in known:
            raise UsageError(complaint, f"It is one of {', '.join(known)}.")

    def _check(self) -> None:
        if "list" in self.given:
            if self.files:
                raise UsageError("List mode is incompatible with a file name", "")
            if PER_DEVICE & self.given.keys() or self.bitmaps:
                raise UsageError("List mode is incompatible with per-device settings", "")
        elif len(self.files) != 1:
            raise UsageError("Invalid number of arguments")
        elif {"image-opts", "format"} <= self.given.keys():
            raise UsageError("--image-opts and -f are mutually exclusive", "")
        self._check_tls()
        if not self.given.get("socket", "/").startswith("/"):
            raise UsageError("socket path must be absolute", "")
        if self.given.get("detect-zeroes", "off") == "unmap" and not self.discard:
            raise UsageError(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap", ""
            )

    def _check_tls(self) -> None:
        listing = "list" in self.given
        for name in ("tls-hostname", "tls-authz"):
            if name in self.given and "tls-creds" not in self.given:
                raise UsageError(f"--{name} is not permitted without --tls-creds", "")
        if "tls-hostname" in self.given and not listing:
            raise UsageError("TLS hostname is only supported with export list", "")
        if "tls-authz" in self.given and listing:
            raise UsageError("TLS authorization is incompatible with export list", "")

    def address(self) -> Address:
        """Where to listen, or with --list to connect to. OptionError if it cannot be one."""
        from bottomhalf.chardev.addresses import host_address
        from bottomhalf.qapi.sockets import SocketAddress
        from bottomhalf.qapi.visit import from_json

        if "socket" in self.given:
            return host_address(from_json(SocketAddress, {"type": "unix", "path": self.given["socket"]}))
        host = self.given.get("bind", "0.0.0.0")
        port = self.given.get("port", PORT_DEFAULT)
        return host_address(from_json(SocketAddress, {"type": "inet", "host": host, "port": port}))


def main(arguments: list[str] | None = None) -> int:
    """Serve until told otherwise or, unless --persistent, until the last client has left; the exit status."""
    import gc

    gc.disable()  # nearly everything that is made while the program starts lives to its end
    program = program_name(PROGRAM)
    try:
        settings = Settings(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        fail(program, str(error), f"Try `{program} --help' for more information." if error.hint is None else error.hint)
    if settings.help:
        print(HELP.format(program=program), end="")
        return 0
    if settings.version:
        from bottomhalf import __version__

        print(f"{program} {__version__} (interface of qemu-nbd 10.0.2)")
        print("Copyright (c) 2026 The bottomhalf authors; Apache-2.0")
        return 0
    if environ.get("LISTEN_PID") == str(getpid()) and environ.get("LISTEN_FDS"):
        fail(program, "socket activation is not supported yet", "Unset LISTEN_FDS and give --socket or --port.")
    if "list" in settings.given:
        from bottomhalf.tools.nbd_list import list_exports

        with _errors(program):
            return list_exports(program, settings.address(), _client_security(settings))
    return _serve(program, settings)


def _client_security(settings: Settings) -> Security | None:
    """For --list. OptionError."""
    if "tls-creds" not in settings.given and not settings.objects:
        return None
    from bottomhalf.monitor.storage import Storage

    storage = Storage()
    try:
        for value in settings.objects:
            _add_object(storage, value)
        host = settings.given.get("tls-hostname") or settings.given.get("bind")
        with _failing_to_get_creds():
            return storage.client_security(settings.given.get("tls-creds"), host)
    finally:
        storage.close()


@contextmanager
def _failing_to_get_creds() -> Iterator[None]:
    from bottomhalf.qapi.errors import OptionError

    try:
        yield
    except OptionError as error:
        raise OptionError(f"Failed to get TLS creds: {error}", key="tls-creds") from None


@contextmanager
def _errors(program: str) -> Iterator[None]:
    """What users can do wrong ends the program with a sentence."""
    from bottomhalf.block import BlockError
    from bottomhalf.qapi.errors import HelpRequested, OptionError

    try:
        yield
    except HelpRequested as wanted:
        print(wanted)
        sys.exit(0)
    except OptionError as error:
        fail(program, str(error), error.hint)
    except BlockError as error:
        fail(program, str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(program, f"{where}{error.strerror or error}")


def _serve(program: str, settings: Settings) -> int:
    from bottomhalf.host.linux.process import Background

    background = Background() if "fork" in settings.given else None

    from bottomhalf.monitor.storage import Storage
    from bottomhalf.tools.bh_storage_daemon import write_pidfile

    def log(line: str) -> None:
        if "verbose" in settings.given or "internal error" in line:
            print(f"{program}: {line}", file=sys.stderr)

    storage = Storage(log=log)
    pidfile: PidFile | None = None
    try:
        storage.watch_signals()
        with _errors(program):
            for value in settings.objects:
                _add_object(storage, value)
            export, server = _set_up(storage, settings)
        if "pid-file" in settings.given:
            pidfile = write_pidfile(program, "", settings.given["pid-file"])
        if "persistent" not in settings.given:
            _end_with_the_last_client(storage, export, server)
        if background is not None:
            background.ready()
        storage.run_forever()
    finally:
        storage.close()
        if pidfile is not None:
            pidfile.close()
    return 0


def _end_with_the_last_client(storage: Storage, export: NbdExport, server: NbdServer) -> None:
    """Who only connects and goes, or asks for a list, does not count as a client."""
    served = False

    def note() -> None:
        nonlocal served
        served = True

    def quit_if_served() -> None:
        if served:
            storage.quit()

    export.on_idle = note  # comes before the server hears of it
    server.on_empty = quit_if_served


def _add_object(storage: Storage, value: str) -> None:
    from bottomhalf.qapi.keyval import parse_options
    from bottomhalf.qapi.objects import ObjectOptions
    from bottomhalf.wire.json_reader import loads

    storage.add_object(parse_options(ObjectOptions, value, implied_key="qom-type", loads=loads))


def _set_up(storage: Storage, settings: Settings) -> tuple[NbdExport, NbdServer]:
    from bottomhalf.block import BlockError
    from bottomhalf.qapi.errors import OptionError
    from bottomhalf.qapi.export import BlockExportOptions
    from bottomhalf.qapi.visit import from_json

    with _failing_to_get_creds():
        security = storage.server_security(settings.given.get("tls-creds"), settings.given.get("tls-authz"))
    server = storage.exports.start_nbd_server(
        settings.address(),
        security=security,
        connections_max=settings.shared,
        handshake_seconds_max=settings.handshake_limit,
    )
    (name,) = settings.files
    try:
        format = _format(settings, storage, name)
        below = _open(storage, settings, name, format)
    except (BlockError, OptionError) as error:
        hint = getattr(error, "hint", None)
        raise BlockError(f"Failed to blk_new_open '{name}': {error}" + (f"\n{hint}" if hint else "")) from error
    node = _open_window(storage, settings, below, format)
    node.monitor_owned = True
    options: dict[str, Any] = {
        "type": "nbd",
        "id": EXPORT_ID,
        "node-name": node.name,
        "name": settings.given.get("export-name", ""),
        "writable": not node.read_only,
        "writethrough": settings.writethrough,
    }
    if "description" in settings.given:
        options["description"] = settings.given["description"]
    if settings.bitmaps:
        options["bitmaps"] = settings.bitmaps[::-1]  # as qemu-nbd lists them
    return storage.exports.add(from_json(BlockExportOptions, options)), server


def _open(storage: Storage, settings: Settings, name: str, format: str) -> Node:
    """The file (in its format, if that is not raw), or what --image-opts describes."""
    from bottomhalf.drivers.registry import file_driver, open_node
    from bottomhalf.qapi.block import (
        BlockdevCacheOptions,
        BlockdevDetectZeroesOptions,
        BlockdevDiscardOptions,
        BlockdevOptions,
    )
    from bottomhalf.qapi.keyval import parse_keyval
    from bottomhalf.qapi.visit import from_json, from_keyval

    read_only = "read-only" in settings.given
    if "image-opts" not in settings.given:
        file = {"driver": file_driver(storage.graph, name), "filename": name, "discard": "unmap"}
        if "aio" in settings.given:
            file["aio"] = settings.given["aio"]
        discard = "unmap" if settings.discard else "ignore"
        formatted = {"driver": format, "discard": discard, "file": file}
        options = from_json(BlockdevOptions, file if format == "raw" else formatted)
    else:
        options = from_keyval(BlockdevOptions, parse_keyval(name))
        if options.discard is None:
            unmap = BlockdevDiscardOptions.UNMAP if settings.discard else BlockdevDiscardOptions.IGNORE
            options = options.replace(discard=unmap)
    if options.cache is None:
        options = options.replace(cache=BlockdevCacheOptions(direct=settings.direct, no_flush=settings.no_flush))
    detect_zeroes = options.detect_zeroes
    if detect_zeroes is None and "detect-zeroes" in settings.given:
        detect_zeroes = BlockdevDetectZeroesOptions(settings.given["detect-zeroes"])
    options = options.replace(read_only=read_only or options.read_only, detect_zeroes=detect_zeroes)
    return open_node(storage.graph, options)


def _open_window(storage: Storage, settings: Settings, below: Node, format: str) -> Node:
    """The raw node that --format and --offset ask for, if they do."""
    from bottomhalf.drivers.registry import open_node
    from bottomhalf.qapi.block import BlockdevOptions
    from bottomhalf.qapi.visit import from_json

    if ("image-opts" in settings.given or format != "raw") and not settings.offset:
        return below
    options = {
        "driver": "raw",
        "file": below.name,
        "offset": settings.offset,
        "discard": "unmap" if settings.discard else "ignore",
        "read-only": below.read_only,
    }
    return open_node(storage.graph, from_json(BlockdevOptions, options))


def _format(settings: Settings, storage: Storage, name: str) -> str:
    """The image's format. Without --format it is guessed, which an image's content can influence: say so."""
    from bottomhalf.block import BlockError
    from bottomhalf.tools.formats import KNOWN, image_format

    given: str | None = settings.given.get("format")
    if "image-opts" in settings.given:
        return "raw"
    if given in KNOWN:
        return given
    if given is not None:
        raise BlockError(f"Unknown driver '{given}'\nThis version reads {' and '.join(KNOWN)}.")
    found = image_format(storage.host, name)
    if found not in KNOWN:
        raise BlockError(
            f"'{name}' is a {found} image, which this version cannot read yet\n"
            "To serve its bytes as they are, say --format=raw."
        )
    if found == "raw" and "read-only" not in settings.given:
        print(
            f"WARNING: Image format was not specified for '{name}' and probing guessed raw.\n"
            "         Specify the 'raw' format explicitly (--format=raw) if that is what it is.",
            file=sys.stderr,
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
