# SPDX-License-Identifier: Apache-2.0
"""Readiness by io_uring: polls are operations of a ring, and changes travel with the wait.

A poll operation completes once. So each descriptor that was told is armed again by the next wait, in the same system
call that waits; a descriptor that is still ready then completes at once, which makes it level-triggered. Changes are
queued and submitted with the next wait as well: a program that changes its set at every turn saves the calls that
epoll_ctl(2) would be. One that does not pays more per event than with epoll; measured in ``benchmarks``.

Removing is asynchronous in the kernel, and a completion of the old registration may be under way when the number is
registered anew. Each arming has a token of its own, and a completion whose token is not known any more is dropped.

A completion says that a descriptor *was* ready. Since it was posted somebody may have taken what there was, and level
is what a poller promises; so what completed is looked at once more with poll(2), one call for all of it.

register(), modify() and unregister() may be called from another thread while the home thread sleeps in wait(), as the
event core does; they take effect when it is woken. fork(2) leaves the child without a ring: it gets an error.
"""

from __future__ import annotations

import errno
import select
import time
from collections import deque
from itertools import count

from bottomhalf.host.linux.poll_poller import MirroredPoller
from bottomhalf.host.linux.ring import OP_POLL_ADD, OP_POLL_REMOVE, Ring
from bottomhalf.host.linux.syscalls import error


class _Watch:
    """One registration; a modified one is another."""

    __slots__ = ("fd", "mask", "token")

    def __init__(self, fd: int, mask: int) -> None:
        self.fd = fd
        self.mask = mask
        self.token = 0  # of its operation in the ring, 0: none


class UringPoller(MirroredPoller):
    """A host.protocol.Poller."""

    __slots__ = ("_armed", "_changes", "_ring", "_token", "_watches")

    name = "io_uring"

    def __init__(self) -> None:
        """OSError where io_uring is refused or too old to wait with a time limit (before Linux 5.11)."""
        super().__init__()
        self._ring = Ring()
        if not self._ring.can_time_out:
            self._ring.close()
            raise error(errno.ENOSYS)
        self._watches: dict[int, _Watch] = {}
        self._armed: dict[int, _Watch] = {}  # by token
        self._changes: deque[tuple[bool, _Watch]] = deque()  # whether to arm, and what
        self._token = count(1).__next__

    def _set(self, fd: int, mask: int) -> None:
        before = self._watches.get(fd)
        if before is not None:
            self._changes.append((False, before))
        watch = self._watches[fd] = _Watch(fd, mask)
        self._changes.append((True, watch))

    def _forget(self, fd: int) -> None:
        super()._forget(fd)
        self._changes.append((False, self._watches.pop(fd)))

    def wait(self, timeout_ns: int) -> list[tuple[int, int]]:
        ring = self._ring
        end_ns = time.monotonic_ns() + timeout_ns if timeout_ns > 0 else 0
        while True:
            self._submit_changes()
            if timeout_ns == 0 or ring.pending:
                ring.enter()
            else:
                ring.enter_until(timeout_ns)
            ready = self._collect()
            if ready or timeout_ns <= 0:
                break  # a wait without end may return with nothing: after a signal, or a removal
            timeout_ns = max(end_ns - time.monotonic_ns(), 0)
            if timeout_ns == 0:
                break
        return ready

    def _submit_changes(self) -> None:
        push, armed, changes = self._ring.push_next, self._armed, self._changes
        while changes:
            arm, watch = changes.popleft()
            if arm:
                if self._watches.get(watch.fd) is watch:
                    watch.token = token = self._token()
                    armed[token] = watch
                    push(token, OP_POLL_ADD, watch.fd, 0, watch.mask)
            elif watch.token and armed.pop(watch.token, None) is not None:
                push(0, OP_POLL_REMOVE, -1, watch.token, 0)

    def _collect(self) -> list[tuple[int, int]]:
        ready: list[tuple[int, int]] = []
        tokens, results = self._ring.completions()
        for token, result in zip(tokens, results, strict=True):
            watch = self._armed.pop(token, None)
            if watch is None:
                continue  # of a removal, or of what was removed
            watch.token = 0
            if result == -errno.ECANCELED:
                continue
            if result < 0:  # closed before it was armed again
                if self._watches.get(watch.fd) is watch:
                    super()._forget(watch.fd)
                    del self._watches[watch.fd]
                continue
            if self._watches.get(watch.fd) is not watch:
                continue  # its removal is queued
            self._changes.append((True, watch))
            ready.append((watch.fd, watch.mask))
        return self._still_ready(ready) if ready else ready

    def _still_ready(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        now = select.poll()
        for fd, mask in ready:
            now.register(fd, mask)
        return [(fd, mask) for fd, mask in now.poll(0) if not mask & select.POLLNVAL]

    def close(self) -> None:
        super().close()
        self._ring.close()
