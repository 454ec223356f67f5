# SPDX-License-Identifier: Apache-2.0
"""Users of the monitor learn that an image is damaged."""

from __future__ import annotations

from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import make
from tests.monitor.qmp_bench import QmpBench


def damaged() -> bytes:
    """The counter of the L1 table is lost."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=1 << 20)
    image = bytearray(host.content("disk.qcow2"))
    header = Header.parse(bytes(image))
    block = int.from_bytes(image[header.refcount_table_offset :][:8], "big")
    at = block + (header.l1_offset >> header.cluster_bits) * 2
    image[at : at + 2] = b"\0\0"
    return bytes(image)


def test_block_image_corrupted(seed: int) -> None:
    image = damaged()
    with QmpBench(seed) as bench:
        bench.host.add_file("disk.qcow2", image)
        bench.monitor()
        client = bench.client()
        file = {"driver": "file", "filename": "disk.qcow2"}
        client.call("blockdev-add", {"driver": "qcow2", "node-name": "disk", "file": file})
        client.call("human-monitor-command", {"command-line": "qemu-io disk \"write 0 64k\""})
        event = client.wait_event("BLOCK_IMAGE_CORRUPTED")
        text = "Marking image as corrupt: Preventing invalid write on metadata (overlaps with active L1 table); "
        text += "further corruption events will be suppressed"
        assert event == {
            "device": "", "node-name": "disk", "msg": text, "offset": 3 << 16, "size": 1 << 16, "fatal": True,
        }
        bench.log.remove(f"qcow2: {text}")
