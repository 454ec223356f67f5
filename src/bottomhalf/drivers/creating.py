# SPDX-License-Identifier: Apache-2.0
"""Images made and amended on nodes of a graph, by drivers: what ``blockdev-create`` and ``x-blockdev-amend`` do in the
background. The work itself is that of ``bottomhalf.create()`` and ``amend()``: here are the nodes that the options
name, the permissions on them, and the passwords.

All of it runs in coroutines of the main context. OSError, BlockError.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio import move_to
from bottomhalf.block.errors import BlockError
from bottomhalf.block.resize import FILE_BYTES_MAX, Preallocation, co_resize
from bottomhalf.block.using import co_holding, co_using
from bottomhalf.drivers.luks.secrets import find_secret
from bottomhalf.drivers.registry import open_node
from bottomhalf.host.protocol import PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE, ImageInUse
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json

if TYPE_CHECKING:
    from bottomhalf.block import Graph, Node
    from bottomhalf.drivers.luks.create import LuksOptions
    from bottomhalf.drivers.luks.node import LuksNode
    from bottomhalf.drivers.qcow2.encryption import OldEncryption
    from bottomhalf.drivers.qcow2.node import Qcow2Node
    from bottomhalf.qapi.block_create import (
        BlockdevAmendOptionsQcow2,
        BlockdevCreateOptionsFile,
        BlockdevCreateOptionsLUKS,
        BlockdevCreateOptionsQcow2,
        QCryptoBlockAmendOptionsLUKS,
        QCryptoBlockCreateOptionsLUKS,
    )

_CHANGES: Final = PERM_WRITE | PERM_RESIZE


def _find(graph: Graph, given: BlockdevOptions | str) -> Node:
    """A node by its name, or opened for the occasion."""
    return graph.find(given, device=given) if isinstance(given, str) else open_node(graph, given)


# -- create ---------------------------------------------------------------------------------------------------------


async def co_create_file(graph: Graph, options: BlockdevCreateOptionsFile) -> None:
    """A new file."""
    path = options.filename
    try:
        graph.context.host.create_file(
            path, 0, nocow=bool(options.nocow), extent_size_hint_bytes=options.extent_size_hint
        )
    except ImageInUse as error:
        refused, _, _ = str(error.strerror).partition(": ")
        raise BlockError(f"{refused}\nIs another process using the image [{path}]?") from error
    except OSError as error:
        raise BlockError(f"Could not create '{path}': {error.strerror}") from error
    if options.size > FILE_BYTES_MAX:
        raise BlockError("Could not resize file: Invalid argument")
    opened = from_json(BlockdevOptions, {"driver": "file", "filename": path})
    async with co_holding(graph, lambda: open_node(graph, opened)) as node, co_using(node, _CHANGES):
        mode = Preallocation(options.preallocation or "off")
        if mode == Preallocation.METADATA:
            raise BlockError("Unsupported preallocation mode: metadata")
        try:
            await co_resize(node, options.size, mode)
        except OSError as error:
            raise BlockError(f"Could not resize file: {error.strerror}") from error


async def co_create_qcow2(graph: Graph, options: BlockdevCreateOptionsQcow2) -> None:
    """A new qcow2 image on a node."""
    from bottomhalf.drivers.describe import file_name
    from bottomhalf.drivers.qcow2.create import CreateOptions, co_create

    async with AsyncExitStack() as stack:
        file = await stack.enter_async_context(co_holding(graph, partial(_find, graph, options.file)))
        given = CreateOptions.of(options, None if options.data_file is None else "")
        given.header()  # whether it can be, before anything else is looked at
        encrypt = None
        if options.encrypt is not None:
            branch: Any = options.encrypt.branch
            luks = options.encrypt.format == "luks"
            encrypt = luks_options(graph, branch, "encrypt.") if luks else _old_encryption(graph, branch.key_secret)
        data = name = None
        if options.data_file is not None:
            data = await stack.enter_async_context(co_holding(graph, partial(_find, graph, options.data_file)))
            name = file_name(data)
        await co_create(file, CreateOptions.of(options, name, encrypt), data, asks=True)


def _password(graph: Graph, secret: str | None, prefix: str) -> bytes:
    password = find_secret(graph, secret)
    if password is None:
        raise BlockError(f"Parameter '{prefix}key-secret' is required for cipher")
    return password


def _old_encryption(graph: Graph, secret: str | None) -> OldEncryption:
    from bottomhalf.drivers.qcow2.encryption import OldEncryption

    return OldEncryption.of(_password(graph, secret, "encrypt."))


def luks_options(graph: Graph, given: QCryptoBlockCreateOptionsLUKS, prefix: str) -> LuksOptions:
    """With the password. BlockError."""
    from bottomhalf.drivers.luks.create import LuksOptions

    options = LuksOptions.of(given, _password(graph, given.key_secret, prefix))
    options.header()
    return options


async def co_create_luks(graph: Graph, options: BlockdevCreateOptionsLUKS) -> None:
    """A new LUKS volume on a node, its header perhaps on another."""
    from bottomhalf.drivers.luks.library import co_make

    async with AsyncExitStack() as stack:
        nodes: list[Node | None] = []
        for given in (options.file, options.header):
            if given is None:
                nodes.append(None)
                continue
            node = await stack.enter_async_context(co_holding(graph, partial(_find, graph, given)))
            nodes.append(node)
            if node.read_only:
                raise BlockError("Block node is read-only")
        file, header = nodes
        if file is None and header is None:
            raise BlockError("Either the parameter 'header' or 'file' must be specified")
        wanted = luks_options(graph, options, "")
        for each in nodes:
            if each is not None:
                await stack.enter_async_context(co_using(each, _CHANGES))
        context = (file or header).context  # type: ignore[union-attr]
        if header is not None and header.context is not context:
            raise BlockError("the header and the volume are served by different threads")
        await move_to(context)
        try:
            mode = str(options.preallocation or "off")
            await co_make(file, wanted, options.size, header_node=header, preallocation=mode)
        finally:
            await move_to(graph.context)


CREATORS: Final[dict[str, Callable[[Graph, Any], Awaitable[None]]]] = {
    "file": co_create_file,
    "luks": co_create_luks,
    "qcow2": co_create_qcow2,
}

# -- amend ----------------------------------------------------------------------------------------------------------


async def co_amend_qcow2(node: Qcow2Node, options: BlockdevAmendOptionsQcow2, force: bool) -> None:
    """Passwords of an encrypted image. (The rest of what ``amend()`` can do changes an image under its users; QEMU's
    command has it not either.)"""
    from bottomhalf.drivers.qcow2 import layout
    from bottomhalf.drivers.qcow2.encryption import header_place

    encrypt = options.encrypt
    if encrypt is None:
        return
    if node.header.crypt_method != layout.CRYPT_LUKS:
        raise BlockError("image is not encrypted, can't amend")
    if encrypt.format != "luks":
        raise BlockError("Amend can't be used to change the qcow2 encryption format")
    async with node.metadata.lock:
        branch: Any = encrypt.branch
        await _co_amend_keys(node, node.file, branch, force, *header_place(node.header))


async def co_amend_luks(node: LuksNode, options: QCryptoBlockAmendOptionsLUKS, force: bool) -> None:
    """Passwords of a LUKS volume."""
    header = node.child("header")
    file = node.child("file")
    assert file is not None
    holder = file.node if header is None else header.node
    await _co_amend_keys(node, holder, options, force, detached=header is not None)


async def _co_amend_keys(
    node: Node,
    holder: Node,
    options: QCryptoBlockAmendOptionsLUKS,
    force: bool,
    base: int = 0,
    limit: int | None = None,
    *,
    detached: bool = False,
) -> None:
    from bottomhalf.drivers.luks.keyslots import SlotChange, co_amend

    names = (options.new_secret, options.old_secret, options.secret)
    new, old, opening = (find_secret(node.graph, name) for name in names)
    change = SlotChange(str(options.state), new, old, options.keyslot, options.iter_time)
    password = opening or _secret_of(node) or b""
    await co_amend(holder, password, change, base=base, limit=limit, detached=detached, force=force)


def _secret_of(node: Node) -> bytes | None:
    """The password with which the node was opened, as it is now."""
    branch = node.options.branch if node.options is not None else None
    encrypt = getattr(branch, "encrypt", None)
    given = getattr(branch, "key_secret", None) if encrypt is None else encrypt.branch.key_secret
    return find_secret(node.graph, given)


AMENDERS: Final[dict[str, Callable[[Any, Any, bool], Awaitable[None]]]] = {
    "luks": co_amend_luks,
    "qcow2": co_amend_qcow2,
}


async def co_amend(node: Node, branch: Any, force: bool) -> None:
    """Change an image, in the context of its node, with the permissions that it takes."""
    held = PERM_CONSISTENT_READ | (PERM_WRITE if not node.read_only else 0)
    async with co_using(node, held):
        await move_to(node.context)
        try:
            await AMENDERS[node.driver](node, branch, force)
        finally:
            await move_to(node.graph.context)
