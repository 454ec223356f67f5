# SPDX-License-Identifier: Apache-2.0
"""JSON as QEMU reads and writes it: values, error texts, cuts, recovery, limits, order of members."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.wire.json_reader import JsonError, JsonStream, loads
from bottomhalf.wire.json_writer import bucket, dumps, qdict_order


def feed_all(data: bytes, size: int = 1 << 30, **limits: int) -> list[Any]:
    """What a stream makes of ``data`` in pieces of ``size`` bytes; errors as their texts."""
    stream = JsonStream(**limits)
    results: list[Any] = []
    for start in range(0, len(data), size):
        results += stream.feed(data[start : start + size])
    results += stream.finish()
    return [f"error: {value}" if isinstance(value, JsonError) else value for value in results]


VALUES = [
    ("{}", {}),
    ("[ ]", []),
    ("null", None),
    ("true", True),
    ("[false, -0, 0.5, -1.5e3, 1E-2]", [False, 0, 0.5, -1500.0, 0.01]),
    ("18446744073709551615", 2**64 - 1),
    ("-9223372036854775808", -(2**63)),
    ("18446744073709551616", float(2**64)),
    ("-9223372036854775809", float(-(2**63))),
    ('{\'a\': "it\'s", "b": \'say "x"\'}', {"a": "it's", "b": 'say "x"'}),
    (r'"\"\'\\\/\b\f\n\r\t"', "\"'\\/\b\f\n\r\t"),
    (r'"\u00e9\ud83d\ude00\u0000"', "é\U0001f600\0"),
    ('"é\U0001f600"', "é\U0001f600"),
    ('{"a": {"b": [[[{}]]]}}', {"a": {"b": [[[{}]]]}}),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_values(text: str, value: Any) -> None:
    result = loads(text)
    assert result == value
    assert type(result) is type(value)


def test_modified_utf8_spells_nul_in_two_bytes() -> None:
    assert loads(b'"a\xc0\x80b"') == "a\0b"


ERRORS = [
    (b"", "Expecting a JSON value"),
    (b"  \r\n\t", "Expecting a JSON value"),
    (b"1 2", "Expecting at most one JSON value"),
    (b"{]", "JSON parse error, expecting value"),
    (b"}", "JSON parse error, expecting value"),
    (b"[1,]", "JSON parse error, expecting value"),
    (b'{"a": }', "JSON parse error, expecting value"),
    (b'{"a": 1,}', "JSON parse error, expecting value"),
    (b"[,", "JSON parse error, expecting value"),
    (b"{1: 2}", "JSON parse error, key is not a string in object"),
    (b"{[1]: 2}", "JSON parse error, key is not a string in object"),
    (b"{[1 2]: 2}", "JSON parse error, expected separator in list"),
    (b'{"a" 1}', "JSON parse error, missing : in object pair"),
    (b'{"a"}', "JSON parse error, missing : in object pair"),
    (b'{"a": 1 "b": 2}', "JSON parse error, expected separator in dict"),
    (b'{"a": 1]', "JSON parse error, expected separator in dict"),
    (b"[1 2]", "JSON parse error, expected separator in list"),
    (b'{"a": 1, "a": 2}', "JSON parse error, duplicate key"),
    (b"nul", "JSON parse error, invalid keyword 'nul'"),
    (b"[1", "JSON parse error, premature EOI"),
    (b'"\\x"', "JSON parse error, invalid escape sequence in string"),
    (b'"\\u12g4"', "JSON parse error, \\u12g4 is not a valid Unicode character"),
    (b'"\\ud800"', "JSON parse error, \\ud800 is not a valid Unicode character"),
    (b'"\\ud800\\u0041"', "JSON parse error, \\ud800 is not a valid Unicode character"),
    (b'"\\udc00"', "JSON parse error, \\udc00 is not a valid Unicode character"),
    (b'"\\uffff"', "JSON parse error, \\uffff is not a valid Unicode character"),
    (b'"\xed\xa0\x80"', "JSON parse error, invalid UTF-8 sequence in string"),
    (b'"\x80"', "JSON parse error, invalid UTF-8 sequence in string"),
    ('"\ufdd0"'.encode(), "JSON parse error, invalid UTF-8 sequence in string"),
    (b"%p", "JSON parse error, stray '%'"),
    (b"\xff", "JSON parse error, stray '\ufffd'"),
    (b"{\x01", "JSON parse error, stray '\x01'"),
    (b"NaN", "JSON parse error, stray 'N'"),
    (b"-x", "JSON parse error, stray '-x'"),
    (b"01", "JSON parse error, stray '01'"),
    (b"1.", "JSON parse error, stray '1.'"),
    (b"1.5ex", "JSON parse error, stray '1.5ex'"),
    (b"'abc", "JSON parse error, stray ''abc'"),
    (b"'bad \xff", "JSON parse error, stray ''bad \ufffd'"),
    (b"'a\nb'", "JSON parse error, stray ''a\n'"),
    (b"'a\\\n'", "JSON parse error, stray ''a\\\n'"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_errors(text: bytes, message: str) -> None:
    with pytest.raises(JsonError) as caught:
        loads(text)
    assert str(caught.value) == message


def test_a_lone_surrogate_in_a_text_is_an_error_not_a_crash() -> None:
    with pytest.raises(JsonError):
        loads("'\udcff'")


SESSION = (
    b'{"execute": "qmp_capabilities"}\r\n{ \'execute\': \'a\', "arguments": {"x": [1, -2.5e1, true], '
    b'"s": "\\u00e9\xc3\xa9\\n"}, "id": null}[]17 "x"{"a" 1}{"b": \xff{"execute": "c"}\nfalse{\'bad \xff'
    b'\n{}12.5e+3 {"z": {"y": [[{}]]}}'
)


def test_the_bytes_may_be_cut_at_every_place() -> None:
    whole = feed_all(SESSION)
    assert [value for value in whole if isinstance(value, str)] == [
        "x",
        "error: JSON parse error, missing : in object pair",
        "error: JSON parse error, stray '\ufffd'",
        "error: JSON parse error, stray ''bad \ufffd'",
    ]
    assert {"execute": "c"} in whole
    assert whole[-1] == {"z": {"y": [[{}]]}}
    for cut in range(len(SESSION)):
        stream = JsonStream()
        values = stream.feed(SESSION[:cut]) + stream.feed(SESSION[cut:]) + stream.finish()
        assert [f"error: {v}" if isinstance(v, JsonError) else v for v in values] == whole
    for size in (1, 2, 3, 7):
        assert feed_all(SESSION, size) == whole


GARBAGE = [
    b"{]",
    b"{\xff",
    b"{\x01",
    b"{'bad \xff",
    b"{'execute': 'x', 'id':'\n",
    b"%p",
    b"}",
    b"\xff\xff",
    b"[1.x]",
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_good_command_after_garbage_is_understood(garbage: bytes) -> None:
    results = feed_all(garbage + b"\n{ 'execute': 'no-such-cmd' }")
    assert results[-1] == {"execute": "no-such-cmd"}
    assert all(text.startswith("error: ") for text in results[:-1])
    assert len(results) > 1


def test_a_sentinel_byte_resets_in_every_state() -> None:
    for prefix in (b"", b"{", b'{"a', b'{"a\\', b'{"a": 1', b'{"a": tru', b"[[[", b"'", b"-", b"1."):
        results = feed_all(prefix + b"\xff{}")
        assert results[-1] == {}, prefix
        assert results[0].startswith("error: JSON parse error, stray"), prefix


def test_a_word_or_number_is_complete_when_the_next_byte_has_come() -> None:
    stream = JsonStream()
    assert stream.feed(b"tr") == []
    assert stream.feed(b"ue") == []
    assert stream.feed(b" 12") == [True]
    assert stream.feed(b"3") == []
    assert stream.feed(b"\n") == [123]


def test_limits() -> None:
    nested = "error: JSON nesting depth limit exceeded"
    assert feed_all(b"[[[1]]]", nesting_max=3) == [[[[1]]]]
    assert feed_all(b"[[[[1]]]]", nesting_max=3)[0] == nested
    assert feed_all(b"[" * 1024 + b"]" * 1024)[0] != nested
    assert feed_all(b"[" * 1025)[0] == nested
    assert feed_all(b"[1,2]", token_count_max=5) == [[1, 2]]
    assert feed_all(b"[1,2,3]", token_count_max=5)[0] == "error: JSON token count limit exceeded"
    size = "error: JSON token size limit exceeded"
    assert feed_all(b"'aaaaaa'", token_bytes_max=9) == ["aaaaaa"]
    assert feed_all(b"'aaaaaaa'", token_bytes_max=9)[0] == size
    assert feed_all(b"'" + b"a" * 100, 1, token_bytes_max=50)[0] == size


def test_an_endless_string_is_given_up_and_does_not_stay_in_memory() -> None:
    stream = JsonStream(token_bytes_max=1000)
    results: list[Any] = []
    for _ in range(10):
        results += stream.feed(b"'" + b"x" * 999)
    assert "JSON token size limit exceeded" in [str(value) for value in results]
    assert len(stream._buffer) <= 1000
    assert stream.feed(b"\n{}")[-1] == {}


def test_deep_values_are_read_and_written_without_recursion() -> None:
    text = "[" * 1024 + "]" * 1024
    assert dumps(loads(text)) == text


def test_a_long_string_in_small_pieces_takes_linear_time() -> None:
    stream = JsonStream()
    stream.feed(b'"')
    for _ in range(20_000):
        assert stream.feed(b"xxxxxxxx") == []
    assert stream.feed(b'"') == ["x" * 160_000]


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
KEYS = st.text("abc-_é", max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS
    | st.text(st.characters(exclude_categories=["Cs", "Cn"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=15,
)  # fmt: skip


@given(JSON, st.booleans())
def test_what_is_written_can_be_read(value: Any, pretty: bool) -> None:
    text = dumps(value, pretty=pretty)
    assert text.isascii()
    assert loads(text) == value
    assert json.loads(text) == value


@given(JSON, st.integers(1, 9))
def test_the_standard_library_writes_what_we_read(value: Any, size: int) -> None:
    data = json.dumps(value, ensure_ascii=False).encode()
    assert feed_all(data, size) == [value]


TOKENS = [b"{", b"}", b"[", b"]", b":", b",", b"'a'", b'"', b"'", b"\\", b"1", b"-", b"e", b"true", b" "]
TOKENS += [b"\n", b"\xff", b"\x00", b"x", b"."]


@given(st.lists(st.sampled_from(TOKENS)), st.integers(1, 5))
def test_any_tokens_in_any_pieces_give_the_same(parts: list[bytes], size: int) -> None:
    data = b"".join(parts)
    assert feed_all(data, size) == feed_all(data)


@given(st.binary())
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    stream = JsonStream()
    stream.feed(data)
    stream.finish()
    assert stream.feed(b"\n{}") == [{}]


def test_order_of_members() -> None:
    assert dumps({"id": 1, "return": {}}) == '{"return": {}, "id": 1}'
    error = {"error": {"desc": "D", "class": "C"}, "id": 1}
    assert dumps(error) == '{"id": 1, "error": {"class": "C", "desc": "D"}}'
    version = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}
    assert dumps(version) == '{"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}'
    event = {"event": "E", "data": {}, "timestamp": {"microseconds": 2, "seconds": 1}}
    assert dumps(event) == '{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "E", "data": {}}'


def test_in_one_bucket_the_newest_comes_first() -> None:
    by_bucket: dict[int, str] = {}
    for number in range(2000):
        name = f"k{number}"
        first = by_bucket.setdefault(bucket(name), name)
        if first != name:
            assert qdict_order([first, name]) == [name, first]
            assert qdict_order([name, first]) == [first, name]
            return
    raise AssertionError("no collision found")


def test_forms() -> None:
    assert dumps([1, "a", None, True, 1.5, {}, []]) == '[1, "a", null, true, 1.5, {}, []]'
    assert dumps([], pretty=True) == "[\n]"
    assert (
        dumps({"a": [1, {"b": 2}]}, pretty=True)
        == '{\n    "a": [\n        1,\n        {\n            "b": 2\n        }\n    ]\n}'
    )
    assert dumps('"\\\b\f\n\r\t\x01\x7fé\U0001f600\udcff') == (
        '"\\"\\\\\\b\\f\\n\\r\\t\\u0001\\u007F\\u00E9\\uD83D\\uDE00\\uFFFD"'
    )
    assert dumps(0.1) == "0.10000000000000001"
    assert dumps([float("inf"), float("-inf"), float("nan")]) == "[1e999, -1e999, null]"
    with pytest.raises(TypeError):
        dumps({"a": object()})
