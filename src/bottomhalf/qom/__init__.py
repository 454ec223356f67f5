# SPDX-License-Identifier: Apache-2.0
"""The object tree (floor 2): types, properties, paths, and the objects that users create.

    tree = Tree(host)
    tree.create("iothread", "io0", {"poll-max-ns": 0})
    tree.resolve("io0").get("poll-max-ns")  # 0

It is how a running program is looked at and changed by name: everything that has a path can be listed, read and, where
that makes sense, written, by one set of commands that knows nothing of the things themselves.
"""

from bottomhalf.qom.object import Container, Interface, Property, QomObject, UserCreatable, subtypes, type_named
from bottomhalf.qom.tree import Tree
from bottomhalf.qom.values import QomError

__all__ = [
    "Tree",
    "QomObject",
    "Container",
    "Interface",
    "UserCreatable",
    "Property",
    "QomError",
    "type_named",
    "subtypes",
]
