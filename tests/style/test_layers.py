# SPDX-License-Identifier: Apache-2.0
"""The layers of the package, and that the check of them finds a planted wrong import."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.style.imports import listing
from tests.style.layers import check_layers

PACKAGE = Path(__file__).parents[2] / "src" / "bottomhalf"


def plant(tmp_path: Path, where: str, text: str) -> Path:
    """Make a small package with one file, and return its directory."""
    root = tmp_path / "bottomhalf"
    root.mkdir(exist_ok=True)
    (root / "__init__.py").touch()
    (root / where).parent.mkdir(parents=True, exist_ok=True)
    (root / where).write_text(text)
    return root


def plant_in_a_copy(tmp_path: Path, where: str, text: str) -> Path:
    """Copy the real package, add one file to the copy, and return the directory of the copy."""
    root = tmp_path / "bottomhalf"
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
    return plant(tmp_path, where, text)


def test_every_arrow_goes_down() -> None:
    problems = check_layers(PACKAGE)
    assert not problems, listing(problems)


def test_an_import_planted_in_the_real_package_is_found(tmp_path: Path) -> None:
    root = plant_in_a_copy(tmp_path, "aio/planted.py", "from bottomhalf.block import node\n")
    assert "aio/planted.py" in [problem.path for problem in check_layers(root)]


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("aio/planted.py", "import bottomhalf.block.nodes"),
        ("aio/planted.py", "from bottomhalf.block import nodes"),
        ("aio/planted.py", "from bottomhalf import block"),
        ("aio/planted.py", "from ..block import nodes"),
        ("aio/deep/planted.py", "from ...block.nodes import Node"),
        ("aio/planted.py", "def late():\n    import bottomhalf.tools"),
        ("aio/planted.py", "if TYPE_CHECKING:\n    from bottomhalf import block"),
        ("block/planted.py", "import importlib\nimportlib.import_module('bottomhalf.drivers.raw')"),
        ("block/planted.py", "import importlib\nimportlib.import_module(f'bottomhalf.drivers.{name}')"),
        ("host/planted.py", "import bottomhalf.aio"),
        ("wire/planted.py", "import bottomhalf.qapi"),
        ("exports/planted.py", "import bottomhalf.jobs"),
        ("monitor/planted.py", "import bottomhalf"),
        ("monitor/planted.py", "from bottomhalf import library"),
        ("unheard_of/planted.py", ""),
        ("unheard_of.py", ""),
        ("__init__.py", "from bottomhalf.aio import context"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, where: str, text: str) -> None:
    root = plant(tmp_path, where, text + "\n")
    assert [problem.path for problem in check_layers(root)] == [where]


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("block/planted.py", "import bottomhalf.aio.x\nfrom bottomhalf.host import x\nfrom . import y"),
        ("tools/planted.py", "from bottomhalf import __version__, monitor, block"),
        ("library.py", "import bottomhalf.block"),
        ("monitor/planted.py", "import bottomhalf.chardev"),
        ("wire/planted.py", "import struct, blockish, bottomhalf_other"),
    ],
)
def test_an_allowed_import_is_allowed(tmp_path: Path, where: str, text: str) -> None:
    assert check_layers(plant(tmp_path, where, text + "\n")) == []
