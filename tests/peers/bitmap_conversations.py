# SPDX-License-Identifier: Apache-2.0
"""What is said to QEMU's daemon and to ours about dirty bitmaps; the form is that of ``overlay_conversations``."""

from __future__ import annotations

# Bitmaps in memory: what is refused and why, what is told of them, what a transaction undoes.
IN_MEMORY = r"""
qmp_capabilities
blockdev-add {"driver": "null-co", "node-name": "n", "size": 1048576}
blockdev-add {"driver": "null-co", "node-name": "m", "size": 2097152}
block-dirty-bitmap-add {}
block-dirty-bitmap-add {"node": "nope", "name": ""}
block-dirty-bitmap-add {"node": "nope", "name": "b"}
block-dirty-bitmap-add {"node": "n", "name": "b", "granularity": 0}
block-dirty-bitmap-add {"node": "n", "name": "b", "granularity": 256}
block-dirty-bitmap-add {"node": "n", "name": "b", "granularity": 513}
block-dirty-bitmap-add {"node": "n", "name": "b", "granularity": 4294967296}
block-dirty-bitmap-add {"node": "n", "name": "b", "granularity": -1}
block-dirty-bitmap-add {"node": "n", "name": "b", "persistent": true}
block-dirty-bitmap-add {"node": "n", "name": "b", "persistent": true, "granularity": 3}
block-dirty-bitmap-add {"node": "n", "name": "b"}
block-dirty-bitmap-add {"node": "n", "name": "b"}
block-dirty-bitmap-add {"node": "n", "name": "b", "persistent": true}
block-dirty-bitmap-add {"node": "n", "name": "off", "disabled": true, "granularity": 512}
block-dirty-bitmap-add {"node": "n", "name": "large", "granularity": 2147483648}
block-dirty-bitmap-add {"node": "m", "name": "other", "granularity": 1024}
query-named-block-nodes
query-block
block-dirty-bitmap-remove {"node": "n", "name": "nope"}
block-dirty-bitmap-clear {"node": "nope", "name": "b"}
block-dirty-bitmap-clear {"node": "n", "name": "nope"}
block-dirty-bitmap-clear {"node": "n", "name": "b"}
block-dirty-bitmap-enable {"node": "nope", "name": "b"}
block-dirty-bitmap-enable {"node": "n", "name": "nope"}
block-dirty-bitmap-enable {"node": "n", "name": "off"}
block-dirty-bitmap-disable {"node": "nope", "name": "b"}
block-dirty-bitmap-disable {"node": "n", "name": "nope"}
block-dirty-bitmap-disable {"node": "n", "name": "b"}
query-named-block-nodes
block-dirty-bitmap-merge {"node": "nope", "target": "b", "bitmaps": ["off"]}
block-dirty-bitmap-merge {"node": "n", "target": "nope", "bitmaps": ["off"]}
block-dirty-bitmap-merge {"node": "n", "target": "b", "bitmaps": ["nope"]}
block-dirty-bitmap-merge {"node": "n", "target": "b", "bitmaps": [{"node": "nope", "name": "b"}]}
block-dirty-bitmap-merge {"node": "n", "target": "b", "bitmaps": [{"node": "m", "name": "nope"}]}
block-dirty-bitmap-merge {"node": "n", "target": "b", "bitmaps": ["off", {"node": "m", "name": "other"}]}
block-dirty-bitmap-merge {"node": "n", "target": "b", "bitmaps": [1]}
block-dirty-bitmap-merge {"node": "n", "target": "b", "bitmaps": ["b", "off", {"node": "n", "name": "large"}]}
x-debug-block-dirty-bitmap-sha256 {"node": "nope", "name": "b"}
x-debug-block-dirty-bitmap-sha256 {"node": "n", "name": "nope"}
x-debug-block-dirty-bitmap-sha256 {"node": "n", "name": "b"}
x-debug-block-dirty-bitmap-sha256 {"node": "n", "name": "off"}
x-debug-block-dirty-bitmap-sha256 {"node": "n", "name": "large"}
transaction {"actions": [{"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b"}}], \
    "properties": {"completion-mode": "grouped"}}
transaction {"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "n", "name": "t"}}, \
    {"type": "block-dirty-bitmap-merge", "data": {"node": "n", "target": "t", "bitmaps": ["b"]}}, \
    {"type": "block-dirty-bitmap-enable", "data": {"node": "n", "name": "b"}}, \
    {"type": "block-dirty-bitmap-disable", "data": {"node": "n", "name": "off"}}, \
    {"type": "block-dirty-bitmap-remove", "data": {"node": "n", "name": "large"}}, \
    {"type": "abort", "data": {}}]}
query-named-block-nodes
transaction {"actions": [{"type": "block-dirty-bitmap-remove", "data": {"node": "n", "name": "large"}}, \
    {"type": "block-dirty-bitmap-add", "data": {"node": "n", "name": "large"}}]}
transaction {"actions": [{"type": "block-dirty-bitmap-remove", "data": {"node": "n", "name": "large"}}, \
    {"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "large"}}]}
transaction {"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "n", "name": "t"}}, \
    {"type": "block-dirty-bitmap-remove", "data": {"node": "n", "name": "large"}}, \
    {"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b"}}, \
    {"type": "block-dirty-bitmap-enable", "data": {"node": "n", "name": "b"}}, \
    {"type": "block-dirty-bitmap-disable", "data": {"node": "n", "name": "off"}}]}
query-named-block-nodes
block-dirty-bitmap-remove {"node": "n", "name": "t"}
block-dirty-bitmap-remove {"node": "n", "name": "t"}
query-named-block-nodes
blockdev-del {"node-name": "n"}
quit
"""

# Bitmaps that an image keeps and an export shows.
PERSISTENT = r"""
qmp_capabilities
blockdev-add {"driver": "qcow2", "node-name": "b", "file": {"driver": "file", "node-name": "f", "filename": "{q}"}}
blockdev-add {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "b"}
block-dirty-bitmap-add {"node": "b", "name": "on", "persistent": true}
block-dirty-bitmap-add {"node": "b", "name": "off", "persistent": true, "disabled": true, "granularity": 4096}
block-dirty-bitmap-add {"node": "b", "name": "memory", "disabled": true}
block-dirty-bitmap-add {"node": "f", "name": "below", "persistent": true}
blockdev-set-active {"node-name": "b", "active": false}
block-dirty-bitmap-clear {"node": "b", "name": "on"}
blockdev-set-active {"node-name": "b", "active": true}
block-dirty-bitmap-add {"node": "b", "name": "on"}
x-debug-block-dirty-bitmap-sha256 {"node": "b", "name": "off"}
blockdev-reopen {"options": [{"driver": "qcow2", "node-name": "b", "read-only": true, "file": \
    {"driver": "file", "node-name": "f", "filename": "{q}", "read-only": true}}]}
block-dirty-bitmap-remove {"node": "b", "name": "on"}
block-dirty-bitmap-clear {"node": "b", "name": "on"}
block-dirty-bitmap-disable {"node": "b", "name": "on"}
block-dirty-bitmap-enable {"node": "b", "name": "on"}
block-dirty-bitmap-merge {"node": "b", "target": "on", "bitmaps": ["memory"]}
block-dirty-bitmap-merge {"node": "b", "target": "memory", "bitmaps": ["on"]}
blockdev-reopen {"options": [{"driver": "qcow2", "node-name": "b", "read-only": false, "file": \
    {"driver": "file", "node-name": "f", "filename": "{q}", "read-only": false}}]}
block-dirty-bitmap-clear {"node": "b", "name": "on"}
nbd-server-start {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}
block-export-add {"type": "nbd", "id": "e", "node-name": "b", "bitmaps": ["nope"]}
block-export-add {"type": "nbd", "id": "e", "node-name": "b", "bitmaps": ["on"]}
block-export-add {"type": "nbd", "id": "e", "node-name": "b", "bitmaps": [{"node": "nope", "name": "on"}]}
block-export-add {"type": "nbd", "id": "e", "node-name": "b", "bitmaps": [{"node": "b", "name": "nope"}]}
block-export-add {"type": "nbd", "id": "e", "node-name": "b", "bitmaps": ["on", "off"], "writable": true}
block-export-add {"type": "nbd", "id": "e2", "name": "e2", "node-name": "b", "bitmaps": ["off"]}
nbd-server-add {"device": "b", "name": "e3", "bitmap": "memory"}
block-dirty-bitmap-remove {"node": "b", "name": "on"}
block-dirty-bitmap-clear {"node": "b", "name": "on"}
block-dirty-bitmap-enable {"node": "b", "name": "on"}
block-dirty-bitmap-disable {"node": "b", "name": "on"}
block-dirty-bitmap-merge {"node": "b", "target": "on", "bitmaps": ["off"]}
block-dirty-bitmap-add {"node": "b", "name": "more"}
block-dirty-bitmap-merge {"node": "b", "target": "more", "bitmaps": ["on"]}
block_resize {"node-name": "b", "size": 2097152}
block-export-del {"id": "e"}
block-dirty-bitmap-clear {"node": "b", "name": "on"}
block_resize {"node-name": "b", "size": 2097152}
transaction {"actions": [{"type": "block-dirty-bitmap-remove", "data": {"node": "b", "name": "on"}}, \
    {"type": "block-dirty-bitmap-add", "data": {"node": "b", "name": "more"}}]}
block-dirty-bitmap-remove {"node": "b", "name": "on"}
block-dirty-bitmap-remove {"node": "b", "name": "off"}
block-export-del {"id": "e3"}
quit
"""
