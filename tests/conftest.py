# SPDX-License-Identifier: Apache-2.0
"""What every test can rely on: seeds, foreign programs, a guard against hangs, and skips that are counted.

* ``require("qemu-img")`` gives a foreign program's path or skips with the reason; ``spawn([...])`` starts a
  process that cannot outlive its test (``tests/peers/programs.py``).
* ``seed`` runs a test once per seed: ``--seeds N`` says how many, ``--seed S`` repeats one.
* A test that runs longer than ``HANG_SECONDS`` ends the whole run with the stacks of all threads;
  ``@pytest.mark.hang_seconds(600)`` grants more.
* ``--forbid io_uring`` has the kernel refuse that (``tests/seccomp.py``); tests that are about what is refused skip,
  and say so.
* ``--behaviours`` runs only tests that carry the name of one of QEMU's.
* Tests marked ``soak`` are left out unless ``--soak`` is given.
* With ``CI`` in the environment, a skip whose reason is not in ``EXPECTED_SKIPS`` fails the run: there,
  everything is installed, and a test that does not run must not look like one that passed.
"""

from __future__ import annotations

import faulthandler
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest

from tests import seccomp
from tests.peers import programs

HANG_SECONDS: Final = 120.0
SOAK_PATIENCE: Final = 10  # long runs give each test many more examples
SEEDS_DEFAULT: Final = 20

# Names of QEMU's unit tests, in the first words of a test's docstring (see scripts/behaviours.py).
BEHAVIOUR: Final = re.compile(
    r"/(aio|aio-gsource|basic|locking|thread-pool|nested-aio-poll"
    r"|bdrv-drain|bdrv-graph-mod|sync-op|attach|propagate|block-backend)\b"
)

# Regular expressions of the reasons for which a test may skip under continuous integration, with the cause.
EXPECTED_SKIPS: Final[tuple[str, ...]] = (
    r"is forbidden in this run \(--forbid\)$",  # it is what such a run is for
    r"^needs Python 3\.13, whose ssl knows pre-shared keys$",  # the other end of the range runs it
    r"^no loop devices here",  # containers have no /dev/loop-control; on a machine of one's own, root has
)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, print_blob=True)
hypothesis.settings.register_profile(
    "soak",
    deadline=None,
    max_examples=2000,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
_usual_profile = "ci" if os.environ.get("CI") else "default"
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or _usual_profile)

_skip_reasons: Counter[str] = Counter()
_terminal_fd = -1


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bottomhalf")
    group.addoption(
        "--seeds", type=int, default=SEEDS_DEFAULT, metavar="N", help="run seeded tests with N seeds"
    )
    group.addoption("--seed", type=int, default=None, metavar="S", help="run seeded tests with one seed")
    group.addoption("--behaviours", action="store_true", help="only tests of QEMU's behaviours")
    group.addoption(
        "--forbid",
        default="",
        metavar="KIND[=ERRNO]",
        help="have the kernel refuse io_uring or linux-aio (or both, by comma) to the tests and all that they start",
    )
    group.addoption("--soak", action="store_true", help="run the long tests too (marked soak)")


def pytest_configure(config: pytest.Config) -> None:
    global _terminal_fd
    config.addinivalue_line("markers", "needs(kind): is about io_uring or linux-aio; see --forbid")
    config.addinivalue_line("markers", "hang_seconds(limit): may run longer than the usual guard allows")
    # Output is not captured yet: this is the real standard error, where the stacks of a hang must go.
    _terminal_fd = os.dup(2)
    if forbid := config.getoption("--forbid"):
        try:
            seccomp.refuse(seccomp.parse(forbid))
        except (OSError, ValueError) as error:
            raise pytest.UsageError(f"--forbid: {error}") from error


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"the kernel says {number} to {kind}" for kind, number in seccomp.forbidden.items()]


def pytest_unconfigure() -> None:
    global _terminal_fd
    if _terminal_fd >= 0:
        os.close(_terminal_fd)
        _terminal_fd = -1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--behaviours"):
        others = [item for item in items if not BEHAVIOUR.search(_docstring(item))]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if BEHAVIOUR.search(_docstring(item))]
    for item in items:
        if kind := _missing_need(item):
            why = "forbidden in this run (--forbid)" if kind in seccomp.forbidden else "refused by this machine"
            item.add_marker(pytest.mark.skip(reason=f"{kind} is {why}"))
    if config.getoption("--soak"):
        return
    long_ones = [item for item in items if item.get_closest_marker("soak")]
    if long_ones:
        config.hook.pytest_deselected(items=long_ones)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


# Parameters of tests that ask for one of what --forbid takes away, by its name; others say @pytest.mark.needs(kind).
_PARAMETERS: Final = {
    **dict.fromkeys(("io_uring", "io_uring, old", "linux-uring", "linux-uring-old"), "io_uring"),
    **dict.fromkeys(("linux-aio", "native"), "linux-aio"),
}


def _missing_need(item: pytest.Item) -> str | None:
    """What the test is about and the kernel refuses in this run. A test that fails without it, and does not say so, has
    found a mistake."""
    needs = [kind for marker in item.iter_markers("needs") for kind in marker.args]
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec is not None else ():
        for name in value if isinstance(value, list) else [getattr(value, "engine", value)]:
            needs.append(_PARAMETERS.get(name) if isinstance(name, str) else None)
    return next((kind for kind in needs if kind and seccomp.missing(kind)), None)


def _docstring(item: pytest.Item) -> str:
    return getattr(getattr(item, "function", None), "__doc__", None) or ""


# Seeds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" not in metafunc.fixturenames:
        return
    for mark in metafunc.definition.iter_markers("parametrize"):
        if "seed" in str(mark.args[0]).split(","):
            return  # the test says itself which seeds
    one = metafunc.config.getoption("--seed")
    seeds = range(metafunc.config.getoption("--seeds")) if one is None else [one]
    metafunc.parametrize("seed", seeds, ids=lambda seed: f"seed{seed}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    callspec = getattr(item, "callspec", None)
    if report.failed and callspec is not None and "seed" in callspec.params:
        seed = callspec.params["seed"]
        report.sections.append(("repeat with", f"python -m pytest --seed {seed} '{item.nodeid}'"))
    return report


# Foreign programs


@pytest.fixture(scope="session")
def require() -> Callable[[str], str]:
    """Give ``require(program) -> path``, which skips the test when the program is not installed."""
    return programs.require


@pytest.fixture
def spawn() -> Iterator[Callable[..., programs.Spawned]]:
    """Give ``spawn(argv, ready=address)``: a process that has ended when the test has."""
    running: list[programs.Spawned] = []

    def start(
        argv: Sequence[str | Path],
        ready: str | Path | tuple[str, int] | None = None,
        environment: dict[str, str] | None = None,
    ) -> programs.Spawned:
        running.append(programs.Spawned(argv, environment))
        if ready is not None:
            running[-1].wait_ready(ready)
        return running[-1]

    yield start
    for process in reversed(running):
        if process.output():
            print(f"--- output of {' '.join(process.argv)}\n{process.output()}")
        process.close()


# Hangs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    marker = item.get_closest_marker("hang_seconds")
    limit = float(marker.args[0]) if marker else HANG_SECONDS
    if item.config.getoption("--soak"):
        limit *= SOAK_PATIENCE
    faulthandler.dump_traceback_later(limit, exit=True, file=_terminal_fd)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


# Skips


def _count_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skip_reasons[reason.removeprefix("Skipped: ")] += 1


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _count_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _count_skip(report)


def unexpected_skips() -> dict[str, int]:
    """Return the reasons that ``EXPECTED_SKIPS`` does not name, and how many tests each of them skipped."""
    return {
        reason: count
        for reason, count in _skip_reasons.items()
        if not any(re.search(pattern, reason) for pattern in EXPECTED_SKIPS)
    }


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("CI") and unexpected_skips() and session.exitstatus in (0, 5):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _skip_reasons:
        return
    terminalreporter.section("skipped tests, counted by reason")
    for reason, count in _skip_reasons.most_common():
        terminalreporter.line(f"{count:5d}  {reason}")
    if os.environ.get("CI") and unexpected_skips():
        verdict = "CI is set, and these reasons are not in EXPECTED_SKIPS (tests/conftest.py): the run fails."
        terminalreporter.line(verdict, red=True)
