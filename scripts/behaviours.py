# SPDX-License-Identifier: Apache-2.0
"""Print docs/behaviours.md: which behaviour of QEMU's event core and block graph, and which trap, each test is about.

    python3 scripts/behaviours.py > docs/behaviours.md

A test says so itself, in the first words of its docstring: names of QEMU's unit tests ("/aio/bh/cancel") and numbers
of traps ("T31"). tests/aio/test_behaviours.py compares the page with what this prints.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
FOLDERS: Final = ("tests/aio", "tests/host", "tests/block")

# QEMU's unit tests of the event core and the block graph (tests/unit in its tree, 10.0), by file.
SUITES: Final = {
    "test-aio": """
        /aio/bh/schedule /aio/bh/schedule10 /aio/bh/cancel /aio/bh/delete /aio/bh/callback-delete/one
        /aio/bh/callback-delete/many /aio/bh/flush /aio/event/add-remove /aio/event/wait /aio/event/wait/no-flush-cb
        /aio/event/flush /aio/timer/schedule /aio/coroutine/queue-chaining /aio/coroutine/worker-thread-co-enter
        /aio-gsource/flush /aio-gsource/bh/schedule /aio-gsource/bh/schedule10 /aio-gsource/bh/cancel
        /aio-gsource/bh/delete /aio-gsource/bh/callback-delete/one /aio-gsource/bh/callback-delete/many
        /aio-gsource/bh/flush /aio-gsource/event/add-remove /aio-gsource/event/wait
        /aio-gsource/event/wait/no-flush-cb /aio-gsource/event/flush /aio-gsource/timer/schedule
    """,
    "test-nested-aio-poll": "/nested-aio-poll",
    "test-aio-multithread": """
        /aio/multi/lifecycle /aio/multi/schedule /aio/multi/mutex/contended /aio/multi/mutex/handoff
        /aio/multi/mutex/mcs /aio/multi/mutex/pthread
    """,
    "test-coroutine": """
        /basic/no-dangling-access /basic/lifecycle /basic/yield /basic/nesting /basic/self /basic/entered
        /basic/in_coroutine /basic/order /locking/co-mutex /locking/co-mutex/lockable /locking/co-rwlock/upgrade
        /locking/co-rwlock/downgrade
    """,
    "test-throttle": """
        /throttle/leak_bucket /throttle/compute_wait /throttle/init /throttle/init_readonly /throttle/init_writeonly
        /throttle/destroy /throttle/have_timer /throttle/detach_attach /throttle/config/enabled
        /throttle/config/conflicting /throttle/config/is_valid /throttle/config/ranges /throttle/config/max
        /throttle/config/iops_size /throttle/config_functions /throttle/accounting /throttle/groups
    """,
    "test-timed-average": "/timed-average/average",
    "test-write-threshold": "/write-threshold/not-trigger /write-threshold/trigger",
    "test-image-locking": "/image-locking/basic /image-locking/set-perm-abort",
    "test-thread-pool": """
        /thread-pool/submit-no-complete /thread-pool/submit-aio /thread-pool/submit-co /thread-pool/submit-many
        /thread-pool/cancel /thread-pool/cancel-async
    """,
    "test-bdrv-drain": """
        /bdrv-drain/driver-cb/drain_all /bdrv-drain/driver-cb/drain /bdrv-drain/driver-cb/co/drain_all
        /bdrv-drain/driver-cb/co/drain /bdrv-drain/quiesce/drain_all /bdrv-drain/quiesce/drain
        /bdrv-drain/quiesce/co/drain_all /bdrv-drain/quiesce/co/drain /bdrv-drain/nested
        /bdrv-drain/graph-change/drain_all /bdrv-drain/iothread/drain_all /bdrv-drain/iothread/drain
        /bdrv-drain/blockjob/drain_all /bdrv-drain/blockjob/drain /bdrv-drain/blockjob/error/drain_all
        /bdrv-drain/blockjob/error/drain /bdrv-drain/blockjob/iothread/drain_all /bdrv-drain/blockjob/iothread/drain
        /bdrv-drain/blockjob/iothread/error/drain_all /bdrv-drain/blockjob/iothread/error/drain
        /bdrv-drain/deletion/drain /bdrv-drain/detach/drain_all /bdrv-drain/detach/drain
        /bdrv-drain/detach/parent_cb /bdrv-drain/detach/driver_cb /bdrv-drain/attach/drain
        /bdrv-drain/set_aio_context /bdrv-drain/blockjob/commit_by_drained_end
        /bdrv-drain/bdrv_drop_intermediate/poll /bdrv-drain/replace_child/mid-drain
    """,
    "test-bdrv-graph-mod": """
        /bdrv-graph-mod/update-perm-tree /bdrv-graph-mod/should-update-child /bdrv-graph-mod/parallel-perm-update
        /bdrv-graph-mod/parallel-exclusive-write /bdrv-graph-mod/append-greedy-filter
    """,
    "test-block-iothread": """
        /sync-op/pread /sync-op/pwrite /sync-op/preadv /sync-op/pwritev /sync-op/preadv_part /sync-op/pwritev_part
        /sync-op/pwrite_compressed /sync-op/pwrite_zeroes /sync-op/load_vmstate /sync-op/save_vmstate
        /sync-op/pdiscard /sync-op/truncate /sync-op/block_status /sync-op/flush /sync-op/check /sync-op/activate
        /attach/blockjob /attach/second_node /attach/preserve_blk_ctx /propagate/basic /propagate/diamond
        /propagate/mirror
    """,
    "test-block-backend": "/block-backend/drain_aio_error /block-backend/drain_all_aio_error",
}

# Behaviours of operations that do not exist here yet.
ABSENT: Final = {
    "/sync-op/pwrite_compressed": "compressed writes are a call of nodes, not of backends, so far",
    "/sync-op/load_vmstate": "no machine state in images yet",
    "/sync-op/save_vmstate": "no machine state in images yet",
    "/sync-op/check": "no format that can be checked yet",
    "/sync-op/activate": "no inactive nodes yet",
}

# What goes wrong in event loops: each was met by QEMU or by somebody who wrote one.
TRAPS: Final = {
    "T1": "bottom halves run in an order that somebody comes to rely on",
    "T2": "a one-shot bottom half frees its owner while it is still being scheduled",
    "T3": "one bottom half deletes another of the batch that a nested poll is walking",
    "T4": "one that schedules itself starves descriptors and timers",
    "T5": "what a nested poll waits for stands in the batch of the poll around it",
    "T6": "one that schedules itself and polls runs inside itself",
    "T7": "an idle bottom half spins, or stays idle for ever",
    "T8": "flags that other threads change while the loop computes how long to sleep",
    "T9": "cancelling from another thread does not wait for a running callback",
    "T10": "a context is torn down while a bottom half waits to run",
    "T11": "a wake-up is lost between the look and the sleep",
    "T12": "a thread that is not the owner polls and takes the owner's wake-up",
    "T13": "what a sleeping loop watches changes and it is not told",
    "T14": "an outer loop asks how long to sleep and then does not poll",
    "T15": "a kick is lost between the condition and the wait",
    "T16": "notifications are taken for progress",
    "T20": "a poll_ready callback is entered again by a nested poll",
    "T21": "an event comes while notifications are being switched on again",
    "T22": "a handler is removed between poll_begin and poll_end",
    "T23": "the thread sleeps while peers believe that it polls",
    "T24": "a poll that does not block sees no descriptor when all can be polled",
    "T25": "one handler without a poll callback switches polling off for all",
    "T26": "an updated handler loses its callbacks and times",
    "T27": "handlers are freed while some level of nesting still walks them",
    "T28": "what an inner poll has dispatched is dispatched again by the outer one",
    "T30": "a fallback to a slower monitor that nobody notices",
    "T31": "an event of a removed registration is told for a new one of the same number",
    "T32": "handlers are polled although polling is off",
    "T33": "a signal ends a wait with an error",
    "T34": "time-outs are rounded down, or become negative",
    "T40": "a timer armed into the past from its own callback keeps the pass for ever",
    "T41": "a wait for what only the outer loop delivers",
    "T42": "a timer that stops its own clock waits for itself",
    "T43": "cancelling a timer does not wait for a callback in another thread",
    "T44": "time-outs on a clock that nobody has started",
    "T50": "a coroutine is entered twice, while it sleeps, or by itself",
    "T51": "a coroutine is entered by another thread before it has suspended",
    "T52": "a chain of wake-ups grows the stack",
    "T53": "a poll inside a coroutine waits for itself",
    "T54": "what belongs to a thread is remembered across a move to another",
    "T55": "a coroutine drops the last reference to the context that runs it",
    "T56": "an ended coroutine is used again while somebody still holds it",
    "T57": "an unlock and a lock of different threads miss each other",
    "T58": "upgrading a read lock is not atomic; downgrading forgets the readers",
    "T59": "a coroutine is woken by something else than what it waits for",
    "T60": "a time-out does not end what it times; both happen at once",
    "T70": "a deferred call that opens a section of its own runs the list again",
    "T71": "completions that a nested poll cannot get at",
    "T72": "positions that are advanced after the callback instead of before",
    "T73": "a request completes before its submission returns",
    "T74": "an error in the middle of a batch, or EAGAIN with nothing in flight, stalls the rest",
    "T76": "the kernel's short or interrupted transfers reach the caller",
    "T77": "the error of one request is given to another",
    "T78": "a completion queue that is full while its owner waits for room in it",
    "T79": "a worker thread leaves at the moment at which it gets work",
    "T80": "a cancelled request is never told",
    "T81": "a request completes in another context than it was submitted in",
    "T90": "a condition changes in another thread and nobody kicks the waiter",
    "T91": "two iothreads wait for each other",
    "T92": "a thread that does not own the main context polls it",
    "T93": "a drain in what a job's completion calls waits for that job",
    "T94": "a callback of a drain's begin or end waits, and the graph changes under the walk",
    "T95": "a request is taken out of the count before it is parked",
    "T98": "the last reference is dropped where nobody may wait",
    "T99": "what is drained vanishes while the drain waits",
    "T100": "a coroutine goes on in the context that its job had before it slept",
}

_NAME: Final = re.compile(
    r"/(?:aio|aio-gsource|basic|locking|thread-pool|nested-aio-poll|bdrv-drain|bdrv-graph-mod|sync-op|attach|propagate"
    r"|block-backend|throttle|timed-average|write-threshold|image-locking)(?:/[\w/-]*|(?![\w-]))"
)
_TRAP: Final = re.compile(r"\bT\d+\b")


def tests() -> Iterator[tuple[str, str, str]]:
    """(file below the repository, function, docstring) of every test."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("test_*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    yield str(path.relative_to(ROOT)), node.name, ast.get_docstring(node) or ""


def found() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Links to tests, by QEMU's name and by trap."""
    by_name: dict[str, list[str]] = defaultdict(list)
    by_trap: dict[str, list[str]] = defaultdict(list)
    for path, function, docstring in tests():
        link = f"[`{function}`](../{path})"
        for name in dict.fromkeys(_NAME.findall(docstring)):
            by_name[name].append(link)
        for trap in dict.fromkeys(_TRAP.findall(docstring)):
            by_trap[trap].append(link)
    return by_name, by_trap


def page() -> str:
    """The page's text."""
    by_name, by_trap = found()
    lines = [
        "# Behaviours and traps",
        "",
        "Made by `scripts/behaviours.py` from the docstrings of the tests; a test compares the two.",
        "",
        "The event core and the block graph promise what QEMU's do. Each of QEMU's own unit tests of them has one of",
        "ours with the same name, written from a description of what it checks. They run on the real host and on",
        "simulated ones under seeds, a thousand each with",
        "`make tests TESTS='tests/aio tests/block' PYTEST_ARGS='--behaviours --seeds 4000'`. Where ours behave",
        "differently on purpose, the test's docstring says how.",
    ]
    for suite, names in SUITES.items():
        lines += ["", f"## {suite}", "", "| behaviour | test |", "|---|---|"]
        for name in names.split():
            lines.append(f"| `{name}` | {', '.join(by_name[name]) or ABSENT.get(name) or '**none**'} |")
    lines += [
        "",
        "## Traps",
        "",
        "What goes wrong in event loops and block graphs, and the tests that show that it does not here. Numbers are",
        "as in the tests.",
        "",
        "| trap | what happens | test |",
        "|---|---|---|",
    ]
    lines += [f"| {trap} | {what} | {', '.join(by_trap[trap]) or '**none**'} |" for trap, what in TRAPS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
