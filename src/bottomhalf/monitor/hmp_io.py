# SPDX-License-Identifier: Apache-2.0
"""qemu-io NODE "COMMAND": requests to a node by hand.

Each command makes a backend of its own, which competes for permissions like any other user: a node that an export
writes to exclusively is not written to behind its back. It waits for its end by polling the main context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import wait_while
from bottomhalf.block import BlockBackend, Node
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE
from bottomhalf.host.request import DISCARD, FLUSH, FUA, READ, WRITE, WRITE_ZEROES
from bottomhalf.monitor.hmp_table import Output, UsageError
from bottomhalf.qapi.visit import parse_integer, parse_size

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage

TRANSFER_BYTES_MAX: Final = 1 << 30  # of one read or write; the buffer is in memory
DUMP_BYTES_MAX: Final = 1 << 20  # of a read that is shown
PATTERN_DEFAULT: Final = 0xCD
_UNITS: Final = tuple((1 << shift, f"{letter}iB") for shift, letter in zip(range(60, 0, -10), "EPTGMK", strict=True))


class _Words:
    """Flags and positional arguments of a command."""

    def __init__(self, name: str, words: list[str], flags: str, with_value: str, least: int, most: int) -> None:
        self.flags: set[str] = set()
        self.values: dict[str, str] = {}
        self.plain: list[str] = []
        left = list(words)
        while left:
            word = left.pop(0)
            if not word.startswith("-") or len(word) < 2 or word[1:2].isdigit():
                self.plain.append(word)
                continue
            for index, letter in enumerate(word[1:], 1):
                if letter in with_value:
                    value = word[index + 1 :] or (left.pop(0) if left else None)
                    if value is None:
                        raise UsageError(f"{name}: option requires an argument -- '{letter}'")
                    self.values[letter] = value
                    break
                if letter not in flags:
                    raise UsageError(f"{name}: invalid option -- '{letter}'")
                self.flags.add(letter)
        if not least <= len(self.plain) <= most:
            expected = str(least) if least == most else f"between {least} and {most}"
            raise UsageError(
                f"bad argument count {len(self.plain)} to {name}, expected {expected} "
                f"argument{'s' * (least != 1 or most != 1)}"
            )

    def size(self, index: int) -> int:
        return self._size(self.plain[index])

    def size_of(self, letter: str, default: int) -> int:
        return self._size(self.values[letter]) if letter in self.values else default

    @staticmethod
    def _size(text: str) -> int:
        value = parse_size(text)
        if value is None or value >= 1 << 63:
            raise UsageError(
                "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- " + text
                if value is None
                else f"Parsing error: argument too large -- {text}"
            )
        return value

    def pattern(self) -> int:
        value = parse_integer(self.values["P"])
        if value is None or not 0 <= value <= 255:
            raise UsageError(f"{self.values['P']} is not a valid pattern byte")
        return value


def size_text(count: float) -> str:
    """Bytes as people write them."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.3f}".rstrip("0").rstrip(".") + f" {name}"
    return f"{count:.3f}".rstrip("0").rstrip(".") + " bytes"


def _report(storage: Storage, out: Output, verb: str, offset: int, count: int, begun_ns: int, words: _Words) -> None:
    if "q" in words.flags:
        return
    seconds = max((storage.host.monotonic_ns() - begun_ns) / 1e9, 1e-9)
    if "C" in words.flags:
        out.line(f"{count},1,{seconds:.6f},{count / seconds:.0f},{1 / seconds:.0f}")
        return
    out.line(f"{verb} {count}/{count} bytes at offset {offset}")
    rates = f"{size_text(count / seconds)}/sec and {1 / seconds:.4f} ops/sec"
    out.line(f"{size_text(count)}, 1 ops; {seconds:05.2f} sec ({rates})")


def _checked_length(words: _Words) -> tuple[int, int]:
    offset, count = words.size(0), words.size(1)
    if count > TRANSFER_BYTES_MAX and "z" not in words.flags:
        raise UsageError(f"length cannot exceed {TRANSFER_BYTES_MAX}, given {words.plain[1]}")
    return offset, count


class _Use:
    """The node, used by one command."""

    def __init__(self, storage: Storage, node: Node, held: int) -> None:
        self.backend = BlockBackend(storage.graph, "qemu-io", held=held, shared=PERM_ALL)
        try:
            self.backend.insert(node)
        except BaseException:
            self.backend.close()
            raise

    def __enter__(self) -> BlockBackend:
        return self.backend

    def __exit__(self, *raised: object) -> None:
        self.backend.close()


def _read(storage: Storage, node: Node, words: list[str], out: Output) -> None:
    given = _Words("read", words, "Cqvr", "Psl", 2, 2)
    offset, count = _checked_length(given)
    buffer = bytearray(count)
    begun_ns = storage.host.monotonic_ns()
    with _Use(storage, node, PERM_CONSISTENT_READ) as backend:
        try:
            backend.request(READ, offset, count, memoryview(buffer))
        except OSError as error:
            raise UsageError(f"read failed: {error.strerror}") from None
    if "P" in given.values:
        start = given.size_of("s", 0)
        length = given.size_of("l", count - start)
        if buffer[start : start + length].strip(bytes([given.pattern()])):
            out.line(f"Pattern verification failed at offset {offset + start}, {length} bytes")
    if "v" in given.flags:
        _dump(out, offset, bytes(buffer[:DUMP_BYTES_MAX]))
    _report(storage, out, "read", offset, count, begun_ns, given)


def _dump(out: Output, offset: int, data: bytes) -> None:
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        shown = "".join(chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else "." for byte in row)
        out.line(f"{offset + start:08x}:  {row.hex(' ')}  {shown}")


def _write(storage: Storage, node: Node, words: list[str], out: Output) -> None:
    given = _Words("write", words, "Cfnquz", "P", 2, 2)
    if "z" in given.flags and "P" in given.values:
        raise UsageError("-z and -P cannot be specified at the same time")
    if "u" in given.flags and "z" not in given.flags:
        raise UsageError("-u requires -z to be specified")
    if "n" in given.flags and "z" not in given.flags:
        raise UsageError("-n requires -z to be specified")
    offset, count = _checked_length(given)
    pattern = given.pattern() if "P" in given.values else PATTERN_DEFAULT
    begun_ns = storage.host.monotonic_ns()
    flags = FUA if "f" in given.flags else 0
    with _Use(storage, node, PERM_CONSISTENT_READ | PERM_WRITE) as backend:
        try:
            if "z" in given.flags:
                backend.request(WRITE_ZEROES, offset, count, None, flags)
            else:
                backend.request(WRITE, offset, count, memoryview(bytearray([pattern]) * count), flags)
        except OSError as error:
            raise UsageError(f"write failed: {error.strerror}") from None
    _report(storage, out, "wrote", offset, count, begun_ns, given)


def _discard(storage: Storage, node: Node, words: list[str], out: Output) -> None:
    given = _Words("discard", words, "Cq", "", 2, 2)
    offset, count = given.size(0), given.size(1)
    begun_ns = storage.host.monotonic_ns()
    with _Use(storage, node, PERM_CONSISTENT_READ | PERM_WRITE) as backend:
        try:
            backend.request(DISCARD, offset, count)
        except OSError as error:
            raise UsageError(f"discard failed: {error.strerror}") from None
    _report(storage, out, "discard", offset, count, begun_ns, given)


def _flush(storage: Storage, node: Node, words: list[str], out: Output) -> None:
    _Words("flush", words, "", "", 0, 0)
    with _Use(storage, node, PERM_CONSISTENT_READ) as backend:
        try:
            backend.request(FLUSH, 0, 0)
        except OSError as error:
            raise UsageError(f"flush failed: {error.strerror}") from None


def _length(storage: Storage, node: Node, words: list[str], out: Output) -> None:
    _Words("length", words, "", "", 0, 0)
    out.line(size_text(node.size))


def _truncate(storage: Storage, node: Node, words: list[str], out: Output) -> None:
    size = _Words("truncate", words, "", "", 1, 1).size(0)
    with _Use(storage, node, PERM_RESIZE) as backend:
        storage.loop.main.run(backend.co_truncate(size), "truncate")


def _sleep(storage: Storage, node: Node, words: list[str], out: Output) -> None:
    """A wait of so many milliseconds, as any other: the main context is served, nothing else is."""
    text = _Words("sleep", words, "", "", 1, 1).plain[0]
    milliseconds = parse_integer(text)
    if milliseconds is None or milliseconds < 0:
        raise UsageError(f"{text} is not a numeric value")
    main = storage.loop.main
    over: list[bool] = []
    timer = main.timer(lambda: over.append(True), name="qemu-io sleep")
    timer.arm_ns(main.now_ns() + milliseconds * 1_000_000)
    try:
        wait_while(main, lambda: not over, f"the end of a sleep of {milliseconds} ms that a monitor asked for")
    finally:
        timer.cancel()


def _help(storage: Storage, node: Node, words: list[str], out: Output) -> None:
    for names, _, usage, text in _COMMANDS:
        out.line(f"{names[0]} {usage} -- {text}".replace("  ", " "))


_Command = Callable[["Storage", Node, "list[str]", Output], None]
_COMMANDS: Final[tuple[tuple[tuple[str, ...], _Command, str, str], ...]] = (
    (("read", "r"), _read, "[-Cqv] [-P pattern [-s off] [-l len]] off len", "reads a number of bytes at an offset"),
    (("write", "w"), _write, "[-Cfnquz] [-P pattern] off len", "writes a number of bytes at an offset"),
    (("discard", "d"), _discard, "[-Cq] off len", "discards a number of bytes at an offset"),
    (("flush", "f"), _flush, "", "flush all in-core file state to disk"),
    (("length", "l"), _length, "", "gets the length of the node"),
    (("truncate", "t"), _truncate, "off", "changes the length of the node"),
    (("sleep",), _sleep, "ms", "waits for so many milliseconds"),
    (("help", "h", "?"), _help, "", "help for these commands"),
)


def run(storage: Storage, node: Node, line: str, out: Output) -> None:
    """Run a command line on a node. UsageError, BlockError, OSError."""
    words = line.split()
    if not words:
        return
    for names, command, _, _ in _COMMANDS:
        if words[0] in names:
            command(storage, node, words[1:], out)
            return
    raise UsageError(f'command "{words[0]}" not found')
