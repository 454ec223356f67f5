# SPDX-License-Identifier: Apache-2.0
"""Commands about character devices, and the devices as objects of the tree."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from bottomhalf.chardev.base import Chardev
from bottomhalf.qapi.char import (
    ChardevAdd,
    ChardevBackendInfo,
    ChardevBackendKind,
    ChardevChange,
    ChardevInfo,
    ChardevRemove,
    ChardevReturn,
    ChardevSendBreak,
    DataFormat,
    RingbufRead,
    RingbufWrite,
)
from bottomhalf.qapi.errors import OptionError
from bottomhalf.qom import Property, QomObject

if TYPE_CHECKING:
    from bottomhalf.chardev.ringbuf import RingbufChardev
    from bottomhalf.monitor.storage import Storage


class ChardevObject(QomObject, name="chardev", abstract=True):
    """A character device in the tree."""

    def __init__(self, chardev: Chardev) -> None:
        super().__init__()
        self.chardev = chardev


class ChardevFdObject(ChardevObject, name="chardev-fd", abstract=True):
    """One over a descriptor."""


class ChardevStdioObject(ChardevFdObject, name="chardev-stdio"):
    """Standard input and output."""


class ChardevFileObject(ChardevFdObject, name="chardev-file"):
    """A file."""


class ChardevPipeObject(ChardevFdObject, name="chardev-pipe"):
    """A pipe."""


class ChardevPtyObject(ChardevObject, name="chardev-pty"):
    """A pseudo-terminal."""


class ChardevNullObject(ChardevObject, name="chardev-null"):
    """Nobody."""


class ChardevRingbufObject(ChardevObject, name="chardev-ringbuf"):
    """Memory."""


class ChardevMemoryObject(ChardevRingbufObject, name="chardev-memory"):
    """Memory, by its old name."""


class ChardevMuxObject(ChardevObject, name="chardev-mux"):
    """A multiplexer."""


class ChardevSocketObject(ChardevObject, name="chardev-socket"):
    """A socket."""

    properties: ClassVar[dict[str, Property]] = {
        "addr": Property("SocketAddress", lambda self: self.chardev.address_info()),
        "connected": Property("bool", lambda self: self.chardev.connected),
    }


_OBJECTS: Final[dict[str, type[ChardevObject]]] = {
    "stdio": ChardevStdioObject,
    "file": ChardevFileObject,
    "pipe": ChardevPipeObject,
    "pty": ChardevPtyObject,
    "null": ChardevNullObject,
    "ringbuf": ChardevRingbufObject,
    "memory": ChardevMemoryObject,
    "mux": ChardevMuxObject,
    "socket": ChardevSocketObject,
}


def object_of(chardev: Chardev) -> ChardevObject:
    """The device as an object."""
    return _OBJECTS[chardev.kind](chardev)


def query_chardev(storage: Storage, arguments: Any) -> list[ChardevInfo]:
    """query-chardev."""
    return [
        ChardevInfo(label=each.id, filename=each.describe(), frontend_open=each.has_user)
        for each in storage.chardevs.values()
    ]


def query_chardev_backends(storage: Storage, arguments: Any) -> list[ChardevBackendInfo]:
    """query-chardev-backends."""
    return [ChardevBackendInfo(name=name) for name in ChardevBackendKind.values]


def _returned(chardev: Chardev) -> ChardevReturn:
    return ChardevReturn(pty=getattr(chardev, "name", None) if chardev.kind == "pty" else None)


def _failed(chardev_id: str, error: OptionError) -> OptionError:
    return OptionError(f"Failed to add chardev '{chardev_id}': {error}", key=error.key, hint=error.hint)


def chardev_add(storage: Storage, arguments: ChardevAdd) -> ChardevReturn:
    """chardev-add."""
    if arguments.id in storage.chardevs:
        raise OptionError(f"Chardev with id '{arguments.id}' already exists", key="id")
    try:
        chardev = storage.add_chardev(arguments.id, arguments.backend)
    except OptionError as error:
        raise _failed(arguments.id, error) from error
    storage.await_client(chardev)
    return _returned(chardev)


def chardev_change(storage: Storage, arguments: ChardevChange) -> ChardevReturn:
    """chardev-change: only devices that nobody uses, since none of their users could take another one."""
    found = storage.chardevs.get(arguments.id)
    if found is None:
        raise OptionError(f"Chardev '{arguments.id}' does not exist", key="id")
    if found.kind == "mux" or arguments.backend.type == "mux":
        raise OptionError("For mux or hub device hotswap is not supported yet", key="id")
    if found.busy:
        raise OptionError("Chardev user does not support chardev hotswap", key="id")
    try:
        chardev = storage.add_chardev(arguments.id, arguments.backend, instead_of=found)
    except OptionError as error:
        raise _failed(arguments.id, error) from error
    return _returned(chardev)


def _find(storage: Storage, chardev_id: str) -> Chardev:
    found = storage.chardevs.get(chardev_id)
    if found is None:
        raise OptionError(f"Chardev '{chardev_id}' not found", key="id")
    return found


def chardev_remove(storage: Storage, arguments: ChardevRemove) -> None:
    """chardev-remove."""
    found = _find(storage, arguments.id)
    if found.busy:
        raise OptionError(f"Chardev '{arguments.id}' is busy", key="id")
    storage.remove_chardev(found)


def chardev_send_break(storage: Storage, arguments: ChardevSendBreak) -> None:
    """chardev-send-break: monitors, the only users that there are, ignore it."""
    _find(storage, arguments.id)


def _find_ringbuf(storage: Storage, device: str) -> RingbufChardev:
    from bottomhalf.chardev.ringbuf import RingbufChardev

    found = storage.chardevs.get(device)
    if found is None:
        raise OptionError(f"Device '{device}' not found", key="device")
    if not isinstance(found, RingbufChardev):
        raise OptionError(f"{device} is not a ringbuf device", key="device")
    return found


def ringbuf_write(storage: Storage, arguments: RingbufWrite) -> None:
    """ringbuf-write."""
    found = _find_ringbuf(storage, arguments.device)
    data = arguments.data.encode()
    if arguments.format == DataFormat.BASE64:
        try:
            data = base64.b64decode(data, validate=True)
        except binascii.Error:
            raise OptionError("Base64 data contains invalid characters", key="data") from None
    found.write(data)


def ringbuf_read(storage: Storage, arguments: RingbufRead) -> str:
    """ringbuf-read."""
    found = _find_ringbuf(storage, arguments.device)
    if arguments.size <= 0:
        raise OptionError("size must be greater than zero", key="size")
    data = found.read(arguments.size)
    if arguments.format == DataFormat.BASE64:
        return base64.b64encode(data).decode()
    return data.decode(errors="replace")


HANDLERS: Final[dict[str, Callable[[Storage, Any], Any]]] = {
    "query-chardev": query_chardev,
    "query-chardev-backends": query_chardev_backends,
    "chardev-add": chardev_add,
    "chardev-change": chardev_change,
    "chardev-remove": chardev_remove,
    "chardev-send-break": chardev_send_break,
    "ringbuf-write": ringbuf_write,
    "ringbuf-read": ringbuf_read,
}
