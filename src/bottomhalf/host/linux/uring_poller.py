# SPDX-License-Identifier: Apache-2.0
"""Readiness by io_uring: POLL_ADD requests on a ring, changes and waiting in one system call.

What the kernel does, as seen on Linux 6.18, and what follows:

* **One-shot.** A POLL_ADD completes once; who wants level-triggered readiness adds it again, and a descriptor that is
  ready then completes inside the same enter. (Level-triggered multishot is refused with EINVAL; edge-triggered would
  have to be asked again after each report just so.)
* **An armed poll that fires tells about the past.** The kernel passes on what the waker said and does not look again:
  an event set and cleared since is reported as readable. So only what completes in the very enter that submitted it
  is believed; any other completion is a hint, upon which the poll is submitted again before the wait returns.
* **RDHUP always counts.** A POLL_ADD for OUT, or for nothing, completes at once on a stream whose peer has shut down
  its side, and again each time. Such a poll is turned into a multishot one, whose first completion is the state now
  and whose others are hints.
* **Removal is a request too.** The completion of what was removed comes later. A completion carries a name that each
  submission gets anew, not the descriptor's number: what was removed says nothing to who has its number now.
* **An armed poll holds its file.** A socket that is closed while it is armed stays open for its peer, a listener's
  address stays in use. So unregister() in the home thread does not return before the kernel has let go. From another
  thread it happens when the loop wakes.
* **Another thread's change** is queued and works from the next wait on: whoever makes it wakes the sleeper
  afterwards, as AioContext does. (SINGLE_ISSUER lets only the home thread enter.)
* **Embedding.** No descriptor of the ring will do; the first fileno() makes an epoll, see ``mirror``.
* **Closed descriptors.** One that is closed without unregister() keeps its file open, as above, until it would have
  been reported; then it is forgotten, or, if its number was opened again meanwhile, that file is polled.
* A wait(0) with nothing to submit makes no system call: a few words of shared memory tell that there is nothing.

Each event costs a submission of 64 bytes filled by Python, so this is slower than epoll wherever something is ready;
``poller`` has the figures. No register() from signal handlers.

    poller = UringPoller()
    poller.register(fd, IN)
    poller.wait(-1)  # [(fd, IN)]
    poller.close()
"""

from __future__ import annotations

import errno
import threading
import time
from itertools import count
from typing import Final

from bottomhalf.host.linux.mirror import Mirror
from bottomhalf.host.linux.poll_ring import (
    CQE_F_MORE,
    NOBODY,
    OP_POLL_ADD,
    OP_POLL_REMOVE,
    POLL_ADD_MULTI,
    PollRing,
)
from bottomhalf.host.linux.pollable import check_pollable
from bottomhalf.host.linux.syscalls import error
from bottomhalf.host.protocol import ERR, HUP

ENTRIES: Final = 256  # changes per system call
ROUNDS_MAX: Final = 1000  # hints that turn out to be nothing, after which a wait that should not wait gives up
_ALWAYS: Final = ERR | HUP  # reported without being asked for

_REFUSED: Final = {
    errno.EPERM: "refused by a seccomp profile or the sysctl kernel.io_uring_disabled",
    errno.ENOSYS: "this kernel has none or is older than 5.13, or a seccomp profile hides it",
}


class _Registration:
    """One register() or modify(): never changed, only replaced."""

    __slots__ = ("alive", "armed", "fd", "mask", "multi", "name", "turn")

    def __init__(self, fd: int, mask: int) -> None:
        self.fd = fd
        self.mask = mask
        self.name = NOBODY  # in user_data: another one each time it is armed
        self.alive = True
        self.armed = False  # the kernel has it, or will with the next enter
        self.multi = False
        self.turn = 0  # in which it was submitted


class UringPoller:
    """A host.protocol.Poller."""

    __slots__ = (
        "_by_fd",
        "_changes",
        "_closed",
        "_home",
        "_in_kernel",
        "_mirror",
        "_names",
        "_ring",
        "_todo",
        "_turn",
    )

    name = "io_uring"

    def __init__(self) -> None:
        """OSError: ENOSYS (no such call), EPERM (seccomp, the sysctl), ENOMEM, EMFILE."""
        try:
            self._ring = PollRing(ENTRIES)
            try:
                self._ring.enter_named(0)
            except BaseException:
                self._ring.close()
                raise
        except OSError as refused:
            why = _REFUSED.get(refused.errno or 0, refused.strerror)
            raise OSError(refused.errno, f"no io_uring to poll with: {why}") from refused
        self._home = threading.get_ident()
        self._names = count(NOBODY + 1)
        self._by_fd: dict[int, _Registration] = {}
        self._changes: list[_Registration] = []  # appended to by any thread
        # The rest is the home thread's. Each registration is in _changes, in _todo or armed, at any time, whatever
        # exception comes out of a signal handler: doing a part of a list twice does no harm.
        self._todo: list[_Registration] = []  # to be armed or, dead, removed
        self._in_kernel: dict[int, _Registration] = {}
        self._turn = 0
        self._mirror: Mirror | None = None
        self._closed = False

    def fileno(self) -> int:
        """As in the protocol. OSError where epoll is refused."""
        self._check_open()
        if self._mirror is None:
            self._mirror = Mirror("a poller by io_uring")
            try:
                self._mirror.follow([(one.fd, one.mask) for one in list(self._by_fd.values())])
            except BaseException:
                self._mirror.close()
                self._mirror = None
                raise
        return self._mirror.fileno()

    def register(self, fd: int, mask: int) -> None:
        self._check_open()
        check_pollable(fd)
        if fd in self._by_fd:
            raise error(errno.EEXIST)
        if self._mirror is not None:
            self._mirror.register(fd, mask)
        new = self._by_fd[fd] = _Registration(fd, mask)
        self._changes.append(new)

    def modify(self, fd: int, mask: int) -> None:
        self._check_open()
        old = self._by_fd.get(fd)
        if old is None:
            raise error(errno.ENOENT)
        if self._mirror is not None:
            self._mirror.modify(fd, mask)
        new = self._by_fd[fd] = _Registration(fd, mask)
        old.alive = False
        self._changes += (old, new)

    def unregister(self, fd: int) -> None:
        self._check_open()
        old = self._by_fd.pop(fd, None)
        if old is None:
            raise error(errno.ENOENT)
        if self._mirror is not None:
            self._mirror.unregister(fd)
        old.alive = False
        self._changes.append(old)
        if old.armed and threading.get_ident() == self._home:
            self._let_go([old])

    def _let_go(self, removed: list[_Registration]) -> None:
        """Have the kernel forget armed registrations before we return. What it refuses is left to the next wait."""
        ring = self._ring
        try:
            ring.check_process()
            for old in removed:
                for _ in range(ROUNDS_MAX):
                    if old.name not in self._in_kernel:
                        break
                    self._push_todo()
                    ring.enter_named(0)
                    self._turn += 1  # so that what is ready now is a hint, and left to the next wait
                    self._take([])
        except (OSError, RuntimeError):
            pass  # the ring is lost, or another process's: the next wait says so

    def wait(self, timeout_ns: int) -> list[tuple[int, int]]:
        self._check_open()
        ring = self._ring
        ring.check_process()
        if timeout_ns == 0 and ring.quiet and not (self._todo or self._changes):
            return []
        end_ns = time.monotonic_ns() + timeout_ns if timeout_ns > 0 else 0
        ready: list[tuple[int, int]] = []
        for rounds in count(1):
            self._turn += 1
            self._push_todo()
            unfinished = bool(self._todo)  # more changes than the ring has room for
            all_taken = ring.enter_named(0 if unfinished else timeout_ns)
            unfinished |= self._take(ready)
            if ready or not all_taken:
                break
            if timeout_ns > 0:
                timeout_ns = max(end_ns - time.monotonic_ns(), 0)
            if timeout_ns == 0 and (not unfinished or rounds == ROUNDS_MAX):
                break
        return ready

    def _push_todo(self) -> None:
        """Fill the ring with what there is to change, as far as there is room."""
        ring, todo, changes = self._ring, self._todo, self._changes
        if changes:
            number = len(changes)
            todo += changes[:number]
            del changes[:number]
        turn, in_kernel, push = self._turn, self._in_kernel, ring.push_named
        if ring.unsubmitted:  # memory was short, or a signal handler has raised: these go now
            for name in ring.unsubmitted_names():
                if name in in_kernel:
                    in_kernel[name].turn = turn
                    in_kernel[name].armed = True
        room = ring.free // 2  # two entries for each
        batch = todo[:room]
        for one in batch:
            if one.alive:
                if one.armed:
                    if not one.multi or one.turn == turn:
                        continue
                    push(NOBODY, OP_POLL_REMOVE, -1, one.name, 0, 0)
                in_kernel.pop(one.name, None)
                one.name = name = next(self._names)
                one.turn = turn
                in_kernel[name] = one
                push(name, OP_POLL_ADD, one.fd, 0, POLL_ADD_MULTI if one.multi else 0, one.mask)
                one.armed = True
            elif one.armed:
                push(NOBODY, OP_POLL_REMOVE, -1, one.name, 0, 0)
        del todo[: len(batch)]

    def _take(self, ready: list[tuple[int, int]]) -> bool:
        """Sort the completions: into ``ready`` what is so now; what has to be armed again into _todo. Whether there
        was something to look into."""
        completions = self._ring.reap()
        if not completions:
            return False
        turn, in_kernel, todo = self._turn, self._in_kernel, self._todo
        hints = False
        for name, value in completions:
            one = in_kernel.get(name)
            if one is None:
                continue
            if one.name != name:  # half dealt with when a signal handler raised
                del in_kernel[name]
                continue
            if one.multi:
                hints |= self._take_multi(one, value, ready)
                continue
            todo.append(one)
            one.armed = False
            del in_kernel[name]
            if not one.alive:
                continue
            result = value & 0xFFFFFFFF
            if one.turn != turn:
                hints = True
            elif result & 0x80000000:
                self._failed(one, 0x100000000 - result, ready)
            else:
                found = result & (one.mask | _ALWAYS)
                if found:
                    ready.append((one.fd, found))
                else:
                    one.multi = True  # the peer's shutdown, for which nobody asked
                    hints = True
        self._ring.reaped()
        return hints

    def _take_multi(self, one: _Registration, value: int, ready: list[tuple[int, int]]) -> bool:
        goes_on = value >> 32 & CQE_F_MORE
        if not goes_on:
            self._todo.append(one)
            one.armed = False
            del self._in_kernel[one.name]
        if not one.alive:
            return False
        result = value & 0xFFFFFFFF
        if result & 0x80000000:
            self._failed(one, 0x100000000 - result, ready)
            return False
        if one.turn != self._turn:
            self._todo.append(one)
            return True
        found = result & (one.mask | _ALWAYS)
        if found:
            self._todo.append(one)
            if (one.fd, found) not in ready:
                ready.append((one.fd, found))
        return False

    def _failed(self, one: _Registration, number: int, ready: list[tuple[int, int]]) -> None:
        """The kernel could not poll."""
        if number == errno.EBADF:  # closed: forgotten, as epoll forgets it
            one.alive = False
            if self._by_fd.get(one.fd) is one:
                del self._by_fd[one.fd]
        elif number not in (errno.EAGAIN, errno.ENOMEM, errno.ECANCELED, errno.EINTR):
            ready.append((one.fd, ERR))  # its owner finds out what is wrong with it, or with us

    def close(self) -> None:
        """As in the protocol. In the home thread the files that were polled are let go at once, else soon."""
        if self._closed:
            return
        if threading.get_ident() == self._home:
            armed = list(self._in_kernel.values())
            for one in armed:
                one.alive = False
            self._todo[:] = armed
            self._changes.clear()
            self._let_go(armed)
        if self._mirror is not None:
            self._mirror.close()
        self._by_fd.clear()
        self._closed = True
        self._ring.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("I/O operation on closed poller")
