# SPDX-License-Identifier: Apache-2.0
"""qcow2 images whose data are encrypted, by us and by QEMU."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from bottomhalf.block import BlockError, Node
from bottomhalf.drivers.qcow2.node import Qcow2Node
from bottomhalf.host.request import COMPRESSED, READ, Request
from tests.drivers.luks.test_node import PASSWORD, SECRET, Disks, batch_of, disks, qemu, run

pytest.importorskip("cryptography")
SIZE = 1 << 20
__all__ = ["disks"]


def options_of(path: Path, secret: str = "pw", **more: Any) -> dict[str, Any]:
    return {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(path)},
        "encrypt": {"format": "luks", "key-secret": secret},
        **more,
    }


def make(path: Path, **options: Any) -> None:
    bottomhalf.create(
        path, format="qcow2", size=SIZE, encrypt_format="luks", encrypt_secret=PASSWORD, encrypt_iter_time=1, **options
    )


def life(disks: Disks, node: Node, seed: int, steps: int = 80) -> bytearray:
    """Random requests of all kinds and sizes beside plain bytes."""
    source, model = random.Random(seed), bytearray(SIZE)
    for _ in range(steps):
        offset, length = source.randrange(SIZE - 140000), source.choice([1, 511, 512, 4096, 65536, 139999])
        if source.random() < 0.5:
            offset -= offset % 512
        what = source.choice(["write", "zero", "read", "list", "discard"])
        if what == "write":
            data = source.randbytes(length)
            disks.write(node, offset, data)
            model[offset : offset + length] = data
        elif what == "zero":
            disks.context.run(node.co_write_zeroes(offset, length), what="zero")
            model[offset : offset + length] = bytes(length)
        elif what == "discard":
            start, end = -(-offset // 65536) * 65536, (offset + length) // 65536 * 65536
            if start < end:
                disks.context.run(node.co_discard(start, end - start), what="discard")
                model[start:end] = bytes(end - start)
        else:
            batch_of(disks, node, source, model, what == "list")
        assert disks.read(node, offset, length) == model[offset : offset + length]
    return model


@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096}, {"extended_l2": True}, {"version": 2}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_random_life(disks: Disks, tmp_path: Path, seed: int, options: dict[str, Any]) -> None:
    path, plain = tmp_path / "a", tmp_path / "plain"
    make(path, **options)
    node = disks.open(options_of(path, discard="unmap"))
    model = life(disks, node, seed)
    assert disks.read(node, 0, SIZE) == model
    disks.graph.release(node)
    again = disks.open(options_of(path, **{"read-only": True}))
    assert disks.read(again, 0, SIZE) == model
    disks.graph.release(again)
    assert not bottomhalf.check(path).corruptions
    if not seed:
        compare_with_qemu(path, plain, bytes(model))


def test_nobody_reads_past_the_cipher(disks: Disks, tmp_path: Path) -> None:
    """The ways by which readers find bytes without a request lead nowhere; nothing is stored compressed."""
    path = tmp_path / "a"
    make(path)
    node = disks.open(options_of(path))
    for _ in range(2):
        disks.write(node, 0, b"p" * SIZE)
        assert disks.read(node, 0, SIZE) == b"p" * SIZE
    assert b"p" * 16 not in path.read_bytes()
    request = Request(READ, 0, 4096, memoryview(bytearray(4096)))
    assert node.pread_nowait(4096, 0) is None
    assert node.file_range(0, 4 * 65536) is None
    assert node.map_reads([], []) is None and node.map_reads([request], [0]) is None
    assert not node.can_compress
    with pytest.raises(OSError) as caught:
        disks.context.run(node.co_pwrite(0, memoryview(b"c" * 65536), COMPRESSED))
    assert caught.value.errno == errno.ENOTSUP
    assert disks.read(node, 0, SIZE) == b"p" * SIZE
    disks.graph.release(node)


@qemu
def test_snapshots(disks: Disks, tmp_path: Path) -> None:
    """A snapshot reads as it did, also to QEMU; the state of a machine is encrypted, too."""
    path, plain = tmp_path / "a", tmp_path / "plain"
    make(path)
    node = disks.open(options_of(path))
    assert isinstance(node, Qcow2Node)
    disks.write(node, 1000, b"before" * 5000)
    disks.context.run(node.co_save_vmstate(100, memoryview(b"machine" * 50)), what="save")
    made = disks.context.run(node.snapshots.create("s", date_ns=0, vm_state_bytes=450), what="create")
    disks.write(node, 1000, b"after!" * 5000)
    disks.context.run(node.snapshots.apply(made), what="apply")
    state = bytearray(350)
    disks.context.run(node.co_load_vmstate(100, memoryview(state)), what="load")
    assert bytes(state) == b"machine" * 50
    disks.graph.release(node)
    assert b"machine" not in path.read_bytes()
    model = bytearray(SIZE)
    model[1000:31000] = b"before" * 5000
    compare_with_qemu(path, plain, bytes(model))


@qemu
def compare_with_qemu(path: Path, plain: Path, model: bytes) -> None:
    plain.write_bytes(model)
    image = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=pw,file.filename={path}"
    run("qemu-img", "check", "--object", SECRET, "--image-opts", image)
    run("qemu-img", "compare", "--object", SECRET, "--image-opts", image, f"driver=raw,file.filename={plain}")


@qemu
def test_qemu_made_it(disks: Disks, tmp_path: Path) -> None:
    path, base, plain = tmp_path / "a", tmp_path / "base", tmp_path / "plain"
    base.write_bytes(b"b" * SIZE)
    run("qemu-img", "create", "-q", "-f", "qcow2", "--object", SECRET, "-b", str(base), "-F", "raw",
        "-o", "encrypt.format=luks,encrypt.key-secret=pw,encrypt.iter-time=10", str(path))  # fmt: skip
    image = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=pw,file.filename={path}"
    run("qemu-io", "--object", SECRET, "--image-opts", image, "-c", "write -P 0x5a 70k 64k")
    node = disks.open(options_of(path))
    model = bytearray(b"b" * SIZE)
    model[70 << 10 : 134 << 10] = b"\x5a" * 65536
    assert disks.read(node, 0, SIZE) == model
    for offset, data in ((100, b"x" * 333), (70000, b"y" * 9000), (900_000, b"z" * 512)):
        disks.write(node, offset, data)
        model[offset : offset + len(data)] = data
    assert disks.read(node, 0, SIZE) == model
    disks.graph.release(node)
    compare_with_qemu(path, plain, bytes(model))


def test_keys_and_formats_that_do_not_fit(disks: Disks, tmp_path: Path) -> None:
    path, clear = tmp_path / "a", tmp_path / "clear"
    make(path)
    bottomhalf.create(clear, format="qcow2", size=SIZE)
    assert bottomhalf.info(path).virtual_size == SIZE  # needs no key
    bare = options_of(path)
    del bare["encrypt"]
    wrong_kind = {**options_of(path), "encrypt": {"format": "aes", "key-secret": "pw"}}
    for options, text in (
        (bare, "Parameter 'encrypt.key-secret' is required for cipher"),
        (options_of(path, "bad"), "Invalid password, cannot unlock any keyslot"),
        (wrong_kind, "Header reported 'luks' encryption format but options specify 'aes'"),
        (options_of(clear), "No encryption in image header, but options specified format 'luks'"),
    ):
        with pytest.raises(BlockError, match=text):
            disks.open(options)
    assert not disks.graph.nodes


def test_what_the_library_makes_of_bad_options(tmp_path: Path) -> None:
    for options, text in (
        ({"encrypt_format": "des"}, "encrypt_format is"),
        ({"encrypt_format": "aes"}, "needs encrypt_secret"),
        ({"encrypt_format": "aes", "encrypt_secret": "x", "encrypt_hash_alg": "sha1"}, "no option 'encrypt_hash_alg'"),
        ({"encrypt_format": "luks"}, "needs encrypt_secret"),
        ({"encrypt_format": "luks", "encrypt_secret": "x", "encrypt_colour": 1}, "no option 'encrypt_colour'"),
        ({"encrypt_secret": "x"}, "no option 'encrypt_secret'"),
    ):
        with pytest.raises(ValueError, match=text):
            bottomhalf.create(tmp_path / "a", format="qcow2", size=SIZE, **options)
    bottomhalf.create(tmp_path / "b", format="luks", size=SIZE, secret="x", iter_time=1)
    assert (tmp_path / "b").read_bytes()[:6] == b"LUKS\xba\xbe"


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"refcount_bits": 3}, "Refcount width must be a power of two"),
        ({"compat": "0.10", "lazy_refcounts": True}, "Lazy refcounts only supported"),
        ({"size": 1 << 60}, "the L1 table would be larger"),
    ],
)
def test_passwords_stay_where_something_else_is_refused(tmp_path: Path, wanted: dict[str, Any], text: str) -> None:
    path = tmp_path / "a"
    make(path)
    before = path.read_bytes()
    more = {"encrypt_state": "active", "encrypt_new_secret": "new", "encrypt_iter_time": 1}
    with pytest.raises((BlockError, OSError), match=text):
        bottomhalf.amend(path, secret=PASSWORD, follow_names=True, **more, **wanted)
    assert path.read_bytes() == before


@pytest.mark.parametrize("format", ["luks", "aes"])
def test_zeroes_of_a_snapshot_stay_zeroes_in_version_2(tmp_path: Path, format: str) -> None:
    """Above a backing file they are written then, and encrypted like all else."""
    path, base = tmp_path / "a", tmp_path / "base"
    size = 40 * SIZE  # more than one table of clusters of 4096 bytes
    base.write_bytes(b"b" * size)
    more: dict[str, Any] = {"encrypt_iter_time": 1} if format == "luks" else {}
    bottomhalf.create(
        path, format="qcow2", size=size, cluster_size=4096, encrypt_format=format, encrypt_secret=PASSWORD,
        backing_file=str(base), backing_fmt="raw", **more,
    )  # fmt: skip
    at = 33 * SIZE
    with bottomhalf.open(path, backing_files=True, secret=PASSWORD) as disk:
        disk.write_zeroes(at, 65536, unmap=True)
    bottomhalf.snapshot_create(path, "s", secret=PASSWORD)
    with bottomhalf.open(path, backing_files=True, secret=PASSWORD) as disk:
        disk.pwrite(b"n" * 65536, at)
    bottomhalf.amend(path, compat="0.10", secret=PASSWORD)
    assert bottomhalf.info(path).header.version == 2
    with bottomhalf.open(path, backing_files=True, secret=PASSWORD) as disk:
        assert disk.pread(65536, at) == b"n" * 65536
    bottomhalf.snapshot_apply(path, "s", secret=PASSWORD)
    with bottomhalf.open(path, backing_files=True, secret=PASSWORD) as disk:
        assert disk.pread(65536, at) == bytes(65536)
        assert disk.pread(4096, at + 65536) == b"b" * 4096
    assert not bottomhalf.check(path).corruptions
