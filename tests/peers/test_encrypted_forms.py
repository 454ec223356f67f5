# SPDX-License-Identifier: Apache-2.0
"""Encrypted images in all their forms beside QEMU's tools: both methods, data files, preallocation, snapshots, sizes,
backing files, compressed clusters, and passwords that come and go."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bottomhalf
from bottomhalf.block import BlockError
from tests.peers.test_qcow2 import run, scribble

pytest.importorskip("cryptography")
Require = Callable[[str], str]
MIB = 1 << 20
SIZE = 4 * MIB
SECRETS = {"s": "correct horse battery", "n": "new", "bad": "bad"}
OBJECTS = [word for name, data in SECRETS.items() for word in ("--object", f"secret,id={name},data={data}")]
PASSWORD = SECRETS["s"]
LUKS = {"encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.iter-time": 1}
AES = {"encrypt.format": "aes", "encrypt.key-secret": "s"}
METHODS = {"luks": LUKS, "aes": AES}

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "version 2": {"compat": "0.10"},
    "clusters of 512": {"cluster_size": 512},
    "clusters of 2M": {"cluster_size": 2 * MIB},
    "extended": {"extended_l2": True},
    "data file": {"data_file": "data.raw"},
    "data file, extended": {"data_file": "data.raw", "extended_l2": True},
    "raw data file": {"data_file": "data.raw", "data_file_raw": True},
    "metadata": {"preallocation": "metadata"},
    "metadata, extended": {"preallocation": "metadata", "extended_l2": True},
    "falloc": {"preallocation": "falloc"},
    "full": {"preallocation": "full"},
    "full, data file": {"preallocation": "full", "data_file": "data.raw"},
    "backing file": {"backing_file": "base.raw", "backing_fmt": "raw"},
    "backing file, data file": {"backing_file": "base.raw", "backing_fmt": "raw", "data_file": "data.raw"},
    "backing file, preallocated": {
        "backing_file": "base.raw", "backing_fmt": "raw", "preallocation": "metadata", "extended_l2": True
    },
    "lazy": {"lazy_refcounts": True},
}  # fmt: skip


def words(options: dict[str, Any]) -> str:
    said = {True: "on", False: "off"}
    return ",".join(f"{name}={said[value] if isinstance(value, bool) else value}" for name, value in options.items())


def image(path: Path | str, secret: str = "s", driver: str = "qcow2") -> str:
    key = "encrypt.key-secret" if driver == "qcow2" else "key-secret"
    return f"driver={driver},file.filename={path},file.discard=unmap,discard=unmap,{key}={secret}"


def qemu_create(path: Path, method: str, form: dict[str, Any]) -> None:
    run("qemu-img", "create", "-q", *OBJECTS, "-f", "qcow2", "-o", words(METHODS[method] | form), path, str(SIZE))


def we_create(path: Path, method: str, form: dict[str, Any]) -> None:
    more = {"encrypt_iter_time": 1} if method == "luks" else {}
    bottomhalf.create(
        path, format="qcow2", size=SIZE, encrypt_format=method, encrypt_secret=PASSWORD, **more, **form
    )


def qemu_io(path: Path, *commands: str) -> None:
    run("qemu-io", *OBJECTS, "--image-opts", image(path), *(word for each in commands for word in ("-c", each)))


def content(path: Path, *more: str) -> bytes:
    """What QEMU reads."""
    raw = path.with_suffix(".content")
    run("qemu-img", "convert", *OBJECTS, "--image-opts", *more, "-O", "raw", image(path), raw)
    return raw.read_bytes()


def check(path: Path) -> None:
    run("qemu-img", "check", *OBJECTS, "--image-opts", image(path))
    found = bottomhalf.check(path)
    assert not found.corruptions and not found.leaks, found.findings


def _chosen() -> list[Any]:
    """Every form once by each maker in CI, most with the method that the maker is quicker with; all in a soak."""
    found = []
    for number, form in enumerate(FORMS):
        for maker in ("we", "QEMU"):
            for method in METHODS:
                quick = (method == "luks") == (maker == "we")
                often = quick != (number % 8 == 7)
                marks = [] if often else [pytest.mark.soak]
                found.append(pytest.param(maker, method, form, marks=marks, id=f"{maker}, {method}, {form}"))
    return found


@pytest.mark.parametrize("maker, method, form", _chosen())
def test_there_and_back(
    require: Require, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: str, method: str, form: str
) -> None:
    """Made by one, written by both in turn, and read by both identically; nothing is in the clear."""
    require("qemu-img")
    require("qemu-io")
    monkeypatch.chdir(tmp_path)
    path, chosen = Path("disk.qcow2"), FORMS[form]
    Path("base.raw").write_bytes(random.Random(1).randbytes(3 * MIB))
    (we_create if maker == "we" else qemu_create)(path, method, chosen)
    model = bytearray(content(path))
    preallocated = "preallocation" in chosen or "data_file_raw" in chosen
    if not preallocated or "extended_l2" in chosen:
        assert model == Path("base.raw").read_bytes().ljust(SIZE, b"\0") if "backing_file" in chosen else not any(model)
    zero = [] if "compat" in chosen else ["write -z 1M 200k"]
    qemu_io(path, "write -P 5 0 4k", "write -P 6 1M 300k", *zero, "write -P 7 3000k 512")
    model = bytearray(content(path))
    with bottomhalf.open(path, backing_files=True, secret=PASSWORD) as disk:
        assert disk.pread(SIZE, 0) == model
        scribble(disk, model, len(form), steps=40)
        assert disk.pread(SIZE, 0) == model
        disk.pwrite(b"in the clear" * 5000, 2 * MIB + 100)
        model[2 * MIB + 100 : 2 * MIB + 60100] = b"in the clear" * 5000
    check(path)
    assert content(path) == model
    assert not any(b"in the clear" in each.read_bytes() for each in (path, Path("data.raw")) if each.exists())
    qemu_io(path, "write -P 5 2200k 100k", "write -P 8 700k 5k")
    model = bytearray(content(path))
    with bottomhalf.open(path, backing_files=True, secret=PASSWORD, read_only=True) as disk:
        assert disk.pread(SIZE, 0) == model


@pytest.mark.parametrize("method", METHODS)
def test_snapshots(require: Require, tmp_path: Path, method: str) -> None:
    """Ours read by QEMU and the other way round, while both go on writing."""
    require("qemu-img")
    require("qemu-io")
    path = tmp_path / "disk.qcow2"
    kept: dict[str, bytes] = {}
    we_create(path, method, {"cluster_size": 4096})
    model, chance = bytearray(SIZE), random.Random(2)
    for name in "abcd":
        with bottomhalf.open(path, secret=PASSWORD) as disk:
            scribble(disk, model, chance.randrange(1000), steps=15)
        qemu_io(path, f"write -P {ord(name)} {chance.randrange(3000)}k 300k")
        kept[name] = content(path)
        model = bytearray(kept[name])
        if name in "ac":
            bottomhalf.snapshot_create(path, name, secret=PASSWORD)
        else:
            run("qemu-img", "snapshot", *OBJECTS, "--image-opts", "-c", name, image(path))
    for name, expected in kept.items():
        assert content(path, "-l", name) == expected
    check(path)
    bottomhalf.snapshot_delete(path, "b", secret=PASSWORD)
    bottomhalf.snapshot_apply(path, "a", secret=PASSWORD)
    check(path)
    assert content(path) == kept["a"]
    run("qemu-img", "snapshot", *OBJECTS, "--image-opts", "-a", "d", image(path))
    with bottomhalf.open(path, secret=PASSWORD, read_only=True) as disk:
        assert disk.pread(SIZE, 0) == kept["d"]


@pytest.mark.parametrize("form", ["plain", "extended", "data file", "raw data file", "backing file"])
@pytest.mark.parametrize("method", METHODS)
def test_sizes(
    require: Require, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, form: str
) -> None:
    """Smaller, and larger again, with and without space that is taken at once."""
    require("qemu-img")
    monkeypatch.chdir(tmp_path)
    path = Path("disk.qcow2")
    Path("base.raw").write_bytes(b"b" * 3 * MIB)
    we_create(path, method, FORMS[form])
    with bottomhalf.open(path, backing_files=True, secret=PASSWORD) as disk:
        disk.pwrite(b"w" * SIZE, 0)
    bottomhalf.resize(path, MIB + 1536, shrink=True, follow_names=True, secret=PASSWORD)
    bottomhalf.resize(path, 2 * MIB, follow_names=True, secret=PASSWORD)
    check(path)
    expected = b"w" * (MIB + 1536) + bytes(MIB - 1536)
    if form == "raw data file":  # where the new clusters have their places at once, what is there reads as noise
        assert content(path)[: MIB + 1536] == expected[: MIB + 1536]
    else:
        assert content(path) == expected
    bottomhalf.resize(path, 3 * MIB, preallocation="falloc", follow_names=True, secret=PASSWORD)
    check(path)
    seen = content(path)
    with bottomhalf.open(path, backing_files=True, secret=PASSWORD) as disk:
        assert disk.pread(disk.size, 0) == seen
    run("qemu-img", "resize", "-q", *OBJECTS, "--image-opts", image(path), str(4 * MIB))
    with bottomhalf.open(path, backing_files=True, secret=PASSWORD) as disk:
        assert disk.pread(disk.size, 0)[: 3 * MIB] == seen


@pytest.mark.parametrize("method", METHODS)
def test_compressed_clusters(require: Require, tmp_path: Path, method: str) -> None:
    """qemu-io makes them, in the clear, and everybody reads that. We do not make them; qemu-img does not either."""
    require("qemu-img")
    require("qemu-io")
    path = tmp_path / "disk.qcow2"
    qemu_create(path, method, {})
    qemu_io(path, "write -c -P 70 1M 128k")
    model = bytearray(SIZE)
    model[MIB : MIB + 131072] = b"F" * 131072
    with bottomhalf.open(path, secret=PASSWORD) as disk:
        assert disk.pread(SIZE, 0) == model
        disk.pwrite(b"part", MIB + 1000)
        model[MIB + 1000 : MIB + 1004] = b"part"
        assert disk.pread(SIZE, 0) == model
    check(path)
    assert content(path) == model
    given = words(METHODS[method])
    done = subprocess.run(
        ["qemu-img", "convert", *OBJECTS, "-c", "-O", "qcow2", "-o", given, path.with_suffix(".content"), "x.qcow2"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.stderr == "qemu-img: Compression and encryption not supported at the same time\n"
    options = {"driver": "qcow2", "encrypt": {"format": method, "key-secret": "secret"},
               "file": {"driver": "file", "filename": str(path)}}  # fmt: skip
    with pytest.raises(BlockError, match="Compression is not supported for underlying format: qcow2"):
        bottomhalf.open({"driver": "compress", "file": options}, secret=PASSWORD)


@pytest.mark.parametrize("password", ["", "x", "sixteen bytes...", "more than sixteen bytes", "ü" * 9])
def test_passwords_of_the_old_method(require: Require, tmp_path: Path, password: str) -> None:
    """Sixteen bytes count."""
    require("qemu-img")
    require("qemu-io")
    path = tmp_path / "disk.qcow2"
    secret = ["--object", f"secret,id=s,data={password}"]
    run("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", words(AES), path, str(SIZE))
    run("qemu-io", *secret, "--image-opts", "-c", "write -P 9 1000k 100k", image(path))
    with bottomhalf.open(path, secret=password) as disk:
        assert disk.pread(102400, 1000 << 10) == b"\t" * 102400
        disk.pwrite(b"ours", 1000 << 10)
    run("qemu-io", *secret, "--image-opts", "-c", "read -P 0x6f 1024000 1", "-c", "read -P 9 1024004 1k", image(path))


# -- passwords that come and go


FULL: list[tuple[str, dict[str, Any]]] = [
    *[("s", {"state": "active", "new-secret": "n", "iter-time": 1})] * 8,
    ("s", {"force": True, "state": "active", "new-secret": "n", "iter-time": 1, "keyslot": 1}),
]  # QEMU takes a second for each
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("s", {"format": "luks", "state": "active", "new-secret": "n"}),
    ("s", {"state": "active", "new-secret": "n", "iter-time": 1}),
    ("s", {"state": "active", "new-secret": "n", "iter-time": 1, "keyslot": 1}),
    ("s", {"state": "active", "new-secret": "n", "keyslot": 8}),
    ("s", {"state": "active", "new-secret": "n", "iter-time": 1, "keyslot": 5}),
    ("s", {"state": "active"}),
    ("s", {"state": "what"}),
    ("s", {"new-secret": "n"}),
    ("s", {"state": "inactive"}),
    ("s", {"state": "inactive", "keyslot": 7}),
    ("s", {"state": "inactive", "keyslot": 9}),
    ("s", {"state": "inactive", "new-secret": "n"}),
    ("s", {"state": "inactive", "iter-time": 3, "keyslot": 5}),
    ("s", {"state": "inactive", "old-secret": "bad"}),
    ("s", {"state": "inactive", "old-secret": "s", "keyslot": 5}),
    ("s", {"state": "inactive", "keyslot": 5}),
    ("n", {"state": "inactive", "old-secret": "n"}),
    ("s", {"state": "inactive", "old-secret": "s"}),
    ("s", {"state": "inactive", "keyslot": 0}),
    ("s", {"state": "active", "old-secret": "s", "new-secret": "n"}),
    ("bad", {"state": "active", "new-secret": "n"}),
    *FULL,
    ("s", {"cipher-alg": "aes-128"}),
    ("s", {"hash-alg": "sha1"}),
    ("n", {"state": "inactive", "old-secret": "n"}),
    ("s", {"force": True, "state": "inactive", "old-secret": "s"}),
    ("s", {"state": "active", "new-secret": "n"}),
]


def qemu_amend(path: Path, driver: str, secret: str, change: dict[str, Any]) -> str:
    prefix = "encrypt." if driver == "qcow2" else ""
    given = {prefix + name: value for name, value in change.items() if name != "force"}
    force = ["--force"] if change.get("force") else []
    done = subprocess.run(
        ["qemu-img", "amend", *OBJECTS, *force, "--image-opts", image(path, secret, driver), "-o", words(given)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stderr.strip("\n").removeprefix("qemu-img: ") if done.returncode else ""


def our_amend(path: Path, driver: str, secret: str, change: dict[str, Any]) -> str:
    prefix = "encrypt_" if driver == "qcow2" else ""
    given: dict[str, Any] = {
        prefix + name.replace("-", "_"): SECRETS[value] if name.endswith("secret") else value
        for name, value in change.items()
        if name != "force"
    }
    try:
        bottomhalf.amend(path, secret=SECRETS[secret], force=change.get("force", False), **given)
    except BlockError as error:
        return str(error)
    return ""


def slots(path: Path, driver: str) -> list[str]:
    said = run("qemu-img", "info", path) if driver == "qcow2" else run("qemu-img", "info", "-f", "luks", path)
    return [line.strip() for line in said.splitlines() if "active:" in line]


@pytest.mark.parametrize("driver, full", [
    ("qcow2", False),
    pytest.param("qcow2", True, marks=pytest.mark.soak),
    pytest.param("luks", True, marks=pytest.mark.soak),
])  # fmt: skip
def test_passwords_come_and_go(require: Require, tmp_path: Path, driver: str, full: bool) -> None:
    """A long story told twice: the same words, the same slots, and each reads what the other has made of the header."""
    require("qemu-img")
    require("qemu-io")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    given = words({name.removeprefix("encrypt." if driver == "luks" else ""): value for name, value in LUKS.items()})
    given = given.removeprefix("format=luks,")
    for path in (ours, theirs):
        run("qemu-img", "create", "-q", *OBJECTS, "-f", driver, "-o", given, path, str(MIB))
        run("qemu-io", *OBJECTS, "--image-opts", "-c", "write -P 7 0 64k", image(path, driver=driver))
    story = [each for each in CHANGES if full or each not in FULL]
    for secret, change in story if driver == "qcow2" else story[1:]:
        said = qemu_amend(theirs, driver, secret, change)
        assert our_amend(ours, driver, secret, change) == said.replace(f"'{image(theirs, secret, driver)}': ", (
            "")).replace("Could not open ", ""), change  # fmt: skip
        if said:
            continue  # neither has changed anything: see the next one that does
        assert slots(ours, driver) == slots(theirs, driver), change
        for each in ("s", "n"):
            opens = [_opens(path, driver, each) for path in (ours, theirs)]
            assert opens[0] == opens[1], change
            try:
                with bottomhalf.open(ours, read_only=True, secret=SECRETS[each]) as disk:
                    assert disk.pread(65536, 0) == b"\7" * 65536
                assert opens[0]
            except BlockError:
                assert not opens[0], change


def _opens(path: Path, driver: str, secret: str) -> bool:
    command = ["qemu-io", *OBJECTS, "-r", "--image-opts", "-c", "read -P 7 0 64k", image(path, secret, driver)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_amends_that_have_nothing_to_amend(require: Require, tmp_path: Path) -> None:
    require("qemu-img")
    path, change = tmp_path / "disk.qcow2", {"state": "active", "new-secret": "n"}
    qemu_create(path, "aes", {})
    assert our_amend(path, "qcow2", "s", change) == qemu_amend(path, "qcow2", "s", change)
    bottomhalf.create(path, format="qcow2", size=MIB)
    done = subprocess.run(["qemu-img", "amend", *OBJECTS, "-o", "encrypt.state=active,encrypt.new-secret=n", path],
                          capture_output=True, text=True, check=False)  # fmt: skip
    with pytest.raises(BlockError) as failed:
        bottomhalf.amend(path, encrypt_state="active", encrypt_new_secret="n")
    assert done.stderr == f"qemu-img: {failed.value}\n"


ERRORS: list[tuple[str, str]] = [
    ("luks", "driver=qcow2,file.filename=PATH"),
    ("luks", "driver=qcow2,file.filename=PATH,encrypt.format=luks"),
    ("luks", "driver=qcow2,file.filename=PATH,encrypt.key-secret=bad"),
    ("luks", "driver=qcow2,file.filename=PATH,encrypt.format=aes,encrypt.key-secret=s"),
    ("luks", "driver=qcow2,file.filename=PATH,encrypt.format=luks,encrypt.key-secret=nosuch"),
    ("aes", "driver=qcow2,file.filename=PATH"),
    ("aes", "driver=qcow2,file.filename=PATH,encrypt.format=aes"),
    ("aes", "driver=qcow2,file.filename=PATH,encrypt.format=luks,encrypt.key-secret=s"),
    ("none", "driver=qcow2,file.filename=PATH,encrypt.format=luks,encrypt.key-secret=s"),
    ("none", "driver=qcow2,file.filename=PATH,encrypt.format=aes,encrypt.key-secret=s"),
    ("none", "driver=luks,file.filename=PATH,key-secret=s"),
    ("none", "driver=luks,file.filename=PATH"),
    ("none", "driver=luks,file.filename=PATH,key-secret=nosuch"),
]


@pytest.mark.parametrize("method, given", ERRORS)
def test_what_cannot_be_opened(require: Require, tmp_path: Path, method: str, given: str) -> None:
    """In the same words, by our daemon and by QEMU's."""
    daemon, path = require("qemu-storage-daemon"), tmp_path / "disk.qcow2"
    bottomhalf.create(path, format="qcow2", size=MIB) if method == "none" else we_create(path, method, {})
    given = given.replace("PATH", str(path)).replace("file.filename", "node-name=n,file.driver=file,file.filename")
    if "encrypt.key-secret" in given and "encrypt.format" not in given:
        given += f",encrypt.format={method}"
    said = []
    for program in (daemon, str(Path(daemon_of_ours()))):
        done = subprocess.run([program, *OBJECTS, "--blockdev", given], capture_output=True, text=True, timeout=60,
                              check=False)  # fmt: skip
        assert done.returncode == 1
        said.append(done.stderr.split(": ", 1)[1])
    assert said[0] == said[1]


def _number(value: int) -> bytes:
    return value.to_bytes(4, "big")


SLOT, NEXT_SLOT = 208, 256
DAMAGE: dict[str, tuple[int, bytes]] = {
    "magic": (0, b"LUKX"),
    "version": (6, b"\0\2"),
    "cipher": (8, b"rot13\0"),
    "cipher without an end": (8, b"a" * 32),
    "mode without a generator": (40, b"xts\0"),
    "mode without an end": (40, b"a" * 32),
    "generator": (40, b"xts-plain99\0"),
    "hash": (72, b"md99\0"),
    "hash without an end": (72, b"a" * 32),
    "payload": (104, _number(8)),
    "no key": (108, _number(0)),
    "odd key": (108, _number(33)),
    "iterations of the digest": (164, _number(0)),
    "state": (SLOT, _number(5)),
    "no slot": (SLOT, _number(0xDEAD)),
    "iterations": (SLOT + 4, _number(0)),
    "slot in the header": (SLOT + 40, _number(0)),
    "slot in the payload": (SLOT + 40, _number(0x7FFFFFFF)),
    "stripes": (SLOT + 44, _number(3999)),
    "slots in one place": (NEXT_SLOT + 40, _number(8)),
    "material": (4096, b"other bytes"),
}


def test_damaged_headers(require: Require, tmp_path: Path) -> None:
    """The same words for each."""
    daemon, path = require("qemu-storage-daemon"), tmp_path / "disk.luks"
    bottomhalf.create(path, format="luks", size=MIB, secret=PASSWORD, iter_time=1)
    whole, said = path.read_bytes(), {}
    assert whole[SLOT + 40 : SLOT + 44] == _number(8)
    for what, (at, data) in DAMAGE.items():
        path.write_bytes(whole[:at] + data + whole[at + len(data) :])
        given = f"driver=luks,node-name=n,key-secret=s,file.driver=file,file.filename={path}"
        theirs = subprocess.run(
            [daemon, *OBJECTS, "--blockdev", given], capture_output=True, text=True, timeout=60, check=False
        )
        with pytest.raises(BlockError) as failed:
            bottomhalf.open(path, format="luks", secret=PASSWORD)
        said[what] = str(failed.value), theirs.stderr.strip().rpartition(f"{path}: ")[2]
    assert {what: ours for what, (ours, _) in said.items()} == {what: theirs for what, (_, theirs) in said.items()}


def daemon_of_ours() -> str:
    import sys

    return str(Path(sys.executable).with_name("bh-storage-daemon"))
