# SPDX-License-Identifier: Apache-2.0
"""Tables that nobody uses leave memory after a while (``cache-clean-interval``).

A timer is armed only while there is something that it could drop: a program that does nothing sleeps, and a hang on the
simulated host, where time goes on by itself, is still seen as one.

Clause: none; it is QEMU's ``cache-clean-interval``.
Invariant: what has to be written is never dropped.
Test: tests/drivers/qcow2/test_runtime.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bottomhalf.aio.timer import Timer
    from bottomhalf.drivers.qcow2.node import Qcow2Node


class Cleaner:
    """Drops the unused tables of one image. Home thread of the node's context."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._timer: Timer | None = None
        self._since = 0  # what was used in this tick or later stays

    def start(self) -> None:
        """Begin, or go on with another interval."""
        self.stop()
        if self._node.metadata.settings.clean_interval_s:
            self._timer = self._node.context.timer(self._clean, name=f"unused tables of {self._node.describe()}")
            self._node.metadata.on_load = self._arm
            if self._node.metadata.l2:
                self._arm()

    def stop(self) -> None:
        """Nothing is dropped from now on."""
        self._node.metadata.on_load = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is not None and not self._timer.armed:
            now = self._node.context.now_ns()
            self._timer.arm_ns(now + self._node.metadata.settings.clean_interval_s * 1_000_000_000)

    def _clean(self) -> None:
        metadata = self._node.metadata
        left = metadata.drop_unused(self._since)
        self._since = metadata.tick
        if left:
            self._arm()
