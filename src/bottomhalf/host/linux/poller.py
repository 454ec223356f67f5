# SPDX-License-Identifier: Apache-2.0
"""Which monitor waits for descriptors."""

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
