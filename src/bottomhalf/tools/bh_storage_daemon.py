# SPDX-License-Identifier: Apache-2.0
"""bh-storage-daemon: disks without a virtual machine, with the command line of qemu-storage-daemon.

The command line is read twice. The first pass only knows help, version, pid file and going to the background, so
that these work whatever else stands there; the second does the rest in the order given, so that a character
device can be used by the monitor behind it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.tools.getopt import VALUE, Option, UsageError, fail, parse, program_name

if TYPE_CHECKING:
    from bottomhalf.chardev.base import Chardev
    from bottomhalf.host.linux.process import PidFile
    from bottomhalf.monitor.storage import Storage
    from bottomhalf.qapi.char import ChardevBackend

PROGRAM: Final = "bh-storage-daemon"

OPTIONS: Final = (
    Option("help", "h"),
    Option("version", "V"),
    Option("blockdev", takes=VALUE),
    Option("chardev", takes=VALUE),
    Option("daemonize"),
    Option("export", takes=VALUE),
    Option("monitor", takes=VALUE),
    Option("nbd-server", takes=VALUE),
    Option("object", takes=VALUE),
    Option("pidfile", takes=VALUE),
)

HELP: Final = """\
Usage: {program} [options]
Serve disk images without a virtual machine.

  -h, --help             display this help and exit
  -V, --version          output version information and exit
  --blockdev [driver=]DRIVER,node-name=N[,OPTION=VALUE...]
                         create a block node
  --chardev [backend=]socket|stdio|pty|file|pipe|null|ringbuf|mux,id=ID[,OPTION=VALUE...]
                         create a character device
  --daemonize            go to the background once everything is set up
  --export [type=]nbd,id=ID,node-name=N[,name=NAME][,writable=on|off]
                         export a block node over NBD (needs --nbd-server)
  --monitor [chardev=]ID[,mode=control|readline][,pretty=on|off]
                         speak QMP on a character device, or, with mode=readline, take commands
                         from a person (HMP)
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,max-connections=N]
  --nbd-server addr.type=unix,addr.path=PATH[,max-connections=N]
                         start the NBD server
  --object iothread|secret|throttle-group|tls-creds-x509|...,id=ID[,PROPERTY=VALUE...]
                         create an object: a thread that serves exports, a password, ...
  --pidfile PATH         write the process id to a file that goes away at exit

Every option that takes KEY=VALUE also takes a JSON object. "--blockdev help", "--blockdev file,help"
and the like list what there is. Options are handled in the order given.

Example:
  {program} \\
      --blockdev file,node-name=disk,filename=disk.raw \\
      --nbd-server addr.type=unix,addr.path=/tmp/nbd.sock \\
      --export nbd,id=e0,node-name=disk,writable=on \\
      --chardev socket,id=qmp,path=/tmp/qmp.sock,server=on,wait=off \\
      --monitor chardev=qmp
"""


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGINT, SIGTERM, SIGHUP or the command quit; the exit status."""
    import gc

    gc.disable()  # nearly everything that is made while the program starts lives to its end
    program = program_name(PROGRAM)
    given = []
    pidfile, daemonize = None, False
    try:
        for name, value, typed in parse(sys.argv[1:] if arguments is None else arguments, OPTIONS):
            if name == "help":
                print(HELP.format(program=program), end="")
                return 0
            if name == "version":
                from bottomhalf import __version__

                print(f"{program} version {__version__} (interface of qemu-storage-daemon 10.0.2)")
                print("Copyright (c) 2026 The bottomhalf authors; Apache-2.0")
                return 0
            if name == "pidfile":
                pidfile = value
            elif name == "daemonize":
                daemonize = True
            else:
                given.append((name, value, typed))
    except UsageError as error:
        fail(program, str(error), error.hint or f"Try '{program} --help' for more information.")
    return _serve(program, given, pidfile, daemonize)


def _serve(program: str, given: list[tuple[str, str, str]], pidfile_path: str | None, daemonize: bool) -> int:
    from bottomhalf.host.linux.process import Background

    background = Background() if daemonize else None

    from bottomhalf.monitor.storage import Storage

    storage = Storage(log=lambda line: print(f"{program}: {line}", file=sys.stderr))
    pidfile: PidFile | None = None
    try:
        storage.watch_signals()
        for name, value, typed in given:
            _set_up(program, storage, name, value, typed)
        if pidfile_path is not None:
            pidfile = write_pidfile(program, "cannot create PID file: ", pidfile_path)
        if background is not None:
            background.ready()
        storage.run_forever()
    finally:
        storage.close()
        if pidfile is not None:
            pidfile.close()
    return 0


def write_pidfile(program: str, what: str, path: str) -> PidFile:
    """Our process id in a locked file; ends the program if that is not to be had."""
    from bottomhalf.host.linux import paths
    from bottomhalf.host.linux.process import PidFile

    try:
        return PidFile(paths.absolute(path))  # which is removed after going to the background has led to /
    except OSError as error:
        reason = error.strerror or str(error)
        if reason.startswith("Cannot lock"):
            fail(program, f"{what}{reason}: {path}")
        fail(program, f"{what}Could not create '{path}': {reason}")


def _set_up(program: str, storage: Storage, name: str, value: str, typed: str) -> None:
    """One option of the second pass; an error ends the program and says in which option."""
    typed = without_secret(name, typed)
    from bottomhalf.block import BlockError
    from bottomhalf.qapi.errors import HelpRequested, OptionError

    if name == "":
        fail(program, f"{value}: Unexpected argument", f"Try '{program} --help' for more information.")
    try:
        _ACTIONS[name](program, storage, value)
    except HelpRequested as wanted:
        print(wanted)
        sys.exit(0)
    except OptionError as error:
        fail(program, f"{typed}: {error}", error.hint)
    except BlockError as error:
        fail(program, f"{typed}: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(program, f"{typed}: {where}{error.strerror or error}")


def without_secret(name: str, typed: str) -> str:
    """An option as it may be printed: what a secret holds is not shown."""
    if name != "object" or "secret" not in typed:
        return typed
    return re.sub(r'((?:^|[,{\s])"?data"?\s*[=:]\s*)("(?:[^"\\]|\\.)*"|(?:[^,]|,,)*)', r"\1***", typed)


def _options(name: str, value: str) -> Any:
    from bottomhalf.qapi.command_line import option_type
    from bottomhalf.qapi.keyval import parse_options

    kind, implied = option_type(f"--{name}")
    return parse_options(kind, value, implied_key=implied, loads=_loads)


def _loads(text: str) -> Any:
    from bottomhalf.wire.json_reader import loads

    return loads(text)


def _blockdev(program: str, storage: Storage, value: str) -> None:
    storage.add_node(_options("blockdev", value))


def _object(program: str, storage: Storage, value: str) -> None:
    storage.add_object(_options("object", value))


def _nbd_server(program: str, storage: Storage, value: str) -> None:
    from bottomhalf.monitor.commands import start_nbd_server

    start_nbd_server(storage, _options("nbd-server", value))


def _export(program: str, storage: Storage, value: str) -> None:
    storage.exports.add(_options("export", value))


def mux_over(base: str) -> ChardevBackend:
    """The device that several monitors share ``base`` by."""
    from bottomhalf.qapi.char import ChardevBackend, ChardevBackendKind, ChardevMux, ChardevMuxWrapper

    return ChardevBackend(type=ChardevBackendKind("mux"), branch=ChardevMuxWrapper(data=ChardevMux(chardev=base)))


def _chardev(program: str, storage: Storage, value: str) -> None:
    from bottomhalf.qapi.char import parse_chardev

    given = parse_chardev(value)
    for warning in given.warnings:
        print(f"{program}: --chardev {value}: warning: {warning}", file=sys.stderr)
    if not given.mux:
        _await_client(program, storage, storage.add_chardev(given.id, given.backend))
        return
    base = f"{given.id}-base"
    _await_client(program, storage, storage.add_chardev(base, given.backend))
    storage.add_chardev(given.id, mux_over(base))


def _await_client(program: str, storage: Storage, chardev: Chardev) -> None:
    if chardev.kind == "pty":
        print(f"char device redirected to {chardev.describe()[4:]} (label {chardev.id})", file=sys.stderr)
    if getattr(chardev, "wait", False):
        print(f"{program}: info: QEMU waiting for connection on: {chardev.describe()}", file=sys.stderr)
        while not chardev.connected and not storage.loop.quitting:
            storage.loop.run_once()


def _monitor(program: str, storage: Storage, value: str) -> None:
    from bottomhalf.qapi.control import MonitorMode
    from bottomhalf.qapi.errors import OptionError, did_you_mean

    options = _options("monitor", value)
    chardev = storage.chardevs.get(options.chardev)
    if chardev is None:
        hint = did_you_mean(options.chardev, storage.chardevs) or "Give --chardev before --monitor."
        raise OptionError(f'chardev "{options.chardev}" not found', key="chardev", hint=hint)
    if options.mode == MonitorMode.READLINE:
        if options.pretty:
            raise OptionError("'pretty' is not compatible with HMP monitors", key="pretty")
        from bottomhalf.monitor.hmp import HmpMonitor

        HmpMonitor(storage, chardev)
        return
    from bottomhalf.monitor.qmp import QmpMonitor

    QmpMonitor(storage, chardev, pretty=options.pretty)


_ACTIONS: Final[dict[str, Callable[[str, Storage, str], None]]] = {
    "blockdev": _blockdev,
    "chardev": _chardev,
    "export": _export,
    "monitor": _monitor,
    "nbd-server": _nbd_server,
    "object": _object,
}

if __name__ == "__main__":
    sys.exit(main())
