# SPDX-License-Identifier: Apache-2.0
"""Command lines as getopt_long(3) reads them, because users' scripts were written against it.

Options are handled in the order given, a long option may be shortened as long as it is unambiguous, its value
follows after ``=`` or as the next word, short options may be bundled, ``--`` ends the options, and operands may
stand between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NoReturn

from bottomhalf.qapi.errors import did_you_mean

NO_VALUE: Final = 0
VALUE: Final = 1


@dataclass(frozen=True)
class Option:
    """One option: its long name, an optional short one, whether it takes a value."""

    name: str
    short: str = ""
    takes: int = NO_VALUE


class UsageError(Exception):
    """The command line is wrong; ``str()`` is the sentence, ``hint`` what to try."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def parse(arguments: list[str], options: tuple[Option, ...]) -> Iterator[tuple[str, str]]:
    """(name, value) in order; operands have the name "". UsageError names what is not known."""
    words = iter(arguments)
    for word in words:
        if word == "--":
            yield from (("", operand) for operand in words)
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option = _find(name, options)
            if option.takes == NO_VALUE:
                if equals:
                    raise UsageError(f"option '--{option.name}' doesn't allow an argument")
                yield option.name, ""
            else:
                yield option.name, value if equals else _next(words, f"option '--{option.name}'")
        elif word.startswith("-") and word != "-":
            yield from _short(word[1:], words, options)
        else:
            yield "", word


def _find(name: str, options: tuple[Option, ...]) -> Option:
    exact = [option for option in options if option.name == name]
    found = exact or [option for option in options if option.name.startswith(name)]
    if not found:
        raise UsageError(f"unrecognized option '--{name}'", did_you_mean(name, [o.name for o in options]))
    if len(found) > 1:
        possible = " ".join(f"'--{option.name}'" for option in found)
        raise UsageError(f"option '--{name}' is ambiguous; possibilities: {possible}")
    return found[0]


def _short(letters: str, words: Iterator[str], options: tuple[Option, ...]) -> Iterator[tuple[str, str]]:
    while letters:
        letter, letters = letters[0], letters[1:]
        option = next((option for option in options if option.short == letter), None)
        if option is None:
            raise UsageError(f"invalid option -- '{letter}'")
        if option.takes == NO_VALUE:
            yield option.name, ""
        else:
            yield option.name, letters or _next(words, f"option -- '{letter}'")
            return


def _next(words: Iterator[str], what: str) -> str:
    for word in words:
        return word
    raise UsageError(f"{what} requires an argument")


def fail(program: str, message: str, hint: str | None = None) -> NoReturn:
    """Print an error as the program's, and exit with status 1."""
    import sys

    lines = message.split("\n")
    print(f"{program}: {lines[0]}", *lines[1:], *([hint] if hint else []), sep="\n", file=sys.stderr)
    sys.exit(1)
