# SPDX-License-Identifier: Apache-2.0
"""Running the tools: in this process as far as they get before they serve, and as commands."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from bottomhalf.aio.thread import own
from bottomhalf.monitor.storage import Storage

SECONDS_MAX = 30


class Outcome:
    """How a tool ended."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status = status
        self.stdout = stdout
        self.stderr = stderr

    def __repr__(self) -> str:
        return f"status {self.status}\n{self.stdout}\n{self.stderr}"


@pytest.fixture(autouse=True)
def _as_if_alone() -> Iterator[None]:
    """The tools tune the process they think is theirs."""
    own.state.context = None
    yield
    own.state.context = None
    gc.enable()
    gc.unfreeze()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Storage]:
    """Instead of serving, the storages of tools that got so far are left here, closed."""
    storages: list[Storage] = []
    monkeypatch.setattr(Storage, "run_forever", lambda storage: storages.append(storage))
    return storages


@pytest.fixture
def tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Give ``tool(main, words, name="bh-nbd")``: run it in this process."""

    def run(main: Callable[[list[str]], int], words: Sequence[str | Path], name: str = "tool") -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{name}"])
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as ended:
            status = int(ended.code or 0)
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def command() -> Callable[..., Outcome]:
    """Give ``command("bh_storage_daemon", words)``: run a tool as a process of its own, to its end."""

    def run(module: str, words: Sequence[str | Path], input: str | None = None, cwd: Path | None = None) -> Outcome:
        done = subprocess.run(
            argv(module, words), capture_output=True, text=True, timeout=SECONDS_MAX, input=input, cwd=cwd
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


def argv(module: str, words: Sequence[str | Path]) -> list[str]:
    """The command line of a tool in a process of its own."""
    return [sys.executable, "-m", f"bottomhalf.tools.{module}", *map(str, words)]


def options_in(text: str) -> set[str]:
    """The long options that a help text names."""
    return set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text))
