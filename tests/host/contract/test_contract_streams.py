# SPDX-License-Identifier: Apache-2.0
"""Files, pipes and pseudo-terminals as streams: the same on every host."""

from __future__ import annotations

import errno
import os

import pytest

from bottomhalf.host.protocol import Socket
from bottomhalf.host.sim import SimHost
from tests.host.contract.conftest import Place


def received(stream: Socket, least: int = 1) -> bytes:
    """At least so many bytes, unless the stream ends; a host may give them one by one."""
    data, buffer = b"", bytearray(100)
    while len(data) < least:
        count = stream.recv_into(buffer)
        if count == 0:
            break
        data += buffer[:count]
    return data


def test_what_is_written_is_read_back(place: Place) -> None:
    path = place.file("log", b"old")
    for mode, expected in (("append", b"oldnew"), ("private", b"oldnewnew"), ("truncate", b"new")):
        stream = place.host.open_stream(None, path, mode)
        with pytest.raises(BlockingIOError):
            received(stream)
        assert stream.send(b"new") == 3
        stream.close()
        back = place.host.open_stream(path, None, "append")
        assert received(back, len(expected)) == expected
        assert received(back) == b""
        back.close()


def test_a_file_is_made(place: Place) -> None:
    path = place.path("made")
    for mode in ("private", "append"):
        place.host.open_stream(None, path, mode).close()
        back = place.host.open_stream(path, None, "append")
        assert received(back) == b""
        back.close()
        place.host.remove(path)
    with pytest.raises(FileNotFoundError):
        place.host.open_stream(path, None, "append")


def test_what_is_not_there(place: Place) -> None:
    there = place.file("there")
    for input_path, output_path, mode in ((place.path("no"), there, "append"), (None, place.path("no"), "existing")):
        with pytest.raises(OSError) as caught:
            place.host.open_stream(input_path, output_path, mode)
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileNotFoundError):
        place.host.remove(place.path("no"))


def test_a_pipe_carries_both_ways(place: Place) -> None:
    path = place.path("pipe")
    if isinstance(place.host, SimHost):
        other = place.host.streams.add_pipe(path)
        ours = place.host.open_stream(path, path, "existing")
        other._outbound_put(b"there")
        assert received(ours, 5) == b"there"
        ours._outbound_put(b"back")
        assert received(other, 4) == b"back"
        return
    os.mkfifo(path + ".in")
    os.mkfifo(path + ".out")
    ours = place.host.open_stream(path + ".in", path + ".out", "existing")
    with open(path + ".in", "wb", buffering=0) as to_us, open(path + ".out", "rb", buffering=0) as from_us:
        to_us.write(b"there")
        place.until_ready(ours.fileno())
        assert received(ours) == b"there"
        ours.send(b"back")
        assert from_us.read(4) == b"back"
    with pytest.raises(BlockingIOError):
        received(ours)  # we hold it open ourselves: it does not end
    ours.close()


def test_a_pseudo_terminal_comes_and_goes(place: Place) -> None:
    pty = place.host.open_pty()
    assert pty.hung_up()
    if isinstance(place.host, SimHost):
        person = place.host.streams.open_terminal(pty.name)
        assert not pty.hung_up()
        person._outbound_put(b"hi")
        assert received(pty, 2) == b"hi"
        place.host.streams.leave_terminal(pty.name)
    else:
        with open(pty.name, "r+b", buffering=0) as person:
            assert not pty.hung_up()
            person.write(b"hi")
            place.until_ready(pty.fileno())
            assert received(pty) == b"hi"
    assert pty.hung_up()
    with pytest.raises(OSError) as caught:
        received(pty)
    assert caught.value.errno == errno.EIO
    pty.close()


def test_lines_of_a_pseudo_terminal(place: Place) -> None:
    """Nobody has said how many, until somebody does."""
    pty = place.host.open_pty()
    assert pty.rows() is None
    if isinstance(place.host, SimHost):
        place.host.streams.ptys[pty.name].screen_rows = 33
    else:
        import fcntl
        import struct
        import termios

        with open(pty.name, "r+b", buffering=0) as person:
            fcntl.ioctl(person.fileno(), termios.TIOCSWINSZ, struct.pack("4H", 33, 80, 0, 0))
    assert pty.rows() == 33
    pty.close()
