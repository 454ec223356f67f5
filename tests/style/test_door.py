# SPDX-License-Identifier: Apache-2.0
"""The one door, and that the check of it finds a planted way round."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.style.door import check_door
from tests.style.imports import listing
from tests.style.test_layers import PACKAGE, plant, plant_in_a_copy

MODULES = (
    "time select selectors socket random threading mmap ctypes fcntl signal subprocess multiprocessing "
    "asyncio secrets concurrent.futures tempfile"
)
CALLS = "read write pread pwrite preadv pwritev open fork sendfile close urandom stat"


def test_everything_enters_through_the_host() -> None:
    problems = check_door(PACKAGE)
    assert not problems, listing(problems)


def test_an_import_planted_in_the_real_package_is_found(tmp_path: Path) -> None:
    root = plant_in_a_copy(tmp_path, "block/planted.py", "import time\n")
    assert "block/planted.py" in [problem.path for problem in check_door(root)]


@pytest.mark.parametrize("module", MODULES.split())
@pytest.mark.parametrize("form", ["import {}", "from {} import x", "def f():\n    import {} as harmless"])
def test_a_planted_import_is_found(tmp_path: Path, module: str, form: str) -> None:
    root = plant(tmp_path, "block/planted.py", form.format(module) + "\n")
    assert [problem.path for problem in check_door(root)] == ["block/planted.py"]


@pytest.mark.parametrize(
    "text",
    [
        *(f"import os\nos.{name}(0)" for name in CALLS.split()),
        "import os as harmless\nharmless.read(0, 1)",
        "from os import read",
        "from os import read as harmless\nharmless(0, 1)",
        "import os.path\nos.path.exists('x')",
        "from os import path\npath.getsize('x')",
        "def f():\n    with open('x') as file:\n        return file",
        "keep = open",
        "import io\nio.open('x')",
        "import pathlib\npathlib.Path('x')",
        "from pathlib import Path",
        "import uuid\nuuid.uuid4()",
        "import datetime\ndatetime.datetime.now()",
        "from datetime import datetime\ndatetime.now()",
        "import importlib\nimportlib.import_module('socket')",
        "__import__('time')",
    ],
)
def test_a_planted_call_is_found(tmp_path: Path, text: str) -> None:
    root = plant(tmp_path, "tools/planted.py", text + "\n")
    assert {problem.path for problem in check_door(root)} == {"tools/planted.py"}


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("host/linux/planted.py", "import os, socket, time\nos.read(0, 1)\nopen('x')"),
        ("aio/asyncio_bridge.py", "import asyncio"),
        ("block/planted.py", "import os\nname = os.fspath('x') + os.sep + os.path.basename('y')"),
        ("block/planted.py", "class Node:\n    def open(self): return 1\nNode().open()"),
        ("block/planted.py", "async def open(path): return path\nasync def f(): return await open('x')"),
        ("block/planted.py", "import struct, uuid\nuuid.UUID(int=3)"),
        ("block/planted.py", "import timeit_like, socketry"),
        ("block/planted.py", "def f(host):\n    return host.time.monotonic_ns()"),
    ],
)
def test_what_may_be_done_is_not_reported(tmp_path: Path, where: str, text: str) -> None:
    root = plant(tmp_path, where, text + "\n")
    assert check_door(root) == []
