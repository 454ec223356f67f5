# SPDX-License-Identifier: Apache-2.0
"""Drivers that are not ours: from the page, from a package that names them, and what happens if they are broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bottomhalf.aio import AioContext, wait_while
from bottomhalf.aio.asyncio_thread import AsyncioThread
from bottomhalf.aio.errors import WasCancelled
from bottomhalf.block import Graph
from bottomhalf.block.throttling import Limits, throttle_groups
from bottomhalf.drivers import registry
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevDriver, BlockdevOptions
from tests.block.bench import bench, flush, read, write
from tests.drivers.helpers import opened, play

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write-a-driver.md").read_text()
BLOCKS = re.findall(r"^```python runnable\n(.*?)^```", PAGE, re.M | re.S)
FIRST = next(block for block in BLOCKS if 'driver = "memory"' in block)
LISTS = next(block for block in BLOCKS if 'driver = "slow-tail"' in block)


@pytest.fixture
def page_drivers() -> Any:
    """The page's drivers, registered for one test: one in coroutine form, one for lists."""
    before = dict(registry._OPENERS), dict(BlockdevOptions.branches), dict(BlockdevDriver.values)
    for name, source in (("page_memory", FIRST), ("page_lists", LISTS[: LISTS.index("open(")])):
        module = sys.modules[name] = ModuleType(name)
        exec(compile(source, "write-a-driver.md", "exec"), vars(module))
    yield
    for now, old in zip((registry._OPENERS, BlockdevOptions.branches, BlockdevDriver.values), before, strict=True):
        now.clear()
        now.update(old)


def test_the_example_is_short() -> None:
    assert len(FIRST.splitlines()) < 50


def test_the_pages_drivers_throttled_and_drained(seed: int, page_drivers: None) -> None:
    import random

    chance = random.Random(seed)
    with bench(SimHost(seed)) as it:
        throttle_groups(it.graph).create("g", Limits.from_options({"iops-total": 100}))
        memory = {"driver": "memory", "node-name": "memory", "size": 65536}
        slow = {"driver": "slow-tail", "tail": 30_000, "file": memory}
        user = it.user(opened(it, {"driver": "throttle", "throttle-group": "g", "file": slow}))
        model = bytearray(65536)
        for number in range(10):
            user.submit(*(write(n * 1000, bytes([number]) * 1000) for n in range(60)))
            model[:60_000] = bytes([number]) * 60_000
            with it.graph.drained(it.graph.nodes["memory"]):
                assert not user.waiting
        play(user, model, chance, 10)


def package(folder: Path, value: str = "strange_memory", source: str = FIRST) -> dict[str, str]:
    """Install a package that names the driver "memory"; the environment that has it."""
    (folder / "strange_memory.py").write_text(source)
    metadata = folder / "strange_memory-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: strange-memory\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[bottomhalf.drivers]\nmemory = {value}\n")
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{folder}"}


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def test_a_package_brings_a_driver(tmp_path: Path) -> None:
    environment = package(tmp_path)
    code = """
import sys, bottomhalf
with bottomhalf.open({"driver": "null-co", "size": 512}): pass
assert "strange_memory" not in sys.modules and "importlib.metadata" not in sys.modules, "not before it is asked for"
with bottomhalf.open({"driver": "memory", "size": 4096}) as disk:
    disk.pwrite(b"hello", 100)
    print(disk.pread(5, 100))
try:
    bottomhalf.open({"driver": "nobodys"})
except Exception as error:
    print(error)
"""
    done = run(code, environment)
    assert done.stdout.splitlines() == ["b'hello'", "Parameter 'driver' does not accept value 'nobodys'"], done.stderr


def test_a_function_that_registers(tmp_path: Path) -> None:
    source = FIRST.replace("BlockdevOptions.register", "def register() -> None:\n    BlockdevOptions.register")
    source = source.replace('register_driver("memory"', '    register_driver("memory"')
    environment = package(tmp_path, "strange_memory:register", source)
    done = run('import bottomhalf; print(bottomhalf.open({"driver": "memory", "size": 4096}).size)', environment)
    assert done.stdout == "4096\n", done.stderr


def test_a_broken_package_is_named(tmp_path: Path) -> None:
    environment = package(tmp_path, source="raise ZeroDivisionError('as told')\n")
    code = """
import bottomhalf
from bottomhalf.qapi.errors import OptionError
for _ in range(2):
    try:
        bottomhalf.open({"driver": "memory", "size": 4096})
    except OptionError as error:
        print(error)
"""
    done = run(code, environment)
    text = "Could not load driver 'memory' of package strange-memory (strange_memory): ZeroDivisionError: as told"
    assert done.stdout.splitlines() == [text] * 2, done.stderr


def test_in_the_daemon_throttled_and_exported(
    tmp_path: Path, spawn: Callable[..., Any], require: Callable[[str], str]
) -> None:
    """A stranger's driver, and a stranger's client."""
    nbdcopy = require("nbdcopy")
    environment = package(tmp_path)
    socket, source, copy = tmp_path / "nbd.sock", tmp_path / "source.raw", tmp_path / "copy.raw"
    source.write_bytes(os.urandom(1 << 20))
    spawn(
        [
            *(sys.executable, "-m", "bottomhalf.tools.bh_storage_daemon"),
            *("--object", "throttle-group,id=g,limits.bps-total=10000000,limits.bps-total-max=20000000"),
            *("--blockdev", "throttle,node-name=disk,throttle-group=g,file.driver=memory,file.size=1M"),
            *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
            *("--export", "nbd,id=e,node-name=disk,name=disk,writable=on"),
        ],
        ready=socket,
        environment=environment,
    )
    uri = f"nbd+unix:///disk?socket={socket}"
    subprocess.run([nbdcopy, str(source), uri], check=True, timeout=60)
    subprocess.run([nbdcopy, uri, str(copy)], check=True, timeout=60)
    assert copy.read_bytes() == source.read_bytes()


# -- asyncio in a thread of its own -----------------------------------------------------------------------------------


def test_asyncio_in_a_thread() -> None:
    import asyncio

    context = AioContext(LinuxHost())
    libraries = AsyncioThread(context.host)

    async def work(number: int) -> int:
        await asyncio.sleep(0)
        if number == 3:
            raise KeyError(number)
        if number == 4:
            raise asyncio.CancelledError
        return number * 2

    async def many() -> list[Any]:
        results: list[Any] = []
        for number in range(6):
            try:
                results.append(await libraries.run(work(number)))
            except (KeyError, WasCancelled) as error:
                results.append(type(error))
        return results

    assert context.run(many()) == [0, 2, 4, KeyError, WasCancelled, 10]
    libraries.close()
    libraries.close()
    context.close()


def test_a_drain_waits_for_asyncio() -> None:
    """Around the context it would be refused: a nested poll does not serve an outer loop."""
    import asyncio

    from bottomhalf.block import Node

    class Slow(Node):
        driver = "slow"

        def __init__(self, graph: Graph) -> None:
            super().__init__(graph)
            self.size = 4096
            self.libraries = AsyncioThread(graph.context.host)

        async def co_pread(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = await self.libraries.run(self._fetch(len(buffer)))

        async def _fetch(self, length: int) -> bytes:
            await asyncio.sleep(0.001)
            return b"a" * length

        async def co_flush(self) -> None:
            pass

        def close(self) -> None:
            self.libraries.close()

    with bench(LinuxHost()) as it:
        node = Slow(it.graph)
        user = it.user(node)
        requests = [read(n, 10) for n in range(20)]
        user.submit(*requests)
        with it.graph.drained(node):
            assert not user.waiting
        assert all(request.buffer == b"a" * 10 for request in requests)
        assert user.do(flush()) == [0]
        wait_while(it.context, lambda: user.waiting, what="nothing")
