# SPDX-License-Identifier: Apache-2.0
"""LUKS headers on disks that fail and lose their power: whoever could open the volume before can open it afterwards,
with one password or the other, and the key is the same."""

from __future__ import annotations

import errno

import pytest

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockError, Graph, Node
from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.file import FileNode
from bottomhalf.drivers.luks import keys
from bottomhalf.drivers.luks.create import LuksOptions
from bottomhalf.drivers.luks.keyslots import SlotChange, co_amend
from bottomhalf.drivers.luks.library import co_make
from bottomhalf.drivers.luks.node import co_load, co_unlock
from bottomhalf.host.request import FLUSH, OP_NAMES, READ, WRITE
from bottomhalf.host.sim import SimHost

pytest.importorskip("cryptography")
PATH = "disk.luks"
CHANGES = {
    "add": SlotChange("active", new_password=b"new"),
    "erase": SlotChange("inactive", keyslot=0),
    "erase by password": SlotChange("inactive", old_password=b"first"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated clock stands still while a password is tried."""
    monkeypatch.setattr(keys, "measure", lambda *_: 10)


class Volume:
    """A file with a LUKS header on a simulated disk."""

    def __init__(self, host: SimHost) -> None:
        self.context = AioContext(host)
        self.graph = Graph(self.context)
        self.file: Node = FileNode(self.graph, filename=PATH)
        self.file.monitor_owned = True

    def make(self) -> None:
        self.context.run(co_make(self.file, LuksOptions(b"first", cipher_alg="aes-128", iter_time=1), 4096))

    def close(self) -> None:
        self.graph.close()
        self.context.close()


def made(host: SimHost) -> tuple[Volume, bytes]:
    """A durable header with the passwords "first" and "second", and its key."""
    host.create_file(PATH, 0)
    volume = Volume(host)
    volume.make()
    volume.context.run(co_amend(volume.file, b"first", SlotChange("active", new_password=b"second")))
    volume.context.run(volume.file.co_flush())
    key = key_of(volume, b"first")
    assert key is not None
    return volume, key


def key_of(volume: Volume, password: bytes) -> bytes | None:
    async def find() -> bytes:
        header, materials = await co_load(volume.file)
        return keys.unlock(header, materials, password)[1]

    try:
        return volume.context.run(find())  # type: ignore[no-any-return]
    except BlockError as error:
        assert str(error) == "Invalid password, cannot unlock any keyslot"
        return None


def test_no_password_is_written_behind_the_header() -> None:
    """A free slot's place is a number from outside: behind a qcow2's header there are clusters of the disk."""
    host = SimHost(0)
    volume, key = made(host)

    async def end_of(slot: int) -> int:
        header, _ = await co_load(volume.file)
        return header.slots[slot].offset * 512 + header.material_bytes

    end = volume.context.run(end_of(2))
    before = host.content(PATH)
    for slot in (2, None):
        change = SlotChange("active", new_password=b"new", keyslot=slot)
        with pytest.raises(ImageError, match="the material of keyslot 2 would lie behind the encryption header"):
            volume.context.run(co_amend(volume.file, b"first", change, limit=end - 1))
        assert host.content(PATH) == before
    assert volume.context.run(co_amend(volume.file, b"first", CHANGES["add"], limit=end)) == [2]
    assert key_of(volume, b"new") == key
    volume.close()


@pytest.mark.parametrize("op", [READ, WRITE, FLUSH], ids=lambda op: OP_NAMES[op])
@pytest.mark.parametrize("change", CHANGES)
def test_every_failure_while_passwords_change(change: str, op: int) -> None:
    for position in range(1000):
        host = SimHost(position)
        volume, key = made(host)
        fault = host.fault(op=op, errno=errno.EIO, after=position, times=None)
        try:
            volume.context.run(co_amend(volume.file, b"second", CHANGES[change]))
            failed = False
        except OSError as error:
            assert error.errno == errno.EIO
            failed = True
        hits = fault.hits
        fault.remove()
        for chance in range(2):  # the power is cut now
            after = SimHost(chance)
            after.add_file(PATH, host.survivor(PATH))
            survivor = Volume(after)
            assert key_of(survivor, b"second") == key
            assert key_of(survivor, b"first") in ((key,) if change == "add" else (key, None))
            assert key_of(survivor, b"new") in ((key, None) if change == "add" else (None,))
            if not failed:
                assert key_of(survivor, b"new") == (key if change == "add" else None)
                assert key_of(survivor, b"first") == (key if change == "add" else None)
            survivor.close()
        volume.close()
        if not hits:
            assert not failed
            return
    raise AssertionError("there is no end of I/O")


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_failures_while_a_header_is_made_or_opened(op: int, number: int) -> None:
    """They reach who asked, and nothing stays behind."""
    for position in range(1000):
        host = SimHost(position)
        host.create_file(PATH, 0)
        volume = Volume(host)
        fault = host.fault(op=op, errno=number, after=position, times=1)
        failed = False
        try:
            volume.make()
            volume.context.run(co_unlock(volume.file, b"first"))
        except OSError as error:
            assert error.errno == number
            failed = True
        hits = fault.hits
        fault.remove()
        assert failed == bool(hits)
        if failed:
            volume.make()
        assert volume.context.run(co_unlock(volume.file, b"first")).slot == 0
        volume.close()
        if not hits:
            return
    raise AssertionError("there is no end of I/O")
