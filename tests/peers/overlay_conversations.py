# SPDX-License-Identifier: Apache-2.0
"""What is said to QEMU's daemon and to ours about overlays, transactions and the older names of exports; the form is
that of GRAPH in ``conversations``. A backslash joins a line with the next one. {q} and {r} are qcow2 images."""

from __future__ import annotations

import re

from tests.peers.conversations import spelled_out


def lines_of(conversation: str) -> str:
    """The conversation as QMP wants it."""
    return "\n".join(map(spelled_out, re.sub(r"\\\n *", "", conversation).strip().splitlines()))


# Overlays made on the spot and what happens to them; an overlay that nobody uses is gone at once.
OVERLAYS = r"""
qmp_capabilities
blockdev-add {"driver": "qcow2", "node-name": "b", "file": {"driver": "file", "filename": "{q}"}}
blockdev-add {"driver": "null-co", "node-name": "n", "size": 1048576}
blockdev-add {"driver": "qcow2", "node-name": "ro", "read-only": true, "file": \
    {"driver": "file", "filename": "{r}"}}
blockdev-snapshot-sync {"snapshot-file": "{dir}/s1.q"}
blockdev-snapshot-sync {"node-name": "nope", "snapshot-file": "{dir}/s1.q"}
blockdev-snapshot-sync {"device": "nope", "snapshot-file": "{dir}/s1.q"}
blockdev-snapshot-sync {"device": "b", "snapshot-file": "{dir}/s1.q"}
blockdev-snapshot-sync {"node-name": "b", "snapshot-file": "{dir}/s1.q"}
blockdev-snapshot-sync {"node-name": "b", "snapshot-file": "{dir}/s1.q", "snapshot-node-name": "1x"}
blockdev-snapshot-sync {"node-name": "b", "snapshot-file": "{dir}/s1.q", "snapshot-node-name": "n"}
blockdev-snapshot-sync \
    {"node-name": "b", "snapshot-file": "{dir}/s1.q", "snapshot-node-name": "s1", "format": "nope"}
blockdev-snapshot-sync \
    {"node-name": "b", "snapshot-file": "{dir}/s1.q", "snapshot-node-name": "s1", "format": "raw"}
blockdev-snapshot-sync \
    {"node-name": "b", "snapshot-file": "{dir}/s1.q", "snapshot-node-name": "s1", "mode": "nope"}
blockdev-snapshot-sync {"node-name": "b", "snapshot-file": "/nope/s1.q", "snapshot-node-name": "s1"}
blockdev-snapshot-sync \
    {"node-name": "b", "snapshot-file": "{dir}/nope.q", "snapshot-node-name": "s1", "mode": "existing"}
blockdev-snapshot-sync \
    {"node-name": "b", "snapshot-file": "{q}", "snapshot-node-name": "s1", "mode": "existing"}
x-debug-query-block-graph
blockdev-snapshot-sync {"node-name": "b", "snapshot-file": "{dir}/s1.q", "snapshot-node-name": "s1"}
blockdev-snapshot-sync {"node-name": "b", "snapshot-file": "{dir}/s2.q", "snapshot-node-name": "s2"}
blockdev-snapshot-sync {"node-name": "s1", "snapshot-file": "{dir}/s2.q", "snapshot-node-name": "s2"}
blockdev-snapshot-sync {"node-name": "n", "snapshot-file": "{dir}/s3.q", "snapshot-node-name": "s3"}
x-debug-query-block-graph
nbd-server-start {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}
block-export-add {"type": "nbd", "id": "e", "node-name": "b"}
blockdev-snapshot-sync {"node-name": "b", "snapshot-file": "{dir}/s4.q", "snapshot-node-name": "s4"}
blockdev-snapshot-sync {"node-name": "b", "snapshot-file": "{dir}/s5.q", "snapshot-node-name": "s5"}
blockdev-snapshot-sync {"node-name": "s4", "snapshot-file": "{dir}/s5.q", "snapshot-node-name": "s5"}
blockdev-snapshot {"node": "b", "overlay": "ro"}
query-block-exports
x-debug-query-block-graph
blockdev-snapshot-sync {"node-name": "ro", "snapshot-file": "{dir}/s6.q", "snapshot-node-name": "s6"}
transaction {"actions": [{"type": "blockdev-snapshot-sync", "data": \
    {"node-name": "s5", "snapshot-file": "{dir}/s7.q", "snapshot-node-name": "s7"}}, \
    {"type": "abort", "data": {}}]}
x-debug-query-block-graph
transaction {"actions": [{"type": "blockdev-snapshot-sync", "data": \
    {"node-name": "s5", "snapshot-file": "{dir}/s7.q", "snapshot-node-name": "s7"}}, \
    {"type": "blockdev-snapshot-internal-sync", "data": {"device": "s7", "name": "x"}}]}
x-debug-query-block-graph
blockdev-del {"node-name": "s2"}
blockdev-del {"node-name": "b"}
x-debug-query-block-graph
block-export-del {"id": "e"}
quit
"""

# Changes that are made together, and undone together.
TRANSACTIONS = r"""
qmp_capabilities
blockdev-add {"driver": "qcow2", "node-name": "b", "file": {"driver": "file", "filename": "{q}"}}
blockdev-add {"driver": "null-co", "node-name": "n", "size": 1048576}
blockdev-add {"driver": "qcow2", "node-name": "o", "file": \
    {"driver": "file", "filename": "{r}"}, "backing": null}
transaction {}
transaction {"actions": []}
transaction {"actions": [{"type": "nope", "data": {}}]}
transaction {"actions": [{"type": "abort"}]}
transaction {"actions": [{"type": "abort", "data": {}}]}
transaction {"actions": [], "properties": {"completion-mode": "grouped"}}
transaction {"actions": [{"type": "blockdev-snapshot", "data": \
    {"node": "b", "overlay": "o"}}], "properties": {"completion-mode": "grouped"}}
transaction {"actions": [], "properties": {"completion-mode": "nope"}}
transaction {"actions": [{"type": "blockdev-snapshot", "data": {"node": "b", "overlay": "nope"}}]}
transaction {"actions": [{"type": "blockdev-snapshot", "data": {"node": "b", "overlay": "o"}}, \
    {"type": "abort", "data": {}}]}
transaction {"actions": [{"type": "blockdev-snapshot-internal-sync", "data": \
    {"device": "b", "name": "s"}}, {"type": "abort", "data": {}}]}
blockdev-snapshot-delete-internal-sync {"device": "b", "name": "s"}
transaction {"actions": [{"type": "blockdev-snapshot-internal-sync", "data": {"device": "n", "name": "s"}}]}
transaction {"actions": [{"type": "blockdev-snapshot-internal-sync", "data": \
    {"device": "b", "name": "s"}}, {"type": "blockdev-snapshot-internal-sync", "data": \
    {"device": "b", "name": "s"}}]}
transaction {"actions": [{"type": "blockdev-snapshot-sync", "data": \
    {"node-name": "b", "snapshot-file": "{dir}/s1.q", "snapshot-node-name": "s1"}}, \
    {"type": "abort", "data": {}}]}
x-debug-query-block-graph
transaction {"actions": [{"type": "blockdev-snapshot-sync", "data": \
    {"node-name": "b", "snapshot-file": "{dir}/s1.q", "snapshot-node-name": "s1"}}, \
    {"type": "blockdev-snapshot", "data": {"node": "s1", "overlay": "o"}}]}
transaction {"actions": [{"type": "blockdev-snapshot", "data": {"node": "b", "overlay": "o"}}, \
    {"type": "blockdev-snapshot-internal-sync", "data": {"device": "o", "name": "s"}}]}
x-debug-query-block-graph
transaction {"actions": [{"type": "blockdev-snapshot-internal-sync", "data": {"device": "o", "name": "t"}}]}
quit
"""

# The names that commands of exports once had, and other names in images.
OLD_EXPORTS = r"""
qmp_capabilities
blockdev-add {"driver": "file", "node-name": "f", "filename": "{d}"}
blockdev-add {"driver": "raw", "node-name": "r", "file": "f"}
blockdev-add {"driver": "null-co", "node-name": "n", "size": 1048576}
nbd-server-add {"device": "n"}
blockdev-add {"driver": "file", "node-name": "ro", "filename": "{e}", "read-only": true}
nbd-server-remove {"name": "n"}
nbd-server-start {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}
nbd-server-add {"device": "nope"}
nbd-server-add {"device": "n", "name": "x"}
nbd-server-add {"device": "n", "name": "x"}
nbd-server-add {"device": "n"}
nbd-server-add {"device": "n", "writable": true}
nbd-server-add {"device": "r", "writable": true, "description": "hi"}
nbd-server-add {"device": "ro", "writable": true}
nbd-server-add {}
query-block-exports
nbd-server-remove {"name": "nope"}
nbd-server-remove {"name": "x", "mode": "nope"}
nbd-server-remove {"name": "x", "mode": "hard"}
nbd-server-remove {"name": "r"}
nbd-server-remove {"name": "n", "mode": "safe"}
block-export-add {"type": "nbd", "id": "e", "name": "named", "node-name": "n"}
nbd-server-remove {"name": "e"}
nbd-server-remove {"name": "named"}
nbd-server-stop
quit
"""

BACKING_NAMES = r"""
qmp_capabilities
blockdev-add {"driver": "null-co", "node-name": "n", "size": 1048576}
blockdev-add {"driver": "qcow2", "node-name": "b", "file": {"driver": "file", "filename": "{q}"}}
blockdev-add {"driver": "qcow2", "node-name": "t", "file": \
    {"driver": "file", "node-name": "tf", "filename": "{r}"}, "backing": "b"}
change-backing-file {"device": "nope", "image-node-name": "t", "backing-file": "x"}
change-backing-file {"device": "t", "image-node-name": "nope", "backing-file": "x"}
change-backing-file {"device": "t", "image-node-name": "n", "backing-file": "x"}
change-backing-file {"device": "r", "image-node-name": "r", "backing-file": "x"}
change-backing-file {"device": "b", "image-node-name": "b", "backing-file": "x"}
change-backing-file {"device": "t", "image-node-name": "b", "backing-file": "x"}
change-backing-file {"device": "t", "image-node-name": "tf", "backing-file": "x"}
change-backing-file {"device": "t", "image-node-name": "t", "backing-file": "new.qcow2"}
change-backing-file {"device": "n", "image-node-name": "t", "backing-file": "x"}
change-backing-file {"device": "t", "image-node-name": "t", "backing-file": ""}
change-backing-file {"device": "t", "image-node-name": "t"}
quit
"""
