# SPDX-License-Identifier: Apache-2.0
"""Image files as such: make one, look into one, check one.

    bottomhalf.create("disk.qcow2", format="qcow2", size=10 << 30)
    bottomhalf.info("disk.qcow2").virtual_size
    bottomhalf.check("disk.qcow2", repair="leaks").leaks_fixed

Looking into an image opens that file and no other, whatever it names. A ``secret`` is the password of an encrypted
image, str or bytes. Errors are ``bottomhalf.block.BlockError`` (an ``ImageError`` where the image's bytes are at fault)
and ``OSError``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockBackend, BlockError, Graph, Node
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE
from bottomhalf.tools.formats import KNOWN, probe

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.check import CheckResult
    from bottomhalf.drivers.qcow2.create import CreateOptions
    from bottomhalf.drivers.qcow2.node import Qcow2Node
    from bottomhalf.drivers.qcow2.snapshots import Snapshot

__all__ = [
    "ImageInfo",
    "amend",
    "check",
    "create",
    "info",
    "rebase",
    "resize",
    "snapshot_apply",
    "snapshot_create",
    "snapshot_delete",
    "snapshots",
]


class ImageInfo:
    """What an image says about itself. Sizes in bytes; None for what its format does not know."""

    __slots__ = (
        *("actual_size", "backing_file", "backing_format", "bitmaps", "cluster_size", "format", "header"),
        "virtual_size",
    )

    def __init__(self, format: str, virtual_size: int, actual_size: int) -> None:
        self.format = format
        self.virtual_size = virtual_size
        self.actual_size = actual_size  # on the host
        self.cluster_size: int | None = None
        self.backing_file: str | None = None
        self.backing_format: str | None = None
        # Its persistent bitmaps: name, granularity, flags, and whether they are in use (drivers.qcow2.bitmaps.Bitmap).
        self.bitmaps: list[Any] = []
        self.header: Any = None  # of a qcow2 image: drivers.qcow2.header.Header

    def __repr__(self) -> str:
        return f"<ImageInfo {self.format} {self.virtual_size} bytes>"


def create(path: str | PathLike[str], *, format: str = "raw", size: int, **options: Any) -> None:
    """Make an image file; one that is there is written over, unless somebody has it open.

    ``options`` are those of the format, by qemu-img's names. qcow2: ``compat`` ("0.10" or "1.1"; or ``version``, 2 or
    3), ``cluster_size``, ``refcount_bits``, ``extended_l2``, ``lazy_refcounts``, ``compression_type``,
    ``preallocation`` ("off", "metadata", "falloc", "full"), ``data_file`` (a path; that file is made anew, too),
    ``data_file_raw``, ``backing_file``, ``backing_fmt``; with ``encrypt_format="luks"`` it is encrypted, with the
    password ``encrypt_secret`` (str or bytes), and there are ``encrypt_cipher_alg``, ``encrypt_cipher_mode``,
    ``encrypt_ivgen_alg``, ``encrypt_ivgen_hash_alg``, ``encrypt_hash_alg`` and ``encrypt_iter_time`` (milliseconds).
    ``encrypt_format="aes"``, the old way, has a password alone, and is no protection.
    luks: the same names without ``encrypt_``. raw: ``preallocation`` ("off", "falloc", "full"), ``nocow``,
    ``extent_size_hint``. They are those of ``blockdev-create``, too. ValueError for others, BlockError for what cannot
    be."""
    if format == "luks":
        _create_luks(fspath(path), size, options)
        return
    if format not in KNOWN:
        raise ValueError(f"format is one of {', '.join(KNOWN)}, not {format!r}")
    if format == "raw":
        _create_raw(fspath(path), size, options)
        return
    from bottomhalf.drivers.qcow2.create import create as create_image

    encrypt = None
    if (encryption := options.pop("encrypt_format", None)) is not None:
        from bottomhalf.drivers.qcow2.encryption import take_options

        encrypt = take_options(encryption, options)
    wanted = replace(_create_options(size, options), encrypt=encrypt)
    wanted.header()
    _check_files(fspath(path), wanted)
    what = f"the making of {fspath(path)}"
    with ExitStack() as stack:
        graph = data = None
        if wanted.data_file is not None:  # it loses its content when the image is ours, too
            opened = _opened(wanted.data_file, writable=True, create=0, keep=True)
            _, data = stack.enter_context(opened)
            graph = data.graph
        context, file = stack.enter_context(_opened(fspath(path), writable=True, create=0, graph=graph))
        if data is not None:
            context.run(data.co_truncate(0), what=what)
        create_image(file, wanted, data)
        if data is not None:
            context.run(data.co_flush(), what=what)
        context.run(file.co_flush(), what=what)


def _check_files(path: str, wanted: CreateOptions) -> None:
    """BlockError if the files of a new image, which lose their content, are one, or one of them is its backing file."""
    from bottomhalf.host.linux.paths import is_same

    backing, data_file = wanted.backing_file, wanted.data_file
    if backing:
        backing = os.path.join(os.path.dirname(path), backing.removeprefix("file:"))
        if is_same(path, backing):
            raise BlockError("Error: Trying to create an image with the same filename as the backing file")
    if data_file is not None and is_same(path, data_file):
        raise BlockError(_OWN_DATA_FILE)
    if data_file is not None and backing and is_same(data_file, backing):
        raise BlockError("The backing file cannot be the data file")


def _create_options(size: int, options: dict[str, Any]) -> CreateOptions:
    """From names as users know them, by way of the schema's class, which says what values there are."""
    from bottomhalf.drivers.keywords import options_of
    from bottomhalf.drivers.qcow2.create import CreateOptions
    from bottomhalf.qapi.block_create import BlockdevCreateOptionsQcow2

    given = dict(options)
    version = _version(given.pop("compat", None), given.pop("version", None))
    data_file = given.pop("data_file", None)
    backing_fmt = given.pop("backing_fmt", None)  # also one of those formats that others know
    chosen = options_of(
        BlockdevCreateOptionsQcow2,
        given,
        {"file": "image", "size": max(size, 0), "version": version},
        subject="qcow2 images have",
        without=("file", "size", "encrypt"),
        also=("compat", "encrypt_format"),
    )
    if size < 0:
        raise BlockError("Image size must be a multiple of 512 bytes")
    made = CreateOptions.of(chosen, None if data_file is None else fspath(data_file))
    return replace(made, backing_fmt=backing_fmt)


def _version(compat: Any, version: Any) -> str:
    """Two ways to say the same. ValueError if both are given and they do not."""
    names = {"0.10": "v2", "1.1": "v3", "2": "v2", "3": "v3"}
    said = [names.get(str(each), str(each)) for each in (compat, version) if each is not None]
    if len(set(said)) > 1:
        raise ValueError(f"compat {compat!r} is not version {version!r}; give one of them")
    return said[0] if said else "v3"


def _create_raw(path: str, size: int, options: dict[str, Any]) -> None:
    from bottomhalf.drivers.creating import co_create_file
    from bottomhalf.drivers.keywords import options_of
    from bottomhalf.qapi.block_create import BlockdevCreateOptionsFile

    if size < 0:
        raise ValueError(f"an image of {size} bytes")
    said = {"filename": path, "size": size}
    chosen = options_of(BlockdevCreateOptionsFile, options, said, subject="raw images have", without=said)
    context = AioContext(name="image")
    graph = Graph(context)
    try:
        context.run(co_create_file(graph, chosen), what=f"the making of {path}")
    finally:
        graph.close()
        context.close()


def _create_luks(path: str, size: int, options: dict[str, Any]) -> None:
    from bottomhalf.drivers.luks.library import co_make, take_options

    if size < 0 or size % 512:
        raise ValueError(f"an encrypted disk of {size} bytes; its size is a multiple of 512")
    wanted = take_options(options, prefix="")
    wanted.header()
    with _opened(path, writable=True, create=0) as (context, file):
        context.run(co_make(file, wanted, size), what=f"the making of {path}")


def info(path: str | PathLike[str]) -> ImageInfo:
    """What an image is. Reads its header, and the list of its bitmaps."""
    with _opened(fspath(path), writable=False) as (context, file):
        format = _format(file)
        found = ImageInfo(format, file.size, file.allocated_size() or 0)
        if format == "qcow2":
            from bottomhalf.drivers.qcow2.node import co_read_header

            header = context.run(co_read_header(file), what=f"the header of {fspath(path)}")
            found.virtual_size = header.size
            found.cluster_size = header.cluster_size
            found.backing_file = header.backing_file
            found.backing_format = header.backing_format
            found.header = header
            found.bitmaps = context.run(_co_bitmaps(file, header), what=f"the bitmaps of {fspath(path)}")
        return found


async def _co_bitmaps(file: Node, header: Any) -> list[Any]:
    from bottomhalf.drivers.qcow2.keeping import co_read_directory
    from bottomhalf.drivers.qcow2.metadata import Metadata

    found = await co_read_directory(Metadata(lambda: file, header).read, header)
    return [] if found is None else found[0]


def check(path: str | PathLike[str], *, repair: str | None = None) -> CheckResult:
    """Check an image's tables. ``repair`` is "leaks" or "all". BlockError for a format without tables."""
    if repair not in (None, "leaks", "all"):
        raise ValueError(f"repair is 'leaks', 'all' or None, not {repair!r}")
    with _opened(fspath(path), writable=repair is not None) as (context, file):
        format = _format(file)
        if format != "qcow2":
            raise BlockError("This image format does not support checks")
        from bottomhalf.drivers.qcow2.check import co_check
        from bottomhalf.drivers.qcow2.node import co_read_header

        what = f"the check of {fspath(path)}"
        header = context.run(co_read_header(file), what=what)
        return context.run(co_check(file, header, repair), what=what)  # type: ignore[no-any-return]


def amend(
    path: str | PathLike[str],
    *,
    follow_names: bool = False,
    secret: str | bytes | None = None,
    force: bool = False,
    **options: Any,
) -> None:
    """Change what an image is, by the names of qemu-img amend. qcow2: ``compat`` ("0.10", "1.1"), ``refcount_bits``,
    ``lazy_refcounts``, ``size``, ``data_file`` (the name only), ``data_file_raw``. ValueError for options and values
    that there are not, BlockError for what cannot be changed, and then nothing was. ``follow_names``: the data file
    that the image names may be opened, which images that have one need; and the backing file, which ``size`` needs to
    be larger.

    Where an image is encrypted by LUKS, which ``secret`` opens, ``encrypt_state="active"`` adds the password
    ``encrypt_new_secret`` (in ``encrypt_keyslot``, with ``encrypt_iter_time`` milliseconds of work), and "inactive"
    takes away those slots that ``encrypt_old_secret`` opens, or ``encrypt_keyslot``; the last one only with ``force``,
    which also overwrites a slot that is in use. For the format luks the names are without ``encrypt_``."""
    from bottomhalf.drivers.keywords import check_kind
    from bottomhalf.drivers.luks.keyslots import take_change
    from bottomhalf.drivers.qcow2.amend import CREATE_ONLY, AmendOptions, co_amend, co_check
    from bottomhalf.host.linux.paths import is_same

    check_kind("force", force, bool)
    if _is_luks(fspath(path)):
        _amend_luks(fspath(path), secret, force, options)
        return
    slots = take_change(options, prefix="encrypt_")
    for name in options:
        if name in CREATE_ONLY or name.startswith("encrypt_"):
            name = name.replace("encrypt_", "encrypt.").replace("_", "-") if name.startswith("encrypt_") else name
            raise BlockError(f"Invalid parameter '{name}'\n{_FOR_CREATION}")
    wanted = AmendOptions.of(options)
    if wanted.data_file is not None and is_same(fspath(path), wanted.data_file):
        raise BlockError(_OWN_DATA_FILE)
    larger = wanted.size is not None and wanted.size > info(path).virtual_size
    with _opened_image(fspath(path), follow_names, secret, backing=larger) as (context, node):
        what = f"the change of {fspath(path)}"
        if slots is not None:
            from bottomhalf.drivers.qcow2.encryption import co_amend_keys

            context.run(co_check(node, wanted), what=what)
            context.run(co_amend_keys(node, secret, slots, force=force), what=what)
        context.run(co_amend(node, wanted), what=what)


def _is_luks(path: str) -> bool:
    from bottomhalf.host.linux import LinuxHost
    from bottomhalf.tools.formats import image_format

    return image_format(LinuxHost(), path) == "luks"


_FOR_CREATION = "This option is only supported for image creation"
_OWN_DATA_FILE = "The image itself cannot be its data file"


def _amend_luks(path: str, secret: str | bytes | None, force: bool, options: dict[str, Any]) -> None:
    from bottomhalf.drivers.luks.keyslots import CREATE_ONLY, co_amend, take_change
    from bottomhalf.drivers.luks.node import co_unlock

    change = take_change(options)
    for name in options:
        if name in CREATE_ONLY:
            raise BlockError(f"Invalid parameter '{name.replace('_', '-')}'\n{_FOR_CREATION}")
    if options:
        raise ValueError(f"the passwords of a LUKS volume have no option {next(iter(options))!r}")
    if change is None:
        return
    if secret is None:
        raise BlockError("Parameter 'key-secret' is required for cipher")
    password = secret.encode() if isinstance(secret, str) else secret
    what = f"the change of {path}"
    with _opened(path, writable=True) as (context, file):
        if change.state == "inactive":  # which needs no key, and so would ask for no password
            context.run(co_unlock(file, password), what=what)
        context.run(co_amend(file, password, change, force=force), what=what)


def rebase(
    path: str | PathLike[str],
    backing: str | PathLike[str] | None,
    backing_format: str | None = None,
    *,
    unsafe: bool = False,
    compress: bool = False,
    progress: Callable[[int, int], object] | None = None,
    follow_names: bool = False,
    secret: str | bytes | None = None,
) -> None:
    """Let an image have another backing file, or none (None), and keep its content: what differs is copied into it,
    compressed if you like. The image has its old backing file until that is done. ``backing`` is a path, a relative one
    beside the image; ``progress`` is called with the bytes that were looked at and those that there are.
    ``follow_names``: the files that the images name may be opened. Internal snapshots see the new file.

    With ``unsafe`` the name is changed and nothing else: no file is opened, and the content changes unless both have
    the same. BlockError, OSError."""
    from bottomhalf.drivers.keywords import check_kind

    check_kind("unsafe", unsafe, bool)
    backing = None if backing is None else fspath(backing)
    what = f"the rebase of {fspath(path)}"
    if backing and backing_format is None:
        raise BlockError(f"Could not change the backing file to '{backing}': backing format must be specified")
    if unsafe:
        from bottomhalf.drivers.qcow2.amend import co_rebase

        with _opened_image(fspath(path), follow_names, secret) as (context, node):
            context.run(co_rebase(node, backing, backing_format), what=what)
        return
    from bottomhalf.drivers.qcow2.rebasing import co_rebase_safely

    with (
        _opened_image(fspath(path), follow_names, secret, backing=True) as (context, node),
        _opened_backing(node, backing, backing_format, follow_names) as new,
    ):
        body = co_rebase_safely(node, new, backing, backing_format, compress=compress, progress=progress)
        context.run(body, what=what)


@contextmanager
def _opened_backing(
    image: Qcow2Node, name: str | None, format: str | None, follow_names: bool
) -> Iterator[Node | None]:
    """The backing file that an image is to have, for reading."""
    from bottomhalf.drivers.registry import backing_options, open_node
    from bottomhalf.qapi.errors import OptionError

    if not name:
        yield None
        return
    try:
        options = backing_options(image.graph, name, format, image.file)
        node = open_node(image.graph, options, follow_names=follow_names)
    except OptionError as error:
        raise BlockError(f"Invalid format name: '{format}'") from error
    except BlockError as error:
        raise BlockError(f"Could not open new backing file '{name}': {error}") from error
    node.monitor_owned = True
    backend = BlockBackend(image.graph, held=PERM_CONSISTENT_READ, shared=PERM_ALL)
    try:
        backend.insert(node)
        yield node
    finally:
        backend.close()


def resize(
    path: str | PathLike[str],
    size: int,
    *,
    shrink: bool = False,
    preallocation: str = "off",
    follow_names: bool = False,
    secret: str | bytes | None = None,
) -> None:
    """Give an image's disk another size in bytes. A smaller one, with which content is lost, only with ``shrink``.
    ``preallocation`` of a new part: "off", "falloc", "full", for qcow2 also "metadata". ``follow_names``: the files
    that the image names may be opened. Images with a data file need that, and those with a backing file need it to
    become larger: where that is longer than the disk was, its content has to be hidden. BlockError, OSError."""
    from bottomhalf.block.resize import Preallocation, co_resize
    from bottomhalf.drivers.keywords import check_kind

    check_kind("shrink", shrink, bool)
    if preallocation not in list(Preallocation):
        raise ValueError(f"preallocation is one of {', '.join(Preallocation)}, not {preallocation!r}")
    with _opened(fspath(path), writable=True) as (context, file):
        if _format(file) == "raw":
            _check_shrinking(file, size, shrink)
            body = co_resize(file, size, Preallocation(preallocation))
            context.run(body, what=f"the resizing of {fspath(path)}")
            return
    larger = size > info(path).virtual_size
    with _opened_image(fspath(path), follow_names, secret, backing=larger) as (context, node):
        _check_shrinking(node, size, shrink)
        body = co_resize(node, size, Preallocation(preallocation))
        context.run(body, what=f"the resizing of {fspath(path)}")


def _check_shrinking(node: Node, size: int, shrink: bool) -> None:
    if size < node.size and not shrink:
        raise BlockError(f"the disk has {node.size} bytes; making it smaller loses content, and needs shrink=True")


def snapshots(path: str | PathLike[str]) -> list[Snapshot]:
    """The snapshots in an image, the oldest first; none for a format that has no such thing. Opens that file alone."""
    with _opened(fspath(path), writable=False) as (context, file):
        if _format(file) != "qcow2":
            return []
        from bottomhalf.drivers.qcow2.metadata import Metadata
        from bottomhalf.drivers.qcow2.node import co_read_header
        from bottomhalf.drivers.qcow2.snapshots import co_read

        async def read() -> list[Snapshot]:
            return (await co_read(Metadata(lambda: file, await co_read_header(file))))[0]

        return context.run(read(), what=f"the snapshots in {fspath(path)}")  # type: ignore[no-any-return]


def snapshot_create(path: str | PathLike[str], name: str, *, secret: str | bytes | None = None) -> Snapshot:
    """Keep what an image contains now under a name. BlockError, OSError."""
    with _opened_image(fspath(path), False, secret) as (context, node):
        body = node.snapshots.create(name, date_ns=context.host.realtime_ns())
        return context.run(body, what=f"snapshot '{name}' in {fspath(path)}")  # type: ignore[no-any-return]


def snapshot_apply(path: str | PathLike[str], snapshot: str, *, secret: str | bytes | None = None) -> None:
    """Let an image contain again what the snapshot of that id or name does; what it contains now is lost. BlockError,
    OSError."""
    with _opened_image(fspath(path), False, secret) as (context, node):
        found = _find_snapshot(context, node, snapshot)
        context.run(node.snapshots.apply(found), what=f"the return of {fspath(path)} to snapshot '{found.name}'")


def snapshot_delete(path: str | PathLike[str], snapshot: str, *, secret: str | bytes | None = None) -> None:
    """Forget the snapshot of that name or, if none is called so, id; as qemu-img. BlockError, OSError."""
    with _opened_image(fspath(path), False, secret) as (context, node):
        found = _find_snapshot(context, node, snapshot, names_first=True)
        context.run(node.snapshots.delete(found), what=f"the end of snapshot '{found.name}' in {fspath(path)}")


def _find_snapshot(context: AioContext, node: Qcow2Node, wanted: str, *, names_first: bool = False) -> Snapshot:
    known = context.run(node.snapshots.read(), what=f"the snapshots of {node.describe()}")
    for which in ("name", "id") if names_first else ("id", "name"):
        for each in known:
            if getattr(each, which) == wanted:
                return each  # type: ignore[no-any-return]
    raise BlockError(f"there is no snapshot '{wanted}', but {', '.join(repr(one.name) for one in known) or 'none'}")


@contextmanager
def _opened_image(
    path: str, follow_names: bool, secret: str | bytes | None = None, *, backing: bool = False
) -> Iterator[tuple[AioContext, Qcow2Node]]:
    """A qcow2 image, alone and for writing, without its backing file unless ``backing``. ``secret``: its password."""
    from bottomhalf.drivers.qcow2.node import Qcow2Node
    from bottomhalf.drivers.registry import file_driver, open_node
    from bottomhalf.qapi.block import BlockdevOptions
    from bottomhalf.qapi.visit import from_json

    with _opened(path, writable=False) as (_, file):
        if _format(file) != "qcow2":
            raise BlockError("Format driver does not support this operation")
    context = AioContext(name="image")
    graph = Graph(context)
    backend = BlockBackend(graph, held=PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE, shared=0)
    try:
        below = {"driver": file_driver(graph, path), "filename": path, "discard": "unmap"}
        options: dict[str, Any] = {"driver": "qcow2", "file": below, "discard": "unmap"}
        if not backing:
            options["backing"] = None
        if secret is not None:
            options["encrypt"] = _encryption(graph, path, secret)
        node = open_node(graph, from_json(BlockdevOptions, options), follow_names=follow_names)
        assert isinstance(node, Qcow2Node)
        node.monitor_owned = True
        backend.insert(node)
        yield context, node
    finally:
        backend.close()
        graph.close()
        context.close()


def _encryption(graph: Graph, path: str, secret: str | bytes) -> dict[str, Any]:
    """Let the graph know the password; the option by which the image gets it."""
    from bottomhalf.drivers.luks.library import SECRET, know_password
    from bottomhalf.tools.formats import encryption, image_head

    know_password(graph, secret)
    how = encryption(image_head(graph.context.host, path))
    return {"format": how or "luks", "key-secret": SECRET}


@contextmanager
def _opened(
    path: str, *, writable: bool, create: int | None = None, keep: bool = False, graph: Graph | None = None
) -> Iterator[tuple[AioContext, Node]]:
    """The file of an image as a node that nobody else may change meanwhile; ``create``: made anew, of that size, but
    with ``keep`` only if there is none. In a graph that is there already, or in one of its own."""
    from bottomhalf.drivers.registry import file_driver, open_node
    from bottomhalf.qapi.block import BlockdevOptions
    from bottomhalf.qapi.visit import from_json

    own = graph is None
    context = AioContext(name="image") if graph is None else graph.context
    graph = graph or Graph(context)
    held = PERM_CONSISTENT_READ | (PERM_WRITE | PERM_RESIZE if writable else 0)
    backend = BlockBackend(graph, held=held, shared=PERM_ALL & ~(PERM_WRITE | PERM_RESIZE))
    try:
        if create is not None and not (keep and _is_file(context, path)):
            _create_file(context, path, create)
        driver = file_driver(graph, path)
        options = {"driver": driver, "filename": path, "read-only": not writable, "discard": "unmap"}
        node = open_node(graph, from_json(BlockdevOptions, options))
        node.monitor_owned = True
        backend.insert(node)
        yield context, node
    finally:
        backend.close()
        if own:
            graph.close()
            context.close()


def _is_file(context: AioContext, path: str) -> bool:
    """Whether there is such a file, and it is no device."""
    try:
        file = context.host.open_file(path, read_only=True, locking="off")
    except OSError:
        return False
    file.close()
    return not file.is_device


def _create_file(context: AioContext, path: str, size: int) -> None:
    try:
        context.host.create_file(path, size)
    except OSError as error:
        raise BlockError(f"Could not create '{path}': {error.strerror}") from error


def _format(file: Node) -> str:
    head = bytearray(min(512, file.size))
    if head:
        file.context.run(file.co_pread(0, memoryview(head)), what=f"the first bytes of {file.describe()}")
    format = probe(bytes(head))
    if format not in KNOWN:
        raise BlockError(f"the image is {format}, which is not supported yet")
    return format

