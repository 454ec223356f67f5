# SPDX-License-Identifier: Apache-2.0
"""bottomhalf bench: what it understands, in qemu-img's words, and what it does with it."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bottomhalf.tools import bench, bottomhalf
from bottomhalf.tools.bench import OPTIONS, Settings
from bottomhalf.tools.getopt import UsageError
from tests.tools.conftest import Outcome, argv, options_in

Tool = Callable[..., Outcome]
SIZE = 1 << 20
COMPLETED = re.compile(r"Run completed in \d+\.\d{3} seconds\.\n\Z")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


def test_defaults() -> None:
    settings = Settings(["a"])
    assert settings.image == "a" and settings.drain
    assert settings.numbers == {
        "count": 75000,
        "depth": 64,
        "flush-interval": 0,
        "pattern": 0,
        "buffer-size": 4096,
        "step-size": 0,
        "offset": 0,
    }
    assert not (settings.write or settings.force_share or settings.image_opts or settings.direct or settings.aio)


def test_all_options() -> None:
    words = "-c 7 -d 3 -s 1k -S 0x10 -o 1.5M -w -t directsync -i threads -U -f raw --pattern 255 --flush-interval 3"
    settings = Settings([*words.split(), "--no-drain", "-q", "a"])
    assert list(settings.numbers.values()) == [7, 3, 3, 255, 1024, 16, 1572864]
    assert (settings.write, settings.force_share, settings.drain) == (True, True, False)
    assert (settings.direct, settings.no_flush, settings.writethrough) == (True, False, True)
    assert (settings.aio, settings.format) == ("threads", "raw")
    assert Settings(["-n", "a"]).aio == "native"


# What qemu-img 10.0 says to the same words.
WRONG = [
    ("", "Expecting one image file name\nTry 'qemu-img bench --help' for more info"),
    ("a b", "Expecting one image file name\nTry 'qemu-img bench --help' for more info"),
    ("-c 0 a", "Invalid request count specified. Must be between 1 and 2147483647."),
    ("-c -1 a", "Invalid request count specified. Must be between 1 and 2147483647."),
    ("-c x a", "Invalid request count specified: 'x'."),
    ("-d 0 a", "Invalid queue depth specified. Must be between 1 and 2147483647."),
    ("-d 1k a", "Invalid queue depth specified: '1k'."),
    ("-d 99999999999 a", "Invalid queue depth specified. Must be between 1 and 2147483647."),
    ("-s 0 a", "Invalid buffer size specified. Must be between 1 and 2147483647."),
    ("-s 3G a", "Invalid buffer size specified. Must be between 1 and 2147483647."),
    ("-S 5000000000 a", "Invalid step size specified. Must be between 0 and 2147483647."),
    ("-o -1 a", "Invalid offset specified. Must be between 0 and 9223372036854775807."),
    ("--pattern 256 a", "Invalid pattern byte specified. Must be between 0 and 255."),
    ("-w --flush-interval x a", "Invalid flush interval specified: 'x'."),
    ("--flush-interval 3 -d 1 a", "--flush-interval is only available in write tests"),
    ("-w -d 2 --flush-interval 1 a", "Flush interval can't be smaller than depth"),
    ("-i foo a", "Invalid aio option: foo"),
    ("-t foo a", "Invalid cache mode"),
    ("-f raw --image-opts a", "--image-opts and --format are mutually exclusive"),
    ("-f raw /nonexistent", "Could not open '/nonexistent': Could not open '/nonexistent': No such file or directory"),
]


@pytest.mark.parametrize(("words", "text"), WRONG)
def test_complaints_are_qemus(tool: Tool, require: Callable[[str], str], words: str, text: str) -> None:
    ours = tool(lambda arguments: bench.main(arguments, "qemu-img"), words.split())
    assert ours.status == 1 and ours.stdout == ""
    assert ours.stderr.startswith(f"qemu-img: {text}\n")
    require("qemu-img")
    theirs = subprocess.run(
        ["qemu-img", "bench", *words.split()], capture_output=True, text=True, timeout=30, check=False
    )
    assert (theirs.returncode, theirs.stdout, theirs.stderr) == (1, "", f"qemu-img: {text}\n")


@pytest.mark.parametrize(
    "words",
    [
        "-c 300",
        "-c 300 -w --pattern 165",
        "-c 300 -w --pattern 165 -s 512 -S 1k -o 7k -d 5",
        "-c 40 -w -d 4 --flush-interval 10",
        "-c 40 -w -d 4 --flush-interval 10 --no-drain",
        "-c 3 -S 0 -q",
        "-c 1 -d 1 -U",
        "-c 64 -w --pattern 3 -t none",
        "-c 64 -w --pattern 3 -t writethrough -i threads",
        "-c 4 -s 100 -S 300 -w --pattern 1",
    ],
)
def test_does_what_qemu_img_does(tool: Tool, require: Callable[[str], str], image: Path, words: str) -> None:
    """The same lines, and the same bytes in the image afterwards."""
    ours = tool(bench.main, [*words.split(), "-f", "raw", image])
    assert ours.status == 0 and ours.stderr == "" and COMPLETED.search(ours.stdout), ours
    content = image.read_bytes()
    image.write_bytes(bytes(SIZE))
    theirs = subprocess.run(
        [require("qemu-img"), "bench", *words.split(), "-f", "raw", str(image)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert COMPLETED.sub("", ours.stdout) == COMPLETED.sub("", theirs.stdout)
    assert content == image.read_bytes()


def test_beyond_the_end(tool: Tool, image: Path) -> None:
    outcome = tool(bench.main, ["-c", "5", "-f", "raw", "-o", str(SIZE), image], name="bottomhalf")
    assert outcome.status == 1 and "Run completed" not in outcome.stdout
    assert outcome.stderr.startswith("bottomhalf bench: Failed request: Input/output error\n")
    assert f"the image ends at {SIZE}" in outcome.stderr


def test_image_opts(tool: Tool) -> None:
    outcome = tool(bench.main, ["-c", "1000", "-w", "--image-opts", "driver=null-co,size=1048576"])
    assert outcome.status == 0 and COMPLETED.search(outcome.stdout)
    outcome = tool(bench.main, ["--image-opts", "driver=nonsense"])
    assert outcome.status == 1 and outcome.stderr.startswith("bottomhalf bench: Could not open 'driver=nonsense': ")


def test_a_format_is_found_out(tool: Tool, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"KDMV" + bytes(SIZE))
    outcome = tool(bench.main, ["-c", "5", path])
    assert outcome.status == 1 and f"Could not open '{path}': " in outcome.stderr and "vmdk" in outcome.stderr
    assert tool(bench.main, ["-c", "5", "-f", "raw", path]).status == 0


def test_an_engine_that_is_not_to_be_had(
    tool: Tool, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bottomhalf.host.linux import LinuxHost

    def refuse(host: LinuxHost, kind: str = "auto") -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(LinuxHost, "engine", refuse)
    outcome = tool(bench.main, ["-i", "io_uring", "-f", "raw", image])
    assert outcome.status == 1
    assert "aio=io_uring is not to be had here: Operation not permitted" in outcome.stderr


def test_too_much_memory(tool: Tool, image: Path) -> None:
    outcome = tool(bench.main, ["-s", "1G", "-f", "raw", image])
    assert outcome.status == 1
    assert outcome.stderr.startswith("bottomhalf bench: 64 buffers of 1073741824 bytes are more than ")


def test_help(tool: Tool) -> None:
    outcome = tool(bench.main, ["--help", "--nope"])
    assert outcome.status == 0 and outcome.stderr == ""
    assert options_in(outcome.stdout) >= {option.name for option in OPTIONS}


def test_unknown_options() -> None:
    with pytest.raises(UsageError, match="unrecognized option '--no-such'"):
        Settings(["--no-such", "a"])


def test_command(tool: Tool, image: Path) -> None:
    outcome = tool(bottomhalf.main, ["bench", "-c", "3", "-f", "raw", image])
    assert outcome.status == 0
    assert outcome.stdout.startswith(
        "Sending 3 read requests, 4096 bytes each, 64 in parallel (starting at offset 0, step size 4096)\n"
    )


@pytest.mark.parametrize("words", ["--image-opts driver=null-co", "-f raw", "-f raw -t none -w"])
def test_ctrl_c_ends_it(image: Path, words: str) -> None:
    """In the middle of everything: what is in flight finishes, and nothing but the status tells."""
    operands = [] if "null-co" in words else [str(image)]
    command = argv("bottomhalf", ["bench", "-c", "2147483647", *words.split(), *operands])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("Sending 2147483647 ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (130, "", "")
