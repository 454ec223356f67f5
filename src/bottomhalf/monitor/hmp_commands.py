# SPDX-License-Identifier: Apache-2.0
"""What the commands for people do. Where there is a QMP command for it, that does it, and this prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio import explain
from bottomhalf.monitor import hmp_jobs, hmp_snapshots
from bottomhalf.monitor.commands import HANDLERS, start_nbd_server
from bottomhalf.monitor.hmp_table import FLAG, INTEGER, NODE, REST, SIZE, Arg, Entry, Output, UsageError, find
from bottomhalf.qapi.errors import OptionError
from bottomhalf.qom.object import subtypes

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage
    from bottomhalf.qom import QomObject

Given = dict[str, Any]
LIST_DEPTH_MAX: Final = 64


def _call(storage: Storage, name: str, arguments: dict[str, Any]) -> Any:
    """A QMP command with JSON arguments; those that are None are left out. A coroutine is run to its end, while this
    thread waits."""
    from inspect import iscoroutinefunction

    from bottomhalf.qapi.commands import parse_command

    _, parsed = parse_command(name, {key: value for key, value in arguments.items() if value is not None})
    handler = HANDLERS[name]
    if iscoroutinefunction(handler):
        return storage.loop.main.run(handler(storage, parsed), f"the command {name}")
    return handler(storage, parsed)


# -- help, version, end ---------------------------------------------------------------------------------------------


def help(storage: Storage, given: Given, out: Output) -> None:
    """help."""
    words = (given["command"] or "").split()
    entries = COMMANDS
    if words[:1] == ["info"]:
        entries, words = INFO, words[1:]
    prefix = "info " if entries is INFO else ""
    if words:
        entry = find(entries, words[0])
        if entry is None:
            out.line(f"unknown command: '{words[0]}'")
            return
        entries = [entry]
    for entry in sorted(entries, key=lambda each: each.names[0]):
        out.line(f"{prefix}{entry.usage()} -- {entry.help}")


def info(storage: Storage, given: Given, out: Output) -> None:
    """info."""
    help(storage, {"command": "info"}, out)


def quit(storage: Storage, given: Given, out: Output) -> None:
    """quit."""
    storage.quit()


def info_version(storage: Storage, given: Given, out: Output) -> None:
    """info version."""
    from bottomhalf.monitor.qmp import version_info

    version = version_info()
    out.line(f"{version.qemu.major}.{version.qemu.minor}.{version.qemu.micro} ({version.package})")


def info_history(storage: Storage, given: Given, out: Output) -> None:
    """info history."""
    for number, line in enumerate(out.history):
        out.line(f"{number}: '{line}'")


def info_name(storage: Storage, given: Given, out: Output) -> None:
    """The name of the guest: there is none, and QEMU prints nothing then."""


def info_waits(storage: Storage, given: Given, out: Output) -> None:
    """info waits."""
    out.line(explain())


# -- nodes ----------------------------------------------------------------------------------------------------------


def info_block(storage: Storage, given: Given, out: Output) -> None:
    """info block."""
    from bottomhalf.drivers.registry import describe_node

    name = given["device"]
    nodes = [storage.graph.find(name, device=name)] if name is not None else list(storage.graph.nodes.values())
    for index, node in enumerate(nodes):
        told = describe_node(node)
        if index:
            out.line()
        out.line(f"{node.name}: {told.file} ({told.drv}{', read-only' if told.ro else ''})")
        cache = told.cache
        mode = "writeback" if cache.writeback else "writethrough"
        out.line(f"    Cache mode:       {mode}{', direct' * cache.direct}{', ignore flushes' * cache.no_flush}")
        if given["v"]:
            out.line(f"    Virtual size:     {node.size} bytes")
            out.line(f"    Context:          {node.context.name}")
            users = ", ".join(edge.parent.describe() for edge in node.parents)
            out.line(f"    Used by:          {users or 'nobody'}")


def info_nodes(storage: Storage, given: Given, out: Output) -> None:
    """info nodes."""
    from bottomhalf.block import Node

    def show(node: Node, role: str, depth: int) -> None:
        out.line(f"{'  ' * depth}{role}{node.name} ({node.driver}, {node.size} bytes)")
        if depth < LIST_DEPTH_MAX:
            for edge in node.children:
                show(edge.node, f"{edge.name}: ", depth + 1)

    for node in storage.graph.nodes.values():
        if not any(isinstance(edge.parent, Node) for edge in node.parents):
            show(node, "", 0)


def block_resize(storage: Storage, given: Given, out: Output) -> None:
    """block_resize."""
    _call(storage, "block_resize", {"node-name": given["device"], "size": given["size"]})


def qemu_io(storage: Storage, given: Given, out: Output) -> None:
    """qemu-io."""
    from bottomhalf.monitor.hmp_io import run

    run(storage, storage.graph.find(given["device"], device=given["device"]), given["command"], out)


def drive_add(storage: Storage, given: Given, out: Output) -> None:
    """drive_add."""
    if not given["n"]:
        raise UsageError("There are no machines to add a drive to: use -n, with the options of --blockdev")
    from bottomhalf.qapi.block import BlockdevOptions

    storage.add_node(_options(BlockdevOptions, given["opts"], "driver"))


def _options(kind: Any, text: str, implied_key: str | None) -> Any:
    from bottomhalf.qapi.errors import HelpRequested
    from bottomhalf.qapi.keyval import parse_options
    from bottomhalf.wire.json_reader import loads

    try:
        return parse_options(kind, text, implied_key=implied_key, loads=loads)
    except HelpRequested as wanted:
        raise UsageError(str(wanted)) from None


def drive_del(storage: Storage, given: Given, out: Output) -> None:
    """drive_del."""
    _call(storage, "blockdev-del", {"node-name": given["id"]})


# -- NBD ------------------------------------------------------------------------------------------------------------


def nbd_server_start(storage: Storage, given: Given, out: Output) -> None:
    """nbd_server_start."""
    from bottomhalf.qapi.export import NbdServerOptions

    uri = given["uri"]
    if uri.startswith("unix:"):
        options = {"addr": {"type": "unix", "path": uri.removeprefix("unix:")}}
    else:
        host, colon, port = uri.rpartition(":")
        if not colon:
            raise OptionError(f"error parsing address '{uri}'")
        options = {"addr": {"type": "inet", "host": host.removeprefix("[").removesuffix("]"), "port": port}}
    from bottomhalf.qapi.visit import from_json

    start_nbd_server(storage, from_json(NbdServerOptions, options))
    if given["a"]:
        for node in list(storage.graph.nodes.values()):
            if node.monitor_owned:
                _export(storage, node.name, None, writable=given["w"] and not node.read_only)


def _export(storage: Storage, node: str, name: str | None, *, writable: bool) -> None:
    export_name = name or node
    arguments = {"type": "nbd", "id": export_name, "node-name": node, "name": export_name, "writable": writable}
    _call(storage, "block-export-add", arguments)


def nbd_server_add(storage: Storage, given: Given, out: Output) -> None:
    """nbd_server_add."""
    _export(storage, given["device"], given["name"], writable=given["w"])


def nbd_server_remove(storage: Storage, given: Given, out: Output) -> None:
    """nbd_server_remove."""
    mode = "hard" if given["f"] else "safe"
    _call(storage, "block-export-del", {"id": given["name"], "mode": mode})


def nbd_server_stop(storage: Storage, given: Given, out: Output) -> None:
    """nbd_server_stop."""
    _call(storage, "nbd-server-stop", {})


def info_exports(storage: Storage, given: Given, out: Output) -> None:
    """info exports."""
    for each in storage.exports.infos():
        out.line(f"{each.id}: {each.type}, node {each.node_name}{', shutting down' * each.shutting_down}")


# -- objects --------------------------------------------------------------------------------------------------------


def qom_list(storage: Storage, given: Given, out: Output) -> None:
    """qom-list."""
    if given["path"] is None:
        out.line("/")
        return
    for each in _call(storage, "qom-list", {"path": given["path"]}):
        out.line(f"{each.name} ({each.type})")


def qom_get(storage: Storage, given: Given, out: Output) -> None:
    """qom-get."""
    from bottomhalf.wire.json_writer import dumps

    out.line(dumps(_call(storage, "qom-get", given), pretty=True))


def qom_set(storage: Storage, given: Given, out: Output) -> None:
    """A value is JSON with -j; without, it is read as the property's type wants it."""
    from bottomhalf.qapi.visit import parse_bool
    from bottomhalf.wire.json_reader import loads

    text: str = given["value"]
    target = storage.tree.resolve(given["path"])
    found = target.all_properties().get(given["property"])
    value: Any = text
    if given["j"]:
        try:
            value = loads(text)
        except ValueError as error:
            raise OptionError(str(error)) from None
    elif found is not None and found.type.startswith(("int", "uint")):
        from bottomhalf.qapi.visit import parse_integer

        number = parse_integer(text)
        value = text if number is None else number
    elif found is not None and found.type == "bool":
        flag = parse_bool(text)
        value = text if flag is None else flag
    target.set(given["property"], value)


def object_add(storage: Storage, given: Given, out: Output) -> None:
    """object_add."""
    from bottomhalf.qapi.objects import ObjectOptions

    storage.add_object(_options(ObjectOptions, given["object"], "qom-type"))


def object_del(storage: Storage, given: Given, out: Output) -> None:
    """object_del."""
    _call(storage, "object-del", given)


def info_qom_tree(storage: Storage, given: Given, out: Output) -> None:
    """info qom tree."""
    def show(each: QomObject, depth: int) -> None:
        out.line(f"{'  ' * depth}/{each.name} ({each.type_name})")
        if depth < LIST_DEPTH_MAX:
            for _, child in sorted(each.children.items()):
                show(child, depth + 1)

    show(storage.tree.root if given["path"] is None else storage.tree.resolve(given["path"]), 0)


def info_iothreads(storage: Storage, given: Given, out: Output) -> None:
    """info iothreads."""
    from bottomhalf.qom.event_loop import Iothread

    for each in storage.tree.user_objects(Iothread):
        out.line(f"{each.name}:")
        for name in ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"):
            out.line(f"  {name}={each.numbers[name]}")


# -- character devices ----------------------------------------------------------------------------------------------


def info_chardev(storage: Storage, given: Given, out: Output) -> None:
    """info chardev."""
    for each in _call(storage, "query-chardev", {}):
        out.line(f"{each.label}: filename={each.filename}")


def _chardev(storage: Storage, text: str, chardev_id: str | None) -> Any:
    from bottomhalf.qapi.char import parse_chardev
    from bottomhalf.qapi.errors import HelpRequested

    try:
        return parse_chardev(text if chardev_id is None else f"{text},id={chardev_id}")
    except HelpRequested as wanted:
        raise UsageError(str(wanted)) from None


def chardev_add(storage: Storage, given: Given, out: Output) -> None:
    """chardev_add."""
    parsed = _chardev(storage, given["args"], None)
    storage.await_client(storage.add_chardev(parsed.id, parsed.backend))


def chardev_change(storage: Storage, given: Given, out: Output) -> None:
    """chardev_change."""
    from bottomhalf.qapi.char import ChardevChange

    parsed = _chardev(storage, given["args"], given["id"])
    HANDLERS["chardev-change"](storage, ChardevChange(id=parsed.id, backend=parsed.backend))


def chardev_remove(storage: Storage, given: Given, out: Output) -> None:
    """chardev_remove."""
    _call(storage, "chardev-remove", given)


def chardev_send_break(storage: Storage, given: Given, out: Output) -> None:
    """chardev_send_break."""
    _call(storage, "chardev-send-break", given)


def ringbuf_write(storage: Storage, given: Given, out: Output) -> None:
    """ringbuf_write."""
    _call(storage, "ringbuf-write", given)


def ringbuf_read(storage: Storage, given: Given, out: Output) -> None:
    """ringbuf_read."""
    for character in _call(storage, "ringbuf-read", given):
        if character == "\\":
            out.write("\\\\")
        elif (character < " " and character not in "\n\t") or character == "\x7f":
            out.write(f"\\u{ord(character):04X}")
        else:
            out.write(character)
    out.line()


# -- words to complete with -----------------------------------------------------------------------------------------


def _chardevs(storage: Storage) -> list[str]:
    return list(storage.chardevs)


def _exports(storage: Storage) -> list[str]:
    return list(storage.exports.exports)


def _objects(storage: Storage) -> list[str]:
    return list(storage.tree.container("/objects").children)


def _object_types(storage: Storage) -> list[str]:
    storage.tree.container("/objects")  # the types are loaded
    return [f"{each.type_name},id=" for each in subtypes("user-creatable")]


def _paths(storage: Storage) -> list[str]:
    return ["/", *(each.path for each in storage.tree.everything())]


_PATH: Final = Arg("path")
COMMANDS: Final = [
    Entry("help|?", (Arg("command", REST, optional=True),), help, "show the help"),
    Entry("info", (), info, "show various information about the system state"),
    Entry("quit|q", (), quit, "quit the program"),
    Entry("block_resize", (Arg("device", NODE), Arg("size", SIZE)), block_resize, "resize a block image"),
    Entry("qemu-io", (Arg("d", FLAG), Arg("device", NODE), Arg("command")), qemu_io, "run a qemu-io command on a node"),
    Entry(
        "drive_add", (Arg("n", FLAG), Arg("address"), Arg("opts", REST)), drive_add,
        "with -n: add a block node; the address has no meaning",
    ),
    Entry("drive_del", (Arg("id", NODE),), drive_del, "remove a block node"),
    *hmp_snapshots.COMMANDS,
    *hmp_jobs.COMMANDS,
    Entry(
        "nbd_server_start", (Arg("a", FLAG), Arg("w", FLAG), Arg("uri")), nbd_server_start,
        "serve block nodes on HOST:PORT or unix:PATH; -a exports all, -w writable",
    ),
    Entry(
        "nbd_server_add", (Arg("w", FLAG), Arg("device", NODE), Arg("name", optional=True)), nbd_server_add,
        "export a block node via NBD",
    ),
    Entry(
        "nbd_server_remove", (Arg("f", FLAG), Arg("name")), nbd_server_remove,
        "remove an export; -f: though clients are there", _exports,
    ),
    Entry("nbd_server_stop", (), nbd_server_stop, "stop serving block nodes"),
    Entry("qom-list", (Arg("path", optional=True),), qom_list, "list QOM properties", _paths),
    Entry("qom-get", (_PATH, Arg("property")), qom_get, "print QOM property", _paths),
    Entry(
        "qom-set", (Arg("j", FLAG), _PATH, Arg("property"), Arg("value", REST)), qom_set,
        "set QOM property; -j: the value is JSON", _paths,
    ),
    Entry("object_add", (Arg("object", REST),), object_add, "create QOM object", _object_types),
    Entry("object_del", (Arg("id"),), object_del, "destroy QOM object", _objects),
    Entry("chardev-add", (Arg("args"),), chardev_add, "add chardev"),
    Entry("chardev-change", (Arg("id"), Arg("args")), chardev_change, "change chardev", _chardevs),
    Entry("chardev-remove", (Arg("id"),), chardev_remove, "remove chardev", _chardevs),
    Entry("chardev-send-break", (Arg("id"),), chardev_send_break, "send a break on chardev", _chardevs),
    Entry("ringbuf_write", (Arg("device"), Arg("data")), ringbuf_write, "write to a ring buffer device", _chardevs),
    Entry(
        "ringbuf_read", (Arg("device"), Arg("size", INTEGER)), ringbuf_read, "read from a ring buffer device", _chardevs
    ),
]  # fmt: skip

INFO: Final = [
    Entry(
        "block", (Arg("n", FLAG), Arg("v", FLAG), Arg("device", NODE, optional=True)), info_block,
        "show info of one block node or all of them (-v: details)",
    ),
    Entry("nodes|qtree", (), info_nodes, "show the block nodes as a tree"),
    Entry("snapshots", (), hmp_snapshots.info_snapshots, "show the snapshots in images"),
    *hmp_jobs.INFO,
    Entry("exports", (), info_exports, "show the exports"),
    Entry("chardev", (), info_chardev, "show the character devices"),
    Entry("history", (), info_history, "show the command line history"),
    Entry("iothreads", (), info_iothreads, "show iothreads"),
    Entry("name", (), info_name, "show the name"),
    Entry("qom-tree", (Arg("path", optional=True),), info_qom_tree, "show QOM composition tree", _paths),
    Entry("version", (), info_version, "show the version"),
    Entry("waits", (), info_waits, "tell who waits for whom"),
]  # fmt: skip
