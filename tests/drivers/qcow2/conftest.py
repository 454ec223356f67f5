# SPDX-License-Identifier: Apache-2.0
"""Tells at the end of a run how many states after a power cut were opened."""

from __future__ import annotations

import pytest

from tests.drivers.qcow2.crash_states import EXPLORED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not EXPLORED:
        return
    total = len(set().union(*EXPLORED.values()))
    terminalreporter.section("states of qcow2 images after a power cut, equal ones counted once")
    for name, states in EXPLORED.items():
        terminalreporter.line(f"{len(states):7d}  {name}")
    terminalreporter.line(f"{total:7d}  altogether")
