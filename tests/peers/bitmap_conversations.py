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
