# SPDX-License-Identifier: Apache-2.0
"""What the options of ``file`` do, seen in what the host is asked for, and where it can be seen, as in QEMU."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.block import BlockError
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_WRITE
from bottomhalf.host.request import FLUSH, FUA, WRITE, Request
from bottomhalf.host.sim import SimHost
from tests.block.bench import bench, discard, flush, write
from tests.drivers.helpers import opened

SIZE = 1 << 20
SECONDS_MAX = 60


def options(filename: str, **more: Any) -> dict[str, Any]:
    return {"driver": "file", "filename": filename, **{name.replace("_", "-"): value for name, value in more.items()}}


@pytest.mark.parametrize("direct", [False, True])
def test_cache_direct(tmp_path: Path, direct: bool) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with bench(LinuxHost()) as it:
        try:
            node = opened(it, options(str(tmp_path / "disk"), cache={"direct": direct}))
        except BlockError as error:
            pytest.skip(str(error))
        flags = fcntl.fcntl(node.file.fileno(), fcntl.F_GETFL)
        assert bool(flags & os.O_DIRECT) == direct == (node.request_alignment > 1)


@pytest.mark.parametrize("no_flush", [False, True])
def test_cache_no_flush(seed: int, no_flush: bool) -> None:
    """Flushes, and what is to be durable at once, are not asked of the host."""
    host = SimHost(seed)
    host.add_file("disk", SIZE)
    with bench(host) as it:
        user = it.user(opened(it, options("disk", cache={"no-flush": no_flush})))
        fault = host.fault(path="disk", op=FLUSH, errno=errno.EIO)
        assert user.do(write(0, b"w" * 512), write(4096, b"w" * 512, FUA)) == [0, 0]
        assert user.do(flush()) == [0 if no_flush else -errno.EIO]
        assert (fault.hits == 0) == no_flush
        assert host.disk.files["disk"].unsynced_changes() == (2 if no_flush else 1)


def test_writethrough_is_the_backends(seed: int) -> None:
    """cache.writeback=off is not the node's: its users write durably."""
    host = SimHost(seed)
    host.add_file("disk", SIZE)
    with bench(host) as it:
        user = it.user(opened(it, options("disk")), writethrough=True)
        assert user.do(write(0, b"w" * 512)) == [0]
        assert host.disk.files["disk"].unsynced_changes() == 0


@pytest.mark.parametrize("locking", ["on", "off", "auto"])
def test_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locking: str) -> None:
    """on: locks, or it is an error; off: none; auto: locks where the file system has them."""
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with bench(LinuxHost()) as it:
        it.backend(opened(it, options(str(tmp_path / "disk"), locking=locking)), shared=PERM_CONSISTENT_READ)
        other = opened(it, options(str(tmp_path / "disk"), locking="on"))
        if locking == "off":
            it.backend(other)
        else:
            with pytest.raises(BlockError, match='Failed to get "write" lock'):
                it.backend(other)
    from bottomhalf.host.linux import locks

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(locks.fcntl, "fcntl", refuse)
    with bench(LinuxHost()) as it:
        node = opened(it, options(str(tmp_path / "disk"), locking=locking))
        if locking == "on":
            with pytest.raises(BlockError, match="Could not lock"):
                it.backend(node)
        else:
            it.backend(node)


@pytest.mark.parametrize("unmap", ["ignore", "unmap", None])
def test_discard(seed: int, unmap: str | None) -> None:
    host = SimHost(seed)
    host.add_file("disk", b"x" * SIZE)
    with bench(host) as it:
        more = {} if unmap is None else {"discard": unmap}
        assert it.user(opened(it, options("disk", **more))).do(discard(0, SIZE)) == [0]
        assert host.content("disk") == (bytes(SIZE) if unmap == "unmap" else b"x" * SIZE)


@pytest.mark.parametrize("most", [0, 1, 3, 100])
def test_aio_max_batch(seed: int, most: int) -> None:
    """No more requests of the node start together; 0 and more than the usual change nothing."""
    host = SimHost(seed)
    host.add_file("disk", SIZE, cached="never")
    with bench(host) as it:
        user = it.user(opened(it, options("disk", aio_max_batch=most)))
        sizes: list[int] = []
        engine: Any = user.backend.node.engine._engine
        prepare, enter = engine.prepare, engine.enter
        count = 0

        def counted(file: Any, request: Request) -> None:
            nonlocal count
            count += 1
            prepare(file, request)

        def entered() -> None:
            nonlocal count
            sizes.append(count)
            count = 0
            enter()

        it.context.engine_of("auto")._prepare = lambda file, requests: [
            request for request in requests if counted(file, request)
        ]
        engine.enter = entered
        data = memoryview(bytes(512))
        assert user.do(*[Request(WRITE, n * 512, 512, data) for n in range(40)]) == [0] * 40
        assert sum(sizes) == 40
        assert max(sizes) == (most if most in (1, 3) else 16)


def test_options_that_only_migration_uses() -> None:
    """drop-cache and x-check-cache-dropped are about what a migration leaves in the page cache. There is none: they are
    taken and change nothing, as in QEMU until then."""
    host = SimHost(0)
    host.add_file("disk", SIZE)
    with bench(host) as it:
        for more in ({"drop_cache": False}, {"drop_cache": True}, {"x_check_cache_dropped": True}):
            user = it.user(opened(it, options("disk", **more)))
            assert user.do(write(0, b"w")) == [0]
            user.backend.close()


REFUSED = [
    "aio=native",
    "aio=native,cache.direct=off",
    "aio=other",
    "locking=maybe",
    "pr-manager=x",
    "cache.direct=perhaps",
    "read-only=off,force-share=on",
    "driver=host_device",
    "filename=/dev/null",
    "filename=/nowhere",
    "filename=/",
]


@pytest.mark.parametrize("given", REFUSED)
def test_refused_as_by_qemu(require: Callable[[str], str], tmp_path: Path, given: str) -> None:
    """The same words, behind the program's name; ours may go on."""
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    parts = {"driver": "file", "node-name": "n", "filename": str(tmp_path / "disk")}
    for part in given.split(","):
        name, _, value = part.partition("=")
        parts[name] = value
    text = ",".join(f"{name}={value}" for name, value in parts.items())
    theirs = subprocess.run(
        [require("qemu-storage-daemon"), "--blockdev", text],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        stdin=subprocess.DEVNULL,
    )
    ours = subprocess.run(
        [sys.executable, "-m", "bottomhalf.tools.bh_storage_daemon", "--blockdev", text],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        stdin=subprocess.DEVNULL,
    )
    assert ours.returncode == theirs.returncode == 1

    def said(stderr: str) -> str:
        return re.sub(r"^\S+: --blockdev \S+: ", "", stderr).strip()

    assert said(ours.stderr).startswith(said(theirs.stderr))


def test_dynamic_auto_read_only(tmp_path: Path) -> None:
    """Opened for reading; for writing too while a writer is there; the node itself is never read-only."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with bench(LinuxHost()) as it:
        node = opened(it, options(str(path), auto_read_only=True))

        def mode() -> int:
            return fcntl.fcntl(node.file.fileno(), fcntl.F_GETFL) & os.O_ACCMODE

        assert mode() == os.O_RDONLY and not node.read_only
        reader = it.user(node, held=PERM_CONSISTENT_READ)
        assert mode() == os.O_RDONLY
        writer = it.user(node)
        assert mode() == os.O_RDWR and writer.do(write(0, b"w" * 512)) == [0]
        with pytest.raises(BlockError):
            it.backend(node, held=PERM_WRITE, shared=PERM_ALL & ~PERM_WRITE)
        assert mode() == os.O_RDWR
        writer.backend.close()
        assert mode() == os.O_RDONLY
        reader.backend.close()
    assert path.read_bytes()[:512] == b"w" * 512
