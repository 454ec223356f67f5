# SPDX-License-Identifier: Apache-2.0
"""From the options of a block node to the node.

    node = open_node(graph, from_json(BlockdevOptions, {"driver": "file", "filename": "disk.raw"}))

Facts that shape it:

* A program that serves a file never needs the other drivers, and importing them takes time. Therefore a driver is
  loaded when a node of its kind is first asked for.
* Opening may fail anywhere in a tree of options. Therefore an ``Opening`` remembers the children that it brought
  along, and a failure lets go of them; nodes that were given by name are left as they were.
* A child that is given by its options takes from its parent what it does not say itself: read-only, auto-read-only,
  force-share, cache. Its discards are on, because the parent has decided already. A child given by name is what it is.

A driver of one's own registers a branch of the schema and an opener::

    BlockdevOptions.register_branch("mine", MyOptions)
    register_driver("mine", lambda opening: MyNode(opening.graph, file=opening.child(opening.branch.file)))
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bottomhalf.block import BlockError, Graph, Node, permissions
from bottomhalf.qapi.block import (
    BlockdevAioOptions,
    BlockdevCacheOptions,
    BlockdevDetectZeroesOptions,
    BlockdevDiscardOptions,
    BlockdevOptions,
)
from bottomhalf.qapi.types import Null
from bottomhalf.qapi.visit import from_json

if TYPE_CHECKING:
    from bottomhalf.qapi.block_info import BlockDeviceInfo

CHILD_DEPTH_MAX: Final = 64  # nodes given inside each other; real graphs are below 20


class Opening:
    """One node while it is being opened: its options, and the children that come with it."""

    def __init__(self, graph: Graph, options: BlockdevOptions, depth: int, follow_names: bool) -> None:
        self.graph = graph
        self.options = options
        self.follow_names = follow_names  # whether files that an image names may be opened
        self._depth = depth
        self.brought: list[Node] = []

    @property
    def branch(self) -> Any:
        """The options of the driver itself."""
        return self.options.branch

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that every node's constructor takes."""
        return {
            "name": self.options.node_name or "",
            "read_only": bool(self.options.read_only),
            "unmap": self.options.discard == BlockdevDiscardOptions.UNMAP,
        }

    @property
    def cache(self) -> BlockdevCacheOptions:
        return self.options.cache or BlockdevCacheOptions()

    def child(self, given: BlockdevOptions | str) -> Node:
        """A child by its name, or opened from its own options and what this node hands down."""
        if isinstance(given, str):
            return self.graph.find(given, device=given)
        if self._depth == CHILD_DEPTH_MAX:
            raise BlockError(f"Block nodes are nested deeper than {CHILD_DEPTH_MAX}")
        node = _open(self.graph, _inherit(self.options, given), self._depth + 1, self.follow_names)
        self.brought.append(node)
        return node

    def backing(
        self, given: BlockdevOptions | str | Null | None, named: str | None, format: str | None, file: Node
    ) -> Node | None:
        """The backing node: the one that was given, else the one that the image names, if names may be followed.
        ``file`` is what holds the image, beside which a relative name is looked for."""
        if isinstance(given, Null) or (given is None and named is None):
            return None
        if given is None:
            assert named is not None
            given = _named_image(self, named, format, file)
        elif not isinstance(given, str):
            given = given.replace(read_only=True if given.read_only is None else given.read_only)
        return self.child(given)

    def data_file(self, given: BlockdevOptions | str | None, named: str | None) -> Node | None:
        """The node with the data: the one that was given, else the file that the image names, if names may be
        followed. A name stands for a file and nothing else: whoever made the image chose it."""
        if given is None and named is None:
            return None
        if given is None:
            if not self.follow_names:
                raise BlockError(
                    f"The image names a data file, '{named}', which is not opened unless you say so: give it as "
                    "data-file"
                )
            given = from_json(BlockdevOptions, {"driver": "file", "filename": named})
        return self.child(given)

    def undo(self) -> None:
        """The node could not be opened: close the children that were opened for it."""
        for node in reversed(self.brought):
            self.graph.release(node)


Opener: TypeAlias = Callable[[Opening], Node]


def open_node(graph: Graph, options: BlockdevOptions, *, follow_names: bool = True) -> Node:
    """Open a node and the children that its options bring along. Main thread.

    The caller makes it live: by using it, or by setting ``monitor_owned``; ``graph.release(node)`` gives it back.
    Without ``follow_names`` no file is opened that an image names (a backing file) and the options do not: for images
    that somebody else has made. BlockError says why it cannot be opened, and then nothing of it is left."""
    return _open(graph, options, 0, follow_names)


def reopen_nodes(graph: Graph, requests: Sequence[BlockdevOptions]) -> None:
    """blockdev-reopen: give nodes, which the options name, other options; all of them or none. A child that was given
    by its options can be given other ones inside its parent's. BlockError. Main thread."""
    queue: dict[Node, BlockdevOptions] = {}
    for options in requests:
        if options.node_name is None:
            raise BlockError("node-name not specified")
        node = graph.nodes.get(options.node_name)
        if node is None:
            raise BlockError(f"Failed to find node with node-name='{options.node_name}'")
        _queue_reopen(queue, node, options)
    graph.reopen(queue)


def _queue_reopen(queue: dict[Node, BlockdevOptions], node: Node, options: BlockdevOptions) -> None:
    _check_common(options)
    queue.pop(node, None)
    queue[node] = options
    for edge in node.children:
        given = getattr(options.branch, edge.name.replace("-", "_"), None)
        if isinstance(given, BlockdevOptions) and edge.node.inherits_from is node:
            _queue_reopen(queue, edge.node, _inherit(options, given))


def file_driver(graph: Graph, path: str) -> str:
    """The driver for a path whose driver nobody has said: "host_device" for a block device, else "file"."""
    return "host_device" if graph.context.host.is_device(path) else "file"


def describe_node(node: Node) -> BlockDeviceInfo:
    """The node as query-named-block-nodes tells it."""
    from bottomhalf.drivers import describe

    return describe.describe_node(node)


def register_driver(name: str, opener: Opener) -> None:
    """Add a driver. Its options are those of the schema's branch of the same name."""
    assert name not in _OPENERS, name
    _OPENERS[name] = opener


def _open(graph: Graph, options: BlockdevOptions, depth: int, follow_names: bool) -> Node:
    opener = _OPENERS.get(options.driver)
    if opener is None:
        raise BlockError(f"Unknown driver '{options.driver}'")
    _check_common(options)
    opening = Opening(graph, options, depth, follow_names)
    node: Node | None = None
    try:
        node = opener(opening)
        node.options = options
        node.active = options.active is not False
        for child in opening.brought:
            child.inherits_from = node
        if options.detect_zeroes not in (None, BlockdevDetectZeroesOptions.OFF):
            from bottomhalf.block.watching import detect_zeroes

            detect_zeroes(node, unmap=options.detect_zeroes == BlockdevDetectZeroesOptions.UNMAP)
        permissions.refresh(node)
    except BaseException:
        if node is not None:
            graph.release(node)
        opening.undo()
        raise
    return node


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """What goes wrong while an image is read, as the reason why it cannot be opened."""
    try:
        yield
    except OSError as error:
        raise BlockError(f"Could not read the image of '{name}': {error.strerror}") from error


def _named_image(opening: Opening, named: str, format: str | None, file: Node) -> BlockdevOptions:
    """Options for what an image names as its backing file."""
    if not opening.follow_names:
        raise BlockError(
            f"The image names a backing file, '{named}', which is not opened unless you say so: give it as backing"
        )
    return backing_options(opening.graph, named, format, file)


def backing_options(graph: Graph, named: str, format: str | None, file: Node) -> BlockdevOptions:
    """Options for a backing file by its name; ``file`` is what holds the image, beside which a relative one is looked
    for. BlockError."""
    path = named.removeprefix("file:")
    if ":" in path.partition("/")[0]:
        raise BlockError(f"Could not open backing file: '{named}' is not a path; give the node as backing")
    if not os.path.isabs(path) and isinstance(image := getattr(file, "filename", None), str):
        path = os.path.join(os.path.dirname(image), path)
    if format is None:
        raise BlockError(f"The image does not say the format of its backing file, '{named}'; give the node as backing")
    below = {"driver": file_driver(graph, path), "filename": path, "read-only": True}
    options = below if format in ("file", "host_device") else {"driver": format, "read-only": True, "file": below}
    return from_json(BlockdevOptions, options)


def _check_common(options: BlockdevOptions) -> None:
    if options.force_share and not options.read_only:
        raise BlockError("force-share=on can only be used with read-only images")
    detect = options.detect_zeroes or BlockdevDetectZeroesOptions.OFF
    if detect == BlockdevDetectZeroesOptions.UNMAP and options.discard != BlockdevDiscardOptions.UNMAP:
        raise BlockError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")


def _inherit(parent: BlockdevOptions, given: BlockdevOptions) -> BlockdevOptions:
    """What the child was given, completed by what its parent hands down."""
    changes: dict[str, Any] = {}
    for name in ("read_only", "auto_read_only", "force_share"):
        if getattr(given, name) is None:
            changes[name] = getattr(parent, name)
    if given.discard is None:
        changes["discard"] = BlockdevDiscardOptions.UNMAP
    if parent.cache is not None:
        own = given.cache or BlockdevCacheOptions()
        changes["cache"] = BlockdevCacheOptions(
            direct=parent.cache.direct if own.direct is None else own.direct,
            no_flush=parent.cache.no_flush if own.no_flush is None else own.no_flush,
        )
    return given.replace(**changes)


# -- the drivers of the package -------------------------------------------------------------------------------------


def _open_file(opening: Opening) -> Node:
    from bottomhalf.drivers.file import FileNode
    from bottomhalf.drivers.host_device import HostDeviceNode

    options, branch = opening.options, opening.branch
    kind = HostDeviceNode if options.driver == "host_device" else FileNode
    if branch.pr_manager is not None:
        manager = branch.pr_manager
        raise BlockError(f"No persistent reservation manager with id '{manager}': there are none here; leave it out")
    if branch.aio == BlockdevAioOptions.NATIVE and not opening.cache.direct:
        raise BlockError("aio=native was specified, but it requires cache.direct=on, which was not specified.")
    return kind(
        opening.graph,
        **opening.common,
        filename=branch.filename,
        auto_read_only=bool(options.auto_read_only),
        direct=bool(opening.cache.direct),
        no_flush=bool(opening.cache.no_flush),
        locking=str(branch.locking or "auto"),
        force_share=bool(options.force_share),
        aio=None if branch.aio is None else str(branch.aio),
        batch_max=max(branch.aio_max_batch or 0, 0),
    )


def _open_raw(opening: Opening) -> Node:
    from bottomhalf.drivers.raw import RawNode

    branch = opening.branch
    return RawNode(
        opening.graph,
        **opening.common,
        auto_read_only=bool(opening.options.auto_read_only),
        file=opening.child(branch.file),
        offset=branch.offset or 0,
        size=branch.size,
    )


def _open_qcow2(opening: Opening) -> Node:
    """The header has to be read before the node can be made: plain code waits for that, by name."""
    from bottomhalf.drivers.qcow2.node import Qcow2Node, co_read_header

    branch = opening.branch
    file = opening.child(branch.file)
    name = opening.options.node_name or "qcow2"
    what = f"the opening of {name} in {file.describe()}"
    with image_errors(name):
        header = file.context.run(co_read_header(file), what=what)
        backing = opening.backing(branch.backing, header.backing_file, header.backing_format, file)
        data_file = opening.data_file(branch.data_file, header.data_file if header.external else None)
        common = opening.common
        if opening.options.auto_read_only and file.read_only:
            common["read_only"] = True
        if header.crypt_method or branch.encrypt is not None:
            common["cipher"] = _open_cipher(opening, file, header, what)
        node = Qcow2Node(opening.graph, **common, file=file, header=header, backing=backing, data_file=data_file)
        try:
            node.configure(branch)
            node.active = opening.options.active is not False
            permissions.refresh(node)  # what was not closed properly is repaired, which is a write
            file.context.run(node.open(), what=what)
        except BaseException:
            opening.graph.forget(node)
            raise
    return node


def _open_cipher(opening: Opening, file: Node, header: Any, what: str) -> Any:
    """What encrypts the data of a qcow2 image."""
    from bottomhalf.drivers.luks.secrets import find_secret
    from bottomhalf.drivers.qcow2.encryption import co_open_cipher

    given = opening.branch.encrypt
    password = None if given is None else find_secret(opening.graph, given.branch.key_secret)
    format = None if given is None else str(given.format)
    return file.context.run(co_open_cipher(file, header, format, password), what=what)


def _open_luks(opening: Opening) -> Node:
    """A header is read, and a password tried, before the node is made: plain code waits for that, by name."""
    from bottomhalf.drivers.luks.node import LuksNode, co_unlock
    from bottomhalf.drivers.luks.secrets import find_secret

    branch = opening.branch
    password = find_secret(opening.graph, branch.key_secret)
    if password is None:
        raise BlockError("Parameter 'key-secret' is required for cipher")
    file = opening.child(branch.file)
    detached = None if branch.header is None else opening.child(branch.header)
    name = opening.options.node_name or "luks"
    with image_errors(name):
        what = f"the opening of {name} in {file.describe()}"
        unlocked = file.context.run(co_unlock(detached or file, password, detached=detached is not None), what=what)
    return LuksNode(opening.graph, **opening.common, file=file, header_node=detached, unlocked=unlocked)


def _open_null(opening: Opening) -> Node:
    from bottomhalf.drivers.null import SIZE_DEFAULT, NullAioNode, NullCoNode

    branch = opening.branch
    kind = NullCoNode if opening.options.driver == "null-co" else NullAioNode
    return kind(
        opening.graph,
        **opening.common,
        size=SIZE_DEFAULT if branch.size is None else branch.size,
        latency_ns=branch.latency_ns or 0,
        read_zeroes=bool(branch.read_zeroes),
    )


def _open_filter(opening: Opening) -> Node:
    from bottomhalf.drivers.filter_openers import OPENERS

    return OPENERS[opening.options.driver](opening)


_OPENERS: Final[dict[str, Opener]] = {
    "file": _open_file,
    "host_device": _open_file,
    "raw": _open_raw,
    "qcow2": _open_qcow2,
    "luks": _open_luks,
    "null-co": _open_null,
    "null-aio": _open_null,
    "blkdebug": _open_filter,
    "blkverify": _open_filter,
    "compress": _open_filter,
    "copy-before-write": _open_filter,
    "copy-on-read": _open_filter,
    "preallocate": _open_filter,
    "snapshot-access": _open_filter,
    "throttle": _open_filter,
}
