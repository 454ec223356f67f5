# SPDX-License-Identifier: Apache-2.0
"""Changes that succeed together or leave no trace.

    with Transaction() as transaction:
        repoint(transaction, edge, other)            # changes at once, and says how to undo it
        permissions.refresh(other, transaction=transaction)
        # leaving the block commits; an exception undoes everything, the last step first

A change of the graph has many steps, and any of them may be refused: a lock that another program holds, a driver that
does not like its new child. Checking all of them beforehand would mean to write each twice. So a step is done as soon
as it is its turn, and notes how to take it back; what can only be given up (a lock, an old file) is kept until all
have agreed. (QEMU: transactions.h.)

Neither kind of note may fail: there is nobody left who could answer for it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeAlias

Step: TypeAlias = Callable[[], object]


class Transaction:
    """Steps that are done, and how each is made final or undone. Must not outlive a wait: who waits lets others see
    half of a change."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: list[tuple[Step | None, Step | None]] = []

    def add(self, *, commit: Step | None = None, abort: Step | None = None) -> None:
        """A step has been done: what makes it final, what undoes it."""
        self._steps.append((commit, abort))

    def commit(self) -> None:
        """Make all steps final, in the order in which they were done."""
        steps, self._steps = self._steps, []
        for commit, _ in steps:
            if commit is not None:
                commit()

    def abort(self) -> None:
        """Undo all steps, the last first."""
        steps, self._steps = self._steps, []
        for _, abort in reversed(steps):
            if abort is not None:
                abort()

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()
