# SPDX-License-Identifier: Apache-2.0
"""Both ends against each other: recorded conversations cut everywhere, random requests, and noise.

"Every prefix of a recorded NBD conversation fed to the server core leaves it in a defined state; hypothesis
drives both NBD ends against each other."
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd import constants as c
from bottomhalf.wire.nbd.client import Client
from bottomhalf.wire.nbd.client_handshake import ClientHandshake, ClientState, Goal
from bottomhalf.wire.nbd.client_replies import Completion
from bottomhalf.wire.nbd.errors import NegotiationRefused
from bottomhalf.wire.nbd.server_handshake import State
from tests.wire.nbd.nbd_model import MemoryServer, option, request

SIZE = 8192


def shake_hands(server: MemoryServer, handshake: ClientHandshake, said: bytearray, heard: bytearray) -> None:
    """Carry bytes to and fro until the client's negotiation ends."""
    while handshake.state not in (ClientState.NEGOTIATED, ClientState.CLOSED):
        output = server.take_output()
        heard += output
        handshake.receive(output)
        answer = handshake.take_output()
        said += answer
        server.receive(answer)


@dataclass
class Recording:
    said: bytes  # by the client
    heard: bytes  # from the server
    disk: bytes  # afterwards


def record(structured: bool) -> Recording:
    """A conversation with every option and every command in it, good and bad. What is written and what is
    read at the same time does not overlap, so that the answers do not depend on how the requests arrive."""
    said, heard = bytearray(), bytearray()
    server = MemoryServer(bytearray(range(256)) * 32)
    handshake = ClientHandshake("disk", structured_replies=structured)
    shake_hands(server, handshake, said, heard)
    # Put options that this client does not send before its first one.
    extra = option(3) + option(5) + option(9, b"\0\0\0\0\0\0\0\0") + option(6, b"\0\0\0\0\0\0") + option(99)
    said[4:4] = extra
    assert handshake.negotiated is not None
    client = Client(handshake.negotiated, strict=False)
    packets = [
        client.read(0, 512),
        client.write(512, b"w" * 100, fua=True),
        client.read(4096, 4096),
        client.flush(),
        client.trim(1024, 512),
        client.write_zeroes(2048, 512, no_hole=True),
        client.cache(0, 4096),
        client.read(SIZE, 1),
        client.write(SIZE - 1, b"past the end"),
        client.write(3000, b"xyz"),
        client.read(0, 0),
        *[client.read(i * 100, 10) for i in range(6)],
    ]
    if structured:
        packets += [client.block_status(0, SIZE), client.block_status(0, 512, one=True)]
    stream = b"".join(packet for packet, _ in packets) + client.disconnect()
    server.receive(stream)
    heard += server.take_output()
    assert server.closed and server.error is None
    return Recording(bytes(said + stream), bytes(heard), bytes(server.disk))


@pytest.fixture(scope="module", params=[True, False], ids=["structured", "simple"])
def recording(request: pytest.FixtureRequest) -> Recording:
    return record(request.param)


def replay(pieces: list[bytes]) -> MemoryServer:
    server = MemoryServer(bytearray(range(256)) * 32)
    for piece in pieces:
        server.receive(piece)
        assert server.error is None
        assert server.handshake.state is not State.FAILED
        assert (server.parser is not None) == (server.handshake.state is State.NEGOTIATED)
    return server


def test_every_cut_of_a_recorded_conversation_gives_the_same_answers(recording: Recording) -> None:
    whole = replay([recording.said])
    expected = whole.take_output()
    assert whole.closed and bytes(whole.disk) == recording.disk
    assert expected.endswith(recording.heard[-400:])
    for cut in range(len(recording.said)):
        server = replay([recording.said[:cut], recording.said[cut:]])
        assert server.take_output() == expected
        assert server.closed and bytes(server.disk) == recording.disk


@pytest.mark.parametrize("size", [1, 2, 3, 7, 28, 29])
def test_pieces_of_one_size(recording: Recording, size: int) -> None:
    said = recording.said
    server = replay([said[i : i + size] for i in range(0, len(said), size)])
    assert server.closed and bytes(server.disk) == recording.disk
    assert server.take_output() == replay([said]).take_output()


def test_every_prefix_leaves_a_defined_state_and_its_answers_are_a_prefix(recording: Recording) -> None:
    expected = replay([recording.said]).take_output()
    server = MemoryServer(bytearray(range(256)) * 32)
    output = b""
    for end in range(1, len(recording.said) + 1):
        server.receive(recording.said[end - 1 : end])
        output += server.take_output()
        assert expected.startswith(output)
        assert server.closed == (end == len(recording.said))
    assert output == expected


@dataclass
class Link:
    """A client and a server that are connected through cuts."""

    server: MemoryServer
    client: Client
    random: random.Random

    def exchange(self, packets: list[bytes]) -> list[Completion]:
        for piece in self._cut(b"".join(packets)):
            self.server.receive(piece)
        found = []
        for piece in self._cut(self.server.take_output()):
            found += self.client.receive(piece)
        return found

    def _cut(self, data: bytes) -> list[bytes]:
        places = sorted(self.random.randrange(len(data) + 1) for _ in range(self.random.randrange(6)))
        return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def connect(seed: int, structured: bool) -> Link:
    server = MemoryServer(bytearray(SIZE), seed=seed)
    handshake = ClientHandshake(
        "", structured_replies=structured, contexts=("base:allocation", "qemu:dirty-bitmap:b0")
    )
    shake_hands(server, handshake, bytearray(), bytearray())
    assert handshake.negotiated is not None
    return Link(server, Client(handshake.negotiated), random.Random(seed))


OFFSETS = st.integers(0, SIZE - 1)
COMMANDS = st.tuples(
    st.sampled_from(["read", "read", "read", "write", "flush", "trim", "zero", "cache", "status"]),
    OFFSETS,
    st.integers(1, SIZE),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans(), st.lists(st.lists(COMMANDS, max_size=9), max_size=6))
def test_both_ends_agree_with_a_model(
    seed: int, structured: bool, rounds: list[list[tuple[str, int, int, bool]]]
) -> None:
    link = connect(seed, structured)
    client = link.client
    model = bytearray(SIZE)
    for commands in rounds:
        packets = []
        expected: dict[int, bytes | None] = {}
        # Requests under way at once have no order: one kind of change or only reads per round.
        changing = any(name in ("write", "trim", "zero") for name, *_ in commands)
        for name, offset, length, flag in commands:
            length = min(length, SIZE - offset)
            data: bytes | None = None
            if name == "read":
                if changing:
                    continue
                packet, cookie = client.read(offset, length, dont_fragment=flag and structured)
                data = bytes(model[offset : offset + length])
            elif name == "write":
                payload = bytes([len(packets) + 1]) * length
                packet, cookie = client.write(offset, payload, fua=flag)
                model[offset : offset + length] = payload
            elif name == "flush":
                packet, cookie = client.flush()
            elif name == "cache":
                packet, cookie = client.cache(offset, length)
            elif name == "status":
                if not structured:
                    continue
                packet, cookie = client.block_status(offset, length, one=flag)
            elif any(other == "write" for other, *_ in commands):
                continue
            elif name == "trim":
                packet, cookie = client.trim(offset, length, fua=flag)
                model[offset : offset + length] = bytes(length)
            else:
                packet, cookie = client.write_zeroes(offset, length, fua=flag)
                model[offset : offset + length] = bytes(length)
            packets.append(packet)
            expected[cookie] = data
        found = link.exchange(packets)
        assert sorted(done.cookie for done in found) == sorted(expected)
        for done in found:
            if done.error:
                assert done.command == c.CMD_READ and done.error == c.NBD_EIO
                continue
            assert done.data == expected[done.cookie]
            if done.command == c.CMD_BLOCK_STATUS:
                assert set(done.extents) == {0, 2}
        # The server has read all, and in the same order as the model where order matters.
        assert bytes(link.server.disk) == bytes(model)
        assert client.in_flight == 0 and not link.server.closed
    link.server.receive(client.disconnect())
    assert link.server.closed and link.server.error is None
    client.eof()


def test_listing_a_server() -> None:
    server = MemoryServer(bytearray(SIZE))
    handshake = ClientHandshake(goal=Goal.LIST)
    shake_hands(server, handshake, bytearray(), bytearray())
    assert server.closed and server.error is None
    first, second = handshake.exports
    assert (first.name, first.description, first.size) == ("disk", "a disk", SIZE)
    assert first.contexts == ["base:allocation", "qemu:dirty-bitmap:b0"]
    assert (second.name, second.size, second.contexts) == ("other", 512, [])


# --- Noise ------------------------------------------------------------------------------------------------

RECORDINGS = [record(True), record(False)]
MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "cut", "add"]), st.binary(max_size=9))
)


def mutate(data: bytes, mutations: list[tuple[float, str, bytes]]) -> bytes:
    mutated = bytearray(data)
    for where, how, noise in mutations:
        place = int(where * len(mutated))
        if how == "add":
            mutated[place:place] = noise
        elif how == "cut":
            del mutated[place : place + len(noise)]
        else:
            mutated[place : place + len(noise)] = noise
    return bytes(mutated)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(RECORDINGS), MUTATIONS, st.integers(1, 2000))
def test_a_server_survives_any_change_of_what_it_hears(
    recording: Recording, mutations: list[tuple[float, str, bytes]], size: int
) -> None:
    said = mutate(recording.said, mutations)
    server = MemoryServer(bytearray(SIZE))
    for i in range(0, len(said), size):
        server.receive(said[i : i + size])
        server.take_output()
    assert len(server.disk) == SIZE
    assert server.error is None or server.closed


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_a_server_survives_noise(noise: bytes, negotiated: bool) -> None:
    server = MemoryServer(bytearray(SIZE))
    if negotiated:
        server.receive(b"\0\0\0\3" + option(1))
        # Noise of requests: magics are right, all else is not.
        noise = b"".join(
            b"\x25\x60\x95\x13\0" + noise[i : i + 23].ljust(23, b"\0") for i in range(0, len(noise), 23)
        )
    else:
        noise = b"\0\0\0\3" + b"".join(
            b"IHAVEOPT\0\0\0" + noise[i : i + 9].ljust(9, b"\0") for i in range(0, len(noise), 9)
        )
    server.receive(noise)
    assert len(server.disk) == SIZE


@settings(max_examples=400, deadline=None)
@given(st.booleans(), MUTATIONS, st.integers(1, 3000))
def test_a_client_survives_any_change_of_what_it_hears(
    structured: bool, mutations: list[tuple[float, str, bytes]], size: int
) -> None:
    recording = RECORDINGS[0 if structured else 1]
    heard = mutate(recording.heard, mutations)
    handshake = ClientHandshake("disk", structured_replies=structured)
    client: Client | None = None
    try:
        for i in range(0, len(heard), size):
            piece = heard[i : i + size]
            if client is None:
                handshake.receive(piece)
                if handshake.negotiated is None:
                    continue
                client = Client(handshake.negotiated, strict=False)
                for number in range(20):
                    if number in (0, 2):
                        client.read(0, (512, 0, SIZE)[number])
                    else:
                        client.flush()
                piece = handshake.negotiated.leftover
            client.receive(piece)
        (handshake if client is None else client).eof()
    except (ProtocolError, NegotiationRefused) as error:
        assert str(error)


def test_lying_lengths_of_requests_are_answered_not_believed() -> None:
    server = MemoryServer(bytearray(SIZE))
    server.receive(b"\0\0\0\3" + option(1))
    server.take_output()
    server.receive(request(0, 1, 0, 0xFFFFFFFF) + request(4, 2, 0, 0xFFFFFFFF) + request(7, 3, 0, 0xFFFFFFFF))
    assert server.take_output() == b"".join(
        b"\x67\x44\x66\x98\0\0\0\x16" + cookie.to_bytes(8, "big") for cookie in (1, 2, 3)
    )
    server.receive(request(1, 4, 0, 0xFFFFFFFF))
    assert server.closed and server.error is not None
