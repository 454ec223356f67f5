# SPDX-License-Identifier: Apache-2.0
"""bh-nbd: one image over NBD, with the command line of qemu-nbd.

It is the storage daemon's parts with one export: raw bytes of a file, or a window of them. Without --persistent it
ends when the last client has left.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.host.linux import paths
from bottomhalf.tools.getopt import VALUE, Option, UsageError, fail, parse

if TYPE_CHECKING:
    from bottomhalf.block import Node
    from bottomhalf.exports.nbd.server import NbdServer
    from bottomhalf.monitor.storage import Storage

PROGRAM: Final = "bh-nbd"
PORT_DEFAULT: Final = 10809
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
    Option("list", "L"),
)
# What qemu-nbd has beyond that, so that the answer can say "not yet" instead of "unknown".
LATER: Final = (
    Option("snapshot", "s"),
    Option("load-snapshot", "l", VALUE),
    Option("connect", "c", VALUE),
    Option("disconnect", "d"),
    Option("allocation-depth", "A"),
    Option("bitmap", "B", VALUE),
    Option("object", takes=VALUE),
    Option("tls-creds", takes=VALUE),
    Option("tls-hostname", takes=VALUE),
    Option("tls-authz", takes=VALUE),
    Option("selinux-label", takes=VALUE),
    Option("trace", "T", VALUE),
)
# cache=MODE as QEMU means it: (O_DIRECT, flushes are ignored, every write is made durable).
CACHE_MODES: Final = {
    "none": (True, False, False),
    "off": (True, False, False),
    "directsync": (True, False, True),
    "writeback": (False, False, False),
    "unsafe": (False, True, False),
    "writethrough": (False, False, True),
}

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
  -o, --offset=OFFSET       first byte of the image to serve
  -r, --read-only           refuse writes
  -f, --format=FORMAT       format of the image (raw)
      --image-opts          FILE is a list of options of a block node
      --cache=MODE          none, writeback, writethrough, directsync or unsafe
  -n, --nocache             the same as --cache=none
      --aio=MODE            threads, native or io_uring; the best one is used
      --discard=MODE        ignore (the default) or unmap
      --detect-zeroes=MODE  off

Process:
      --fork                go to the background once the server is ready
      --pid-file=PATH       write the process id to a file
"""


class Settings:
    """What the command line says."""

    def __init__(self, arguments: list[str]) -> None:
        given: dict[str, str] = {}
        self.files: list[str] = []
        later = {option.name for option in LATER}
        for name, value in parse(arguments, OPTIONS + LATER):
            if name in later:
                raise UsageError(f"option '--{name}' is not supported yet")
            if name == "":
                self.files.append(value)
            else:
                given[name] = value
        self._given = given
        self.help = "help" in given
        self.version = "version" in given
        self.listing = "list" in given
        self.port = self._number("port", PORT_DEFAULT, 65535)
        self.bind = given.get("bind", "0.0.0.0")
        self.socket = given.get("socket")
        self.shared = self._number("shared", 1, 1 << 31)
        self.persistent = "persistent" in given
        self.verbose = "verbose" in given
        self.name = given.get("export-name", "")
        self.description = given.get("description", "")
        self.handshake_limit = self._number("handshake-limit", 10, 1 << 31)
        self.offset = self._number("offset", 0, 1 << 62)
        self.format = given.get("format")
        self.image_opts = "image-opts" in given
        self.read_only = "read-only" in given
        self.discard = self._one_of("discard", "ignore", ("ignore", "unmap", "off", "on"))
        self._one_of("detect-zeroes", "off", ("off",))
        self._one_of("aio", "threads", ("threads", "native", "io_uring"))
        cache = self._one_of("cache", "writeback", tuple(CACHE_MODES))
        if "nocache" in given:
            cache = "none"
        self.direct, self.no_flush, self.writethrough = CACHE_MODES[cache]
        self.fork = "fork" in given
        self.pid_file = given.get("pid-file")
        self._check()

    def _check(self) -> None:
        if self.help or self.version:
            return
        if self.socket is not None and {"port", "bind"} & self._given.keys():
            raise UsageError("-k excludes -p and -b")
        if self.listing:
            if self.files:
                raise UsageError("-L takes no file")
        elif len(self.files) != 1:
            raise UsageError("Invalid number of arguments")

    def _number(self, name: str, default: int, maximum: int) -> int:
        text = self._given.get(name)
        if text is None:
            return default
        from bottomhalf.qapi.visit import parse_size

        value = parse_size(text)
        if value is None or value > maximum:
            raise UsageError(f"Invalid {name} '{text}'")
        return value

    def _one_of(self, name: str, default: str, known: tuple[str, ...]) -> str:
        value = self._given.get(name, default)
        if value not in known:
            raise UsageError(f"Invalid {name} mode '{value}'", f"It is one of {', '.join(known)}.")
        return value


def main(arguments: list[str] | None = None) -> int:
    """Serve until told otherwise or, unless --persistent, until the last client has left; the exit status."""
    program = sys.argv[0].rpartition("/")[2] or PROGRAM
    try:
        settings = Settings(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        fail(program, str(error), error.hint or f"Try '{program} --help' for more information.")
    if settings.help:
        print(HELP.format(program=program), end="")
        return 0
    if settings.version:
        from bottomhalf import __version__

        print(f"{program} {__version__} (interface of qemu-nbd 10.0.2)")
        print("Copyright (c) 2026 The bottomhalf authors; Apache-2.0")
        return 0
    if settings.listing:
        from bottomhalf.tools.nbd_list import list_exports

        return list_exports(program, _address(settings, "localhost"))
    return _serve(program, settings)


def _address(settings: Settings, host: str) -> Any:
    from bottomhalf.host.protocol import InetAddress, UnixAddress

    if settings.socket is not None:
        return UnixAddress(paths.absolute(settings.socket))
    bind = settings.bind if settings.bind != "0.0.0.0" else host
    return InetAddress(bind, settings.port)


def _serve(program: str, settings: Settings) -> int:
    from bottomhalf.block import BlockError
    from bottomhalf.host.linux.process import Background, PidFile
    from bottomhalf.qapi.errors import OptionError

    background = Background() if settings.fork else None

    from bottomhalf.monitor.storage import Storage, watch_signals

    def log(line: str) -> None:
        if settings.verbose or "internal error" in line:
            print(f"{program}: {line}", file=sys.stderr)

    storage = Storage(log=log)
    forget_signals = watch_signals(storage)
    pid_file: PidFile | None = None
    try:
        try:
            _warn_if_probed(program, storage, settings)
            server = _set_up(storage, settings)
            if settings.pid_file is not None:
                pid_file = PidFile(settings.pid_file)
        except (BlockError, OptionError) as error:
            fail(program, str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(program, f"{where}{error.strerror or error}")
        if not settings.persistent:
            server.on_empty = storage.quit
        if background is not None:
            background.ready()
        storage.run()
    finally:
        forget_signals()
        storage.close()
        if pid_file is not None:
            pid_file.close()
    return 0


def _set_up(storage: Storage, settings: Settings) -> NbdServer:
    from bottomhalf.qapi.export import BlockExportOptions
    from bottomhalf.qapi.visit import from_json

    node = _open(storage, settings)
    server = storage.exports.start_nbd_server(
        _address(settings, "0.0.0.0"),
        connections_max=settings.shared,
        handshake_seconds_max=settings.handshake_limit,
    )
    options = {
        "type": "nbd",
        "id": EXPORT_ID,
        "node-name": node.name,
        "name": settings.name,
        "writable": not node.read_only,
        "writethrough": settings.writethrough,
    }
    if settings.description:
        options["description"] = settings.description
    storage.exports.add(from_json(BlockExportOptions, options))
    return server


def _open(storage: Storage, settings: Settings) -> Node:
    from bottomhalf.qapi.block import BlockdevOptions
    from bottomhalf.qapi.keyval import parse_keyval
    from bottomhalf.qapi.visit import from_json, from_keyval

    (name,) = settings.files
    if settings.image_opts:
        tree = parse_keyval(name, implied_key="file.filename")
        tree.setdefault("driver", "raw")
        tree.setdefault("node-name", "image")
        return storage.add_node(from_keyval(BlockdevOptions, tree))
    common: dict[str, Any] = {
        "discard": "unmap" if settings.discard in ("unmap", "on") else "ignore",
        "read-only": settings.read_only,
    }
    cache = {"direct": settings.direct, "no-flush": settings.no_flush}
    file = {"driver": "file", "filename": name, "cache": cache, **common}
    options = {"driver": "raw", "node-name": "image", "offset": settings.offset, "file": file, **common}
    return storage.add_node(from_json(BlockdevOptions, options))


def _warn_if_probed(program: str, storage: Storage, settings: Settings) -> None:
    """Without --format the format is guessed, which an image's content can influence: say so."""
    from bottomhalf.block import BlockError
    from bottomhalf.tools.formats import image_format

    if settings.image_opts or settings.format == "raw":
        return
    if settings.format is not None:
        raise BlockError(f"Unknown driver '{settings.format}'")
    (name,) = settings.files
    found = image_format(storage.host, name)
    if found != "raw":
        raise BlockError(f"'{name}' is a {found} image, which this version cannot read yet")
    if not settings.read_only:
        print(
            f"WARNING: Image format was not specified for '{name}' and probing guessed raw.\n"
            "         Specify the 'raw' format explicitly (--format=raw) if that is what it is.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
