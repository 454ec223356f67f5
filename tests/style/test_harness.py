# SPDX-License-Identifier: Apache-2.0
"""What tests/conftest.py promises, tried on small test files in a directory of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def run(tmp_path: Path, text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on one test file beside a copy of our conftest."""
    copy = tmp_path / "tests"
    (copy / "peers").mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "seccomp.py", "peers/__init__.py", "peers/programs.py"):
        shutil.copy(TESTS / name, copy / name)
    (copy / "test_it.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    soak: long\naddopts = --strict-markers\n")
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "HYPOTHESIS_PROFILE")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=tmp_path,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


SKIPPING = """
import pytest
def test_needs(require, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    require("fio")
def test_passes():
    pass
"""


@pytest.mark.parametrize(("ci", "status"), [({}, 0), ({"CI": "true"}, 1)])
def test_a_skip_is_counted_and_fails_ci(tmp_path: Path, ci: dict[str, str], status: int) -> None:
    result = run(tmp_path, SKIPPING, **ci)
    assert "    1  needs fio (apt package fio)" in result.stdout
    assert ("EXPECTED_SKIPS" in result.stdout) == bool(ci)
    assert "1 passed, 1 skipped" in result.stdout.splitlines()[-1]
    assert result.returncode == status


def test_an_unknown_requirement_is_an_error(tmp_path: Path) -> None:
    result = run(tmp_path, "def test(require): require('no-such-program')\n")
    assert "add it there and to scripts/strangers.sh" in result.stdout
    assert result.returncode == 1


def test_a_failing_seed_says_how_to_repeat_it(tmp_path: Path) -> None:
    result = run(tmp_path, "def test(seed): assert seed != 2\n", "--seeds", "4")
    assert "python -m pytest --seed 2 'tests/test_it.py::test[seed2]'" in result.stdout
    assert "1 failed, 3 passed" in result.stdout


def test_one_seed_can_be_repeated(tmp_path: Path) -> None:
    text = "def test(seed): assert seed == 12345\n"
    assert "1 passed" in run(tmp_path, text, "--seed", "12345", "tests/test_it.py::test[seed12345]").stdout


def test_a_hang_ends_the_run_with_stacks(tmp_path: Path) -> None:
    text = "import time, pytest\n@pytest.mark.hang_seconds(0.2)\ndef test_sleeper(): time.sleep(30)\n"
    result = run(tmp_path, text)
    assert "Timeout" in result.stderr
    assert "in test_sleeper" in result.stderr
    assert result.returncode == 1


def test_soak_tests_run_only_when_asked(tmp_path: Path) -> None:
    text = "import pytest\n@pytest.mark.soak\ndef test_long(): pass\ndef test_short(): pass\n"
    assert "1 passed, 1 deselected" in run(tmp_path, text).stdout


def test_a_spawned_process_ends_with_its_test(tmp_path: Path) -> None:
    text = """
import os
def test_start(spawn):
    global pid
    pid = spawn(["sleep", "60"]).process.pid
    os.kill(pid, 0)
def test_gone():
    assert not os.path.exists(f"/proc/{pid}")
"""
    assert "2 passed" in run(tmp_path, text).stdout


FORBIDDEN = '''
import errno
import pytest
from bottomhalf.host.linux import LinuxHost

def refusal(kind):
    with pytest.raises(OSError) as caught:
        LinuxHost().engine(kind)
    return errno.errorcode[caught.value.errno]

def test_refused_and_replaced():
    assert refusal("io_uring") == "ENOSYS" and refusal("linux-aio") == "EPERM"
    engine = LinuxHost().engine("auto")
    assert engine.name == "threads"
    engine.close()

@pytest.mark.needs("io_uring")
def test_about_it():
    raise AssertionError

@pytest.mark.parametrize("kind", ["io_uring", "threads"])
def test_of_each(kind):
    LinuxHost().engine(kind).close()
'''


def test_what_is_forbidden(tmp_path: Path) -> None:
    """The kernel refuses it, the programs do without, and tests that are about it skip with the reason."""
    done = run(tmp_path, FORBIDDEN, "--forbid", "io_uring=ENOSYS,linux-aio")
    assert "2 passed, 2 skipped" in done.stdout and "the kernel says ENOSYS to io_uring" in done.stdout
    assert "2  io_uring is forbidden in this run (--forbid)" in done.stdout


@pytest.mark.parametrize("wrong", ["kqueue", "io_uring=NONSENSE", "io_uring,"])
def test_what_cannot_be_forbidden(tmp_path: Path, wrong: str) -> None:
    assert "is not one of io_uring, linux-aio" in run(tmp_path, FORBIDDEN, "--forbid", wrong).stderr
