# SPDX-License-Identifier: Apache-2.0
"""The grammar of options: keyval, the older flat form, JSON, help."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.qapi import keyval
from bottomhalf.qapi.block import BlockdevOptions, BlockdevOptionsFile, BlockdevOptionsNull
from bottomhalf.qapi.errors import HelpRequested, OptionError
from bottomhalf.qapi.keyval import format_keyval, parse_keyval, parse_keyval_help, parse_options
from bottomhalf.qapi.qemu_opts import id_wellformed, parse_qemu_opts
from bottomhalf.wire.json_reader import loads


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("a=1,", {"a": "1"}),
        ("a=", {"a": ""}),
        ("a=,b=", {"a": "", "b": ""}),
        ("a=1,b=2", {"a": "1", "b": "2"}),
        ("a=1,a=2", {"a": "2"}),
        ("a==", {"a": "="}),
        ("a=x,,y", {"a": "x,y"}),
        ("a=,,", {"a": ","}),
        ("a=x,,,b=y", {"a": "x,", "b": "y"}),
        ("a=x\ny", {"a": "x\ny"}),
        ("a.b=1,a.c=2", {"a": {"b": "1", "c": "2"}}),
        ("a.b.c=1", {"a": {"b": {"c": "1"}}}),
        ("l.0=a,l.1=b", {"l": ["a", "b"]}),
        ("l.1=b,l.0=a", {"l": ["a", "b"]}),
        ("l.0=a,l.00=b", {"l": ["b"]}),
        ("l.0.x=a,l.1.x=b", {"l": [{"x": "a"}, {"x": "b"}]}),
        ("l.0.0=a", {"l": [["a"]]}),
        ("a-b_c=1", {"a-b_c": "1"}),
        ("__com.example_x=1", {"__com.example_x": "1"}),
        ("a.__com.example_x.b=1", {"a": {"__com.example_x": {"b": "1"}}}),
        ("help=1", {"help": "1"}),
    ],
)
def test_trees(text: str, tree: Any) -> None:
    assert parse_keyval(text) == tree


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("raw", {"driver": "raw"}),
        ("raw,a=1", {"driver": "raw", "a": "1"}),
        ("raw,", {"driver": "raw"}),
        ("a=1", {"a": "1"}),
        ("raw,driver=file", {"driver": "file"}),
    ],
)
def test_implied_key(text: str, tree: Any) -> None:
    assert parse_keyval(text, "driver") == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "Expected '=' after parameter 'a'"),
        ("a=1,b", "Expected '=' after parameter 'b'"),
        ("a.b", "Expected '=' after parameter 'a.b'"),
        ("=1", "Invalid parameter ''"),
        (",a=1", "Invalid parameter ''"),
        ("a=1,=", "Invalid parameter ''"),
        ("0=1", "Invalid parameter '0'"),
        ("a.=1", "Invalid parameter 'a.'"),
        (".a=1", "Invalid parameter '.a'"),
        ("a..b=1", "Invalid parameter 'a..b'"),
        ("a.0b=1", "Invalid parameter 'a.0b'"),
        ("a b=1", "Invalid parameter 'a b'"),
        ("é=1", "Invalid parameter 'é'"),
        ("a.٣=1", "Invalid parameter 'a.٣'"),
        ("a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
        ("a.b=1,a=2", "Parameters 'a.*' used inconsistently"),
        ("a.b.c=1,a.b=2", "Parameters 'a.b.*' used inconsistently"),
        ("a.0=1,a.b=2", "Parameters 'a.*' used inconsistently"),
        ("l.1=a", "Parameter 'l.0' missing"),
        ("l.0=a,l.2=b", "Parameter 'l.1' missing"),
        ("x.l.1.y=a", "Parameter 'x.l.0' missing"),
        ("l.99999999999999999999=a", "Parameter 'l.0' missing"),
        ("a" * 128 + "=1", f"Parameter '{'a' * 128}' is too long"),
        ("b." + "a" * 128 + "=1", f"Parameter fragment '{'a' * 128}' is too long"),
        ("help", "Help is not available for this option"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_keyval(text)
    assert str(caught.value) == message


def test_an_implied_value_holds_no_comma() -> None:
    with pytest.raises(OptionError, match="Invalid parameter ''"):
        parse_keyval("val,,ue", "driver")
    with pytest.raises(OptionError, match="Expected '=' after parameter 'b'") as caught:
        parse_keyval("a,b", "driver")
    assert caught.value.hint == "A comma inside a value is written twice."


def test_limits() -> None:
    assert parse_keyval("a" * 127 + "=1")
    deep = ".".join(["a"] * keyval.DEPTH_MAX)
    assert parse_keyval(f"{deep}=1")
    with pytest.raises(OptionError, match="nested too deeply"):
        parse_keyval(f"{deep}.a=1")
    many = ",".join(["a=1"] * keyval.COUNT_MAX)
    assert parse_keyval(many) == {"a": "1"}
    with pytest.raises(OptionError, match="too many"):
        parse_keyval(f"{many},a=1")
    with pytest.raises(OptionError, match="too many"):
        parse_qemu_opts(f"{many},a=1")
    long = "a=" + "x" * keyval.TEXT_LENGTH_MAX
    for parse in (parse_keyval, parse_qemu_opts):
        with pytest.raises(OptionError, match="too long"):
            parse(long)
    with pytest.raises(OptionError, match="too long"):
        parse_options(BlockdevOptions, "{" + long, loads=loads)


def test_an_error_does_not_repeat_a_megabyte() -> None:
    with pytest.raises(OptionError) as caught:
        parse_keyval("a" * 1_000_000 + "=1")
    assert len(str(caught.value)) < 400


def test_help_among_the_words() -> None:
    assert parse_keyval_help("help", "driver") == ({}, True)
    assert parse_keyval_help("?") == ({}, True)
    assert parse_keyval_help("raw,help,a=1", "driver") == ({"driver": "raw", "a": "1"}, True)
    with pytest.raises(HelpRequested) as caught:
        parse_options(BlockdevOptions, "help", implied_key="driver", loads=loads)
    assert "Values of driver:" in str(caught.value)
    with pytest.raises(HelpRequested) as caught:
        parse_options(BlockdevOptions, "raw,help", implied_key="driver", loads=loads)
    assert "Options of raw:" in str(caught.value)
    with pytest.raises(HelpRequested) as caught:
        parse_options(BlockdevOptions, "blob,help", implied_key="driver", loads=loads)
    assert "Values of driver:" in str(caught.value)


def test_both_forms_of_an_option() -> None:
    flat = "file,node-name=n,filename=/a,,b,cache.direct=on,read-only=off"
    text = '{"driver": "file", "node-name": "n", "filename": "/a,b", "cache": {"direct": true}, '
    text += "'read-only': false}"
    options = parse_options(BlockdevOptions, flat, implied_key="driver", loads=loads)
    assert options == parse_options(BlockdevOptions, text, implied_key="driver", loads=loads)
    assert options.branch == BlockdevOptionsFile(filename="/a,b")
    assert options.cache is not None and options.cache.direct is True
    assert options.read_only is False
    assert options.auto_read_only is None


def test_json_errors() -> None:
    for text, message in (
        ("{", "JSON parse error, premature EOI"),
        ("{} {}", "Expecting at most one JSON value"),
        ("{}", "Parameter 'driver' is missing"),
        ('{"driver": "null-co", "size": "1G"}', "Invalid parameter type for 'size', expected: integer"),
    ):
        with pytest.raises(OptionError) as caught:
            parse_options(BlockdevOptions, text, implied_key="driver", loads=loads)
        assert str(caught.value) == message


def test_nested_options() -> None:
    options = parse_options(
        BlockdevOptions,
        "raw,offset=512,file.driver=null-co,file.size=4096",
        implied_key="driver",
        loads=loads,
    )
    child = options.branch.file  # type: ignore[attr-defined]
    assert child.branch == BlockdevOptionsNull(size=4096)


NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,5}", fullmatch=True)
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        st.text(max_size=6),
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3) | st.dictionaries(NAMES, inner, min_size=1, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@given(TREES)
def test_round_trip(tree: dict[str, Any]) -> None:
    assert parse_keyval(format_keyval(tree)) == tree


FRAGMENTS = st.sampled_from(
    ["a", "b", ".", "=", ",", ",,", "0", "1", "help", "driver", "file", "{", "}", '"', "é"]
)


@given(
    st.lists(FRAGMENTS).map("".join) | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape"))
)
def test_no_text_raises_anything_but_option_errors(text: str) -> None:
    for parse in (
        lambda: parse_keyval(text),
        lambda: parse_keyval(text, "driver"),
        lambda: parse_options(BlockdevOptions, text, implied_key="driver", loads=loads),
        lambda: parse_options(BlockdevOptions, "{" + text, loads=loads),
        lambda: parse_qemu_opts(text, "backend"),
    ):
        try:
            parse()
        except (OptionError, HelpRequested) as error:
            assert str(error)


def test_flat_form() -> None:
    opts = parse_qemu_opts("socket,,x,id=m.0,path=/a,,b,port=1,port=2,a.b=c", "backend")
    assert opts.values == {"backend": "socket,x", "id": "m.0", "path": "/a,b", "port": "2", "a.b": "c"}
    assert not opts.warnings
    assert not opts.help
    assert parse_qemu_opts("help", "backend").help
    assert parse_qemu_opts("socket,help", "backend").help
    assert parse_qemu_opts("backend=?", "backend").help


def test_short_booleans_are_warned_about() -> None:
    opts = parse_qemu_opts("socket,server,nowait,nodelay", "backend")
    assert opts.values == {"backend": "socket", "server": "on", "wait": "off", "delay": "off"}
    assert opts.warnings == [
        "short-form boolean option 'server' deprecated\nPlease use server=on instead",
        "short-form boolean option 'nowait' deprecated\nPlease use wait=off instead",
        "short-form boolean option 'nodelay' deprecated\nPlease use nodelay=on instead",
    ]


def test_identifiers() -> None:
    assert [id_wellformed(name) for name in ("a", "A-1._x", "", "1a", "_a", "a b", "a\n")] == [
        True, True, False, False, False, False, False,
    ]  # fmt: skip
    with pytest.raises(OptionError, match="Parameter 'id' expects an identifier") as caught:
        parse_qemu_opts("socket,id=_", "backend")
    assert caught.value.hint is not None and "starting with a letter" in caught.value.hint
