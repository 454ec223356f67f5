# SPDX-License-Identifier: Apache-2.0
"""Throttle groups as objects."""

from __future__ import annotations

import json

from tests.monitor.qmp_bench import QmpBench


def test_made_changed_and_deleted() -> None:
    with QmpBench() as bench:
        bench.monitor()
        client = bench.client()
        group = {"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 100}}
        group |= {"x-iops-total": 5, "x-bps-read": 7}  # what the limits say counts
        client.call("object-add", group)
        limits = client.call("qom-get", {"path": "/objects/g", "property": "limits"})
        assert (limits["iops-total"], limits["bps-read"], limits["bps-write"]) == (100, 7, 0)
        assert client.call("qom-get", {"path": "g", "property": "x-bps-read"}) == 7
        client.call(
            "blockdev-add",
            {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": {"driver": "null-co"}},
        )
        assert client.fails("object-del", {"id": "g"}) == "object 'g' is in use, can not be deleted"
        client.call("qom-set", {"path": "g", "property": "limits", "value": {"iops-total": 0, "iops-read": 9}})
        limits = client.call("qom-get", {"path": "/objects/g", "property": "limits"})
        assert (limits["iops-total"], limits["iops-read"], limits["bps-read"]) == (0, 9, 7)
        before = json.dumps(limits)
        wrong = {"path": "g", "property": "limits", "value": {"iops-total": 5}}
        assert "cannot be used at the same time" in client.fails("qom-set", wrong)
        wrong = {"path": "g", "property": "limits", "value": {"iops-nope": 5}}
        assert client.fails("qom-set", wrong) == "Parameter 'limits.iops-nope' is unexpected"
        wrong = {"path": "g", "property": "x-iops-read", "value": 5}
        assert client.fails("qom-set", wrong) == "Property cannot be set after initialization"
        assert json.dumps(client.call("qom-get", {"path": "g", "property": "limits"})) == before
        negative = {"qom-type": "throttle-group", "id": "h", "x-iops-read": -5}
        assert client.fails("object-add", negative) == "Property values cannot be negative"
        assert "attempt to add duplicate property 'g'" in client.fails("object-add", group)
        client.call("blockdev-del", {"node-name": "t"})
        client.call("object-del", {"id": "g"})
        client.call("object-add", group)
