# SPDX-License-Identifier: Apache-2.0
"""bh-storage-daemon: disks without a virtual machine, with the command line of qemu-storage-daemon.

The command line is read twice. The first pass only knows help, version, pid file and going to the background, so
that these work whatever else stands there; the second does the rest in the order given, so that a character
device can be used by the monitor behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.tools.getopt import VALUE, Option, UsageError, fail, parse, program_name

if TYPE_CHECKING:
    from bottomhalf.host.linux.process import PidFile
    from bottomhalf.monitor.storage import Storage

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
  --chardev [backend=]socket|stdio,id=ID[,OPTION=VALUE...]
                         create a character device
  --daemonize            go to the background once everything is set up
  --export [type=]nbd,id=ID,node-name=N[,name=NAME][,writable=on|off]
                         export a block node over NBD (needs --nbd-server)
  --monitor [chardev=]ID[,mode=control][,pretty=on|off]
                         speak QMP on a character device
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,max-connections=N]
  --nbd-server addr.type=unix,addr.path=PATH[,max-connections=N]
                         start the NBD server
  --object iothread,id=ID[,poll-max-ns=N]
                         create an object: a thread that serves exports
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


def _options(name: str, value: str) -> Any:
    from bottomhalf.qapi.commands import COMMAND_LINE
    from bottomhalf.qapi.keyval import parse_options

    kind, implied = COMMAND_LINE[f"--{name}"]
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


def _chardev(program: str, storage: Storage, value: str) -> None:
    from bottomhalf.monitor.chardev import SocketServerChardev
    from bottomhalf.qapi.char import parse_chardev
    from bottomhalf.qapi.errors import OptionError

    given = parse_chardev(value)
    for warning in given.warnings:
        print(f"{program}: --chardev {value}: warning: {warning}", file=sys.stderr)
    if given.mux:
        raise OptionError("Parameter 'mux' is not supported yet", key="mux")
    chardev = storage.add_chardev(given.id, given.backend)
    if isinstance(chardev, SocketServerChardev) and chardev.wait:
        print(f"{program}: info: QEMU waiting for connection on: {chardev.describe()}", file=sys.stderr)
        while not chardev.connected and not storage.loop.quitting:
            storage.loop.run_once()


def _monitor(program: str, storage: Storage, value: str) -> None:
    from bottomhalf.monitor.qmp import QmpMonitor
    from bottomhalf.qapi.control import MonitorMode
    from bottomhalf.qapi.errors import OptionError, did_you_mean

    options = _options("monitor", value)
    chardev = storage.chardevs.get(options.chardev)
    if chardev is None:
        hint = did_you_mean(options.chardev, storage.chardevs) or "Give --chardev before --monitor."
        raise OptionError(f'chardev "{options.chardev}" not found', key="chardev", hint=hint)
    if options.mode == MonitorMode.READLINE:
        raise OptionError("Only QMP is supported", key="mode")
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
