# SPDX-License-Identifier: Apache-2.0
"""bottomhalf: the command with the friendly commands."""

from __future__ import annotations

import sys
from typing import Final

from bottomhalf.tools.getopt import fail

HELP: Final = """\
Usage: bottomhalf COMMAND [options]

  serve IMAGE     serve a disk image over NBD
  console SOCKET  talk to a monitor, QMP or HMP
  bench IMAGE     measure a disk image
  doctor [PATH]   say what this machine allows, and why not
  help            display this help and exit
  version         output version information and exit

"bottomhalf COMMAND --help" tells more. Beside it there are bh-nbd and bh-storage-daemon, which take the command
lines of qemu-nbd and qemu-storage-daemon.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, *rest = arguments or [""]
    if command in ("help", "--help", "-h"):
        print(HELP, end="")
        return 0
    if command in ("version", "--version", "-V"):
        from bottomhalf import __version__

        print(f"bottomhalf {__version__}")
        return 0
    if command == "serve":
        from bottomhalf.tools import serve

        return serve.main(rest)
    if command == "bench":
        from bottomhalf.tools import bench

        return bench.main(rest)
    if command == "console":
        from bottomhalf.tools import console

        return console.main(rest)
    if command == "doctor":
        from bottomhalf.tools import doctor

        return doctor.main(rest)
    if not command:
        fail("bottomhalf", "no command given", "Try 'bottomhalf --help' for more information.")
    from bottomhalf.qapi.errors import did_you_mean

    hint = did_you_mean(command, ["serve", "console", "bench", "doctor", "help", "version"])
    return fail("bottomhalf", f"unknown command '{command}'", hint or "Try 'bottomhalf --help' for more information.")


if __name__ == "__main__":
    sys.exit(main())
