# SPDX-License-Identifier: Apache-2.0
"""What the machine is asked for around a run: images, the page cache, CPU time, memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import bottomhalf

MIB: Final = 1024 * 1024
_TICK: Final = 1.0 / os.sysconf("SC_CLK_TCK")


def make_image(directory: Path, size_mib: int) -> Path:
    """Return an image of non-zero bytes, made once and used again."""
    image = directory / f"image-{size_mib}.raw"
    if image.exists() and image.stat().st_size == size_mib * MIB:
        return image
    directory.mkdir(parents=True, exist_ok=True)
    block = random.Random(size_mib).randbytes(MIB)
    unfinished = image.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        for number in range(size_mib):
            file.write(number.to_bytes(8, "little"))
            file.write(block[8:])
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(image)
    return image


def as_qcow2(image: Path) -> Path:
    """The image's bytes as a qcow2 image beside it, made once and used again."""
    made = image.with_suffix(".qcow2")
    if not made.exists():
        unfinished = made.with_suffix(".unfinished")
        bottomhalf.create(unfinished, format="qcow2", size=image.stat().st_size)
        with open(image, "rb") as source, bottomhalf.open(unfinished, format="qcow2") as disk:
            for offset in range(0, disk.size, MIB):
                disk.pwrite(source.read(MIB), offset)
        unfinished.rename(made)
    return made


def empty_qcow2(image: Path) -> Path:
    """A new qcow2 image beside the image, so large that random writes hardly meet a cluster twice."""
    made = image.with_suffix(".empty.qcow2")
    made.unlink(missing_ok=True)
    bottomhalf.create(made, format="qcow2", size=64 << 30)
    return made


class Held:
    """Keeps an image in the page cache: mapped read-only and locked, as long as this object lives.

    Some machines reclaim the page cache while it is being measured (DAMON does, in small virtual machines), and
    then a row says how fast the disk is. Where the limit on locked memory forbids it, nothing is held and
    ``settle`` has to do.
    """

    def __init__(self, image: Path) -> None:
        with open(image, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        mcl_current = 1  # what is mapped now, the image among it
        self.locked = ctypes.CDLL(None).mlockall(mcl_current) == 0

    def release(self) -> None:
        """Let the image go."""
        ctypes.CDLL(None).munlockall()
        self._map.close()


def settle(image: Path, *, cached: bool) -> None:
    """Write back what earlier runs left dirty, then read the whole image into the page cache, or drop
    it."""
    buffer = bytearray(MIB)
    with open(image, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        if cached:
            while file.readinto(buffer):
                pass
        else:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settle_for_writes(image: Path, *, keep: bool = False) -> None:
    """Fill the page cache with dirty pages of 4 KiB, whatever lay there before; with ``keep`` with what lies there.

    Read-ahead fills it with folios of up to 2 MiB, and ext4 walks through all of such a folio for each
    write into it: a 4 KiB write then costs 20 microseconds instead of 2, for every server alike, and hides
    the servers.
    """
    pages = memoryview(image.read_bytes() if keep else random.Random(0).randbytes(MIB))
    with open(image, "r+b", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for offset in range(0, image.stat().st_size, 4096):
            at = offset % len(pages)
            os.pwrite(file.fileno(), pages[at : at + 4096], offset)


def family(pid: int) -> Iterator[int]:
    """Yield a process and all that descend from it."""
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))
    except OSError:
        return  # ended meanwhile, or a kernel without this file


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process with all its threads and children."""
    total = 0.0
    for member in family(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) * _TICK
    return total


def memory_mib(pid: int) -> tuple[float, float]:
    """Return resident and proportional set size of a process and its children."""
    rss = pss = 0
    for member in family(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                rss += int(line.split()[1])
            elif line.startswith("Pss:"):
                pss += int(line.split()[1])
    return rss / 1024, pss / 1024


def _busy_seconds() -> float:
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) * _TICK


def _own_seconds() -> float:
    """Return the CPU time of this process and of the clients that it waited for."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@dataclass
class Meter:
    """CPU time around a run: ``meter = Meter(server_pid)``, the run, ``meter.stop()``."""

    pid: int
    server_seconds: float = 0.0
    client_seconds: float = 0.0
    foreign_cpus: float = 0.0  # how many processors were busy with something else, on average

    def __post_init__(self) -> None:
        self._start = (time.monotonic(), cpu_seconds(self.pid), _own_seconds(), _busy_seconds())

    def stop(self) -> None:
        """Take the differences since the beginning."""
        busy = _busy_seconds()
        elapsed = max(time.monotonic() - self._start[0], 1e-3)
        self.server_seconds = cpu_seconds(self.pid) - self._start[1]
        self.client_seconds = _own_seconds() - self._start[2]
        known = self.server_seconds + self.client_seconds
        self.foreign_cpus = max(0.0, (busy - self._start[3] - known) / elapsed)


def describe() -> dict[str, str | int]:
    """Return what a reader of the numbers wants to know of the machine."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "processor": model,
        "processors": os.cpu_count() or 1,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
