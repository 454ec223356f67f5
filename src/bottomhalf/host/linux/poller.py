# SPDX-License-Identifier: Apache-2.0
"""Which monitor waits for descriptors: epoll, and poll(2) where epoll is refused.

All three kinds promise the same (host.protocol.Poller), so speed decides. `benchmarks/micro_pollers.py`, nanoseconds,
CPython 3.11 on Linux 6.18, two cores of a virtual machine:

    ==================================  =====  =====  ========
    what                                epoll   poll  io_uring
    ==================================  =====  =====  ========
    wait(0), 1 of 1 ready                 449    533      5124
    wait(0), 1 of 32 ready                450   1315      5078
    wait(0), 32 of 32 ready              3107   2682     32428
    wait(0), 1 of 1000 ready              412  24780      4482
    wait(0), none of 1000 ready           292  26559       434
    event, wait, read; 1000 watched      1006  34868     10301
    remove, add, wait(0)                 1150   1840     12337
    ping-pong of two threads, one core   4854   5046     16276
    ==================================  =====  =====  ========

* epoll is the fastest wherever a descriptor is ready, or many are watched. "auto" takes it.
* poll(2) is as good for a handful of descriptors and hopeless for a thousand; but no profile forbids it. "auto" takes
  it where epoll is refused, which ``name`` then tells.
* io_uring pays in Python, by bytes stored and parsed, for what epoll does in C: a microsecond per ready descriptor, and
  one or two calls through ctypes at a microsecond each. Its looks that find nothing need no system call, but one
  such call takes no longer than the Python that saves it. "auto" never takes it. It is there to be asked for by
  name, to compare and to test with.

    poller = make_poller("auto")
    assert poller.name in ("epoll", "poll")
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from bottomhalf.host.linux.epoll import EpollPoller

if TYPE_CHECKING:
    from bottomhalf.host.protocol import Poller

POLLER_KINDS: Final = ("epoll", "poll", "io_uring")
# How a kernel or a container says that it has no such thing; anything else is a fault that a fallback would hide.
ABSENT: Final = frozenset((errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL))


def make_poller(kind: str = "auto") -> Poller:
    """As Host.poller()."""
    if kind == "auto":
        try:
            return EpollPoller()
        except OSError as refused:
            if refused.errno not in ABSENT:
                raise
        kind = "poll"
    if kind == "epoll":
        return EpollPoller()
    if kind == "poll":
        from bottomhalf.host.linux.poll import PollPoller

        return PollPoller()
    if kind == "io_uring":
        from bottomhalf.host.linux.uring_poller import UringPoller

        return UringPoller()
    raise ValueError(f"a poller is auto, {', '.join(POLLER_KINDS[:-1])} or {POLLER_KINDS[-1]}, not {kind!r}")
