# SPDX-License-Identifier: Apache-2.0
"""Which types the storage daemon's options have.

A daemon is started hundreds of times a day, most often with a few options and no monitor. So the file of the schema
that an option needs is loaded when the option is met, and the rest not at all.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

from bottomhalf.qapi.types import Struct

_WHERE: Final = {  # module, type, implied key
    "--blockdev": ("block", "BlockdevOptions", "driver"),
    "--chardev": ("char", "ChardevOptions", "backend"),
    "--export": ("export", "BlockExportOptions", "type"),
    "--monitor": ("control", "MonitorOptions", "chardev"),
    "--nbd-server": ("export", "NbdServerOptions", None),
    "--object": ("objects", "ObjectOptions", "qom-type"),
}

OPTIONS: Final = tuple(_WHERE)


def option_type(option: str) -> tuple[type[Struct], str | None]:
    """The type of an option that the schema describes, and its implied key."""
    module, name, implied = _WHERE[option]
    found: type[Struct] = getattr(import_module(f"bottomhalf.qapi.{module}"), name)
    return found, implied
