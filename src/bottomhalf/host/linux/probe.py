# SPDX-License-Identifier: Apache-2.0
"""What this machine allows, found out by doing it.

A version number does not tell whether a system call works: distributions backport, containers hide, sysctls and
limits refuse. So each thing is tried once, in a small way, and undone. A refusal counts as absence, whatever the
errno; which errno it was, and what else the machine shows (its seccomp mode, its sysctls, who owns a device node),
only tells the likely cause.

    for finding in engines(None):
        print(finding.name, finding.works, finding.cause)

Times are those of one short run on this machine as busy as it is now: an order of magnitude, not a benchmark.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import resource
import select
import stat
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from bottomhalf.host.linux import LinuxHost, syscalls
from bottomhalf.host.linux.device import is_read_only as device_is_read_only
from bottomhalf.host.linux.file import LinuxFile
from bottomhalf.host.linux.locks import ImageLocks
from bottomhalf.host.linux.memory import LinuxArena
from bottomhalf.host.linux.poller import POLLER_KINDS, make_poller
from bottomhalf.host.linux.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from bottomhalf.host.protocol import IN, PERM_ALL, PERM_WRITE, Engine, ImageInUse
from bottomhalf.host.request import IN_PROGRESS, READ, Request

ENGINE_KINDS: Final = ("io_uring", "linux-aio", "threads")
MEASURED_BATCHES: Final = 64
MEASURED_DEPTH: Final = 32
MEASURED_BYTES: Final = 4096
MEASURED_WAITS: Final = 1000
READY_MS_MAX: Final = 5000  # for the first completion of a batch

_SYS_IO_SETUP, _SYS_IO_DESTROY = (206, 207) if platform.machine() == "x86_64" else (0, 1)
_KVM_GET_API_VERSION: Final = 0xAE00
# Magic numbers of statfs(2).
_FILE_SYSTEMS: Final = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x01021994: "tmpfs",
    0x794C7630: "overlayfs",
    0x6969: "nfs",
    0x65735546: "fuse",
    0x2FC12FC1: "zfs",
    0xFF534D42: "cifs",
    0x01021997: "9p",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: whether it works, else with which errno it was refused and why that may be."""

    name: str
    works: bool
    detail: str = ""
    errno: str | None = None
    cause: str | None = None
    nanoseconds: float | None = None  # what one costs, see ``per``
    per: str = ""

    @classmethod
    def refused(cls, name: str, error: OSError, cause: str) -> Finding:
        number = error.errno or 0
        return cls(name, False, os.strerror(number), errno.errorcode.get(number, str(number)), cause)


# -- the machine ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, str | int]:
    """What it is: kernel, Python, processors, user, and signs of a container or a system call filter."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "processors": len(os.sched_getaffinity(0)),
        "user": os.geteuid(),
        "container": container(),
        "seccomp": {0: "no filter", 1: "strict", 2: "a filter"}.get(seccomp_mode(), "unknown"),
    }


def container() -> str:
    """The kind of container that this looks like; "none seen" otherwise."""
    if os.path.exists("/run/.containerenv"):
        return "podman"
    if os.path.exists("/.dockerenv"):
        return "docker"
    if said := os.environ.get("container"):  # noqa: SIM112 - systemd's name for it
        return said
    return "kubernetes" if os.environ.get("KUBERNETES_SERVICE_HOST") else "none seen"


def seccomp_mode() -> int:
    """0 no filter, 1 strict, 2 filtered, -1 unknown."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("Seccomp:"):
            return int(line.split()[1])
    return -1


def limits() -> dict[str, int | None]:
    """Limits of the process and of the machine that storage runs into. -1 is no limit, None a kernel without it."""
    files, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, locked_max = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "open-files": files,
        "open-files-max": files_max,
        "locked-bytes": locked,
        "locked-bytes-max": locked_max,
        "aio-max-nr": _number("/proc/sys/fs/aio-max-nr"),
        "aio-nr": _number("/proc/sys/fs/aio-nr"),
        "io-uring-disabled": _number("/proc/sys/kernel/io_uring_disabled"),
    }


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


# -- engines --------------------------------------------------------------------------------------------------------


def chosen_engine() -> str:
    """The name of the engine that a context gets here."""
    engine = LinuxHost().engine()
    try:
        return engine.name
    finally:
        engine.close()


def engines(path: str | None) -> list[Finding]:
    """Each engine: tried, and timed with reads of ``path`` or, if that is None, of a small temporary file."""
    with _measured_file(path) as file:
        return [_engine(kind, file) for kind in ENGINE_KINDS]


def ring_operations() -> Finding:
    """What a ring can do beside an engine's transfers, each tried."""
    from bottomhalf.host.linux import ring_operations as operations

    name = "io_uring, other operations"
    try:
        refused = operations.refused()
    except OSError as error:
        return Finding.refused(name, error, _why_no_io_uring(error))
    if refused:
        return Finding(name, False, f"not {', '.join(refused)}", cause="the ring was restricted, or the kernel is old")
    return Finding(name, True, ", ".join(operations.NAMES))


def _engine(kind: str, file: LinuxFile | None) -> Finding:
    try:
        if kind == "linux-aio":
            _try_linux_aio()
        engine: Engine = LinuxHost().engine(kind)
    except ValueError:
        return Finding(kind, False, "the kernel has it", cause="this version has no engine that uses it")
    except OSError as error:
        return Finding.refused(kind, error, _why_not[kind](error))
    try:
        if file is None or file.size() < MEASURED_BYTES:
            return Finding(kind, True, "not measured: there is nothing to read")
        nanoseconds = _time_reads(engine, file)
        return Finding(kind, True, nanoseconds=nanoseconds, per=f"read of 4 KiB, {MEASURED_DEPTH} at a time")
    except OSError as error:
        return Finding.refused(kind, error, "it can be made, but reading with it fails")
    finally:
        engine.close()


def _try_linux_aio() -> None:
    """io_setup(2), undone. OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    context = ctypes.c_ulong(0)
    if libc.syscall(ctypes.c_long(_SYS_IO_SETUP), ctypes.c_long(1), ctypes.byref(context)) < 0:
        raise syscalls.error(ctypes.get_errno())
    libc.syscall(ctypes.c_long(_SYS_IO_DESTROY), context)


@contextlib.contextmanager
def _measured_file(path: str | None) -> Iterator[LinuxFile | None]:
    """The file to time reads with; None if there can be none."""
    with contextlib.ExitStack() as stack:
        try:
            if path is None:
                made = stack.enter_context(tempfile.NamedTemporaryFile(prefix="bottomhalf-doctor-"))
                made.write(bytes(MEASURED_DEPTH * MEASURED_BYTES))
                made.flush()
                path = made.name
            file = LinuxFile(path, read_only=True, locking="off")
            stack.callback(file.close)
        except OSError:
            yield None
            return
        yield file


def _time_reads(engine: Engine, file: LinuxFile) -> float:
    """Nanoseconds per read. OSError if one fails."""
    blocks = max(min(file.size() // MEASURED_BYTES, MEASURED_DEPTH), 1)
    arena = LinuxArena(MEASURED_DEPTH * MEASURED_BYTES)
    requests = []
    for n in range(MEASURED_DEPTH):
        at = n * MEASURED_BYTES
        request = Request(READ, n % blocks * MEASURED_BYTES, MEASURED_BYTES, arena.view[at : at + MEASURED_BYTES])
        request.address = arena.address + at
        requests.append(request)
    poll = select.poll()
    poll.register(engine.fileno(), select.POLLIN)
    taken_ns = []
    for _ in range(MEASURED_BATCHES):
        started_ns = time.monotonic_ns()
        for request in requests:
            request.result = IN_PROGRESS
            engine.prepare(file, request)
        engine.enter()
        left = MEASURED_DEPTH
        while left:
            if not engine.pending and not poll.poll(READY_MS_MAX):
                raise syscalls.error(errno.ETIMEDOUT)
            for request in engine.reap():
                left -= 1
                if request.result:
                    raise syscalls.error(-request.result)
        taken_ns.append(time.monotonic_ns() - started_ns)
    for request in requests:
        request.buffer = None
    arena.close()
    return statistics.median(taken_ns) / MEASURED_DEPTH


def _why_no_io_uring(error: OSError) -> str:
    disabled = _number("/proc/sys/kernel/io_uring_disabled")
    filtered = seccomp_mode() == 2
    if error.errno == errno.EPERM:
        if disabled == 2:
            return "the sysctl kernel.io_uring_disabled is 2: nobody may use it"
        if disabled == 1 and os.geteuid() != 0 and not filtered:
            return "the sysctl kernel.io_uring_disabled is 1: only administrators and kernel.io_uring_group may use it"
        if filtered:
            return "a seccomp filter refuses it, as the profiles of Docker and others do (try --security-opt)"
        return "a security module (SELinux, AppArmor) refuses it"
    if error.errno == errno.ENOSYS:
        if disabled is None and _kernel() < (5, 6):
            return f"the kernel, {platform.release()}, is older than 5.6"
        if filtered:
            return "a seccomp filter hides it"
        return "the kernel was built without CONFIG_IO_URING"
    if error.errno == errno.ENOMEM:
        return "RLIMIT_MEMLOCK is too small (ulimit -l), or memory is short"
    return _common_cause(error)


def _why_no_linux_aio(error: OSError) -> str:
    if error.errno == errno.EAGAIN:
        return "the contexts of all programs use up the sysctl fs.aio-max-nr"
    if error.errno == errno.ENOSYS:
        hidden = "a seccomp filter hides it, or " if seccomp_mode() == 2 else ""
        return f"{hidden}the kernel was built without CONFIG_AIO"
    return _common_cause(error)


def _common_cause(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files (ulimit -n)"
    if error.errno in (errno.EPERM, errno.EACCES):
        return "a seccomp filter refuses it" if seccomp_mode() == 2 else "a security module refuses it"
    if error.errno == errno.ENOSYS:
        here = f"the kernel, {platform.release()}, has no such call"
        return "a seccomp filter hides it" if seccomp_mode() == 2 else here
    return "unknown"


_why_not: Final[dict[str, Callable[[OSError], str]]] = {
    "io_uring": _why_no_io_uring,
    "linux-aio": _why_no_linux_aio,
    "threads": _common_cause,
}


def _kernel() -> tuple[int, int]:
    numbers = platform.release().replace("-", ".").split(".")
    return (int(numbers[0]), int(numbers[1])) if len(numbers) > 1 and numbers[1].isdigit() else (0, 0)


# -- pollers --------------------------------------------------------------------------------------------------------


def chosen_poller() -> str:
    """The name of the poller that a context gets here."""
    poller = make_poller()
    try:
        return poller.name
    finally:
        poller.close()


def pollers() -> list[Finding]:
    """Each kind of poller: tried, and timed with one descriptor that is ready."""
    return [_poller(kind) for kind in POLLER_KINDS]


def _poller(kind: str) -> Finding:
    try:
        poller = make_poller(kind)
    except OSError as error:
        return Finding.refused(kind, error, (_why_no_io_uring if kind == "io_uring" else _common_cause)(error))
    event = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        poller.register(event, IN)
        taken_ns = []
        for _ in range(MEASURED_WAITS):
            started_ns = time.monotonic_ns()
            poller.wait(0)
            taken_ns.append(time.monotonic_ns() - started_ns)
        poller.unregister(event)
        return Finding(kind, True, nanoseconds=statistics.median(taken_ns), per="look that finds something ready")
    except OSError as error:
        return Finding.refused(kind, error, _common_cause(error))
    finally:
        poller.close()
        os.close(event)


# -- devices --------------------------------------------------------------------------------------------------------


def devices() -> list[Finding]:
    """Device nodes that exports and virtual machines need."""
    return [
        _device("FUSE", "/dev/fuse", "the module fuse is not loaded", None),
        _device("KVM", "/dev/kvm", "no virtualisation here, or the module kvm is not loaded", _KVM_GET_API_VERSION),
        _device("NBD", "/dev/nbd0", "the module nbd is not loaded (modprobe nbd)", None),
    ]


def _device(name: str, path: str, absent: str, ask: int | None) -> Finding:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return Finding.refused(name, error, _why_no_device(error, path, absent))
    try:
        if ask is not None:
            return Finding(name, True, f"{path}, version {fcntl.ioctl(fd, ask)} of its interface")
        return Finding(name, True, path)
    except OSError as error:
        return Finding.refused(name, error, f"{path} is there, but does not answer as it should")
    finally:
        os.close(fd)


def _why_no_device(error: OSError, path: str, absent: str) -> str:
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return f"{absent}, or the container was not given {path}" if container() != "none seen" else absent
    if error.errno in (errno.EACCES, errno.EPERM):
        try:
            status = os.stat(path)
        except OSError:
            return f"{path} cannot be reached"
        mode = stat.S_IMODE(status.st_mode)
        if os.geteuid() == 0 or mode & 0o006 == 0o006:
            return f"the container's list of devices (cgroup) leaves out {path}"
        return f"{path} belongs to user {status.st_uid} and group {status.st_gid}, mode {mode:04o}"
    return _common_cause(error)


# -- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileReport:
    """What can be done with one file, and what O_DIRECT asks of requests to it (bytes; None: not to be had)."""

    path: str
    file_system: str
    size: int
    allocated: int
    direct_alignment: int | None
    direct_memory_alignment: int | None
    direct_by: str  # who said so: "statx", "trial", or why there is none
    findings: list[Finding]


def file_report(path: str) -> FileReport:
    """Look at a file. OSError if it cannot be opened for reading, or is neither a file nor a block device."""
    file = LinuxFile(path, read_only=True, locking="off")
    try:
        magic = syscalls.file_system_type(file.fileno())
        said = syscalls.direct_alignment(file.fileno())
        alignment: int | None = None
        memory: int | None = None
        try:
            direct = LinuxFile(path, read_only=True, direct=True, locking="off")
        except OSError as error:
            by = f"refused: {error.strerror}; the file system has no O_DIRECT"
        else:
            alignment, memory = direct.alignment, direct.memory_alignment
            by = "trial" if said is None else "statx"
            direct.close()
        return FileReport(
            path,
            "none: a block device" if file.is_device else _FILE_SYSTEMS.get(magic, f"unknown ({magic:#x})"),
            file.size(),
            file.allocated_size(),
            alignment,
            memory,
            by,
            _file_findings(file),
        )
    finally:
        file.close()


def _file_findings(file: LinuxFile) -> list[Finding]:
    found = [
        _try("reads that do not wait", lambda: _nowait(file), "every read goes to the engine"),
        _try("knowing what is cached", lambda: _cachestat(file), "needs Linux 6.5; no copying from the page cache"),
    ]
    if not file.is_device:
        found.append(_try("finding holes", lambda: _holes(file), "everything counts as data"))
    found.append(_try("a writer's image lock", lambda: _lock(file.path), "another program uses the image"))
    if file.is_device:
        found += _device_findings(file)
    else:
        found += [
            _try("holes", lambda: _fallocate(file, FALLOC_PUNCH_HOLE), "discards do nothing, zeroes take space"),
            _try("zeroes", lambda: _fallocate(file, FALLOC_ZERO_RANGE), "zeroes are a hole that is then allocated"),
            _try("copying in the kernel", lambda: _copy(file), "copies are read and written"),
        ]
    return found


def _device_findings(file: LinuxFile) -> list[Finding]:
    """What a block device says of itself; nothing is tried, for that would change it."""
    limits = file.device_limits()
    assert limits is not None
    blocks = f"{limits.logical_block} bytes to address, {limits.physical_block} to write well"
    found = [Finding("blocks", True, blocks)]
    unknown = "the device, or what it lies on, does not say that it can"
    for name, most, otherwise in (
        ("discards", limits.max_discard, "discards do nothing"),
        ("zeroes by the device", limits.max_write_zeroes, "the kernel writes zero bytes"),
        ("large transfers", limits.max_transfer, "the kernel cuts them"),
    ):
        text = f"up to {most} bytes at a time" if most else otherwise
        found.append(Finding(name, bool(most), text, cause=None if most else unknown))
    if device_is_read_only(file.fileno()):
        found.append(Finding("writing", False, "the device is read-only", cause="it was made so (BLKROGET)"))
    return found


def _try(name: str, work: Callable[[], str], cause: str) -> Finding:
    try:
        return Finding(name, True, work())
    except ImageInUse as error:
        return Finding.refused(name, error, str(error.strerror).partition(": ")[2] or cause)
    except OSError as error:
        return Finding.refused(name, error, cause)


def _nowait(file: LinuxFile) -> str:
    with contextlib.suppress(BlockingIOError):
        os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
    return "RWF_NOWAIT"


def _cachestat(file: LinuxFile) -> str:
    size = file.size()
    pages = syscalls.PageCacheProbe().cached_pages(file.fileno(), 0, size) if size else 0
    return f"{pages} pages of {-(-size // resource.getpagesize())} are"


def _holes(file: LinuxFile) -> str:
    try:
        os.lseek(file.fileno(), 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:  # that is a file without data
            raise
    return "SEEK_DATA"


def _fallocate(file: LinuxFile, mode: int) -> str:
    """Tried on a file without a name beside it."""
    with _beside(file) as fd:
        os.write(fd, bytes(resource.getpagesize()))
        syscalls.fallocate(fd, mode | FALLOC_KEEP_SIZE, 0, resource.getpagesize())
    return "fallocate"


def _copy(file: LinuxFile) -> str:
    with _beside(file) as fd:
        os.write(fd, bytes(resource.getpagesize()))
        os.copy_file_range(fd, fd, resource.getpagesize() // 2, 0, resource.getpagesize())
    return "copy_file_range"


@contextlib.contextmanager
def _beside(file: LinuxFile) -> Iterator[int]:
    """A file without a name on the same file system. OSError if there can be none."""
    folder = os.path.dirname(os.path.abspath(file.path))
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _lock(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ImageLocks(fd, path).set(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    finally:
        os.close(fd)
    return "could be had"


def image_locks() -> Finding:
    """Whether two openers of a file in the temporary directory see each other's locks."""
    name = "image locks (OFD)"
    try:
        with tempfile.NamedTemporaryFile(prefix="bottomhalf-doctor-") as file:
            ImageLocks(file.fileno(), file.name).set(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
            other = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                ImageLocks(other, file.name).set(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
            except ImageInUse:
                return Finding(name, True, "a second writer is refused")
            finally:
                os.close(other)
    except OSError as error:
        return Finding.refused(name, error, "the file system has no such locks; images are not guarded")
    return Finding(name, False, "a second writer was let in", cause="the file system ignores locks")

