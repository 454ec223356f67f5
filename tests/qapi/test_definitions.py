# SPDX-License-Identifier: Apache-2.0
"""What is defined: options of the command line, commands, help, introspection, reference page."""

from __future__ import annotations

from typing import Any

import pytest

from bottomhalf.qapi.block import BlockdevOptions, BlockdevOptionsGenericFormat
from bottomhalf.qapi.block_info import BlockDeviceInfo, ImageInfoSpecific, ImageInfoSpecificFile
from bottomhalf.qapi.char import ChardevSocket, ChardevStdio, check_chardev_socket, parse_chardev
from bottomhalf.qapi.command_line import option_type
from bottomhalf.qapi.commands import COMMANDS, EVENTS, event_data, parse_command
from bottomhalf.qapi.control import MonitorMode, MonitorOptions
from bottomhalf.qapi.errors import HelpRequested, OptionError, QmpError
from bottomhalf.qapi.export import (
    BlockDirtyBitmap,
    BlockExportDel,
    BlockExportDeleted,
    BlockExportOptions,
    BlockExportOptionsNbd,
    BlockExportRemoveMode,
    NbdServerOptions,
    NbdServerOptionsLegacy,
)
from bottomhalf.qapi.help import render_help
from bottomhalf.qapi.keyval import parse_options
from bottomhalf.qapi.objects import IothreadProperties, ObjectOptions
from bottomhalf.qapi.reference import render_reference
from bottomhalf.qapi.schema import differences, schema
from bottomhalf.qapi.sockets import InetSocketAddress, SocketAddressType, UnixSocketAddress
from bottomhalf.qapi.types import members
from bottomhalf.qapi.visit import from_json, to_json
from bottomhalf.wire.json_reader import loads


def option(name: str, text: str) -> Any:
    type, implied_key = option_type(name)
    return parse_options(type, text, implied_key=implied_key, loads=loads)


def test_commands_and_events() -> None:
    assert {"qmp_capabilities", "blockdev-add", "object-add", "chardev-add", "qom-list", "quit"} <= set(COMMANDS)
    assert "BLOCK_EXPORT_DELETED" in EVENTS
    for cls in (*COMMANDS.values(), *EVENTS.values()):
        assert cls.__doc__, cls


def test_a_command_is_found_and_its_arguments_checked() -> None:
    command, arguments = parse_command("block-export-del", {"id": "e", "mode": "hard"})
    assert command is BlockExportDel
    assert arguments == BlockExportDel(id="e", mode=BlockExportRemoveMode.HARD)
    _, boxed = parse_command("block-export-add", {"type": "nbd", "id": "e", "node-name": "n"})
    assert isinstance(boxed, BlockExportOptions)


@pytest.mark.parametrize(
    ("name", "arguments", "class_name", "desc"),
    [
        ("nope", {}, "CommandNotFound", "The command nope has not been found"),
        ("quit", {"x": 1}, "GenericError", "Parameter 'x' is unexpected"),
        ("block-export-del", {}, "GenericError", "Parameter 'id' is missing"),
        ("block-export-del", {"id": 1}, "GenericError", "Invalid parameter type for 'id', expected: string"),
        (
            "block-export-del",
            {"id": "e", "mode": "soft"},
            "GenericError",
            "Parameter 'mode' does not accept value 'soft'",
        ),
        ("qmp_capabilities", {"enable": ["x"]}, "GenericError", "Parameter 'null' does not accept value 'x'"),
    ],
)
def test_refused_commands(name: str, arguments: Any, class_name: str, desc: str) -> None:
    with pytest.raises(QmpError) as caught:
        parse_command(name, arguments)
    assert (caught.value.class_name, caught.value.desc) == (class_name, desc)


def test_no_command_runs_out_of_band() -> None:
    with pytest.raises(QmpError, match="The command quit does not support OOB"):
        parse_command("quit", {}, oob=True)


def test_events() -> None:
    assert event_data(BlockExportDeleted(id="e")) == {"id": "e"}


def test_nbd_server_in_both_spellings() -> None:
    flat = option("--nbd-server", "addr.type=unix,addr.path=/s,max-connections=0")
    assert isinstance(flat, NbdServerOptions)
    assert (flat.max_connections, flat.handshake_max_seconds) == (0, 10)
    assert flat.addr.type is SocketAddressType.UNIX
    assert flat.addr.branch == UnixSocketAddress(path="/s")
    old = from_json(
        NbdServerOptionsLegacy, {"addr": {"type": "unix", "data": {"path": "/s"}}, "max-connections": 0}
    )
    assert old.flatten() == flat
    inet = option("--nbd-server", "addr.type=inet,addr.host=::1,addr.port=10809,addr.keep-alive=on")
    assert inet.addr.branch == InetSocketAddress(host="::1", port="10809", keep_alive=True)
    fd = from_json(NbdServerOptionsLegacy, {"addr": {"type": "fd", "data": {"str": "3"}}}).flatten()
    assert to_json(fd.addr) == {"type": "fd", "str": "3"}
    with pytest.raises(OptionError, match=r"Parameter 'addr\.host' is missing"):
        option("--nbd-server", "addr.type=inet,addr.port=1")
    with pytest.raises(OptionError, match="Parameter 'max-connections' expects uint32_t"):
        option("--nbd-server", "addr.type=unix,addr.path=/s,max-connections=4294967296")


def test_exports() -> None:
    export = option(
        "--export", "nbd,id=e,node-name=n,writable=on,name=x,bitmaps.0=b,bitmaps.1.node=m,bitmaps.1.name=c"
    )
    assert (export.type, export.id, export.node_name) == ("nbd", "e", "n")
    assert export.writable is True
    assert (export.writethrough, export.fixed_iothread, export.iothread) == (False, False, None)
    bitmaps = ["b", BlockDirtyBitmap(node="m", name="c")]
    assert export.branch == BlockExportOptionsNbd(name="x", bitmaps=bitmaps)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="Parameter 'type' does not accept value 'ndb'") as caught:
        option("--export", "ndb,id=e,node-name=n")
    assert caught.value.hint == "Did you mean 'nbd'?"


def test_unknown_options_are_named_with_the_nearest() -> None:
    with pytest.raises(OptionError) as caught:
        option("--blockdev", "file,nodename=n,filename=/x")
    assert str(caught.value) == "Parameter 'nodename' is unexpected"
    assert (caught.value.key, caught.value.hint) == ("nodename", "Did you mean 'node-name'?")


def test_a_driver_adds_its_own_branch() -> None:
    try:
        BlockdevOptions.register_branch("x-mine", BlockdevOptionsGenericFormat, "mine")
        options = option("--blockdev", "x-mine,node-name=m,file=n")
        assert options.branch == BlockdevOptionsGenericFormat(file="n")
    finally:
        del BlockdevOptions.branches["x-mine"]
        del options.driver.values["x-mine"]


def test_monitor_and_object() -> None:
    assert option("--monitor", "c0,pretty=on") == MonitorOptions(chardev="c0", pretty=True)
    assert option("--monitor", "chardev=c0,mode=readline").mode is MonitorMode.READLINE
    iothread = option("--object", "iothread,id=t0,poll-max-ns=0")
    assert isinstance(iothread, ObjectOptions)
    assert (iothread.id, iothread.branch) == ("t0", IothreadProperties(poll_max_ns=0))


def test_chardev_socket() -> None:
    chardev = parse_chardev("socket,id=m,path=/tmp/s,server=on,wait=off")
    assert (chardev.id, chardev.mux, chardev.backend.type) == ("m", False, "socket")
    data = chardev.backend.branch.data  # type: ignore[attr-defined]
    assert isinstance(data, ChardevSocket)
    assert (data.server, data.wait) == (True, False)
    assert data.addr.flatten().branch == UnixSocketAddress(path="/tmp/s")
    client = parse_chardev("socket,id=m,host=h,port=5,nodelay=on,reconnect-ms=100")
    data = client.backend.branch.data  # type: ignore[attr-defined]
    assert (data.server, data.wait, data.nodelay, data.reconnect_ms) == (False, None, True, 100)
    assert data.addr.flatten().branch == InetSocketAddress(host="h", port="5")
    waiting = parse_chardev("socket,id=m,fd=3,server=on")
    data = waiting.backend.branch.data  # type: ignore[attr-defined]
    assert data.wait is True
    assert to_json(data.addr) == {"type": "fd", "data": {"str": "3"}}


def test_chardev_stdio() -> None:
    stdio = parse_chardev("stdio,id=s,signal=off,mux=on,logfile=/l,width=80")
    assert stdio.mux
    assert stdio.backend.branch.data == ChardevStdio(signal=False, logfile="/l")  # type: ignore[attr-defined]
    default = parse_chardev("stdio,id=s")
    assert default.backend.branch.data == ChardevStdio(signal=True)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id=a", 'chardev: "a" missing backend'),
        ("stdio", "chardev: no id specified"),
        ("nope,id=a", "'nope' is not a valid char driver name"),
        ("stdio,id=a,bogus=1", "Invalid parameter 'bogus'"),
        ("stdio,id=a,signal=maybe", "Parameter 'signal' expects 'on' or 'off'"),
        ("socket,id=a,path=x,host=y", "None or one of 'path', 'fd' or 'host' option required."),
        ("socket,id=a,host=y", "chardev: socket: no port given"),
        ("socket,id=a", "chardev: socket: no path, host or fd given"),
        ("socket,id=a,path=x,delay=on,nodelay=on", "'delay' and 'nodelay' are mutually exclusive"),
        (
            "socket,id=a,path=x,reconnect=1,reconnect-ms=1",
            "'reconnect' and 'reconnect-ms' are mutually exclusive",
        ),
        ("socket,id=a,path=x,wait=on", "'wait' option is incompatible with socket in client connect mode"),
        (
            "socket,id=a,path=x,server=on,reconnect=1",
            "'reconnect' option is incompatible with socket in server listen mode",
        ),
    ],
)
def test_chardev_errors(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_chardev(text)
    assert str(caught.value) == message


def test_chardev_help() -> None:
    with pytest.raises(HelpRequested) as caught:
        parse_chardev("help")
    assert "reconnect-ms=NUMBER" in str(caught.value)


def test_a_server_made_by_qmp_need_not_say_so() -> None:
    with pytest.raises(OptionError, match="'reconnect' option"):
        check_chardev_socket(
            from_json(ChardevSocket, {"addr": {"type": "unix", "data": {"path": "/s"}}, "reconnect": 1})
        )


def test_node_info_has_the_names_that_it_has() -> None:
    names = [member.name for member in members(BlockDeviceInfo)]
    assert names[:9] == [
        "file", "node-name", "ro", "drv", "backing_file", "backing_file_depth", "active", "encrypted",
        "detect_zeroes",
    ]  # fmt: skip
    assert names[-5:] == ["iops_size", "group", "cache", "write_threshold", "dirty-bitmaps"]
    specific = from_json(ImageInfoSpecific, {"type": "file", "data": {}})
    assert specific.branch.data == ImageInfoSpecificFile()  # type: ignore[attr-defined]


def test_help_texts() -> None:
    text = render_help(BlockdevOptions, implied_key="driver")
    assert "  raw                The bytes of another node" in text
    assert "cache.direct=on|off" in text
    assert text.endswith("The first word may be the value of driver.")
    text = render_help(BlockExportOptions, implied_key="type", tag="nbd")
    assert "bitmaps.N=TEXT" in text
    assert "writable=on|off" in text
    text = render_help(NbdServerOptions)
    assert "addr.path=TEXT" in text
    assert "[100]" in text
    for line in text.splitlines():
        assert line == line.rstrip()


def test_reference_page() -> None:
    page = render_reference()
    for name in (*COMMANDS, *EVENTS):
        assert f"### `{name}`" in page
    for word in ("### BlockdevOptions", "### BlockdevRef", "### SocketAddressType", "`backing_file`"):
        assert word in page
    targets = {line[4:].strip("`").lower() for line in page.splitlines() if line.startswith("### ")}
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links <= targets
    assert "None" not in page


UPSTREAM = [
    {"name": "block-export-del", "ret-type": "2", "meta-type": "command", "arg-type": "64"},
    {"name": "2", "members": [], "meta-type": "object"},
    {
        "name": "64",
        "members": [{"name": "id", "type": "str"}, {"name": "mode", "default": None, "type": "156"}],
        "meta-type": "object",
    },
    {
        "name": "156",
        "members": [{"name": "safe"}, {"name": "hard"}],
        "meta-type": "enum",
        "values": ["safe", "hard"],
    },
    {"name": "query-block-exports", "ret-type": "[66]", "meta-type": "command", "arg-type": "2"},
    {"name": "[66]", "element-type": "66", "meta-type": "array"},
    {
        "name": "66",
        "members": [
            {"name": "id", "type": "str"},
            {"name": "type", "type": "157"},
            {"name": "node-name", "type": "str"},
            {"name": "shutting-down", "type": "bool"},
        ],
        "meta-type": "object",
    },
    {
        "name": "157",
        "members": [{"name": "nbd"}, {"name": "fuse"}],
        "meta-type": "enum",
        "values": ["nbd", "fuse"],
    },
    {"name": "BLOCK_EXPORT_DELETED", "meta-type": "event", "arg-type": "65"},
    {"name": "65", "members": [{"name": "id", "type": "str"}], "meta-type": "object"},
    {"name": "str", "json-type": "string", "meta-type": "builtin"},
    {"name": "bool", "json-type": "boolean", "meta-type": "builtin"},
]


def ours(masked: bool = False) -> list[dict[str, Any]]:
    heads = {entity["name"] for entity in UPSTREAM if entity["meta-type"] in ("command", "event")}
    return [
        entity
        for entity in schema(masked=masked)
        if entity["meta-type"] not in ("command", "event") or entity["name"] in heads
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_introspection_has_the_shape_that_upstream_has(masked: bool) -> None:
    assert differences(ours(masked), UPSTREAM) == []


def test_differences_are_found() -> None:
    assert "blockdev-add: unknown" in differences(schema(), UPSTREAM)
    changed = [dict(entity) for entity in UPSTREAM]
    changed[2] = {**changed[2], "members": [{"name": "id", "default": None, "type": "bool"}]}
    changed[7] = {**changed[7], "values": ["fuse"]}
    found = differences(ours(), changed)
    assert found == [
        "block-export-del(arg-type).id: optional on one side only",
        "block-export-del(arg-type).id: string against boolean",
        "block-export-del(arg-type): members ['id', 'mode'] against ['id']",
        "query-block-exports(ret-type)[].type: values ['nbd'] are not there",
    ]


def test_introspection_is_complete_and_consistent() -> None:
    for masked in (False, True):
        entities = schema(masked=masked)
        names = [entity["name"] for entity in entities]
        assert len(names) == len(set(names))
        for entity in entities:
            for key in ("arg-type", "ret-type", "element-type"):
                assert entity.get(key, "str") in names
            for member in (*entity.get("members", ()), *entity.get("variants", ())):
                assert member.get("type", "str") in names
