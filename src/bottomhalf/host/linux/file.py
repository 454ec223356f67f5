# SPDX-License-Identifier: Apache-2.0
"""Image files and block devices, and the part of their I/O that needs no waiting.

A read of bytes that are in the page cache costs 0.9 us by preadv2(2) with RWF_NOWAIT and never waits for a disk; a
trip through a ring or a thread costs more and a turn of the loop besides. Therefore cached reads are served where
the request stands and only misses travel on (a miss has started read-ahead by then). ext4 has no RWF_NOWAIT for
buffered writes; a plain pwrite is a copy into the page cache, 2.4 us, and waits only when the kernel throttles
writers. Therefore writes are done in place until a batch of them has waited in the kernel for more than two
milliseconds, and go to the engine for a while after that. (Time alone does not tell: on a busy machine a neighbour
may have had the processor. Whoever waits gives it up of its own accord, and the kernel counts that.) O_DIRECT
always waits for the device and is never served here.

A file that turns out to be all in memory is read through a mapping; see ``mapping``.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from resource import RUSAGE_THREAD, getrusage
from typing import TYPE_CHECKING, Final

from bottomhalf.host.linux.locks import ImageLocks
from bottomhalf.host.linux.mapping import PageCacheMap, is_remote
from bottomhalf.host.linux.memory import LinuxArena
from bottomhalf.host.protocol import CHARACTER_DEVICE, DATA, ZERO, DeviceLimits, DeviceReadOnly, ImageInUse
from bottomhalf.host.request import FUA, Request

if TYPE_CHECKING:
    from bottomhalf.host.linux.syscalls import PageCacheProbe
    from bottomhalf.host.protocol import File

_RWF_NOWAIT: Final = os.RWF_NOWAIT
_PAGE: Final = os.sysconf("SC_PAGESIZE")

INLINE_WRITE_BATCH_NS_MAX: Final = 2_000_000  # a batch that waited and took longer sends the next to the engine
INLINE_WRITE_PAUSE_NS: Final = 200_000_000  # for this long

_SCRATCH_BYTES: Final = 1 << 16  # more than this is not read in one go: others wait meanwhile

# NFS and some FUSE file systems answer RWF_NOWAIT with these; then every read goes to the engine.
_NO_NOWAIT: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class LinuxFile:
    """A host.protocol.File on a regular file or a block device."""

    def __init__(self, path: str, *, read_only: bool = False, direct: bool = False, locking: str = "auto") -> None:
        if locking not in ("auto", "on", "off"):
            raise ValueError(f"locking is on, off or auto, not {locking!r}")
        self.path = path
        self.read_only = read_only
        self.direct = direct
        self._fd = self._open(path)
        try:
            mode = os.fstat(self._fd).st_mode
            if stat.S_ISDIR(mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                what = CHARACTER_DEVICE if stat.S_ISCHR(mode) else "neither a regular file nor a block device"
                raise OSError(errno.ENOTBLK, what, path)
            self.is_device = stat.S_ISBLK(mode)
            self._check_writable(self._fd)
            self.memory_alignment, self.alignment = self._find_alignment() if direct else (1, 1)
        except BaseException:
            os.close(self._fd)
            raise
        self._locks = ImageLocks(self._fd, path) if locking != "off" else None
        self._locking_required = locking == "on"
        self._nowait = not direct
        self._memory = bytearray(_SCRATCH_BYTES if self._nowait else 0)
        self._scratch = memoryview(self._memory)[:0]  # as much of it as was needed last
        self._writes_wait_until_ns = 0
        self._status_waits: bool | None = None  # not known yet
        self._cache_probe: PageCacheProbe | None = None
        self._knows_cached = not direct
        self._map = PageCacheMap(self._fd, usable=not direct and not self.is_device)

    def _open(self, path: str) -> int:
        """Its descriptor, opened as ``read_only`` and ``direct`` say."""
        flags = (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)
        # Without O_NONBLOCK the open of a FIFO waits for its other end, and with it io_uring says EAGAIN to misses.
        fd = os.open(path, flags | os.O_NONBLOCK)
        os.set_blocking(fd, True)
        return fd

    def _check_writable(self, fd: int) -> None:
        if self.is_device and not self.read_only:
            from bottomhalf.host.linux import device

            if device.is_read_only(fd):
                raise DeviceReadOnly(errno.EACCES, os.strerror(errno.EACCES), self.path)

    def fileno(self) -> int:
        return self._fd

    def size(self) -> int:
        if self.is_device:
            from bottomhalf.host.linux import device

            return device.size(self._fd)
        return os.fstat(self._fd).st_size

    @property
    def status_waits(self) -> bool:
        if self._status_waits is None:
            self._status_waits = not self.is_device and is_remote(self._fd)
        return self._status_waits

    def allocated_size(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def pread(self, length: int, offset: int) -> bytes:
        alignment = self.alignment
        if alignment == 1:
            return os.pread(self._fd, length, offset)
        start = offset - offset % alignment
        span = -(-(offset + length - start) // alignment) * alignment
        arena = LinuxArena(max(span, _PAGE))
        try:
            count = os.preadv(self._fd, [arena.view[:span]], start)
            return bytes(arena.view[offset - start : min(count, offset - start + length)])
        finally:
            arena.close()

    def read_inline(self, requests: list[Request]) -> list[Request]:
        if not self._nowait:
            return requests
        fd, preadv = self._fd, os.preadv
        slow: list[Request] = []
        for request in requests:
            try:
                count = preadv(fd, (request.buffer,), request.offset, _RWF_NOWAIT)
            except BlockingIOError:
                slow.append(request)
                continue
            except OSError as error:
                if error.errno in _NO_NOWAIT:
                    self._nowait = False
                    slow.append(request)
                else:
                    request.result = -(error.errno or errno.EIO)
                continue
            if count == request.length or self._finish_short_read(request, count):
                request.result = 0
            else:
                slow.append(request)
        if slow:
            self._map.missed()
        else:
            self._map.hit(len(requests))
        return slow

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        if not self._nowait or length > _SCRATCH_BYTES:
            return None
        view = self._scratch if length == len(self._scratch) else memoryview(self._memory)[:length]
        try:
            count = os.preadv(self._fd, (view,), offset, _RWF_NOWAIT)
        except BlockingIOError:
            self._map.missed()
            return None
        except OSError as error:
            if error.errno in _NO_NOWAIT:
                self._nowait = False
                return None
            raise
        self._scratch = view
        return bytes(view) if count == length else None

    def map_reads(self, requests: list[Request], offsets: list[int]) -> bool:
        return self._map.active and self._map.point(requests, offsets)

    def _finish_short_read(self, request: Request, count: int) -> bool:
        """A short answer is the end of the file (then zeroes follow) or the end of what is cached."""
        if request.offset + count < self.size():
            return False
        request.buffer[count:] = bytes(request.length - count)
        return True

    def write_inline(self, requests: list[Request]) -> list[Request]:
        if self.direct:
            return requests
        started_ns = time.monotonic_ns()
        if started_ns < self._writes_wait_until_ns:
            return requests
        waits = getrusage(RUSAGE_THREAD).ru_nvcsw
        fd, pwritev = self._fd, os.pwritev
        slow: list[Request] = []
        for request in requests:
            if request.flags & FUA:
                slow.append(request)
                continue
            try:
                count = pwritev(fd, (request.buffer,), request.offset)
            except OSError as error:
                request.result = -(error.errno or errno.EIO)
                continue
            if count == request.length:
                request.result = 0
            else:
                slow.append(request)  # the engine finds out what stops it
        taken_ns = time.monotonic_ns() - started_ns
        if taken_ns > INLINE_WRITE_BATCH_NS_MAX and getrusage(RUSAGE_THREAD).ru_nvcsw != waits:
            self._writes_wait_until_ns = started_ns + taken_ns + INLINE_WRITE_PAUSE_NS
        return slow

    def is_cached(self, offset: int, length: int) -> bool:
        if not self._knows_cached or not self._nowait:
            return False
        if self._cache_probe is None:
            from bottomhalf.host.linux.syscalls import PageCacheProbe

            self._cache_probe = PageCacheProbe()
        first = offset - offset % _PAGE
        pages = -(-(offset + length - first) // _PAGE)
        try:
            return self._cache_probe.cached_pages(self._fd, first, pages * _PAGE) >= pages
        except OSError:  # a kernel without the call, or one that does not let us ask
            self._knows_cached = False
            return False

    def block_status(self, offset: int, length: int) -> tuple[int, int]:
        end = offset + length
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return ZERO, length
            return DATA, length  # a file system or device that cannot tell
        if data > offset:
            return ZERO, min(data, end) - offset
        try:
            hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
        except OSError:  # it was cut off meanwhile
            return DATA, length
        return DATA, max(min(hole, end) - offset, 1)

    def prefetch(self, offset: int, length: int) -> None:
        if not self.direct:
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def device_limits(self) -> DeviceLimits | None:
        if not self.is_device:
            return None
        from bottomhalf.host.linux import device

        return device.limits(self._fd)

    def set_read_only(self, read_only: bool) -> None:
        """The descriptor keeps its number, so whoever noted it goes on; what is under way in the kernel has the old
        opening, and with it the right to end."""
        if read_only == self.read_only:
            return
        self.read_only = read_only
        fd = -1
        try:
            fd = self._open_again()
            self._check_writable(fd)
            if self._locks is not None:
                self._locks.move(fd)
            os.dup2(fd, self._fd, inheritable=False)
        except BaseException:
            self.read_only = not read_only
            if fd >= 0 and self._locks is not None:
                self._locks.move(self._fd)  # back
            raise
        finally:
            if fd >= 0:
                os.close(fd)

    def _open_again(self) -> int:
        """A second descriptor of the same file, wherever its path leads by now."""
        try:
            return self._open(f"/proc/self/fd/{self._fd}")
        except FileNotFoundError:
            fd = self._open(self.path)  # there is no /proc
        if not os.path.samestat(os.fstat(fd), os.fstat(self._fd)):
            os.close(fd)
            raise OSError(errno.ESTALE, "the path leads to another file by now", self.path)
        return fd

    def set_permissions(self, held: int, shared: int) -> None:
        if self._locks is None:
            return
        try:
            self._locks.set(held, shared)
        except OSError as error:
            if isinstance(error, ImageInUse) or self._locking_required:
                raise
            self._locks = None  # locking=auto: a file system without these locks does without

    def take_locks(self, file: File) -> None:
        assert isinstance(file, LinuxFile)
        if file._locks is None:
            self._locks = None
        elif self._locks is not None:
            self._locks.take(file._locks)

    def close(self) -> None:
        self._map.close()
        if self._fd >= 0:
            os.close(self._fd)  # the locks go with the descriptor
            self._fd = -1

    def _find_alignment(self) -> tuple[int, int]:
        """(memory, offset) alignment of O_DIRECT: what the kernel says, else what a trial read accepts."""
        from bottomhalf.host.linux.syscalls import direct_alignment

        said = direct_alignment(self._fd)
        if self.is_device:
            from bottomhalf.host.linux import device

            block = device.logical_block(self._fd)
            return (block if said is None else said[0]), block
        if said is not None:
            return said
        arena = LinuxArena(2 * _PAGE)
        try:
            for alignment in (512, 1024, 2048, 4096):
                try:
                    os.preadv(self._fd, [arena.view[:alignment]], 0)
                    return alignment, alignment
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        break
        finally:
            arena.close()
        return _PAGE, _PAGE
