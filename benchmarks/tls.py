# SPDX-License-Identifier: Apache-2.0
"""Reads over TLS. The client is nbdcopy, which takes certificates in its URI and copies the image to nowhere, in
requests of a size and number that it is told: one after the other. fio's engine finds certificates only where the
system's administrator has put them, and ``qemu-img bench`` takes no objects."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import system
from benchmarks.rows import Sample, ServerRow, Settings
from benchmarks.servers import Command, Server, Unavailable, qemu_nbd, running, storage_daemon

COPIES_MAX: Final = 50  # of the image in one run
KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-x509", "-days", "2")
USES: Final = ("-addext", "basicConstraints=critical,CA:FALSE", "-addext", "extendedKeyUsage=serverAuth,clientAuth")


def make_credentials(directory: Path) -> Path:
    """An authority, and a certificate that serves both ends; the directory, which is made."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise Unavailable("needs openssl (apt package openssl)")
    directory.mkdir()

    def make(name: str, subject: str, *more: str | Path) -> None:
        files = ("-keyout", directory / f"{name}-key.pem", "-out", directory / f"{name}-cert.pem")
        words = [openssl, "req", *KEY, "-subj", subject, *more, *files]
        subprocess.run([str(word) for word in words], check=True, capture_output=True)

    make("ca", "/CN=Benchmark CA", "-addext", "keyUsage=critical,keyCertSign")
    signer = ("-CA", directory / "ca-cert.pem", "-CAkey", directory / "ca-key.pem")
    make("server", "/CN=localhost", *signer, *USES, "-addext", "subjectAltName=DNS:localhost")
    for kind in ("cert", "key"):
        shutil.copy(directory / f"server-{kind}.pem", directory / f"client-{kind}.pem")
    return directory


def _secured(of: Command, *options: str) -> Command:
    """The same server with credentials, which are made beside its socket."""

    def command(program: str, sock: Path, image: Path, direct: bool) -> list[str]:
        directory = make_credentials(sock.parent / "pki")
        words = of(program, sock, image, direct)
        words = [word + ",tls-creds=t" if word.startswith("addr.type=") else word for word in words]
        return [program, "--object", f"tls-creds-x509,id=t,dir={directory},endpoint=server", *options, *words[1:]]

    return command


OURS: Final = "bottomhalf+tls"
SERVERS: Final = {
    server.name: server
    for server in (
        Server(OURS, "bh-storage-daemon", "make install", _secured(storage_daemon)),
        Server("qemu-nbd+tls", "qemu-nbd", "apt package qemu-utils", _secured(qemu_nbd, "--tls-creds", "t")),
    )
}


@dataclass(frozen=True)
class TlsRow(ServerRow):
    """nbdcopy reads a cached image from a fresh server, again and again for about the time that was asked for."""

    block_size: int = 4096
    depth: int = 32

    def measure(self, server: Server, settings: Settings) -> Sample:
        """Operations and bytes per second."""
        with running(server, settings.image) as up:
            system.settle(settings.image, cached=True)
            held = system.Held(settings.image)
            meter, began, copies = system.Meter(up.pid), time.monotonic(), 0
            while copies < COPIES_MAX and time.monotonic() - began < settings.seconds:
                self._copy(up.socket)
                copies += 1
            seconds = time.monotonic() - began
            meter.stop()
            held.release()
        count = copies * settings.image.stat().st_size // self.block_size
        rate = count / seconds
        return Sample(
            {"IOPS": rate, "MB/s": rate * self.block_size / 1e6},
            cpu_us_per_op=meter.server_seconds / count * 1e6,
            foreign_cpus=meter.foreign_cpus,
            client="nbdcopy",
        )

    def _copy(self, sock: Path) -> None:
        program = shutil.which("nbdcopy")
        if program is None:
            raise Unavailable("needs nbdcopy (apt package libnbd-bin)")
        uri = f"nbds+unix:///d?socket={sock}&tls-certificates={sock.parent / 'pki'}&tls-hostname=localhost"
        sizes = [f"--request-size={self.block_size}", f"--requests={self.depth}", "--connections=1", "--threads=1"]
        done = subprocess.run([program, *sizes, "--no-extents", uri, "null:"], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"nbdcopy: {done.stderr.strip()}")


ROWS: Final[tuple[ServerRow, ...]] = (
    TlsRow(
        "tls-seqread-4k-qd32",
        {"qemu-nbd+tls": 1.0},
        ("IOPS",),
        about="sequential 4 KiB reads over TLS, 32 in flight",
        ours=OURS,
    ),
    TlsRow(
        "tls-seqread-256k-qd8",
        {"qemu-nbd+tls": 1.0},
        ("MB/s",),
        about="sequential 256 KiB reads over TLS, 8 in flight",
        ours=OURS,
        block_size=256 << 10,
        depth=8,
    ),
)
