# SPDX-License-Identifier: Apache-2.0
"""Lines at the console: what they mean, what could come next. The schema is our own, and one made for the purpose."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bottomhalf.monitor.shell_complete import complete
from bottomhalf.monitor.shell_line import Call, is_complete, parse, split
from bottomhalf.monitor.shell_schema import Schema
from bottomhalf.qapi.errors import OptionError
from bottomhalf.qapi.schema import schema as our_schema

OURS = Schema(our_schema(masked=True))
NAMES = {"nodes": ["disk", "disk2", "raw"], "exports": ["e0"]}


def texts(before: str, schema: Schema = OURS) -> list[str]:
    return [found.text for found in complete(before, schema, NAMES)]


@pytest.mark.parametrize(
    "line, call",
    [
        ("query-version", Call("query-version")),
        ("  query-version  ", Call("query-version")),
        ("exec-oob query-version", Call("query-version", {}, True)),
        ("blockdev-del node-name=1", Call("blockdev-del", {"node-name": "1"})),
        ("blockdev-del node-name='a b'", Call("blockdev-del", {"node-name": "a b"})),
        (r'blockdev-del node-name="a\u0041 b"', Call("blockdev-del", {"node-name": "aA b"})),
        ('blockdev-del {"node-name": "a b"}', Call("blockdev-del", {"node-name": "a b"})),
        (
            "blockdev-add driver=null-co node-name=n size=0x200 read-zeroes=on",
            Call("blockdev-add", {"driver": "null-co", "node-name": "n", "size": 512, "read-zeroes": True}),
        ),
        (
            "blockdev-add driver=raw file.driver=file file.filename=7",
            Call("blockdev-add", {"driver": "raw", "file": {"driver": "file", "filename": "7"}}),
        ),
        ("blockdev-add driver=raw file=7", Call("blockdev-add", {"driver": "raw", "file": "7"})),
        (
            'blockdev-add driver=raw file={"driver": "null-co"}',
            Call("blockdev-add", {"driver": "raw", "file": {"driver": "null-co"}}),
        ),
        ("qmp_capabilities enable.0=oob", Call("qmp_capabilities", {"enable": ["oob"]})),
        ('qmp_capabilities enable=["oob"]', Call("qmp_capabilities", {"enable": ["oob"]})),
        (
            "x-blockdev-set-iothread node-name=n iothread=null",
            Call("x-blockdev-set-iothread", {"node-name": "n", "iothread": None}),
        ),
        ("qom-set path=io0 property=p value=5", Call("qom-set", {"path": "io0", "property": "p", "value": 5})),
        ("qom-set path=io0 property=p value=x", Call("qom-set", {"path": "io0", "property": "p", "value": "x"})),
        ('{"execute": "query-version", "id": 3}', Call("query-version")),
        ("{'exec-oob': 'x-explain', 'arguments': {}}", Call("x-explain", {}, True)),
    ],
)
def test_lines(line: str, call: Call) -> None:
    assert parse(line, OURS) == call


@pytest.mark.parametrize("line", ["", "   ", "# no command", "#"])
def test_lines_that_say_nothing(line: str) -> None:
    assert parse(line, OURS) is None


@pytest.mark.parametrize(
    "line, text",
    [
        ("nope", "The command nope has not been found"),
        ("blockdev-del node-name", "Expected '=' after parameter 'node-name'"),
        ("blockdev-del node-name=a node-name=b", "Parameter 'node-name' is given twice"),
        ("blockdev-add file=x file.driver=y", "Parameters 'file.driver' used inconsistently"),
        ("blockdev-add size.1=3", "Parameter 'size.0' missing"),
        ("blockdev-add .x=3", "Invalid parameter '.x'"),
        ("blockdev-add " + "a." * 40 + "b=3", "Invalid parameter"),
        ("blockdev-add driver=null-co size=big", "Parameter 'size' expects a number"),
        ("blockdev-add driver=null-co read-zeroes=maybe", "Parameter 'read-zeroes' expects 'on' or 'off'"),
        ('blockdev-del {"node-name": "a"', "A quote or a bracket is not closed"),
        ("blockdev-del node-name='a", "A quote or a bracket is not closed"),
        ("exec-oob", "'exec-oob' needs the name of a command"),
        ("{}", "QMP input lacks member 'execute'"),
        ('{"execute": "a", "x": 1}', "QMP input member 'x' is unexpected"),
        ('{"execute": "a", "arguments": 1}', "QMP input member 'arguments' must be an object"),
        ('{"execute": ', "JSON parse error"),
        ("x" * ((1 << 20) + 1), "The line is longer than"),
    ],
)
def test_lines_that_are_wrong(line: str, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(line, OURS)
    assert str(caught.value).startswith(text)


def test_without_a_schema_values_are_what_they_look_like() -> None:
    line = "anything a=1 b=1.5 c=true d=null e=text f=[1,2] g=-0x"
    expected: dict[str, Any] = {"a": 1, "b": 1.5, "c": True, "d": None, "e": "text", "f": [1, 2], "g": "-0x"}
    assert parse(line, Schema()) == Call("anything", expected)


def test_a_hint_for_a_mistyped_command() -> None:
    with pytest.raises(OptionError) as caught:
        parse("blokdev-del node-name=a", OURS)
    assert caught.value.hint == "Did you mean 'blockdev-del'?"


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_parsed_and_completed_without_a_defect(text: str) -> None:
    for line in (text, f"blockdev-add {text}", '{"execute": "blockdev-add", "arguments": ' + text):
        split(line)
        is_complete(line)
        complete(line, OURS, NAMES)
        try:
            parse(line, OURS)
        except OptionError:
            pass


def test_completes_commands() -> None:
    assert texts("blockdev-d") == ["blockdev-del"]
    assert {"help", "exit", "exec-oob", "query-version"} <= set(texts(""))
    assert "query-version" not in texts("exec-oob ")
    assert "x-explain" in texts("exec-oob ")
    assert texts("help blockdev-d") == ["blockdev-del"]
    assert texts("nope ") == []


def test_completes_arguments_and_takes_the_tag_into_account() -> None:
    assert texts("blockdev-add ")[0] == "driver="  # required ones come first
    assert "filename=" not in texts("blockdev-add ")
    assert texts("blockdev-add driver=file fil") == ["filename="]
    assert texts("blockdev-add driver=raw file.driver=file file.fil") == ["file.filename="]
    assert texts("blockdev-add driver=file node-name=x node-n") == []  # given already
    assert "cache." in texts("blockdev-add driver=file ")
    assert texts("blockdev-add driver=file cache.d") == ["cache.direct="]


def test_completes_values() -> None:
    assert texts("blockdev-add driver=null-c") == ["null-co"]
    assert texts("blockdev-add driver=file read-only=o") == ["on", "off"]
    assert texts("blockdev-del node-name=di") == ["disk", "disk2"]
    assert texts("blockdev-add driver=raw file=r") == ["raw"]
    assert texts("blockdev-add driver=raw node-name=r") == []  # a new one has no name yet
    assert texts("block-export-del id=") == ["e0"]
    assert texts("block-export-add id=") == []


def test_completes_json() -> None:
    assert texts('{"exec') == ['execute"', 'exec-oob"']
    assert texts('{"execute": "blockdev-d') == ['blockdev-del"']
    assert texts('{"exec-oob": "x-') == ['x-explain"']
    head = '{"execute": "blockdev-add", "arguments": {'
    assert texts(head + '"dri') == ['driver"']
    assert texts(head + '"driver": "null-c') == ['null-co"']
    assert texts(head + '"driver": "file", "filen') == ['filename"']
    assert texts(head + '"driver": "raw", "file": {"driver": "file", "filen') == ['filename"']
    assert texts(head + '"driver": "raw", "file": "di') == ['disk"', 'disk2"']
    assert texts('{"execute": "qmp_capabilities", "arguments": {"enable": ["o') == ['oob"']
    assert texts('{"execute": "nope", "arguments": {"x') == []
    assert texts("{") == []


def test_a_strange_schema_is_no_schema() -> None:
    strange = Schema([1, {}, {"name": "c", "meta-type": "command", "arg-type": "t"}, {"name": "t"}, None])
    assert strange.commands == ["c"]
    assert strange.members("c") == [] and strange.members("t") == []
    loop = [
        {"name": "c", "meta-type": "command", "arg-type": "t"},
        {"name": "t", "meta-type": "object", "members": [], "tag": "x", "variants": [{"case": "v", "type": "t"}]},
    ]
    assert Schema(loop).members("c", (), {("x",): "v"}) == []
    assert Schema(loop).members("c", ("x",) * 1000) == []
