# SPDX-License-Identifier: Apache-2.0
"""A simulated machine: virtual clock, forgetful disks, unkind sockets, faults on demand; one seed."""

from bottomhalf.host.request import TRUNCATE
from bottomhalf.host.sim.faults import ACCEPT, CONNECT, OPEN, Fault, Latency
from bottomhalf.host.sim.host import SimHost
from bottomhalf.host.sim.world import Deadlock, Odds

__all__ = [
    "SimHost",
    "Odds",
    "Latency",
    "Deadlock",
    "Fault",
    "OPEN",
    "TRUNCATE",
    "CONNECT",
    "ACCEPT",
]
