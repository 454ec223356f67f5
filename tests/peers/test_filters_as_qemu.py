# SPDX-License-Identifier: Apache-2.0
"""The filters' options, errors, names and descriptions beside QEMU's, as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bottomhalf.tools import bh_storage_daemon
from tests.peers.test_same_as_qemu import MIB, OURS, compare, converse, normal

pytestmark = pytest.mark.peer

ADD = '{"execute": "blockdev-add", "arguments": {"node-name": "%s", %s}}'
NULL = '{"driver": "null-co", "size": 1048576}'
THROTTLE = '"driver": "throttle", "throttle-group": "g"'
INJECT = '{"event": "read_aio", "state": 2, "once": true, "sector": 5}'
SET_STATE = '{"event": "write_aio", "new_state": 2}'

GOOD = [
    '"driver": "throttle", "throttle-group": "g", "file": "f"',
    '"driver": "blkdebug", "image": "f"',
    f'"driver": "blkdebug", "align": 4096, "max-transfer": 8192, "image": {NULL}',
    f'"driver": "blkdebug", "image": {NULL}, "inject-error": [{INJECT}], "set-state": [{SET_STATE}]',
    f'"driver": "blkverify", "test": {NULL}, "raw": {NULL}',
    '"driver": "copy-on-read", "file": "f"',
    '"driver": "copy-on-read", "file": "f", "bottom": "f"',
    f'"driver": "preallocate", "file": {NULL}',
    f'"driver": "preallocate", "prealloc-align": 4096, "prealloc-size": 512, "file": {NULL}',
    '"driver": "snapshot-access", "file": "f"',
    f'"driver": "snapshot-access", "file": {{{THROTTLE}, "file": {NULL}}}',
    f'"driver": "raw", "detect-zeroes": "on", "file": {NULL}',
    f'"driver": "raw", "detect-zeroes": "unmap", "discard": "unmap", "file": {NULL}',
]
BAD = [
    '"driver": "throttle", "throttle-group": "nope", "file": "f"',
    '"driver": "throttle", "file": "f"',
    '"driver": "throttle", "throttle-group": "g"',
    '"driver": "blkdebug", "image": "f", "align": 3',
    '"driver": "blkdebug", "image": "f", "align": 1099511627776',
    '"driver": "blkdebug", "image": "f", "align": 4096, "max-transfer": 512',
    '"driver": "blkdebug", "image": "f", "align": 512, "opt-write-zero": 513',
    '"driver": "blkdebug", "image": "f", "opt-write-zero": 1024, "max-write-zero": 512',
    '"driver": "blkdebug", "image": "f", "align": 512, "opt-discard": 3',
    '"driver": "blkdebug", "image": "f", "opt-discard": 1000, "max-discard": 1500',
    '"driver": "blkdebug", "image": "f", "max-transfer": 1099511627776',
    '"driver": "blkdebug", "image": "f", "max-discard": -1',
    '"driver": "blkdebug", "image": "f", "inject-error": [{"event": "foo"}]',
    '"driver": "blkdebug", "image": "f", "inject-error": [{"errno": 5}]',
    '"driver": "copy-on-read", "file": "f", "bottom": "nope"',
    '"driver": "copy-on-read", "file": "f", "bottom": "n1"',
    '"driver": "compress", "file": "f"',
    '"driver": "preallocate", "file": "f", "prealloc-align": 1000',
    '"driver": "copy-before-write", "file": "f", "target": "nope"',
    '"driver": "copy-before-write", "file": "f", "target": "z", "min-cluster-size": 3',
    '"driver": "copy-before-write", "file": "f", "target": "z", "bitmap": {"node": "z", "name": "b"}',
    '"driver": "copy-before-write", "file": "f", "target": "z", "bitmap": {"node": "zz", "name": "b"}',
    '"driver": "copy-before-write", "file": "f", "target": "z", "cbw-timeout": -1',
    '"driver": "copy-before-write", "file": "f", "target": "z", "on-cbw-error": "x"',
    '"driver": "raw", "file": "f", "detect-zeroes": "unmap"',
]


def by_name(answers: list[str]) -> dict[str, str]:
    """The nodes that have a name, each as text: the order of members counts."""
    nodes = json.loads(answers[0])["return"]
    return {node["node-name"]: json.dumps(node) for node in nodes if not node["node-name"].startswith("#")}


def test_qmp(require: Callable[[str], str], tmp_path: Path) -> None:
    daemon = require("qemu-storage-daemon")
    (tmp_path / "d.raw").write_bytes(bytes(MIB))
    lines = ['{"execute": "qmp_capabilities"}']
    lines.append(ADD % ("f", f'"driver": "file", "filename": "{tmp_path}/d.raw"'))
    lines.append(ADD % ("z", '"driver": "null-co", "size": 1048576'))
    names = [f"n{number}" for number in range(len(GOOD))]
    lines += [ADD % (name, options) for name, options in zip(names, GOOD, strict=True)]
    lines += [ADD % ("bad", options) for options in BAD]
    lines.append('{"execute": "query-named-block-nodes", "arguments": {"flat": true}}')
    threshold = '{"execute": "block-set-write-threshold", "arguments": {"node-name": "%s", "write-threshold": 5}}'
    lines += [threshold % name for name in ("n0", "nope")]
    lines.append('{"execute": "query-named-block-nodes", "arguments": {"flat": true}}')
    lines += [f'{{"execute": "blockdev-del", "arguments": {{"node-name": "{name}"}}}}' for name in names]
    lines.append('{"execute": "quit"}')
    group = ["--object", "throttle-group,id=g,limits.iops-total=100"]
    theirs = converse([daemon, *group], lines)
    ours = converse([*OURS["qemu-storage-daemon"], *group], lines)
    for (line, them), (_, us) in zip(theirs, ours, strict=True):
        if "query" in line:  # node by node: children come before or after their parents
            expected, got = by_name(them), by_name(us)
            assert expected.keys() == got.keys()
            for name in expected:
                assert got[name] == expected[name]
        else:
            assert [normal(each) for each in us] == [normal(each) for each in them], line


@pytest.mark.parametrize(
    "limits",
    [
        "limits.iops-total=10,limits.iops-read=5",
        "limits.iops-total-max=10",
        "limits.iops-total=10,limits.iops-total-max=5",
        "limits.iops-total=10,limits.iops-total-max-length=0",
        "limits.iops-total=10,limits.iops-total-max-length=2",
        "limits.iops-size=5",
        "limits.iops-total=-1",
        "limits.iops-total=1000000000000001",
        "limits.iops-total=10,limits.iops-total-max=1000000000000000,limits.iops-total-max-length=2",
        "limits.iops-total=1,limits.iops-total-max-length=8589934592",
        "limits.bps-total=5,limits.bps-write-max=4",
        "limits.foo=1",
        "x-iops-total-max=5",
    ],
)
def test_limits(
    require: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limits: str
) -> None:
    words = ["--object", f"throttle-group,id=g,{limits}"]
    compare(require, monkeypatch, "qemu-storage-daemon", bh_storage_daemon.main, words, tmp_path)
