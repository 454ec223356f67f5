# SPDX-License-Identifier: Apache-2.0
"""Long texts on a terminal of so many lines."""

from __future__ import annotations

import random

import pytest

from bottomhalf.monitor.hmp import HmpMonitor
from bottomhalf.monitor.pager import MARK, Pager, fits
from bottomhalf.qapi.char import parse_chardev
from tests.monitor.qmp_bench import HmpClient, QmpBench

LINES = [f"line {n}" for n in range(50)]
TEXT = "\n".join(LINES) + "\n"
ERASED = f"\r{' ' * len(MARK)}\r"


def shown(pager: Pager) -> str:
    return pager.take().decode()


def test_screens_and_lines() -> None:
    pager = Pager(TEXT, 10)
    assert shown(pager) == "".join(f"line {n}\r\n" for n in range(9)) + MARK
    pager.key(0x0D)
    assert shown(pager) == ERASED + "line 9\r\n" + MARK
    pager.key(0x20)
    assert shown(pager) == ERASED + "".join(f"line {n}\r\n" for n in range(10, 19)) + MARK
    assert not pager.done
    pager.key(ord("q"))
    assert shown(pager) == ERASED and pager.done
    pager.key(0x20)
    assert shown(pager) == ""


@pytest.mark.parametrize("end", [ord("q"), ord("Q"), 3])
def test_no_more(end: int) -> None:
    pager = Pager(TEXT, 10)
    pager.key(end)
    assert pager.done


def test_a_line_that_wraps_takes_its_room() -> None:
    pager = Pager("x" * 200 + "\n" + TEXT, 6)
    assert shown(pager) == "x" * 200 + "\r\nline 0\r\nline 1\r\n" + MARK
    assert shown(Pager("y" * 1000 + "\nend\n", 6)) == "y" * 1000 + "\r\n" + MARK  # longer than the screen


@pytest.mark.parametrize("rows", range(1, 60))
def test_what_fits(rows: int) -> None:
    assert fits(TEXT, rows) == (rows < 4 or rows >= 51)
    assert fits("", rows) and fits("one\n", rows)


def test_nothing_is_lost(seed: int) -> None:
    """Whatever is pressed, but no end: every line is shown once, and never more at once than the screen has."""
    rng = random.Random(seed)
    rows = rng.randint(4, 30)
    lines = ["z" * rng.randint(0, 100) for _ in range(rng.randint(1, 100))]
    pager = Pager("\n".join(lines) + "\n", rows)
    text = piece = shown(pager)
    while not pager.done:
        assert piece.removeprefix(ERASED).count("\n") < rows
        pager.key(rng.choice([0x20, 0x0D, 0x0A, 0x61, 0x1B]))
        piece = shown(pager)
        text += piece
    assert text.replace(ERASED, "").replace(MARK, "") == "".join(f"{line}\r\n" for line in lines)


def test_on_a_terminal(seed: int) -> None:
    """help is longer than the screen; what is typed meanwhile belongs to the pager, then to the line."""
    with QmpBench(seed) as bench:
        options = parse_chardev("stdio,id=t")
        HmpMonitor(bench.storage, bench.storage.add_chardev("t", options.backend))
        bench.host.stdio().screen_rows = 10
        person = HmpClient(bench, bench.host.terminal())
        bench.people.append(person)
        person.prompt()
        assert person.ask("info name") == ""
        person.type("help\n")
        bench.until(lambda: person.screen.endswith(MARK.encode()), "the first screen")
        assert 8 <= person.screen.count(b"\r\n") <= 10  # with the line that was typed; some lines wrap
        person.type(" ")
        bench.settle()
        assert person.screen.count(MARK.encode()) == 2
        person.type("qinfo version\n")
        bench.until(lambda: person.screen.count(person.PROMPT) == 2, "the version")
        assert b"info version\r\n10." in person.screen
        person.screen.clear()
        bench.host.stdio().screen_rows = 4000
        assert person.ask("help").count("\n") > 20


def test_other_devices_have_no_screen(seed: int) -> None:
    with QmpBench(seed) as bench:
        assert bench.hmp().ask("help").count("\n") > 20
