# SPDX-License-Identifier: Apache-2.0
"""Each file of the qcow2 driver says which clause of the specification it is, what always holds, and which test would
notice if it did not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FILES = sorted(
    each for each in (REPOSITORY / "src/bottomhalf/drivers/qcow2").glob("*.py") if each.name != "__init__.py"
)
# Of the specification, docs/interop/qcow2.txt.
CHAPTERS = {
    "Header",
    "Header padding",
    "Header extensions",
    "Bitmaps extension",
    "Full disk encryption header pointer",
    "Data encryption",
    "Host cluster management",
    "Cluster mapping",
    "Standard Cluster Descriptor",
    "Compressed Clusters Descriptor",
    "Snapshots",
    "Bitmaps",
}
OURS = ("none", "all")
LAST = re.compile(r"\n\nClause: (?P<clause>.+?)\.\nInvariant: (?P<invariant>.+?)\.\nTest: (?P<test>\S+)\n$", re.DOTALL)


def said(text: str) -> re.Match[str] | None:
    return LAST.search(ast.get_docstring(ast.parse(text), clean=False) or "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_a_file_says_of_itself(file: Path) -> None:
    found = said(file.read_text())
    assert found, "the docstring ends with Clause: ..., Invariant: ..., Test: path"
    quoted = set(re.findall(r'"([^"]+)"', found["clause"]))
    assert quoted <= CHAPTERS and (quoted or found["clause"].startswith(OURS))
    test = REPOSITORY / found["test"]
    assert test.is_file() and test.name.startswith("test_")


@pytest.mark.parametrize(
    "text", ['"""A file."""', '"""A file.\n\nClause: "Header".\nTest: tests/x.py\n"""', '"""A file.\n\nClause: .\n"""']
)
def test_it_would_notice(text: str) -> None:
    assert said(text) is None
