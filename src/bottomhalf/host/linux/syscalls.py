# SPDX-License-Identifier: Apache-2.0
"""System calls that Python does not wrap, through ctypes.

A ctypes call costs about a microsecond, so these serve set-up and whole batches, never single requests. Two ways
of calling exist and matter: with the GIL kept (short calls; giving it up costs more than the call) and with it
released (calls that may wait). Every function takes plain integers and raises ``OSError``.

What must live here: calls by number or name, their argument types, their structures. No policy.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final

_SYS_STATX: Final = 332 if os.uname().machine == "x86_64" else 291
_SYS_IO_URING_SETUP: Final = 425
_SYS_IO_URING_ENTER: Final = 426
_SYS_IO_URING_REGISTER: Final = 427
_SYS_EPOLL_PWAIT2: Final = 441
_SYS_CACHESTAT: Final = 451
_SYS_IO_SETUP, _SYS_IO_DESTROY, _SYS_IO_GETEVENTS, _SYS_IO_SUBMIT = (
    (206, 207, 208, 209) if os.uname().machine == "x86_64" else (0, 1, 4, 2)
)

_long = ctypes.c_long
_size = ctypes.c_size_t
_ptr = ctypes.c_void_p

# argtypes are given, for without them ctypes passes pointers as 32-bit ints. Parameters beyond those that a
# call takes are ignored by the kernel.
_syscall_kept = ctypes.PyDLL(None, use_errno=True).syscall
_syscall_kept.argtypes = [_long, _long, _ptr, _ptr, _long, _ptr, _size]
_syscall_kept.restype = _long
_libc = ctypes.CDLL(None, use_errno=True)
_syscall_released = _libc.syscall
_syscall_released.argtypes = [_long, _long, _ptr, _ptr, _long, _ptr, _size]
_syscall_released.restype = _long

_fallocate = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int

_ioctl = _libc.ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, _ptr]
_ioctl.restype = ctypes.c_int

_ppoll = _libc.ppoll
_ppoll.argtypes = [_ptr, ctypes.c_ulong, _ptr, _ptr]
_ppoll.restype = ctypes.c_int

FALLOC_KEEP_SIZE: Final = 1
FALLOC_PUNCH_HOLE: Final = 2
FALLOC_ZERO_RANGE: Final = 16


def error(number: int) -> OSError:
    """The OSError (of the fitting subclass) for an errno."""
    return OSError(number, os.strerror(number))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). May wait for the disk; the GIL is released."""
    if _fallocate(fd, mode, offset, length) != 0:
        raise error(ctypes.get_errno())


def ioctl(fd: int, request: int, argument: ctypes.Array[ctypes.c_char]) -> None:
    """ioctl(2) with the address of ``argument``. May wait for the device; the GIL is released."""
    if _ioctl(fd, request, ctypes.addressof(argument)) != 0:
        raise error(ctypes.get_errno())


def io_uring_setup(entries: int, params: ctypes.Array[ctypes.c_char]) -> int:
    """io_uring_setup(2): the ring's descriptor; ``params`` is read and filled in."""
    result = _syscall_released(_SYS_IO_URING_SETUP, entries, ctypes.addressof(params), None, 0, None, 0)
    if result < 0:
        raise error(ctypes.get_errno())
    return int(result)


def io_uring_enter(fd: int, to_submit: int, min_complete: int, flags: int) -> int:
    """io_uring_enter(2): how many entries were taken, or a negative errno.

    With ``min_complete`` 0 the GIL is kept, because the call is short."""
    if min_complete:
        result = _syscall_released(_SYS_IO_URING_ENTER, fd, to_submit, min_complete, flags, None, 0)
        return int(result) if result >= 0 else -ctypes.get_errno()
    result = _syscall_kept(_SYS_IO_URING_ENTER, fd, to_submit, None, flags, None, 0)
    return int(result) if result >= 0 else -ctypes.get_errno()


class EnterTimeout:
    """What IORING_ENTER_EXT_ARG (Linux 5.11) points at: a wait inside io_uring_enter(2) with a limit."""

    __slots__ = ("_argument", "_argument_address", "_timespec")

    def __init__(self) -> None:
        self._timespec = ctypes.create_string_buffer(_TIMESPEC.size)
        timespec_address = ctypes.addressof(self._timespec)
        # sigmask u64, its size u32, padding u32, address of the timespec u64
        self._argument = ctypes.create_string_buffer(struct.pack("<QIIQ", 0, 0, 0, timespec_address), 24)
        self._argument_address = ctypes.addressof(self._argument)

    def set(self, timeout_ns: int) -> None:
        _TIMESPEC.pack_into(self._timespec, 0, timeout_ns // 1_000_000_000, timeout_ns % 1_000_000_000)

    def enter(self, fd: int, to_submit: int, min_complete: int, flags: int) -> int:
        """io_uring_enter(2) as below, for as long as set(); ``flags`` are to have IORING_ENTER_EXT_ARG."""
        result = _syscall_released(
            _SYS_IO_URING_ENTER, fd, to_submit, min_complete, flags, self._argument_address, 24
        )
        return int(result) if result >= 0 else -ctypes.get_errno()


def io_uring_register_eventfd(fd: int, eventfd: int) -> None:
    """IORING_REGISTER_EVENTFD: signal the eventfd whenever a completion can be collected."""
    register_eventfd = 4
    number = ctypes.c_int(eventfd)
    result = _syscall_released(
        _SYS_IO_URING_REGISTER, fd, register_eventfd, ctypes.addressof(number), 1, None, 0
    )
    if result < 0:
        raise error(ctypes.get_errno())


def io_setup(entries: int) -> int:
    """io_setup(2): a context for so many requests; what comes back is the address of its completion ring."""
    context = ctypes.c_uint64(0)
    result = _syscall_released(_SYS_IO_SETUP, entries, ctypes.addressof(context), None, 0, None, 0)
    if result < 0:
        raise error(ctypes.get_errno())
    return context.value


def io_submit(context: int, count: int, pointers: int) -> int:
    """io_submit(2): how many of the ``count`` control blocks, whose addresses stand at ``pointers``, were taken, or the
    negative errno of the first. Waits for the disk where the file system has it so; the GIL is released."""
    result = _syscall_released(_SYS_IO_SUBMIT, context, count, pointers, 0, None, 0)
    return int(result) if result >= 0 else -ctypes.get_errno()


def io_getevents(context: int, count: int, events: int) -> int:
    """io_getevents(2) without waiting: how many of ``count`` events of 32 bytes it put there, or a negative errno."""
    no_time = ctypes.create_string_buffer(_TIMESPEC.size)
    result = _syscall_kept(_SYS_IO_GETEVENTS, context, 0, count, events, ctypes.addressof(no_time), 0)
    return int(result) if result >= 0 else -ctypes.get_errno()


def io_destroy(context: int) -> None:
    """io_destroy(2): waits for what is in flight; the completion ring is gone."""
    if _syscall_released(_SYS_IO_DESTROY, context, None, None, 0, None, 0) < 0:
        raise error(ctypes.get_errno())


# Mask and data, packed on x86-64 alone. Python's epoll keeps the descriptor in the lower half of the data and
# leaves what happened to be on its stack in the upper one.
_EPOLL_EVENT: Final = struct.Struct("<Ii4x" if os.uname().machine == "x86_64" else "<I4xi4x")
_TIMESPEC: Final = struct.Struct("<qq")


class EpollBuffer:
    """Room for the answers of epoll_pwait2(2), reused from call to call."""

    __slots__ = ("_events", "_events_address", "_timespec", "_timespec_address", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._events = ctypes.create_string_buffer(_EPOLL_EVENT.size * size)
        self._timespec = ctypes.create_string_buffer(_TIMESPEC.size)
        self._events_address = ctypes.addressof(self._events)
        self._timespec_address = ctypes.addressof(self._timespec)

    def wait(self, fd: int, timeout_ns: int) -> list[tuple[int, int]] | None:
        """epoll_pwait2(2): like epoll.poll() with nanoseconds. None if it was interrupted (EINTR)."""
        _TIMESPEC.pack_into(self._timespec, 0, timeout_ns // 1_000_000_000, timeout_ns % 1_000_000_000)
        count = _syscall_released(
            _SYS_EPOLL_PWAIT2, fd, self._events_address, self.size, self._timespec_address, None, 0
        )
        if count < 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                return None
            raise error(number)
        unpack, step = _EPOLL_EVENT.unpack_from, _EPOLL_EVENT.size
        events = []
        for position in range(0, count * step, step):
            mask, ready = unpack(self._events, position)
            events.append((ready, mask))
        return events


_POLLFD: Final = struct.Struct("<ihh")


class PollArray:
    """The descriptors that ppoll(2) looks at, kept from call to call."""

    __slots__ = ("_count", "_entries", "_timespec")

    def __init__(self) -> None:
        self._timespec = ctypes.create_string_buffer(_TIMESPEC.size)
        self.fill([])

    def fill(self, masks: list[tuple[int, int]]) -> None:
        """Look at these (fd, mask) from now on."""
        self._count = len(masks)
        self._entries = ctypes.create_string_buffer(max(_POLLFD.size * len(masks), 1))
        for position, (fd, mask) in enumerate(masks):
            _POLLFD.pack_into(self._entries, position * _POLLFD.size, fd, mask, 0)

    def wait(self, timeout_ns: int) -> int:
        """ppoll(2): how many are ready after at most ``timeout_ns``; 0 also if it was interrupted (EINTR)."""
        _TIMESPEC.pack_into(self._timespec, 0, timeout_ns // 1_000_000_000, timeout_ns % 1_000_000_000)
        count = _ppoll(self._entries, self._count, self._timespec, None)
        if count < 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                return 0
            raise error(number)
        return int(count)


class PageCacheProbe:
    """cachestat(2) (Linux 6.5): how much of a file's range is in the page cache.

    ``cached_pages`` raises OSError where the kernel has no such call or does not let us ask."""

    __slots__ = ("_answer", "_answer_address", "_range", "_range_address")

    def __init__(self) -> None:
        self._range = ctypes.create_string_buffer(16)
        self._answer = ctypes.create_string_buffer(40)
        self._range_address = ctypes.addressof(self._range)
        self._answer_address = ctypes.addressof(self._answer)

    def cached_pages(self, fd: int, offset: int, length: int) -> int:
        struct.pack_into("<QQ", self._range, 0, offset, length)
        result = _syscall_kept(_SYS_CACHESTAT, fd, self._range_address, self._answer_address, 0, None, 0)
        if result < 0:
            raise error(ctypes.get_errno())
        return int.from_bytes(bytes(self._answer.raw[:8]), "little")


def direct_alignment(fd: int) -> tuple[int, int] | None:
    """(memory, offset) alignment that O_DIRECT needs by statx(2), None where the kernel does not say."""
    answer = ctypes.create_string_buffer(256)
    empty = ctypes.create_string_buffer(b"")
    at_empty_path, statx_dioalign = 0x1000, 0x2000
    result = _syscall_released(
        _SYS_STATX,
        fd,
        ctypes.addressof(empty),
        at_empty_path,
        statx_dioalign,
        ctypes.addressof(answer),
        0,
    )
    if result < 0:
        return None
    (mask,) = struct.unpack_from("<I", answer, 0)
    memory, offset = struct.unpack_from("<II", answer, 152)
    if not mask & statx_dioalign or not offset:
        return None
    return memory, offset


def file_system_type(fd: int) -> int:
    """fstatfs(2): the magic number of the file system that a file is on."""
    answer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, ctypes.byref(answer)) != 0:
        raise error(ctypes.get_errno())
    return int.from_bytes(answer.raw[:4], "little")


def address_of(buffer: memoryview) -> int:
    """Memory address of a writable buffer's first byte."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
