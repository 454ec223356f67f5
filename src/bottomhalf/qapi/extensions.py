# SPDX-License-Identifier: Apache-2.0
"""Drivers that other packages bring along.

A package names them in its metadata, by the names that users will give:

    [project.entry-points."bottomhalf.drivers"]
    memory = "my_package.memory"

Looking through the metadata of everything that is installed takes longer than opening an image. So it is looked for
when a name is asked for that nobody knows, and then only the package that has it is imported. The value names a module,
which registers its driver when it is imported, or a function in one ("my_package.memory:register"), which does so when
it is called.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Final

from bottomhalf.qapi.errors import OptionError

GROUP: Final = "bottomhalf.drivers"

_tried: set[str] = set()  # what was looked for already: metadata does not change while a program runs


def load_driver(name: str) -> None:
    """Import the driver of that name, if a package has one. OptionError if it cannot be loaded."""
    if name in _tried:
        return
    _tried.add(name)
    for entry in entry_points(group=GROUP, name=name):
        where = f"driver '{name}' of package {entry.dist.name if entry.dist is not None else 'unknown'}"
        try:
            loaded = entry.load()
            if callable(loaded):
                loaded()
        except Exception as error:
            _tried.discard(name)
            raise OptionError(
                f"Could not load {where} ({entry.value}): {type(error).__name__}: {error}", key="driver"
            ) from error
