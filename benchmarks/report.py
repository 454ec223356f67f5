# SPDX-License-Identifier: Apache-2.0
"""From samples to rows: ratios of rounds, their median and spread, and a table to read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.rows import Row, Sample

# More of a processor than this, taken by something else, makes a row doubtful.
FOREIGN_CPUS_MAX: Final = 0.15

# A client that was busy for more of its time than this is what the row measures.
CLIENT_BUSY_MAX: Final = 0.9


@dataclass(frozen=True)
class Line:
    """Ours beside one peer in one unit. A ratio above 1 means that ours is better, whatever the unit."""

    name: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    spread: tuple[float, float]
    rounds: int
    goal: float | None
    client: str
    client_busy: float | None  # with our server
    ours_cpu_us_per_op: float | None
    peer_cpu_us_per_op: float | None
    ours_latency_p50_us: float | None
    peer_latency_p50_us: float | None
    foreign_cpus: float

    def as_json(self) -> dict[str, Any]:
        """Return the line as JSON's types."""
        return asdict(self)


def lines(row: Row, ours: str, rounds: Sequence[Mapping[str, Sample]]) -> list[Line]:
    """Return one line per peer and unit from the rounds' samples by server name."""
    result = []
    for unit in row.units:
        for peer, goal in row.peers.items():
            pairs = [(done[ours], done[peer]) for done in rounds if ours in done and peer in done]
            if not pairs or peer == ours:
                continue
            ratios = [our.values[unit] / their.values[unit] for our, their in pairs]
            if not row.more_is_better:
                ratios = [1 / ratio for ratio in ratios]
            our_samples, peer_samples = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            result.append(
                Line(
                    name=row.name,
                    unit=unit,
                    ours=statistics.median(sample.values[unit] for sample in our_samples),
                    peer=statistics.median(sample.values[unit] for sample in peer_samples),
                    peer_name=peer,
                    ratio=statistics.median(ratios),
                    spread=(min(ratios), max(ratios)),
                    rounds=len(pairs),
                    goal=goal,
                    client=pairs[0][0].client,
                    client_busy=_median([sample.client_busy for sample in our_samples]),
                    ours_cpu_us_per_op=_median([sample.cpu_us_per_op for sample in our_samples]),
                    peer_cpu_us_per_op=_median([sample.cpu_us_per_op for sample in peer_samples]),
                    ours_latency_p50_us=_median([sample.latency_p50_us for sample in our_samples]),
                    peer_latency_p50_us=_median([sample.latency_p50_us for sample in peer_samples]),
                    foreign_cpus=max(sample.foreign_cpus for sample in our_samples + peer_samples),
                )
            )
    return result


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


_HEADINGS: Final = "row,client,unit,ours,peer,,ratio,spread,goal,us CPU/op,p50 us,foreign"
HEADINGS: Final = _HEADINGS.split(",")


def table(result: Sequence[Line], ours: str) -> str:
    """Return the lines as a table for a terminal."""
    cells = [HEADINGS]
    for line in result:
        mark = " !" if line.foreign_cpus > FOREIGN_CPUS_MAX else ""
        cells.append(
            [
                *(line.name, _client(line), line.unit, _number(line.ours), _number(line.peer), line.peer_name),
                *(f"{line.ratio:.2f}", f"{line.spread[0]:.2f}..{line.spread[1]:.2f}"),
                "" if line.goal is None else f"{line.goal:.1f}",
                _pair(line.ours_cpu_us_per_op, line.peer_cpu_us_per_op),
                _pair(line.ours_latency_p50_us, line.peer_latency_p50_us),
                f"{line.foreign_cpus:.2f}{mark}" if line.client or line.foreign_cpus else "",
            ]
        )
    left = {0, 1, 2, 5}
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    text = "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
    notes = [f"ours is {ours}; a ratio above 1 means that ours is better (median of the rounds' ratios, min..max)"]
    if any(_client_is_the_limit(line) for line in result):
        notes.append("* the client has no processor time left beside our server: ours is at least as fast as that")
    if any(line.foreign_cpus > FOREIGN_CPUS_MAX for line in result):
        notes.append("! something else kept the machine busy (processors, worst round): measure again when quiet")
    return "\n".join([text, *notes])


def _client_is_the_limit(line: Line) -> bool:
    return line.client_busy is not None and line.client_busy > CLIENT_BUSY_MAX


def _client(line: Line) -> str:
    if line.client_busy is None:
        return line.client
    return f"{line.client} {min(line.client_busy, 1):.0%}{' *' if _client_is_the_limit(line) else ''}"


def _pair(ours: float | None, peer: float | None) -> str:
    return "" if ours is None or peer is None else f"{_number(ours)} / {_number(peer)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
