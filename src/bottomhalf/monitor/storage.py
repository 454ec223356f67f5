# SPDX-License-Identifier: Apache-2.0
"""A storage program as one object: loops, graph, exports, iothreads, devices, monitors; made, steered, ended.

The daemon, ``bottomhalf serve`` and ``bh-nbd`` are this object with different front ends. The order of its end is
QEMU's: no new clients, exports closed when nothing is in flight, nodes, monitors, devices, threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio import AioContext, IOThread, MainLoop, run_in, wait_while
from bottomhalf.block import BlockError, Graph, Node
from bottomhalf.block.graph import is_well_formed_id
from bottomhalf.exports.registry import ExportRegistry
from bottomhalf.host.protocol import Host, SignalSource
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.errors import OptionError
from bottomhalf.qapi.export import BlockExportDeleted
from bottomhalf.qapi.objects import ObjectOptions
from bottomhalf.qapi.types import EventType

if TYPE_CHECKING:
    from bottomhalf.chardev.base import Chardev
    from bottomhalf.jobs.registry import Jobs
    from bottomhalf.monitor.dispatcher import Dispatcher
    from bottomhalf.monitor.events import Broadcast
    from bottomhalf.monitor.hmp import HmpMonitor
    from bottomhalf.monitor.qmp import QmpMonitor
    from bottomhalf.qapi.char import ChardevBackend
    from bottomhalf.qom import QomObject, Tree
    from bottomhalf.tls.policy import Security

# How long the main context looks for the next event before it sleeps. It must be longer than a local client needs to
# answer, and in a virtual machine waking the client's idle processor takes some 45 us of that; and longer than a quick
# disk needs for a burst of 32 reads, some 130 us. The time adapts itself and is nothing while requests are rare.
MAIN_POLL_MAX_NS: Final = 200_000
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
        self.graph.image_corrupted = self._image_corrupted
        self.chardevs: dict[str, Chardev] = {}
        self.hmp_monitors: list[HmpMonitor] = []
        self._jobs: Jobs | None = None
        self._tree: Tree | None = None
        self._dispatcher: Dispatcher | None = None
        self._broadcast: Broadcast | None = None
        self._monitor_thread: IOThread | None = None
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

    @property
    def jobs(self) -> Jobs:
        """Work in the background."""
        if self._jobs is None:
            from bottomhalf.jobs.registry import Jobs

            self._jobs = Jobs(self.loop.main, self.emit, self.report_defect)
        return self._jobs

    def _image_corrupted(self, node: Node, text: str, offset: int | None, size: int | None, fatal: bool) -> None:
        """An image turned out to be damaged, in whatever thread."""
        from bottomhalf.qapi.block import BlockImageCorrupted

        self.log(f"{node.driver}: {text}")
        event = BlockImageCorrupted(
            device="", node_name=node.name, msg=text, offset=offset, size=size, fatal=fatal
        )
        self.loop.main.schedule_oneshot(lambda: self.emit(event))

    # -- objects ------------------------------------------------------------------------------------------------

    @property
    def tree(self) -> Tree:
        """All objects. Made when it is first needed, since most programs that only serve a disk need none."""
        if self._tree is None:
            from bottomhalf.monitor import throttle_object  # noqa: F401  # its type
            from bottomhalf.qom import authz, event_loop, secret  # noqa: F401  # their types
            from bottomhalf.qom.tree import Tree
            from bottomhalf.tls import objects  # noqa: F401  # their types

            self._tree = Tree(self.host, self.loop.main, self._callback_failed)
            self._tree.in_use = self._is_needed
            self._tree.graph = self.graph
            self.graph.find_secret = partial(secret.lookup, self._tree)
            for path in ("/chardevs", "/objects", "/backend"):
                self._tree.container(path)
            for chardev in self.chardevs.values():
                self._show(chardev)
        return self._tree

    def _is_needed(self, user_object: QomObject) -> bool:
        """Whether a node or one of its users is served by an object's thread."""
        context = getattr(user_object, "context", None)
        used = [node.context for node in self.graph.nodes.values()]
        used += [backend.context for backend in self.graph.backends]
        return context is not None and context in used

    def add_object(self, options: ObjectOptions) -> None:
        """object-add. OptionError."""
        from bottomhalf.qapi.visit import to_json
        from bottomhalf.qom import QomError

        if not is_well_formed_id(options.id):
            raise OptionError(
                "Parameter 'id' expects an identifier",
                key="id",
                hint="Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
            )
        try:
            self.tree.create(str(options.qom_type), options.id, to_json(options.branch))
        except QomError as error:
            raise OptionError(error.desc) from error

    def iothread_context(self, name: str) -> AioContext:
        from bottomhalf.qom.event_loop import Iothread

        found = self.tree.user_object(name, Iothread)
        if found is None or found.thread is None:
            raise BlockError(f'iothread "{name}" not found')
        return found.thread.context

    def server_security(self, creds_id: str | None, authz_id: str | None) -> Security | None:
        """What ``tls-creds`` and ``tls-authz`` of something that listens ask for; None for plain bytes. OptionError."""
        if creds_id is None:
            if authz_id is not None:
                raise OptionError("'tls-authz' requires 'tls-creds'", key="tls-authz")
            return None
        from bottomhalf.qom import QomError
        from bottomhalf.tls.policy import server_security

        try:
            return server_security(self.tree, creds_id, authz_id)
        except QomError as error:
            raise OptionError(error.desc, key="tls-creds") from None

    def client_security(self, creds_id: str | None, hostname: str | None) -> Security | None:
        """The same for something that connects."""
        if creds_id is None:
            return None
        from bottomhalf.qom import QomError
        from bottomhalf.tls.policy import client_security

        try:
            return client_security(self.tree, creds_id, hostname)
        except QomError as error:
            raise OptionError(error.desc, key="tls-creds") from None

    # -- character devices --------------------------------------------------------------------------------------

    def add_chardev(
        self, chardev_id: str, backend: ChardevBackend, *, instead_of: Chardev | None = None
    ) -> Chardev:
        """chardev-add: a character device that listens or is connected when this returns. OptionError."""
        from bottomhalf.chardev.open import Surroundings, open_chardev

        if backend.type == "stdio" and any(each.kind == "stdio" for each in self.chardevs.values()):
            raise OptionError("cannot use stdio by multiple character devices")
        if chardev_id in self.chardevs and instead_of is None:
            raise OptionError(
                f"attempt to add duplicate property '{chardev_id}' to object (type 'container')", key="id"
            )
        surroundings = Surroundings(
            self.chardevs.get, self.log, self.quit, self.server_security, self.client_security
        )
        chardev = open_chardev(chardev_id, backend, self.loop.iohandler, surroundings)
        if instead_of is not None:
            self.remove_chardev(instead_of)
        self.chardevs[chardev_id] = chardev
        if self._tree is not None:
            self._show(chardev)
        chardev.start()
        return chardev

    def _show(self, chardev: Chardev) -> None:
        from bottomhalf.monitor.char_commands import object_of

        self.tree.container("/chardevs").add_child(chardev.id, object_of(chardev))

    def await_client(self, chardev: Chardev) -> None:
        """Wait until a client of a socket with wait=on is there. Only the main context is served meanwhile."""
        if getattr(chardev, "wait", False) and not chardev.connected:
            chardev.move(self.loop.main)
            wait_while(self.loop.main, lambda: not chardev.connected, f"a client of chardev {chardev.id}")
            chardev.move(self.loop.iohandler)

    def remove_chardev(self, chardev: Chardev) -> None:
        """chardev-remove, for one that nobody uses."""
        chardev.end()
        del self.chardevs[chardev.id]
        if self._tree is not None:
            self._tree.container("/chardevs").children[chardev.id].unparent()

    # -- monitors -----------------------------------------------------------------------------------------------

    @property
    def dispatcher(self) -> Dispatcher:
        """Runs the commands of QMP monitors."""
        if self._dispatcher is None:
            from bottomhalf.monitor.dispatcher import Dispatcher
            from bottomhalf.monitor.events import Broadcast

            self._dispatcher = Dispatcher(self)
            self._broadcast = Broadcast(self.loop, self._send_event)
        return self._dispatcher

    @property
    def monitors(self) -> list[QmpMonitor]:
        """The QMP monitors."""
        return [] if self._dispatcher is None else self._dispatcher.monitors

    def monitor_context(self) -> AioContext:
        """The context of the thread that serves QMP monitors, however busy this one is."""
        if self._monitor_thread is None:
            self._monitor_thread = IOThread("monitors", self.host, poll_max_ns=0)
            self._monitor_thread.context.exception_handler = self._callback_failed
        return self._monitor_thread.context

    def emit(self, event: EventType) -> None:
        """Tell all monitors. From any thread."""
        if self._broadcast is not None:
            self._broadcast.emit(event)

    def _send_event(self, name: str, data: dict[str, Any] | None, realtime_ns: int) -> None:
        for monitor in tuple(self.monitors):
            monitor.send_event(name, data, realtime_ns)

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
        if self._dispatcher is not None:
            yield self._dispatcher.stop
        if self._jobs is not None:
            yield self._jobs.close
        yield self.exports.close
        yield self.graph.close
        yield self._finish
        if self._broadcast is not None:
            yield self._broadcast.close
        for monitor in self.monitors:
            yield partial(run_in, monitor.context, monitor.close, f"monitor {monitor.id} to close")
        for hmp in self.hmp_monitors:
            yield hmp.close
        for chardev in reversed(self.chardevs.values()):
            yield chardev.end
        if self._monitor_thread is not None:
            yield self._monitor_thread.stop
        if self._dispatcher is not None:
            yield self._dispatcher.close
        if self._tree is not None:
            yield self._tree.close
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
