# SPDX-License-Identifier: Apache-2.0
"""The rows of files: what is made of what the programs print, and what is left out, with the reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.__main__ import main
from benchmarks.engine import RIVALS, ROWS, FileRow, measure
from benchmarks.file_load import CONTENDERS
from benchmarks.rows import Sample, Settings
from benchmarks.servers import OURS, Unavailable

from benchmarks import engine


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    return Settings(image=image, image_for_writes=image, cache=tmp_path, seconds=0.1)


def row(**contenders: float | Exception) -> FileRow:
    def run(value: float | Exception) -> engine.Run:
        def give(settings: Settings) -> Sample:
            if isinstance(value, Exception):
                raise value
            return Sample({"IOPS": value}, cpu_us_per_op=1.0)

        return give

    peer = next(name for name in contenders if name != "ours")
    made = {OURS if name == "ours" else name: run(value) for name, value in contenders.items()}
    return FileRow("engine-test", {peer: 2.0}, ("IOPS",), contenders=made)


def test_names_are_unique_and_every_row_has_its_contenders() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for one in ROWS:
        assert list(one.contenders) == [OURS, *one.peers] and one.about and one.units == ("IOPS",)
    assert {name for one in ROWS for name in one.peers if name in RIVALS} == set(RIVALS)
    assert set(CONTENDERS) >= set(RIVALS) | {"ours", "ours-asyncio"}


def test_a_row(settings: Settings) -> None:
    said: list[str] = []
    (line,) = measure(row(ours=300.0, peer=100.0), settings, 3, said.append)
    assert (line.ratio, line.spread, line.rounds, line.goal, line.peer_name) == (3.0, (3.0, 3.0), 3, 2.0, "peer")
    assert said[0].startswith("engine-test 1/3: ") and "bottomhalf 300" in said[0]


@pytest.mark.parametrize("failure", [Unavailable("needs it (apt package it)"), RuntimeError("failed: it is broken")])
def test_a_missing_peer_is_a_reason(settings: Settings, failure: Exception) -> None:
    said: list[str] = []
    assert measure(row(ours=1.0, peer=failure), settings, 3, said.append) == []
    assert said == [f"engine-test: left out, peer {failure}"]


def test_a_program_that_fails_says_why(settings: Settings) -> None:
    with pytest.raises(RuntimeError, match="failed: ValueError: no such thing"):
        engine._carry_out([sys.executable, "-c", "raise ValueError('no such thing')"], 1)
    assert engine._fails([sys.executable, "-c", "raise ValueError('why')"]) == "ValueError: why"
    assert engine._fails([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGILL)"])
    assert engine._fails([sys.executable, "-c", ""]) == ""


@pytest.mark.parametrize("options", [["ours"], ["ours-asyncio"], ["ours", "--engine", "io_uring", "--direct"]])
def test_our_contenders(settings: Settings, options: list[str]) -> None:
    sample = engine._load(options[0], *options[1:])(settings)
    assert sample.values["IOPS"] > 0 and sample.cpu_us_per_op is not None and sample.cpu_us_per_op > 0


def test_bench_and_fio(settings: Settings, require: Callable[[str], str]) -> None:
    options = ["-f", "raw", "{image}"]
    assert engine._bench(engine._ours_bench, 2000, options)(settings).values["IOPS"] > 0
    require("qemu-img")
    require("fio")
    assert engine._bench(engine._qemu_img, 2000, options)(settings).values["IOPS"] > 0
    longer = Settings(settings.image, settings.image, settings.cache, 1.0)
    assert engine._fio("psync", False)(longer).values["IOPS"] > 0


def test_a_rival_that_cannot_be_had(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_fails", lambda command: "no network" if "pip" in command else "not there")
    (settings.cache / f"rivals-python{sys.version_info[0]}.{sys.version_info[1]}" / "bin").mkdir(parents=True)
    with pytest.raises(Unavailable, match="could not be installed: "):
        engine._rival_python("aiofile")(settings)


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], require: Callable[[str], str]
) -> None:
    require("qemu-img")
    words = ["--only", "bench-null", "--rounds", "1", "--image-mib", "8", "--dir", str(tmp_path)]
    assert main([*words, "--list"]) == 0
    assert "bench-null-co" in capsys.readouterr().out
    result = tmp_path / "result.json"
    engine_rows = [one for one in ROWS if one.name == "bench-null-co"]
    status = main([*words, "--json", str(result)])
    out = capsys.readouterr()
    assert status == 0 and engine_rows[0].name in out.out
    (line,) = json.loads(result.read_text())["rows"]
    assert line["name"] == "bench-null-co" and line["ratio"] > 0
