# SPDX-License-Identifier: Apache-2.0
"""bottomhalf bench IMAGE: how fast an image is through the block layer, with the options of ``qemu-img bench``.

One node, one backend, one context, and a load on them (``block.load``): nothing that a client or a protocol would
add. Options, their limits, the two lines on standard output and the error texts are qemu-img's, so that its scripts
and its figures can stand beside ours. ``main`` takes the program's name, because a tool under another name may have
it as a command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.tools.getopt import VALUE, Option, UsageError, fail, parse
from bottomhalf.tools.modes import AIO_MODES, CACHE_MODES

if TYPE_CHECKING:
    from bottomhalf.aio import AioContext
    from bottomhalf.block import BlockBackend, Graph
    from bottomhalf.block.load import Load

PROGRAM: Final = "bottomhalf bench"

OPTIONS: Final = (
    Option("help", "h"),
    Option("aio", "i", VALUE),
    Option("cache", "t", VALUE),
    Option("count", "c", VALUE),
    Option("depth", "d", VALUE),
    Option("flush-interval", takes=VALUE),
    Option("force-share", "U"),
    Option("format", "f", VALUE),
    Option("image-opts"),
    Option("native", "n"),
    Option("no-drain"),
    Option("offset", "o", VALUE),
    Option("pattern", takes=VALUE),
    Option("buffer-size", "s", VALUE),
    Option("step-size", "S", VALUE),
    Option("quiet", "q"),
    Option("write", "w"),
)

HELP: Final = """\
Usage: {program} [options] IMAGE
Send requests to a disk image, many at a time, and say how long that took.

  -c, --count N            requests altogether (default: 75000)
  -d, --depth N            requests in flight (default: 64)
  -s, --buffer-size SIZE   bytes per request (default: 4k)
  -S, --step-size SIZE     bytes between the beginnings of two requests (default: the same; 0 too)
  -o, --offset OFFSET      where the first one begins (default: 0)
  -w, --write              write instead of read
      --pattern N          value of the bytes to write, 0 to 255 (default: 0)
      --flush-interval N   flush after every N writes
      --no-drain           do not wait for requests in flight before a flush

  -f, --format FMT         format of the image (default: found out)
      --image-opts         IMAGE is a list of options of a block node
  -t, --cache MODE         none, writeback, writethrough, directsync or unsafe (default: writeback)
  -i, --aio MODE           threads, native or io_uring (default: the best one here)
  -n, --native             the same as --aio=native
  -U, --force-share        read an image that others write
  -q, --quiet              accepted, as by qemu-img; there is nothing to leave out
  -h, --help               display this help and exit

Beyond the end of the image, requests begin again at its front.
"""

ENDING_SIGNALS: Final = (2, 15)  # SIGINT, SIGTERM
INT_MAX: Final = (1 << 31) - 1
OFFSET_MAX: Final = (1 << 63) - 1

# (what it is called in messages, least, most, whether a unit like "k" may follow)
NUMBERS: Final = {
    "count": ("request count", 1, INT_MAX, False),
    "depth": ("queue depth", 1, INT_MAX, False),
    "flush-interval": ("flush interval", 0, INT_MAX, False),
    "pattern": ("pattern byte", 0, 255, False),
    "buffer-size": ("buffer size", 1, INT_MAX, True),
    "step-size": ("step size", 0, INT_MAX, True),
    "offset": ("offset", 0, OFFSET_MAX, True),
}


class Settings:
    """What the command line says. UsageError as soon as something is wrong; help ends the reading."""

    def __init__(self, arguments: list[str]) -> None:
        self.help = self.write = self.force_share = self.image_opts = False
        self.drain = True
        self.direct = self.no_flush = self.writethrough = False
        self.aio: str | None = None
        self.format: str | None = None
        self.numbers = {"count": 75000, "depth": 64, "flush-interval": 0, "pattern": 0}
        self.numbers |= {"buffer-size": 4096, "step-size": 0, "offset": 0}
        images = []
        for name, value, _ in parse(arguments, OPTIONS):
            if name == "":
                images.append(value)
            elif name == "help":
                self.help = True
                return
            else:
                self._take(name, value)
        if len(images) != 1:
            raise UsageError("Expecting one image file name")
        self.image = images[0]
        if self.image_opts and self.format is not None:
            raise UsageError("--image-opts and --format are mutually exclusive", "")
        if self.numbers["flush-interval"]:
            if not self.write:
                raise UsageError("--flush-interval is only available in write tests", "")
            if self.numbers["flush-interval"] < self.numbers["depth"]:
                raise UsageError("Flush interval can't be smaller than depth", "")

    def _take(self, name: str, value: str) -> None:
        if name in NUMBERS:
            self.numbers[name] = _number(value, *NUMBERS[name])
        elif name == "cache":
            if value not in CACHE_MODES:
                raise UsageError("Invalid cache mode", f"It is one of {', '.join(CACHE_MODES)}.")
            self.direct, self.no_flush, self.writethrough = CACHE_MODES[value]
        elif name == "aio":
            if value not in AIO_MODES:
                raise UsageError(f"Invalid aio option: {value}", f"It is one of {', '.join(AIO_MODES)}.")
            self.aio = value
        elif name == "native":
            self.aio = "native"
        elif name == "format":
            self.format = value
        elif name == "no-drain":
            self.drain = False
        elif name != "quiet":
            setattr(self, name.replace("-", "_"), True)


def _number(text: str, what: str, least: int, most: int, may_have_unit: bool) -> int:
    """A number with its limits, in qemu-img's words."""
    from bottomhalf.qapi.visit import parse_integer, parse_size

    negative = text.strip().startswith("-")
    value = parse_size(text) if may_have_unit and not negative else parse_integer(text)
    if value is None:
        raise UsageError(f"Invalid {what} specified: '{text}'.", "")
    if not least <= value <= most:
        raise UsageError(f"Invalid {what} specified. Must be between {least} and {most}.", "")
    return value


def main(arguments: list[str], program: str = PROGRAM) -> int:
    """Run the load; the exit status."""
    try:
        settings = Settings(arguments)
    except UsageError as error:
        name = PROGRAM if program == PROGRAM else f"{program} bench"
        fail(program, str(error), f"Try '{name} --help' for more info" if error.hint is None else error.hint)
    if settings.help:
        print(HELP.format(program=program), end="")
        return 0
    return _run(settings, program)


def _run(settings: Settings, program: str) -> int:
    from bottomhalf.aio import AioContext
    from bottomhalf.block import BlockError, Graph
    from bottomhalf.block.load import Load
    from bottomhalf.host.request import READ, WRITE
    from bottomhalf.qapi.errors import OptionError

    numbers = settings.numbers
    context = AioContext(name="bench")
    graph = Graph(context)
    backend: BlockBackend | None = None
    try:
        try:
            _choose_engine(context, settings)
            backend = _open(graph, settings)
            load = Load(
                backend,
                op=WRITE if settings.write else READ,
                count=numbers["count"],
                depth=numbers["depth"],
                length=numbers["buffer-size"],
                offset=numbers["offset"],
                step=numbers["step-size"] or None,
                pattern=numbers["pattern"],
                flush_interval=numbers["flush-interval"],
                drain=settings.drain,
            )
        except (BlockError, OptionError) as error:
            text = f"Could not open '{settings.image}': {error}" if backend is None else str(error)
            fail(program, text, getattr(error, "hint", None))
        try:
            ended_by = _run_until_signal(context, load, lambda: _introduce(settings))
        except OSError as error:
            fail(program, f"Failed request: {os.strerror(error.errno or 0)}", error.strerror)
        if ended_by:
            return 128 + ended_by
        print(f"Run completed in {load.seconds:.3f} seconds.")
    finally:
        if backend is not None:
            backend.close()
        graph.close()
        context.close()
    return 0


def _introduce(settings: Settings) -> None:
    numbers = settings.numbers
    print(
        f"Sending {numbers['count']} {'write' if settings.write else 'read'} requests, {numbers['buffer-size']} "
        f"bytes each, {numbers['depth']} in parallel (starting at offset {numbers['offset']}, "
        f"step size {numbers['step-size'] or numbers['buffer-size']})"
    )
    if numbers["flush-interval"]:
        print(f"Sending flush every {numbers['flush-interval']} requests")
    sys.stdout.flush()


def _run_until_signal(context: AioContext, load: Load, introduce: Callable[[], None]) -> int:
    """Carry the load out; the number of the signal that ended it early, else 0."""
    ended_by = 0
    signals = context.host.signals(list(ENDING_SIGNALS))

    def stop() -> None:
        nonlocal ended_by
        for number in signals.take():
            ended_by = number
            load.stop()

    context.set_fd_handler(signals.fileno(), on_read=stop)
    try:
        introduce()
        load.run()
    finally:
        context.set_fd_handler(signals.fileno())
        signals.close()
    return ended_by


def _choose_engine(context: AioContext, settings: Settings) -> None:
    """The engine that --aio names; whether it is to be had here is seen before the image is opened."""
    from bottomhalf.block import BlockError
    from bottomhalf.host.protocol import AIO_ENGINES

    if settings.aio is None:
        return
    context.engine_kind = AIO_ENGINES[settings.aio]
    try:
        assert context.engine
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BlockError(f"aio={settings.aio} is not to be had here: {why}") from error


def _open(graph: Graph, settings: Settings) -> BlockBackend:
    """A backend on the image. BlockError or OptionError."""
    from bottomhalf.block import BlockBackend
    from bottomhalf.drivers.registry import file_driver, open_node
    from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE
    from bottomhalf.qapi.block import BlockdevCacheOptions, BlockdevOptions
    from bottomhalf.qapi.keyval import parse_keyval
    from bottomhalf.qapi.visit import from_json, from_keyval

    if settings.image_opts:
        options = from_keyval(BlockdevOptions, parse_keyval(settings.image))
    else:
        file: dict[str, Any] = {"driver": file_driver(graph, settings.image), "filename": settings.image}
        if settings.aio is not None:
            file["aio"] = settings.aio
        options = from_json(BlockdevOptions, {"driver": _format(graph, settings), "file": file})
    changes: dict[str, Any] = {"read_only": not settings.write, "force_share": settings.force_share or None}
    if options.cache is None:
        changes["cache"] = BlockdevCacheOptions(direct=settings.direct, no_flush=settings.no_flush)
    node = open_node(graph, options.replace(**changes))
    node.monitor_owned = True
    backend = BlockBackend(
        graph,
        held=PERM_CONSISTENT_READ | (PERM_WRITE if settings.write else 0),
        shared=PERM_ALL & ~(PERM_WRITE | PERM_RESIZE if settings.write else PERM_RESIZE),
        writethrough=settings.writethrough,
    )
    backend.insert(node)
    return backend


def _format(graph: Graph, settings: Settings) -> str:
    from bottomhalf.tools.formats import image_format

    return settings.format or image_format(graph.context.host, settings.image)
