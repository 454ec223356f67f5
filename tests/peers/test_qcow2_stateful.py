# SPDX-License-Identifier: Apache-2.0
"""The same random operations by us on our image and by QEMU's tools on theirs; at the end both are compared by QEMU.

QEMU refuses to write compressed where something is allocated, so that is done where nothing ever was. What the
operations mean for plain bytes is said in ``tests/drivers/qcow2/machine.py``.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import event

import bottomhalf
from tests.drivers.qcow2.machine import Machine, settings
from tests.peers.programs import require

pytestmark = pytest.mark.hang_seconds(3600)  # a soak


def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def run(*command: str | Path) -> str:
    done = call(*command)
    assert not done.returncode, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


class Beside(Machine):
    """Two images in a folder of their own. QEMU's operations wait until one needs another tool."""

    disk: bottomhalf.Disk | None = None
    folder: Path | None = None
    images: ClassVar[tuple[str, str]] = ("ours", "theirs")

    def make(self, size: int, base: bytes) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qcow2-beside-"))
        self.waiting: list[str] = []
        self.touched: set[int] = set()
        (self.folder / "base.raw").write_bytes(base)
        for who in self.images:
            options = dict(self.shape)
            if "data_file" in options:
                options["data_file"] = str(self.folder / f"{who}.raw")
            if "backing_file" in options:
                options["backing_file"] = str(self.folder / "base.raw")
            if who == "ours":
                bottomhalf.create(self.folder / "ours", format="qcow2", size=size, **options)
            else:
                self._qemu_create(size, options)
        self._open()

    def _qemu_create(self, size: int, options: dict[str, Any]) -> None:
        assert self.folder is not None
        backing = options.pop("backing_file", None)
        kind = options.pop("backing_fmt", None)
        version = options.pop("version", 3)
        words = ["compat=0.10" if version == 2 else "compat=1.1"]
        words += [f"{name}={'on' if value is True else value}" for name, value in options.items()]
        more = ["-b", backing, "-F", kind] if backing else []
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(words), *more, self.folder / "theirs", str(size))

    def _open(self) -> None:
        file = {"driver": "file", "filename": str(self._path), "discard": "unmap"}
        self.disk = bottomhalf.open({"driver": "qcow2", "discard": "unmap", "file": file}, backing_files=True)

    @property
    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / "ours"

    def _close(self) -> None:
        if self.disk is not None:
            self.disk.close()
            self.disk = None

    def _catch_up(self) -> None:
        """Let QEMU do what waits."""
        if self.waiting:
            words = [word for each in self.waiting for word in ("-c", each)]
            self.waiting = []
            said = run("qemu-io", "-f", "qcow2", "-d", "unmap", *words, self._theirs)
            assert "failed" not in said, said

    @property
    def _theirs(self) -> Path:
        assert self.folder is not None
        return self.folder / "theirs"

    def can_squeeze(self, cluster: int) -> bool:
        return "preallocation" not in self.shape and cluster not in self.touched

    def carry_out(self, what: str, *arguments: Any) -> bool:
        if what in ("write", "zero", "squeeze"):
            start, count = arguments[:2]
            self.touched.update(range(start // self.cluster, -(-(start + count) // self.cluster)))
        done: bool = getattr(self, f"_{what}")(*arguments)
        return done

    def _write(self, offset: int, length: int, byte: int, fua: bool) -> bool:
        assert self.disk is not None
        self.disk.pwrite(bytes([byte]) * length, offset, fua=fua)
        self.waiting.append(f"write {'-f ' if fua else ''}-P {byte} {offset} {length}")
        return True

    def _squeeze(self, offset: int, length: int, byte: int) -> bool:
        self._close()
        file = {"driver": "file", "filename": str(self._path)}
        options = {"driver": "compress", "file": {"driver": "qcow2", "file": file}}
        with bottomhalf.open(options, backing_files=True) as disk:
            disk.pwrite(bytes([byte]) * length, offset)
        self._open()
        for start in range(offset, offset + length, self.cluster):
            count = min(self.cluster, offset + length - start)
            self.waiting.append(f"write -c -P {byte} {start} {count}")
        return True

    def _zero(self, offset: int, length: int, unmap: bool) -> bool:
        assert self.disk is not None
        self.disk.write_zeroes(offset, length, unmap=unmap)
        self.waiting.append(f"write -z {'-u ' if unmap else ''}{offset} {length}")
        return True

    def _discard(self, offset: int, length: int) -> bool:
        assert self.disk is not None
        self.disk.discard(offset, length)
        self.waiting.append(f"discard {offset} {length}")
        return True

    def _flush(self) -> bool:
        assert self.disk is not None
        self.disk.flush()
        self.waiting.append("flush")
        return True

    def _reopen(self) -> bool:
        self._close()
        self._open()
        return True

    def _snapshot(self, name: str) -> bool:
        return self._both("-c", name, lambda: bottomhalf.snapshot_create(self._path, name))

    def _apply(self, name: str) -> bool:
        return self._both("-a", name, lambda: bottomhalf.snapshot_apply(self._path, name))

    def _forget(self, name: str) -> bool:
        return self._both("-d", name, lambda: bottomhalf.snapshot_delete(self._path, name))

    def _both(self, what: str, name: str, ours: Any) -> bool:
        """Where counters are too narrow one may have room and the other not: compressed clusters are packed as they
        come. Then neither does it."""
        self._close()
        self._catch_up()
        kept = [path.read_bytes() for path in (self._path, self._theirs)]
        theirs = subprocess.run(["qemu-img", "snapshot", what, name, self._theirs], capture_output=True, check=False)
        done = not theirs.returncode
        try:
            ours()
        except OSError as error:
            assert "cannot be counted" in str(error)
            done = False
        if not done:
            assert self.shape.get("refcount_bits", 16) <= 2, theirs.stderr
            for path, content in zip((self._path, self._theirs), kept, strict=True):
                path.write_bytes(content)
        self._open()
        return done

    def _resize(self, size: int) -> bool:
        self._close()
        bottomhalf.resize(self._path, size, shrink=True, follow_names=True)
        self._open()
        self._catch_up()
        run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", self._theirs, str(size))
        return True

    def look(self) -> bytes:
        assert self.disk is not None
        return self.disk.pread(self.disk.size, 0)

    def teardown(self) -> None:
        if self.folder is None:
            return
        try:
            self._close()
            self._catch_up()
            run("qemu-img", "check", "-q", "-f", "qcow2", self._path)
            theirs = call("qemu-img", "check", "-q", "-f", "qcow2", self._theirs)
            if theirs.returncode == 2 and "OFLAG_COPIED data cluster" in theirs.stderr:
                # It happens with clusters of 512 bytes: QEMU packs compressed ones where data of the disk's own lie.
                event("QEMU has damaged its own image")
                return
            assert not theirs.returncode, theirs.stderr
            run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", self._path, self._theirs)
            found = bottomhalf.check(self._theirs)
            assert not found.corruptions and not found.leaks, found.findings
        finally:
            self._close()
            shutil.rmtree(self.folder)


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("qemu-img")
    require("qemu-io")


TestBeside = Beside.TestCase
TestBeside.settings = settings(12, 20)
