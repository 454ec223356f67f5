# SPDX-License-Identifier: Apache-2.0
"""What is said to QEMU's daemon and to ours, a line a command, to compare the answers. Each line is
answered before the next is sent; {dir} and {image} are the test's."""

from __future__ import annotations

QMP = r"""
{"execute": "query-version"}
{"execute": "qmp_capabilities", "arguments": {"enable": "foo"}}
{"execute": "qmp_capabilities", "arguments": {"x": 1}}
{"execute": "qmp_capabilities", "arguments": {"enable": ["foo"]}}
{"execute": "qmp_capabilities"}
{"execute": "qmp_capabilities", "id": 1}
{"execute": "foo"}
{"execute": "foo", "id": {"a": [1, null, "x"]}}
[1]
{"id": 3}
{"execute": 1}
{"execute": "query-block-exports", "arguments": 1}
{"execute": "query-block-exports", "arguments": {"a": 1}}
{"execute": "query-block-exports", "foo": 1}
{"execute": "query-block-exports",}
xyz
{"exec-oob": "query-block-exports"}
{"execute": "query-block-exports"}
{"execute": "query-named-block-nodes"}
{"execute": "blockdev-add", "arguments": {"driver": "null-co"}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "a", "size": 1048576}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "a"}}
{"execute": "blockdev-add", "arguments": {"driver": "nope", "node-name": "b"}}
{"execute": "blockdev-add", "arguments": {"node-name": "b"}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b"}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b", "filename": "/nope/x"}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b", "filename": 1}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b", "filename": "x", "locking": "maybe"}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "c", "filename": "{image}"}}
{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "d", "file": "nope"}}
{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "d", "file": "c", "offset": 99999999}}
{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "d", "file": "c", "size": 513}}
{"execute": "query-named-block-nodes", "arguments": {"flat": true}}
{"execute": "blockdev-del", "arguments": {}}
{"execute": "blockdev-del", "arguments": {"node-name": "zz"}}
{"execute": "nbd-server-stop"}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a"}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "/nope/x"}}}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix"}}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "nope", "data": {}}}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "{dir}/t"}}}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "1", "node-name": "a"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "zz"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "c"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "f", "node-name": "a"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "f", "node-name": "c", "iothread": "zz"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "f", "node-name": "c", "name": "x"}}
{"execute": "block-export-add", "arguments": {"type": "nope", "id": "g", "node-name": "a"}}
{"execute": "query-block-exports"}
{"execute": "block-export-del", "arguments": {"id": "nope"}}
{"execute": "block-export-del", "arguments": {"id": "e", "mode": "foo"}}
{"execute": "block-export-del", "arguments": {"id": "e"}}
{"execute": "query-block-exports"}
{"execute": "block-export-del", "arguments": {"id": "e"}}
{"execute": "nbd-server-stop"}
{"execute": "blockdev-del", "arguments": {"node-name": "a"}}
{"execute": "blockdev-del", "arguments": {"node-name": "c"}}
{"execute": "query-named-block-nodes"}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "r", "filename": "{image}", "read-only": true}}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "r", "node-name": "r", "writable": true}}
{"execute": "quit"}
"""

# The same, about changes of the graph: a command and its arguments on each line, "reopen" is blockdev-reopen of one
# node. {d} and {e} are images.
GRAPH = r"""
qmp_capabilities
blockdev-add {"driver": "file", "node-name": "f", "filename": "{d}"}
blockdev-add {"driver": "file", "node-name": "g", "filename": "{e}", "read-only": true}
blockdev-add {"driver": "raw", "node-name": "r", "file": "f"}
blockdev-add {"driver": "raw", "node-name": "i", "file": {"driver": "file", "filename": "{e}"}}
blockdev-add {"driver": "null-co", "node-name": "n", "size": 1048576}
query-block
x-debug-query-block-graph
x-blockdev-change {"parent": "nope", "node": "f"}
x-blockdev-change {"parent": "r"}
x-blockdev-change {"parent": "r", "child": "file", "node": "f"}
x-blockdev-change {"parent": "r", "child": "nope"}
x-blockdev-change {"parent": "r", "child": "file"}
x-blockdev-change {"parent": "r", "node": "nope"}
x-blockdev-change {"parent": "r", "node": "g"}
x-blockdev-set-iothread {"node-name": "nope", "iothread": null}
x-blockdev-set-iothread {"node-name": "r", "iothread": "nope"}
x-blockdev-set-iothread {"node-name": "r", "iothread": 1}
x-blockdev-set-iothread {"node-name": "r", "iothread": "io0"}
x-blockdev-set-iothread {"node-name": "r", "iothread": null}
nbd-server-start {"addr": {"type": "unix", "data": {"path": "{dir}/s"}}}
block-export-add {"type": "nbd", "id": "e", "node-name": "r", "writable": true}
x-blockdev-set-iothread {"node-name": "r", "iothread": "io0"}
x-blockdev-set-iothread {"node-name": "f", "iothread": "io0"}
x-blockdev-set-iothread {"node-name": "r", "iothread": null, "force": true}
block-export-add {"type": "nbd", "id": "n", "node-name": "n", "iothread": "io0", "fixed-iothread": true}
x-blockdev-set-iothread {"node-name": "n", "iothread": null, "force": true}
block-export-del {"id": "n"}
blockdev-set-active {"node-name": "nope", "active": true}
blockdev-set-active {"node-name": "r"}
blockdev-set-active {"node-name": "r", "active": true}
blockdev-set-active {"node-name": "r", "active": false}
blockdev-set-active {"node-name": "f", "active": false}
blockdev-set-active {"node-name": "i", "active": false}
query-named-block-nodes
blockdev-add {"driver": "raw", "node-name": "above", "file": "i"}
blockdev-set-active {"active": 1}
x-debug-query-block-graph
blockdev-set-active {"node-name": "i", "active": true}
blockdev-add {"driver": "file", "node-name": "asleep", "filename": "{e}", "active": false}
query-named-block-nodes
blockdev-del {"node-name": "asleep"}
x-debug-query-block-graph
reopen {"driver": "raw", "file": "f"}
reopen {"driver": "raw", "node-name": "nope", "file": "f"}
reopen {"driver": "file", "node-name": "r", "filename": "a"}
reopen {"driver": "raw", "node-name": "r", "file": "f", "read-only": true}
reopen {"driver": "file", "node-name": "f", "filename": "{d}", "read-only": true}
reopen {"driver": "file", "node-name": "f", "filename": "c"}
reopen {"driver": "raw", "node-name": "r", "file": "g"}
reopen {"driver": "raw", "node-name": "r", "file": "n"}
x-debug-query-block-graph
reopen {"driver": "raw", "node-name": "r", "file": "f"}
reopen {"driver": "raw", "node-name": "r", "file": "r"}
reopen {"driver": "raw", "node-name": "r", "file": "nope"}
reopen {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "a"}}
reopen {"driver": "raw", "node-name": "r", "file": "f", "offset": 512}
reopen {"driver": "raw", "node-name": "r", "file": "f", "size": 4096}
reopen {"driver": "raw", "node-name": "i", "file": {"driver": "file", "filename": "{e}"}, "read-only": true}
reopen {"driver": "raw", "node-name": "i", "file": {"driver": "file", "filename": "c"}}
query-named-block-nodes
reopen {"driver": "null-co", "node-name": "n", "size": 2048}
reopen {"driver": "null-co", "node-name": "n", "size": 1048576, "read-zeroes": true}
reopen {"driver": "null-co", "node-name": "n"}
reopen {"driver": "null-co", "node-name": "n", "size": 1048576, "read-only": true}
blockdev-snapshot {"node": "n", "overlay": "nope"}
blockdev-snapshot {"node": "nope", "overlay": "n"}
blockdev-snapshot {"node": "n", "overlay": "i"}
blockdev-snapshot {"node": "n", "overlay": "r"}
block_resize {"node-name": "n", "size": 512}
block_resize {"node-name": "i", "size": -1}
block_resize {"size": 0}
block_resize {"device": "nope", "size": 0}
block_resize {"device": "i", "size": 524288}
block-export-del {"id": "e"}
reopen {"driver": "raw", "node-name": "r", "file": "f"}
block_resize {"node-name": "r", "size": 524288}
query-named-block-nodes
quit
"""


def spelled_out(line: str) -> str:
    """A line of GRAPH as QMP wants it."""
    name, _, arguments = line.partition(" ")
    if name == "reopen":
        name, arguments = "blockdev-reopen", f'{{"options": [{arguments}]}}'
    return f'{{"execute": "{name}", "arguments": {arguments or "{}"}}}'


# The same for objects, devices and out-of-band execution; lists whose order is that of a hash table are sorted.
CONTROL = r"""
{"exec-oob": "query-version", "id": 7}
{"exec-oob": "qmp_capabilities"}
{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
{"exec-oob": "query-version", "id": 7}
{"exec-oob": "nope", "id": 7}
{"exec-oob": "query-version"}
{"exec-oob": "query-version", "execute": "query-version"}
{"exec-oob": 1}
{"exec-oob": "qmp_capabilities"}
{"exec-oob": "query-version", "x": 1}
{"exec-oob": "query-version", "arguments": {"x": 1}}
{"execute": "qom-list", "arguments": {"path": "/"}}
{"execute": "qom-list", "arguments": {"path": "/objects"}}
{"execute": "qom-list", "arguments": {"path": "/chardevs"}}
{"execute": "qom-list", "arguments": {"path": "nope"}}
{"execute": "qom-list", "arguments": {"path": ""}}
{"execute": "qom-list", "arguments": {"path": "/machine"}}
{"execute": "qom-list", "arguments": {"path": "m"}}
{"execute": "qom-list-types", "arguments": {"implements": "nope"}}
{"execute": "qom-list-types", "arguments": {"implements": "event-loop-base"}}
{"execute": "qom-list-types", "arguments": {"implements": "event-loop-base", "abstract": true}}
{"execute": "qom-list-types", "arguments": {"implements": "authz-list"}}
{"execute": "qom-list-properties", "arguments": {"typename": "iothread"}}
{"execute": "qom-list-properties", "arguments": {"typename": "secret"}}
{"execute": "qom-list-properties", "arguments": {"typename": "main-loop"}}
{"execute": "qom-list-properties", "arguments": {"typename": "authz-list"}}
{"execute": "qom-list-properties", "arguments": {"typename": "container"}}
{"execute": "qom-list-properties", "arguments": {"typename": "chardev-socket"}}
{"execute": "qom-list-properties", "arguments": {"typename": "event-loop-base"}}
{"execute": "qom-list-properties", "arguments": {"typename": "user-creatable"}}
{"execute": "qom-list-properties", "arguments": {"typename": "nope"}}
{"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io0"}}
{"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io0"}}
{"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "1x"}}
{"execute": "object-add", "arguments": {"qom-type": "nope", "id": "x"}}
{"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io1", "poll-max-ns": -1}}
{"execute":"object-add","arguments":{"qom-type":"iothread","id":"io1","thread-pool-min":5,"thread-pool-max":2}}
{"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io1", "x": 2}}
{"execute": "qom-list", "arguments": {"path": "/objects"}}
{"execute": "qom-list", "arguments": {"path": "/objects/io0"}}
{"execute": "qom-list", "arguments": {"path": "io0"}}
{"execute": "qom-list", "arguments": {"path": "//objects//io0/"}}
{"execute": "qom-get", "arguments": {"path": "io0", "property": "poll-max-ns"}}
{"execute": "qom-get", "arguments": {"path": "io0", "property": "nope"}}
{"execute": "qom-get", "arguments": {"path": "io0", "property": "type"}}
{"execute": "qom-get", "arguments": {"path": "/", "property": "objects"}}
{"execute": "qom-get", "arguments": {"path": "/objects", "property": "io0"}}
{"execute": "qom-get", "arguments": {"path": "zz", "property": "nope"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns", "value": 5}}
{"execute": "qom-get", "arguments": {"path": "io0", "property": "poll-max-ns"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns", "value": "5"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns", "value": -5}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns", "value": 1.5}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns", "value": 18446744073709551615}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "poll-max-ns"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "type", "value": "x"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "nope", "value": "x"}}
{"execute": "qom-set", "arguments": {"path": "/objects", "property": "io0", "value": "x"}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "thread-pool-max", "value": 1}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "thread-pool-min", "value": 2}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "thread-pool-max", "value": 0}}
{"execute": "qom-set", "arguments": {"path": "io0", "property": "aio-max-batch", "value": -1}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0", "data": "abc", "file": "x"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0", "file": "/nope"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0", "data": "abc"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s1", "data": "!!", "format": "base64"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s1", "data": "YWI=", "format": "base64"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s2", "data": "YWI=", "keyid": "zz", "iv": "YWI="}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s2", "data": "YWI=", "keyid": "s0"}}
{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s2", "data": "YWI=", "keyid": "io0"}}
{"execute": "qom-list", "arguments": {"path": "s0"}}
{"execute": "qom-get", "arguments": {"path": "s0", "property": "format"}}
{"execute": "qom-get", "arguments": {"path": "s0", "property": "keyid"}}
{"execute": "qom-set", "arguments": {"path": "s0", "property": "data", "value": "xyz"}}
{"execute": "qom-set", "arguments": {"path": "s0", "property": "format", "value": "xyz"}}
{"execute": "qom-set", "arguments": {"path": "s0", "property": "format", "value": 1}}
{"execute": "object-add", "arguments": {"qom-type": "authz-list", "id": "a0"}}
{"execute": "object-add", "arguments": {"qom-type": "authz-list", "id": "a2", "policy": "x"}}
{"execute": "qom-get", "arguments": {"path": "a0", "property": "rules"}}
{"execute": "qom-get", "arguments": {"path": "a0", "property": "policy"}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "rules", "value": [{"match": "fred"}]}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "rules", "value": [{"match": 1, "policy": "allow"}]}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "rules", "value": [{"match": "f", "policy": "maybe"}]}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "rules", "value": 1}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "rules", "value": [{"match": "f", "policy": "allow"}]}}
{"execute": "qom-get", "arguments": {"path": "a0", "property": "rules"}}
{"execute": "qom-set", "arguments": {"path": "a0", "property": "policy", "value": "zz"}}
{"execute": "object-add", "arguments": {"qom-type": "authz-simple", "id": "as"}}
{"execute": "object-add", "arguments": {"qom-type": "authz-simple", "id": "as", "identity": "CN=x"}}
{"execute": "qom-list", "arguments": {"path": "as"}}
{"execute": "qom-get", "arguments": {"path": "as", "property": "identity"}}
{"execute": "qom-set", "arguments": {"path": "as", "property": "identity", "value": 1}}
{"execute": "qom-list-types", "arguments": {"implements": "tls-creds", "abstract": true}}
{"execute": "qom-list-properties", "arguments": {"typename": "tls-creds-anon"}}
{"execute": "qom-list-properties", "arguments": {"typename": "tls-creds-psk"}}
{"execute": "qom-list-properties", "arguments": {"typename": "tls-creds-x509"}}
{"execute": "qom-list-properties", "arguments": {"typename": "authz-simple"}}
{"execute": "object-add", "arguments": {"qom-type": "tls-creds-x509", "id": "ta"}}
{"execute": "object-add", "arguments": {"qom-type": "tls-creds-x509", "id": "ta", "dir": "/nope"}}
{"execute": "object-add", "arguments": {"qom-type": "tls-creds-psk", "id": "ta", "dir": "/nope"}}
{"execute": "object-add", "arguments": {"qom-type": "tls-creds-psk", "id": "ta"}}
{"execute": "object-add", "arguments": {"qom-type": "tls-creds-anon", "id": "ta", "endpoint": "x"}}
{"execute": "object-add", "arguments": {"qom-type": "tls-creds-anon", "id": "ta"}}
{"execute": "qom-list", "arguments": {"path": "ta"}}
{"execute": "qom-get", "arguments": {"path": "ta", "property": "endpoint"}}
{"execute": "qom-get", "arguments": {"path": "ta", "property": "verify-peer"}}
{"execute": "qom-get", "arguments": {"path": "ta", "property": "priority"}}
{"execute": "qom-set", "arguments": {"path": "ta", "property": "endpoint", "value": "x"}}
{"execute": "qom-set", "arguments": {"path": "ta", "property": "verify-peer", "value": "x"}}
{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"{dir}/t"}},"tls-creds":"nix"}}
{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"{dir}/t"}},"tls-creds":"as"}}
{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"{dir}/t"}},"tls-creds":"ta"}}
{"execute": "object-del", "arguments": {"id": "ta"}}
{"execute": "object-add", "arguments": {"qom-type": "main-loop", "id": "ml"}}
{"execute": "object-add", "arguments": {"qom-type": "main-loop", "id": "ml2"}}
{"execute": "qom-list", "arguments": {"path": "ml"}}
{"execute": "object-del", "arguments": {"id": "ml"}}
{"execute": "object-add", "arguments": {"qom-type": "throttle-group", "id": "t", "limits": {"iops-total": 5}}}
{"execute": "qom-get", "arguments": {"path": "t", "property": "limits"}}
{"execute": "qom-get", "arguments": {"path": "t", "property": "x-iops-total"}}
{"execute": "qom-set", "arguments": {"path": "t", "property": "x-iops-total", "value": 6}}
{"execute": "qom-set", "arguments": {"path": "t", "property": "limits", "value": {"bps-read": -1}}}
{"execute": "qom-set", "arguments": {"path": "t", "property": "limits", "value": {"bps-read": 1, "bps-total": 4}}}
{"execute": "qom-set", "arguments": {"path": "t", "property": "limits", "value": {"bps-read": 1000}}}
{"execute": "qom-set", "arguments": {"path": "t", "property": "limits", "value": {"nope": 1000}}}
{"execute": "qom-set", "arguments": {"path": "t", "property": "limits", "value": {"iops-size": "x"}}}
{"execute": "qom-set", "arguments": {"path": "t", "property": "limits", "value": 1}}
{"execute": "qom-get", "arguments": {"path": "t", "property": "limits"}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "tc"}}
{"execute": "blockdev-add", "arguments": {"driver": "throttle", "node-name": "tn", "file": "tc", "throttle-group": "t"}}
{"execute": "object-del", "arguments": {"id": "t"}}
{"execute": "blockdev-del", "arguments": {"node-name": "tn"}}
{"execute": "blockdev-del", "arguments": {"node-name": "tc"}}
{"execute": "object-del", "arguments": {"id": "t"}}
{"execute": "object-add", "arguments": {"qom-type": "throttle-group", "id": "v", "x-iops-total": -5}}
{"execute": "object-add", "arguments": {"qom-type": "throttle-group", "id": "v", "x-iops-total": 5, "x-iops-read": 5}}
{"execute": "qom-list-properties", "arguments": {"typename": "throttle-group"}}
{"execute": "object-del", "arguments": {"id": "nope"}}
{"execute": "object-del", "arguments": {"id": "io0"}}
{"execute": "object-del", "arguments": {"id": "s0"}}
{"execute": "qom-list", "arguments": {"path": "/objects"}}
{"execute": "chardev-add", "arguments": {"id": "n", "backend": {"type": "null", "data": {}}}}
{"execute": "chardev-add", "arguments": {"id": "n", "backend": {"type": "null", "data": {}}}}
{"execute": "chardev-add", "arguments": {"id": "f", "backend": {"type": "file", "data": {"out": "{dir}/f"}}}}
{"execute": "chardev-add", "arguments": {"id": "f2", "backend": {"type": "file", "data": {"out": "/nope/f"}}}}
{"execute":"chardev-add","arguments":{"id":"f2","backend":{"type":"file","data":{"out":"{dir}/f","in":"/nope/x"}}}}
{"execute": "chardev-add", "arguments": {"id": "p", "backend": {"type": "pipe", "data": {"device": "/nope/p"}}}}
{"execute": "chardev-add", "arguments": {"id": "r", "backend": {"type": "ringbuf", "data": {"size": 1000}}}}
{"execute": "chardev-add", "arguments": {"id": "r", "backend": {"type": "ringbuf", "data": {"size": 16}}}}
{"execute": "chardev-add", "arguments": {"id": "mem", "backend": {"type": "memory", "data": {}}}}
{"execute": "chardev-add", "arguments": {"id": "mux", "backend": {"type": "mux", "data": {"chardev": "zz"}}}}
{"execute": "chardev-add", "arguments": {"id": "mux", "backend": {"type": "mux", "data": {"chardev": "r"}}}}
{"execute":"chardev-add","arguments":{"id":"s","backend":<socket {dir}/c>}}
{"execute":"chardev-add","arguments":{"id":"c","backend":<socket /nope/s, no server>}}
{"execute": "chardev-add", "arguments": {"id": "x", "backend": {"type": "nope", "data": {}}}}
{"execute": "chardev-add", "arguments": {"id": "x", "backend": {"type": "stdio", "data": {}}}}
{"execute": "query-chardev"}
{"execute": "ringbuf-write", "arguments": {"device": "r", "data": "hello"}}
{"execute": "ringbuf-read", "arguments": {"device": "r", "size": 1000}}
{"execute": "ringbuf-read", "arguments": {"device": "r", "size": 1000}}
{"execute": "ringbuf-write", "arguments": {"device": "r", "data": "0123456789abcdefghij"}}
{"execute": "ringbuf-read", "arguments": {"device": "r", "size": 1000}}
{"execute": "ringbuf-write", "arguments": {"device": "mem", "data": "hello"}}
{"execute": "ringbuf-write", "arguments": {"device": "mem", "data": "AAEC/w==", "format": "base64"}}
{"execute": "ringbuf-read", "arguments": {"device": "mem", "size": 7, "format": "base64"}}
{"execute": "ringbuf-read", "arguments": {"device": "mem", "size": 7, "format": "base64"}}
{"execute": "ringbuf-read", "arguments": {"device": "mem", "size": 0}}
{"execute": "ringbuf-read", "arguments": {"device": "n", "size": 1}}
{"execute": "ringbuf-read", "arguments": {"device": "zz", "size": 1}}
{"execute": "ringbuf-write", "arguments": {"device": "mem", "data": "!", "format": "base64"}}
{"execute": "chardev-change", "arguments": {"id": "zz", "backend": {"type": "null", "data": {}}}}
{"execute": "chardev-change", "arguments": {"id": "n", "backend": {"type": "ringbuf", "data": {}}}}
{"execute": "chardev-change", "arguments": {"id": "m", "backend": {"type": "null", "data": {}}}}
{"execute": "chardev-change", "arguments": {"id": "mux", "backend": {"type": "null", "data": {}}}}
{"execute": "chardev-remove", "arguments": {"id": "zz"}}
{"execute": "chardev-remove", "arguments": {"id": "m"}}
{"execute": "chardev-remove", "arguments": {"id": "r"}}
{"execute": "chardev-remove", "arguments": {"id": "mux"}}
{"execute": "chardev-remove", "arguments": {"id": "r"}}
{"execute": "chardev-send-break", "arguments": {"id": "n"}}
{"execute": "chardev-send-break", "arguments": {"id": "zz"}}
{"execute": "qom-list", "arguments": {"path": "/chardevs"}}
{"execute": "qom-get", "arguments": {"path": "s", "property": "addr"}}
{"execute": "qom-get", "arguments": {"path": "s", "property": "connected"}}
{"execute": "query-chardev"}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "d", "filename": "{image}"}}
{"execute": "block_resize", "arguments": {"node-name": "d", "size": 2097152}}
{"execute": "block_resize", "arguments": {"node-name": "d", "size": -1}}
{"execute": "block_resize", "arguments": {"node-name": "zz", "size": 1}}
{"execute": "block_resize", "arguments": {"device": "zz", "size": 1}}
{"execute": "block_resize", "arguments": {"size": 1}}
{"execute": "block_resize", "arguments": {"device": "d", "size": 1048576}}
{"execute": "block_resize", "arguments": {"device": "d", "node-name": "d", "size": 1048576}}
{"execute": "query-named-block-nodes"}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "null"}}
{"execute": "block_resize", "arguments": {"node-name": "null", "size": 1}}
{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "fixed", "file": "d", "size": 512}}
{"execute": "block_resize", "arguments": {"node-name": "fixed", "size": 1024}}
{"execute": "quit"}
"""
for _short, _long in (
    ("<socket {dir}/c>", '{"addr": {"type": "unix", "data": {"path": "{dir}/c"}}}'),
    ("<socket /nope/s, no server>", '{"addr": {"type": "unix", "data": {"path": "/nope/s"}}, "server": false}'),
):
    assert _short in CONTROL
    CONTROL = CONTROL.replace(_short, f'{{"type": "socket", "data": {_long}}}')

# About snapshots in an image, {q}.
SNAPSHOTS = r"""
qmp_capabilities
blockdev-add {"driver": "file", "node-name": "f", "filename": "{q}"}
blockdev-add {"driver": "qcow2", "node-name": "q", "file": "f"}
blockdev-add {"driver": "null-co", "node-name": "n", "size": 1048576}
blockdev-snapshot-internal-sync {"device": "q", "name": "one"}
blockdev-snapshot-internal-sync {"device": "q", "name": "one"}
blockdev-snapshot-internal-sync {"device": "q", "name": ""}
blockdev-snapshot-internal-sync {"device": "q"}
blockdev-snapshot-internal-sync {"device": "q", "name": 1}
blockdev-snapshot-internal-sync {"device": "zz", "name": "x"}
blockdev-snapshot-internal-sync {"device": "f", "name": "x"}
blockdev-snapshot-internal-sync {"device": "n", "name": "x"}
blockdev-snapshot-internal-sync {"device": "q", "name": "two"}
blockdev-snapshot-delete-internal-sync {"device": "q"}
blockdev-snapshot-delete-internal-sync {"device": "q", "id": "7"}
blockdev-snapshot-delete-internal-sync {"device": "q", "name": "nope"}
blockdev-snapshot-delete-internal-sync {"device": "q", "id": "1", "name": "two"}
blockdev-snapshot-delete-internal-sync {"device": "f", "name": "two"}
blockdev-snapshot-delete-internal-sync {"device": "n", "name": "two"}
blockdev-snapshot-delete-internal-sync {"device": "zz", "name": "two"}
blockdev-snapshot-delete-internal-sync {"device": "q", "id": "1", "name": "one"}
blockdev-snapshot-delete-internal-sync {"device": "q", "name": "two"}
blockdev-snapshot-delete-internal-sync {"device": "q", "id": "", "name": "two"}
blockdev-add {"driver": "raw", "node-name": "r", "file": "q"}
blockdev-snapshot-internal-sync {"device": "q", "name": "x"}
blockdev-snapshot-internal-sync {"device": "r", "name": "through"}
blockdev-snapshot-delete-internal-sync {"device": "r", "name": "through"}
quit
"""
