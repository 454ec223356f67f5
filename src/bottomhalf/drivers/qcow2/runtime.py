# SPDX-License-Identifier: Apache-2.0
"""What a node of the driver is told when it is opened or reopened: caches, discards, overlap checks, lazy refcounts.

Names, defaults and error texts are QEMU's (``BlockdevOptionsQcow2``). Two differences in what they mean:

* L2 tables are in memory whole, because looking one up is then an index. ``l2-cache-entry-size``, the part of a table
  that QEMU reads at a time, is checked and has no effect; ``l2-cache-size`` bounds the tables' bytes, two tables at
  least, and one commit's changes may go beyond it until they are written.
* Refcounts are written in the first step of a commit. With ``lazy-refcounts`` that step leaves them out; the header
  says meanwhile that the image is dirty.

    settings = Settings.of(options.branch, header, unmap=True)     # BlockError: what cannot be
    settings.apply(metadata)

Clause: none; the options are those of BlockdevOptionsQcow2.
Invariant: the caches stay within their sizes, and an option that cannot be changes nothing.
Test: tests/drivers/qcow2/test_runtime.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.errors import BlockError
from bottomhalf.drivers.qcow2 import layout
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.overlap import LEVELS, flags_of

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.metadata import Metadata

L2_CACHE_BYTES_DEFAULT: Final = 32 << 20
L2_TABLES_MIN: Final = 2
REFCOUNT_BLOCKS_MIN: Final = 4
CLEAN_INTERVAL_S_DEFAULT: Final = 600
CACHE_CLUSTERS_MAX: Final = (1 << 31) - 1
CLEAN_INTERVAL_S_MAX: Final = (1 << 32) - 1

# Options that a reopen may change: all that are read here.
CHANGEABLE: Final = frozenset(
    (
        *("lazy_refcounts", "pass_discard_request", "pass_discard_snapshot", "pass_discard_other", "discard_no_unref"),
        *("overlap_check", "cache_size", "l2_cache_size", "l2_cache_entry_size", "refcount_cache_size"),
        "cache_clean_interval",
    )
)


@dataclass(frozen=True)
class Settings:
    """Sizes in tables and blocks, times in seconds."""

    l2_tables: int
    refcount_blocks: int
    clean_interval_s: int
    lazy: bool
    passes: tuple[bool, bool, bool]  # discards to the file, by why a cluster is free: FREED_* of ``metadata``
    keeps_discarded: bool
    protected: int  # what overlap checks look at: bits of ``overlap``

    @classmethod
    def of(cls, branch: Any, header: Header, *, unmap: bool) -> Settings:
        """From the driver's options, for this image. BlockError."""
        l2_bytes, refcount_bytes = _cache_bytes(branch, header)
        cluster = header.cluster_size
        entry = branch.l2_cache_entry_size
        if entry is not None and (not 512 <= entry <= cluster or entry & (entry - 1)):
            raise BlockError(
                f"L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
            )
        if l2_bytes // (entry or 512) > CACHE_CLUSTERS_MAX:
            raise BlockError("L2 cache size too big")
        if refcount_bytes // cluster > CACHE_CLUSTERS_MAX:
            raise BlockError("Refcount cache size too big")
        interval = _chosen(branch.cache_clean_interval, CLEAN_INTERVAL_S_DEFAULT)
        if not 0 <= interval <= CLEAN_INTERVAL_S_MAX:
            raise BlockError("Cache clean interval too big")
        lazy = _chosen(branch.lazy_refcounts, bool(header.compatible & layout.LAZY_REFCOUNTS))
        if lazy and header.version < 3:
            raise BlockError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
        if branch.discard_no_unref and header.version < 3:
            raise BlockError("discard-no-unref is only supported since qcow2 version 3")
        return cls(
            l2_tables=max(l2_bytes // cluster, L2_TABLES_MIN),
            refcount_blocks=max(refcount_bytes // cluster, REFCOUNT_BLOCKS_MIN),
            clean_interval_s=interval,
            lazy=lazy,
            passes=(
                _chosen(branch.pass_discard_request, unmap),
                _chosen(branch.pass_discard_snapshot, True),
                _chosen(branch.pass_discard_other, False),
            ),
            keeps_discarded=bool(branch.discard_no_unref),
            protected=flags_of(branch.overlap_check),
        )

    @classmethod
    def default(cls, header: Header) -> Settings:
        """Without any options; what tools and tests take."""
        return cls(
            l2_tables=max(min(L2_CACHE_BYTES_DEFAULT, l2_bytes_needed(header)) // header.cluster_size, L2_TABLES_MIN),
            refcount_blocks=REFCOUNT_BLOCKS_MIN,
            clean_interval_s=0,
            lazy=False,
            passes=(False, False, False),
            keeps_discarded=False,
            protected=LEVELS["cached"],
        )

    def apply(self, metadata: Metadata) -> None:
        """From now on."""
        metadata.settings = self
        metadata.places.protected = self.protected


def l2_bytes_needed(header: Header) -> int:
    """The L2 tables of the whole disk, in bytes."""
    return max(header.l1_size, header.l1_entries_needed) * header.cluster_size


def _chosen(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _cache_bytes(branch: Any, header: Header) -> tuple[int, int]:
    """Bytes of L2 tables and of refcount blocks."""
    total, l2, blocks = branch.cache_size, branch.l2_cache_size, branch.refcount_cache_size
    for name, value in (("cache-size", total), ("l2-cache-size", l2), ("refcount-cache-size", blocks)):
        if value is not None and value < 0:
            raise BlockError(f"Value '{value}' is out of range for parameter '{name}'")
    least = REFCOUNT_BLOCKS_MIN * header.cluster_size
    needed = l2_bytes_needed(header)
    most = min(needed, _chosen(l2, L2_CACHE_BYTES_DEFAULT))
    if total is None:
        return most, _chosen(blocks, least)
    if l2 is not None and blocks is not None:
        raise BlockError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
    if l2 is not None and l2 > total:
        raise BlockError("l2-cache-size may not exceed cache-size")
    if blocks is not None and blocks > total:
        raise BlockError("refcount-cache-size may not exceed cache-size")
    if l2 is not None:
        return most, total - most
    if blocks is not None:
        return total - blocks, blocks
    # Both are to be chosen: first what the whole disk needs, then the rest for refcounts.
    if total >= needed + least:
        return needed, total - needed
    blocks = min(total, least)
    return total - blocks, blocks
