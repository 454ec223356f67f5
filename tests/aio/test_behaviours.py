# SPDX-License-Identifier: Apache-2.0
"""Every behaviour and every trap has a test, and docs/behaviours.md says which."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("behaviours", ROOT / "scripts" / "behaviours.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_behaviour_has_a_test() -> None:
    behaviours = script()
    by_name, by_trap = behaviours.found()
    counts = {suite: len(names.split()) for suite, names in behaviours.SUITES.items()}
    assert sorted(counts.values()) == sorted([27, 1, 6, 12, 6, 30, 5, 22, 2, 17, 1, 2, 2])
    wanted = {name for names in behaviours.SUITES.values() for name in names.split()}
    assert wanted - set(by_name) == set(behaviours.ABSENT)
    assert set(by_name) - wanted == set(), "a name that QEMU does not have"
    assert {trap for trap in behaviours.TRAPS if not by_trap[trap]} == set()


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "behaviours.md").read_text() == script().page(), "run scripts/behaviours.py"
