# SPDX-License-Identifier: Apache-2.0
"""The pages do not rot: examples run, links lead somewhere, the reference is what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python runnable\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
SECONDS_MAX = 60


def run(code: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, *code], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS_MAX
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


BLOCKS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, text in enumerate(BLOCK.findall(page.read_text()))
]


@pytest.mark.parametrize("text", BLOCKS)
def test_an_example_runs(text: str, tmp_path: Path) -> None:
    assert run(["-c", text], tmp_path)


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_file_runs(path: Path, tmp_path: Path) -> None:
    assert run([str(path)], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_reference_is_what_the_code_says(tmp_path: Path) -> None:
    printed = run(["-m", "bottomhalf.qapi.reference"], tmp_path)
    assert (ROOT / "docs" / "reference.md").read_text() == printed, (
        "run: python -m bottomhalf.qapi.reference > docs/reference.md"
    )


@pytest.mark.parametrize("name", ["memory_driver.py", "pattern_driver.py"])
def test_the_driver_page_shows_the_drivers_that_exist(name: str) -> None:
    page = (ROOT / "docs" / "write-a-driver.md").read_text()
    source = (ROOT / "examples" / name).read_text()
    assert source.split("\n", 1)[1].lstrip() in page
    assert len(source.splitlines()) < 50


def test_links_to_headings_lead_somewhere() -> None:
    for page in PAGES:
        for path, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
            target = page.parent / path if path else page
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
            assert heading in anchors, f"{page.name}: {path}#{heading}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name
