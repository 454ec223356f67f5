# SPDX-License-Identifier: Apache-2.0
"""From options to nodes and back: what is opened, inherited, refused; what a node tells; QEMU says the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.block import BlockError, Node
from bottomhalf.drivers import registry
from bottomhalf.drivers.describe import file_name
from bottomhalf.drivers.null import NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.drivers.registry import CHILD_DEPTH_MAX, Opening, describe_node, open_node, register_driver
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_WRITE
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json, to_json
from tests.block.bench import Bench, bench, read, sim_bench


def opened(it: Bench, options: dict[str, Any]) -> Any:
    return open_node(it.graph, from_json(BlockdevOptions, options))


def refused(it: Bench, text: str, **options: Any) -> None:
    """The options are refused in these words, and nothing is left of the attempt."""
    before, descriptors = dict(it.graph.nodes), len(it.host.world.descriptors)
    with pytest.raises(BlockError, match=f"^{re.escape(text)}$"):
        opened(it, {key.replace("_", "-"): value for key, value in options.items()})
    assert it.graph.nodes == before
    assert len(it.host.world.descriptors) == descriptors
    assert not any(node.parents for node in before.values())


FILE = {"driver": "file", "filename": "disk"}


class TestOpening:
    def test_every_driver(self) -> None:
        with sim_bench(0, disk=4096) as it:
            file = opened(it, {**FILE, "node-name": "f"})
            raw = opened(it, {"driver": "raw", "node-name": "r", "file": "f", "offset": 512, "size": 1024})
            null = opened(it, {"driver": "null-aio", "size": 512, "read-zeroes": True, "latency-ns": 5})
            assert [node.driver for node in (file, raw, null)] == ["file", "raw", "null-aio"]
            assert opened(it, {"driver": "null-co"}).size == 1 << 30
            assert (raw.offset, raw.size, raw.children[0].node) == (512, 1024, file)
            assert (null.size, null.latency_ns, null.read_zeroes) == (512, 5, True)
            assert it.graph.find("r") is raw and null.name.startswith("#block")
            assert not any(node.monitor_owned for node in it.graph.nodes.values())

    def test_inline_children(self) -> None:
        with sim_bench(0, disk=4096) as it:
            inner = {"driver": "raw", "node-name": "mid", "file": FILE}
            node = opened(it, {"driver": "raw", "node-name": "top", "file": inner})
            node.monitor_owned = True
            mid = node.children[0].node
            assert (mid.name, mid.children[0].node.driver) == ("mid", "file")
            with pytest.raises(BlockError, match="not owned by the monitor"):
                it.graph.delete("mid")
            it.graph.delete("top")
            assert not it.graph.nodes

    def test_options_reach_the_file(self) -> None:
        with sim_bench(0, disk=4096) as it:
            node = opened(
                it, {**FILE, "cache": {"direct": True, "no-flush": True}, "discard": "unmap", "locking": "off"}
            )
            assert (node.file.direct, node.no_flush, node.unmap, node.file._opener) == (True, True, True, None)
            node = opened(it, {**FILE, "read-only": True, "force-share": True, "aio": "io_uring"})
            assert node.read_only and node.force_share

    def test_what_children_inherit(self) -> None:
        with sim_bench(0, disk=4096) as it:

            def child(own: dict[str, Any], **parent: Any) -> Any:
                options = {key.replace("_", "-"): value for key, value in parent.items()}
                return opened(it, {"driver": "raw", "file": {**FILE, **own}, **options}).children[0].node

            node = child({})
            assert (node.read_only, node.unmap, node.force_share, node.file.direct) == (False, True, False, False)
            node = child({}, read_only=True, force_share=True, cache={"direct": True, "no-flush": True})
            assert (node.read_only, node.force_share, node.file.direct, node.no_flush) == (True, True, True, True)
            node = child({"read-only": False, "cache": {"direct": False}}, read_only=True, cache={"direct": True})
            assert (node.read_only, node.file.direct, node.no_flush) == (False, False, False)
            node = child({"cache": {"no-flush": True}}, cache={"direct": True})
            assert (node.file.direct, node.no_flush) == (True, True)
            assert not child({"discard": "ignore"}, discard="unmap").unmap
            assert not child({}, node_name="named").name.startswith("named")

    def test_auto_read_only_goes_down_and_comes_up(self) -> None:
        host = SimHost(0)
        host.add_file("fixed", 512, writable=False)
        with bench(host) as it:
            options = {"driver": "raw", "file": {"driver": "file", "filename": "fixed"}}
            with pytest.raises(BlockError, match=r"^Could not open 'fixed': Permission denied$"):
                opened(it, options)
            node = opened(it, {**options, "auto-read-only": True})
            assert not node.read_only and not node.children[0].node.read_only
            with pytest.raises(BlockError, match=r"^Could not open 'fixed': Permission denied$"):
                it.backend(node)
            assert it.user(node, held=PERM_CONSISTENT_READ).do(read(0, 512)) == [0]

    def test_a_driver_of_ones_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "_OPENERS", dict(registry._OPENERS))
        monkeypatch.delitem(registry._OPENERS, "null-co")

        def open_it(opening: Opening) -> Node:
            return NullCoNode(opening.graph, **opening.common, size=opening.branch.size * 2)

        register_driver("null-co", open_it)
        with sim_bench(0) as it:
            assert opened(it, {"driver": "null-co", "size": 512}).size == 1024
        with pytest.raises(AssertionError):
            register_driver("raw", open_it)

    def test_a_driver_that_needs_permissions_of_its_children_has_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Format(RawNode):
            def child_permissions(self, edge: Any, held: int, shared: int) -> tuple[int, int]:
                return self.storage_permissions(held | PERM_WRITE, shared)

        monkeypatch.setitem(
            registry._OPENERS, "raw", lambda o: Format(o.graph, **o.common, file=o.child(o.branch.file))
        )
        with sim_bench(0, disk=4096) as it:
            node = opened(it, {"driver": "raw", "file": FILE})
            assert node.children[0].node.permissions[0] & PERM_WRITE
            with pytest.raises(OSError):
                it.host.other_process_lock("disk", PERM_WRITE, PERM_ALL)
            before = dict(it.graph.nodes)
            with pytest.raises(BlockError, match=r'^Failed to get "consistent read" lock|^Failed to get "write" lock'):
                opened(it, {"driver": "raw", "file": FILE})
            assert it.graph.nodes == before

    def test_a_driver_is_loaded_when_it_is_needed(self) -> None:
        code = (
            "import sys, bottomhalf.drivers.registry\n"
            "loaded = [name for name in sys.modules if name.startswith('bottomhalf.drivers.')]\n"
            "assert loaded == ['bottomhalf.drivers.registry'], loaded\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestRefusals:
    def test_of_common_options(self) -> None:
        with sim_bench(0, disk=4096) as it:
            refused(it, "force-share=on can only be used with read-only images", **FILE, force_share=True)
            refused(
                it,
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
                **FILE,
                detect_zeroes="unmap",
            )
            text = "Inactive 'asleep' can't be a file child of active 'disk'"
            asleep = {**FILE, "node-name": "asleep", "active": False}
            refused(it, text, driver="raw", node_name="disk", file=asleep)
            refused(it, "Invalid node-name: '#x'", **FILE, node_name="#x")
            refused(it, "Could not open 'none': No such file or directory", driver="file", filename="none")
            refused(
                it,
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
                **FILE,
                aio="native",
            )
            text = "No persistent reservation manager with id 'x': there are none here; leave it out"
            refused(it, text, **FILE, pr_manager="x")
            refused(it, "latency-ns is invalid", driver="null-co", latency_ns=1 << 63)
            opened(it, {**FILE, "detect-zeroes": "off", "active": True})
            opened(it, {**FILE, "aio": "native", "cache": {"direct": True}})

    def test_nothing_is_left_of_children(self) -> None:
        with sim_bench(0, disk=4096) as it:
            kept = opened(it, {"driver": "null-co", "node-name": "kept", "size": 1024})
            text = "Duplicate nodes with node-name='kept'"
            refused(it, text, driver="raw", node_name="kept", file=FILE)
            refused(it, text, driver="raw", node_name="kept", file={"driver": "raw", "node-name": "mid", "file": FILE})
            refused(it, text, driver="raw", file={"driver": "raw", "node-name": "kept", "file": FILE})
            refused(it, "Specified size is not multiple of 512", driver="raw", size=100, file=FILE)
            refused(it, "Specified size is not multiple of 512", driver="raw", size=100, file="kept")
            refused(it, "Cannot find device='x' nor node-name='x'", driver="raw", file="x")
            assert it.graph.nodes == {"kept": kept}, "a child given by name is left alone"

    def test_an_unknown_driver(self) -> None:
        with sim_bench(0) as it:
            options = from_json(BlockdevOptions, {"driver": "null-co"})
            with pytest.raises(BlockError, match=r"^Unknown driver 'quorum'$"):
                open_node(it.graph, options.replace(driver="quorum"))

    def test_nesting_has_a_limit(self) -> None:
        options: dict[str, Any] = {"driver": "null-co"}
        for _ in range(CHILD_DEPTH_MAX):
            options = {"driver": "raw", "file": options}
        with sim_bench(0) as it:
            opened(it, options)
            refused_options = {"driver": "raw", "file": options}
            before = dict(it.graph.nodes)
            with pytest.raises(BlockError, match="nested deeper"):
                opened(it, refused_options)
            assert it.graph.nodes == before


class TestDescriptions:
    def test_a_node(self) -> None:
        with sim_bench(0, disk=b"x" * 4096 + bytes(4096)) as it:
            node = opened(it, {**FILE, "node-name": "f", "read-only": True, "cache": {"no-flush": True}})
            told = to_json(describe_node(node))
            assert told["file"] == told["image"]["filename"] == "disk"
            assert (told["node-name"], told["drv"], told["ro"], told["active"]) == ("f", "file", True, True)
            assert told["cache"] == {"writeback": True, "direct": False, "no-flush": True}
            image = {**told["image"]}
            assert image.pop("actual-size") == node.allocated_size()
            assert image == {
                "filename": "disk",
                "format": "file",
                "dirty-flag": False,
                "virtual-size": 8192,
                "format-specific": {"type": "file", "data": {}},
            }

    def test_nodes_that_were_not_made_from_options(self) -> None:
        with sim_bench(0, disk=4096) as it:
            file = it.file("disk")
            assert file_name(RawNode(it.graph, file=file)).startswith('json:{"offset": 0, "driver": "raw"')
            assert to_json(describe_node(file))["file"] == "disk"


class Daemon:
    """A storage daemon that we did not write, and QMP to it."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self._line()
        self.execute("qmp_capabilities")

    def _line(self) -> Any:
        return json.loads(self._process.stdout.readline())

    def execute(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        while "event" in (answer := self._line()):
            pass
        return answer


# What both are given, in this order; {dir} is the test's directory. Refused ones leave nothing in either.
SAME: list[dict[str, Any]] = [
    {"driver": "file", "filename": "{dir}/none", "node-name": "x"},
    {"driver": "file", "filename": "{dir}", "node-name": "x"},
    {"driver": "file", "filename": "{dir}/a", "node-name": "x", "force-share": True},
    {"driver": "file", "filename": "{dir}/a", "node-name": "f"},
    {"driver": "file", "filename": "{dir}/a", "node-name": "f"},
    {"driver": "file", "filename": "{dir}/a", "node-name": "locked", "locking": "off", "aio": "threads"},
    {"driver": "file", "filename": "{dir}/a", "node-name": "x", "aio": "native"},
    {"driver": "file", "filename": "{dir}/a", "node-name": "1x"},
    {"driver": "file", "filename": "{dir}/a", "node-name": "x" * 32},
    {"driver": "raw", "file": "nope", "node-name": "x"},
    {"driver": "raw", "file": "f", "node-name": "r"},
    {"driver": "raw", "file": "r", "node-name": "rr"},
    {"driver": "raw", "file": "f", "node-name": "r0", "offset": 0},
    {"driver": "raw", "file": "f", "node-name": "r1", "offset": 512, "read-only": True},
    {"driver": "raw", "file": "f", "node-name": "r2", "size": 1024, "discard": "unmap"},
    {"driver": "raw", "file": "f", "node-name": "r3", "offset": 100},
    {"driver": "raw", "file": "f", "node-name": "x", "offset": 1 << 30},
    {"driver": "raw", "file": "f", "node-name": "x", "offset": 512, "size": 1 << 30},
    {"driver": "raw", "file": "f", "node-name": "x", "size": 100},
    {"driver": "raw", "file": "f", "node-name": "x", "detect-zeroes": "unmap"},
    {"driver": "raw", "file": {"driver": "file", "filename": "{dir}/a"}, "node-name": "c", "cache": {"no-flush": True}},
    {"driver": "raw", "file": {"driver": "file", "filename": "{dir}/a", "read-only": True}, "node-name": "ro"},
    {"driver": "raw", "file": {"driver": "null-co", "size": 1024, "latency-ns": 7}, "node-name": "rn"},
    {"driver": "null-co", "node-name": "n1", "latency-ns": 5},
    {"driver": "null-aio", "node-name": "n2", "size": 1024, "read-zeroes": True},
    {"driver": "null-aio", "node-name": "n3", "read-zeroes": False, "read-only": True},
    {"driver": "null-co", "node-name": "x", "latency-ns": 1 << 63},
]


@pytest.mark.peer
def test_qemu_answers_and_describes_the_same(tmp_path: Path, require: Callable[[str], str]) -> None:
    path = require("qemu-storage-daemon")
    (tmp_path / "a").write_bytes(b"x" * 8192)
    same = json.loads(json.dumps(SAME).replace("{dir}", str(tmp_path)))
    command = [path, "--chardev", "stdio,id=c", "--monitor", "chardev=c"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        bench(LinuxHost()) as it,
    ):
        try:
            daemon = Daemon(process)
            for options in same:
                theirs = daemon.execute("blockdev-add", **options).get("error", {}).get("desc")
                ours = None
                try:
                    opened(it, options).monitor_owned = True
                except BlockError as error:
                    ours = str(error).partition("\n")[0]
                assert ours == theirs, options
            listed = daemon.execute("query-named-block-nodes")["return"]
            theirs = {node["node-name"]: node for node in listed if not node["node-name"].startswith("#")}
            for name, node in theirs.items():
                told = to_json(describe_node(it.graph.find(name)))
                # QEMU counts sizes in sectors and rounds up; ours are exact, as what one reads and writes is.
                told["image"]["virtual-size"] = -(-told["image"]["virtual-size"] // 512) * 512
                assert told == node
            assert len(theirs) == sum(not name.startswith("#") for name in it.graph.nodes)
        finally:
            process.terminate()
