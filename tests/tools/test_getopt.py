# SPDX-License-Identifier: Apache-2.0
"""Command lines as getopt_long(3) reads them."""

from __future__ import annotations

import pytest

from bottomhalf.tools.getopt import VALUE, Option, UsageError, fail, parse, program_name

OPTIONS = (
    Option("help", "h"),
    Option("port", "p", VALUE),
    Option("persistent", "t"),
    Option("pid-file", takes=VALUE),
    Option("pid", takes=VALUE),
)


def read(*words: str) -> list[tuple[str, str]]:
    return [(name, value) for name, value, _ in parse(list(words), OPTIONS)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), []),
        (("a",), [("", "a")]),
        (("-h",), [("help", "")]),
        (("--help",), [("help", "")]),
        (("--he",), [("help", "")]),
        (("-p", "1"), [("port", "1")]),
        (("-p1",), [("port", "1")]),
        (("-p=1",), [("port", "=1")]),
        (("-p", ""), [("port", "")]),
        (("-p", "-t"), [("port", "-t")]),
        (("--port", "--"), [("port", "--")]),
        (("--port=1=2",), [("port", "1=2")]),
        (("--port=",), [("port", "")]),
        (("--pid", "1"), [("pid", "1")]),  # exact, though --pid-file begins so too
        (("-thp", "1"), [("persistent", ""), ("help", ""), ("port", "1")]),
        (("-thp1",), [("persistent", ""), ("help", ""), ("port", "1")]),
        (("a", "-t", "b"), [("", "a"), ("persistent", ""), ("", "b")]),
        (("-t", "--", "-h", "--"), [("persistent", ""), ("", "-h"), ("", "--")]),
        (("-",), [("", "-")]),
        (("",), [("", "")]),
    ],
)
def test_reads(words: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    assert read(*words) == expected


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--nope",), "unrecognized option '--nope'"),
        (("--nope=1",), "unrecognized option '--nope=1'"),
        (("-x",), "invalid option -- 'x'"),
        (("-tx",), "invalid option -- 'x'"),
        (("-p",), "option requires an argument -- 'p'"),
        (("-tp",), "option requires an argument -- 'p'"),
        (("--port",), "option '--port' requires an argument"),
        (("--po",), "option '--port' requires an argument"),
        (("--help=x",), "option '--help' doesn't allow an argument"),
        (("--p",), "option '--p' is ambiguous; possibilities: '--port' '--persistent' '--pid-file' '--pid'"),
        (("--pe=1",), "option '--persistent' doesn't allow an argument"),
    ],
)
def test_refuses_in_the_words_of_glibc(words: tuple[str, ...], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(*words)
    assert str(caught.value) == text


def test_nearest_option_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        read("--prot", "1")
    assert caught.value.hint == "Did you mean '--port'?" or caught.value.hint == "Did you mean 'port'?"


def test_what_was_typed() -> None:
    words = ["--po=1", "--po", "2", "-p3", "-p", "4", "x"]
    assert [typed for _, _, typed in parse(words, OPTIONS)] == ["--po=1", "--po 2", "-p3", "-p 4", "x"]


def test_errors_come_when_they_are_reached() -> None:
    words = parse(["-h", "--nope"], OPTIONS)
    assert next(words)[0] == "help"
    with pytest.raises(UsageError):
        next(words)


def test_fail(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fail("tool", "it broke\nhere is why", "Try another.")
    assert caught.value.code == 1
    assert capsys.readouterr() == ("", "tool: it broke\nhere is why\nTry another.\n")


@pytest.mark.parametrize(("argv0", "name"), [("/usr/bin/qemu-nbd", "qemu-nbd"), ("x", "x"), ("", "tool")])
def test_program_name(monkeypatch: pytest.MonkeyPatch, argv0: str, name: str) -> None:
    monkeypatch.setattr("sys.argv", [argv0])
    assert program_name("tool") == name
