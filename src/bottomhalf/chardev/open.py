# SPDX-License-Identifier: Apache-2.0
"""Making character devices from their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio import AioContext
from bottomhalf.chardev.addresses import host_address, why_not_connected
from bottomhalf.chardev.base import Chardev
from bottomhalf.exports.registry import why_not_listening
from bottomhalf.host.protocol import Host, Socket
from bottomhalf.qapi.char import (
    ChardevBackend,
    ChardevCommon,
    ChardevFile,
    ChardevHostdev,
    ChardevMux,
    ChardevPty,
    ChardevRingbuf,
    ChardevSocket,
    ChardevStdio,
    check_chardev_socket,
)
from bottomhalf.qapi.errors import OptionError

if TYPE_CHECKING:
    from bottomhalf.tls.policy import Security

RECONNECT_MS_MAX: Final = 1 << 32  # seven weeks

_MISSING: Final = ("tn3270", "websocket")


class Surroundings:
    """What a new device may need of the program."""

    def __init__(
        self,
        find: Callable[[str], Chardev | None],
        log: Callable[[str], object],
        on_exit: Callable[[], object],
        server_security: Callable[[str | None, str | None], Security | None],
        client_security: Callable[[str | None, str | None], Security | None],
    ) -> None:
        self.find = find
        self.log = log
        self.on_exit = on_exit
        self.server_security = server_security
        self.client_security = client_security


def open_chardev(
    chardev_id: str, backend: ChardevBackend, context: AioContext, surroundings: Surroundings
) -> Chardev:
    """A device that is not started yet. OptionError says why not."""
    data: ChardevCommon = backend.branch.data  # type: ignore[attr-defined]  # all branches have it
    log_stream = _open_log(context.host, data)
    try:
        chardev = _make(chardev_id, backend.type, data, context, surroundings)
    except BaseException:
        if log_stream is not None:
            log_stream.close()
        raise
    chardev.log_stream = log_stream
    return chardev


def _make(
    chardev_id: str, kind: str, data: ChardevCommon, context: AioContext, surroundings: Surroundings
) -> Chardev:
    from bottomhalf.chardev.simple import NullChardev, PtyChardev, StdioChardev, StreamChardev

    host = context.host
    if isinstance(data, ChardevSocket):
        return _open_socket(chardev_id, data, context, surroundings)
    if isinstance(data, ChardevStdio):
        return StdioChardev(chardev_id, context, host.stdio(), signals=data.signal is not False)
    if isinstance(data, ChardevFile):
        mode = "append" if data.append else "truncate"
        stream = _open(lambda: host.open_stream(data.input, data.out, mode), data.out)
        return StreamChardev(chardev_id, context, kind, stream, readable=data.input is not None)
    if isinstance(data, ChardevHostdev):
        return StreamChardev(chardev_id, context, kind, _open_pipe(host, data.device))
    if isinstance(data, ChardevPty):
        try:
            return PtyChardev(chardev_id, context, data.path)
        except OSError as error:
            raise OptionError(f"Failed to create PTY: {error.strerror}", key="path") from error
    if isinstance(data, ChardevRingbuf):
        from bottomhalf.chardev.ringbuf import RingbufChardev

        return RingbufChardev(chardev_id, context, kind, data.size)
    if isinstance(data, ChardevMux):
        from bottomhalf.chardev.mux import MuxChardev

        base = surroundings.find(data.chardev)
        if base is None:
            raise OptionError(f"mux: base chardev {data.chardev} not found", key="chardev")
        return MuxChardev(chardev_id, context, base, surroundings.on_exit)
    return NullChardev(chardev_id, context)


def _open(attempt: Callable[[], Socket], path: str) -> Socket:
    try:
        return attempt()
    except OSError as error:
        raise OptionError(f"Could not open '{error.filename or path}': {error.strerror}", key="path") from error


def _open_pipe(host: Host, path: str) -> Socket:
    try:
        return host.open_stream(f"{path}.in", f"{path}.out", "existing")
    except OSError:
        return _open(lambda: host.open_stream(path, path, "existing"), path)


def _open_log(host: Host, data: ChardevCommon) -> Socket | None:
    if data.logfile is None:
        if data.logappend:
            raise OptionError("'logappend' needs 'logfile'", key="logappend")
        return None
    path = data.logfile
    try:
        return host.open_stream(None, path, "append" if data.logappend else "truncate")
    except OSError as error:
        raise OptionError(f"Unable to open logfile {path}: {error.strerror}", key="logfile") from error


def _open_socket(
    chardev_id: str, data: ChardevSocket, context: AioContext, surroundings: Surroundings
) -> Chardev:
    from bottomhalf.chardev.socket import SocketClientChardev, SocketServerChardev

    for name in _MISSING:
        if getattr(data, name, None):
            key = name.replace("_", "-")
            raise OptionError(f"Parameter '{key}' is not supported yet", key=key)
    is_server = data.server is not False
    flat = data.addr.flatten()
    host_name = getattr(flat.branch, "host", None)
    security = None
    if data.tls_creds is not None:
        if is_server:
            security = surroundings.server_security(data.tls_creds, data.tls_authz)
        else:
            security = surroundings.client_security(data.tls_creds, host_name)
    check_chardev_socket(data)
    address = host_address(flat)
    telnet = bool(data.telnet)
    try:
        if is_server:
            return SocketServerChardev(
                chardev_id,
                context,
                address,
                wait=bool(data.wait),
                telnet=telnet,
                security=security,
                log=surroundings.log,
            )
        return SocketClientChardev(
            chardev_id,
            context,
            address,
            reconnect_ns=_reconnect_ns(data),
            telnet=telnet,
            security=security,
            log=surroundings.log,
        )
    except OSError as error:
        why = why_not_listening if is_server else why_not_connected
        raise OptionError(why(address, error), key="addr") from error


def _reconnect_ns(data: ChardevSocket) -> int:
    milliseconds: Any = data.reconnect_ms
    if milliseconds is None:
        milliseconds = (data.reconnect or 0) * 1000
    if not 0 <= milliseconds <= RECONNECT_MS_MAX:
        raise OptionError(f"'reconnect' is not between 0 and {RECONNECT_MS_MAX} milliseconds", key="reconnect")
    return int(milliseconds) * 1_000_000
