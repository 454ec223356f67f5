# SPDX-License-Identifier: Apache-2.0
"""How the files of this repository look, and that the check sees each kind of fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.style.files import FILE_LINES_MAX, SPDX, check_file, check_files, private_paths
from tests.style.imports import listing

REPOSITORY = Path(__file__).parents[2]
GOOD = f"# {SPDX}\n"


def test_files_look_as_they_should() -> None:
    problems = check_files(REPOSITORY)
    assert not problems, listing(problems)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import os\n", "must begin"),
        (GOOD + "x" * 121 + "\n", "121 characters"),
        (GOOD + "\n" * FILE_LINES_MAX, "split it"),
        (GOOD + "# TO" + "DO: later\n", "leftover note"),
        (GOOD + "x = 1  # FIX" + "ME\n", "leftover note"),
        (GOOD + "IMAGE = '/where/we/live/image.raw'\n", "names /where/we/live/"),
    ],
)
def test_a_fault_is_found(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "planted.py"
    file.write_text(text)
    (problem,) = check_file(file, tmp_path, ("/where/we/live/",))
    assert complaint in str(problem)


def test_a_good_file_passes(tmp_path: Path) -> None:
    file = tmp_path / "good.py"
    file.write_text(f"#!/usr/bin/env python3\n{GOOD}TEMPORARY = '/tmp/XXXXXX', 'some/where/we/live/x'\n")
    assert list(check_file(file, tmp_path, ("/where/we/live/",))) == []


def test_private_paths_are_not_those_of_every_machine() -> None:
    paths = set(private_paths(Path("/home/somebody/src/checkout")))
    assert paths >= {"/home/somebody/", "/home/somebody/src/", "/home/somebody/src/checkout/"}
    assert not paths & {"//", "/tmp/", "/usr/", "/home/"}
