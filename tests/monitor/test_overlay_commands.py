# SPDX-License-Identifier: Apache-2.0
"""Overlays and transactions over QMP, while clients read and write. What they refuse is compared with QEMU's own words
in tests/peers/test_same_as_qemu.py; here is where the data goes, and that undoing leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest

from tests.drivers.qcow2.bench import make
from tests.monitor.qmp_bench import QmpBench, QmpClient

DISK = 1 << 20
PIECE = 4096


def begin(bench: QmpBench) -> QmpClient:
    """The node ``base``, a qcow2 image, exported."""
    for name in ("base.qcow2", "other.qcow2"):
        make(bench.host, name, size=DISK)
    bench.monitor()
    client = bench.client()
    bench.serve(client, "zero")  # the server
    file = {"driver": "file", "filename": "base.qcow2"}
    client.call("blockdev-add", {"driver": "qcow2", "node-name": "base", "file": file})
    client.call("block-export-add", {"type": "nbd", "id": "e", "name": "disk", "node-name": "base", "writable": True})
    return client


def sync(node: str, name: str) -> dict[str, Any]:
    return {"node-name": node, "snapshot-file": f"{name}.qcow2", "snapshot-node-name": name}


def action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {key.replace("_", "-"): value for key, value in data.items()}}


def graph(client: QmpClient) -> Any:
    return client.call("x-debug-query-block-graph")


def test_what_is_written_afterwards_is_in_the_overlay(seed: int) -> None:
    with QmpBench(seed) as bench:
        client = begin(bench)
        disk = bench.nbd_client("disk")
        disk.wait(disk.write(0, b"a" * PIECE))
        cookies = [disk.write(offset, b"b" * PIECE) for offset in range(PIECE, 32 * PIECE, PIECE)]
        client.call("blockdev-snapshot-sync", sync("base", "top"))
        for cookie in cookies:
            disk.wait(cookie)
        before = bench.host.content("base.qcow2")
        disk.wait(disk.write(0, b"c" * PIECE))
        assert bench.host.content("base.qcow2") == before
        for offset, expected in ((0, b"c"), (PIECE, b"b"), (31 * PIECE, b"b"), (32 * PIECE, b"\0")):
            assert bytes(disk.wait(disk.read(offset, PIECE)).data) == expected * PIECE
        assert client.call("query-block-exports")[0]["node-name"] == "top"
        nodes = {node["node-name"]: node for node in client.call("query-named-block-nodes", {"flat": True})}
        assert nodes["base"]["ro"] and not nodes["top"]["ro"]
        disk.disconnect()


def test_an_overlay_without_users_is_closed_and_its_file_stays(seed: int) -> None:
    with QmpBench(seed) as bench:
        client = begin(bench)
        file = {"driver": "file", "filename": "other.qcow2"}
        client.call("blockdev-add", {"driver": "qcow2", "node-name": "other", "file": file})
        client.call("blockdev-snapshot-sync", sync("other", "lone"))
        assert "lone" not in {node["name"] for node in graph(client)["nodes"]}
        assert bench.host.content("lone.qcow2").startswith(b"QFI\xfb")
        client.call("blockdev-del", {"node-name": "other"})


ABORTED = (
    [action("blockdev-snapshot-sync", **sync("base", "top"))],
    [action("blockdev-snapshot", node="base", overlay="other")],
    [action("blockdev-snapshot-internal-sync", device="base", name="s")],
    [
        action("blockdev-snapshot-internal-sync", device="base", name="s"),
        action("blockdev-snapshot-sync", **sync("base", "top")),
        action("blockdev-snapshot", node="top", overlay="other"),
    ],
)


@pytest.mark.parametrize("actions", ABORTED)
def test_an_aborted_transaction_leaves_no_trace(seed: int, actions: list[dict[str, Any]]) -> None:
    with QmpBench(seed) as bench:
        client = begin(bench)
        options = {"driver": "qcow2", "node-name": "other", "backing": None}
        client.call("blockdev-add", {**options, "file": {"driver": "file", "filename": "other.qcow2"}})
        before = graph(client)
        disk = bench.nbd_client("disk")
        cookies = [disk.write(offset, b"b" * PIECE) for offset in range(0, 32 * PIECE, PIECE)]
        error = client.fails("transaction", {"actions": [*actions, action("abort")]})
        assert error == "Transaction aborted using Abort action"
        after = graph(client)
        assert [node["name"] for node in after["nodes"]] == [node["name"] for node in before["nodes"]]
        assert after["edges"] == before["edges"]
        for cookie in cookies:
            disk.wait(cookie)
        assert client.fails("blockdev-snapshot-delete-internal-sync", {"device": "base", "name": "s"}).startswith(
            "Snapshot with id"
        )
        client.call("transaction", {"actions": actions})  # the way is free
        assert bytes(disk.wait(disk.read(31 * PIECE, PIECE)).data) == b"b" * PIECE
        disk.disconnect()


def test_a_failure_in_the_middle_undoes_what_came_before(seed: int) -> None:
    with QmpBench(seed) as bench:
        client = begin(bench)
        before = graph(client)
        actions = [
            action("blockdev-snapshot-sync", **sync("base", "top")),
            action("blockdev-snapshot-internal-sync", device="zero", name="s"),
        ]
        assert "does not support internal snapshots" in client.fails("transaction", {"actions": actions})
        assert graph(client)["edges"] == before["edges"]


def test_another_name_in_an_image(seed: int) -> None:
    from bottomhalf.drivers.qcow2.header import Header

    with QmpBench(seed) as bench:
        client = begin(bench)
        client.call("blockdev-snapshot-sync", sync("base", "top"))
        arguments = {"device": "top", "image-node-name": "top", "backing-file": "elsewhere.qcow2"}
        client.call("change-backing-file", arguments)
        header = Header.parse(bench.host.content("top.qcow2"))
        assert (header.backing_file, header.backing_format) == ("elsewhere.qcow2", "qcow2")
        long = client.fails("change-backing-file", {**arguments, "backing-file": "x" * 2000})
        assert long.startswith("Could not change backing file to 'xxx")
        client.call("change-backing-file", {**arguments, "backing-file": ""})
        assert Header.parse(bench.host.content("top.qcow2")).backing_file is None
