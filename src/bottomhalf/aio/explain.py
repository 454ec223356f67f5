# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom, in sentences.

    print(explain())

    main waits for the end of the mirror job (2.0 s): coroutine mirror_run waits for the tables of disk0, held by
    coroutine flush, which waits for a request to disk.raw

Whatever waits says what for. Plain code is registered while it waits (``wait.waits()``). A suspended coroutine only
remembers what it waits for, since registering it would cost more than suspending it; when somebody asks, the garbage
collector, which knows every object, tells which coroutines there are. What they wait for may know in turn what has to
happen first (``Waitable.blockers()``): a coroutine its own wait, a lock its holder. So the chains are followed when
they are asked for, and cost nothing before.

To be called from the thread that is stuck, or from any other: nothing is locked and nothing is changed. What moves
meanwhile may be told half.
"""

from __future__ import annotations

import gc
from typing import Final

from bottomhalf.aio.coroutine import Coroutine, Waitable
from bottomhalf.aio.wait import CHAIN_MAX, Wait, waits

SUSPENDED_MAX: Final = 64  # coroutines that explain() names beside those on the chains


def suspended() -> list[Coroutine]:
    """All coroutines of all contexts, but for closed ones, that wait for something."""
    return [found for found in gc.get_objects() if type(found) is Coroutine and _waits(found)]


def chain(first: Waitable) -> str:
    """What ``first`` waits for, and what that waits for, as far as it is known; empty if it does not wait."""
    parts: list[str] = []
    seen: list[Waitable] = [first]
    waiter: Waitable | None = first
    while waiter is not None and len(parts) < CHAIN_MAX:
        if isinstance(waiter, Coroutine):
            parts.append(_of_coroutine(waiter, first=not parts))
        blockers = waiter.blockers()
        following = blockers[0] if blockers else None
        if isinstance(waiter, Coroutine) or not blockers:
            pass
        else:
            others = f" and {len(blockers) - 1} more" if len(blockers) > 1 else ""
            parts.append(f"held by {_name(blockers[0])}{others}")
        if following is not None and following in seen:
            parts.append("and so they wait for each other for ever")
            break
        if following is not None:
            seen.append(following)
        waiter = following
    return ", ".join(part for part in parts if part)


def sentence(wait: Wait) -> str:
    """One wait of plain code, with its chain."""
    seconds = (wait.polling.host.monotonic_ns() - wait.since_ns) / 1e9
    text = f"{wait} ({seconds:.1f} s)"
    links = chain(wait.on) if wait.on is not None else ""
    return f"{text}: {links}" if links else text


def explain() -> str:
    """All that waits, a line each: plain code first, the innermost wait last, then the other coroutines."""
    lines = [sentence(wait) for wait in waits()]
    told: set[int] = set()
    for wait in waits():
        link: Waitable | None = wait.on
        while link is not None and id(link) not in told:
            told.add(id(link))
            link = next(iter(link.blockers()), None)
    others = [coroutine for coroutine in suspended() if id(coroutine) not in told]
    lines += [f"in {coroutine.context.name}, {chain(coroutine)}" for coroutine in others[:SUSPENDED_MAX]]
    if len(others) > SUSPENDED_MAX:
        lines.append(f"and {len(others) - SUSPENDED_MAX} more coroutines wait")
    return "\n".join(lines) or "nothing waits"


def _waits(coroutine: Coroutine) -> bool:
    body = getattr(coroutine, "_body", None)
    return getattr(body, "cr_suspended", False) and not (coroutine.done or coroutine.context.closed)


def _of_coroutine(coroutine: Coroutine, first: bool) -> str:
    if coroutine.done:
        return ""
    subject = f"coroutine {coroutine.name}" if first else "which"
    if getattr(coroutine._body, "cr_running", False):
        return f"{subject} is running"
    if coroutine.waiting_for is None:
        return f"{subject} {'has not started' if coroutine.first is not None else 'is about to go on'}"
    return f"{subject} waits for {coroutine.waiting_for}"


def _name(waitable: Waitable) -> str:
    return f"coroutine {waitable.name}" if isinstance(waitable, Coroutine) else waitable.what
