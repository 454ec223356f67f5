# SPDX-License-Identifier: Apache-2.0
"""bh-nbd --list: what another NBD server offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf.tools.getopt import fail
from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd.client_handshake import ClientHandshake, ClientState, Goal
from bottomhalf.wire.nbd.constants import FLAG_HAS_FLAGS

if TYPE_CHECKING:
    from bottomhalf.host.protocol import Address
    from bottomhalf.wire.nbd.client_options import ClientExport

RECEIVE_BYTES: Final = 65536
FLAG_NAMES: Final = (  # from bit 1 on
    "readonly", "flush", "fua", "rotational", "trim", "zeroes", "df", "multi", "resize", "cache", "fast-zero",
    "block-status-payload",
)  # fmt: skip


def list_exports(program: str, address: Address) -> int:
    """Print the exports of the server at an address; the exit status."""
    try:
        exports = _ask(address)
    except OSError as error:
        from bottomhalf.chardev.addresses import why_not_connected

        fail(program, why_not_connected(address, error))
    except ProtocolError as error:
        fail(program, f"{address}: {error}")
    print(f"exports available: {len(exports)}")
    for export in exports:
        _show(export)
    return 0


def _ask(address: Address) -> list[ClientExport]:
    from bottomhalf.aio import AioContext, wait_while

    context = AioContext()
    socket = context.host.connect(address)
    handshake = ClientHandshake(goal=Goal.LIST)
    buffer = bytearray(RECEIVE_BYTES)
    failure: list[Exception] = []

    def readable() -> None:
        try:
            count = socket.recv_into(buffer)
            if count:
                handshake.receive(memoryview(buffer)[:count])
            else:
                handshake.eof()
        except BlockingIOError:
            pass
        except (OSError, ProtocolError) as error:
            failure.append(error)
        try:
            output = handshake.take_output()
            if output:
                socket.send(output)  # some bytes to one who has just said something: there is room
        except OSError as error:
            failure.append(error)

    context.set_fd_handler(socket.fileno(), readable)
    try:
        wait_while(
            context,
            lambda: not failure and handshake.state is not ClientState.CLOSED,
            what=f"the exports of {address}",
        )
    finally:
        context.set_fd_handler(socket.fileno())
        socket.close()
        context.close()
    if failure:
        raise failure[0]
    return list(handshake.exports)


def _show(export: ClientExport) -> None:
    print(f" export: '{export.name}'")
    if export.description:
        print(f"  description: {export.description}")
    if export.flags & FLAG_HAS_FLAGS:
        names = [name for bit, name in enumerate(FLAG_NAMES, 1) if export.flags >> bit & 1]
        print(f"  size:  {export.size}")
        print(f"  flags: {export.flags:#x} ( {' '.join(names)} )")
    if export.minimum_block_size:
        print(f"  min block: {export.minimum_block_size}")
        print(f"  opt block: {export.preferred_block_size}")
        print(f"  max block: {export.maximum_block_size}")
    print("  transaction size: 32-bit")
    if export.contexts:
        print(f"  available meta contexts: {len(export.contexts)}")
        for context in export.contexts:
            print(f"   {context}")
