# SPDX-License-Identifier: Apache-2.0
"""The house has floors, and an arrow goes down only.

A package may import packages of lower floors and itself. Packages on one floor do not know each other, so no
cycle between packages is possible. The faces at the top of the package (``import bottomhalf``) stand above
all floors, import them only when they are used, and nobody below looks up to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.style.imports import Problem, imports, sources

FLOORS: Final = {
    "host": 0,
    "aio": 1,
    "wire": 2,
    "qapi": 2,
    "qom": 2,
    "tls": 2,
    "block": 3,
    "drivers": 4,
    "devices": 5,
    "exports": 6,
    "jobs": 6,
    "monitor": 7,
    "chardev": 7,
    "tools": 8,
}
# Neighbours on one floor of which the first may know the second, each with its reason.
BESIDE: Final = {
    ("monitor", "chardev"),  # a monitor speaks through a character device
    ("tls", "qom"),  # credentials are objects that users make
}
# Modules beside the packages: what a library user imports. They may import any floor; those that every tool
# loads, only lazily.
FACES: Final = frozenset({"__init__", "__main__", "image_bitmaps", "images", "library"})
LAZY_FACES: Final = frozenset({"__init__", "__main__"})


def check_layers(root: Path) -> list[Problem]:
    """Return every import of the package at ``root`` that does not go down."""
    problems = []
    for source in sources(root):
        top = source.module.split(".")[1] if "." in source.module else "__init__"
        is_face = source.path.count("/") == 0
        if is_face and top not in FACES:
            problems.append(Problem(source.path, 1, f"{top} is neither a floor's package nor a named face"))
            continue
        if not is_face and top not in FLOORS:
            problems.append(
                Problem(source.path, 1, f"package {top} has no floor (FLOORS in {Path(__file__).name})")
            )
            continue
        for found in imports(source):
            parts = found.name.split(".")
            if parts[0] != root.name or (len(parts) > 1 and parts[1].startswith("__")):
                continue  # another distribution, or a name like bottomhalf.__version__
            target = parts[1] if len(parts) > 1 else "__init__"
            complaint = _complaint(top, is_face, target, found.lazy)
            if complaint:
                problems.append(Problem(source.path, found.line, f"{complaint} (import of {found.name})"))
    return problems


def _complaint(top: str, is_face: bool, target: str, lazy: bool) -> str | None:
    if is_face:
        fine = lazy or target in FACES or top not in LAZY_FACES
        return None if fine else f"the face {top} must import {target} lazily, inside a function"
    if target not in FLOORS:
        return f"{top} looks up to the face of the package" if target in FACES else None
    here, there = FLOORS[top], FLOORS[target]
    if here < there:
        return f"{top} (floor {here}) must not know {target} (floor {there})"
    if here == there and top != target and (top, target) not in BESIDE:
        return f"{top} and {target} are neighbours on floor {here} and must not know each other"
    return None
