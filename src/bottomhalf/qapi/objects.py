# SPDX-License-Identifier: Apache-2.0
"""User-creatable objects (qapi/qom.json): ``--object`` and later ``object-add``.

The object types are a registry: ``ObjectOptions.register_branch("throttle-group", ...)``.
"""

from __future__ import annotations

from typing import Annotated

from bottomhalf.qapi.throttle import ThrottleGroupProperties
from bottomhalf.qapi.types import Doc, OpenEnum, Struct, TaggedUnion


class ObjectType(OpenEnum):
    """Types of objects that a user may create."""


class ObjectOptions(TaggedUnion, tag="qom-type", tag_values=ObjectType):
    """Options of an object."""

    qom_type: Annotated[ObjectType, Doc("the object's type")]
    id: Annotated[str, Doc("the object's id")]


class EventLoopBaseProperties(Struct):
    """Properties of an event loop."""

    aio_max_batch: Annotated[
        int | None, Doc("most requests submitted to the engine at once; 0 chooses", default="0")
    ] = None
    thread_pool_min: Annotated[int | None, Doc("threads kept when idle", default="0")] = None
    thread_pool_max: Annotated[int | None, Doc("threads at most", default="64")] = None


class IothreadProperties(EventLoopBaseProperties):
    """A thread with an event loop of its own."""

    poll_max_ns: Annotated[
        int | None, Doc("nanoseconds to poll before sleeping; 0 does not poll", default="32768")
    ] = None
    poll_grow: Annotated[int | None, Doc("factor by which polling grows; 0 chooses", default="0")] = None
    poll_shrink: Annotated[int | None, Doc("divisor by which polling shrinks; 0 chooses", default="0")] = None


ObjectOptions.register_branch("iothread", IothreadProperties)
ObjectOptions.register_branch("throttle-group", ThrottleGroupProperties)
