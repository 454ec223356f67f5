# SPDX-License-Identifier: Apache-2.0
"""Every command with good and bad arguments, and what it does to the program."""

from __future__ import annotations

from typing import Any

import pytest

from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_WRITE, UnixAddress
from bottomhalf.host.request import READ
from bottomhalf.monitor.commands import HANDLERS
from bottomhalf.monitor.storage import Storage
from bottomhalf.qapi.commands import COMMANDS
from bottomhalf.qapi.errors import OptionError
from bottomhalf.qapi.keyval import parse_options
from bottomhalf.qapi.objects import ObjectOptions
from tests.monitor.qmp_bench import NBD, QmpBench, QmpClient

NBD_START = {"addr": {"type": "unix", "data": {"path": NBD.path}}}
DISK = 1 << 20


@pytest.fixture
def bench() -> Any:
    with QmpBench() as made:
        made.monitor()
        made.host.add_file("/disk.raw", DISK)
        yield made


@pytest.fixture
def client(bench: QmpBench) -> QmpClient:
    return bench.client()


def add_disk(client: QmpClient, name: str = "disk", **options: Any) -> None:
    client.call("blockdev-add", {"driver": "file", "node-name": name, "filename": "/disk.raw", **options})


def export(name: str = "disk", **options: Any) -> dict[str, Any]:
    return {"type": "nbd", "id": f"e-{name}", "node-name": name, **options}


def test_query_commands(client: QmpClient) -> None:
    names = [info["name"] for info in client.call("query-commands")]
    assert sorted(names) == sorted([*HANDLERS, "qmp_capabilities"])
    assert set(names) <= set(COMMANDS)


def test_query_version(client: QmpClient) -> None:
    assert client.call("query-version", {})["qemu"] == {"major": 10, "minor": 0, "micro": 2}
    assert client.fails("query-version", {"x": 1}) == "Parameter 'x' is unexpected"


# -- nodes


def test_write_threshold(bench: QmpBench, client: QmpClient) -> None:
    add_disk(client)
    client.call("block-set-write-threshold", {"node-name": "disk", "write-threshold": 1000})
    assert client.call("query-named-block-nodes")[0]["write_threshold"] == 1000
    node = bench.storage.graph.nodes["disk"]
    bench.storage.loop.main.run(node.co_pwrite(900, memoryview(bytes(300))))
    event = client.wait_event("BLOCK_WRITE_THRESHOLD")
    assert event == {"amount-exceeded": 200, "node-name": "disk", "write-threshold": 1000}
    assert client.call("query-named-block-nodes")[0]["write_threshold"] == 0
    text = client.fails("block-set-write-threshold", {"node-name": "nope", "write-threshold": 1})
    assert text == "Device 'nope' not found"


def test_blockdev_add_and_query(client: QmpClient) -> None:
    add_disk(client)
    client.call("blockdev-add", {"driver": "raw", "node-name": "top", "file": "disk", "offset": 512})
    nodes = client.call("query-named-block-nodes")
    assert [node["node-name"] for node in nodes] == ["top", "disk"]
    assert [node["drv"] for node in nodes] == ["raw", "file"]
    assert nodes[1]["image"]["virtual-size"] == DISK and nodes[1]["image"]["filename"] == "/disk.raw"
    assert nodes[0]["image"]["virtual-size"] == DISK - 512
    assert not nodes[1]["ro"]


def test_blockdev_add_brings_children(client: QmpClient) -> None:
    file = {"driver": "file", "filename": "/disk.raw"}
    client.call("blockdev-add", {"driver": "raw", "node-name": "top", "file": file})
    names = [node["node-name"] for node in client.call("query-named-block-nodes")]
    assert len(names) == 2 and any(name.startswith("#block") for name in names)
    client.call("blockdev-del", {"node-name": "top"})
    assert client.call("query-named-block-nodes") == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"driver": "null-co"}, "'node-name' must be specified for the root node"),
        ({"node-name": "n"}, "Parameter 'driver' is missing"),
        ({"driver": "nope", "node-name": "n"}, "Parameter 'driver' does not accept value 'nope'"),
        ({"driver": 5, "node-name": "n"}, "Invalid parameter type for 'driver', expected: string"),
        ({"driver": "file", "node-name": "n"}, "Parameter 'filename' is missing"),
        (
            {"driver": "file", "node-name": "n", "filename": "/nope"},
            "Could not open '/nope': No such file or directory",
        ),
        (
            {"driver": "file", "node-name": "n", "filename": []},
            "Invalid parameter type for 'filename', expected: string",
        ),
        ({"driver": "null-co", "node-name": "1n"}, "Invalid node-name: '1n'"),
        ({"driver": "null-co", "node-name": "#block1"}, "Invalid node-name: '#block1'"),
        ({"driver": "null-co", "node-name": "n" * 32}, "Node name too long"),
        (
            {"driver": "raw", "node-name": "n", "file": "nope"},
            "Cannot find device='nope' nor node-name='nope'",
        ),
        (
            {"driver": "null-co", "node-name": "n", "colour": 1},
            "Parameter 'colour' is unexpected",
        ),
        (
            {"driver": "file", "node-name": "n", "filename": "/disk.raw", "aio": "native"},
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ),
        (
            {"driver": "null-co", "node-name": "n", "force-share": True},
            "force-share=on can only be used with read-only images",
        ),
    ],
)
def test_blockdev_add_refuses(client: QmpClient, arguments: dict[str, Any], text: str) -> None:
    assert client.fails("blockdev-add", arguments) == text
    assert client.call("query-named-block-nodes") == []


def test_blockdev_add_twice(client: QmpClient) -> None:
    add_disk(client)
    again = {"driver": "null-co", "node-name": "disk"}
    assert client.fails("blockdev-add", again) == "Duplicate nodes with node-name='disk'"


def test_blockdev_add_in_use_elsewhere(bench: QmpBench, client: QmpClient) -> None:
    lock = bench.host.other_process_lock(
        "/disk.raw", PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL & ~PERM_WRITE, name="qemu-kvm", pid=99
    )
    client.call("nbd-server-start", NBD_START)
    add_disk(client)
    text = client.fails("block-export-add", export(writable=True))
    assert text.startswith('Failed to get "write" lock')
    assert client.call("query-block-exports") == []
    lock.release()
    client.call("block-export-add", export(writable=True))


def test_blockdev_del_refuses(client: QmpClient) -> None:
    assert client.fails("blockdev-del", {}) == "Parameter 'node-name' is missing"
    assert client.fails("blockdev-del", {"node-name": "x"}) == "Failed to find node with node-name='x'"
    add_disk(client)
    client.call("blockdev-add", {"driver": "raw", "node-name": "top", "file": "disk"})
    assert "in use" in client.fails("blockdev-del", {"node-name": "disk"})
    client.call("blockdev-del", {"node-name": "top"})
    client.call("blockdev-del", {"node-name": "disk"})


def test_blockdev_del_of_an_implicit_node(client: QmpClient) -> None:
    file = {"driver": "file", "filename": "/disk.raw"}
    client.call("blockdev-add", {"driver": "raw", "node-name": "top", "file": file})
    implicit = next(n["node-name"] for n in client.call("query-named-block-nodes") if n["drv"] == "file")
    assert client.fails("blockdev-del", {"node-name": implicit}) == f"Node {implicit} is not owned by the monitor"


# -- the NBD server


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Parameter 'addr' is missing"),
        ({"addr": {"type": "unix"}}, "Parameter 'addr.data' is missing"),
        ({"addr": {"type": "nope", "data": {}}}, "Parameter 'type' does not accept value 'nope'"),
        ({"addr": {"type": "unix", "data": {}}}, "Parameter 'addr.data.path' is missing"),
        (
            {"addr": {"type": "unix", "data": {"path": "/run/" + "x" * 103}}},
            f"UNIX socket path '/run/{'x' * 103}' is too long",
        ),
        (
            {"addr": {"type": "unix", "data": {"path": "/x", "abstract": True}}},
            "Abstract socket names are not supported yet",
        ),
        (
            {"addr": {"type": "inet", "data": {"host": "localhost", "port": "99999"}}},
            "port '99999' is not a number from 0 to 65535",
        ),
        (
            {"addr": {"type": "inet", "data": {"host": "localhost", "port": "1", "to": 5}}},
            "Parameter 'to' is not supported yet",
        ),
        ({"addr": {"type": "fd", "data": {"str": "3"}}}, "Socket address type 'fd' is not supported yet"),
        ({**NBD_START, "tls-creds": "t"}, "No TLS credentials with id 't'"),
        (
            {**NBD_START, "max-connections": -1},
            "Parameter 'max-connections' expects uint32_t",
        ),
        ({"addr": {"type": "unix", "data": {"path": "/disk.raw"}}}, "Failed to bind socket to /disk.raw: "),
    ],
)
def test_nbd_server_start_refuses(client: QmpClient, arguments: dict[str, Any], text: str) -> None:
    refusal = client.fails("nbd-server-start", arguments)
    assert refusal.startswith(text) if text.endswith(": ") else refusal == text or text in refusal
    client.call("nbd-server-start", NBD_START)


def test_nbd_server_start_and_stop(bench: QmpBench, client: QmpClient) -> None:
    assert client.fails("nbd-server-stop") == "NBD server not running"
    client.call("nbd-server-start", NBD_START)
    assert client.fails("nbd-server-start", NBD_START) == "NBD server already running"
    client.call("nbd-server-stop")
    assert client.fails("nbd-server-stop") == "NBD server not running"
    with pytest.raises(OSError):
        bench.host.connect(NBD)
    client.call("nbd-server-start", NBD_START)


def test_nbd_server_over_tcp(bench: QmpBench, client: QmpClient) -> None:
    client.call("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "10809"}}})
    other = {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "10809"}}}
    client.call("nbd-server-stop")
    client.call("nbd-server-start", other)


def test_address_in_use(bench: QmpBench, client: QmpClient) -> None:
    listener = bench.host.listen(NBD)
    assert client.fails("nbd-server-start", NBD_START).startswith(f"Failed to bind socket to {NBD.path}: ")
    listener.close()
    client.call("nbd-server-start", NBD_START)


def test_max_connections(bench: QmpBench, client: QmpClient) -> None:
    """The next client waits until one has gone."""
    client.call("nbd-server-start", {**NBD_START, "max-connections": 1})
    add_disk(client)
    client.call("block-export-add", export())
    first = bench.nbd_client("disk")
    second = bench.host.connect(NBD)
    bench.settle()
    assert not second.take()
    first.close()
    bench.settle()
    assert second.take()
    second.close()


# -- exports


def test_export_add_and_query(client: QmpClient) -> None:
    client.call("nbd-server-start", NBD_START)
    assert client.call("query-block-exports") == []
    add_disk(client)
    client.call("block-export-add", export())
    client.call("block-export-add", {**export(), "id": "second", "name": "other"})
    assert client.call("query-block-exports") == [
        {"id": "second", "type": "nbd", "node-name": "disk", "shutting-down": False},
        {"id": "e-disk", "type": "nbd", "node-name": "disk", "shutting-down": False},
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"id": "1"}, "Invalid block export id"),
        ({"id": ""}, "Invalid block export id"),
        ({"id": None}, "Invalid parameter type for 'id', expected: string"),
        ({"node-name": "nope"}, "Cannot find device='' nor node-name='nope'"),
        ({"type": "nope"}, "Parameter 'type' does not accept value 'nope'"),
        ({"iothread": "nope"}, 'iothread "nope" not found'),
        ({"bitmaps": ["b"]}, "Bitmap 'b' is not found"),
        ({"allocation-depth": True}, "qemu:allocation-depth is not supported yet; remove 'allocation-depth'"),
        ({"name": "taken"}, "NBD server already has export named 'taken'"),
        ({"id": "first"}, "Block export id 'first' is already in use"),
        ({"name": "n" * 5000}, "export name 'nnnnnnnnnnnnnnnnnnnn...' too long"),
        ({"description": "n" * 5000}, "description 'nnnnnnnnnnnnnnnnnnnn...' too long"),
        ({"node-name": "ro", "writable": True}, "Cannot export read-only node as writable"),
    ],
)
def test_export_add_refuses(client: QmpClient, changes: dict[str, Any], text: str) -> None:
    client.call("nbd-server-start", NBD_START)
    add_disk(client)
    add_disk(client, "ro", **{"read-only": True})
    client.call("block-export-add", {**export(), "id": "first", "name": "taken"})
    before = client.call("query-block-exports")
    assert client.fails("block-export-add", {**export(), **changes}) == text
    assert client.call("query-block-exports") == before


def test_export_add_without_a_server(client: QmpClient) -> None:
    add_disk(client)
    assert client.fails("block-export-add", export()) == "NBD server not running"


def test_exported_node_cannot_be_deleted(bench: QmpBench, client: QmpClient) -> None:
    bench.serve(client, "a")
    assert "in use" in client.fails("blockdev-del", {"node-name": "a"})
    client.call("block-export-del", {"id": "e-a"})
    client.wait_event("BLOCK_EXPORT_DELETED")
    client.call("blockdev-del", {"node-name": "a"})


def test_export_del_refuses(bench: QmpBench, client: QmpClient) -> None:
    bench.serve(client, "a")
    assert client.fails("block-export-del", {"id": "nope"}) == "Export 'nope' is not found"
    assert client.fails("block-export-del", {"id": "e-a", "mode": "x"}) == (
        "Parameter 'mode' does not accept value 'x'"
    )
    nbd = bench.nbd_client("a")
    assert client.fails("block-export-del", {"id": "e-a"}) == "export 'e-a' still in use"
    nbd.good(nbd.read(0, 512))
    client.call("block-export-del", {"id": "e-a", "mode": "hard"})
    nbd.wait_end()
    assert client.wait_event("BLOCK_EXPORT_DELETED") == {"id": "e-a"}


def test_export_del_hard_with_requests_in_flight(bench: QmpBench, client: QmpClient) -> None:
    """The answer comes at once, the event when the disk is done; meanwhile the id is taken and the name free."""
    bench.serve(client, "a")
    nbd = bench.nbd_client("a")
    held = bench.host.fault(path="/a.raw", op=READ, hold=True)
    nbd.read(0, 512)
    connection = bench.storage.exports.exports["e-a"].connections[0]
    bench.until(lambda: connection.in_flight, "the request in the block layer")
    client.call("block-export-del", {"id": "e-a", "mode": "hard"})
    bench.settle()
    assert client.call("query-block-exports")[0]["shutting-down"] is True
    assert client.fails("block-export-del", {"id": "e-a"}) == "Export 'e-a' is already shutting down"
    again = {"type": "nbd", "id": "e-a", "node-name": "a"}
    assert client.fails("block-export-add", again) == "Block export id 'e-a' is already in use"
    client.call("block-export-add", {**again, "id": "new"})
    assert not client.events
    held.release()
    assert client.wait_event("BLOCK_EXPORT_DELETED") == {"id": "e-a"}
    client.call("block-export-add", {**again, "name": "once-more"})


def test_stop_removes_the_exports(bench: QmpBench, client: QmpClient) -> None:
    bench.serve(client, "a", "b")
    clients = [bench.nbd_client(name) for name in "ab"]
    client.call("nbd-server-stop")
    assert client.call("query-block-exports") == []
    assert sorted(event["data"]["id"] for event in client.events) == ["e-a", "e-b"]
    for nbd in clients:
        nbd.wait_end()
    for name in "ab":
        client.call("blockdev-del", {"node-name": name})


def test_bytes_through_it_all(bench: QmpBench, client: QmpClient, seed: int) -> None:
    bench.serve(client, "a")
    nbd = bench.nbd_client("a")
    for offset in range(0, 1 << 16, 4096):
        nbd.write(offset, bytes([offset >> 12]) * 4096)
    assert all(completion.error == 0 for completion in nbd.wait_all())
    nbd.good(nbd.flush())
    assert bench.host.durable_content("/a.raw")[: 1 << 16] == b"".join(bytes([n]) * 4096 for n in range(16))


# -- objects (on the command line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iothread", "Parameter 'id' is missing"),
        ("iothread,id=1x", "Parameter 'id' expects an identifier"),
        ("iothread,id=x,poll-max-ns=-1", "poll-max-ns value must be in range [0, 9223372036854775807]"),
        ("nope,id=x", "Parameter 'qom-type' does not accept value 'nope'"),
    ],
)
def test_object_refused(bench: QmpBench, text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        bench.storage.add_object(parse_options(ObjectOptions, text, implied_key="qom-type", loads=lambda text: None))
    assert str(caught.value) == message


def test_iothread_exports() -> None:
    """On this machine, for the simulated one has no threads: the node moves there and comes home."""
    storage = Storage()
    try:
        options = parse_options(ObjectOptions, "iothread,id=t,poll-max-ns=0", implied_key="qom-type", loads=str)
        storage.add_object(options)
        with pytest.raises(OptionError, match=r"attempt to add duplicate property 't' to object"):
            storage.add_object(options)
        from bottomhalf.qapi.block import BlockdevOptions
        from bottomhalf.qapi.export import BlockExportOptions
        from bottomhalf.qapi.visit import from_json

        node = storage.add_node(from_json(BlockdevOptions, {"driver": "null-co", "node-name": "n", "size": 512}))
        bad = from_json(BlockExportOptions, export("n", iothread="t"))
        with pytest.raises(Exception, match="NBD server not running"):
            storage.exports.add(bad)
        assert node.context is storage.loop.main
    finally:
        storage.close()


def test_paths_are_the_hosts(bench: QmpBench) -> None:
    assert bench.host.connect(UnixAddress("/run/qmp.sock"))
