# SPDX-License-Identifier: Apache-2.0
"""Random requests on random graphs, in lists and in coroutines: the bytes are those of a bytearray, after each step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bottomhalf.block import Node
from bottomhalf.block.limits import RequestLimits
from bottomhalf.block.throttling import Limits, ThrottleGroup
from bottomhalf.block.watching import detect_zeroes
from bottomhalf.drivers.blkdebug import BlkdebugNode
from bottomhalf.drivers.blkverify import BlkverifyNode
from bottomhalf.drivers.copy_before_write import CopyBeforeWriteNode
from bottomhalf.drivers.copy_on_read import CopyOnReadNode
from bottomhalf.drivers.preallocate import PreallocateNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.drivers.throttle import ThrottleNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.request import DISCARD, FLUSH, FUA, MAY_UNMAP, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.host.sim import SimHost
from tests.block.bench import Bench, User, bench
from tests.drivers.helpers import Overlay, Ram

SIZE = 24576

layer = st.sampled_from(
    ["raw", "window", "limits", "align", "copy-on-read", "overlay", "preallocate", "throttle", "slow", "verify", "save"]
)
part = st.tuples(st.integers(0, SIZE), st.integers(0, 9000), st.integers(0, 255), st.sampled_from([0, FUA, MAY_UNMAP]))
step = st.tuples(
    st.sampled_from([READ, WRITE, WRITE, FLUSH, DISCARD, WRITE_ZEROES]), st.lists(part, min_size=1, max_size=5)
)
graph = st.tuples(st.sampled_from(["file", "direct", "ram"]), st.lists(layer, max_size=5), st.booleans())


def build(it: Bench, path: str, shape: Any) -> Node:
    """A graph whose top is SIZE bytes of zeroes."""
    bottom, layers, detect = shape
    node: Node
    if bottom == "ram":
        node = Ram(it.graph, bytes(SIZE), delay_ns=50)
    else:
        node = it.file(path, direct=bottom == "direct", unmap=True)
    for name in layers:
        match name:
            case "raw":
                node = RawNode(it.graph, file=node, unmap=True)
            case "window":
                node = RawNode(it.graph, file=Ram(it.graph, bytes(SIZE + 1000)), offset=700, size=SIZE)
            case "limits":
                unit = max(512, node.request_alignment)
                limits = RequestLimits(4 * unit, 2 * unit, 8 * unit, unit, 16 * unit)
                node = BlkdebugNode(it.graph, image=node, limits=limits, align=unit, unmap=True)
            case "align":
                node = BlkdebugNode(it.graph, image=node, align=4096, unmap=True)
            case "copy-on-read":
                node = CopyOnReadNode(it.graph, file=node, unmap=True)
            case "overlay":
                node = CopyOnReadNode(it.graph, file=Overlay(it.graph, node), unmap=True)
            case "preallocate":
                node = PreallocateNode(it.graph, file=node, prealloc_align=4096, unmap=True)
            case "throttle" | "slow":
                limited = Limits.from_options({"iops-total": 200, "bps-write": 10**6} if name == "slow" else {})
                node = ThrottleNode(it.graph, file=node, group=ThrottleGroup("g", limited), unmap=True)
            case "verify":
                node = BlkverifyNode(it.graph, raw=node, test=Ram(it.graph, bytes(SIZE)), unmap=True)
                node = RawNode(it.graph, file=node)
            case "save":
                node = CopyBeforeWriteNode(it.graph, file=node, target=Ram(it.graph, bytes(SIZE)), unmap=True)
    if detect:
        detect_zeroes(node, unmap=True)
    return node


def requests_of(op: int, parts: Any) -> list[Request]:
    """Requests within the disk that do not overlap, so that their order means nothing."""
    made: list[Request] = []
    for offset, length, fill, flags in parts:
        length = min(length, SIZE - offset)
        if op != READ and any(offset < r.offset + r.length and r.offset < offset + length for r in made):
            continue
        buffer = memoryview(bytearray([fill]) * length) if op in (READ, WRITE) else None
        where = (0, 0) if op == FLUSH else (offset, length)
        made.append(Request(op, *where, buffer, flags if op in (WRITE, WRITE_ZEROES) else 0))
    return made


def in_lists(it: Bench, user: User, requests: list[Request]) -> None:
    assert user.do(*requests) == [0] * len(requests)


def in_coroutines(it: Bench, user: User, requests: list[Request]) -> None:
    """The nodes' coroutine doors themselves, without a backend."""
    node = user.backend.node
    for request in requests:
        if request.op == READ:
            body = node.co_pread(request.offset, request.buffer)
        elif request.op == WRITE:
            body = node.co_pwrite(request.offset, request.buffer, request.flags)
        elif request.op == FLUSH:
            body = node.co_flush()
        elif request.op == DISCARD:
            body = node.co_discard(request.offset, request.length)
        else:
            body = node.co_write_zeroes(request.offset, request.length, request.flags)
        it.context.run(body)


def play(host: Any, paths: list[str], shape: Any, steps: Any) -> None:
    with bench(host) as it:
        model = bytearray(SIZE)
        twins = [it.user(build(it, path, shape)) for path in paths]
        for op, parts in steps:
            if op == DISCARD:  # what reads there afterwards is not defined
                steps_now = [DISCARD, WRITE_ZEROES]
            else:
                steps_now = [op]
            for now in steps_now:
                for request in requests_of(now, parts):
                    if now == WRITE:
                        model[request.offset : request.offset + request.length] = request.buffer
                    elif now == WRITE_ZEROES:
                        model[request.offset : request.offset + request.length] = bytes(request.length)
                for way, user in zip((in_lists, in_coroutines), twins, strict=True):
                    requests = requests_of(now, parts)
                    ranges = [(request.offset, request.offset + request.length) for request in requests]
                    way(it, user, requests)
                    if now == READ:
                        for request, (begin, end) in zip(requests, ranges, strict=True):
                            assert request.buffer == model[begin:end]
            for way, user in zip((in_lists, in_coroutines), twins, strict=True):
                everything = Request(READ, 0, SIZE, memoryview(bytearray(SIZE)))
                way(it, user, [everything])
                assert everything.buffer == model


@given(seed=st.integers(0, 10_000), shape=graph, steps=st.lists(step, max_size=6))
def test_on_the_simulated_host(seed: int, shape: Any, steps: Any) -> None:
    host = SimHost(seed)
    for name in ("a", "b"):
        host.add_file(name, SIZE)
    play(host, ["a", "b"], shape, steps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a file system that has O_DIRECT, if there is one."""
    return tmp_path_factory.mktemp("graphs")


@settings(max_examples=25)
@given(shape=graph, steps=st.lists(step, max_size=5))
def test_on_the_real_host(folder: Path, shape: Any, steps: Any) -> None:
    paths = [str(folder / name) for name in ("a", "b")]
    for path in paths:
        with open(path, "wb") as file:
            os.truncate(file.fileno(), SIZE)
    bottom, layers, detect = shape
    layers = ["throttle" if layer == "slow" else layer for layer in layers]  # real time would pass
    try:
        play(LinuxHost(), paths, (bottom, layers, detect), steps)
    except Exception as error:
        if bottom == "direct" and "does not support O_DIRECT" in str(error):
            return
        raise
