# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Final

from tests.drivers.qcow2.crash_states import Geometry

K = 512
SNAPSHOTS = frozenset(("snapshot", "revert", "forget"))

GEOMETRIES: Final[dict[str, Geometry]] = {
    "small": Geometry({"cluster_size": K, "size": 80 * K}, prepare=("fill",)),
    "snapshot": Geometry({"cluster_size": K, "size": 80 * K}, prepare=("fill", "snapshot")),
    "one bit": Geometry({"cluster_size": K, "size": 80 * K, "refcount_bits": 1}, prepare=("fill",), without=SNAPSHOTS),
    "64 bits": Geometry({"cluster_size": K, "size": 80 * K, "refcount_bits": 64}, prepare=("fill", "snapshot")),
    "backing": Geometry({"cluster_size": K, "size": 80 * K}, prepare=("fill",), backing=bytes(range(1, 251)) * 200),
    "lazy": Geometry({"cluster_size": K, "size": 80 * K, "lazy_refcounts": True}, prepare=("fill",)),
    "small cache": Geometry({"cluster_size": K, "size": 260 * K}, {"l2-cache-size": 1024}, prepare=("fill",)),
    "keeps discarded": Geometry({"cluster_size": K, "size": 80 * K}, {"discard-no-unref": True}, prepare=("fill",)),
    "data file": Geometry(
        {"cluster_size": K, "size": 80 * K, "data_file": "data.raw"},
        prepare=("fill",),
        without=SNAPSHOTS | {"squeeze"},
    ),
    "raw data file": Geometry(
        {"cluster_size": K, "size": 80 * K, "data_file": "data.raw", "data_file_raw": True},
        prepare=("fill",),
        without=SNAPSHOTS | {"squeeze"},
    ),
    "version 2": Geometry({"cluster_size": 4096, "size": 20 * 4096, "version": 2}, prepare=("fill",)),
    "extended": Geometry({"cluster_size": 16384, "size": 8 * 16384, "extended_l2": True}, prepare=("fill",)),
}
