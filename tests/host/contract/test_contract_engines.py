# SPDX-License-Identifier: Apache-2.0
"""The work that every engine does, where nothing fails. ``linux/test_syscall_faults`` has the same done where each
system call fails in turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import ENGINE_KINDS
from tests.host.contract.workload import WORK, check, close_files, do, make_engine, make_files, open_files


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("engine", [*ENGINE_KINDS, "inline"])
def test_all_of_it(engine: str, work: str, direct: bool, tmp_path: Path) -> None:
    host = LinuxHost()
    make_files(tmp_path)
    try:
        opened, made = open_files(host, tmp_path, direct), make_engine(host, engine)
    except OSError as refused:
        pytest.skip(f"cannot be had here: {refused}")
    for _ in range(3):
        check(do(made, WORK[work](opened)), tmp_path, {0})
    made.close()
    close_files(opened)
