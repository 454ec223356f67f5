# SPDX-License-Identifier: Apache-2.0
"""How often each of many clusters is there, in two bytes for each time.

What an L1 table leads to is counted before a snapshot comes or goes. A disk of terabytes has many millions of clusters,
and Python's own collections take a hundred bytes for each. Here the upper part of a cluster's number chooses a piece,
and the piece has the lower 16 bits.

Clause: none, it is ours.
Invariant: what ``Counter`` says of the same clusters.
Test: tests/drivers/qcow2/test_tally.py
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

PIECE: Final = 1 << 16  # so many numbers side by side


class Tally:
    """Clusters, each as often as it was added."""

    def __init__(self, clusters: Iterable[int] = ()) -> None:
        self._pieces: dict[int, array[int]] = {}
        self._sorted: set[int] = set()  # which pieces are
        self.add(clusters)

    def add(self, clusters: Iterable[int]) -> None:
        """Each of them once more."""
        pieces = self._pieces
        for cluster in clusters:
            piece = pieces.get(cluster // PIECE)
            if piece is None:
                piece = pieces[cluster // PIECE] = array("H")
            piece.append(cluster % PIECE)
        self._sorted.clear()

    def __contains__(self, cluster: int) -> bool:
        upper, lower = divmod(cluster, PIECE)
        piece = self._pieces.get(upper)
        if piece is None:
            return False
        if upper not in self._sorted:
            piece = self._pieces[upper] = array("H", sorted(piece))
            self._sorted.add(upper)
        at = bisect_left(piece, lower)
        return at < len(piece) and piece[at] == lower

    def __iter__(self) -> Iterator[int]:
        """All of them, as often as they were added."""
        for upper, piece in self._pieces.items():
            for lower in piece:
                yield upper * PIECE + lower

    def pieces(self) -> Iterator[list[tuple[int, int]]]:
        """All clusters, and how often each was added; so many with each step that somebody else may want to go on."""
        for upper, piece in self._pieces.items():
            yield [(upper * PIECE + lower, times) for lower, times in Counter(piece).items()]
