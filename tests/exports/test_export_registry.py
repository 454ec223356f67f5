# SPDX-License-Identifier: Apache-2.0
"""Exports by id, as the monitor adds and removes them, with clients of the NBD server in front."""

from __future__ import annotations

import pytest

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockError
from bottomhalf.drivers.file import FileNode
from bottomhalf.exports.registry import ExportRegistry
from bottomhalf.qapi.export import (
    BlockExportOptions,
    BlockExportOptionsNbd,
    BlockExportRemoveMode,
    BlockExportType,
)
from tests.exports.nbd_bench import INET, Bench


class Managed(Bench):
    """A bench whose server and exports a registry owns. Its own server listens elsewhere, unused."""

    def __init__(self, seed: int = 0, connections_max: int = 100) -> None:
        super().__init__(seed)
        self.deleted: list[str] = []
        self.registry = ExportRegistry(self.graph, self._no_iothread, self.deleted.append, self.log.append)
        self.host.add_file("a.raw", b"content!" * 512)
        FileNode(self.graph, "node", filename="a.raw").monitor_owned = True
        self.server.stop()
        self.server = self.registry.start_nbd_server(INET, connections_max=connections_max, handshake_seconds_max=10)
        self.address = INET

    @staticmethod
    def _no_iothread(name: str) -> AioContext:
        raise BlockError(f"Cannot find iothread '{name}'")

    def add(self, export_id: str, name: str | None = None, **options: object) -> None:
        branch = BlockExportOptionsNbd(name=name)
        values = {"id": export_id, "type": BlockExportType("nbd"), "node_name": "node", "branch": branch, **options}
        self.registry.add(BlockExportOptions(**values))  # type: ignore[arg-type]

    def close(self) -> None:
        self._remember_all()
        self.registry.close()
        self.graph.nodes["node"].monitor_owned = False
        self.context.poll(False)
        super().close()


def test_exports_are_added_listed_and_served() -> None:
    with Managed() as bench:
        bench.add("e0")
        bench.add("e1", "other")
        assert sorted((info.id, info.node_name, info.shutting_down) for info in bench.registry.infos()) == [
            ("e0", "node", False),
            ("e1", "node", False),
        ]
        for name in ("node", "other"):
            client = bench.client(name)
            assert client.good(client.read(0, 8)).data == b"content!"


@pytest.mark.parametrize(
    ("export_id", "name", "options", "message"),
    [
        ("0bad", None, {}, "Invalid block export id"),
        ("e0", "free", {}, "'e0' is already in use"),
        ("e1", "node", {}, "already has export named 'node'"),
        ("e1", "n" * 5000, {}, "too long"),
        ("e1", None, {"node_name": "nix"}, "Cannot find"),
    ],
)
def test_exports_that_cannot_be(export_id: str, name: str, options: dict[str, object], message: str) -> None:
    with Managed() as bench:
        bench.add("e0")
        with pytest.raises(BlockError, match=message):
            bench.add(export_id, name, **options)
        assert list(bench.registry.exports) == ["e0"]
        assert len(bench.graph.nodes["node"].parents) == 1


def test_safe_removal_wants_no_clients_and_hard_removal_sends_them_away(seed: int) -> None:
    with Managed(seed) as bench:
        bench.add("e0")
        client = bench.client("node")
        with pytest.raises(BlockError, match="still in use"):
            bench.registry.remove("e0", BlockExportRemoveMode.SAFE)
        client.read(0, 4096)
        bench.registry.remove("e0", BlockExportRemoveMode.HARD)
        assert [info.shutting_down for info in bench.registry.infos()] == [True]
        with pytest.raises(BlockError, match="shutting down"):
            bench.registry.remove("e0", BlockExportRemoveMode.HARD)
        bench.until(lambda: bench.deleted, "the export to be deleted")
        client.wait_end()
        assert bench.deleted == ["e0"] and not bench.registry.infos()
        bench.add("e0")
        bench.registry.remove("e0", BlockExportRemoveMode.SAFE)
        bench.until(lambda: len(bench.deleted) == 2, "the export to be deleted")
        with pytest.raises(BlockError, match="not found"):
            bench.registry.remove("e0", BlockExportRemoveMode.SAFE)


def test_stopping_the_server_removes_its_exports(seed: int) -> None:
    with Managed(seed) as bench:
        bench.add("e0")
        bench.add("e1", "b", writable=True)
        clients = [bench.client("node"), bench.client("b")]
        for client in clients:
            client.read(0, 4096)
        bench.registry.stop_nbd_server()
        assert sorted(bench.deleted) == ["e0", "e1"]
        for client in clients:
            client.wait_end()
        with pytest.raises(BlockError, match="not running"):
            bench.registry.stop_nbd_server()
        with pytest.raises(BlockError, match="not running"):
            bench.add("e2")


def test_single_connection_servers_do_not_promise_coherence() -> None:
    with Managed(connections_max=1) as bench:
        bench.add("e0")
        client = bench.client("node")
        assert client.handshake is not None and client.handshake.negotiated is not None
        assert not client.handshake.negotiated.export.flags & 1 << 8  # NBD_FLAG_CAN_MULTI_CONN
