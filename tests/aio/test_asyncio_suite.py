# SPDX-License-Identifier: Apache-2.0
"""asyncio's own test-suite, as the interpreter brings it, on a loop that is made of an AioContext.

Every test that ends differently than on the stock loop is a failure; one that fails on both (for want of a network,
say) is not ours. The usual run has streams, subprocesses, sockets and the loop's own tests, the long one the rest."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 110
PARTS = (
    *("test_streams", "test_subprocess", "test_sock_lowlevel", "test_server", "test_sendfile", "test_unix_events"),
    *("test_events", "test_base_events", "test_buffered_proto"),
)
MORE_PARTS = (
    *("test_ssl", "test_sslproto", "test_tasks", "test_taskgroups", "test_timeouts", "test_locks", "test_queues"),
    *("test_waitfor", "test_threads", "test_context"),
)
# Names that a version may not have.
OPTIONAL = {"test_waitfor", "test_timeouts", "test_taskgroups"}


def ends(loop: str, part: str) -> tuple[int, dict[str, str], str]:
    """How many loops of ours were made, how each test ended, and what was said about failures."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.aio.asyncio_suite", loop, part],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["loops"], answer["ends"], done.stderr[-8000:]


def check(part: str) -> None:
    if importlib.util.find_spec("test.test_asyncio") is None:
        pytest.skip("this Python has no test.test_asyncio (on Debian it is in libpython3-testsuite)")
    if part in OPTIONAL and importlib.util.find_spec(f"test.test_asyncio.{part}") is None:
        return
    made, ours, said = ends("ours", part)
    assert made and ours, "nobody asked for a loop"
    bad = {name for name, end in ours.items() if end in ("failed", "error")}
    if bad:
        _, stock, _ = ends("stock", part)
        bad -= {name for name, end in stock.items() if end in ("failed", "error")}
    assert not bad, f"on our loop alone: {sorted(bad)}\n{said}"
    assert "passed" in ours.values()


@pytest.mark.parametrize("part", PARTS)
def test_part(part: str) -> None:
    check(part)


@pytest.mark.soak
@pytest.mark.parametrize("part", MORE_PARTS)
def test_more_parts(part: str) -> None:
    check(part)
