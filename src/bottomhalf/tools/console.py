# SPDX-License-Identifier: Apache-2.0
"""bottomhalf console: talk to the monitor of a storage daemon, ours or QEMU's, as a person or as a script.

A terminal gets a prompt with completion, colours and history (``console_terminal``; the extra ``[ui]``). Without one
the lines come from standard input or ``--execute``, the answers go to standard output, errors to standard error, and
the exit status tells how it went; that needs no extra.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Callable
from os.path import expanduser
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio.asyncio_loop import AioEventLoop
from bottomhalf.host.protocol import Address, Host, InetAddress, Socket, Terminal, UnixAddress
from bottomhalf.monitor.shell_line import LINE_LENGTH_MAX, Call, parse
from bottomhalf.monitor.shell_schema import Schema
from bottomhalf.qapi.errors import OptionError
from bottomhalf.tools.console_link import Link
from bottomhalf.tools.getopt import VALUE, Option, UsageError, fail
from bottomhalf.tools.getopt import parse as parse_options
from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.qmp import Event, Failure

if TYPE_CHECKING:
    from bottomhalf.tls.stream import TlsStream

PROGRAM: Final = "bottomhalf console"
HISTORY: Final = "~/.bottomhalf_console_history"
HMP_PROMPT: Final = b"(qemu) "
SILENCE_S: Final = 2.0  # before a person is told why nothing may be happening
DONE, REFUSED, LOST, INTERRUPTED = 0, 1, 2, 130
PORT_MAX: Final = 65535
READ_BYTES: Final = 65536

HELP: Final = f"""\
Usage: bottomhalf console [options] SOCKET

Talk to a QMP or HMP monitor. SOCKET is the path of a Unix socket, or HOST:PORT.

  -e, --execute LINE   run a command and exit; may be given several times
  -k, --keep-going     go on after a command that failed
      --json           print each answer on one line
      --events         print events as well when input is no terminal
      --tls DIR        over TLS; DIR has ca-cert.pem and, if the server wants to know who we are, client-cert.pem and
                       client-key.pem
      --tls-hostname NAME  the name that the server's certificate must have (default: the host)
      --history FILE   remember lines in FILE (default: {HISTORY})
      --no-history     remember nothing
  -h, --help           display this help and exit

A line is one command, in either form:

  blockdev-add driver=file node-name=disk filename=/tmp/disk.raw
  {{"execute": "blockdev-del", "arguments": {{"node-name": "disk"}}}}

"exec-oob" before the name runs it out of band, "help" lists the commands, "help COMMAND" its arguments, "exit" leaves
(the command "quit" ends the server). On a terminal TAB completes, Ctrl-C gives up waiting, Ctrl-D leaves. A monitor for
people (HMP) is passed through as it is; Ctrl-D leaves there, too.

Without a terminal lines come from standard input, and '#' begins a comment. The exit status is 0 if all commands
succeeded, 1 if one was refused or could not be read, 2 if there was no connection or it ended.
"""

OPTIONS: Final = (
    Option("execute", "e", VALUE),
    Option("keep-going", "k"),
    Option("json"),
    Option("events"),
    Option("tls", takes=VALUE),
    Option("tls-hostname", takes=VALUE),
    Option("history", takes=VALUE),
    Option("no-history"),
    Option("help", "h"),
)
_CONTROLS: Final = re.compile("[\x7f-\x9f]")  # JSON lets them stand, and a terminal may obey them


class Wishes:
    """What the user asked for."""

    def __init__(self) -> None:
        self.address: Address = UnixAddress("")
        self.lines: list[str] = []
        self.keep_going = False
        self.as_line = False
        self.events = False
        self.history: str | None = HISTORY
        self.tls: str | None = None
        self.tls_hostname: str | None = None


def main(arguments: list[str]) -> int:
    """Talk; the exit status."""
    try:
        wishes = _read(arguments)
    except UsageError as error:
        fail(PROGRAM, str(error), error.hint or "Try 'bottomhalf console --help' for more information.")
    if wishes is None:
        print(HELP, end="")
        return DONE
    by_hand = not wishes.lines and sys.stdin.isatty()
    if by_hand:
        _require_terminal_library()
    try:
        with asyncio.Runner(loop_factory=AioEventLoop) as runner:
            return runner.run(_talk(wishes, by_hand))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has enough
        return REFUSED


def _read(arguments: list[str]) -> Wishes | None:
    wishes = Wishes()
    operands = []
    for name, value, _ in parse_options(arguments, OPTIONS):
        if name == "help":
            return None
        if name == "execute":
            wishes.lines.append(value)
        elif name == "keep-going":
            wishes.keep_going = True
        elif name == "json":
            wishes.as_line = True
        elif name == "events":
            wishes.events = True
        elif name == "history":
            wishes.history = value
        elif name == "no-history":
            wishes.history = None
        elif name in ("tls", "tls-hostname"):
            setattr(wishes, name.replace("-", "_"), value)
        else:
            operands.append(value)
    if len(operands) != 1:
        raise UsageError("give one socket" if operands else "no socket given")
    wishes.address = address_of(operands[0])
    if wishes.tls_hostname is not None and wishes.tls is None:
        raise UsageError("--tls-hostname goes with --tls")
    if wishes.tls_hostname is None and isinstance(wishes.address, InetAddress):
        wishes.tls_hostname = wishes.address.host
    return wishes


def address_of(text: str) -> Address:
    """Where a monitor listens: ``HOST:PORT``, or else a path; ``tcp:`` and ``unix:`` before it leave no doubt."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "unix":
        return UnixAddress(rest)
    if colon and kind == "tcp":
        text = rest
    host, colon, port = text.rpartition(":")
    if kind != "tcp" and ("/" in text or not colon or not port.isdecimal()):
        return UnixAddress(text)
    if not port.isdecimal() or int(port) > PORT_MAX:
        raise UsageError(f"'{text}' is not HOST:PORT")
    return InetAddress(host.strip("[]") or "localhost", int(port))


def _require_terminal_library() -> None:
    try:
        import prompt_toolkit  # noqa: F401
    except ImportError:
        fail(
            PROGRAM,
            "a terminal needs the package prompt_toolkit: pip install 'bottomhalf[ui]'",
            "Without it, give commands with --execute or by a pipe.",
        )


async def _talk(wishes: Wishes, by_hand: bool) -> int:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, AioEventLoop)
    try:
        socket: Socket = loop.context.host.connect(wishes.address)
        secure = await _secured(wishes, loop, socket) if wishes.tls is not None else None
    except OSError as error:
        complain(f"cannot connect to {wishes.address}: {error.strerror or error}")
        return LOST
    except OptionError as error:
        complain(str(error))
        return LOST
    sink = Sink()
    link = Link(secure or socket, lambda event: sink.event(event), lambda data: sink.text(data), secure)
    patience = loop.call_later(
        SILENCE_S, complain, "connected, but nothing is said: another client may hold this monitor"
    )
    try:
        kind = await link.kind
        patience.cancel()
        if kind == "qmp":
            await link.negotiate()
        if by_hand:
            from bottomhalf.tools import console_terminal

            if kind == "hmp":
                return await console_terminal.pass_through(link, sink, loop.context.host.stdio())
            return await console_terminal.converse(link, sink, history_path(wishes.history, loop.context.host))
        return await (_Script(link, sink, wishes).run() if kind == "qmp" else _hmp_script(link, sink, wishes))
    except (OSError, ProtocolError, Failure) as error:
        complain(str(error))
        return LOST
    finally:
        patience.cancel()
        link.close()


async def _secured(wishes: Wishes, loop: AioEventLoop, socket: Socket) -> TlsStream:
    """The socket behind TLS. OSError; OptionError if the credentials are no good."""
    from bottomhalf.qom import QomError
    from bottomhalf.qom.tree import Tree
    from bottomhalf.tls import objects  # noqa: F401  # its types
    from bottomhalf.tls.handshaking import Handshaking
    from bottomhalf.tls.policy import client_security

    done: asyncio.Future[OSError | None] = loop.create_future()
    try:
        tree = Tree(loop.context.host)
        tree.create("tls-creds-x509", "tls", {"dir": wishes.tls, "endpoint": "client"})
        stream = client_security(tree, "tls", wishes.tls_hostname).wrap(socket)
        handshaking = Handshaking(loop.context, stream, done.set_result)
        try:
            error = await done
        finally:
            handshaking.cancel()
        if error is not None:
            raise error
    except QomError as error:
        socket.close()
        raise OptionError(error.desc) from None
    except BaseException:
        socket.close()
        raise
    return stream


def complain(text: str) -> None:
    """Tell on standard error."""
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


class Sink:
    """Where what nobody asked for goes; whoever is in charge puts his own functions here."""

    def __init__(self) -> None:
        self.event: Callable[[Event], object] = self._keep
        self.text: Callable[[bytes], object] = self._gather
        self.gathered = bytearray()
        self.came = asyncio.Event()

    def _keep(self, event: Event) -> None:
        pass

    def _gather(self, data: bytes) -> None:
        self.gathered += data
        self.came.set()


async def fetch_schema(link: Link) -> Schema:
    """The server's schema; one without any knows nothing, and everything is sent as it was typed."""
    try:
        entities = await link.execute(Call("query-qmp-schema"))
    except Failure:
        return Schema()
    return Schema(entities if isinstance(entities, list) else ())


def as_text(value: Any) -> str:
    """A value to be read by people."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found.group()):04x}", json.dumps(value, indent=2, ensure_ascii=False))


def help_text(words: list[str], schema: Schema) -> str:
    """What ``help`` prints."""
    if not words:
        return "\n".join([*schema.commands, "", "help COMMAND tells the arguments of one; exit leaves."])
    command = words[0]
    if command not in schema.commands:
        raise OptionError(f"The command {command} has not been found")
    lines = [command + (" (may run out of band)" if schema.allows_oob(command) else "")]
    for member in schema.members(command):
        values = schema.values(member.type)
        kinds = "|".join(dict.fromkeys(schema.kind(choice) for choice in schema.choices(member.type)))
        what = "|".join(values) if 0 < len(values) <= 12 else kinds
        lines.append(f"  {member.name}={what}" + (" (optional)" if member.optional else ""))
    return "\n".join(lines)


async def lines_of(terminal: Terminal) -> AsyncIterator[str]:
    """The lines of standard input, while the loop goes on. OptionError for one that never ends."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    try:
        loop.add_reader(terminal.fileno(), readable.set)
    except PermissionError:  # a file: there is nothing to wait for
        readable.set()
        watched = False
    else:
        watched = True
    buffer, rest = bytearray(READ_BYTES), bytearray()
    try:
        while True:
            await readable.wait()
            if watched:
                readable.clear()
            try:
                count = terminal.recv_into(buffer)
            except BlockingIOError:
                continue
            rest += buffer[:count]
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
            if len(rest) > LINE_LENGTH_MAX:
                raise OptionError(f"The line is longer than {LINE_LENGTH_MAX} characters")
            if count == 0:
                if rest:
                    yield rest.decode(errors="replace")
                return
    finally:
        if watched:
            loop.remove_reader(terminal.fileno())


async def _given(wishes: Wishes) -> AsyncIterator[str]:
    if wishes.lines:
        for line in wishes.lines:
            yield line
        return
    loop = asyncio.get_running_loop()
    assert isinstance(loop, AioEventLoop)
    terminal = loop.context.host.stdio()
    try:
        async for line in lines_of(terminal):
            yield line
    finally:
        terminal.close()


class _Script:
    """Lines to a QMP server, one after the other."""

    def __init__(self, link: Link, sink: Sink, wishes: Wishes) -> None:
        self._link = link
        self._wishes = wishes
        self._schema: Schema | None = None
        if wishes.events:
            sink.event = self._event

    def _print(self, value: Any) -> None:
        print(json.dumps(value) if self._wishes.as_line else as_text(value), flush=True)

    def _event(self, event: Event) -> None:
        self._print({"event": event.name, "data": event.data})

    async def run(self) -> int:
        status, number = DONE, 0
        async for line in _given(self._wishes):
            number += 1
            try:
                if not await self._line(line):
                    break
            except (OptionError, Failure) as error:
                text = f"{error.class_name}: {error.desc}" if isinstance(error, Failure) else str(error)
                hint = getattr(error, "hint", None)
                complain(f"line {number}: {text}" + (f"\n{hint}" if hint else ""))
                status = REFUSED
                if not self._wishes.keep_going:
                    break
        return status

    async def _line(self, line: str) -> bool:
        """Whether to go on."""
        words = line.split()
        if words == ["exit"]:
            return False
        if self._schema is None and words and words[0][0] not in "{#":
            self._schema = await fetch_schema(self._link)
        schema = self._schema or Schema()
        if words[:1] == ["help"]:
            print(help_text(words[1:], schema))
            return True
        call = parse(line, schema)
        if call is not None:
            self._print(await self._link.execute(call))
        return True


async def _hmp_script(link: Link, sink: Sink, wishes: Wishes) -> int:
    """Lines to a monitor for people. It tells of errors in words alone; those it begins in ways that are known."""
    status = DONE
    await _until_prompt(link, sink)
    async for line in _given(wishes):
        if not line.strip():
            continue
        link.send(line.strip().encode() + b"\n")
        try:
            answer = await _until_prompt(link, sink)
        except ConnectionResetError:
            if line.split()[0] in ("q", "quit"):
                return status
            raise
        _, _, text = answer.partition(b"\n")  # the first line is the echo
        said = text.decode(errors="replace").replace("\r\n", "\n")
        print(said, end="", flush=True)
        if said.startswith(("Error: ", "unknown command: ")):
            status = REFUSED
            if not wishes.keep_going:
                break
    return status


async def _until_prompt(link: Link, sink: Sink) -> bytes:
    while not sink.gathered.endswith(HMP_PROMPT):
        sink.came.clear()
        waiting: asyncio.Future[Any] = asyncio.ensure_future(sink.came.wait())
        await asyncio.wait((waiting, link.ended), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if link.ended.done() and not sink.gathered.endswith(HMP_PROMPT):
            raise link.ended.result()
    answer = bytes(sink.gathered[: -len(HMP_PROMPT)])
    sink.gathered.clear()
    return answer


def history_path(name: str | None, host: Host) -> str | None:
    """The file of the history, made so that only its owner can read it; None if there is to be none."""
    if name is None:
        return None
    path = expanduser(name)
    try:
        host.open_stream(None, path, "private").close()
    except OSError as error:
        complain(f"{path}: {error.strerror}; nothing will be remembered")
        return None
    return path
