# SPDX-License-Identifier: Apache-2.0
"""From values to instances and back: QEMU's error texts, names and order, JSON and keyval."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.qapi.errors import OptionError
from bottomhalf.qapi.types import (
    NULL_VALUE,
    Alternate,
    Doc,
    Int32,
    Null,
    OpenEnum,
    Size,
    Struct,
    TaggedUnion,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
)
from bottomhalf.qapi.visit import (
    DEPTH_MAX,
    from_json,
    from_keyval,
    parse_bool,
    parse_integer,
    parse_size,
    to_json,
)


class Mode(StrEnum):
    SAFE = "safe"
    HARD = "hard"


class Inner(Struct):
    path: Annotated[str, Doc("")]
    port: Annotated[Uint16 | None, Doc("")] = None


class Node(Struct):
    name: Annotated[str | None, Doc("")] = None
    child: Annotated[NodeRef | None, Doc("")] = None


NodeRef: TypeAlias = Annotated[Node | str | Null, Alternate("NodeRef")]
NumberRef: TypeAlias = Annotated[int | bool | list[str], Alternate("NumberRef")]


class Everything(Struct):
    text: Annotated[str | None, Doc("")] = None
    flag: Annotated[bool | None, Doc("")] = None
    number: Annotated[int | None, Doc("")] = None
    tiny: Annotated[Uint8 | None, Doc("")] = None
    small: Annotated[Int32 | None, Doc("")] = None
    wide: Annotated[Uint32 | None, Doc("")] = None
    huge: Annotated[Uint64 | None, Doc("")] = None
    size: Annotated[Size | None, Doc("")] = None
    real: Annotated[float | None, Doc("")] = None
    mode: Annotated[Mode, Doc("")] = Mode.SAFE
    server: Annotated[Inner | None, Doc("")] = None
    servers: Annotated[list[Inner] | None, Doc("")] = None
    ref: Annotated[NodeRef | None, Doc("")] = None
    either: Annotated[NumberRef | None, Doc("")] = None
    anything: Annotated[Any, Doc("")] = None
    nothing: Annotated[Null | None, Doc("")] = None


class Shape(OpenEnum):
    """Shapes."""


class Drawing(TaggedUnion, tag="shape-kind", tag_values=Shape):
    shape_kind: Annotated[Shape, Doc("")]
    title: Annotated[str | None, Doc("")] = None


class Circle(Struct):
    radius: Annotated[int, Doc("")]


Drawing.register_branch("circle", Circle)
Shape.add("point")


def error_of(visit: Any, type: Any, value: Any) -> OptionError:
    with pytest.raises(OptionError) as caught:
        visit(type, value)
    return caught.value


JSON_ERRORS: list[tuple[Any, str]] = [
    ([], "Invalid parameter type for '<anonymous>', expected: object"),
    ({"text": 1}, "Invalid parameter type for 'text', expected: string"),
    ({"text": None}, "Invalid parameter type for 'text', expected: string"),
    ({"flag": 1}, "Invalid parameter type for 'flag', expected: boolean"),
    ({"flag": "on"}, "Invalid parameter type for 'flag', expected: boolean"),
    ({"number": "1"}, "Invalid parameter type for 'number', expected: integer"),
    ({"number": True}, "Invalid parameter type for 'number', expected: integer"),
    ({"number": 1.0}, "Invalid parameter type for 'number', expected: integer"),
    ({"number": 2**63}, "Invalid parameter type for 'number', expected: integer"),
    ({"number": -(2**63) - 1}, "Invalid parameter type for 'number', expected: integer"),
    ({"tiny": 256}, "Parameter 'tiny' expects uint8_t"),
    ({"tiny": -1}, "Parameter 'tiny' expects uint8_t"),
    ({"tiny": "1"}, "Parameter 'tiny' expects uint64"),
    ({"small": 2**31}, "Parameter 'small' expects int32_t"),
    ({"wide": 2**32}, "Parameter 'wide' expects uint32_t"),
    ({"huge": 1.5}, "Parameter 'huge' expects uint64"),
    ({"huge": 2**64}, "Parameter 'huge' expects uint64"),
    ({"size": "1G"}, "Parameter 'size' expects uint64"),
    ({"real": "1"}, "Invalid parameter type for 'real', expected: number"),
    ({"mode": 1}, "Invalid parameter type for 'mode', expected: string"),
    ({"mode": "hardd"}, "Parameter 'mode' does not accept value 'hardd'"),
    ({"server": "x"}, "Invalid parameter type for 'server', expected: object"),
    ({"server": {}}, "Parameter 'server.path' is missing"),
    ({"server": {"path": 1}}, "Invalid parameter type for 'server.path', expected: string"),
    ({"server": {"path": "", "port": 65536}}, "Parameter 'port' expects uint16_t"),
    ({"server": {"path": "", "pat": ""}}, "Parameter 'server.pat' is unexpected"),
    ({"servers": {}}, "Invalid parameter type for 'servers', expected: array"),
    ({"servers": [{"path": ""}, {}]}, "Parameter 'servers[1].path' is missing"),
    ({"servers": [1]}, "Invalid parameter type for 'servers[0]', expected: object"),
    ({"ref": 1}, "Invalid parameter type for 'ref', expected: NodeRef"),
    ({"ref": {"child": {"child": 1}}}, "Invalid parameter type for 'child', expected: NodeRef"),
    ({"ref": {"child": {"x": 1}}}, "Parameter 'ref.child.x' is unexpected"),
    ({"either": "x"}, "Invalid parameter type for 'either', expected: NumberRef"),
    ({"nothing": 0}, "Invalid parameter type for 'nothing', expected: null"),
    ({"texd": ""}, "Parameter 'texd' is unexpected"),
]


@pytest.mark.parametrize(("value", "message"), JSON_ERRORS)
def test_json_errors(value: Any, message: str) -> None:
    assert str(error_of(from_json, Everything, value)) == message


KEYVAL_ERRORS: list[tuple[Any, str]] = [
    ({"text": {}}, "Parameters 'text.*' are unexpected"),
    ({"number": ["1"]}, "Parameters 'number.*' are unexpected"),
    ({"flag": "maybe"}, "Parameter 'flag' expects 'on' or 'off'"),
    ({"number": "1k"}, "Parameter 'number' expects integer"),
    ({"number": ""}, "Parameter 'number' expects integer"),
    ({"number": "9223372036854775808"}, "Parameter 'number' expects integer"),
    ({"tiny": "256"}, "Parameter 'tiny' expects uint8_t"),
    ({"small": "-2147483649"}, "Parameter 'small' expects int32_t"),
    ({"huge": "18446744073709551616"}, "Parameter 'huge' expects integer"),
    ({"huge": "x"}, "Parameter 'huge' expects integer"),
    ({"size": "1x"}, "Parameter 'size' expects size"),
    ({"size": "-1"}, "Parameter 'size' expects size"),
    ({"real": "nan"}, "Invalid parameter type for 'real', expected: number"),
    ({"real": "1e999"}, "Invalid parameter type for 'real', expected: number"),
    ({"mode": "soft"}, "Parameter 'mode' does not accept value 'soft'"),
    ({"server": "x"}, "Invalid parameter type for 'server', expected: object"),
    ({"servers": ["x"]}, "Invalid parameter type for 'servers.0', expected: object"),
    ({"servers": [{"path": "", "x": ""}]}, "Parameter 'servers.0.x' is unexpected"),
    ({"server": {"path": {}}}, "Parameters 'server.path.*' are unexpected"),
    ({"ref": []}, "Invalid parameter type for 'ref', expected: NodeRef"),
    ({"nothing": "x"}, "Invalid parameter type for 'nothing', expected: null"),
]


@pytest.mark.parametrize(("value", "message"), KEYVAL_ERRORS)
def test_keyval_errors(value: Any, message: str) -> None:
    assert str(error_of(from_keyval, Everything, value)) == message


def test_unions() -> None:
    value = {"radius": 3, "shape-kind": "circle", "title": "t"}
    drawing = from_json(Drawing, value)
    assert (drawing.shape_kind, drawing.title, drawing.branch) == ("circle", "t", Circle(radius=3))
    assert to_json(drawing) == value
    assert list(to_json(drawing)) == ["shape-kind", "title", "radius"]
    assert str(error_of(from_json, Drawing, {})) == "Parameter 'shape-kind' is missing"
    assert str(error_of(from_json, Drawing, {"shape-kind": "circle"})) == "Parameter 'radius' is missing"
    assert (
        from_json(Drawing, {"shape-kind": "point"}).branch
        == from_json(Drawing, {"shape-kind": "point"}).branch
    )
    assert str(error_of(from_json, Drawing, {"shape-kind": "point", "radius": 1})) == (
        "Parameter 'radius' is unexpected"
    )
    bad = error_of(from_json, Drawing, {"shape-kind": "blob"})
    assert str(bad) == "Parameter 'shape-kind' does not accept value 'blob'"
    assert bad.hint == "It accepts circle, point."


def test_the_first_thing_that_is_wrong_is_the_error() -> None:
    value = {"title": 1, "bogus": 1, "shape-kind": "circle"}
    assert "'title'" in str(error_of(from_json, Drawing, value))
    assert "'radius' is missing" in str(error_of(from_json, Drawing, {**value, "title": ""}))
    assert "'bogus'" in str(error_of(from_json, Drawing, {**value, "title": "", "radius": 1}))


def test_hints_and_keys() -> None:
    error = error_of(from_json, Everything, {"server": {"path": "", "prot": 1}})
    assert (error.key, error.hint) == ("server.prot", "Did you mean 'port'?")
    error = error_of(from_json, Everything, {"server": {"pathh": ""}})
    assert (error.key, error.hint) == ("server.path", "There is 'pathh'. Did you mean 'path'?")
    error = error_of(from_json, Everything, {"mode": "hrd"})
    assert (error.key, error.hint) == ("mode", "Did you mean 'hard'?")
    assert error_of(from_json, Everything, {"mode": "q"}).hint == "It accepts safe, hard."
    assert error_of(from_json, Everything, {"qqq": 1}).hint is None
    assert error_of(from_keyval, Everything, {"number": "1.5k"}).hint == (
        "It takes no suffix or fraction: write 1536."
    )
    # What the union's base has is not taken for a misspelt member of the branch.
    assert error_of(from_json, Drawing, {"shape-kind": "circle", "title": "radius"}).hint is None
    assert error_of(from_json, Drawing, {"shape-kind": "circle", "radus": 1}).hint == (
        "There is 'radus'. Did you mean 'radius'?"
    )


def test_json_values() -> None:
    value: dict[str, Any] = {
        "text": "t", "flag": False, "number": -5, "tiny": 255, "small": -(2**31), "huge": 2**64 - 1,
        "size": 7, "real": 1, "mode": "hard", "server": {"path": "p", "port": 1}, "servers": [{"path": "q"}],
        "ref": {"child": None}, "either": ["a"], "anything": [1, {}], "nothing": None,
    }  # fmt: skip
    result = from_json(Everything, value)
    assert result.mode is Mode.HARD
    assert result.server == Inner(path="p", port=1)
    assert isinstance(result.ref, Node) and result.ref.child is NULL_VALUE
    assert result.real == 1.0
    assert to_json(result) == value
    assert from_json(Everything, {"either": True}).either is True
    assert from_json(Everything, {"either": 5}).either == 5
    assert from_json(Everything, {"ref": "n"}).ref == "n"
    assert from_json(Everything, {}) == Everything()


def test_negative_numbers_wrap_where_qemu_wraps_them() -> None:
    assert from_json(Everything, {"huge": -1}).huge == 2**64 - 1
    assert from_keyval(Everything, {"huge": "-1"}).huge == 2**64 - 1


def test_keyval_values() -> None:
    result = from_keyval(
        Everything,
        {
            "text": "5", "flag": "on", "number": "-0x10", "tiny": "010", "size": "1.5G", "real": "2.5",
            "mode": "hard",
            "servers": [{"path": "p", "port": "1"}], "ref": "n", "anything": "x",
        },
    )  # fmt: skip
    assert result == Everything(
        text="5", flag=True, number=-16, tiny=8, size=3 << 29, real=2.5, mode=Mode.HARD,
        servers=[Inner(path="p", port=1)], ref="n", anything="x",
    )  # fmt: skip
    assert from_keyval(Everything, {"ref": {"name": "a"}}).ref == Node(name="a")


def test_to_json_can_leave_defaults_out() -> None:
    assert to_json(Everything()) == {"mode": "safe"}
    assert to_json(Everything(), omit_defaults=True) == {}
    assert to_json([Inner(path="a"), Mode.SAFE, 1, None]) == [{"path": "a"}, "safe", 1, None]


def test_depth_is_limited() -> None:
    def nested(depth: int) -> Any:
        value: Any = {}
        for _ in range(depth):
            value = {"child": value}
        return value

    from_json(Node, nested(DEPTH_MAX))
    assert str(error_of(from_json, Node, nested(DEPTH_MAX + 1))) == "Parameter 'child' is nested too deeply"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("512", 512), ("64k", 65536), ("64K", 65536), ("1M", 1 << 20), ("2g", 2 << 30),
        ("1T", 1 << 40), ("1P", 1 << 50), ("1E", 1 << 60), ("7b", 7), ("1.5k", 1536), ("1.1k", 1126),
        ("0.5M", 1 << 19), ("1.", 1), ("1.0", 1), ("1.5", None), ("0x10", 16), ("0x10k", 16384),
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", None), ("16E", None), ("", None), ("k", None), ("-1", None), ("1kk", None),
        ("1 k", None), (" 1", 1), ("1\n", None), ("1e3", None), ("٣", None), ("9" * 100, None), (".5k", None),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0), ("-5", -5), ("+5", 5), (" 5", 5), ("0x1F", 31), ("010", 8), ("08", None), ("", None),
        ("5 ", None),
        ("5\n", None), ("1_0", None), ("٣", None), ("--5", None), ("0x", None), ("1" * 1000, None),
    ],
)  # fmt: skip
def test_integers(text: str, number: int | None) -> None:
    assert parse_integer(text) == number


def test_booleans() -> None:
    assert [parse_bool(word) for word in ("on", "yes", "true", "y")] == [True] * 4
    assert [parse_bool(word) for word in ("off", "no", "false", "n")] == [False] * 4
    assert [parse_bool(word) for word in ("On", "1", "")] == [None] * 3


KEYS = st.sampled_from(
    ["text", "flag", "number", "tiny", "size", "mode", "server", "servers", "ref", "path", "child"]
)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(KEYS, TREES))
def test_any_json_is_taken_or_refused_properly(value: Any) -> None:
    try:
        result = from_json(Everything, value)
    except OptionError as error:
        assert str(error)
    else:
        assert from_json(Everything, to_json(result)) == result


LEAVES = st.text("on0123456789kx.-", max_size=4)
TEXT_TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)


@given(st.dictionaries(KEYS, TEXT_TREES))
def test_any_keyval_tree_is_taken_or_refused_properly(value: Any) -> None:
    try:
        from_keyval(Everything, value)
    except OptionError as error:
        assert str(error)
