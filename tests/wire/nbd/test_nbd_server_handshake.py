# SPDX-License-Identifier: Apache-2.0
"""The server's negotiation against vectors written by hand from the specification."""

from __future__ import annotations

import struct

import pytest

from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd import constants as c
from bottomhalf.wire.nbd.export import READ_ONLY_FLAGS, ExportInfo
from bottomhalf.wire.nbd.server_handshake import ServerHandshake, State
from tests.wire.nbd.nbd_model import Table, option, reply

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
FIXED = b"\x00\x00\x00\x03"
DISK = ExportInfo(
    "disk",
    1 << 20,
    description="spinning",
    minimum_block_size=512,
    contexts=("base:allocation", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"),
)
ROM = ExportInfo("rom", 4096, flags=READ_ONLY_FLAGS)
STRUCTURED = option(8)


def start(flags: bytes = FIXED, *exports: ExportInfo) -> ServerHandshake:
    handshake = ServerHandshake(Table(*(exports or (DISK, ROM))))
    assert handshake.take_output() == GREETING
    handshake.receive(flags)
    assert handshake.take_output() == b""
    assert handshake.state is State.OPTION_HEADER
    return handshake


def answers(handshake: ServerHandshake, data: bytes) -> list[tuple[int, int, bytes]]:
    """The option replies to ``data``: option, type, payload."""
    handshake.receive(data)
    output = handshake.take_output()
    found = []
    while output:
        magic, number, kind, length = struct.unpack_from(">QIII", output)
        assert magic == 0x0003E889045565A9
        found.append((number, kind, output[20 : 20 + length]))
        output = output[20 + length :]
    return found


def only_error(handshake: ServerHandshake, data: bytes) -> tuple[int, bytes]:
    ((_, kind, text),) = answers(handshake, data)
    return kind, text


def go(name: bytes = b"disk", *wanted: int) -> bytes:
    data = struct.pack(">I", len(name)) + name + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)
    return option(7, data)


def info(name: bytes = b"disk", *wanted: int) -> bytes:
    return go(name, *wanted).replace(b"IHAVEOPT\x00\x00\x00\x07", b"IHAVEOPT\x00\x00\x00\x06")


def contexts(number: int, *queries: bytes, name: bytes = b"disk") -> bytes:
    data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return option(number, data + b"".join(struct.pack(">I", len(query)) + query for query in queries))


def test_export_name_without_zeroes() -> None:
    handshake = start()
    handshake.receive(b"IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x04disk" + b"left over")
    assert handshake.take_output() == b"\x00\x00\x00\x00\x00\x10\x00\x00" + b"\x0c\x6d"
    assert handshake.state is State.NEGOTIATED
    negotiated = handshake.negotiated
    assert negotiated is not None
    assert negotiated.export == DISK
    assert not negotiated.structured_replies
    assert negotiated.contexts == {}
    assert negotiated.leftover == b"left over"
    with pytest.raises(ValueError, match="over"):
        handshake.receive(b"x")


def test_export_name_with_zeroes_and_without_fixed_newstyle() -> None:
    handshake = start(b"\x00\x00\x00\x00")
    handshake.receive(option(1, b"rom"))
    assert handshake.take_output() == b"\x00\x00\x00\x00\x00\x00\x10\x00" + b"\x04\x0f" + bytes(124)


def test_empty_name_is_the_default_export() -> None:
    handshake = start()
    handshake.receive(option(1))
    assert handshake.negotiated is not None and handshake.negotiated.export == DISK


def test_go_tells_name_description_block_sizes_export() -> None:
    handshake = start()
    handshake.receive(go(b"", 1, 3, 2, 77))
    expected = (
        reply(7, 3, b"\x00\x01disk")
        + reply(7, 3, b"\x00\x02spinning")
        + reply(7, 3, b"\x00\x03" + b"\x00\x00\x02\x00" + b"\x00\x00\x10\x00" + b"\x02\x00\x00\x00")
        + reply(7, 3, b"\x00\x00" + b"\x00\x00\x00\x00\x00\x10\x00\x00" + b"\x0c\x6d")
        + reply(7, 1)
    )
    assert handshake.take_output() == expected
    assert handshake.negotiated is not None and handshake.negotiated.alignment == 512


def test_go_without_asking_for_block_sizes_is_told_minimum_1() -> None:
    handshake = start()
    found = answers(handshake, go())
    assert (7, 3, struct.pack(">HIII", 3, 1, 4096, 32 << 20)) in found
    assert handshake.negotiated is not None and handshake.negotiated.alignment == 1


def test_info_leaves_the_haggling_going() -> None:
    handshake = start()
    found = answers(handshake, info(b"disk", 3))
    assert [kind for _, kind, _ in found] == [3, 3, 3, 1]
    assert found[1] == (6, 3, struct.pack(">HIII", 3, 512, 4096, 32 << 20))
    assert handshake.state is State.OPTION_HEADER


def test_info_without_asking_for_block_sizes_says_that_they_are_required() -> None:
    handshake = start()
    found = answers(handshake, info(b"disk"))
    assert found[-1][1] == c.REP_ERR_BLOCK_SIZE_REQD
    assert answers(handshake, info(b"rom"))[-1][1] == c.REP_ACK


def test_df_is_offered_with_structured_replies_only() -> None:
    handshake = start()
    assert answers(handshake, STRUCTURED) == [(8, 1, b"")]
    found = answers(handshake, go(b"disk", 3))
    assert (7, 3, struct.pack(">HQH", 0, 1 << 20, 0x0CED)) in found
    assert handshake.negotiated is not None and handshake.negotiated.structured_replies


def test_structured_replies_twice_and_with_data_are_invalid() -> None:
    handshake = start()
    assert only_error(handshake, option(8, b"x"))[0] == c.REP_ERR_INVALID
    assert answers(handshake, STRUCTURED) == [(8, 1, b"")]
    assert only_error(handshake, STRUCTURED)[0] == c.REP_ERR_INVALID


def test_list() -> None:
    handshake = start()
    handshake.receive(option(3))
    expected = (
        reply(3, 2, b"\x00\x00\x00\x04diskspinning") + reply(3, 2, b"\x00\x00\x00\x03rom") + reply(3, 1)
    )
    assert handshake.take_output() == expected
    assert only_error(handshake, option(3, b"?"))[0] == c.REP_ERR_INVALID


def test_abort_is_acknowledged_and_ends_it() -> None:
    handshake = start()
    handshake.receive(option(2) + b"whatever follows")
    assert handshake.take_output() == reply(2, 1)
    assert handshake.state is State.ABORTED


@pytest.mark.parametrize("number", [4, 11, 12, 0, 0xFFFFFFFF])
def test_what_is_not_offered_is_unsupported(number: int) -> None:
    handshake = start()
    ((answered, kind, text),) = answers(handshake, option(number, b"some data"))
    assert (answered, kind) == (number, c.REP_ERR_UNSUP)
    assert b"not supported" in text
    assert answers(handshake, option(3))[-1][1] == c.REP_ACK


def test_unknown_exports() -> None:
    handshake = start()
    kind, text = only_error(handshake, go(b"nope"))
    assert kind == c.REP_ERR_UNKNOWN and b"'nope'" in text
    assert only_error(handshake, info(b"nope"))[0] == c.REP_ERR_UNKNOWN
    with pytest.raises(ProtocolError, match="nope") as caught:
        handshake.receive(option(1, b"nope"))
    assert handshake.state is State.FAILED and handshake.error is caught.value
    assert handshake.take_output() == b""
    with pytest.raises(ProtocolError):
        handshake.receive(b"")


def test_export_name_that_is_no_text() -> None:
    with pytest.raises(ProtocolError, match="UTF-8"):
        start().receive(option(1, b"\xff"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x00\x00\x00\x04dis",
        b"\x00\x00\x00\x04disk",
        b"\x00\x00\x00\x04disk\x00",
        b"\x00\x00\x00\x04disk\x00\x01",
        b"\x00\x00\x00\x04disk\x00\x01\x00",
        b"\x00\x00\x00\x04disk\x00\x00\x00",
        b"\xff\xff\xff\xffdisk\x00\x00",
        b"\x00\x00\x00\x01\xff\x00\x00",
        struct.pack(">I", 4097) + b"x" * 4097 + b"\x00\x00",
    ],
)
def test_malformed_go_and_info_are_invalid(data: bytes) -> None:
    handshake = start()
    assert only_error(handshake, option(7, data))[0] == c.REP_ERR_INVALID
    assert only_error(handshake, option(6, data))[0] == c.REP_ERR_INVALID


def test_contexts_need_structured_replies() -> None:
    handshake = start()
    assert only_error(handshake, contexts(9))[0] == c.REP_ERR_INVALID
    assert only_error(handshake, contexts(10, b"base:allocation"))[0] == c.REP_ERR_INVALID


def test_list_contexts() -> None:
    handshake = start()
    answers(handshake, STRUCTURED)
    everything = [b"\0\0\0\0" + name.encode() for name in DISK.contexts]

    def listed(*queries: bytes) -> list[bytes]:
        found = answers(handshake, contexts(9, *queries))
        assert found[-1] == (9, 1, b"")
        assert all(kind == 4 for _, kind, _ in found[:-1])
        return [data for _, _, data in found[:-1]]

    assert listed() == everything
    assert listed(b"base:") == everything[:1]
    assert listed(b"qemu:") == everything[1:]
    assert listed(b"qemu:dirty-bitmap:") == everything[1:]
    assert listed(b"qemu:dirty-bitmap:b1", b"base:allocation", b"base:") == [everything[0], everything[2]]
    assert listed(b"base:alloc", b"nope:", b"", b"\xff", b"x" * 5000) == []
    assert only_error(handshake, contexts(9, name=b"nope"))[0] == c.REP_ERR_UNKNOWN


def test_set_contexts_selects_exact_names_with_ids() -> None:
    handshake = start()
    found = answers(
        handshake, STRUCTURED + contexts(10, b"qemu:dirty-bitmap:b1", b"base:allocation", b"qemu:")
    )
    assert found[1:] == [
        (10, 4, b"\x00\x00\x00\x00base:allocation"),
        (10, 4, b"\x00\x00\x00\x03qemu:dirty-bitmap:b1"),
        (10, 1, b""),
    ]
    handshake.receive(go())
    assert handshake.negotiated is not None
    assert handshake.negotiated.contexts == {0: "base:allocation", 3: "qemu:dirty-bitmap:b1"}


@pytest.mark.parametrize(
    "later",
    [
        contexts(10),
        contexts(10, name=b"nope"),
        option(10, b"\x00"),
        option(10, bytes(c.MAX_OPTION_DATA + 1)),
        contexts(10, b"base:allocation", name=b"rom"),
    ],
)
def test_a_later_set_replaces_the_contexts_even_if_it_fails(later: bytes) -> None:
    handshake = start()
    handshake.receive(STRUCTURED + contexts(10, b"base:allocation") + later + go())
    assert handshake.negotiated is not None and handshake.negotiated.contexts == {}


def test_contexts_of_another_export_do_not_count() -> None:
    handshake = start()
    handshake.receive(STRUCTURED + contexts(10, b"base:allocation") + go(b"rom"))
    assert handshake.negotiated is not None and handshake.negotiated.contexts == {}


def test_contexts_hold_for_the_default_name_and_for_export_name() -> None:
    handshake = start()
    handshake.receive(STRUCTURED + contexts(10, b"base:allocation", name=b"") + option(1, b"disk"))
    assert handshake.negotiated is not None
    assert handshake.negotiated.contexts == {0: "base:allocation"}


@pytest.mark.parametrize("flags", [b"\x00\x00\x00\x04", b"\x80\x00\x00\x03", b"GET "])
def test_unknown_client_flags_close(flags: bytes) -> None:
    handshake = ServerHandshake(Table(DISK))
    with pytest.raises(ProtocolError, match="client flags"):
        handshake.receive(flags)


def test_wrong_option_magic_closes_and_tells_where() -> None:
    handshake = start()
    with pytest.raises(ProtocolError, match="magic") as caught:
        handshake.receive(option(3) + b"X" * 16)
    assert caught.value.offset == 4 + 16
    assert handshake.take_output().endswith(reply(3, 1))  # what came before is still answered


def test_options_other_than_export_name_need_fixed_newstyle() -> None:
    handshake = start(b"\x00\x00\x00\x02")
    with pytest.raises(ProtocolError, match="fixed newstyle"):
        handshake.receive(option(3))


# --- Limits -----------------------------------------------------------------------------------------------


def test_option_data_too_long_to_keep_is_drained_and_refused() -> None:
    handshake = start()
    length = c.MAX_OPTION_DATA + 1
    handshake.receive(option(7, bytes(length))[: 16 + 100])
    assert handshake.state is State.DRAINING
    assert handshake.take_output() == b""
    handshake.receive(bytes(length - 101))
    assert handshake.take_output() == b""
    assert only_error(handshake, b"\0") == (
        c.REP_ERR_TOO_BIG,
        f"{length} bytes of option data are too many".encode(),
    )
    assert handshake.state is State.OPTION_HEADER
    assert only_error(handshake, option(7, bytes(c.MAX_OPTION_DATA)))[0] == c.REP_ERR_INVALID  # kept


@pytest.mark.parametrize(
    ("number", "length"), [(7, c.MAX_OPTION_LENGTH + 1), (1, c.MAX_EXPORT_NAME + 1), (99, 0xFFFFFFFF)]
)
def test_option_longer_than_can_be_drained_closes(number: int, length: int) -> None:
    handshake = start()
    with pytest.raises(ProtocolError, match="too long"):
        handshake.receive(struct.pack(">QII", c.IHAVEOPT, number, length))


def test_longest_export_name() -> None:
    name = "x" * c.MAX_EXPORT_NAME
    handshake = start(FIXED, ExportInfo(name, 1))
    assert answers(handshake, info(name.encode()))[-1][1] == c.REP_ACK
    handshake.receive(option(1, name.encode()))
    assert handshake.state is State.NEGOTIATED


def test_number_of_options() -> None:
    handshake = start()
    for _ in range(c.MAX_OPTIONS):
        handshake.receive(option(99))
        handshake.take_output()
    with pytest.raises(ProtocolError, match="options in one handshake"):
        handshake.receive(option(99))


def test_number_of_queries_and_information_requests() -> None:
    handshake = start()
    answers(handshake, STRUCTURED)
    assert answers(handshake, contexts(9, *[b"q"] * c.MAX_QUERIES))[-1][1] == c.REP_ACK
    assert only_error(handshake, contexts(9, *[b"q"] * (c.MAX_QUERIES + 1)))[0] == c.REP_ERR_TOO_BIG
    # A lie about the number is found without believing it.
    lie = b"\x00\x00\x00\x04disk" + struct.pack(">I", c.MAX_QUERIES) + b"\x00"
    assert only_error(handshake, option(9, lie))[0] == c.REP_ERR_INVALID
    many = info(b"rom", *[3] * c.MAX_INFO_REQUESTS)
    assert answers(handshake, many)[-1][1] == c.REP_ACK
    assert only_error(handshake, info(b"rom", *[3] * (c.MAX_INFO_REQUESTS + 1)))[0] == c.REP_ERR_TOO_BIG


def test_a_client_that_never_reads_is_cut_off() -> None:
    handshake = start(FIXED, *[ExportInfo(f"{i}" + "x" * 4000, 1) for i in range(2000)])
    flood = option(3) * 10
    with pytest.raises(ProtocolError, match="without reading"):
        handshake.receive(flood)
    assert len(handshake.take_output()) < 2 * c.MAX_PENDING_OUTPUT


def test_error_texts_keep_the_limit_of_strings() -> None:
    name = "\N{SNOWMAN}" * 1300
    handshake = start()
    _, text = only_error(handshake, go(name.encode()))
    assert len(text) < 400 and text.decode()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": -1},
        {"size": 1 << 63},
        {"flags": 2},
        {"flags": 1 | c.FLAG_SEND_DF},
        {"minimum_block_size": 3},
        {"minimum_block_size": 128 << 10},
        {"minimum_block_size": 8192},
        {"maximum_block_size": 33 << 20},
        {"maximum_block_size": 0},
        {"preferred_block_size": 0},
        {"contexts": ("a:b", "a:b")},
    ],
)
def test_export_info_is_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="export 'x'"):
        ExportInfo(**{"name": "x", "size": 1, **wrong})  # type: ignore[arg-type]


def test_context_ids_are_qemu_s() -> None:
    export = ExportInfo("x", 1, contexts=("qemu:dirty-bitmap:a", "qemu:allocation-depth", "x:y"))
    assert [export.context_id(name) for name in export.contexts] == [2, 1, 3]


def test_protocol_error_says_no_more_than_it_knows() -> None:
    assert str(ProtocolError("bad")) == "bad"
    error = ProtocolError("bad", expected="a", got="b", offset=3, cause="probably a client bug")
    assert str(error) == "bad, expected a, got b, at byte 3 of the stream (probably a client bug)"
