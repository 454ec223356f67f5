# SPDX-License-Identifier: Apache-2.0
"""The servers that are measured: how each is started, and that each is gone afterwards, come what may."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

READY_SECONDS: Final = 15.0
POLL_SECONDS: Final = 0.0005
PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None)


class Unavailable(Exception):
    """A server or a client is not installed; the text says which package brings it."""


Command = Callable[[str, Path, Path, bool], list[str]]  # program, socket, image, direct


@dataclass(frozen=True)
class Server:
    """One kind of server: its name, the program, the package that brings it, and its command line."""

    name: str
    program: str
    package: str
    command: Command
    can_direct: bool = True

    def find(self) -> str:
        """Return the path of the program; ``Unavailable`` when it is not installed."""
        beside_python = Path(sys.executable).parent / self.program
        path = str(beside_python) if beside_python.exists() else shutil.which(self.program)
        if path is None:
            raise Unavailable(f"needs {self.program} ({self.package})")
        return path

    def version(self) -> str:
        """Return the first line that the program prints of its version."""
        try:
            answer = subprocess.run([self.find(), "--version"], capture_output=True, text=True, timeout=20)
        except (OSError, Unavailable, subprocess.TimeoutExpired):
            return "not installed"
        return (answer.stdout.splitlines() or ["unknown"])[0]


def storage_daemon(program: str, sock: Path, image: Path, direct: bool) -> list[str]:
    file = f"driver=file,node-name=f,filename={image}" + (",cache.direct=on" if direct else "")
    return [
        *(program, "--blockdev", file, "--blockdev", "driver=raw,node-name=d,file=f"),
        *("--nbd-server", f"addr.type=unix,addr.path={sock}"),
        *("--export", "type=nbd,id=e,node-name=d,name=d,writable=on"),
    ]


def _qemu_storage_daemon(program: str, sock: Path, image: Path, direct: bool) -> list[str]:
    command = storage_daemon(program, sock, image, direct)
    command[2] += ",aio=io_uring"
    command[-1] += ",iothread=t"
    return [program, "--object", "iothread,id=t", *command[1:]]


def _throttled(of: Command) -> Command:
    """The same server with a throttle group, whose limits nobody reaches, above the image."""

    def command(program: str, sock: Path, image: Path, direct: bool) -> list[str]:
        words = [word.replace("node-name=d,name=d", "node-name=t,name=d") for word in of(program, sock, image, direct)]
        limits = "limits.iops-total=100000000,limits.bps-total=1000000000000"
        group = ["--object", f"throttle-group,id=g,{limits}"]
        at = words.index("--nbd-server")
        node = ["--blockdev", "driver=throttle,node-name=t,throttle-group=g,file=d"]
        return [program, *group, *words[1:at], *node, *words[at:]]

    return command


def _qcow2(of: Command) -> Command:
    """The same server with a qcow2 image."""

    def command(program: str, sock: Path, image: Path, direct: bool) -> list[str]:
        words = of(program, sock, image, direct)
        return ["qcow2" if word == "raw" else word.replace("driver=raw", "driver=qcow2") for word in words]

    return command


def _above_null(filter_options: str = "") -> Command:
    """Our daemon with a disk that does nothing, below a filter that has nothing to do."""

    def command(program: str, sock: Path, image: Path, direct: bool) -> list[str]:
        null = "driver=null-co,node-name=n,size=1073741824"
        top = ["--blockdev", f"{filter_options},node-name=f"] if filter_options else []
        return [
            *(program, "--object", "throttle-group,id=g,limits.iops-total=100000000,limits.bps-total=1000000000000"),
            *("--blockdev", null, *top, "--nbd-server", f"addr.type=unix,addr.path={sock}"),
            *("--export", f"type=nbd,id=e,node-name={'f' if top else 'n'},name=d,writable=on"),
        ]

    return command


def qemu_nbd(program: str, sock: Path, image: Path, direct: bool) -> list[str]:
    cache = ["--cache=none"] if direct else []
    return [
        program,
        "-k",
        str(sock),
        "-f",
        "raw",
        "--aio=io_uring",
        "-t",
        "-e",
        "0",
        "-x",
        "d",
        *cache,
        str(image),
    ]


def _nbdkit(program: str, sock: Path, image: Path, direct: bool) -> list[str]:
    return [program, "-f", "-U", str(sock), "file", str(image)]


OURS: Final = "bottomhalf"
SERVERS: Final = {
    server.name: server
    for server in (
        Server(OURS, "bh-storage-daemon", "make install", storage_daemon),
        Server("qemu-nbd", "qemu-nbd", "apt package qemu-utils", qemu_nbd),
        Server(f"{OURS}+qcow2", "bh-storage-daemon", "make install", _qcow2(storage_daemon)),
        Server("qemu-nbd+qcow2", "qemu-nbd", "apt package qemu-utils", _qcow2(qemu_nbd)),
        Server("qemu-storage-daemon", "qemu-storage-daemon", "apt package qemu-utils", _qemu_storage_daemon),
        Server("bottomhalf+throttle", "bh-storage-daemon", "make install", _throttled(storage_daemon)),
        Server("qsd+throttle", "qemu-storage-daemon", "apt package qemu-utils", _throttled(_qemu_storage_daemon)),
        Server("null-co", "bh-storage-daemon", "make install", _above_null()),
        Server(
            *("null-co+throttle", "bh-storage-daemon", "make install"),
            _above_null("driver=throttle,throttle-group=g,file=n"),
        ),
        Server("null-co+blkdebug", "bh-storage-daemon", "make install", _above_null("driver=blkdebug,image=n")),
        Server("null-co+cor", "bh-storage-daemon", "make install", _above_null("driver=copy-on-read,file=n")),
        Server("nbdkit", "nbdkit", "apt package nbdkit", _nbdkit, can_direct=False),
    )
}


@dataclass(frozen=True)
class Running:
    """A server that answers: its process, its socket, and how long it took from exec to the NBD greeting."""

    process: subprocess.Popen[bytes]
    socket: Path
    startup_seconds: float

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self.process.pid


# As users have it: with byte code kept, and without what a test runner may have set.
_ENVIRONMENT: Final = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def running(server: Server, image: Path, *, direct: bool = False) -> Iterator[Running]:
    """Start a server on an image, wait for its greeting, and end it."""
    program = server.find()
    with tempfile.TemporaryDirectory(prefix="bh-bench-") as directory, tempfile.TemporaryFile() as log:
        sock = Path(directory) / "nbd.sock"
        start = time.monotonic()
        process = subprocess.Popen(
            server.command(program, sock, image, direct),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_ENVIRONMENT,
            preexec_fn=_die_with_parent,  # also when this process is killed
        )
        try:
            while not _greets(sock):
                late = time.monotonic() - start > READY_SECONDS
                if late or process.poll() is not None:
                    said = os.pread(log.fileno(), 65536, 0).decode(errors="replace").strip()[-300:]
                    what = "does not answer" if late else f"ended with status {process.returncode}"
                    raise RuntimeError(f"{server.name} {what}: {said}")
                time.sleep(POLL_SECONDS)
            yield Running(process, sock, time.monotonic() - start)
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _greets(sock: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(READY_SECONDS)
        try:
            client.connect(str(sock))
            return client.recv(16, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT"
        except OSError:
            return False
