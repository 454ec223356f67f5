# SPDX-License-Identifier: Apache-2.0
"""What is said to QEMU's daemon and to ours about jobs; the form is that of ``overlay_conversations``. After each
``blockdev-create`` and ``x-blockdev-amend`` the job is looked at and dismissed (see ``job_lines``), and all have the id
"j". {f} is an empty file, {h} another, {d} a raw image, {q} and {e} qcow2 images, {e} encrypted with the secret s."""

from __future__ import annotations

import re

from tests.peers.conversations import spelled_out


def job_lines(conversation: str) -> list[str]:
    """The conversation as QMP wants it."""
    lines = []
    for line in re.sub(r"\\\n *", "", conversation).strip().splitlines():
        name, _, arguments = line.partition(" ")
        if name == "create":
            line = f'blockdev-create {{"job-id": "j", "options": {arguments}}}'
        elif name == "amend":
            node, _, options = arguments.partition(" ")
            line = f'x-blockdev-amend {{"job-id": "j", "node-name": "{node}", "options": {options}}}'
        elif name == "keys":
            node, _, options = arguments.partition(" ")
            line = (
                f'x-blockdev-amend {{"job-id": "j", "node-name": "{node}", "options": '
                f'{{"driver": "qcow2", "encrypt": {{"format": "luks", {options}}}}}}}'
            )
        lines.append(spelled_out(line))
        if name in ("create", "amend", "keys"):
            lines += map(spelled_out, ["query-jobs", "query-block-jobs", 'job-dismiss {"id": "j"}'])
    return lines


# Verbs without and with a job, which has ended; ids; what cannot be made at all.
VERBS = r"""
qmp_capabilities
query-jobs
query-jobs {"x": 1}
query-block-jobs
query-block-jobs {"x": 1}
job-pause {"id": "nope"}
job-resume {"id": "nope"}
job-cancel {"id": "nope"}
job-complete {"id": "nope"}
job-dismiss {"id": "nope"}
job-finalize {"id": "nope"}
job-pause
job-resume {"id": 1}
job-cancel {"id": "x", "force": true}
job-complete {"id": null}
job-dismiss {"id": "x", "y": 1}
job-finalize {"ID": "x"}
blockdev-create {"job-id": "1x", "options": {"driver": "file", "filename": "{f}", "size": 1048576}}
blockdev-create {"options": {"driver": "file", "filename": "{f}", "size": 1048576}}
blockdev-create {"job-id": "", "options": {"driver": "file", "filename": "{f}", "size": 1048576}}
blockdev-create {"job-id": "j"}
create {"driver": "nope"}
create {"driver": "raw"}
create {"driver": "null-co"}
create {"driver": "throttle"}
create {"filename": "{f}"}
create {"driver": "file"}
create {"driver": "file", "filename": "{f}"}
create {"driver": "file", "filename": "{f}", "size": "x"}
create {"driver": "file", "filename": "{f}", "size": 1, "x": 1}
create {"driver": "file", "filename": "{f}", "size": -1}
create {"driver": "file", "filename": "{f}", "size": 1048577}
blockdev-create {"job-id": "a", "options": {"driver": "file", "filename": "{f}", "size": 1048576}}
blockdev-create {"job-id": "b", "options": {"driver": "file", "filename": "{h}", "size": 1048576}}
query-jobs
blockdev-create {"job-id": "a", "options": {"driver": "file", "filename": "{f}", "size": 1048576}}
job-pause {"id": "a"}
job-resume {"id": "a"}
job-cancel {"id": "a"}
job-complete {"id": "a"}
job-finalize {"id": "a"}
query-block-jobs
job-dismiss {"id": "a"}
query-jobs
job-dismiss {"id": "b"}
quit
"""

FILES = r"""
qmp_capabilities
create {"driver": "file", "filename": "/nope/x", "size": 1048576}
create {"driver": "file", "filename": "{dir}", "size": 1048576}
create {"driver": "file", "filename": "{f}", "size": 1048576, "preallocation": "metadata"}
create {"driver": "file", "filename": "{f}", "size": 1048576, "preallocation": "nope"}
create {"driver": "file", "filename": "{f}", "size": 1048577, "preallocation": "full", "nocow": true}
create {"driver": "file", "filename": "{f}", "size": 1048577, "preallocation": "falloc", "extent-size-hint": 4096}
create {"driver": "file", "filename": "{f}", "size": 0, "extent-size-hint": 1}
blockdev-add {"driver": "file", "node-name": "f", "filename": "{f}"}
create {"driver": "file", "filename": "{f}", "size": 4096}
nbd-server-start {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}
block-export-add {"type": "nbd", "id": "f", "node-name": "f", "writable": true}
create {"driver": "file", "filename": "{f}", "size": 4096}
quit
"""

QCOW2 = r"""
qmp_capabilities
object-add {"qom-type": "secret", "id": "s", "data": "abc"}
blockdev-add {"driver": "file", "node-name": "f", "filename": "{f}"}
blockdev-add {"driver": "file", "node-name": "h", "filename": "{h}"}
blockdev-add {"driver": "file", "node-name": "ro", "read-only": true, "filename": "{d}"}
blockdev-add {"driver": "null-co", "node-name": "n", "size": 1048576}
create {"driver": "qcow2", "file": "nope", "size": 1048576}
create {"driver": "qcow2", "file": "ro", "size": 1048576}
create {"driver": "qcow2", "file": "ro", "size": 1048576, "cluster-size": 1000}
create {"driver": "qcow2", "file": "f", "data-file": "nope", "size": 1048576, "cluster-size": 1000}
create {"driver": "qcow2", "file": "f", "size": 1048576, "cluster-size": 256}
create {"driver": "qcow2", "file": "f", "size": 1048576, "refcount-bits": 3}
create {"driver": "qcow2", "file": "f", "size": 1048576, "refcount-bits": -1}
create {"driver": "qcow2", "file": "f", "size": 1048576, "refcount-bits": 8, "version": "v2"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "version": "v2", "lazy-refcounts": true}
create {"driver": "qcow2", "file": "f", "size": 1048576, "version": "v2", "extended-l2": true}
create {"driver": "qcow2", "file": "f", "size": 1048576, "version": "v2", "compression-type": "zstd"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "version": "v2", "data-file": "h"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "version": "v4"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "extended-l2": true, "cluster-size": 4096}
create {"driver": "qcow2", "file": "f", "size": 1048576, "data-file-raw": true}
create {"driver": "qcow2", "file": "f", "size": 1048576, "data-file-raw": true, "data-file": "h", "backing-file": "x"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "backing-fmt": "raw"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "backing-file": "x", "preallocation": "full"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "backing-file": "x", "backing-fmt": "nope"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "encrypt": {"format": "luks"}}
create {"driver": "qcow2", "file": "f", "size": 1048576, "encrypt": {"format": "luks", "key-secret": "nope"}}
create {"driver": "qcow2", "file": "f", "size": 1048576, "encrypt": {"format": "aes", "key-secret": "s"}}
create {"driver": "qcow2", "file": "f", "size": 1048576, "encrypt": {"format": "qcow"}}
create {"driver": "qcow2", "file": "f", "size": 1048576, "encrypt": {"format": "qcow", "key-secret": "s"}}
create {"driver": "qcow2", "file": "f", "data-file": "f", "size": 1048576}
create {"driver": "qcow2", "file": "f", "data-file": "ro", "size": 1048576}
create {"driver": "qcow2", "file": "f", "size": 9223372036854775808}
create {"driver": "qcow2", "file": "f", "size": 1048577}
create {"driver": "qcow2", "file": "n", "size": 1048576}
create {"driver": "qcow2", "file": {"driver": "file", "filename": "/nope/x"}, "size": 1048576}
create {"driver": "qcow2", "file": {"driver": "nope", "filename": "/nope/x"}, "size": 1048576}
create {"driver": "qcow2", "file": {"driver": "raw", "file": "f"}, "size": 1048576}
create {"driver": "qcow2", "file": {"driver": "file", "filename": "{f}"}, "size": 1048576}
create {"driver": "qcow2", "file": "f", "size": 0}
create {"driver": "qcow2", "file": "f", "size": 1048576, "preallocation": "metadata"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "preallocation": "full"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "backing-file": "/nope/y", "backing-fmt": "qcow2"}
create {"driver": "qcow2", "file": "f", "size": 1048576, "data-file": "h", "data-file-raw": true}
create {"driver": "qcow2", "file": "f", "size": 1048576, "cluster-size": 4096, "refcount-bits": 64}
blockdev-add {"driver": "qcow2", "node-name": "q", "file": "f"}
create {"driver": "qcow2", "file": "f", "size": 1048576}
create {"driver": "qcow2", "file": "q", "size": 1048576}
x-debug-query-block-graph
blockdev-del {"node-name": "q"}
blockdev-del {"node-name": "f"}
quit
"""

# (A LUKS volume that QEMU makes takes it seconds, whatever the options say, and amending one ends QEMU 10.0's daemon.)
LUKS = r"""
qmp_capabilities
object-add {"qom-type": "secret", "id": "s", "data": "abc"}
object-add {"qom-type": "secret", "id": "s2", "data": "def"}
object-add {"qom-type": "secret", "id": "s3", "data": "ghi"}
blockdev-add {"driver": "file", "node-name": "f", "filename": "{f}"}
blockdev-add {"driver": "file", "node-name": "ro", "read-only": true, "filename": "{d}"}
create {"driver": "luks", "file": "f", "size": 1048576}
create {"driver": "luks", "file": "f", "size": 1048576, "key-secret": "nope"}
create {"driver": "luks", "size": 1048576, "key-secret": "s"}
create {"driver": "luks", "file": "ro", "size": 1048576, "key-secret": "s"}
create {"driver": "luks", "file": "nope", "size": 1048576, "key-secret": "s"}
create {"driver": "luks", "file": "f", "size": 1048576, "key-secret": "s", "cipher-mode": "nope"}
create {"driver": "luks", "file": "f", "key-secret": "s"}
create {"driver": "luks", "file": "f", "size": 1048577, "key-secret": "s", "iter-time": 10}
blockdev-add {"driver": "luks", "node-name": "l", "file": "f", "key-secret": "s"}
blockdev-add {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "{e}"}, \
    "encrypt": {"format": "luks", "key-secret": "s"}}
blockdev-add {"driver": "qcow2", "node-name": "p", "file": {"driver": "file", "filename": "{q}"}}
amend nope {"driver": "qcow2"}
amend f {"driver": "file"}
amend f {"driver": "luks", "state": "active"}
amend q {"driver": "luks", "state": "x"}
amend q {"driver": "luks"}
amend q {}
amend q {"driver": "luks", "state": "active"}
amend q {"driver": "qcow2", "encrypt": {"format": "qcow"}}
amend q {"driver": "qcow2"}
amend p {"driver": "qcow2"}
x-blockdev-amend {"job-id": "1", "node-name": "q", "options": {"driver": "qcow2"}}
x-blockdev-amend {"job-id": "j", "node-name": "q", "options": {"driver": "qcow2"}, "force": 1}
keys p "state": "active", "new-secret": "s2"
keys q "state": "active"
keys q "state": "active", "new-secret": "nope"
keys q "state": "active", "new-secret": "s2", "old-secret": "s"
keys q "state": "active", "new-secret": "s2", "keyslot": 8
keys q "state": "active", "new-secret": "s2", "keyslot": -1
keys q "state": "active", "new-secret": "s2", "keyslot": 0, "iter-time": 10
keys q "state": "active", "new-secret": "s2", "secret": "s3", "iter-time": 10
keys q "state": "active", "new-secret": "s2", "secret": "nope", "iter-time": 10
keys q "state": "inactive"
keys q "state": "inactive", "new-secret": "s2"
keys q "state": "inactive", "keyslot": 3
keys q "state": "inactive", "keyslot": 8
keys q "state": "inactive", "keyslot": 0
keys q "state": "inactive", "old-secret": "s"
keys q "state": "inactive", "old-secret": "s3"
keys q "state": "active", "new-secret": "s2", "iter-time": 10
keys q "state": "active", "new-secret": "s3", "keyslot": 1, "iter-time": 10
keys q "state": "inactive", "old-secret": "s2", "keyslot": 0
keys q "state": "inactive", "old-secret": "s2", "keyslot": 1
keys q "state": "inactive", "iter-time": 10, "keyslot": 5
quit
"""
