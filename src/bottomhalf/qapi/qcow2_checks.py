# SPDX-License-Identifier: Apache-2.0
"""Which of its tables a qcow2 node protects from its own writes (qapi/block-core.json, ``Qcow2OverlapChecks``)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeAlias

from bottomhalf.qapi.types import Alternate, Doc, Struct


class Qcow2OverlapCheckMode(StrEnum):
    """Which tables are protected."""

    NONE = "none"
    CONSTANT = "constant"
    CACHED = "cached"
    ALL = "all"


class Qcow2OverlapCheckFlags(Struct):
    """Which tables are protected, one by one; what is not given is as in the template."""

    template: Annotated[Qcow2OverlapCheckMode | None, Doc("the mode to begin with", default="cached")] = None
    main_header: Annotated[bool | None, Doc("the header")] = None
    active_l1: Annotated[bool | None, Doc("the L1 table in use")] = None
    active_l2: Annotated[bool | None, Doc("the L2 tables that it names")] = None
    refcount_table: Annotated[bool | None, Doc("the refcount table")] = None
    refcount_block: Annotated[bool | None, Doc("the refcount blocks")] = None
    snapshot_table: Annotated[bool | None, Doc("the snapshot table")] = None
    inactive_l1: Annotated[bool | None, Doc("the L1 tables of snapshots")] = None
    inactive_l2: Annotated[bool | None, Doc("the L2 tables of snapshots")] = None
    bitmap_directory: Annotated[bool | None, Doc("the directory of bitmaps")] = None


Qcow2OverlapChecks: TypeAlias = Annotated[
    Qcow2OverlapCheckFlags | Qcow2OverlapCheckMode, Alternate("Qcow2OverlapChecks")
]
"""A mode, or tables one by one."""
