# SPDX-License-Identifier: Apache-2.0
"""Objects, properties, paths; what users create, and what is in the way of deleting it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from bottomhalf.aio import AioContext
from bottomhalf.aio.thread import own
from bottomhalf.host.sim import SimHost
from bottomhalf.qom import Container, Property, QomError, QomObject, Tree, UserCreatable
from bottomhalf.qom.authz import AuthzList
from bottomhalf.qom.event_loop import Iothread
from bottomhalf.qom.object import subtypes
from bottomhalf.qom.secret import Secret, lookup
from bottomhalf.qom.tree import class_of


class Lamp(QomObject, UserCreatable, name="test-lamp"):
    """Something to have properties."""

    properties: ClassVar[dict[str, Property]] = {
        "on": Property("bool", lambda self: self.on, lambda self, value: setattr(self, "on", value)),
        "hidden": Property("string", None, lambda self, value: None),
    }

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.life: list[str] = []

    def complete(self, tree: Tree) -> None:
        if self.on == "broken":
            raise QomError("the lamp is broken")
        self.life.append("completed")

    def finalize(self) -> None:
        self.life.append("finalized")


@pytest.fixture
def tree() -> Iterator[Tree]:
    own.state.context = None
    host = SimHost()
    main = AioContext(host)
    made = Tree(host, main)
    for path in ("/objects", "/chardevs"):
        made.container(path)
    yield made
    made.close()
    main.close()
    own.state.context = None


def refusal(call: Any) -> str:
    with pytest.raises(QomError) as caught:
        call()
    return caught.value.desc


def test_properties(tree: Tree) -> None:
    lamp = tree.create("test-lamp", "l", {"on": True})
    assert isinstance(lamp, Lamp) and lamp.life == ["completed"]
    assert lamp.get("on") is True and lamp.get("type") == "test-lamp"
    lamp.set("on", False)
    assert lamp.on is False
    assert refusal(lambda: lamp.get("nope")) == "Property 'test-lamp.nope' not found"
    assert refusal(lambda: lamp.set("nope", 1)) == "Property 'test-lamp.nope' not found"
    assert refusal(lambda: lamp.set("type", "x")) == "Property 'test-lamp.type' is not writable"
    assert refusal(lambda: lamp.get("hidden")) == "Property 'test-lamp.hidden' is not readable"
    assert list(lamp.all_properties()) == ["type", "hidden", "on"]


def test_aliases_and_links(tree: Tree) -> None:
    first, second = Lamp(), Lamp()
    house = tree.container("/machine/house")
    house.add_child("first", first)
    first.add_alias("twin", second, "on")
    first.set("twin", True)
    assert second.on is True and first.get("twin") is True
    assert refusal(lambda: first.add_alias("on", second, "on")).startswith("attempt to add duplicate property 'on'")
    target: list[QomObject] = []
    first.add_link("other", lambda: target[0] if target else None, "test-lamp")
    assert first.get("other") == ""
    house.add_child("second", second)
    target.append(second)
    assert first.get("other") == "/machine/house/second"
    assert first.all_properties()["other"].type == "link<test-lamp>"
    assert house.get("first") == "/machine/house/first"


def test_numbered_children(tree: Tree) -> None:
    box = tree.container("/machine/unattached")
    for _ in range(3):
        box.add_child("device[*]", Container())
    box.children["device[1]"].unparent()
    box.add_child("device[*]", Container())
    assert sorted(box.children) == ["device[0]", "device[1]", "device[2]"]


def test_paths(tree: Tree) -> None:
    lamp = tree.create("test-lamp", "l", {})
    assert tree.resolve("/") is tree.root and tree.root.path == "/"
    for path in ("/objects/l", "//objects//l/", "l", "objects/l"):
        assert tree.resolve(path) is lamp
    tree.container("/chardevs").add_child("l", Lamp())
    assert refusal(lambda: tree.resolve("l")) == "Path 'l' is ambiguous"
    assert refusal(lambda: tree.resolve("")) == "Path '' is ambiguous"
    assert tree.resolve("objects/l") is lamp
    with pytest.raises(QomError) as caught:
        tree.resolve("/nope")
    assert (caught.value.class_name, caught.value.desc) == ("DeviceNotFound", "Device '/nope' not found")


def test_life(tree: Tree) -> None:
    lamp = tree.create("test-lamp", "l", {})
    assert isinstance(lamp, Lamp)
    again = refusal(lambda: tree.create("test-lamp", "l", {}))
    assert again == "attempt to add duplicate property 'l' to object (type 'container')"
    assert refusal(lambda: tree.create("test-lamp", "b", {"on": "broken"})) == "the lamp is broken"
    assert "b" not in tree.container("/objects").children
    assert refusal(lambda: tree.create("container", "c", {})) == "invalid object type: container"
    tree.in_use = lambda each: each is lamp
    assert refusal(lambda: tree.delete("l")) == "object 'l' is in use, can not be deleted"
    tree.in_use = lambda each: False
    tree.delete("l")
    assert lamp.life == ["completed", "finalized"]
    assert refusal(lambda: tree.delete("l")) == "object 'l' not found"


def test_types() -> None:
    assert [each.type_name for each in subtypes("event-loop-base")] == ["iothread", "main-loop"]
    assert subtypes("nope") == []
    names = {each.type_name for each in subtypes(None, abstract=True)}
    assert {"object", "interface", "user-creatable", "container", "iothread"} <= names
    assert refusal(lambda: class_of("user-creatable")) == "Parameter 'typename' expects a QOM type"
    assert refusal(lambda: class_of("nope")) == "Class 'nope' not found"


def test_an_iothread_is_tuned_while_it_runs(tree: Tree) -> None:
    made = tree.create("iothread", "io", {"poll-max-ns": 7, "thread-pool-max": 3})
    assert isinstance(made, Iothread) and made.context is not None
    assert made.context.poll_max_ns == 7
    made.set("poll-max-ns", 5)
    made.set("poll-grow", 4)
    assert (made.context.poll_max_ns, made.context.poll_grow) == (5, 4)
    for name in ("poll-max-ns", "thread-pool-max", "aio-max-batch"):
        assert refusal(lambda name=name: made.set(name, -1)).startswith(f"{name} value must be in range [0, ")
    assert refusal(lambda: made.set("thread-pool-min", 4)) == "bad thread-pool-min/thread-pool-max values"
    assert made.get("thread-pool-min") == 0
    assert refusal(lambda: made.set("poll-grow", True)) == "Invalid parameter type for 'poll-grow', expected: integer"
    assert refusal(lambda: tree.create("iothread", "x", {"thread-pool-max": 0})).startswith("bad thread-pool")


def test_one_main_loop(tree: Tree) -> None:
    tree.create("main-loop", "ml", {})
    assert refusal(lambda: tree.create("main-loop", "ml2", {})) == "only one main-loop instance allowed"
    assert refusal(lambda: tree.delete("ml")) == "object 'ml' is in use, can not be deleted"


SECRET = "correct horse"


def test_a_secret_is_revealed_to_those_who_ask_by_name_only(tree: Tree) -> None:
    made = tree.create("secret", "pw", {"data": SECRET})
    assert lookup(tree, "pw") == SECRET.encode()
    assert refusal(lambda: made.get("data")) == "Property 'secret.data' is not readable"
    shown = [repr(made), str(made), *(str(made.get(name)) for name in ("iv", "keyid", "file", "format", "type"))]
    assert not any(SECRET in each for each in shown)
    assert refusal(lambda: lookup(tree, "nope")) == "No secret with id 'nope'"
    tree.create("test-lamp", "l", {})
    assert refusal(lambda: lookup(tree, "l")) == "Object with id 'l' is not a secret"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"data": "YWI=", "format": "base64"}, b"ab"),
        ({"data": "YW\nI=", "format": "base64"}, b"ab"),
        ({"file": "/pw"}, b"from a file\n"),
        ({"data": "\u00e4"}, b"\xc3\xa4"),
        ({"data": ""}, b""),
    ],
)
def test_secrets(tree: Tree, values: dict[str, Any], expected: bytes) -> None:
    assert isinstance(tree.host, SimHost)
    tree.host.add_file("/pw", b"from a file\n")
    tree.create("secret", "pw", values)
    assert lookup(tree, "pw") == expected


def test_secrets_under_another_secret(tree: Tree) -> None:
    """AES-256-CBC with padding, stored in base64, as QEMU's manual page tells to make them with openssl."""
    ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    key, iv = b"k" * 32, bytes(16)
    encryptor = ciphers.Cipher(ciphers.algorithms.AES(key), ciphers.modes.CBC(iv)).encryptor()
    stored = encryptor.update(SECRET.encode() + bytes([16 - len(SECRET) % 16]) * (16 - len(SECRET) % 16))
    text, vector = base64.b64encode(stored).decode(), base64.b64encode(iv).decode()
    tree.create("secret", "key", {"data": key.decode()})
    tree.create("secret", "pw", {"data": text, "format": "base64", "keyid": "key", "iv": vector})
    assert lookup(tree, "pw") == SECRET.encode()
    tree.create("secret", "bad", {"data": "b" * 32})
    for changes, start in (({"keyid": "bad"}, "Incorrect number of padding"), ({"data": "YWI="}, "Length of the")):
        values = {"data": text, "format": "base64", "keyid": "key", "iv": vector, **changes}
        message = refusal(lambda values=values: tree.create("secret", "no", values))
        assert message.startswith(start) and SECRET not in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Either 'file' or 'data' must be provided"),
        ({"data": "x", "file": "/y"}, "'file' and 'data' are mutually exclusive"),
        ({"file": "/nope"}, "Unable to read /nope: Failed to open file \u201c/nope\u201d: No such file or directory"),
        ({"data": f"{SECRET}!", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": "YWI=", "keyid": "key"}, "IV is required to decrypt secret"),
        ({"data": "YWI=", "keyid": "key", "iv": "YWI="}, "IV should be 16 bytes in length not 2"),
        ({"data": "x", "keyid": "none"}, "No secret with id 'none'"),
        ({"data": 5}, "Invalid parameter type for 'data', expected: string"),
        ({"file": "/big"}, "Unable to read /big: it is larger than 1048576 bytes"),
    ],
)
def test_no_secrets(tree: Tree, values: dict[str, Any], message: str) -> None:
    assert isinstance(tree.host, SimHost)
    tree.host.add_file("/big", 1048577)
    tree.create("secret", "key", {"data": "k" * 32})
    assert refusal(lambda: tree.create("secret", "pw", values)) == message
    assert not any(isinstance(each, Secret) and each.name == "pw" for each in tree.everything())


def test_access_lists(tree: Tree) -> None:
    rules = [
        {"match": "fred", "policy": "allow"},
        {"match": "f*", "policy": "deny", "format": "glob"},
        {"match": "?ob", "policy": "allow", "format": "glob"},
    ]
    made = tree.create("authz-list", "a", {"rules": rules})
    assert isinstance(made, AuthzList)
    verdicts = {name: made.is_allowed(name) for name in ("fred", "frank", "bob", "rob", "?ob", "eve")}
    assert verdicts == {"fred": True, "frank": False, "bob": True, "rob": True, "?ob": True, "eve": False}
    made.set("policy", "allow")
    assert made.is_allowed("eve")
    assert refusal(lambda: made.set("rules", [{"match": "x"}])) == "Parameter 'rules[0].policy' is missing"
    assert made.get("rules") == rules
