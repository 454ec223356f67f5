# SPDX-License-Identifier: Apache-2.0
"""How every file looks: licence line, length of lines and files, no leftover notes, no private paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.style.imports import Problem

LINE_LENGTH_MAX: Final = 120  # as in pyproject.toml, for ruff
FILE_LINES_MAX: Final = 600
SPDX: Final = "SPDX-License-Identifier: Apache-2.0"
LANGUAGES: Final = {".py": "# ", ".sh": "# ", ".c": "// "}
FOLDERS: Final = ("src", "tests", "benchmarks", "scripts", "docs", ".ci")
TEXT: Final = frozenset({*LANGUAGES, ".md", ".toml", ".cfg", ".json", ".yaml", ".yml", ""})
# Spelt so that this file does not find itself.
NOTE: Final = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b")
# Directories that every Unix machine has: a path below them is nobody's own.
COMMON_WORDS: Final = (
    "/ /bin /boot /dev /etc /home /lib /media /mnt /opt /proc /run /sbin /srv /sys /tmp /usr /var /var/tmp"
)
COMMON: Final = frozenset(COMMON_WORDS.split())


def text_files(repository: Path) -> Iterator[Path]:
    """Yield the files that people write; caches, environments and build products are left out."""
    yield from (file for file in sorted(repository.iterdir()) if file.is_file() and _is_text(file))
    for folder in FOLDERS:
        for file in sorted((repository / folder).rglob("*")):
            generated = any(part == "__pycache__" or part.endswith(".egg-info") for part in file.parts)
            if file.is_file() and not generated and _is_text(file):
                yield file


def check_files(repository: Path, private: Iterator[str] | None = None) -> list[Problem]:
    """Return what is wrong with the look of the files of a repository."""
    needles = tuple(private_paths(repository) if private is None else private)
    return [problem for file in text_files(repository) for problem in check_file(file, repository, needles)]


def check_file(file: Path, repository: Path, private: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Yield what is wrong with the look of one file."""
    path = str(file.relative_to(repository))
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    is_code = file.suffix in LANGUAGES
    if is_code:
        licence = LANGUAGES[file.suffix] + SPDX
        first = next((line for line in lines if not line.startswith("#!")), "")
        if first != licence:
            yield Problem(path, 1, f"must begin with {licence!r}")
        if len(lines) > FILE_LINES_MAX:
            yield Problem(path, len(lines), f"has {len(lines)} lines, at most {FILE_LINES_MAX}: split it")
    for number, line in enumerate(lines, 1):
        if is_code and len(line) > LINE_LENGTH_MAX:
            yield Problem(path, number, f"is {len(line)} characters long, at most {LINE_LENGTH_MAX}")
        if NOTE.search(line):
            yield Problem(path, number, "has a leftover note: do it, or say what is missing in a sentence")
        for needle in private:
            # Not in the midst of a longer path: a checkout in /src must not make every src/ a finding.
            if needle in line and re.search(r"(?<![\w.)}\]])" + re.escape(needle), line):
                yield Problem(path, number, f"names {needle}, a path of the machine that it was written on")


def private_paths(repository: Path) -> Iterator[str]:
    """Yield the paths that only this machine has: where the repository lies, and the home of its author."""
    for directory in (*_upwards(repository.resolve()), *_upwards(Path.home())):
        if str(directory) not in COMMON:
            yield f"{directory}/"


def _upwards(directory: Path) -> tuple[Path, ...]:
    return (directory, *directory.parents)


def _is_text(file: Path) -> bool:
    return file.suffix in TEXT or file.name == "Makefile"
