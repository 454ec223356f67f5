# SPDX-License-Identifier: Apache-2.0
"""Misuse of the event core, and what ends a wait early.

Misuse is a programming error: it says what was done, where, and what to do.
"""

from __future__ import annotations


class AioError(RuntimeError):
    """The event core was asked for something that it must not do."""


class WrongContext(AioError):
    """Called in a thread, coroutine or context in which this call can only hang or corrupt."""


class Cancelled(BaseException):
    """Raised inside a coroutine that was asked to end, at a wait that could be given up. Let it pass.

    Not an ``Exception``, so that code which survives failures does not survive this by accident."""


class WasCancelled(AioError):
    """Raised to those who await a coroutine that was cancelled."""


class TimedOut(TimeoutError):
    """What was waited for did not happen in time."""
