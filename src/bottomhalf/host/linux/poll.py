# SPDX-License-Identifier: Apache-2.0
"""Readiness by poll(2): what works where everything else is refused.

poll(2) keeps nothing in the kernel. Each wait hands over all descriptors and looks at each, so it costs the more the
more there are, ready or not. It exists everywhere, no profile forbids it, and it needs no descriptor.

* **A descriptor to embed.** There is none that is readable while poll(2) would return something. So the first
  fileno() makes an epoll, see ``mirror``. Where epoll is refused, fileno() says so: such a context can run, but not
  inside another loop.
* **Nanoseconds.** ``select.poll`` counts milliseconds, rounded up here. Short finite timeouts take ppoll(2) through
  ctypes, which only tells that something is ready; what it is, poll(2) says. Neither returns early.
* **Other threads.** A change does not reach a poll(2) that sleeps; it works from the next wait on, so who makes it
  wakes the sleeper afterwards, as AioContext does. What the sleeper reports of a descriptor that was changed
  meanwhile may be about another file: it is dropped, and comes again if it is still so.
* **Closed descriptors.** poll(2) marks a number that is not open (POLLNVAL): it is forgotten, as epoll forgets it. If
  the number was opened again meanwhile, its new file is polled and register() says that it exists.
* All that is ready is reported; a limit would only starve those at the end.

    poller = PollPoller()
    poller.register(fd, IN)
    poller.wait(50_000)  # [] after at least 50 us
    poller.close()
"""

from __future__ import annotations

import errno
import select
import time
from typing import TYPE_CHECKING, Final

from bottomhalf.host.linux.mirror import Mirror
from bottomhalf.host.linux.pollable import check_pollable
from bottomhalf.host.linux.syscalls import error

if TYPE_CHECKING:
    from bottomhalf.host.linux.syscalls import PollArray

WAIT_NS_MAX: Final = 86_400_000_000_000  # per system call: a day; the C interface counts milliseconds in an int
_MS: Final = 1_000_000
_EXACT_BELOW_NS: Final = 20 * _MS
_NVAL: Final = select.POLLNVAL


class PollPoller:
    """A host.protocol.Poller."""

    __slots__ = ("_array", "_array_is_old", "_changed", "_closed", "_exact", "_masks", "_mirror", "_poll")

    name = "poll"

    def __init__(self) -> None:
        """OSError if the kernel refuses poll(2)."""
        self._poll = select.poll()
        self._poll.poll(0)
        self._masks: dict[int, int] = {}
        self._changed: set[int] = set()  # since the wait that sleeps has begun
        self._mirror: Mirror | None = None
        self._exact = True
        self._array: PollArray | None = None
        self._array_is_old = True
        self._closed = False

    def fileno(self) -> int:
        """As in the protocol. OSError where epoll is refused: poll(2) has no descriptor of its own."""
        self._check_open()
        if self._mirror is None:
            self._mirror = Mirror("a poller by poll(2)")
            try:
                self._mirror.follow(list(self._masks.items()))
            except BaseException:
                self._mirror.close()
                self._mirror = None
                raise
        return self._mirror.fileno()

    def register(self, fd: int, mask: int) -> None:
        self._check_open()
        check_pollable(fd)
        if fd in self._masks:
            raise error(errno.EEXIST)
        if self._mirror is not None:
            self._mirror.register(fd, mask)
        self._poll.register(fd, mask)
        self._note(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        self._check_open()
        if fd not in self._masks:
            raise error(errno.ENOENT)
        if self._mirror is not None:
            self._mirror.modify(fd, mask)
        self._poll.modify(fd, mask)
        self._note(fd, mask)

    def unregister(self, fd: int) -> None:
        self._check_open()
        if self._masks.pop(fd, None) is None:
            raise error(errno.ENOENT)
        self._forget(fd)

    def _note(self, fd: int, mask: int) -> None:
        self._masks[fd] = mask
        self._array_is_old = True
        self._changed.add(fd)

    def _forget(self, fd: int) -> None:
        self._array_is_old = True
        self._changed.add(fd)
        self._poll.unregister(fd)
        if self._mirror is not None:
            self._mirror.unregister(fd)

    def wait(self, timeout_ns: int) -> list[tuple[int, int]]:
        self._check_open()
        end_ns = time.monotonic_ns() + timeout_ns if timeout_ns > 0 else 0
        while True:
            changed: set[int] = set()
            self._changed = changed
            ready = self._ask(timeout_ns)
            if ready:
                for _, mask in ready:
                    if mask & _NVAL:
                        ready = self._without_closed(ready)
                        break
                if changed:
                    ready = [(fd, mask) for fd, mask in ready if fd not in changed]
            if ready or timeout_ns == 0:
                return ready
            if timeout_ns > 0:
                timeout_ns = max(end_ns - time.monotonic_ns(), 0)
                if timeout_ns == 0:
                    return ready

    def _ask(self, timeout_ns: int) -> list[tuple[int, int]]:
        if timeout_ns == 0:
            return self._poll.poll(0)
        if timeout_ns < 0:
            return self._poll.poll()
        if timeout_ns < _EXACT_BELOW_NS and self._exact:
            return self._ask_exactly(timeout_ns)
        return self._poll.poll(-(-min(timeout_ns, WAIT_NS_MAX) // _MS))

    def _ask_exactly(self, timeout_ns: int) -> list[tuple[int, int]]:
        if self._array is None:
            from bottomhalf.host.linux.syscalls import PollArray

            self._array = PollArray()
        if self._array_is_old:
            self._array_is_old = False
            self._array.fill(list(self._masks.items()))
        try:
            count = self._array.wait(timeout_ns)
        except OSError as refused:
            if refused.errno not in (errno.ENOSYS, errno.EPERM):
                raise
            self._exact = False
            return self._poll.poll(-(-timeout_ns // _MS))
        return self._poll.poll(0) if count else []

    def _without_closed(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        left = []
        for fd, mask in ready:
            if not mask & _NVAL:
                left.append((fd, mask))
            elif fd not in self._changed and self._masks.pop(fd, None) is not None:
                self._forget(fd)
        return left

    def close(self) -> None:
        self._closed = True
        self._masks.clear()
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("I/O operation on closed poller")
