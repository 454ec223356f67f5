# SPDX-License-Identifier: Apache-2.0
"""The block layer (floor 3): nodes, edges, permissions, backends, drain. It knows no driver and no protocol."""

from bottomhalf.block.backend import BlockBackend
from bottomhalf.block.edge import Edge, Parent
from bottomhalf.block.errors import BlockError, ImageError
from bottomhalf.block.graph import Graph
from bottomhalf.block.node import Node
from bottomhalf.block.queue import BackendStatistics, Queue
from bottomhalf.block.transaction import Transaction

__all__ = [
    "BackendStatistics",
    "BlockBackend",
    "BlockError",
    "Edge",
    "Graph",
    "ImageError",
    "Node",
    "Parent",
    "Queue",
    "Transaction",
]
