# SPDX-License-Identifier: Apache-2.0
"""What the library does to image files is all of what was asked for, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from bottomhalf.block import BlockError

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image with content, in the current directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.qcow2"
    bottomhalf.create(path, format="qcow2", size=MIB)
    with bottomhalf.open(path) as disk:
        disk.pwrite(b"x" * 4096, 0)
    return path


# -- new images


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"backing_file": "a.qcow2", "backing_fmt": "qcow2"}, "the same filename as the backing file"),
        ({"backing_file": "./link", "backing_fmt": "qcow2"}, "the same filename as the backing file"),
        ({"data_file": "a.qcow2"}, "The image itself cannot be its data file"),
        ({"data_file": "link"}, "The image itself cannot be its data file"),
        ({"data_file": "nowhere/x"}, "Could not create 'nowhere/x': No such file or directory"),
        ({"data_file": "b.raw", "backing_file": "b.raw", "backing_fmt": "raw"}, "cannot be the data file"),
    ],
)
def test_what_a_new_image_would_destroy(image: Path, given: dict[str, Any], text: str) -> None:
    Path("link").symlink_to(image)
    Path("b.raw").write_bytes(b"b" * MIB)
    before = image.read_bytes()
    with pytest.raises(BlockError, match=text):
        bottomhalf.create(image, format="qcow2", size=MIB, **given)
    assert image.read_bytes() == before
    assert Path("b.raw").read_bytes() == b"b" * MIB


def test_a_backing_file_lies_beside_the_image(image: Path) -> None:
    """So one of the same name elsewhere is another one."""
    Path("sub").mkdir()
    bottomhalf.create("sub/a.qcow2", format="qcow2", size=MIB, backing_file="../a.qcow2", backing_fmt="qcow2")
    with pytest.raises(BlockError, match="the same filename as the backing file"):
        bottomhalf.create("sub/a.qcow2", format="qcow2", size=MIB, backing_file="a.qcow2", backing_fmt="qcow2")
    with bottomhalf.open("sub/a.qcow2", backing_files=True) as disk:
        assert disk.pread(4096, 0) == b"x" * 4096


def test_a_name_that_no_file_has(tmp_path: Path) -> None:
    """It is no reason not to make the image, for which nobody opens its backing file."""
    for path in (tmp_path / "a", tmp_path / "a"):
        bottomhalf.create(path, format="qcow2", size=MIB, backing_file="a\0b", backing_fmt="raw")
        assert bottomhalf.info(path).backing_file == "a\0b"


def test_a_file_in_use_keeps_the_other_one(image: Path) -> None:
    """Neither the image nor its data file loses anything before both are ours."""
    data = Path("data.raw")
    data.write_bytes(b"d" * MIB)
    before = image.read_bytes()
    for busy in (image, data):
        with bottomhalf.open({"driver": "file", "filename": str(busy)}):
            with pytest.raises(BlockError):
                bottomhalf.create(image, format="qcow2", size=MIB, data_file=data)
            assert image.read_bytes() == before and data.read_bytes() == b"d" * MIB
    bottomhalf.create(image, format="qcow2", size=2 * MIB, data_file=data)
    assert data.read_bytes() == bytes(2 * MIB)


# -- snapshots


def test_a_snapshot_is_deleted_by_its_name_rather_than_its_id(image: Path) -> None:
    """As qemu-img does; what is applied is looked for by id first, as QEMU does that."""
    for name in "21":
        with bottomhalf.open(image) as disk:
            disk.pwrite(name.encode() * 4096, 0)
        bottomhalf.snapshot_create(image, name)
    bottomhalf.snapshot_apply(image, "1")
    with bottomhalf.open(image) as disk:
        assert disk.pread(4096, 0) == b"2" * 4096
    bottomhalf.snapshot_delete(image, "1")
    assert [(each.id, each.name) for each in bottomhalf.snapshots(image)] == [("1", "2")]
    bottomhalf.snapshot_delete(image, "1")
    assert not bottomhalf.snapshots(image)


# -- amended images


def test_a_name_that_does_not_fit_leaves_the_counters(tmp_path: Path) -> None:
    path = tmp_path / "a"
    bottomhalf.create(path, format="qcow2", size=MIB, cluster_size=512, data_file=tmp_path / "d", refcount_bits=16)
    before = path.read_bytes()
    with pytest.raises(BlockError, match="does not fit into 512 bytes"):
        bottomhalf.amend(path, data_file="x" * 400, refcount_bits=64, follow_names=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("given", [{"keyslot": 0}, {"old_secret": "one"}, {"keyslot": 1, "old_secret": "two"}], ids=str)
def test_only_who_knows_a_password_takes_one_away(tmp_path: Path, given: dict[str, Any]) -> None:
    pytest.importorskip("cryptography")
    path = tmp_path / "a"
    bottomhalf.create(path, format="luks", size=MIB, secret="one", iter_time=1)
    bottomhalf.amend(path, secret="one", state="active", new_secret="two", iter_time=1)
    before = path.read_bytes()
    for secret in ("three", ""):
        for force in (False, True):
            with pytest.raises(BlockError, match=r"^Invalid password, cannot unlock any keyslot$"):
                bottomhalf.amend(path, secret=secret, force=force, state="inactive", **given)
    assert path.read_bytes() == before
    bottomhalf.amend(path, secret=b"two", state="inactive", **given)
    assert path.read_bytes() != before


def test_the_image_is_not_its_own_data_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    bottomhalf.create(path, format="qcow2", size=MIB, data_file=tmp_path / "d")
    with pytest.raises(BlockError, match="The image itself cannot be its data file"):
        bottomhalf.amend(path, data_file=path, follow_names=True)
    bottomhalf.amend(path, data_file=tmp_path / "e", follow_names=True)
    assert bottomhalf.info(path).header.data_file == str(tmp_path / "e")


# -- values


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lazy_refcounts": "off"}, "lazy_refcounts is True or False, not 'off'"),
        ({"lazy_refcounts": 1}, "lazy_refcounts is True or False, not 1"),
        ({"data_file_raw": 0}, "data_file_raw is True or False, not 0"),
        ({"refcount_bits": True}, "refcount_bits is a number, not True"),
        ({"refcount_bits": "8"}, "refcount_bits is a number, not '8'"),
        ({"size": 1024.0}, "size is a number, not 1024.0"),
        ({"data_file": b"x"}, "data_file is a text, not b'x'"),
        ({"compat": 1.1}, "compat is a text, not 1.1"),
        ({"force": "no"}, "force is True or False, not 'no'"),
        ({"what": 1}, "there is no option 'what', but backing_file, "),
    ],
)
def test_what_amend_does_not_take(image: Path, given: dict[str, Any], text: str) -> None:
    before = image.read_bytes()
    with pytest.raises(ValueError, match=text):
        bottomhalf.amend(image, **given)
    assert image.read_bytes() == before


def test_flags_are_true_or_false(image: Path) -> None:
    for call in (
        lambda: bottomhalf.resize(image, 4096, shrink="no"),  # type: ignore[arg-type]
        lambda: bottomhalf.rebase(image, None, unsafe="no"),  # type: ignore[arg-type]
        lambda: bottomhalf.bitmap_add(image, "b", enabled="off"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"is True or False, not '(no|off)'"):
            call()
    assert bottomhalf.info(image).virtual_size == MIB and not bottomhalf.bitmaps(image)


@pytest.mark.parametrize(
    ("given", "version"),
    [
        ({"compat": "0.10", "version": None}, 2),
        ({"compat": None, "version": 2}, 2),
        ({"compat": None, "version": None}, 3),
        ({"compat": "1.1", "version": "v3"}, 3),
    ],
)
def test_versions(image: Path, given: dict[str, Any], version: int) -> None:
    bottomhalf.create(image, format="qcow2", size=MIB, **given)
    assert bottomhalf.info(image).header.version == version


def test_two_versions(image: Path) -> None:
    before = image.read_bytes()
    with pytest.raises(ValueError, match=r"compat '0\.10' is not version 'v3'; give one of them"):
        bottomhalf.create(image, format="qcow2", size=MIB, compat="0.10", version="v3")
    assert image.read_bytes() == before


def test_a_backing_file_may_be_a_path(image: Path) -> None:
    base = image.parent / "base.raw"
    base.write_bytes(b"b" * MIB)
    bottomhalf.rebase(image, base, "raw", unsafe=True)
    assert bottomhalf.info(image).backing_file == str(base)
