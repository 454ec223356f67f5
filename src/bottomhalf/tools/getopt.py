# SPDX-License-Identifier: Apache-2.0
"""Command lines as getopt_long(3) reads them, because users' scripts were written against it.

Options are handled in the order given, a long option may be shortened as long as it is unambiguous, its value
follows after ``=`` or as the next word, short options may be bundled, ``--`` ends the options, and operands may
stand between them. What is wrong is an error when it is reached, not before: ``--help --nonsense`` is help.

    for name, value, typed in parse(["--pid=3", "disk.raw"], (Option("pidfile", takes=VALUE),)):
        ...  # ("pidfile", "3", "--pid=3"), then ("", "disk.raw", "disk.raw")

Every tool loads this file before it knows what it has to do: nothing is imported here that takes time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final, NoReturn

NO_VALUE: Final = 0
VALUE: Final = 1


class Option:
    """One option: its long name, an optional short one, whether it takes a value."""

    __slots__ = ("name", "short", "takes")

    def __init__(self, name: str, short: str = "", takes: int = NO_VALUE) -> None:
        self.name = name
        self.short = short
        self.takes = takes


class UsageError(Exception):
    """The command line is wrong; ``str()`` is the sentence, ``hint`` what to try."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def parse(arguments: list[str], options: tuple[Option, ...]) -> Iterator[tuple[str, str, str]]:
    """(name, value, what was typed) in order; operands have the name "". UsageError names what is not known."""
    words = iter(arguments)
    for word in words:
        if word == "--":
            yield from (("", operand, operand) for operand in words)
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option = _find(name, word, options)
            if option.takes == NO_VALUE:
                if equals:
                    raise UsageError(f"option '--{option.name}' doesn't allow an argument")
                yield option.name, "", word
            elif equals:
                yield option.name, value, word
            else:
                value = _next(words, f"option '--{option.name}' requires an argument")
                yield option.name, value, f"{word} {value}"
        elif word.startswith("-") and word != "-":
            yield from _short(word, words, options)
        else:
            yield "", word, word


def _find(name: str, word: str, options: tuple[Option, ...]) -> Option:
    exact = [option for option in options if option.name == name]
    found = exact or [option for option in options if option.name.startswith(name)]
    if not found:
        from bottomhalf.qapi.errors import did_you_mean

        raise UsageError(f"unrecognized option '{word}'", did_you_mean(name, [o.name for o in options]))
    if len(found) > 1:
        possible = " ".join(f"'--{option.name}'" for option in found)
        raise UsageError(f"option '{word}' is ambiguous; possibilities: {possible}")
    return found[0]


def _short(word: str, words: Iterator[str], options: tuple[Option, ...]) -> Iterator[tuple[str, str, str]]:
    letters = word[1:]
    while letters:
        letter, letters = letters[0], letters[1:]
        option = next((option for option in options if option.short == letter), None)
        if option is None:
            raise UsageError(f"invalid option -- '{letter}'")
        if option.takes == NO_VALUE:
            yield option.name, "", word
        elif letters:
            yield option.name, letters, word
            return
        else:
            value = _next(words, f"option requires an argument -- '{letter}'")
            yield option.name, value, f"{word} {value}"


def _next(words: Iterator[str], complaint: str) -> str:
    for word in words:
        return word
    raise UsageError(complaint)


def program_name(default: str) -> str:
    """The name that we were called by: a tool answers to it, so that it can be linked under another's name."""
    return sys.argv[0].rpartition("/")[2] or default


def fail(program: str, message: str, hint: str | None = None) -> NoReturn:
    """Print an error as the program's, and exit with status 1."""
    lines = message.split("\n")
    print(f"{program}: {lines[0]}", *lines[1:], *([hint] if hint else []), sep="\n", file=sys.stderr)
    sys.exit(1)
