# SPDX-License-Identifier: Apache-2.0
"""Misuse of the event core. These are programming errors: they say what was done, where, and what to do."""

from __future__ import annotations


class AioError(RuntimeError):
    """The event core was asked for something that it must not do."""


class WrongContext(AioError):
    """Called in a thread, coroutine or context in which this call can only hang or corrupt."""
