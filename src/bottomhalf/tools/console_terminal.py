# SPDX-License-Identifier: Apache-2.0
"""The console at a terminal, with prompt_toolkit: the extra ``[ui]``.

While a prompt is shown the keyboard is prompt_toolkit's; events are printed above it. While a command runs there is no
prompt, and Ctrl-C is a signal: it gives up waiting, and the answer is shown when it comes. A line with a secret in it
is not remembered.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Any, Final

from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from bottomhalf.host.protocol import Terminal
from bottomhalf.monitor.shell_complete import complete
from bottomhalf.monitor.shell_line import SECRETIVE, Call, is_complete, parse
from bottomhalf.monitor.shell_schema import Schema
from bottomhalf.qapi.errors import OptionError
from bottomhalf.tools.console import (
    DONE,
    INTERRUPTED,
    LOST,
    Sink,
    as_text,
    fetch_schema,
    help_text,
)
from bottomhalf.tools.console_link import Link
from bottomhalf.wire.qmp import Event, Failure, Response

PROMPT: Final = "(QMP) "
SIGINT: Final = 2
LEAVE: Final = frozenset((0x04, 0x1D))  # Ctrl-D, Ctrl-]
READ_BYTES: Final = 4096

STYLES: Final = {"key": "ansicyan", "string": "ansigreen", "word": "ansiyellow", "": ""}
EVENT_STYLE: Final = "ansimagenta bold"
ERROR_STYLE: Final = "ansired"
_TOKEN: Final = re.compile(
    r'(?P<key>"(?:[^"\\]|\\.)*"(?=:))|(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>-?[0-9][0-9.eE+-]*|true|false|null)'
)

# What is asked for names to complete: a kind, the command, where in each element the name is.
SOURCES: Final = (
    ("nodes", Call("query-named-block-nodes", {"flat": True}), "node-name"),
    ("exports", Call("query-block-exports"), "id"),
    ("chardevs", Call("query-chardev"), "label"),
    ("objects", Call("qom-list", {"path": "/objects"}), "name"),
)


def coloured(text: str) -> FormattedText:
    """JSON with colours."""
    parts: list[tuple[str, str]] = []
    position = 0
    for found in _TOKEN.finditer(text):
        parts.append(("", text[position : found.start()]))
        parts.append((STYLES[found.lastgroup or ""], found.group()))
        position = found.end()
    return FormattedText([*parts, ("", text[position:])])


class Discreet(FileHistory):
    """A history without secrets."""

    def append_string(self, string: str) -> None:
        if not SECRETIVE.search(string):
            super().append_string(string)


class DiscreetInMemory(InMemoryHistory):
    """The same, gone with the program."""

    def append_string(self, string: str) -> None:
        if not SECRETIVE.search(string):
            super().append_string(string)


class SchemaCompleter(Completer):
    """Completion from the server's schema."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.names: dict[str, list[str]] = {}

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        for found in complete(document.text_before_cursor, self.schema, self.names):
            yield Completion(found.text, found.start, display_meta=found.note)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(pressed: KeyPressEvent) -> None:
        """Send the line, unless brackets of JSON are open."""
        buffer = pressed.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None
        elif buffer.text.lstrip().startswith("{") and not is_complete(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    return keys


class LineAbandoned(Exception):
    """Ctrl-C at the prompt. (A KeyboardInterrupt in a task would end asyncio's loop.)"""


class Conversation:
    """A person and a QMP server."""

    def __init__(self, link: Link, schema: Schema, history: History) -> None:
        self._link = link
        self._schema = schema
        self._completer = SchemaCompleter(schema)
        self._asking: asyncio.Task[None] | None = None
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=history,
            completer=self._completer,
            complete_while_typing=False,
            key_bindings=_keys(),
            interrupt_exception=LineAbandoned,
            multiline=True,
            prompt_continuation=lambda width, number, wraps: " " * width,
        )

    def show_event(self, event: Event) -> None:
        """Print an event, above the prompt if there is one."""
        rest = f" {as_text(event.data)}" if event.data else ""
        print_formatted_text(FormattedText([(EVENT_STYLE, event.name), *coloured(rest)]))

    def show_late(self, response: Response) -> None:
        """Print an answer that was given up."""
        if response.error is not None:
            self._show_error(f"{response.error.class_name}: {response.error.desc}")
        else:
            print_formatted_text(coloured(as_text(response.value)))

    def _show_error(self, text: str) -> None:
        print_formatted_text(FormattedText([(ERROR_STYLE, text)]))

    async def run(self) -> int:
        """Until the person or the server has enough; the exit status."""
        self._ask_names()
        while True:
            prompt: asyncio.Future[Any] = asyncio.ensure_future(self._session.prompt_async())
            await asyncio.wait((prompt, self._link.ended), return_when=asyncio.FIRST_COMPLETED)
            if not prompt.done():
                prompt.cancel()
                await asyncio.wait({prompt})
                self._show_error(str(self._link.ended.result()))
                return LOST
            try:
                line = prompt.result()
            except LineAbandoned:
                continue
            except EOFError:
                break
            try:
                if not await self._line(line):
                    break
            except (OptionError, Failure) as error:
                text = f"{error.class_name}: {error.desc}" if isinstance(error, Failure) else str(error)
                hint = getattr(error, "hint", None)
                self._show_error(text + (f"\n{hint}" if hint else ""))
            except ConnectionError as error:
                self._show_error(str(error))
                return LOST
        return DONE

    async def _line(self, line: str) -> bool:
        """Whether to go on."""
        words = line.split()
        if words == ["exit"]:
            return False
        if words[:1] == ["help"]:
            print_formatted_text(help_text(words[1:], self._schema))
            return True
        call = parse(line, self._schema)
        if call is None:
            return True
        await self._patiently(call)
        if call.command == "quit":
            await self._link.ended
            return False
        if not call.command.startswith(("query-", "qom-")):
            self._ask_names()
        return True

    async def _patiently(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        running = asyncio.ensure_future(self._link.execute(call))
        loop.add_signal_handler(SIGINT, running.cancel)
        try:
            value = await running
        except asyncio.CancelledError:
            if not running.cancelled():
                raise
            self._show_error(f"{call.command} goes on; its answer will be shown when it comes")
            return
        finally:
            loop.remove_signal_handler(SIGINT)
        print_formatted_text(coloured(as_text(value)))

    def _ask_names(self) -> None:
        """Ask in the background what there is: the server may be busy."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._find_names())

    async def _find_names(self) -> None:
        for kind, call, member in SOURCES:
            if call.command in self._schema.commands:
                try:
                    self._completer.names[kind] = _names(await self._link.execute(call), member)
                except Failure:
                    pass  # then there are none
                except ConnectionError:
                    return


def _names(found: Any, member: str) -> list[str]:
    if not isinstance(found, list):
        return []
    names = [each.get(member) for each in found if isinstance(each, dict)]
    return sorted(name for name in names if isinstance(name, str) and name != "type")


async def converse(link: Link, sink: Sink, history: str | None) -> int:
    """Let a person talk to a QMP server; the exit status. ``history``: the file of that, if there is one."""
    conversation = Conversation(
        link, await fetch_schema(link), DiscreetInMemory() if history is None else Discreet(history)
    )
    sink.event = conversation.show_event
    link.on_late = conversation.show_late
    assert link.greeting is not None
    version = link.greeting.version.get("qemu", {})
    number = ".".join(str(version.get(part, "?")) for part in ("major", "minor", "micro"))
    print_formatted_text(f"Connected to QEMU {number} {link.greeting.version.get('package', '')}".rstrip())
    print_formatted_text("TAB completes, 'help' lists the commands, Ctrl-D leaves.")
    return await conversation.run()


async def pass_through(link: Link, sink: Sink, terminal: Terminal) -> int:
    """Join a terminal with a monitor for people, which edits lines and completes by itself; the exit status."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[Any] = loop.create_future()
    buffer, unshown = bytearray(READ_BYTES), bytearray()
    unshown += sink.gathered

    def show(data: bytes = b"") -> None:
        unshown.extend(data)
        try:
            while unshown:
                del unshown[: terminal.send(bytes(unshown))]
        except BlockingIOError:
            loop.add_writer(terminal.fileno(), show)
        else:
            loop.remove_writer(terminal.fileno())

    def typed() -> None:
        try:
            keys = bytes(buffer[: terminal.recv_into(buffer)])
        except BlockingIOError:
            return
        stop = next((number for number, key in enumerate(keys) if key in LEAVE), None)
        if keys:
            link.send(keys[:stop])
        if (stop is not None or not keys) and not over.done():
            over.set_result(DONE)

    def interrupted() -> None:
        if not over.done():
            over.set_result(INTERRUPTED)

    terminal.set_echo(False)
    sink.text = show
    loop.add_reader(terminal.fileno(), typed)
    loop.add_signal_handler(SIGINT, interrupted)
    try:
        show()
        await asyncio.wait((over, link.ended), return_when=asyncio.FIRST_COMPLETED)
        return int(over.result()) if over.done() else DONE
    finally:
        loop.remove_signal_handler(SIGINT)
        loop.remove_reader(terminal.fileno())
        loop.remove_writer(terminal.fileno())
        terminal.send(b"\r\n")
        terminal.close()
