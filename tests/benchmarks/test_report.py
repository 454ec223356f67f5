# SPDX-License-Identifier: Apache-2.0
"""The table: medians of ratios, and the marks that tell a reader which rows to doubt."""

from __future__ import annotations

import pytest
from benchmarks.report import lines, table
from benchmarks.rows import Row, Sample

ROW = Row("row", {"peer": 2.0}, ("IOPS",))


def shown(*ours: Sample) -> str:
    rounds = [{"ours": each, "peer": Sample({"IOPS": 100.0}, client="fio", client_busy=1.0)} for each in ours]
    return table(lines(ROW, "ours", rounds), "ours")


def test_the_median_of_the_ratios_of_rounds() -> None:
    (line,) = lines(
        ROW,
        "ours",
        [
            {"ours": Sample({"IOPS": our}), "peer": Sample({"IOPS": their})}
            for our, their in ((200.0, 100.0), (900.0, 300.0), (100.0, 100.0))
        ],
    )
    assert (line.ratio, line.spread, line.goal, line.ours, line.peer) == (2.0, (1.0, 3.0), 2.0, 200.0, 100.0)


@pytest.mark.parametrize(
    ("busy", "says"), [(0.5, "fio 50%  "), (0.9, "fio 90%  "), (0.98, "fio 98% *"), (1.04, "fio 100% *")]
)
def test_a_client_that_is_the_limit_is_marked(busy: float, says: str) -> None:
    """It is ours that counts: a peer that a client can only just follow makes no ratio smaller."""
    text = shown(*[Sample({"IOPS": 200.0}, client="fio", client_busy=busy)] * 3)
    assert says in text
    assert ("no processor time left" in text) == ("*" in says)


def test_a_row_without_a_client() -> None:
    assert "%" not in shown(Sample({"IOPS": 200.0}))


@pytest.mark.parametrize("foreign", [0.1, 0.2])
def test_foreign_work_is_marked(foreign: float) -> None:
    text = shown(Sample({"IOPS": 200.0}, client="fio", client_busy=0.5, foreign_cpus=foreign))
    assert ("measure again when quiet" in text) == (f"{foreign:.2f} !" in text) == (foreign > 0.15)
