# SPDX-License-Identifier: Apache-2.0
"""A storage program as one object: loops, graph, exports, iothreads, devices, monitors; made, steered, ended.

The daemon, ``bottomhalf serve`` and ``bh-nbd`` are this object with different front ends. The order of its end is
QEMU's: no new clients, exports closed when nothing is in flight, nodes, monitors, devices, threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import AioContext, BottomHalf, IOThread, MainLoop
from bottomhalf.aio.context import POLL_MAX_NS
from bottomhalf.block import BlockError, Graph, Node
from bottomhalf.block.graph import is_well_formed_id
from bottomhalf.exports.registry import ExportRegistry
from bottomhalf.host.protocol import Host, SignalSource
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.errors import OptionError
from bottomhalf.qapi.export import BlockExportDeleted
from bottomhalf.qapi.objects import IothreadProperties, ObjectOptions
from bottomhalf.qapi.types import EventType

if TYPE_CHECKING:
    from bottomhalf.monitor.chardev import Chardev
    from bottomhalf.monitor.qmp import QmpMonitor
    from bottomhalf.qapi.char import ChardevBackend

# How long the main context looks for the next request before it sleeps. It must be longer than a local client needs
# to answer, and in a virtual machine waking the client's idle processor takes some 45 us of that. The time adapts
# itself and is nothing while requests are rare.
MAIN_POLL_MAX_NS: Final = 100_000
ENDING_SIGNALS: Final = (1, 2, 15)  # SIGHUP, SIGINT, SIGTERM
LAST_POLLS_MAX: Final = 1000


class Storage:
    """Everything that a storage daemon has. Main thread."""

    def __init__(self, host: Host | None = None, log: Callable[[str], object] | None = None) -> None:
        self.loop = MainLoop(host)
        self.host = self.loop.main.host
        self.loop.main.poll_max_ns = MAIN_POLL_MAX_NS
        self.log = log or (lambda line: None)
        self._signals: SignalSource | None = None
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
        self.report_defect(error, f"{context.name}, {where}")

    def report_defect(self, error: Exception, where: str) -> None:
        """A defect of ours must not take the other clients down: say where it is and go on."""
        from traceback import format_exception

        self.log(f"internal error in {where}; please report this:")
        self.log("".join(format_exception(error)).rstrip())

    def add_node(self, options: BlockdevOptions, *, follow_names: bool = True) -> Node:
        """blockdev-add: a node that lives until it is deleted. ``follow_names``: as open_node() takes it."""
        from bottomhalf.drivers.registry import open_node

        if options.node_name is None:
            raise BlockError("'node-name' must be specified for the root node")
        node = open_node(self.graph, options, follow_names=follow_names)
        node.monitor_owned = True
        return node

    def add_object(self, options: ObjectOptions) -> None:
        """object-add, for the types that exist."""
        from bottomhalf.block.throttling import Limits, throttle_groups
        from bottomhalf.qapi.throttle import ThrottleGroupProperties

        if not is_well_formed_id(options.id):
            raise OptionError(
                "Parameter 'id' expects an identifier",
                key="id",
                hint="Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
            )
        groups = throttle_groups(self.graph)
        if options.id in self.iothreads or options.id in groups.by_name:
            raise OptionError(f"attempt to add duplicate property '{options.id}' to object (type 'container')")
        properties = options.branch
        if isinstance(properties, ThrottleGroupProperties):
            groups.create(options.id, Limits.from_options(properties.given()))
            return
        assert isinstance(properties, IothreadProperties)
        for name in ("poll_max_ns", "poll_grow", "poll_shrink"):
            value = getattr(properties, name)
            if value is not None and value < 0:
                raise OptionError(f"{name.replace('_', '-')} value must be in range [0, 9223372036854775807]")
        poll_max_ns = POLL_MAX_NS if properties.poll_max_ns is None else properties.poll_max_ns
        thread = IOThread(
            options.id, self.host, poll_max_ns, properties.poll_grow or 0, properties.poll_shrink or 0
        )
        thread.context.exception_handler = self._callback_failed
        self.iothreads[options.id] = thread

    def add_chardev(self, chardev_id: str, backend: ChardevBackend) -> Chardev:
        """chardev-add: a character device that listens or is connected when this returns."""
        from bottomhalf.monitor.chardev import ClientChardev, open_chardev
        from bottomhalf.qapi.char import ChardevStdioWrapper

        is_stdio = isinstance(backend.branch, ChardevStdioWrapper)
        if is_stdio and any(isinstance(each, ClientChardev) and each.is_stdio for each in self.chardevs.values()):
            raise OptionError("cannot use stdio by multiple character devices")
        if chardev_id in self.chardevs:
            raise OptionError(f"Duplicate ID '{chardev_id}' for chardev", key="id")
        chardev = self.chardevs[chardev_id] = open_chardev(chardev_id, backend, self.loop.iohandler)
        chardev.start()
        return chardev

    def iothread_context(self, name: str) -> AioContext:
        thread = self.iothreads.get(name)
        if thread is None:
            raise BlockError(f'iothread "{name}" not found')
        return thread.context

    def emit(self, event: EventType) -> None:
        """Tell all monitors."""
        for monitor in self.monitors:
            monitor.emit(event)

    def watch_signals(self) -> None:
        """Let SIGINT, SIGTERM and SIGHUP end run(). Until close() is done they have no other effect, so that an
        impatient user does not keep data from being written."""
        self._signals = self.host.signals(list(ENDING_SIGNALS))
        self.loop.iohandler.set_fd_handler(self._signals.fileno(), self._signalled)

    def _signalled(self) -> None:
        if self._signals is not None and self._signals.take():
            self.quit()

    def run(self) -> None:
        """Serve until quit()."""
        self.loop.run()

    def run_forever(self) -> None:
        """run() for a program that has set up everything: what exists now lives to its end, and the garbage
        collector need not look at it again."""
        import gc

        gc.freeze()
        gc.enable()
        self.run()

    def quit(self) -> None:
        """Let run() return."""
        self.loop.quit()

    def close(self) -> None:
        """End everything in order; waits for what is in flight. An error does not keep the rest from ending: the
        first one is raised when all is done."""
        first: Exception | None = None
        for step in self._last_steps():
            try:
                step()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def _last_steps(self) -> Iterator[Callable[[], object]]:
        yield self.exports.close
        yield self.graph.close
        yield self._finish
        if self.dispatcher is not None:
            yield self.dispatcher.delete
        for monitor in self.monitors:
            yield monitor.close
        for chardev in self.chardevs.values():
            yield chardev.close
        for thread in self.iothreads.values():
            yield thread.stop
        if self._signals is not None:
            yield self._forget_signals
        yield self.loop.close

    def _finish(self) -> None:
        """Run what the steps before have scheduled."""
        for _ in range(LAST_POLLS_MAX):
            if not self.loop.main.poll(False):
                break

    def _forget_signals(self) -> None:
        assert self._signals is not None
        self.loop.iohandler.set_fd_handler(self._signals.fileno())
        self._signals.close()
        self._signals = None
