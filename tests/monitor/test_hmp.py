# SPDX-License-Identifier: Apache-2.0
"""The monitor for people: what commands print, what is refused and how, completion, secrets."""

from __future__ import annotations

import pytest

from bottomhalf.monitor.hmp import run_command_line
from bottomhalf.monitor.hmp_commands import COMMANDS, INFO
from tests.monitor.qmp_bench import NBD, HmpClient, QmpBench


def with_disk(bench: QmpBench, person: HmpClient) -> None:
    bench.host.add_file("/disk.raw", 1 << 20)
    assert person.ask("drive_add -n 0 driver=file,node-name=disk,filename=/disk.raw,read-only=off") == ""


def test_banner_and_echo() -> None:
    with QmpBench() as bench:
        person = bench.hmp()
        person.type("info ver")
        bench.settle()
        assert person.screen == b"info ver"
        person.type("sion\n")
        assert person.prompt().startswith("info version\n10.0.2 (bottomhalf-")


def test_keys_one_by_one(seed: int) -> None:
    from bottomhalf.host.sim import Odds

    with QmpBench(seed, odds=Odds(short_recv=1.0, short_send=1.0)) as bench:
        person = bench.hmp()
        assert person.ask("info name") == ""
        assert person.ask("info history") == "0: 'info name'\n1: 'info history'\n"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", ""),
        ("   ", ""),
        ("nonsense", "unknown command: 'nonsense'\n"),
        ("info nonsense", "unknown command: 'info nonsense'\n"),
        ("block_resize", 'block_resize: block device name expected\nTry "help block_resize" for more information\n'),
        ("block_resize a", 'block_resize: size expected\nTry "help block_resize" for more information\n'),
        ("block_resize a x", 'block_resize: invalid size\nTry "help block_resize" for more information\n'),
        ("block_resize a 1", "Error: Cannot find device='' nor node-name='a'\n"),
        ("quit now", 'quit: extraneous characters at the end of line\nTry "help quit" for more information\n'),
        ("ringbuf_read r x", 'invalid char in expression\nTry "help ringbuf_read" for more information\n'),
        ("ringbuf_read r 1", "Error: Device 'r' not found\n"),
        ('qemu-io a "sleep', 'unterminated string\nTry "help qemu-io" for more information\n'),
        ('qemu-io a "\\x"', "unsupported escape code: '\\x'\nTry \"help qemu-io\" for more information\n"),
        ("qemu-io a x", "Error: Cannot find device='a' nor node-name='a'\n"),
        ("object_add nope,id=x", "Error: Parameter 'qom-type' does not accept value 'nope'\n"),
        ("object_add secret", "Error: Parameter 'id' is missing\n"),
        ("object_del x", "Error: object 'x' not found\n"),
        ("qom-get /objects nope", "Error: Property 'container.nope' not found\n"),
        ("qom-get /nope type", "Error: Device '/nope' not found\n"),
        ("qom-set -j / x {", "Error: JSON parse error, premature EOI\n"),
        ("qom-list", "/\n"),
        ("qom-list /objects", "type (string)\n"),
        ("info qom-tree /objects", "/objects (container)\n"),
        ("nbd_server_start nohost", "Error: error parsing address 'nohost'\n"),
        ("nbd_server_stop", "Error: NBD server not running\n"),
        ("nbd_server_add a", "Error: Cannot find device='' nor node-name='a'\n"),
        ("nbd_server_remove a", "Error: Export 'a' is not found\n"),
        ("drive_add 0 x", "There are no machines to add a drive to: use -n, with the options of --blockdev\n"),
        ("drive_add -n 0 driver=nope,node-name=x", "Error: Parameter 'driver' does not accept value 'nope'\n"),
        ("drive_del x", "Error: Failed to find node with node-name='x'\n"),
        ("chardev-remove x", "Error: Chardev 'x' not found\n"),
        ("info iothreads", ""),
        ("info nodes", ""),
        ("info block", ""),
        ("info exports", ""),
        ("info waits", "nothing waits\n"),
        ("help nonsense", "unknown command: 'nonsense'\n"),
        ("? quit", "quit|q -- quit the program\n"),
        ("help info version", "info version -- show the version\n"),
    ],
)
def test_lines(line: str, text: str) -> None:
    with QmpBench() as bench:
        assert run_command_line(bench.storage, line) == text


def test_a_disk(seed: int) -> None:
    with QmpBench(seed) as bench:
        person = bench.hmp()
        with_disk(bench, person)
        assert person.ask("info block disk") == "disk: /disk.raw (file)\n    Cache mode:       writeback\n"
        told = person.ask('qemu-io disk "write -P 0x5a 4096 512"').splitlines()
        assert told[0] == "wrote 512/512 bytes at offset 4096" and told[1].startswith("512 bytes, 1 ops; ")
        assert bench.host.content("/disk.raw")[4096:4608] == b"\x5a" * 512
        assert person.ask('qemu-io disk "read -q -P 0x5a 4k 512"') == ""
        wrong = "Pattern verification failed at offset 4096, 512 bytes\n"
        assert person.ask('qemu-io disk "read -q -P 1 4k 512"') == wrong
        dump = person.ask('qemu-io disk "read -qv 4096 16"')
        assert dump == f"00001000:  {' '.join(['5a'] * 16)}  {'Z' * 16}\n"
        assert person.ask('qemu-io disk "write -qz 4096 512"') == ""
        assert person.ask('qemu-io disk "discard -q 0 4096"') == ""
        assert person.ask("qemu-io disk flush") == ""
        assert bench.host.durable_content("/disk.raw")[4096:4608] == bytes(512)
        assert person.ask("block_resize disk 2") == ""
        assert person.ask("qemu-io disk length") == "2 MiB\n"
        assert person.ask('qemu-io disk "truncate 1M"') == ""
        assert person.ask("info nodes") == "disk (file, 1048576 bytes)\n"
        assert "Virtual size:     1048576 bytes" in person.ask("info block -v")
        for command, text in (
            ("read 0", "bad argument count 1 to read, expected 2 arguments\n"),
            ("read 0 x", "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- x\n"),
            ("read 0 8E", "Parsing error: argument too large -- 8E\n"),
            ("read 0 2G", "length cannot exceed 1073741824, given 2G\n"),
            ("read 2M 512", "read failed: Input/output error\n"),
            ("write -P 300 0 512", "300 is not a valid pattern byte\n"),
            ("write -z -P 1 0 512", "-z and -P cannot be specified at the same time\n"),
            ("write -u 0 512", "-u requires -z to be specified\n"),
            ("read -x 0 1", "read: invalid option -- 'x'\n"),
            ("nope", 'command "nope" not found\n'),
        ):
            assert person.ask(f'qemu-io disk "{command}"') == text
        assert person.ask("drive_del disk") == ""
        assert not bench.storage.graph.backends


def test_exports(seed: int) -> None:
    with QmpBench(seed) as bench:
        person = bench.hmp()
        with_disk(bench, person)
        assert person.ask(f"nbd_server_start -a -w unix:{NBD.path}") == ""
        assert person.ask("info exports") == "disk: nbd, node disk\n"
        nbd = bench.nbd_client("disk")
        nbd.write(0, b"x" * 512)
        nbd.wait_all()
        assert person.ask("nbd_server_remove disk") == "Error: export 'disk' still in use\n"
        nbd.disconnect()
        bench.settle()
        assert person.ask("nbd_server_remove disk") == ""
        assert person.ask("nbd_server_add disk other") == ""
        assert person.ask("nbd_server_stop") == ""
        assert person.ask("info exports") == ""


def test_objects_and_devices() -> None:
    with QmpBench() as bench:
        person = bench.hmp()
        assert person.ask("object_add iothread,id=io0,poll-max-ns=5") == ""
        assert person.ask("qom-get io0 poll-max-ns") == "5\n"
        assert person.ask("qom-set io0 poll-max-ns 0x10") == ""
        assert person.ask("qom-set -j io0 poll-grow 3") == ""
        told = "io0:\n  poll-max-ns=16\n  poll-grow=3\n  poll-shrink=0\n  aio-max-batch=0\n"
        assert person.ask("info iothreads") == told
        assert "/io0 (iothread)\n" in person.ask("info qom-tree")
        assert person.ask("object_del io0") == ""
        assert person.ask("chardev-add ringbuf,id=r,size=8") == ""
        assert person.ask('ringbuf_write r "a\\\\b\\n"') == ""
        assert person.ask("ringbuf_read r 100") == "a\\\\b\n\n"
        assert "r: filename=ringbuf\n" in person.ask("info chardev")
        assert person.ask("chardev-change r null") == ""
        assert "r: filename=null\n" in person.ask("info chardev")
        assert person.ask("chardev-remove r") == ""


def test_completion() -> None:
    with QmpBench() as bench:
        person = bench.hmp()
        with_disk(bench, person)
        for typed, whole in (
            ("blo\tdi\t4", "block_resize disk 4"),
            ("info ve\t", "info version "),
            ("qemu-io -d di\tlength", "qemu-io -d disk length"),
            ("object_add iothr\tx", "object_add iothread,id= x"),
            ("help nbd_server_sto\t", "help nbd_server_stop "),
            ("qom-list /obj\t", "qom-list /objects "),
        ):
            person.type(typed)
            bench.settle()
            assert person.screen.decode() == whole
            person.type("\x15")
            bench.settle()
            person.screen.clear()


def test_a_secret_stays_one() -> None:
    with QmpBench() as bench:
        person = bench.hmp()
        assert person.ask("object_add secret,id=pw,data=hunter2") == ""
        assert "hunter2" not in person.ask("info history")
        assert "hunter2" not in person.ask("info qom-tree") + person.ask("qom-list pw")
        assert person.ask("qom-get pw data") == "Error: Property 'secret.data' is not readable\n"
        assert "hunter2" not in person.ask("object_add secret,id=pw,data=hunter2,format=base64")


def test_every_command_has_help_and_says_what_it_lacks() -> None:
    with QmpBench() as bench:
        assert len(run_command_line(bench.storage, "help").splitlines()) == len(COMMANDS)
        assert len(run_command_line(bench.storage, "info").splitlines()) == len(INFO)
        for entry in (*COMMANDS, *INFO):
            assert entry.help and entry.names


def test_a_defect_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with QmpBench() as bench:

        def broken(*_: object) -> None:
            raise ZeroDivisionError("oh")

        entry = next(each for each in INFO if "version" in each.names)
        monkeypatch.setattr(entry, "handler", broken)
        told = run_command_line(bench.storage, "info version")
        assert told == "Error: internal error: ZeroDivisionError: oh\n"
        assert "please report" in bench.log[0]
        bench.log.clear()


def test_quit_ends_the_program() -> None:
    with QmpBench() as bench:
        person = bench.hmp()
        person.type("quit\n")
        bench.storage.run()
        bench.settle()
        assert person.screen == b"quit\r\n"


def test_two_people_on_one_terminal() -> None:
    """mon:stdio's way: a mux, Ctrl-A c between a person's monitor and a program's."""
    from bottomhalf.monitor.hmp import HmpMonitor
    from bottomhalf.monitor.qmp import QmpMonitor
    from bottomhalf.qapi.char import parse_chardev
    from bottomhalf.tools.bh_storage_daemon import mux_over

    with QmpBench() as bench:
        options = parse_chardev("stdio,id=t")
        bench.storage.add_chardev("t", options.backend)
        mux = bench.storage.add_chardev("mux", mux_over("t"))
        QmpMonitor(bench.storage, mux)
        HmpMonitor(bench.storage, mux)
        person = HmpClient(bench, bench.host.terminal())
        bench.people.append(person)
        greetings = person.prompt()
        assert '"QMP"' in greetings and "type 'help'" in greetings
        assert person.ask("info name") == ""
        person.type("\x01c")
        person.type('{"execute": "qmp_capabilities"}')
        bench.until(lambda: b'{"return": {}}' in person.screen, "the answer")
        person.screen.clear()
        person.type("\x01c")
        assert person.ask("info name") == ""
        person.type("\x01h")
        bench.settle()
        assert b"switch between consoles" in person.screen
        person.type("\x01x")
        bench.storage.run()


def test_snapshots(seed: int) -> None:
    from tests.drivers.qcow2.bench import make

    with QmpBench(seed) as bench:
        make(bench.host, "disk.qcow2", size=1 << 20)
        person = bench.hmp()
        options = "driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2"
        assert person.ask(f"drive_add -n 0 {options}") == ""
        assert person.ask("info snapshots") == "There is no snapshot available.\n"
        assert person.ask("snapshot_blkdev_internal disk one") == ""
        assert person.ask("snapshot_blkdev_internal disk one") == (
            "Error: Snapshot with name 'one' already exists on device 'disk'\n"
        )
        head, names, row, end = person.ask("info snapshots").split("\n")
        assert (head, end) == ("List of snapshots present on node disk:", "")
        assert names.split() == ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]
        assert row.startswith("1       one                   0 B ") and row.endswith(" --")
        assert person.ask("snapshot_delete_blkdev_internal disk one 7").startswith("Error: Snapshot with id '7'")
        assert person.ask("snapshot_delete_blkdev_internal disk one") == ""
        assert person.ask("info snapshots") == "There is no snapshot available.\n"
        assert person.ask("info qtree") == person.ask("info nodes")
        assert person.ask("info qtree").startswith("disk (qcow2, 1048576 bytes)\n  file: #block")


def test_sizes_as_people_read_them() -> None:
    from bottomhalf.monitor.hmp_snapshots import _size

    assert [_size(count) for count in (0, 1023, 1024, 3 << 29, 1 << 60)] == [
        "0 B", "1.02e+03 B", "1 KiB", "1.5 GiB", "1 EiB",
    ]  # fmt: skip
