# SPDX-License-Identifier: Apache-2.0
"""The other character devices: files, pipes, pseudo-terminals, memory, telnet, reconnection, logs, waiting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.chardev.base import Chardev
from bottomhalf.chardev.ringbuf import RingbufChardev
from bottomhalf.chardev.simple import PTY_LOOK_NS
from bottomhalf.chardev.telnet import GREETING, TelnetDecoder, escape
from bottomhalf.host.protocol import UnixAddress
from bottomhalf.monitor.hmp import HmpMonitor
from bottomhalf.qapi.char import parse_chardev
from tests.monitor.qmp_bench import QmpBench
from tests.monitor.test_chardev import Recorder

PATH = UnixAddress("/run/c.sock")


def made(bench: QmpBench, text: str) -> Chardev:
    options = parse_chardev(text)
    return bench.storage.add_chardev(options.id, options.backend)


def test_file_and_its_log() -> None:
    with QmpBench() as bench:
        bench.host.add_file("/out", b"old ")
        bench.host.add_file("/in", b"input")
        chardev = made(bench, "file,id=f,path=/out,append=on,input-path=/in,logfile=/log")
        recorder = Recorder()
        chardev.attach(recorder)
        chardev.write(b"new")
        bench.until(lambda: recorder.seen[-1] == "closed", "the end of the input")
        assert recorder.text == b"input"
        assert bench.host.content("/out") == b"old new" and bench.host.content("/log") == b"new"


def test_file_without_input_is_silent() -> None:
    with QmpBench() as bench:
        bench.host.add_file("/out", b"old")
        chardev, recorder = made(bench, "file,id=f,path=/out"), Recorder()
        chardev.attach(recorder)
        chardev.write(b"new")
        bench.settle()
        assert recorder.seen == ["opened"] and bench.host.content("/out") == b"new"


def test_pipe() -> None:
    with QmpBench() as bench:
        other = bench.host.streams.add_pipe("/pipe")
        chardev, recorder = made(bench, "pipe,id=p,path=/pipe"), Recorder()
        chardev.attach(recorder)
        other._outbound_put(b"hello")
        bench.until(lambda: recorder.text == b"hello", "the words")
        chardev.write(b"back")
        bench.settle()
        assert other.take() == b"back"


def test_null() -> None:
    with QmpBench() as bench:
        chardev, recorder = made(bench, "null,id=n"), Recorder()
        chardev.attach(recorder)
        chardev.write(b"x")
        bench.settle()
        assert recorder.seen == [] and chardev.describe() == "null"


def test_a_monitor_on_a_pseudo_terminal() -> None:
    """People come and go; whoever opens it is greeted within a second."""
    with QmpBench() as bench:
        chardev = made(bench, "pty,id=p,path=/link")
        HmpMonitor(bench.storage, chardev)
        assert chardev.describe() == "pty:/dev/pts/0" and not chardev.connected
        for _ in range(2):
            began_ns = bench.host.monotonic_ns()
            person = bench.host.streams.open_terminal("/link")
            bench.until(lambda: chardev.connected, "the monitor to notice")
            assert bench.host.monotonic_ns() - began_ns <= 2 * PTY_LOOK_NS
            bench.settle()
            assert person.take().startswith(b"QEMU 10.0.2 monitor")
            bench.host.streams.leave_terminal("/link")
            bench.until(lambda: not chardev.connected, "the monitor to notice the end")
        bench.storage.close()
        assert bench.host.streams.links == {}
        bench.ended = True


def test_ringbuf() -> None:
    with QmpBench() as bench:
        chardev = made(bench, "ringbuf,id=r,size=8")
        assert isinstance(chardev, RingbufChardev)
        chardev.write(b"0123456789")
        assert chardev.read(3) == b"234" and chardev.read(100) == b"56789" and chardev.read(1) == b""


@pytest.mark.parametrize("text", ["0", "3", "-1", "2147483648"])
def test_ringbuf_sizes(text: str) -> None:
    from bottomhalf.qapi.errors import OptionError

    with QmpBench() as bench, pytest.raises(OptionError):
        made(bench, f"ringbuf,id=r,size={text}")


TELNET_COMMANDS = (b"\xff\xfb\x01", b"\xff\xfa\x18abc\xff\xf0", b"\xff\xf1")


@given(st.lists(st.one_of(st.binary(max_size=5), st.sampled_from(TELNET_COMMANDS))), st.data())
def test_telnet_is_the_same_wherever_it_is_cut(parts: list[bytes], data: st.DataObject) -> None:
    plain = b"".join(part for part in parts if part not in TELNET_COMMANDS)
    wire = b"".join(part if part in TELNET_COMMANDS else escape(part) for part in parts)
    cut = data.draw(st.integers(0, len(wire)))
    decoder = TelnetDecoder()
    assert decoder.feed(wire[:cut]) + decoder.feed(wire[cut:]) == plain


def test_telnet(seed: int) -> None:
    with QmpBench(seed) as bench:
        chardev, recorder = made(bench, f"socket,id=c,path={PATH.path},server=on,wait=off,telnet=on"), Recorder()
        chardev.attach(recorder)
        peer = bench.host.connect(PATH)
        bench.until(lambda: chardev.connected, "the peer")
        recorder.line.write(b"a\xffb")
        bench.settle()
        assert peer.take() == GREETING + b"a\xff\xffb"
        peer._outbound_put(b"\xff\xfd\x01x\xff\xffy\r\n")
        bench.until(lambda: recorder.text == b"x\xffy\r\n", "the words")
        peer.close()


def test_reconnects(seed: int) -> None:
    """The server is late, goes, and comes again; the monitor says once why it is alone."""
    with QmpBench(seed) as bench:
        chardev, recorder = made(bench, f"socket,id=c,path={PATH.path},reconnect-ms=500"), Recorder()
        chardev.attach(recorder)
        over: list[bool] = []
        bench.context.timer(lambda: over.append(True)).arm_ns(bench.context.now_ns() + 3_000_000_000)
        bench.until(lambda: over, "three seconds")
        assert bench.log == [
            "Unable to connect character device c: Failed to connect to '/run/c.sock': No such file or directory"
        ]
        bench.log.clear()
        for _ in range(2):
            listener = bench.host.listen(PATH)
            bench.until(lambda: chardev.connected, "the connection")
            peer = listener.accept()
            recorder.line.write(b"hello")
            bench.settle()
            assert peer.take() == b"hello"
            listener.close()
            peer.close()
            bench.until(lambda: not chardev.connected, "the end")
        assert recorder.seen == ["opened", "closed"] * 2
        bench.end_log()


def test_a_client_is_waited_for(seed: int) -> None:
    """chardev-add with wait=on: the answer comes when the client has, and the disks go on meanwhile."""
    with QmpBench(seed) as bench:
        bench.monitor()
        client = bench.client()
        backend = {
            "type": "socket",
            "data": {"addr": {"type": "unix", "data": {"path": PATH.path}}, "wait": True},
        }
        client.ask("chardev-add", {"id": "c", "backend": backend}, id="add")
        half: list[int] = []
        bench.host.at(1_000_000_000, lambda: half.append(len(client.messages)))
        peers: list[object] = []
        bench.host.at(2_000_000_000, lambda: peers.append(bench.host.connect(PATH)))
        assert client.answer() == {"return": {}, "id": "add"}
        assert half == [0] and bench.storage.chardevs["c"].connected
