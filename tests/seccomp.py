# SPDX-License-Identifier: Apache-2.0
"""System calls that the kernel refuses, to this process and all that it starts, for good: ``pytest --forbid``.

Containers forbid io_uring by a filter that says EPERM, old kernels have no such call and say ENOSYS, and a program that
takes either for anything else than absence does not start there. A filter cannot be taken off again. So it is put on
before the first test, by an option of the whole run:

    python -m pytest --forbid io_uring
    python -m pytest --forbid io_uring=ENOSYS,linux-aio=ENOSYS

The filter is four kinds of BPF instructions: load the call's number; compare; return an errno; allow.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from functools import cache
from typing import Final

_AIO: Final = (206, 207, 208, 209, 210) if platform.machine() == "x86_64" else (0, 1, 2, 3, 4)
CALLS: Final[dict[str, tuple[int, ...]]] = {
    "io_uring": (425, 426, 427),  # io_uring_setup, _enter, _register
    "linux-aio": _AIO,  # io_setup, _destroy, _submit, _cancel, _getevents: their numbers, not their order
}

_LOAD_WORD: Final = 0x20
_JUMP_IF_EQUAL: Final = 0x15
_RETURN: Final = 0x06
_ERRNO: Final = 0x00050000
_ALLOW: Final = 0x7FFF0000
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_MODE_FILTER: Final = 2

forbidden: Final[dict[str, str]] = {}  # what was refused by refuse(), and with which errno


@cache
def missing(kind: str) -> str:
    """Why this machine has none ("EPERM", "ENOSYS", ...), forbidden by us or not; "" if it has."""
    from bottomhalf.host.linux import LinuxHost

    try:
        LinuxHost().engine(kind).close()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return ""


def parse(text: str) -> dict[str, str]:
    """ "io_uring=ENOSYS,linux-aio" as a table; EPERM where nothing is said. ValueError."""
    wanted = {}
    for part in text.split(","):
        kind, _, number = part.partition("=")
        number = number or "EPERM"
        if kind not in CALLS or not hasattr(errno, number):
            raise ValueError(f"{part!r} is not one of {', '.join(CALLS)}, with =ERRNO or without")
        wanted[kind] = number
    return wanted


def refuse(wanted: dict[str, str]) -> None:
    """Put the filter on this thread and all that it starts. OSError if the kernel does not let us."""
    program = [(_LOAD_WORD, 0, 0, 0)]
    for kind, number in wanted.items():
        for call in CALLS[kind]:
            program.append((_JUMP_IF_EQUAL, 0, 1, call))
            program.append((_RETURN, 0, 0, _ERRNO | getattr(errno, number)))
    program.append((_RETURN, 0, 0, _ALLOW))
    put_on(program)
    forbidden.update(wanted)


def put_on(program: list[tuple[int, int, int, int]]) -> None:
    """Have the kernel run a BPF program at each system call. OSError."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in program))
    libc = ctypes.CDLL(None, use_errno=True)
    described = ctypes.create_string_buffer(struct.pack("<H6xQ", len(program), ctypes.addressof(code)))
    for call in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _MODE_FILTER, described, 0, 0)):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), "the kernel does not take the filter")
