# SPDX-License-Identifier: Apache-2.0
"""A storage program as one object: loops, graph, exports, iothreads, devices, monitors; made, steered, ended.

The daemon, ``bottomhalf serve`` and ``bh-nbd`` are this object with different front ends. The order of its end is
QEMU's: no new clients, exports closed when nothing is in flight, nodes, monitors, devices, threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import AioContext, BottomHalf, IOThread, MainLoop
from bottomhalf.aio.context import POLL_MAX_NS
from bottomhalf.block import BlockError, Graph, Node
from bottomhalf.exports.registry import ExportRegistry
from bottomhalf.host.protocol import Host
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.errors import OptionError
from bottomhalf.qapi.export import BlockExportDeleted
from bottomhalf.qapi.objects import IothreadProperties, ObjectOptions
from bottomhalf.qapi.types import EventType

if TYPE_CHECKING:
    from bottomhalf.monitor.chardev import Chardev
    from bottomhalf.monitor.qmp import QmpMonitor

ENDING_SIGNALS: Final = (1, 2, 15)  # SIGHUP, SIGINT, SIGTERM


class Storage:
    """Everything that a storage daemon has. Main thread."""

    def __init__(self, host: Host | None = None, log: Callable[[str], object] | None = None) -> None:
        self.loop = MainLoop(host)
        self.host = self.loop.main.host
        self.loop.main.poll_max_ns = POLL_MAX_NS
        self._log = log or (lambda line: None)
        for context in (self.loop.main, self.loop.iohandler):
            context.exception_handler = self._callback_failed
        self.graph = Graph(self.loop.main)
        self.iothreads: dict[str, IOThread] = {}
        self.chardevs: dict[str, Chardev] = {}
        self.monitors: list[QmpMonitor] = []
        self.dispatcher: BottomHalf | None = None  # runs the monitors' commands
        self.exports = ExportRegistry(
            self.graph, self.iothread_context, lambda export_id: self.emit(BlockExportDeleted(id=export_id)), log
        )

    def _callback_failed(self, context: AioContext, error: Exception, where: str) -> None:
        """A defect of ours must not take the other clients down: say where it is and go on."""
        from traceback import format_exception

        self._log(f"internal error in {context.name}, {where}; please report this:")
        self._log("".join(format_exception(error)).rstrip())

    def add_node(self, options: BlockdevOptions) -> Node:
        """blockdev-add: a node that lives until it is deleted."""
        from bottomhalf.drivers.registry import open_node

        if options.node_name is None:
            raise BlockError("'node-name' must be specified for the root node")
        node = open_node(self.graph, options)
        node.monitor_owned = True
        return node

    def add_object(self, options: ObjectOptions) -> None:
        """object-add, for the types that exist."""
        if options.id in self.iothreads:
            raise OptionError(f"attempt to add duplicate property '{options.id}' to object (type 'container')")
        properties = options.branch
        assert isinstance(properties, IothreadProperties)
        for name in ("poll_max_ns", "poll_grow", "poll_shrink"):
            value = getattr(properties, name)
            if value is not None and value < 0:
                raise OptionError(f"{name.replace('_', '-')} value must be in range [0, 9223372036854775807]")
        poll_max_ns = POLL_MAX_NS if properties.poll_max_ns is None else properties.poll_max_ns
        thread = IOThread(options.id, self.host, poll_max_ns)
        thread.context.exception_handler = self._callback_failed
        thread.context.poll_grow = properties.poll_grow or 2
        thread.context.poll_shrink = properties.poll_shrink or 0
        self.iothreads[options.id] = thread

    def iothread_context(self, name: str) -> AioContext:
        thread = self.iothreads.get(name)
        if thread is None:
            raise BlockError(f'iothread "{name}" not found')
        return thread.context

    def emit(self, event: EventType) -> None:
        """Tell all monitors."""
        for monitor in self.monitors:
            monitor.emit(event)

    def run(self) -> None:
        """Serve until quit()."""
        self.loop.run()

    def quit(self) -> None:
        """Let run() return."""
        self.loop.quit()

    def close(self) -> None:
        """End everything in order; waits for what is in flight."""
        self.exports.close()
        self.graph.close()
        if self.dispatcher is not None:
            self.dispatcher.delete()
        for monitor in self.monitors:
            monitor.close()
        for chardev in self.chardevs.values():
            chardev.close()
        for thread in self.iothreads.values():
            thread.stop()
        self.loop.close()


def watch_signals(storage: Storage) -> Callable[[], None]:
    """Let SIGINT, SIGTERM and SIGHUP end run(); what comes back stops watching."""
    signals = storage.host.signals(list(ENDING_SIGNALS))

    def arrived() -> None:
        if signals.take():
            storage.quit()

    def forget() -> None:
        storage.loop.iohandler.set_fd_handler(signals.fileno())
        signals.close()

    storage.loop.iohandler.set_fd_handler(signals.fileno(), arrived)
    return forget
