# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots (qapi/block-core.json): ``blockdev-snapshot-internal-sync`` and its opposite."""

from __future__ import annotations

from typing import Annotated

from bottomhalf.qapi.types import Command, Doc, Struct


class SnapshotInfo(Struct):
    """A snapshot in an image."""

    id: Annotated[str, Doc("unique in the image")]
    name: Annotated[str, Doc("what its maker called it")]
    vm_state_size: Annotated[int, Doc("bytes of a machine's state that it has")]
    date_sec: Annotated[int, Doc("when it was made, UTC, in seconds")]
    date_nsec: Annotated[int, Doc("and nanoseconds")]
    vm_clock_sec: Annotated[int, Doc("the machine's clock, in seconds")]
    vm_clock_nsec: Annotated[int, Doc("and nanoseconds")]
    icount: Annotated[int | None, Doc("instructions that the machine had carried out")] = None


class BlockdevSnapshotInternalSync(Command, name="blockdev-snapshot-internal-sync"):
    """Make a snapshot in an image that is in use, without a machine's state."""

    device: Annotated[str, Doc("device or node that nobody else stands on")]
    name: Annotated[str, Doc("what to call it; no snapshot has that name")]


class BlockdevSnapshotDeleteInternalSync(
    Command, name="blockdev-snapshot-delete-internal-sync", returns=SnapshotInfo
):
    """Take a snapshot away; the answer is what it was. At least one of ``id`` and ``name``."""

    device: Annotated[str, Doc("device or node that nobody else stands on")]
    id: Annotated[str | None, Doc("its id")] = None
    name: Annotated[str | None, Doc("its name")] = None
