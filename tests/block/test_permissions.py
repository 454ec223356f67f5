# SPDX-License-Identifier: Apache-2.0
"""Permissions between the users of a node, and image locks between programs: who conflicts, what the error says,
and that a refused change leaves everything as it was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.block import BlockBackend, BlockError, Graph, Node, permissions
from bottomhalf.drivers.null import NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED
from bottomhalf.host.sim import SimHost
from tests.block.bench import READ_WRITE, Bench, bench, sim_bench

NO_WRITERS = PERM_ALL & ~PERM_WRITE


def locks(it: Bench, path: str) -> list[tuple[int, int]]:
    """(held, shared) of the openers of a simulated file that hold or forbid anything."""
    openers = it.host.disk.files[path].locks.openers
    return sorted((o.held, o.shared) for o in openers if (o.held, o.shared) != (0, PERM_ALL))


class TestBetweenUsers:
    def test_conflict_of_two_backends(self) -> None:
        with sim_bench(0) as it:
            node = NullCoNode(it.graph, "disk")
            it.backend(node, shared=NO_WRITERS, name="drive0")
            expected = (
                "Permission conflict on node 'disk': permissions 'write' are both required by an unnamed block device "
                "(uses node 'disk' as 'root' child) and unshared by block device 'drive0' "
                "(uses node 'disk' as 'root' child)."
            )
            with pytest.raises(BlockError, match=f"^{re.escape(expected)}$"):
                it.backend(node, held=READ_WRITE)
            assert len(node.parents) == 1 and len(it.graph.backends) == 1
            it.backend(node, held=PERM_CONSISTENT_READ)

    def test_conflict_below_a_filter_names_the_nodes(self) -> None:
        with sim_bench(0) as it:
            node = NullCoNode(it.graph, "disk")
            upper = RawNode(it.graph, "fmt", file=node)
            it.backend(node, held=PERM_CONSISTENT_READ, shared=PERM_CONSISTENT_READ)
            expected = (
                "Permission conflict on node 'disk': permissions 'write, resize' are both required by node 'fmt' "
                "(uses node 'disk' as 'file' child) and unshared by an unnamed block device "
                "(uses node 'disk' as 'root' child)."
            )
            with pytest.raises(BlockError, match=f"^{re.escape(expected)}$"):
                it.backend(upper, held=READ_WRITE | PERM_RESIZE)
            assert (upper.children[0].held, upper.children[0].shared) == (0, PERM_ALL)
            assert upper.permissions == (0, PERM_ALL) and not upper.parents
            assert node.permissions == (PERM_CONSISTENT_READ, PERM_CONSISTENT_READ)

    def test_a_user_who_goes_away_makes_room(self) -> None:
        with sim_bench(0) as it:
            node = NullCoNode(it.graph, "disk")
            node.monitor_owned = True
            upper = RawNode(it.graph, "fmt", file=node)
            upper.monitor_owned = True
            first = it.backend(upper, shared=NO_WRITERS)
            with pytest.raises(BlockError, match="Permission conflict"):
                it.backend(node)
            first.close()
            assert upper.permissions == node.permissions == (0, PERM_ALL)
            second = it.backend(node)
            second.close()
            assert node.permissions == (0, PERM_ALL)
            for name in ("fmt", "disk"):
                it.graph.delete(name)

    @pytest.mark.parametrize("held", [PERM_WRITE, PERM_WRITE_UNCHANGED])
    def test_read_only(self, held: int) -> None:
        with sim_bench(0) as it:
            node = NullCoNode(it.graph, "disk", read_only=True)
            for each in (node, RawNode(it.graph, file=node)):
                with pytest.raises(BlockError, match=r"^Block node is read-only$"):
                    it.backend(each, held=held)
            it.backend(node, held=PERM_CONSISTENT_READ)

    def test_the_same_node_twice_below(self) -> None:
        """Each node is asked after all of its parents, not once per way that leads to it."""

        class Both(Node):
            driver = "both"

            def __init__(self, graph: Graph, left: Node, right: Node) -> None:
                super().__init__(graph, "both")
                for name, child in (("left", left), ("right", right)):
                    self.attach(child, name)

            def child_permissions(self, edge: Any, held: int, shared: int) -> tuple[int, int]:
                if edge.name == "right":  # forbids to others what the left needs as long as nobody writes
                    return PERM_CONSISTENT_READ, PERM_ALL if held & PERM_WRITE else NO_WRITERS
                return held, shared

        calls: list[tuple[int, int]] = []

        class Leaf(NullCoNode):
            def apply_permissions(self, held: int, shared: int) -> None:
                calls.append((held, shared))

        with sim_bench(0) as it:
            leaf = Leaf(it.graph, "leaf")
            both = Both(it.graph, RawNode(it.graph, file=leaf), RawNode(it.graph, file=leaf))
            permissions.refresh(both)
            assert leaf.permissions == (PERM_CONSISTENT_READ, NO_WRITERS)
            calls.clear()
            backend = it.backend(both)
            assert leaf.permissions == (READ_WRITE, PERM_ALL)
            assert calls == [(READ_WRITE, NO_WRITERS), (READ_WRITE, PERM_ALL)]
            backend.close()


class TestLocks:
    def test_they_follow_the_users(self) -> None:
        with sim_bench(0, disk=4096) as it:
            file = it.file("disk", "disk")
            file.monitor_owned = True
            assert locks(it, "disk") == []
            reader = it.backend(file, held=PERM_CONSISTENT_READ)
            writer = it.backend(RawNode(it.graph, file=file), shared=PERM_ALL & ~PERM_RESIZE)
            assert locks(it, "disk") == [(READ_WRITE, PERM_ALL & ~PERM_RESIZE)]
            writer.close()
            assert locks(it, "disk") == [(PERM_CONSISTENT_READ, PERM_ALL)]
            reader.close()
            assert locks(it, "disk") == []

    def test_two_openers_in_one_program(self) -> None:
        with sim_bench(0, disk=4096) as it:
            one, two = it.file("disk", "one"), it.file("disk", "two")
            it.backend(one, shared=NO_WRITERS)
            before = locks(it, "disk")
            with pytest.raises(BlockError) as caught:
                it.backend(two)
            assert str(caught.value).split("\n") == [
                'Failed to get "write" lock',
                "Is another process using the image [disk]?",
                "The image is in use by this process (pid 1000).",
            ]
            assert locks(it, "disk") == before and not two.parents
            it.backend(two, held=PERM_CONSISTENT_READ)

    def test_another_program_is_named(self) -> None:
        with sim_bench(0, disk=4096) as it:
            other = it.host.other_process_lock("disk", READ_WRITE, NO_WRITERS, name="qemu-nbd", pid=77)
            with pytest.raises(BlockError, match=r'(?s)^Failed to get "write" lock\n.*in use by qemu-nbd \(pid 77\)'):
                it.backend(it.file("disk"))
            with pytest.raises(BlockError, match=r'^Failed to get shared "write" lock\n'):
                it.backend(it.file("disk"), held=PERM_CONSISTENT_READ, shared=NO_WRITERS)
            other.release()
            it.backend(it.file("disk"))

    def test_force_share_reads_beside_a_writer(self) -> None:
        with sim_bench(0, disk=4096) as it:
            it.host.other_process_lock("disk", READ_WRITE, PERM_CONSISTENT_READ)
            file = it.file("disk", read_only=True, force_share=True)
            it.backend(file, held=PERM_CONSISTENT_READ, shared=0)

    def test_a_refusal_of_one_child_gives_the_other_its_locks_back(self) -> None:
        class Mirrored(Node):
            driver = "mirrored"

            def __init__(self, graph: Graph, *children: Node) -> None:
                super().__init__(graph, "mirrored")
                for number, child in enumerate(children):
                    self.attach(child, f"children.{number}")

        host = SimHost(0)
        for name in ("a", "b", "c"):
            host.add_file(name, 4096)
        with bench(host) as it:
            mirrored = Mirrored(it.graph, it.file("a"), it.file("b"), it.file("c"))
            it.backend(mirrored, held=PERM_CONSISTENT_READ, shared=NO_WRITERS)
            before = {name: locks(it, name) for name in ("a", "b", "c")}
            assert before["a"] == [(PERM_CONSISTENT_READ, NO_WRITERS)]
            other = it.host.other_process_lock("b", PERM_CONSISTENT_READ, PERM_ALL & ~PERM_RESIZE)
            now = {name: locks(it, name) for name in ("a", "b", "c")}
            with pytest.raises(BlockError, match='Failed to get "resize" lock'):
                it.backend(mirrored, held=PERM_RESIZE, shared=PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED)
            assert {name: locks(it, name) for name in ("a", "b", "c")} == now
            assert [edge.held for edge in mirrored.children] == [PERM_CONSISTENT_READ] * 3
            other.release()


HOLDER = """
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for byte in sys.argv[2:]:
    fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, int(byte), 1, 0))  # F_OFD_SETLK
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another(path: Path, *lock_bytes: int) -> Iterator[int]:
    """A process that has shared locks on bytes of the file; its pid."""
    command = [sys.executable, "-c", HOLDER, str(path), *map(str, lock_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


def own_locks(file: Any) -> set[int]:
    """The bytes on which the file's descriptor has locks, as the kernel tells."""
    lines = Path(f"/proc/self/fdinfo/{file.fileno()}").read_text().splitlines()
    ranges = [line.split()[-2:] for line in lines if line.startswith("lock:")]
    return {byte for first, last in ranges for byte in range(int(first), int(last) + 1)}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


class TestRealLocks:
    """Bytes 100 + n: permission n is held; 200 + n: it is not shared."""

    def test_bytes(self, image: Path) -> None:
        with bench(LinuxHost()) as it:
            file = it.file(str(image), "disk")
            file.monitor_owned = True
            assert own_locks(file.file) == set()
            backend = it.backend(file, held=READ_WRITE, shared=PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED)
            assert own_locks(file.file) == {100, 101, 201, 203}
            backend.close()
            assert own_locks(file.file) == set()
            it.backend(file, held=PERM_CONSISTENT_READ)
            assert own_locks(file.file) == {100}

    def test_two_openers(self, image: Path) -> None:
        """Two readers may meet; a writer who shares no writing keeps a second one out."""
        with bench(LinuxHost()) as it:
            one, two = it.file(str(image)), it.file(str(image))
            it.backend(one, held=PERM_CONSISTENT_READ, shared=PERM_ALL)
            first = it.backend(two, held=READ_WRITE, shared=NO_WRITERS)
            with pytest.raises(BlockError, match=r'^Failed to get "write" lock\n'):
                it.backend(one)
            assert own_locks(one.file) == {100}
            first.close()
            it.backend(one)

    def test_a_refused_change_is_undone(self, image: Path) -> None:
        """The second opener wants to resize and shares only unchanging writes: refused, and no byte differs."""
        with bench(LinuxHost()) as it:
            one, two = it.file(str(image)), it.file(str(image))
            it.backend(one, held=READ_WRITE, shared=PERM_ALL & ~PERM_RESIZE)
            it.backend(two, held=PERM_CONSISTENT_READ, shared=PERM_ALL & ~PERM_WRITE_UNCHANGED)
            before = own_locks(one.file), own_locks(two.file)
            assert before == ({100, 101, 203}, {100, 202})
            with pytest.raises(BlockError, match=r'^Failed to get "resize" lock\n'):
                it.backend(two, held=PERM_RESIZE, shared=PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED)
            assert (own_locks(one.file), own_locks(two.file)) == before

    def test_a_process_that_we_did_not_write_as_a_writer(self, image: Path) -> None:
        with bench(LinuxHost()) as it:
            file = it.file(str(image))
            with held_by_another(image, 100, 101, 201, 203) as pid:
                name = os.path.basename(os.path.realpath(sys.executable))
                with pytest.raises(BlockError) as caught:
                    it.backend(file)
                lines = str(caught.value).split("\n")
                assert lines[:2] == ['Failed to get "write" lock', f"Is another process using the image [{image}]?"]
                assert f"(pid {pid})" in lines[2] and "python" in lines[2], (lines, name)
                assert own_locks(file.file) == set()
                it.backend(it.file(str(image), read_only=True), held=PERM_CONSISTENT_READ)
            it.backend(file)

    def test_a_process_that_does_not_share_reading(self, image: Path) -> None:
        with bench(LinuxHost()) as it, held_by_another(image, 200):
            file = it.file(str(image), read_only=True, force_share=True)
            with pytest.raises(BlockError, match=r'^Failed to get "consistent read" lock\n'):
                it.backend(file, held=PERM_CONSISTENT_READ)
            it.backend(it.file(str(image), locking="off"))

    def test_qemu_img_respects_our_locks(self, image: Path, require: Any) -> None:
        qemu_io = require("qemu-io")
        with bench(LinuxHost()) as it:
            it.backend(it.file(str(image)), shared=NO_WRITERS)
            command = [qemu_io, "-f", "raw", "-c", "read 0 512", str(image)]
            refused = subprocess.run(command, capture_output=True, text=True)
            assert refused.returncode == 1
            assert 'Failed to get "write" lock' in refused.stdout + refused.stderr
            assert subprocess.run([*command[:1], "-r", "-U", *command[1:]], capture_output=True).returncode == 0
        assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_failed_insert_leaves_nothing_behind() -> None:
    with sim_bench(0, disk=4096) as it:
        it.host.other_process_lock("disk", READ_WRITE, 0)
        file = it.file("disk", "file")
        raw = RawNode(it.graph, "raw", file=file)
        backend = BlockBackend(it.graph, held=READ_WRITE)
        with it.graph.drained(file):
            with pytest.raises(BlockError):
                backend.insert(raw)
            assert backend.root is None and backend.size == 0 and backend._quiesced == 0
        assert not raw.parents and raw.permissions == file.permissions == (0, PERM_ALL)
        backend.close()
