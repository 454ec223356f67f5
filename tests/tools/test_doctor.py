# SPDX-License-Identifier: Apache-2.0
"""bottomhalf doctor: what it says of the real machine holds, and what is refused is told with its likely cause."""

from __future__ import annotations

import errno
import json
import os
import platform
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.host.linux import LinuxHost, probe
from bottomhalf.tools import bottomhalf, doctor
from tests.loop_devices import loop_device
from tests.tools.conftest import Outcome, options_in

Tool = Callable[..., Outcome]
SECONDS_MAX = 60

# A system call filter that says EPERM, or another errno, to some calls and allows the others, put on before the
# doctor is loaded. BPF: load the number; for each refused one: return the errno; else allow.
REFUSING = """
import ctypes, struct, sys
numbers, answer = [int(word) for word in sys.argv[1].split(",")], int(sys.argv[2])
program = [(0x20, 0, 0, 0)]
for number in numbers:
    program += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | answer)]
program += [(0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in program))
libc = ctypes.CDLL(None, use_errno=True)
described = struct.pack("<H6xQ", len(program), ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(described), 0, 0) == 0, ctypes.get_errno()
from bottomhalf.tools import bottomhalf
sys.exit(bottomhalf.main(sys.argv[3:]))
"""
IO_URING_SETUP = 425
IO_SETUP = 206 if platform.machine() == "x86_64" else 0


def refusing(numbers: list[int], answer: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The doctor where these system calls are refused."""
    listed = ",".join(map(str, numbers))
    done = subprocess.run(
        [sys.executable, "-c", REFUSING, listed, str(answer), "doctor", *words],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it says of this machine and a file."""
    path = tmp_path_factory.mktemp("doctor") / "disk"
    path.write_bytes(bytes(1 << 20))
    return doctor.examine(str(path))


def named(findings: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (one,) = (finding for finding in findings if finding["name"] == name)
    return one


def test_the_machine_is_this_one(report: dict[str, Any]) -> None:
    machine = report["machine"]
    assert machine["kernel"] == os.uname().release and machine["python"].startswith(platform.python_version())
    assert machine["processors"] == len(os.sched_getaffinity(0)) and machine["user"] == os.geteuid()


def test_what_is_chosen_works(report: dict[str, Any]) -> None:
    for section in ("engines", "pollers"):
        chosen = named(report[section]["kinds"], report[section]["chosen"])
        assert chosen["works"] and chosen["nanoseconds"] > 0
    engine = LinuxHost().engine()
    assert report["engines"]["chosen"] == engine.name
    engine.close()
    assert report["pollers"]["chosen"] == "epoll"


def test_everything_refused_has_a_cause(report: dict[str, Any]) -> None:
    findings = [*report["engines"]["kinds"], *report["pollers"]["kinds"], *report["devices"], *report["locks"]]
    findings += report["ring"]
    for one in [*findings, *report["file"]["abilities"]]:
        assert one["works"] or one["cause"], one


def test_what_works_really_does(report: dict[str, Any]) -> None:
    for one in report["engines"]["kinds"]:
        if one["works"]:
            LinuxHost().engine(one["name"]).close()
    for one in report["devices"]:
        if one["works"]:
            path = {"FUSE": "/dev/fuse", "KVM": "/dev/kvm", "NBD": "/dev/nbd0"}[one["name"]]
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    assert named(report["locks"], "image locks (OFD)")["works"]


def test_the_file(report: dict[str, Any]) -> None:
    file = report["file"]
    assert file["size"] == 1 << 20 and named(file["abilities"], "finding holes")["works"]
    if file["direct-alignment"] is not None:
        direct = LinuxHost().open_file(file["path"], read_only=True, direct=True, locking="off")
        assert (direct.alignment, direct.memory_alignment) == (
            file["direct-alignment"],
            file["direct-memory-alignment"],
        )
        direct.close()


def test_a_block_device(tmp_path: Path, tool: Tool) -> None:
    """What it says of itself; one that is read-only is told as such. Nothing of it is changed."""
    (tmp_path / "backing").write_bytes(b"x" * (1 << 20))
    with loop_device(tmp_path / "backing", "--sector-size", "4096") as path:
        file = doctor.examine(path)["file"]
        assert (file["file-system"], file["size"]) == ("none: a block device", 1 << 20)
        assert file["direct-alignment"] == 4096
        assert named(file["abilities"], "blocks")["detail"].startswith("4096 bytes to address")
        assert named(file["abilities"], "a writer's image lock")["works"]
        assert [one["name"] for one in file["abilities"]].count("discards") == 1
        text = tool(bottomhalf.main, ["doctor", path]).stdout
        assert "a block device" in text and "zeroes by the device" in text
    with loop_device(tmp_path / "backing", "--read-only") as path:
        refused = named(doctor.examine(path)["file"]["abilities"], "writing")
        assert not refused["works"] and "BLKROGET" in refused["cause"]
    assert (tmp_path / "backing").read_bytes() == b"x" * (1 << 20)


def test_the_json_is_the_report(tool: Tool) -> None:
    outcome = tool(bottomhalf.main, ["doctor", "--json"])
    assert outcome.status == 0 and outcome.stderr == ""
    said = json.loads(outcome.stdout)
    assert list(said) == [
        *("version", "machine", "limits", "engines", "ring", "pollers", "locks", "devices", "bottom-half-ns", "advice"),
    ]
    assert said["machine"]["kernel"] == os.uname().release


def test_the_text_says_the_same(report: dict[str, Any]) -> None:
    text = doctor.as_text(report)
    for section in ("engines", "pollers"):
        assert f"{report[section]['chosen']} is used" in text
        for one in report[section]["kinds"]:
            assert one["name"] in text
    for one in (*report["devices"], *report["file"]["abilities"]):
        assert one["name"] in text and one.get("cause", "") in text
    assert report["file"]["path"] in text and report["machine"]["kernel"] in text
    assert all(len(line) < 200 for line in text.splitlines())


def test_a_seccomp_filter_that_refuses_io_uring() -> None:
    """It is told as refused, with its likely cause, and what is used instead."""
    done = refusing([IO_URING_SETUP], errno.EPERM, "--json")
    said = json.loads(done.stdout)
    refused = named(said["engines"]["kinds"], "io_uring")
    assert (refused["works"], refused["errno"]) == (False, "EPERM") and "seccomp" in refused["cause"]
    assert not named(said["pollers"]["kinds"], "io_uring")["works"]
    assert said["engines"]["chosen"] != "io_uring" and said["machine"]["seccomp"] == "a filter"
    assert named(said["engines"]["kinds"], said["engines"]["chosen"])["works"]
    assert any(line.startswith("io_uring is refused") for line in said["advice"])
    text = refusing([IO_URING_SETUP], errno.EPERM).stdout
    assert "Operation not permitted (EPERM); likely cause: a seccomp filter refuses it" in text


def test_a_seccomp_filter_that_hides_both() -> None:
    """Some profiles answer as if the kernel had no such calls."""
    said = json.loads(refusing([IO_URING_SETUP, IO_SETUP], errno.ENOSYS, "--json").stdout)
    for name in ("io_uring", "linux-aio"):
        refused = named(said["engines"]["kinds"], name)
        assert (refused["works"], refused["errno"]) == (False, "ENOSYS") and "seccomp" in refused["cause"], refused
    assert said["engines"]["chosen"] == "threads"


@pytest.mark.parametrize(
    ("number", "sysctl", "seccomp", "user", "words"),
    [
        (errno.EPERM, 2, 0, 0, "io_uring_disabled is 2"),
        (errno.EPERM, 2, 2, 1000, "io_uring_disabled is 2"),
        (errno.EPERM, 1, 0, 1000, "io_uring_disabled is 1"),
        (errno.EPERM, 0, 2, 0, "seccomp filter refuses"),
        (errno.EPERM, None, 2, 0, "seccomp filter refuses"),
        (errno.EPERM, 0, 0, 0, "security module"),
        (errno.ENOSYS, 0, 2, 0, "seccomp filter hides"),
        (errno.ENOSYS, None, 0, 0, "without CONFIG_IO_URING"),
        (errno.ENOMEM, 0, 0, 0, "RLIMIT_MEMLOCK"),
        (errno.EMFILE, 0, 0, 0, "ulimit -n"),
        (errno.EIO, 0, 0, 0, "unknown"),
    ],
)
def test_likely_causes(
    monkeypatch: pytest.MonkeyPatch, number: int, sysctl: int | None, seccomp: int, user: int, words: str
) -> None:
    monkeypatch.setattr(probe, "_number", lambda path: sysctl)
    monkeypatch.setattr(probe, "seccomp_mode", lambda: seccomp)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert words in probe._why_no_io_uring(OSError(number, ""))


def test_an_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_number", lambda path: None)
    monkeypatch.setattr(platform, "release", lambda: "4.19.0-27-amd64")
    assert "4.19.0-27-amd64, is older than 5.6" in probe._why_no_io_uring(OSError(errno.ENOSYS, ""))


def test_linux_aio_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EAGAIN, "")

    monkeypatch.setattr(probe, "_try_linux_aio", refuse)
    finding = named([vars(one) for one in probe.engines(None)], "linux-aio")
    assert not finding["works"] and finding["errno"] == "EAGAIN" and "fs.aio-max-nr" in finding["cause"]


def test_device_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = probe._device("X", str(tmp_path / "x"), "no module", None)
    assert not absent.works and absent.errno == "ENOENT" and absent.cause is not None
    assert absent.cause.startswith("no module")
    node = tmp_path / "node"
    node.touch(mode=0o640)
    refused = OSError(errno.EACCES, "")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    status = node.stat()
    expected = f"{node} belongs to user {status.st_uid} and group {status.st_gid}, mode 0640"
    assert probe._why_no_device(refused, str(node), "") == expected
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "cgroup" in probe._why_no_device(OSError(errno.EPERM, ""), str(node), "")
    assert not probe._device("X", str(node), "", probe._KVM_GET_API_VERSION).works, "a file is no device"


def test_without_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(select, "epoll", refuse)
    kinds = {one.name: one for one in probe.pollers()}
    assert not kinds["epoll"].works and kinds["epoll"].errno == "EPERM" and kinds["poll"].works
    assert probe.chosen_poller() == "poll"


def test_an_image_in_use(tmp_path: Path) -> None:
    from bottomhalf.host.protocol import PERM_ALL, PERM_WRITE

    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    holder = LinuxHost().open_file(str(path))
    holder.set_permissions(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    finding = {one.name: one for one in probe.file_report(str(path)).findings}["a writer's image lock"]
    assert not finding.works and finding.cause is not None and f"(pid {os.getpid()})" in finding.cause
    holder.close()
    finding = {one.name: one for one in probe.file_report(str(path)).findings}["a writer's image lock"]
    assert finding.works


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    report = doctor.examine(str(path))
    assert report["file"]["size"] == 0 and "not measured" in named(report["engines"]["kinds"], "threads")["detail"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("/nonexistent", "bottomhalf doctor: /nonexistent: No such file or directory\n"),
        ("/", "bottomhalf doctor: /: Is a directory\n"),
        ("/dev/null", "bottomhalf doctor: /dev/null: a character device, neither a regular file nor a block device\n"),
        ("a b", "bottomhalf doctor: give one path\nTry 'bottomhalf doctor --help' for more information.\n"),
    ],
)
def test_complaints(tool: Tool, words: str, text: str) -> None:
    outcome = tool(doctor.main, words.split())
    assert (outcome.status, outcome.stdout, outcome.stderr) == (1, "", text)


def test_help(tool: Tool) -> None:
    outcome = tool(doctor.main, ["--help", "--nope"])
    assert outcome.status == 0 and options_in(outcome.stdout) >= {option.name for option in doctor.OPTIONS}


def test_advice() -> None:
    def kinds(works: bool) -> dict[str, Any]:
        return {"chosen": "threads", "kinds": [{"name": "io_uring", "works": works, "cause": "why"}]}

    report = {
        "engines": kinds(True),
        "pollers": {"chosen": "epoll"},
        "limits": {"open-files": -1},
        "locks": [{"works": True}],
    }
    assert doctor.advice(report) == []
    report |= {"engines": kinds(False), "pollers": {"chosen": "poll"}, "limits": {"open-files": 256}}
    report["locks"] = [{"works": False}]
    assert len(doctor.advice(report)) == 4
