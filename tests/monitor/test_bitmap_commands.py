# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps over QMP while a client writes. What is refused is compared with QEMU's own words in
tests/peers/test_same_as_qemu.py; here is what the bitmaps contain, and that an undone transaction leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest

from tests.drivers.qcow2.bench import make
from tests.monitor.qmp_bench import QmpBench, QmpClient

DISK = 1 << 20
PIECE = 4096


def begin(bench: QmpBench) -> QmpClient:
    """The node ``disk``, a qcow2 image with the persistent bitmap ``kept``, exported."""
    make(bench.host, "disk.qcow2", size=DISK, cluster_size=PIECE)
    bench.monitor()
    client = bench.client()
    bench.serve(client, "zero")  # the server
    file = {"driver": "file", "filename": "disk.qcow2"}
    client.call("blockdev-add", {"driver": "qcow2", "node-name": "disk", "file": file})
    client.call("block-export-add", {"type": "nbd", "id": "e", "name": "disk", "node-name": "disk", "writable": True})
    client.call("block-dirty-bitmap-add", {"node": "disk", "name": "kept", "persistent": True})
    return client


def bitmaps(client: QmpClient) -> dict[str, dict[str, Any]]:
    nodes = {node["node-name"]: node for node in client.call("query-named-block-nodes", {"flat": True})}
    return {each["name"]: each for each in nodes["disk"].get("dirty-bitmaps", [])}


def checksum(client: QmpClient, name: str) -> str:
    return str(client.call("x-debug-block-dirty-bitmap-sha256", {"node": "disk", "name": name})["sha256"])


def action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{kind}", "data": {"node": "disk", **data}}


def test_a_point_in_time_while_a_client_writes(seed: int) -> None:
    """An incremental backup begins: what was written before is in the copy, what comes afterwards in the bitmap."""
    with QmpBench(seed) as bench:
        client = begin(bench)
        disk = bench.nbd_client("disk")
        disk.wait(disk.write(0, b"a" * PIECE))
        cookies = [disk.write(offset, b"b" * PIECE) for offset in range(PIECE, 32 * PIECE, PIECE)]
        client.call(
            "transaction",
            {
                "actions": [
                    action("add", name="copy", disabled=True),
                    action("merge", target="copy", bitmaps=["kept"]),
                    action("clear", name="kept"),
                ]
            },
        )
        for cookie in cookies:
            disk.wait(cookie)
        disk.wait(disk.write(40 * PIECE, b"c"))
        found = bitmaps(client)
        assert found["copy"]["count"] + found["kept"]["count"] == 33 * PIECE, "each write is in exactly one"
        assert found["copy"]["count"] >= PIECE and found["kept"]["count"] >= PIECE
        client.call("block-dirty-bitmap-merge", {"node": "disk", "target": "kept", "bitmaps": ["copy"]})
        assert bitmaps(client)["kept"]["count"] == 33 * PIECE
        disk.disconnect()


ABORTED = [
    [action("clear", name="kept")],
    [action("disable", name="kept"), action("clear", name="kept"), action("enable", name="kept")],
    [action("add", name="new"), action("merge", target="new", bitmaps=["kept"]), action("clear", name="new")],
    [action("merge", target="kept", bitmaps=["second"])],
    [action("remove", name="second"), action("remove", name="kept")],
]


@pytest.mark.parametrize("actions", ABORTED, ids=range(len(ABORTED)))
def test_undone(actions: list[dict[str, Any]]) -> None:
    with QmpBench(1) as bench:
        client = begin(bench)
        disk = bench.nbd_client("disk")
        disk.wait(disk.write(5 * PIECE, b"a" * PIECE))
        client.call("block-dirty-bitmap-add", {"node": "disk", "name": "second", "granularity": 512})
        disk.wait(disk.write(9 * PIECE, b"a" * PIECE))
        before = bitmaps(client), checksum(client, "kept"), checksum(client, "second")
        error = client.fails("transaction", {"actions": [*actions, {"type": "abort", "data": {}}]})
        assert error == "Transaction aborted using Abort action"
        assert (bitmaps(client), checksum(client, "kept"), checksum(client, "second")) == before
        disk.wait(disk.write(20 * PIECE, b"a" * PIECE))
        found = bitmaps(client)
        assert (found["kept"]["count"], found["second"]["count"]) == (3 * PIECE, 2 * PIECE)
        client.call("transaction", {"actions": actions})
        disk.disconnect()


def test_it_is_still_there_after_the_end(seed: int) -> None:
    with QmpBench(seed) as bench:
        client = begin(bench)
        disk = bench.nbd_client("disk")
        offset = bench.host.random_bytes(1)[0] * PIECE
        disk.wait(disk.write(offset, b"a"))
        disk.disconnect()
        before = checksum(client, "kept")
        client.call("block-export-del", {"id": "e", "mode": "hard"})
        client.call("blockdev-set-active", {"node-name": "disk", "active": False})
        assert bitmaps(client) == {}
        client.call("blockdev-set-active", {"node-name": "disk", "active": True})
        assert checksum(client, "kept") == before
        client.call("block-dirty-bitmap-remove", {"node": "disk", "name": "kept"})
        assert bitmaps(client) == {}
