# SPDX-License-Identifier: Apache-2.0
"""Measure our daemon beside its peers: ``python -m benchmarks [--only NAME] [--json FILE]``.

``--ours qemu-nbd`` puts another server in our place, to see what the harness itself says (a ratio near 1).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar

from benchmarks import engine, interpreters, rows, servers, system, tls
from benchmarks.load import choose
from benchmarks.report import Line, lines, table
from benchmarks.rows import LoadRow, Row, Sample, ServerRow, Settings
from benchmarks.servers import OURS, Unavailable

ROWS: Final = (*rows.ROWS, *tls.ROWS)
SERVERS: Final = {**servers.SERVERS, **tls.SERVERS}
EVENT_CORE_ROUNDS: Final = 8  # rounds of the event core, which are short, for one of the servers
CACHE_DEFAULT: Final = Path(os.environ.get("TMPDIR") or "/var/tmp") / "bottomhalf-bench"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="rows whose name contains NAME; may repeat"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds per row (default 5)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="per server and round (default 2)"
    )
    parser.add_argument("--client", choices=("fio", "nbdload"), help="load every row with this client")
    parser.add_argument("--ours", choices=sorted(SERVERS), default=OURS, help="the server in our place")
    parser.add_argument(
        "--image-mib", type=int, default=1024, metavar="M", help="size of the image (default 1024)"
    )
    parser.add_argument(
        "--dir", type=Path, default=CACHE_DEFAULT, help=f"image and client (default {CACHE_DEFAULT})"
    )
    parser.add_argument("--list", action="store_true", help="print the rows and their goals, measure nothing")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds < 1 or options.image_mib < 8:
        parser.error("at least 1 round of 1 second on an image of 8 MiB")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure the chosen rows and print the table."""
    options = parse(arguments)
    server_rows = chosen(ROWS, options.only)
    file_rows = chosen(engine.ROWS, options.only)
    wanted = options.only or [interpreters.PREFIX]
    loop_rows = [name for name in interpreters.names() if any(word in name for word in wanted)]
    if not server_rows and not file_rows and not loop_rows:
        say(f"no row's name contains {' or '.join(options.only)}; --list names them")
        return 2
    if options.list:
        for row in [*server_rows, *file_rows]:
            goals = ", ".join(f"{peer} {goal or '-'}" for peer, goal in row.peers.items())
            print(f"{row.name:28} {row.about}\n{'':28} beside (goal): {goals}")
        for paragraph in interpreters.describe():
            print(paragraph)
        return 0
    # A signal ends the servers like any other way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result: list[Line] = []
    if loop_rows:
        options.dir.mkdir(parents=True, exist_ok=True)
        result += interpreters.measure(loop_rows, options.rounds * EVENT_CORE_ROUNDS, options.dir, say)
        if options.json:
            write_json(options.json, result)
    if file_rows:
        settings = prepare(options)
        for row in file_rows:
            result += engine.measure(row, settings, options.rounds, say)
            if options.json:
                write_json(options.json, result)
    if server_rows:
        result += measure_servers(server_rows, options, result)
    if result:
        print(table(result, options.ours))
    return 0 if result else 1


RowKind = TypeVar("RowKind", bound=Row)


def chosen(among: Sequence[RowKind], only: Sequence[str] | None) -> list[RowKind]:
    """Return the rows whose names contain one of the words, all of them if there is none."""
    return [row for row in among if not only or any(word in row.name for word in only)]


def prepare(options: argparse.Namespace) -> Settings:
    """Make the images."""
    say(f"image of {options.image_mib} MiB in {options.dir}")
    return Settings(
        image=system.make_image(options.dir, options.image_mib),
        image_for_writes=system.make_image(options.dir, max(8, options.image_mib // 4)),
        cache=options.dir,
        seconds=options.seconds,
        client=options.client,
    )


def measure_servers(
    wanted: Sequence[ServerRow], options: argparse.Namespace, before: Sequence[Line]
) -> list[Line]:
    """Run the rows of servers."""
    try:
        SERVERS[options.ours].find()
    except Unavailable as missing:
        say(f"{options.ours} {missing}")
        return []
    settings = prepare(options)
    result: list[Line] = []
    for row in wanted:
        result += measure(row, options.ours, settings, options.rounds)
        if options.json:
            write_json(options.json, [*before, *result])
    return result


def measure(row: ServerRow, ours: str, settings: Settings, rounds: int) -> list[Line]:
    """Run all rounds of one row, each server in turn in each round."""
    ours = row.ours or ours
    names = [ours, *(peer for peer in row.peers if peer != ours)]
    for name in names[1:].copy():
        try:
            SERVERS[name].find()
        except Unavailable as missing:
            say(f"{row.name}: without {name}, it {missing}")
            names.remove(name)
    if isinstance(row, LoadRow):
        if row.direct:
            names = [name for name in names if SERVERS[name].can_direct]
        if ours not in names:
            say(f"{row.name}: left out, {ours} cannot pass by the page cache")
            return []
        wanted = settings.client or row.client
        try:
            client, _ = choose(wanted, settings.cache)
        except Unavailable as missing:
            say(f"{row.name}: left out, it {missing}")
            return []
        if client != wanted:
            say(f"{row.name}: no C compiler here, {client} stands in for {wanted} and may be the limit")
    done: list[dict[str, Sample]] = []
    for number in range(rounds):
        turn = number % len(names)
        samples: dict[str, Sample] = {}
        for name in names[turn:] + names[:turn]:
            try:
                samples[name] = row.measure(SERVERS[name], settings)
            except RuntimeError as failure:
                say(f"{row.name}: {failure}")
                names.remove(name)
                if name == ours:
                    return lines(row, ours, done)  # nothing left to compare with
        done.append(samples)
        known = (f"{name} {samples[name].values[row.units[0]]:.4g}" for name in names if name in samples)
        say(f"{row.name} {number + 1}/{rounds}: {', '.join(known)} {row.units[0]}")
    return lines(row, ours, done)


def write_json(path: Path, result: Sequence[Line]) -> None:
    """Write machine, versions and rows; a reader never sees half a file."""
    answer = {
        "machine": system.describe(),
        "versions": {name: server.version() for name, server in SERVERS.items()},
        "rows": [line.as_json() for line in result],
    }
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(answer, indent=1) + "\n")
    unfinished.rename(path)


def say(text: str) -> None:
    """Print progress, beside the table."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
